"""What a task is, and the single gymnasium environment made from one."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import gymnasium
import mujoco
import numpy as np

from envs import render
from envs.arrays import Array
from envs.simulator import Simulator, State

__all__ = ["Outcome", "State", "Task", "TaskEnv", "make"]

Obs = dict[str, Array]


class Outcome(NamedTuple):
    """What a state is worth; every array has the state's leading axes and is of its kind, numpy or torch."""

    reward: Array  # float64
    success: Array  # bool
    metrics: dict[str, Array]  # floats, by name


class Task:
    """A task is its MJCF plus pure functions over arrays of MuJoCo states; it holds no simulation.

    A subclass sets the attributes and writes mjcf, reset, control, observe and outcome. control, observe and outcome take numpy or torch
    (envs.arrays: xp = namespace(x), constants by like(...)) on any device, float32 or float64, with any leading axes, (n, ...) or
    (n, t, ...), answer in kind and change no input. Adding one: this class in a new file, one line in conf/env/.
    """

    name: str
    fps: float  # control steps per second
    substeps: int  # physics steps per control step
    camera: str  # the MJCF camera that videos are seen through
    action_semantics: str
    expert_noise: float | tuple[float, ...] = 0.0  # standard deviation per action dimension, for collecting demonstrations
    max_steps: int  # control steps until truncation
    units: dict[str, str]  # of every observation key and of "action"
    observation_space: gymnasium.spaces.Dict
    action_space: gymnasium.spaces.Box

    def mjcf(self) -> str:
        """The model as an MJCF string."""
        raise NotImplementedError

    def reset(self, seed: int) -> State:
        """One initial state, without leading axes: a pure function of the seed."""
        raise NotImplementedError

    def control(self, action: Array) -> Array:
        """Actions (..., d) as MuJoCo controls (..., nu)."""
        raise NotImplementedError

    def observe(self, state: State) -> Obs:
        """What the robot sees: {key: (..., *shape)} float32, as in observation_space."""
        raise NotImplementedError

    def outcome(self, state: State) -> Outcome:
        """Reward, success and metrics together, because they share their costly parts."""
        raise NotImplementedError

    def reward(self, state: State) -> Array:
        return self.outcome(state).reward

    def success(self, state: State) -> Array:
        return self.outcome(state).success

    def metrics(self, state: State) -> dict[str, Array]:
        return self.outcome(state).metrics

    def expert(self, n: int, seed: int) -> Any:
        """A scripted controller of n environments: act(obs {key: (n, ...)}) -> (n, d), reset(done (n,) bool)."""
        raise NotImplementedError(f"{self.name} has no scripted expert: train on recorded demonstrations instead")

    @property
    def action_shape(self) -> tuple[int, ...]:
        return self.action_space.low.shape

    @cached_property
    def model(self) -> mujoco.MjModel:
        return mujoco.MjModel.from_xml_string(self.mjcf())


def box(low: Any, high: Any, shape: tuple[int, ...]) -> gymnasium.spaces.Box:
    """A float32 Box of this shape; low and high broadcast from the right."""
    low, high = (np.broadcast_to(np.asarray(bound, np.float32), shape) for bound in (low, high))
    return gymnasium.spaces.Box(low, high, dtype=np.float32)


def make(task: str, render_mode: str | None = None, size: int = 256, **options: Any) -> TaskEnv:
    """The entry point behind gymnasium.make: task is "module:Class", options are the task's own arguments."""
    module, _, name = task.partition(":")
    cls = getattr(import_module(module), name)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise ValueError(f"{task!r} names no Task: give 'module:Class' of a subclass of envs.task.Task")
    return TaskEnv(cls(**options), render_mode=render_mode, size=size)


class TaskEnv(gymnasium.Env):
    """One world of a task. Terminates on success, truncates after max_steps; info holds success and the task's metrics.

    reset(seed=) starts from task.reset(seed), without a seed from a random one; options={"state": State} starts from a state.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, task: Task, render_mode: str | None = None, size: int = 256) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is unknown: use 'rgb_array' or None")
        self.task, self.render_mode, self.size = task, render_mode, size
        self.metadata = {**TaskEnv.metadata, "render_fps": task.fps}
        self.observation_space, self.action_space = task.observation_space, task.action_space
        self._simulator = Simulator(task.model, 1, substeps=task.substeps, threads=1)
        self._state: State | None = None
        self._elapsed = 0

    @property
    def state(self) -> State:
        """The present state, leading axis 1."""
        if self._state is None:
            raise RuntimeError("no episode is running: call reset first")
        return self._state

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        state = (options or {}).get("state")
        if state is None:
            state = self.task.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._state, self._elapsed = State.stack([state]), 0
        self._simulator.write(np.zeros(1, int), self._state)
        _, _, info = self._judge()
        return self._observe(), info

    def step(self, action: np.ndarray) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        checked = check_actions(np.asarray(action)[None, None], (1, 1, *self.task.action_shape), np.zeros(1, int))
        if self._state is None:
            raise RuntimeError("no episode is running: call reset first")
        self._state = self._simulator.run(np.zeros(1, int), self.task.control(checked))[:, 0]
        if np.isnan(self._state.qpos).any():
            raise RuntimeError(self._simulator.why(0))
        self._elapsed += 1
        reward, success, info = self._judge()
        return self._observe(), reward, success, self._elapsed >= self.task.max_steps, info

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        return render.frames(self.task.model, self.state.qpos, self.state.mocap_pos, camera=self.task.camera, size=self.size)[0]

    def close(self) -> None:
        self._simulator.close()
        render.release()

    def _observe(self) -> Obs:
        return {key: value[0] for key, value in self.task.observe(self.state).items()}

    def _judge(self) -> tuple[float, bool, dict[str, Any]]:
        reward, success, metrics = self.task.outcome(self.state)
        info = {key: float(value[0]) for key, value in metrics.items()}
        return float(reward[0]), bool(success[0]), {"success": bool(success[0]), **info}


def check_actions(actions: np.ndarray, shape: tuple[int, ...], envs: np.ndarray) -> np.ndarray:
    """actions as float64, or a ValueError: they must have this shape (n, t, d) and, for the given envs (m,), be finite."""
    if actions.shape != shape:
        raise ValueError(f"actions have shape {actions.shape}, expected {shape}: envs, control steps, action")
    actions = actions.astype(np.float64)
    for env in envs:
        if not np.isfinite(actions[env]).all():
            raise ValueError(f"the action of env {env} is not finite: {actions[env].tolist()}; expected {shape[1:]} finite numbers")
    return actions

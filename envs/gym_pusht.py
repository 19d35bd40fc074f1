"""The original pymunk Push-T (package gym-pusht) behind our names, so that one checkpoint can be scored in both simulators.

The physics is the original's; starts, observations, reward and success are envs.pusht.PushT's own functions of the original's pose.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import gymnasium
import numpy as np

from envs.pusht import CENTRE_OF_MASS, PushT, to_world
from envs.task import Obs, check_actions


class GymPushT(gymnasium.Env):
    """One world of gym-pusht. Terminates on success, truncates after max_steps; info: success and coverage.

    reset(seed=) starts where PushT.reset(seed) does (gym-pusht's own seeds draw other states), without a seed at random;
    options={"vector": (5,) agent xy, block xy [px], angle [rad]} starts there. Renders to arrays only, never into a window.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}
    name = "gym_pusht"
    action_semantics = PushT.action_semantics
    expert_noise = 0.0

    def __init__(
        self,
        *,
        obs: Literal["keypoint", "image", "state", "full"] = "keypoint",
        success_coverage: float = 0.95,
        max_steps: int = 300,
        render_mode: str | None = None,
        size: int = 256,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is unknown: use 'rgb_array' or None")
        self.task, self.render_mode = PushT(obs=obs, success_coverage=success_coverage, max_steps=max_steps), render_mode
        self.observation_space, self.action_space = self.task.observation_space, self.task.action_space
        self.units, self.max_steps = self.task.units, self.task.max_steps
        self._pymunk = _original()(render_mode="rgb_array", visualization_width=size, visualization_height=size)
        self._elapsed = -1

    @property
    def vector(self) -> np.ndarray:
        """The present state (5,): agent xy, block xy [px], angle [rad], not wrapped."""
        if self._elapsed < 0:
            raise RuntimeError("no episode is running: call reset first")
        agent, block = self._pymunk.agent, self._pymunk.block
        return np.array([*agent.position, *block.position, block.angle])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        vector = (options or {}).get("vector")
        if vector is None:
            vector = self.task.vector(self.task.reset(int(self.np_random.integers(2**31)) if seed is None else seed))
        vector = np.asarray(vector, np.float64)
        # The original sets the position before the angle, which then turns the block about its centre of mass: ask for the
        # position that ends at the right one.
        stem = np.array([0.0, CENTRE_OF_MASS])
        position = to_world(stem[None], vector[2:])[0] - stem
        self._pymunk.reset(options={"reset_to_state": np.array([*vector[:2], *position, vector[4]])})
        self._elapsed = 0
        obs, _, _, info = self._judge()
        return obs, info

    def step(self, action: np.ndarray) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        checked = check_actions(np.asarray(action)[None, None], (1, 1, 2), np.zeros(1, int))[0, 0]
        if self._elapsed < 0:
            raise RuntimeError("no episode is running: call reset first")
        self._pymunk.step(np.clip(checked, self.task.action_space.low, self.task.action_space.high))
        self._elapsed += 1
        obs, reward, success, info = self._judge()
        return obs, reward, success, self._elapsed >= self.task.max_steps, info

    def render(self) -> np.ndarray | None:
        return None if self.render_mode is None else self._pymunk.render()

    def expert(self, seed: int) -> Any:
        raise NotImplementedError("gym-pusht has no scripted expert: train on the human demonstrations instead")

    def close(self) -> None:
        self._pymunk.close()

    def _judge(self) -> tuple[Obs, float, bool, dict[str, Any]]:
        state = self.task.state(self.vector, velocity=np.asarray(self._pymunk.agent.velocity))
        outcome = self.task.outcome(state)
        success = bool(outcome.success)
        return self.task.observe(state), float(outcome.reward), success, {"success": success, "coverage": float(outcome.metrics["coverage"])}


def _original() -> Any:
    """gym-pusht's environment class."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # pygame greets on stdout
    try:
        from gym_pusht.envs import PushTEnv
    except ImportError as error:
        raise ImportError(f"the original Push-T does not import ({error}). Install it: pip install dipole[pymunk]") from error
    return PushTEnv

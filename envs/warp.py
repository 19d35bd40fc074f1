"""Thousands of worlds of a task on a GPU, by mujoco_warp: states, observations and actions stay there, as torch tensors.

The control step's physics steps are captured once as a CUDA graph and replayed. On the CPU the same calls are made one by one: far
slower than BatchEnv, for tests and for code on its way to a GPU. Everything is float32; on a GPU the order of atomic additions, and so
the last bits, differ from run to run.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from envs import render
from envs.simulator import State
from envs.task import Task
from envs.vector import STILL, ChunkEnv
from envs.worlds import STATE, Room, Worlds, guess_room, spread

Tensors = dict[str, torch.Tensor]
HUGE = 1e10  # MuJoCo's own limit for positions and velocities, which mujoco_warp does not check


class WarpEnv(ChunkEnv):
    """BatchEnv's interface and rules, with torch tensors on `device` in and out: float32, bool, and int64 for elapsed.

    device: a name like "cuda:1"; None: the GPU, or the CPU where there is none.   arrays: "numpy" for copies in numpy instead.
    Every world is simulated at every step; those that have ended or are not active are put back.
    A world fails when its state or reward is not finite; what a task's function raises is raised.
    """

    def __init__(self, task: Task, num_envs: int, device: str | None = None, *, arrays: Literal["torch", "numpy"] = "torch", room: Room | None = None) -> None:
        if arrays not in ("torch", "numpy"):
            raise ValueError(f"arrays {arrays!r} is unknown: use 'torch' or 'numpy'")
        super().__init__(num_envs, task.observation_space, task.action_space)
        self.task, self.arrays = task, arrays
        try:
            self.worlds = Worlds(task.model, num_envs, substeps=task.substeps, device=device, room=room or guess_room(task))
        except NotImplementedError as error:
            raise ValueError(f"mujoco_warp cannot simulate {task.name} ({error}): use simulator=threads") from error
        self.device = self.worlds.device
        self._rows: Tensors = {}  # where every env stands, (n, ...)

    @property
    def state(self) -> State:
        """The present states (n, ...), tensors."""
        if not self._rows:
            raise RuntimeError(STILL)
        return State(*(self._rows[name] for name in STATE))

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes: env i from task.reset(seed + i), or seed[i], or a random seed.

        options: "reset_mask" (n,) bool restarts only those envs; "state" a State (n, ...), of either kind, to start from instead of seeds.
        """
        options, n = options or {}, self.num_envs
        mask = torch.as_tensor(options.get("reset_mask", np.ones(n, bool))).cpu().numpy()
        if mask.shape != (n,) or mask.dtype != bool:
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}, expected bool {(n,)}")
        if not self._rows and not mask.all():
            raise RuntimeError("the first reset starts every env: leave out reset_mask")
        envs, seeds, start = np.flatnonzero(mask), self._seeds(seed), options.get("state")
        if start is not None and len(start.qpos) != n:
            raise ValueError(f"state has {len(start.qpos)} rows, expected {n}")
        start = State.stack([self.task.reset(seeds[i]) for i in envs]) if start is None else start[envs]
        start = State(*(torch.as_tensor(getattr(start, name), dtype=torch.float32, device=self.device) for name in STATE))
        index = torch.as_tensor(envs, device=self.device)
        self.worlds.write(index, start)
        fresh = self._judge(start, torch.zeros(len(envs), dtype=torch.int64, device=self.device))
        rows = {name: value.clone() for name, value in (self._rows or fresh).items()}
        for name, value in rows.items():
            value[index] = fresh[name]
        self._rows, self._errors[envs] = rows, None
        for i in envs:
            self._seed[i] = None if "state" in options else seeds[i]
        return self._given(self.task.observe(self.state)), self._told({name: value.clone() for name, value in rows.items()})

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """One control step, actions (n, d): step_chunk without its time axis."""
        obs, *flags, info = self.step_chunk(torch.as_tensor(actions)[:, None])
        error = info.pop("error")
        obs, info = ({name: value[:, 0] for name, value in each.items()} for each in (obs, info))
        reward, terminated, truncated = (each[:, 0] for each in flags)
        return obs, reward, terminated, truncated, {**info, "error": error}

    def step_chunk(self, actions: Any, active: Any = None, last: int | None = None) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:
        """As BatchEnv.step_chunk: actions (n, t, d) run open loop -> obs {key: (n, last or t, ...)}, reward, terminated, truncated (n, t), info."""
        if not self._rows:
            raise RuntimeError(STILL)
        if last is not None and last < 1:
            raise ValueError(f"last={last} must be at least 1: the next action needs an observation")
        running = ~(self._rows["terminated"] | self._rows["truncated"])
        if active is not None:
            running &= torch.as_tensor(active, device=self.device)
        actions = self._checked(actions, running)
        n, t = actions.shape[:2]
        steps, envs = torch.arange(1, t + 1, device=self.device), torch.arange(n, device=self.device)[:, None]

        path = self._judge(self.worlds.run(self.task.control(actions)), self._rows["elapsed"][:, None] + steps)
        bad = ~torch.isfinite(path["reward"])
        for name in ("qpos", "qvel"):
            bad |= ~(path[name].abs() < HUGE).all(dim=2)
        ends = path["terminated"] | path["truncated"] | bad
        end = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), t - 1)
        failed = running & bad[envs[:, 0], end]
        done = torch.where(running, end + 1 - failed.long(), 0)[:, None]  # the control steps that an env does
        index = torch.minimum(steps, done)  # 0: where it stands now; what the worlds ran on to past the end is dropped
        rows = {name: torch.cat([self._rows[name][:, None], value], dim=1)[envs, index] for name, value in path.items()}
        rows["reward"] = torch.where(steps <= done, rows["reward"], 0.0)
        rows["truncated"] |= failed[:, None] & (steps > done)
        self._rows = {name: value[:, -1].clone() for name, value in rows.items()}
        self.worlds.keep(running & ~(self._rows["terminated"] | self._rows["truncated"]))
        for i in failed.nonzero()[:, 0].tolist():
            what = "its state or reward is not finite, or the state is huge: the simulation is unstable"
            self._errors[i] = f"{self._called(i)}, control step {int(self._rows['elapsed'][i]) + 1}: {what}"
        obs = self.task.observe(State(*(rows[name][:, -(last or t) :] for name in STATE)))
        return self._given(obs), *(self._given(rows[name]) for name in ("reward", "terminated", "truncated")), self._told(rows)

    def render_states(self, qpos: Any, mocap_pos: Any, size: int = 256) -> np.ndarray:
        """Frames (t, size, size, 3) uint8 of states (t, nq), (t, nmocap, 3) kept from info: videos of chosen episodes."""
        qpos, mocap_pos = (torch.as_tensor(each).double().cpu().numpy() for each in (qpos, mocap_pos))
        return render.frames(self.task.model, qpos, mocap_pos, camera=self.task.camera, size=size)

    def close_extras(self, **kwargs: Any) -> None:
        render.release()

    def _checked(self, actions: Any, running: torch.Tensor) -> torch.Tensor:
        """actions (n, t, d) as a tensor here, zero for the envs that will not do them; or a ValueError."""
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        shape = (self.num_envs, actions.shape[1] if actions.ndim > 2 else 1, *self.task.action_shape)
        if actions.shape != shape:
            raise ValueError(f"actions have shape {tuple(actions.shape)}, expected {shape}: envs, control steps, action")
        actions = torch.where(spread(running, actions), actions, 0.0)
        if not (finite := torch.isfinite(actions).flatten(1).all(dim=1)).all():
            env = int(finite.int().argmin())
            raise ValueError(f"the action of env {env} is not finite: {actions[env].tolist()}; expected {shape[1:]} finite numbers")
        return actions

    def _judge(self, state: State, elapsed: torch.Tensor) -> Tensors:
        """Everything known about states reached after so many control steps (at 0 nothing has ended), by name."""
        reward, success, metrics = self.task.outcome(state)
        numbers = {**metrics, **{name: getattr(state, name) for name in STATE}, "reward": reward}
        return {
            **{name: value.float() for name, value in numbers.items()},
            "success": success,
            "elapsed": elapsed,
            "terminated": success & (elapsed > 0),
            "truncated": elapsed >= self.task.max_steps,
        }

    def _told(self, rows: Tensors) -> dict[str, Any]:
        kept = {name: value for name, value in rows.items() if name not in ("reward", "terminated", "truncated", "qvel")}
        return {**self._given(kept), "error": self._errors.copy()}

    def _given(self, value: Any) -> Any:
        if self.arrays == "torch":
            return value
        return {name: each.cpu().numpy() for name, each in value.items()} if isinstance(value, dict) else value.cpu().numpy()


def closed_loop(env: WarpEnv, plan: Callable[[Tensors], torch.Tensor], *, t_obs: int, execute: int, chunks: int) -> int:
    """Let `plan` drive all worlds for so many chunks, and count the control steps they did. Nothing leaves the device but "is any episode over?".

    plan: {key: (n, t_obs, ...)} -> actions (n, t, d), of which the first `execute` are done; Planner.plan is one.
    A world whose episode ends starts again where it began: the n starting states are made once.
    """
    if t_obs > execute:
        raise ValueError(f"t_obs={t_obs} is more than execute={execute}: a chunk shows only its own steps")
    starts = State.stack([env.task.reset(seed) for seed in range(env.num_envs)])
    starts = State(*(torch.as_tensor(getattr(starts, name), dtype=torch.float32, device=env.device) for name in STATE))
    obs, info = env.reset(options={"state": starts})
    seen = {key: torch.stack([value] * t_obs, dim=1) for key, value in obs.items()}
    steps = torch.zeros_like(info["elapsed"])
    for _ in range(chunks):
        before = info["elapsed"]
        seen, _, terminated, truncated, info = env.step_chunk(plan(seen)[:, :execute], last=t_obs)
        ended, info = (terminated | truncated)[:, -1], {"elapsed": info["elapsed"][:, -1]}
        steps += info["elapsed"] - before
        if ended.any():
            first, info = env.reset(options={"reset_mask": ended, "state": starts})
            seen = {key: torch.where(spread(ended, value), first[key][:, None], value) for key, value in seen.items()}
    return int(steps.sum())

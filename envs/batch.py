"""Many worlds of a task at once: whole action chunks per call, observations and rewards computed for the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space

from envs import render
from envs.simulator import Simulator, State
from envs.task import Obs, Task, check_actions

Rows = dict[str, np.ndarray]


class BatchEnv(gymnasium.vector.VectorEnv):
    """n worlds of a task behind gymnasium's vector interface, plus step_chunk.

    Never resets by itself: a finished env stands still, rewarded 0, until reset(options={"reset_mask": ...}) names it.
    Equal seeds and actions give states bit-equal to TaskEnv's, whatever the threads.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED, "render_modes": []}

    def __init__(self, task: Task, num_envs: int, threads: int | None = None) -> None:
        self.task, self.num_envs = task, num_envs
        self.single_observation_space, self.single_action_space = task.observation_space, task.action_space
        self.observation_space = batch_space(task.observation_space, num_envs)
        self.action_space = batch_space(task.action_space, num_envs)
        self._simulator = Simulator(task.model, num_envs, substeps=task.substeps, threads=threads)
        self._now: Rows = {}  # where every env stands, (n, ...)

    @property
    def state(self) -> State:
        """The present states (n, ...)."""
        if not self._now:
            raise RuntimeError("no episodes are running: call reset first")
        return _state(self._now)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Obs, dict[str, Any]]:
        """Start episodes: env i from task.reset(seed + i), or seed[i], or a random seed.

        options: "reset_mask" (n,) bool restarts only those envs; "state" a State (n, ...) to start from instead of seeds.
        """
        options = options or {}
        mask = np.asarray(options.get("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}, expected bool {(self.num_envs,)}")
        if not self._now and not mask.all():
            raise RuntimeError("the first reset starts every env: leave out reset_mask")
        start = options.get("state") or State.stack([self.task.reset(each) for each in self._seeds(seed)])
        if len(start.qpos) != self.num_envs:
            raise ValueError(f"state has {len(start.qpos)} rows, expected {self.num_envs}")
        envs = np.flatnonzero(mask)
        self._simulator.write(envs, start[envs])
        fresh = self._judge(start, np.zeros(self.num_envs, int))
        kept = {key: value.copy() for key, value in (self._now or fresh).items()}
        for key, value in kept.items():
            value[envs] = fresh[key][envs]
        self._now = kept
        return self.task.observe(self.state), {key: value.copy() for key, value in _info(kept).items()}

    def step(self, actions: np.ndarray) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step, actions (n, d): step_chunk without its time axis."""
        obs, reward, terminated, truncated, info = self.step_chunk(np.asarray(actions)[:, None])
        obs, info = ({key: value[:, 0] for key, value in arrays.items()} for arrays in (obs, info))
        return obs, reward[:, 0], terminated[:, 0], truncated[:, 0], info

    def step_chunk(
        self, actions: np.ndarray, active: np.ndarray | None = None
    ) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Run actions (n, t, d) open loop; obs {key: (n, t, ...)} and reward, terminated, truncated (n, t) after each step.

        info: success and the task's metrics (n, t), qpos (n, t, nq) and mocap_pos (n, t, nmocap, 3) for render_states.
        Rows after an episode's end repeat its last state with reward 0. Envs that ended earlier, or are not in
        active (n,) bool, are not stepped, and any numbers will do as their actions.
        """
        if not self._now:
            raise RuntimeError("no episodes are running: call reset first")
        actions = np.asarray(actions)
        t = actions.shape[1] if actions.ndim == 3 else 1
        running = ~(self._now["terminated"] | self._now["truncated"])
        envs = np.flatnonzero(running if active is None else running & active)
        actions = check_actions(actions, (self.num_envs, t, *self.task.action_shape), envs)

        rows = {key: np.repeat(value[:, None], t, axis=1) for key, value in self._now.items()}
        rows["reward"][:] = 0.0
        if envs.size:
            elapsed = self._now["elapsed"][envs, None] + 1 + np.arange(t)
            path = self._judge(self._simulator.run(envs, self.task.control(actions[envs])), elapsed)
            over = path["terminated"] | path["truncated"]
            last = np.where(over.any(axis=1), over.argmax(axis=1), t - 1)[:, None]  # the step an episode ends with
            for key, value in path.items():
                # The simulator has run on past the end; what it found there is dropped, and only a reset uses that world again.
                rows[key][envs] = value[np.arange(envs.size)[:, None], np.minimum(np.arange(t), last)]
            rows["reward"][envs] *= np.arange(t) <= last
        self._now = {key: value[:, -1].copy() for key, value in rows.items()}
        return self.task.observe(_state(rows)), rows["reward"], rows["terminated"], rows["truncated"], _info(rows)

    def render_states(self, qpos: np.ndarray, mocap_pos: np.ndarray, size: int = 256) -> np.ndarray:
        """Frames (t, size, size, 3) uint8 of states (t, nq), (t, nmocap, 3) kept from info: videos of chosen episodes."""
        return render.frames(self.task.model, qpos, mocap_pos, camera=self.task.camera, size=size)

    def close_extras(self, **kwargs: Any) -> None:
        self._simulator.close()
        render.release()

    def _seeds(self, seed: int | Sequence[int] | None) -> list[int]:
        n = self.num_envs
        if seed is None:
            return self.np_random.integers(2**31, size=n).tolist()
        if isinstance(seed, (int, np.integer)):
            super().reset(seed=int(seed))
            return [int(seed) + i for i in range(n)]
        if len(seed) != n:
            raise ValueError(f"{len(seed)} seeds for {n} envs: give one per env, or one integer for seed, seed + 1, ...")
        return [int(each) for each in seed]

    def _judge(self, state: State, elapsed: np.ndarray) -> Rows:
        """Everything known about states reached after so many control steps (at 0 nothing has ended), by name."""
        outcome = self.task.outcome(state)
        return {
            **outcome.metrics,
            "qpos": state.qpos,
            "qvel": state.qvel,
            "mocap_pos": state.mocap_pos,
            "reward": outcome.reward,
            "success": outcome.success,
            "elapsed": elapsed,
            "terminated": outcome.success & (elapsed > 0),
            "truncated": elapsed >= self.task.max_steps,
        }


def _state(rows: Rows) -> State:
    return State(rows["qpos"], rows["qvel"], rows["mocap_pos"])


def _info(rows: Rows) -> dict[str, np.ndarray]:
    return {key: value for key, value in rows.items() if key not in ("reward", "terminated", "truncated", "qvel")}

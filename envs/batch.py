"""Many worlds of a task at once: whole action chunks per call, observations and rewards computed for the batch."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

from envs import render
from envs.rows import ELAPSED, REWARD, SUCCESS, TERMINATED, TRUNCATED, Fault, Faults, Rows, earliest, first_bad
from envs.simulator import Simulator, State
from envs.task import Task
from envs.vector import STILL, ChunkEnv


class BatchEnv(ChunkEnv):
    """n worlds of a task. Equal seeds and actions give states bit-equal to TaskEnv's, whatever the threads.

    options of reset: "state", a State (n, ...) to start from instead of seeds. info has qpos (n, t, nq) and mocap_pos
    (n, t, nmocap, 3) too, for render_states. A world fails when MuJoCo finds it unstable or one of the task's functions raises or
    gives a number that is not finite; a function that fails for a batch is asked again row by row, so that only the culprit leaves.
    """

    def __init__(self, task: Task, num_envs: int, threads: int | None = None) -> None:
        super().__init__(num_envs, task.observation_space, task.action_space)
        self.task = task
        self._simulator = Simulator(task.model, num_envs, substeps=task.substeps, threads=threads)

    @property
    def state(self) -> State:
        """The present states (n, ...)."""
        if not self._now:
            raise RuntimeError(STILL)
        return State(*(self._now[key] for key in (("info", "qpos"), ("state", "qvel"), ("info", "mocap_pos"))))

    def render_states(self, qpos: np.ndarray, mocap_pos: np.ndarray, size: int = 256) -> np.ndarray:
        """Frames (t, size, size, 3) uint8 of states (t, nq), (t, nmocap, 3) kept from info: videos of chosen episodes."""
        return render.frames(self.task.model, qpos, mocap_pos, camera=self.task.camera, size=size)

    def close_extras(self, **kwargs: Any) -> None:
        self._simulator.close()
        render.release()

    def _start(self, envs: np.ndarray, seeds: Sequence[int], options: dict[str, Any]) -> tuple[Rows, Faults]:
        faults: dict[int, Fault] = {}
        if (start := options.get("state")) is not None:
            if len(start.qpos) != self.num_envs:
                raise ValueError(f"state has {len(start.qpos)} rows, expected {self.num_envs}")
            start = start[envs]
        else:
            states = []
            for row, seed in enumerate(seeds):
                try:
                    states.append(_finite(self.task.reset(seed)))
                except Exception:
                    faults[row] = Fault(0, traceback.format_exc())
                    states.append(self._rest())
            start = State.stack(states)
        self._simulator.write(envs, start)
        rows, seen = self._look(start[:, None], np.zeros((envs.size, 1), int), 1)
        return {key: value[:, 0] for key, value in rows.items()}, _by_copy(envs, earliest(faults, seen))

    def _advance(self, envs: np.ndarray, actions: np.ndarray, last: int) -> tuple[Rows, Faults]:
        ctrl, faults = self._control(actions)
        path = self._simulator.run(envs, ctrl)
        stopped = {int(row): Fault(int(np.isnan(path.qpos[row]).any(-1).argmax()), self._simulator.why(int(envs[row])))
                   for row in np.flatnonzero(np.isnan(path.qpos[:, -1]).any(-1))}  # fmt: skip
        rows, seen = self._look(path, self._now[ELAPSED][envs, None] + 1 + np.arange(actions.shape[1]), last)
        return rows, _by_copy(envs, earliest(stopped, faults, seen))

    def _control(self, actions: np.ndarray) -> tuple[np.ndarray, Faults]:
        """The task's controls (m, t, nu); zeros where it gives none."""
        faults: dict[int, Fault] = {}
        try:
            ctrl = self.task.control(actions)
        except Exception:
            ctrl = np.zeros((*actions.shape[:2], self.task.model.nu))
            for row, action in enumerate(actions):
                try:
                    ctrl[row] = self.task.control(action)
                except Exception:
                    faults[row] = Fault(0, traceback.format_exc())
        if bad := first_bad({("", "control"): ctrl}):
            ctrl = np.nan_to_num(ctrl, posinf=0.0, neginf=0.0)
        return ctrl, earliest(faults, bad)

    def _look(self, state: State, elapsed: np.ndarray, last: int) -> tuple[Rows, Faults]:
        """Everything known about states (m, t, ...) reached after elapsed (m, t) control steps (at 0 nothing has ended).

        Observations are zero where an episode is over and, unless something is wrong, before the last `last` steps.
        """
        faults: Faults = {}
        try:
            rows = self._judge(state, elapsed, last)
        except Exception:
            rows, faults = self._judge_singly(state, elapsed)
        if (bad := first_bad(rows)) and last < elapsed.shape[1] and not faults:
            return self._look(state, elapsed, elapsed.shape[1])  # the last good observation may be an earlier one
        return rows, earliest(faults, bad)

    def _judge(self, state: State, elapsed: np.ndarray, last: int) -> Rows:
        outcome = self.task.outcome(state)
        terminated, truncated = outcome.success & (elapsed > 0), elapsed >= self.task.max_steps
        return {
            **self._observe(state, terminated | truncated, last),
            **{("info", key): value for key, value in outcome.metrics.items()},
            ("info", "qpos"): state.qpos,
            ("state", "qvel"): state.qvel,
            ("info", "mocap_pos"): state.mocap_pos,
            REWARD: outcome.reward,
            SUCCESS: outcome.success,
            ELAPSED: elapsed,
            TERMINATED: terminated,
            TRUNCATED: truncated,
        }

    def _observe(self, state: State, over: np.ndarray, last: int) -> Rows:
        t = over.shape[1]
        end, steps = np.where(over.any(axis=1), over.argmax(axis=1), t - 1)[:, None], np.arange(t)
        shown = (np.minimum(t - last, end) <= steps) & (steps <= end)
        rows: Rows = {}
        for key, value in self.task.observe(state[shown]).items():
            rows["obs", key] = np.zeros((*over.shape, *value.shape[1:]), value.dtype)
            rows["obs", key][shown] = value
        return rows

    def _judge_singly(self, state: State, elapsed: np.ndarray) -> tuple[Rows, Faults]:
        """_judge for a task that raises on some of the states (m, t, ...); it raises still if even the model's own pose is too much."""
        cells: dict[tuple[int, int], Rows] = {}
        faults = {}
        for row, k in np.ndindex(elapsed.shape):
            if row not in faults:
                one = slice(row, row + 1), slice(k, k + 1)
                try:
                    cells[row, k] = self._judge(state[one], elapsed[one], 1)
                except Exception:
                    faults[row] = Fault(k, traceback.format_exc())
        blank = next(iter(cells.values()), None) or self._judge(self._rest()[None, None], np.zeros((1, 1), int), 1)
        rows = {key: np.empty((*elapsed.shape, *value.shape[2:]), value.dtype) for key, value in blank.items()}
        for row, k in np.ndindex(elapsed.shape):
            for key, value in cells.get((row, k), blank).items():
                rows[key][row, k] = value[0, 0]
        return rows, faults

    def _rest(self) -> State:
        """The model's own pose: what stands where a seed gives nothing."""
        data = mujoco.MjData(self.task.model)
        return State(data.qpos, data.qvel, data.mocap_pos)


def _by_copy(envs: np.ndarray, faults: Faults) -> Faults:
    return {int(envs[row]): fault for row, fault in faults.items()}


def _finite(state: State) -> State:
    for name in ("qpos", "qvel", "mocap_pos"):
        if not np.isfinite(value := getattr(state, name)).all():
            raise ValueError(f"the task's reset gives a {name} that is not finite: {value}")
    return state

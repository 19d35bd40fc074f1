"""What every batch of environments has in common: whole chunks, episodes that end at different steps, copies that fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space

from envs.rows import ELAPSED, REWARD, TERMINATED, TRUNCATED, Fault, Faults, Rows, named, put
from envs.task import Obs, check_actions

STILL = "no episodes are running: call reset first"


class ChunkEnv(gymnasium.vector.VectorEnv):
    """n copies behind gymnasium's vector interface, plus step_chunk.

    Never resets by itself: a finished copy stands still, rewarded 0, until reset(options={"reset_mask": ...}) names it. So does one
    that fails: it is truncated, its last good observation stays, and info["error"] (n,), None where all is well, says what happened.
    A subclass writes _start and _advance.
    """

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED, "render_modes": []}

    def __init__(self, num_envs: int, observation_space: gymnasium.spaces.Dict, action_space: gymnasium.spaces.Box) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space, self.action_space = batch_space(observation_space, num_envs), batch_space(action_space, num_envs)
        self._now: Rows = {}  # where every copy stands, (n, ...)
        self._errors = np.full(num_envs, None, object)
        self._seed: list[int | None] = [None] * num_envs

    def _start(self, envs: np.ndarray, seeds: Sequence[int], options: dict[str, Any]) -> tuple[Rows, Faults]:
        """Begin episodes on copies envs (m,): rows (m, ...) of the starts, faults by copy."""
        raise NotImplementedError

    def _advance(self, envs: np.ndarray, actions: np.ndarray, last: int) -> tuple[Rows, Faults]:
        """Run actions (m, t, d) on copies envs (m,): rows (m, t, ...), of which those after an episode's end or a fault do not count."""
        raise NotImplementedError

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        """Start episodes: copy i from seed + i, or seed[i], or a random seed.

        options: "reset_mask" (n,) bool restarts only those copies; the others are the subclass's.
        """
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, bool)))
        if mask.shape != (self.num_envs,) or mask.dtype != bool:
            raise ValueError(f"reset_mask is {mask.dtype} {mask.shape}, expected bool {(self.num_envs,)}")
        if not self._now and not mask.all():
            raise RuntimeError("the first reset starts every env: leave out reset_mask")
        envs, seeds = np.flatnonzero(mask), self._seeds(seed)
        fresh, faults = self._start(envs, [seeds[i] for i in envs], options)
        now = {key: value.copy() for key, value in self._now.items()}
        put(now, envs, fresh, (self.num_envs,))
        self._errors[envs] = None
        self._now = now
        for i in envs.tolist():
            self._seed[i] = None if "state" in options else seeds[i]
        for i, fault in faults.items():
            now[TRUNCATED][i], self._errors[i] = True, f"{self._called(i)}, {'reset' if mask[i] else 'between steps'}: {fault.text}"
            for value in named(now, "obs").values() if mask[i] else ():
                value[i] = 0
        rows = {key: value.copy() for key, value in now.items()}
        return named(rows, "obs"), self._info(rows)

    def step(self, actions: np.ndarray) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step, actions (n, d): step_chunk without its time axis."""
        obs, reward, terminated, truncated, info = self.step_chunk(np.asarray(actions)[:, None])
        error = info.pop("error")
        obs, info = ({key: value[:, 0] for key, value in arrays.items()} for arrays in (obs, info))
        return obs, reward[:, 0], terminated[:, 0], truncated[:, 0], {**info, "error": error}

    def step_chunk(
        self, actions: np.ndarray, active: np.ndarray | None = None, last: int | None = None
    ) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Run actions (n, t, d) open loop; obs {key: (n, t, ...)} and reward, terminated, truncated (n, t) after each step.

        info: success, elapsed and the metrics (n, t), error (n,) None or a text. Rows after an episode's end repeat its last state
        with reward 0. Copies that ended earlier, or are not in active (n,) bool, are not stepped, and any numbers will do as their actions.
        last: observe after the last so many steps only (default: all), obs (n, min(last, t), ...): pictures take longer than physics.
        """
        if not self._now:
            raise RuntimeError(STILL)
        actions = np.asarray(actions)
        t = actions.shape[1] if actions.ndim > 2 else 1
        if t < 1:
            raise ValueError(f"actions have shape {actions.shape}: a chunk is one control step at least")
        if last is not None and last < 1:
            raise ValueError(f"last={last} must be at least 1: the next action needs an observation")
        last = min(last or t, t)
        running = ~(self._now[TERMINATED] | self._now[TRUNCATED])
        envs = np.flatnonzero(running if active is None else running & active)
        actions = check_actions(actions, (self.num_envs, t, *(self.single_action_space.shape or ())), envs)

        rows = {key: np.repeat(value[:, None], t, axis=1) for key, value in self._now.items()}
        rows[REWARD][:] = 0.0
        if envs.size:
            path, faults = self._advance(envs, actions[envs], last)
            over = path[TERMINATED] | path[TRUNCATED]
            end = np.where(over.any(axis=1), over.argmax(axis=1), t - 1)[:, None]  # the step an episode ends with
            index = np.arange(envs.size)[:, None], np.minimum(np.arange(t), end)
            # A simulator may have run on past the end; what it found there is dropped, and only a reset uses that copy again.
            put(rows, envs, {key: value[index] for key, value in path.items()}, (self.num_envs, t))
            rows[REWARD][envs] *= np.arange(t) <= end
            ends = dict(zip(envs.tolist(), end[:, 0].tolist(), strict=True))
            for i, fault in faults.items():
                if fault.step <= ends.get(i, 0):
                    self._leave(rows, i, fault)
        self._now = {key: value[:, -1].copy() for key, value in rows.items()}
        obs = {key: value[:, t - last :] for key, value in named(rows, "obs").items()}
        return obs, rows[REWARD], rows[TERMINATED], rows[TRUNCATED], self._info(rows)

    def _leave(self, rows: Rows, i: int, fault: Fault) -> None:
        """Copy i has failed: from that step of rows (n, t, ...) on it stands where it last was, truncated."""
        k = fault.step
        for key, value in rows.items():
            value[i, k:] = value[i, k - 1] if k else self._now[key][i] if key in self._now else np.nan
        rows[REWARD][i, k:], rows[TRUNCATED][i, k:] = 0.0, True
        self._errors[i] = f"{self._called(i)}, control step {self._now[ELAPSED][i] + k + fault.late + 1}: {fault.text}"

    def _called(self, i: int) -> str:
        return f"copy {i}" if self._seed[i] is None else f"copy {i} (seed {self._seed[i]})"

    def _info(self, rows: Rows) -> dict[str, Any]:
        return {**named(rows, "info"), "error": self._errors.copy()}

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


"""Closed-loop evaluation: distinct seeds, as many episodes as asked or as the interval needs, faults that cost one episode each."""
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from policy.control import Controller, NotFinite
from policy.episodes import Episode, Looked, Report
from policy.stats import enough

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

Obs = dict[str, np.ndarray]
Keep = Callable[[Episode], None]
DRAWN, NO_MEASURE = ("qpos", "mocap_pos"), ("success", "is_success", "elapsed", "error")


def evaluate(controller: Controller, envs: "VectorEnv", episodes: int, seed: int, *, task: str = "", until: float | None = None,
             on_progress: Callable[[int], None] = lambda done: None, keep: Keep | None = None) -> Report:
    """Roll `episodes` episodes out from the distinct seeds seed, seed + 1, …, as many at a time as envs has copies.

    until: stop as soon as the interval of success is ± until, looking when all copies have finished; `episodes` is then the most.
    keep: told of every episode, with all that the environment showed in `observed`, which is dropped afterwards: for recording it.
    Copies with `step_chunk` (envs.vector.ChunkEnv) take whole chunks; any other VectorEnv is stepped, and raises what a copy raises.
    Finished copies leave the batch. So does a copy whose info["error"] says so, or whose observation, reward or plan is not finite: its
    episode has an error and is no success. Success is what info says at any step, else a termination, be it
    in the last step that time allows. Episode i is the same whatever the number of copies, also for samplers that draw. ValueError when
    two seeds start the same episode, NotFinite when not one of the first plans is finite.
    """
    cpu = time.process_time()
    report = play(controller, envs, episodes, seed, task=task, until=until, on_progress=on_progress, keep=keep)
    report.cpu_s = time.process_time() - cpu
    report.plan_one_s = single_plans(controller)
    return report


def play(controller: Controller, envs: "VectorEnv", episodes: int, seed: int, *, task: str = "", until: float | None = None,
         on_progress: Callable[[int], None] = lambda done: None, starts: dict[bytes, int] | None = None, keep: Keep | None = None) -> Report:
    """`evaluate` without the plans for a single robot that it times at the end. starts {first observation: seed}: of those who share an evaluation."""
    if until is not None and not 0 < until < 0.5:
        raise ValueError(f"until={until} must be between 0 and .5: half the width of the interval of success, .03 for ± 3 %")
    start, space = time.perf_counter(), envs.single_action_space
    wide = space.high.astype(float) - space.low.astype(float)  # type: ignore[attr-defined]
    report = Report(task, controller.execute, controller.delay, controller.planner.spec.fps, np.where(np.isfinite(wide), wide, np.nan),
                    None if until is None else Looked(until, envs.num_envs, episodes))
    starts = {} if starts is None else starts
    while (done := len(report.episodes)) < episodes and not (done and until and enough(report.wins, done, until)):
        wave = list(range(seed + done, seed + min(done + envs.num_envs, episodes)))
        _wave(controller, envs, wave, report, starts, lambda finished, done=done: on_progress(done + finished), keep)  # type: ignore[misc]
    report.wall_s = time.perf_counter() - start
    return report


class _Track:
    """An episode while it runs: pieces of its arrays, chunk by chunk."""

    def __init__(self, seed: int):
        self.seed, self.success, self.ended, self.error = seed, False, "", ""
        self.pieces: dict[str, list[np.ndarray]] = {"reward": [], "actions": []}
        self.seen: dict[str, list[np.ndarray]] = {}

    def fail(self, error: str) -> None:
        self.success, self.ended, self.error = False, "fault", error

    def add(self, i: int, live: int, arrays: dict[str, np.ndarray]) -> None:
        """The first `live` steps of row i of arrays (n, t, …)."""
        for name, value in arrays.items():
            self.pieces.setdefault(name, []).append(value[i, :live])

    def see(self, i: int, live: int, obs: Obs) -> None:
        """The first `live` observations of row i of obs {key: (n, t, *shape)}: of the start, then behind every step."""
        for key, value in obs.items():
            self.seen.setdefault(key, []).append(value[i, :live])

    def episode(self) -> Episode:
        joined = {name: np.concatenate(each) if each else np.zeros(0, np.float32) for name, each in self.pieces.items()}
        reward, actions = joined.pop("reward"), joined.pop("actions")
        states = {name: joined.pop(name) for name in DRAWN if name in joined}
        observed = {key: np.concatenate(each)[:len(reward)] for key, each in self.seen.items()}
        return Episode(self.seed, self.success, reward, actions, self.ended, joined, states, self.error, observed)


def _wave(controller: Controller, envs: "VectorEnv", seeds: Sequence[int], report: Report, starts: dict[bytes, int],
          on_progress: Callable[[int], None], keep: Keep | None = None) -> None:
    """One episode on each of the first len(seeds) copies, added to the report."""
    n, tracks = len(seeds), [_Track(s) for s in seeds]
    keys = list(controller.planner.spec.obs)
    padded: Any = [*seeds, *([seeds[-1]] * (envs.num_envs - n))]  # spare copies are never looked at
    obs, info = envs.reset(seed=padded)
    for i, text in _faults(info, {k: np.asarray(obs[k])[:, None] for k in keys if k in obs}, np.zeros((envs.num_envs, 1)))[1].items():
        if i < n:
            tracks[i].fail(text)
    alive = np.array([i < n and not tracks[i].error for i in range(envs.num_envs)])
    controller.reset(seeds)
    if (rows := alive.nonzero()[0]).size:
        _refuse_repeats(starts, report.task, {i: seeds[i] for i in rows.tolist()}, obs)
        controller.observe({k: np.asarray(obs[k])[rows, None] for k in keys if k in obs}, rows)
        for i in rows.tolist() if keep else ():
            tracks[i].see(i, 1, {k: np.asarray(x)[:, None] for k, x in obs.items()})
    while alive.any():
        actions = _plan(controller, alive, tracks, report)
        if not alive.any():
            break
        tick = time.perf_counter()
        obs, reward, terminated, truncated, info = _step_chunk(envs, actions, alive, actions.shape[1] if keep else controller.planner.spec.t_obs)
        report.env_s += time.perf_counter() - tick
        over = terminated | truncated
        first_bad, errors = _faults(info, {k: np.asarray(obs[k]) for k in keys}, reward)
        arrays = {"reward": reward, "actions": actions[:, : reward.shape[1]], **_measured(info, reward.shape)}
        for i in alive.nonzero()[0].tolist():
            end = int(over[i].argmax()) if over[i].any() else reward.shape[1]
            live = min(end + 1, reward.shape[1])
            if i in errors and first_bad.get(i, 0) < live:
                live = min(first_bad[i], end) if i in first_bad else end if over[i].any() else 0
                tracks[i].fail(errors[i])
            else:
                tracks[i].success |= bool(info["success"][i, :live].any())
            tracks[i].add(i, live, arrays)
            if keep:
                tracks[i].see(i, live, obs)
            if over[i].any() and not tracks[i].error:
                tracks[i].ended = "success" if tracks[i].success else "terminated" if terminated[i, end] else "truncated"
            alive[i] = not tracks[i].ended
        if (rows := alive.nonzero()[0]).size:
            controller.observe({k: np.asarray(obs[k])[rows] for k in keys}, rows)
        on_progress(n - int(alive.sum()))
    for episode in (track.episode() for track in tracks):
        if keep:
            keep(episode)
            episode.observed = {}
        report.episodes.append(episode)


def _plan(controller: Controller, alive: np.ndarray, tracks: Sequence[_Track], report: Report) -> np.ndarray:
    """Actions (n, t, d) for all copies, planned for those alive (n,); one whose plan is not finite fails here."""
    rows, tick = alive.nonzero()[0], time.perf_counter()
    try:
        chunk = controller.plan(rows)
    except NotFinite as error:
        if not report.plan_s and len(error.rows) == len(rows):
            raise
        chunk = error.chunk
        for i in error.rows:
            tracks[i].fail("the plan is not finite")
            alive[i] = False
    report.plan_s.append(time.perf_counter() - tick)
    actions = np.zeros((len(alive), *chunk.shape[1:]), np.float32)
    actions[rows] = chunk
    return actions


def _faults(info: dict[str, Any], obs: Obs, reward: np.ndarray) -> tuple[dict[int, int], dict[int, str]]:
    """What is wrong with rows of a chunk: {row: first step (of reward (n, t)) that is not finite} and {row: text}, info's own words first."""
    bad = ~np.isfinite(reward)
    for value in obs.values():  # (n, the last steps, …)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            bad[:, -value.shape[1]:] |= ~np.isfinite(value).all(axis=tuple(range(2, value.ndim)))
    first = {int(i): int(bad[i].argmax()) for i in bad.any(1).nonzero()[0]}
    errors = dict.fromkeys(first, "an observation or the reward is not finite")
    told = {i: str(text) for i, text in enumerate(info.get("error", ())) if text is not None}
    return {i: k for i, k in first.items() if i not in told}, {**errors, **told}


def _measured(info: dict[str, Any], size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What an episode keeps of info: the states it is drawn from, and numbers (n, t) by name."""
    return {k: v for k, v in info.items() if k in DRAWN or
            (isinstance(v, np.ndarray) and v.shape == size and v.dtype.kind in "fiub" and k not in NO_MEASURE)}


def _refuse_repeats(starts: dict[bytes, int], task: str, seeds: dict[int, int], obs: Obs) -> None:
    """ValueError when the first observations (n, …) of two seeds {row: seed} are equal; starts {first observation: seed} grows."""
    for i, seed in seeds.items():
        start = b"".join(np.ascontiguousarray(obs[k][i]).tobytes() for k in sorted(obs))
        if (other := starts.setdefault(start, seed)) != seed:
            raise ValueError(f"{task or 'the environment'} starts seeds {other} and {seed} with the same observation, so their episodes would be counted "
                             "twice. Its reset must use the seed; if it has one start only, evaluate a single episode")


def _step_chunk(envs: Any, actions: np.ndarray, alive: np.ndarray, last: int) -> tuple[Obs, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """A chunk (n, t, d) on any VectorEnv: -> obs {key: (n, last steps, …)}, reward, terminated, truncated (n, t), info with success (n, t)."""
    if hasattr(envs, "step_chunk"):
        return envs.step_chunk(actions, alive, last=last)
    rows: list[Any] = []
    ended = ~alive
    for t in range(actions.shape[1]):
        obs, reward, terminated, truncated, info = envs.step(actions[:, t].astype(envs.single_action_space.dtype))
        over = terminated | truncated
        ended = ended | over  # an environment that resets itself goes on: what follows is not this episode
        rows.append((obs, reward, terminated, truncated, _said(info, terminated)))
        if ended.all():
            break
        if over.any() and str(envs.metadata.get("autoreset_mode")).endswith("DISABLED"):  # such a one refuses to step copies that have ended
            envs.reset(options={"reset_mask": over})
    stacked = {k: np.stack([r[0][k] for r in rows], 1) for k in rows[0][0]}
    reward, terminated, truncated = (np.stack([r[i] for r in rows], 1) for i in (1, 2, 3))
    names = dict.fromkeys(name for r in rows for name in r[4])
    missing = np.full(len(alive), np.nan)
    return stacked, reward, terminated, truncated, {name: np.stack([r[4].get(name, missing) for r in rows], 1) for name in names}


def _said(info: dict[str, Any], otherwise: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers (n,) in info by name, with success: those of the ended episode where the step has begun a new one."""
    found = {k: v for k, v in info.items() if isinstance(v, np.ndarray) and v.shape == otherwise.shape and v.dtype.kind in "fiub" and k[0] != "_"}
    found["success"] = np.asarray(info.get("success", info.get("is_success", otherwise)), bool)
    if "final_info" in info:
        final = _said(info["final_info"], otherwise)
        found = {k: np.where(info["_final_info"], final.get(k, np.nan), found.get(k, np.nan)) for k in final | found}
    return {k: v for k, v in found.items() if k != "is_success"}


def single_plans(controller: Controller, n: int = 30) -> list[float]:
    """Seconds of a plan for one robot: what a controller waits for."""
    seconds: list[float] = []
    row = (~controller.fresh).nonzero().flatten().numpy()[:1]
    for _ in range(n + 3 if row.size else 0):
        tick = time.perf_counter()
        with suppress(NotFinite):
            controller.plan(row)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - tick)
    return seconds[3:]

"""Closed-loop evaluation: distinct seeds, intervals, latencies, and the states from which videos are drawn afterwards."""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from policy.control import Controller

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927): honest at 0 and 1, where the normal one has no width."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} episodes is not a rate")
    p, d = successes / n, 1 + z**2 / n
    centre, half = (p + z**2 / (2 * n)) / d, z / d * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def bootstrap(values: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile interval of the mean of values (n,) (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = np.asarray(values)[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


@dataclass
class Episode:
    """One finished episode. score: best reward of any step; reward (steps,); states: what `render_states` of the environment takes."""
    seed: int
    success: bool
    reward: np.ndarray
    states: dict[str, np.ndarray]

    @property
    def score(self) -> float:
        return float(self.reward.max())

    def summary(self) -> dict[str, Any]:
        return {"seed": self.seed, "success": self.success, "score": self.score, "return": float(self.reward.sum()), "steps": len(self.reward)}


@dataclass
class Report:
    """Result of `evaluate`. plan_s: seconds of every batched plan; plan_one_s: seconds of plans for a single robot."""
    task: str
    episodes: list[Episode]
    plan_s: list[float]
    plan_one_s: list[float]
    env_s: float
    wall_s: float

    def metrics(self) -> dict[str, Any]:
        """The contents of metrics.json."""
        ok, score = np.array([e.success for e in self.episodes]), np.array([e.score for e in self.episodes])
        steps = sum(len(e.reward) for e in self.episodes)
        p50, p99 = np.percentile(np.array(self.plan_one_s) * 1e3, [50, 99])
        return {
            "task": self.task, "episodes": len(ok), "seeds": [e.seed for e in self.episodes],
            "success": float(ok.mean()), "success_ci": list(wilson(int(ok.sum()), len(ok))),
            "score": float(score.mean()), "score_ci": list(bootstrap(score)),
            "return": float(np.mean([e.reward.sum() for e in self.episodes])),
            "plan_ms": {"p50": float(p50), "p99": float(p99)}, "plans": len(self.plan_s), "plan_s": sum(self.plan_s),
            "env_s": self.env_s, "env_steps_per_s": steps / max(self.env_s, 1e-9), "steps": steps, "wall_s": self.wall_s,
            "per_episode": [e.summary() for e in self.episodes],
        }


def evaluate(controller: Controller, envs: "VectorEnv", episodes: int, seed: int, *, task: str = "",
             on_progress: Callable[[int], None] = lambda done: None) -> Report:
    """Roll `episodes` episodes out from the distinct seeds seed, seed + 1, …, as many at a time as envs has copies.

    Copies with `step_chunk` (envs.batch.BatchEnv) take whole chunks; any other VectorEnv is stepped. Finished copies leave the batch.
    Episode i is the same whatever the number of copies, for a deterministic sampler. ValueError when two seeds start the same episode.
    """
    start, env_s = time.perf_counter(), 0.0
    plan_s: list[float] = []
    done: list[Episode] = []
    starts: dict[bytes, int] = {}
    seeds = list(range(seed, seed + episodes))
    for first in range(0, episodes, envs.num_envs):
        wave = seeds[first: first + envs.num_envs]
        finished, spent, plans = _wave(controller, envs, wave, partial(_offset, on_progress, first), partial(_refuse_repeats, starts, task))
        done += finished
        env_s, plan_s = env_s + spent, plan_s + plans
    wall = time.perf_counter() - start
    return Report(task, done, plan_s, _single_plans(controller), env_s, wall)


def _offset(on_progress: Callable[[int], None], base: int, done: int) -> None:
    on_progress(base + done)


def _refuse_repeats(starts: dict[bytes, int], task: str, seeds: Sequence[int], obs: dict[str, np.ndarray]) -> None:
    """ValueError when the first observations (n, …) of two seeds are equal; starts {first observation: seed} grows."""
    for i, seed in enumerate(seeds):
        start = b"".join(np.ascontiguousarray(obs[k][i]).tobytes() for k in sorted(obs))
        if (other := starts.setdefault(start, seed)) != seed:
            raise ValueError(f"{task or 'the environment'} starts seeds {other} and {seed} with the same observation, so their episodes would be counted "
                             "twice. Its reset must use the seed; if it has one start only, evaluate a single episode")


def _wave(controller: Controller, envs: "VectorEnv", seeds: Sequence[int], on_progress: Callable[[int], None],
          check: Callable[[Sequence[int], dict[str, np.ndarray]], None]) -> tuple[list[Episode], float, list[float]]:
    """One episode on each of the first len(seeds) copies."""
    n, spec = len(seeds), controller.planner.spec
    padded: Any = [*seeds, *([seeds[-1]] * (envs.num_envs - n))]  # spare copies are never looked at
    obs, _ = envs.reset(seed=padded)
    check(seeds, obs)
    controller.reset(seeds)
    controller.observe({k: np.asarray(obs[k])[:n, None] for k in spec.obs if k in obs})
    alive, finished = np.zeros(envs.num_envs, bool), 0
    alive[:n] = True
    rewards: list[list[np.ndarray]] = [[] for _ in seeds]
    states: list[list[dict[str, np.ndarray]]] = [[] for _ in seeds]
    success, env_s, plan_s = np.zeros(n, bool), 0.0, []
    while alive.any():
        rows = alive[:n].nonzero()[0]
        tick = time.perf_counter()
        chunk = controller.plan(rows)
        plan_s.append(time.perf_counter() - tick)
        actions = np.zeros((envs.num_envs, *chunk.shape[1:]), np.float32)
        actions[rows] = chunk
        tick = time.perf_counter()
        obs, reward, terminated, truncated, info = _step_chunk(envs, actions, alive)
        env_s += time.perf_counter() - tick
        over = terminated | truncated
        for i in rows:
            live = int(over[i].argmax()) + 1 if over[i].any() else over.shape[1]
            rewards[i].append(reward[i, :live])
            success[i] |= bool(info["success"][i, :live].any())
            states[i].append({k: info[k][i, :live] for k in ("qpos", "mocap_pos") if k in info})
        alive[rows[over[rows, -1]]] = False
        if (keep := alive[:n].nonzero()[0]).size:
            controller.observe({k: np.asarray(obs[k])[keep] for k in spec.obs}, keep)
        if n - int(alive.sum()) > finished:
            finished = n - int(alive.sum())
            on_progress(finished)
    merged = [{k: np.concatenate([c[k] for c in s]) for k in s[0]} for s in states]
    return [Episode(s, bool(ok), np.concatenate(r), q) for s, ok, r, q in zip(seeds, success, rewards, merged, strict=True)], env_s, plan_s


def _step_chunk(envs: Any, actions: np.ndarray, alive: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """A chunk (n, t, d) on any VectorEnv: -> obs {key: (n, t, …)}, reward, terminated, truncated (n, t), info with success (n, t)."""
    if hasattr(envs, "step_chunk"):
        return envs.step_chunk(actions, alive)
    rows, ended = [], ~alive
    for t in range(actions.shape[1]):
        obs, reward, terminated, truncated, info = envs.step(actions[:, t].astype(envs.single_action_space.dtype))
        over = terminated | truncated
        ended = ended | over  # an environment that resets itself goes on: what follows is not this episode
        rows.append((obs, reward, ended, truncated, _won(info, terminated)))
        if ended.all():
            break
        if over.any() and str(envs.metadata.get("autoreset_mode")).endswith("DISABLED"):  # such a one refuses to step copies that have ended
            envs.reset(options={"reset_mask": over})
    obs = {k: np.stack([r[0][k] for r in rows], 1) for k in rows[0][0]}
    reward, ends, truncated, won = (np.stack([r[i] for r in rows], 1) for i in range(1, 5))
    return obs, reward, ends, truncated, {"success": won}


def _won(info: dict[str, Any], terminated: np.ndarray) -> np.ndarray:
    """Success (n,): info's success or is_success, that of the ended episode where the step has begun a new one; else termination."""
    def said(i: dict[str, Any]) -> np.ndarray:
        return np.asarray(i.get("success", i.get("is_success", terminated)), bool)
    return np.where(info["_final_info"], said(info["final_info"]), said(info)) if "final_info" in info else said(info)


def _single_plans(controller: Controller, n: int = 30) -> list[float]:
    """Seconds of a plan for one robot: what a controller waits for."""
    seconds = []
    row = np.array([0])
    for _ in range(n + 3):
        tick = time.perf_counter()
        controller.plan(row)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - tick)
    return seconds[3:]

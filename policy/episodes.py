"""What an evaluation leaves: episodes, and the numbers made of them."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policy.stats import Z_LOOKED, Z, mean_interval, wilson

ENDS = ("success", "terminated", "truncated", "fault")


@dataclass
class Episode:
    """One finished episode of so many control steps.

    reward (steps,);   actions (steps, d): as sent to the environment;   measures {name: (steps,)}: the task's own metrics;
    states: what `render_states` of the environment takes.   ended: "success" if it was one, whatever ended it; else "terminated" (the
    task is lost), "truncated" (time is up) or "fault".   error: what broke the episode off; such a one is no success.
    observed {key: (steps, *shape)}: what was seen before each action, when somebody keeps it (policy.rollout.evaluate).
    """
    seed: int
    success: bool
    reward: np.ndarray
    actions: np.ndarray
    ended: str
    measures: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, np.ndarray] = field(default_factory=dict)
    error: str = ""
    observed: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """Best reward of any step; None where a fault left no step."""
        return float(self.reward.max()) if len(self.reward) else None

    def summary(self) -> dict[str, Any]:
        found = {"seed": self.seed, "success": self.success, "score": self.score, "return": float(self.reward.sum()),
                 "steps": len(self.reward), "ended": self.ended}
        return {**found, "error": self.error} if self.error else found


def reason(error: str) -> str:
    """An episode's error in one line: what a traceback ends with; else its first, behind which a lost process's stack may stand."""
    lines = error.strip().splitlines() or [""]
    return lines[-1] if "Traceback (most recent call last)" in error else lines[0]


@dataclass(frozen=True)
class Looked:
    """An evaluation that stopped once its interval of success was ± half_width, looking after every `every` episodes, at most `most`."""
    half_width: float
    every: int
    most: int


@dataclass
class Report:
    """Result of `evaluate`. plan_s: seconds of every batched plan; plan_one_s: seconds of plans for a single robot;
    cpu_s: of this process, without those.

    execute, delay: the controller's, in control steps;   fps: control rate [Hz], 0 unknown;   action_range (d,), NaN where it has no bounds.
    """
    task: str
    execute: int
    delay: int
    fps: float
    action_range: np.ndarray
    looked: Looked | None = None
    episodes: list[Episode] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)
    plan_one_s: list[float] = field(default_factory=list)
    env_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def wins(self) -> int:
        return sum(e.success for e in self.episodes)

    def metrics(self) -> dict[str, Any]:
        """The contents of metrics.json. A fault counts against success; the other numbers are of the episodes without one."""
        n, sound, z = len(self.episodes), [e for e in self.episodes if not e.error], Z_LOOKED if self.looked else Z
        steps = sum(len(e.reward) for e in self.episodes)
        score, total = [float(e.score or 0) for e in sound], [e.reward.sum() for e in sound]
        length, won = [len(e.reward) for e in sound], [len(e.reward) for e in sound if e.success]
        ends = Counter(e.ended for e in self.episodes)
        spent = max(self.wall_s, self.env_s + sum(self.plan_s), 1e-9)  # lanes side by side spend more than the clock shows
        env, plan = self.env_s / spent, sum(self.plan_s) / spent
        return {
            "task": self.task, "fps": self.fps, "episodes": n, "seeds": [e.seed for e in self.episodes],
            "success": self.wins / n, "success_ci": list(wilson(self.wins, n, z)),
            "score": mean(score), "score_ci": list(mean_interval(score, z)) if sound else None,
            "return": mean(total), "length": {"mean": mean(length), "success": mean(won)},
            "ended": {end: ends[end] for end in ENDS}, "measures": measures(sound),
            "smoothness": smoothness([e.actions for e in sound], self.execute, self.delay, self.action_range, self.fps),
            "faults": [{"seed": e.seed, "step": len(e.reward), "error": e.error} for e in self.episodes if e.error],
            **({"until": self._until(n)} if self.looked else {}),
            "plan_ms": {f"p{q}": 1e3 * float(np.percentile(self.plan_one_s, q)) if self.plan_one_s else None for q in (50, 99)},
            "plans": len(self.plan_s), "plan_s": sum(self.plan_s), "env_s": self.env_s,
            "share": {"env": env, "plan": plan, "other": 1 - env - plan},
            "env_steps_per_s": steps / max(self.env_s, 1e-9), "steps": steps, "wall_s": self.wall_s,
            "per_episode": [e.summary() for e in self.episodes],
        }

    def _until(self, n: int) -> dict[str, Any]:
        assert self.looked
        lo, hi = wilson(self.wins, n, Z_LOOKED)
        return {"half_width": self.looked.half_width, "reached": (hi - lo) / 2 <= self.looked.half_width, "most": self.looked.most,
                "looks": -(-n // self.looked.every), "every": self.looked.every, "z": Z_LOOKED}


def mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def measures(episodes: Sequence[Episode]) -> dict[str, dict[str, float | None]]:
    """Of every metric of the task the mean over episodes of its best (max), least (min) and last value."""
    names = dict.fromkeys(name for e in episodes for name in e.measures)
    found = {}
    for name in names:
        seen = [v for e in episodes if name in e.measures and len(v := e.measures[name][np.isfinite(e.measures[name])])]
        found[name] = {"max": mean([v.max() for v in seen]), "min": mean([v.min() for v in seen]), "last": mean([v[-1] for v in seen])}
    return found


def smoothness(actions: Sequence[np.ndarray], execute: int, delay: int, action_range: np.ndarray, fps: float) -> dict[str, Any]:
    """How even the commands (steps, d) of episodes are; None where nothing was long enough.

    seam: mean |a_t - a_{t-1}| where another plan takes over, inside: everywhere else, both as a share of the action range (the seen one
    where there are no bounds);   seam_ratio: the one over the other, 1 when plans join as smoothly as they run.
    jerk (d,): RMS of the third difference, action units / s³;   jerk_normalised: of all dimensions, action ranges / s³ (per step³ without fps).
    accel_peak: mean over episodes of the largest norm of the second difference, action units / s²;   accel_peak_normalised: action ranges / s².
    range (d,): what each dimension's range was taken to be.
    """
    if not (every := [a for a in actions if len(a)]):
        return dict.fromkeys(("seam", "inside", "seam_ratio", "jerk", "jerk_normalised", "accel_peak", "accel_peak_normalised", "range"))
    joined = np.concatenate(every).astype(float)
    scale = np.where(np.isfinite(action_range) & (action_range > 0), action_range, np.ptp(joined, axis=0))
    scale = np.where(scale > 0, scale, 1.0)
    seams, insides, thirds = [], [], []
    for a in (each.astype(float) for each in every):
        jump = np.abs(np.diff(a, axis=0) / scale).mean(1)
        at = np.arange(1, len(a))
        border = (at >= execute + delay) & ((at - delay) % execute == 0)
        seams.append(jump[border])
        insides.append(jump[~border])
        thirds.append(np.diff(a, n=3, axis=0))
    seam, inside = mean(np.concatenate(seams)), mean(np.concatenate(insides))  # type: ignore[arg-type]
    seconds = [np.diff(a.astype(float), n=2, axis=0) * (fps or 1) ** 2 for a in every if len(a) > 2]
    third = np.concatenate(thirds) * (fps or 1) ** 3
    return {"seam": seam, "inside": inside, "seam_ratio": seam / inside if seam is not None and inside else None,
            "jerk": np.sqrt((third**2).mean(0)).tolist() if len(third) else None,
            "jerk_normalised": float(np.sqrt(((third / scale) ** 2).mean())) if len(third) else None,
            "accel_peak": mean([np.linalg.norm(a, axis=1).max() for a in seconds]),
            "accel_peak_normalised": mean([np.linalg.norm(a / scale, axis=1).max() for a in seconds]), "range": scale.tolist()}

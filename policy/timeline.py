"""Chunks in time: which action is due when, and how a new chunk takes over from the one before it.

One implementation for the simulator's `control.delay` and for the robot; numpy only, so that a robot needs no torch. A chunk is (n, t, d): n robots, its
first action due when its observation was taken. Times here are in steps of the chunk, whole ones in the simulator, fractions on a robot.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MERGES = ("naive", "ensemble", "frozen", "guided", "identity", "prefix")
CONTINUES = ("frozen", "guided", "identity", "prefix")  # the planner is told what is promised and goes on from there


@dataclass(frozen=True)
class Plan:
    """What is going to be executed, on the clock of its newest chunk.

    actions: (n, t, d).   weight: (n, t), sum of the weights of the chunks averaged there.   count: (n, t), how many they are.
    """
    actions: np.ndarray
    weight: np.ndarray
    count: np.ndarray

    @classmethod
    def of(cls, chunk: np.ndarray) -> "Plan":
        """A first chunk (n, t, d)."""
        ones = np.ones(chunk.shape[:2], chunk.dtype)
        return cls(chunk, ones, ones)

    def __getitem__(self, rows: np.ndarray) -> "Plan":
        return Plan(self.actions[rows], self.weight[rows], self.count[rows])


def take_over(old: Plan, chunk: np.ndarray, shift: float, merge: str = "naive", *, decay: float = 0.1) -> Plan:
    """The plan from now on: `chunk` (n, t, d), whose observation is `shift` steps younger than that of `old`.

    ensemble averages every chunk that has something to say about a step, weights exp(-decay * i), i = 0 the oldest (Zhao 2023, ACT: decay .1).
    Every other merge is the chunk alone: naive ones know nothing of the old plan, those in CONTINUES were planned with it in mind.
    """
    if merge not in MERGES:
        raise ValueError(f"merge {merge!r} is unknown; use one of {', '.join(MERGES)}")
    if merge != "ensemble":
        return Plan.of(chunk)
    before, known = shifted(old.actions, shift, chunk.shape[1])
    weight, count = (shifted(x[..., None], np.ceil(shift), chunk.shape[1])[0][..., 0] * known for x in (old.weight, old.count))
    new = np.exp(-decay * count).astype(chunk.dtype)
    total = weight + new
    actions = (weight[..., None] * before + new[..., None] * chunk) / total[..., None]
    return Plan(actions.astype(chunk.dtype), total, count + 1)


def shifted(actions: np.ndarray, shift: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """actions (n, t, d) from step `shift` on, every step, linearly between two of them: (n, steps, d) and known (steps,).

    Behind the end the last action is repeated and known is False.
    """
    t = actions.shape[1]
    at = shift + np.arange(steps)
    known = (at >= -1e-9) & (at <= t - 1 + 1e-9)
    at = at.clip(0, t - 1)
    low = np.floor(at + 1e-9).astype(int)
    part = (at - low).clip(0)[:, None].astype(actions.dtype)
    return actions[:, low] * (1 - part) + actions[:, np.minimum(low + 1, t - 1)] * part, known


def soft_mask(horizon: int, committed: int, known: int) -> np.ndarray:
    """Weights (horizon,) of real-time chunking: 1 while the robot is committed, falling to 0 where the old plan ends after `known` steps.

    Source: Black et al. 2025 (arXiv 2506.07339) eq. 5.
    """
    if not 0 <= committed <= known <= horizon:
        raise ValueError(f"committed={committed} steps must not exceed the known={known} ones, nor these the horizon {horizon}")
    i = np.arange(horizon)
    c = ((known - i) / (known - committed + 1)).clip(0, 1)
    weight = c * np.expm1(c) / (np.e - 1)
    weight[:committed], weight[known:] = 1, 0
    return weight


def committed_steps(delays: Sequence[float], dt: float, most: int, *, last: int = 10) -> int:
    """Steps that are going to be executed before a plan that is asked for now can act: those begun within the longest of the `last` delays [s].

    dt: s between actions.   most: the answer is never above it (steps of the promised plan, or what the policy takes). 0 without delays.
    Source: Black et al. 2025, algorithm 1: the maximum over a short buffer, so that one slow start-up is forgotten.
    """
    if not dt > 0 or not all(math.isfinite(d) and d >= 0 for d in delays):
        raise ValueError(f"dt={dt} s must be above 0 and delays {list(delays)} s be finite and not negative")
    return min(most, math.ceil(max(delays[-last:], default=0.0) / dt - 1e-9))

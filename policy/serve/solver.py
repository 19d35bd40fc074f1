"""The loop around a denoising step on the host, numpy only: a sampler as a table of coefficients, and what is made of actions promised already."""
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy.timeline import CONTINUES, MERGES, soft_mask

PARTS = ("taus", "alphas", "sigmas", "rows", "final")


@dataclass(frozen=True)
class Solver:
    """Call i of the denoiser sees x = rows[i] . (noise, draws …, m_0 … m_{i-1}) at taus[i] and answers m_i, its estimate of the data.

    final . (noise, draws …, m_0 … m_{n-1}) is the plan.   alphas, sigmas: of the path at taus.   draws: how many arrays it takes beside the first noise:
    further noise, none for a deterministic sampler, and of a warm start (policy.serve.probe) the promised plan as the last.
    """
    taus: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray
    rows: tuple[np.ndarray, ...]
    final: np.ndarray
    draws: int = 0

    @property
    def calls(self) -> int:
        return len(self.taus)

    def to_json(self) -> dict[str, Any]:
        return {**{k: getattr(self, k).tolist() for k in PARTS if k != "rows"}, "rows": [r.tolist() for r in self.rows], "draws": self.draws}

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> "Solver":
        """KeyError, TypeError or ValueError when it is not one."""
        flat = {k: np.array(d[k], np.float64) for k in PARTS if k != "rows"}
        solver = cls(**flat, rows=tuple(np.array(r, np.float64) for r in d["rows"]), draws=int(d["draws"]))
        n, first = solver.calls, 1 + solver.draws
        if [len(r) for r in solver.rows] != list(range(first, first + n)) or [len(v) for v in flat.values()] != [n, n, n, first + n]:
            raise ValueError(f"the solver's table does not belong to {n} calls")
        return solver

    def walk(self, step: Callable[[int, np.ndarray], np.ndarray], noise: np.ndarray) -> np.ndarray:
        """The normalised plan (t,d).   noise: (1 + draws, t, d), see above.   step: (i, x (t,d)) -> m_i (t,d)."""
        size = noise.shape[1:]
        terms = np.empty((len(self.final), size[0] * size[1]), np.float32)
        at = len(noise)
        terms[:at] = noise.reshape(at, -1)
        for i, row in enumerate(self.rows):
            x = (row @ terms[:at]).astype(np.float32).reshape(size)
            terms[at] = step(i, x).reshape(-1)
            at += 1
        return (self.final @ terms).astype(np.float32).reshape(size)


@dataclass(frozen=True)
class Promised:
    """What a denoising step is told of actions promised already. known: (t,d) normalised, zero where nothing is.   mask: (t,1) bool, steps that enter and
    leave every call as known.   pull: (calls,t,1), share of the way from an estimate of the data to known.   told: the network is told which are known.
    """
    known: np.ndarray
    mask: np.ndarray
    pull: np.ndarray
    told: bool = False


def promised(solver: Solver, size: tuple[int, int], known: np.ndarray | None = None, committed: int = 0, merge: str = "naive", *, limit: float = 5.0,
             prior: float = 1.0) -> Promised:
    """known: (p,d) normalised actions promised from now on, the first `committed` for certain.   size: (t,d) of a plan.

    guided and identity pull as policy.diffusion.rtc has it, kappa = min(limit sigma, (alpha^2 prior^2 + sigma^2) / (alpha prior^2)), guided through the
    Jacobian in the step itself, identity with 1 / (alpha + sigma) for it.
    """
    (t, d), p = size, 0 if known is None else len(known)
    whole, mask, pull = np.zeros((t, d), np.float32), np.zeros((t, 1), bool), np.zeros((solver.calls, t, 1), np.float32)
    if known is not None:
        whole[:p] = known
    if merge in ("frozen", "prefix"):
        mask[:committed] = True
    elif merge in ("guided", "identity") and p:
        a, s = solver.alphas, solver.sigmas
        kappa = np.minimum(limit * s, (a**2 * prior**2 + s**2) / (np.maximum(a, 1e-4) * prior**2))
        pull[:] = (kappa if merge == "guided" else kappa / (a + s))[:, None, None] * soft_mask(t, committed, p)[:, None]
    return Promised(whole, mask, pull, merge == "prefix")


def check_prefix(prefix: np.ndarray | None, committed: int, merge: str, *, size: tuple[int, int], merges: tuple[str, ...], rtc: int = 0) -> np.ndarray | None:
    """prefix (p,d) float32, None when it is absent or empty. ValueError when it, committed or merge cannot be planned with.   size: (t,d) of a plan."""
    if merge not in MERGES:
        raise ValueError(f"merge {merge!r} is unknown; use one of {', '.join(MERGES)}")
    if merge not in merges:
        why = "needs the denoiser's gradient, which this export has not: serve the run itself" if merge == "guided" else "needs a policy trained with train.rtc"
        raise ValueError(f"merge={merge} {why}, or use merge={', '.join(merges)}")
    if prefix is None or not len(prefix):
        if committed:
            raise ValueError(f"committed={committed} steps must be among the 0 that the prefix promises")
        return None
    known = np.asarray(prefix, np.float32)
    if known.ndim != 2 or known.shape[1] != size[1] or len(known) > size[0]:
        raise ValueError(f"prefix must be (p, {size[1]}) with p up to the horizon {size[0]}, got {known.shape}")
    if not 0 <= committed <= len(known):
        raise ValueError(f"committed={committed} steps must be among the {len(known)} that the prefix promises")
    if merge == "prefix" and committed > rtc:
        raise ValueError(f"merge=prefix goes on from {committed} known steps, and this policy learned to from {rtc}: use merge=frozen")
    return known


def kept(actions: np.ndarray, prefix: np.ndarray | None, committed: int, merge: str) -> np.ndarray:
    """The plan (t,d) in physical units with the committed steps exactly as promised, where the merge goes on from them."""
    if prefix is not None and merge in CONTINUES:
        actions[:committed] = prefix[:committed]
    return actions


def noises(noise: np.ndarray | None, size: tuple[int, int], draws: int) -> np.ndarray:
    """(1 + draws, t, d) float32. Drawn when noise is absent; (t,d) fixes the further draws of a stochastic sampler too, (1 + draws, t, d) is taken as it is."""
    if noise is None:
        return np.random.default_rng().standard_normal((1 + draws, *size), np.float32)
    first = np.ascontiguousarray(noise, np.float32)
    if first.shape == (1 + draws, *size):
        return first
    if first.shape != size:
        raise ValueError(f"noise must be {size}{f' or {(1 + draws, *size)}' if draws else ''}, got {first.shape}")
    if not draws:
        return first[None]
    seed = int.from_bytes(hashlib.sha256(first.tobytes()).digest()[:8], "big")
    return np.concatenate([first[None], np.random.default_rng(seed).standard_normal((draws, *size), np.float32)])

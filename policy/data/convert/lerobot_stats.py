"""Statistics as LeRobot keeps them: of each episode, and of all by weighting those. Of images: some frames, thinned, channel by channel in [0, 1]."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Stats = dict[str, np.ndarray]
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def of_episode(x: np.ndarray, *, image: bool = False, quantiles: bool = False) -> Stats:
    """x (n, *shape) -> min, max, mean, std (*shape), (1,) for a number per frame, (3, 1, 1) for images (n, h, w, 3); count (1,)."""
    if image:
        x = np.moveaxis(_thinned(x), -1, 1)
    axis: Any = (0, 2, 3) if image else 0
    how: dict[str, Any] = {"axis": axis, "keepdims": image or x.ndim == 1}
    out = {"min": np.min(x, **how), "max": np.max(x, **how), "mean": np.mean(x, **how), "std": np.std(x, **how)}
    if quantiles:
        out |= {name: np.quantile(x.astype(np.float64), q, **how) for name, q in QUANTILES.items()}
    if image:
        scale = np.iinfo(x.dtype).max
        out = {k: v[0] / scale for k, v in out.items()}
    return {**out, "count": np.array([len(x)])}


def _thinned(x: np.ndarray) -> np.ndarray:
    """At least 100 frames (all, if there are fewer) spread over the episode, every second, third, … pixel of large ones."""
    n = len(x)
    some = np.round(np.linspace(0, n - 1, max(min(100, n), min(int(n ** 0.75), 10_000)))).astype(int)
    h, w = x.shape[1:3]
    step = 1 if max(h, w) < 300 else max(1, int((w if w > h else h) / 150))
    return x[some, ::step, ::step]


def of_all(each: Sequence[Stats]) -> Stats:
    """The episodes' statistics of one feature, together."""
    mean, std, count = (np.stack([s[k] for s in each]) for k in ("mean", "std", "count"))
    total = count.sum(0)
    weight = count.reshape(len(count), *[1] * (mean.ndim - 1))
    middle = (mean * weight).sum(0) / total
    spread = ((std**2 + (mean - middle)**2) * weight).sum(0) / total
    out = {"min": np.min([s["min"] for s in each], 0), "max": np.max([s["max"] for s in each], 0), "mean": middle, "std": np.sqrt(spread), "count": total}
    quantiles = [k for k in each[0] if k in QUANTILES]
    return {**out, **{k: (np.stack([s[k] for s in each]) * weight).sum(0) / total for k in quantiles}}


def near(kept: Any, ours: Mapping[str, Any]) -> bool:
    """Whether kept statistics are ours but for rounding, so that the source's own numbers can be written."""
    try:
        return {"min", "max", "mean", "std", "count"} <= set(kept) and all(
            np.shape(kept[k]) == np.shape(v) and np.allclose(np.asarray(kept[k], np.float64), np.asarray(v, np.float64), rtol=1e-4, atol=1e-6)
            for k, v in ours.items() if k in kept)
    except (TypeError, ValueError):
        return False


def plain(stats: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in stats.items()}

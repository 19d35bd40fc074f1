"""Statistics of every channel of every key, in one pass and bounded memory."""
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from policy.data.store import BLOCK_BYTES, Store

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
SAMPLE_BYTES = 2**26  # quantiles of numbers that need more (in float64) are those of an even sample of the steps
SHOWN = 24  # channels of a key in the table


def stats(store: Store, keys: Iterable[str] | None = None, quantiles: Sequence[float] = QUANTILES) -> dict[str, Any]:
    """{key: {shape, dtype, unit, count, min, max, mean, std, quantiles {q: …}, of}}, each statistic one number a channel.

    A channel is an element of a step with up to two axes, else one of the last axis (the colours of an image). std is that of the population.
    of: steps the quantiles are taken from: all, or every n-th. NaN and infinity are left out and counted in `not finite`.
    """
    if wrong := [q for q in quantiles if not 0 <= q <= 1]:
        raise ValueError(f"quantiles are shares in [0, 1], got {wrong[0]}")
    return {key: _key(store, key, quantiles) for key in (store.keys if keys is None else keys)}


def table(found: dict[str, Any]) -> str:
    """The statistics as text, one line a channel, at most SHOWN of a key."""
    rows = [("key", "dtype", "unit", "min", "max", "mean", "std", *(f"{float(q):.0%}" for q in next(iter(found.values()))["quantiles"]))]
    for key, s in found.items():
        names = [f"{key}{list(i) if i else ''}".replace(" ", "") for i in np.ndindex(*s["channels"])]
        columns = [s["min"], s["max"], s["mean"], s["std"], *s["quantiles"].values()]
        rows += [(name, s["dtype"], s["unit"] or "-", *("-" if v is None else f"{v + 0:.4g}" for v in values))
                 for name, *values in list(zip(names, *columns, strict=True))[:SHOWN]]
        if len(names) > SHOWN:
            rows.append((f"… {len(names) - SHOWN} more of {key}, see out=stats.json", *[""] * (len(rows[0]) - 1)))
    widths = [max(len(r[c]) for r in rows if len(r[0]) < 40 or c) for c in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _key(store: Store, key: str, quantiles: Sequence[float]) -> dict[str, Any]:
    shape, dtype = store.schema.get(key) or store.read(key)  # read raises the KeyError that lists the keys
    channels = shape if len(shape) <= 2 else shape[-1:]
    c, numbers = math.prod(channels), math.prod(shape)
    head = {"shape": list(shape), "dtype": str(dtype), "unit": store.units.get(key), "channels": list(channels), "count": store.steps}
    if dtype.kind not in "fiub":
        none = [None] * c
        return {**head, "min": none, "max": none, "mean": none, "std": none, "quantiles": {str(q): none for q in quantiles}, "of": 0, "not finite": 0}
    block = max(1, BLOCK_BYTES // max(1, 8 * numbers))
    stride = max(1, math.ceil(store.steps * numbers * 8 / SAMPLE_BYTES))
    seen, sample = _Moments(c), list[np.ndarray]()
    bins = np.zeros((c, 256), np.int64) if dtype.itemsize == 1 and dtype.kind in "ub" else None
    for lo in range(0, store.steps, block):
        x = store.read(key, lo, min(lo + block, store.steps))
        if bins is not None:
            for i, column in enumerate(x.reshape(-1, c).T):
                bins[i] += np.bincount(column.astype(np.uint8), minlength=256)
        else:
            sample.append(x[-lo % stride::stride].reshape(-1, c).astype(np.float64))
        seen.add(x.reshape(-1, c))
    rows = np.concatenate(sample) if sample else np.zeros((0, c))
    at = [_of_bins(b, quantiles) for b in bins] if bins is not None else [_of_numbers(column, quantiles) for column in rows.T]
    return {**head, **seen.told(), "quantiles": {str(q): [a[i] for a in at] for i, q in enumerate(quantiles)},
            "of": store.steps if bins is not None else len(rows) * math.prod(channels) // max(1, numbers)}


class _Moments:
    """Of columns (n, c) as they come: extremes, mean and standard deviation (Chan et al. 1983: blocks are joined without losing digits)."""

    def __init__(self, c: int):
        self.n, self.mean, self.m2 = np.zeros(c), np.zeros(c), np.zeros(c)
        self.low, self.high, self.wild = np.full(c, np.inf), np.full(c, -np.inf), 0

    def add(self, x: np.ndarray) -> None:
        fine = np.isfinite(x) if x.dtype.kind == "f" else np.ones(x.shape, bool)
        self.wild += int(x.size - fine.sum())
        n = fine.sum(0)
        y = np.where(fine, x, 0).astype(np.float64)
        mean = y.sum(0) / np.maximum(1, n)
        m2 = (np.where(fine, y - mean, 0) ** 2).sum(0)
        delta, total = mean - self.mean, np.maximum(1, self.n + n)
        self.m2 += m2 + delta**2 * self.n * n / total
        self.mean = self.mean + delta * n / total
        self.n = self.n + n
        self.low = np.minimum(self.low, np.where(fine, y, np.inf).min(0))
        self.high = np.maximum(self.high, np.where(fine, y, -np.inf).max(0))

    def told(self) -> dict[str, Any]:
        columns = {"min": self.low, "max": self.high, "mean": self.mean, "std": np.sqrt(self.m2 / np.maximum(1, self.n))}
        return {**{k: [float(v) if n else None for v, n in zip(x, self.n, strict=True)] for k, x in columns.items()}, "not finite": self.wild}


def _of_numbers(x: np.ndarray, quantiles: Sequence[float]) -> list[float | None]:
    x = x[np.isfinite(x)]
    return [float(v) for v in np.quantile(x, quantiles, method="inverted_cdf")] if len(x) else [None] * len(quantiles)


def _of_bins(counts: np.ndarray, quantiles: Sequence[float]) -> list[float | None]:
    below = np.cumsum(counts)
    return [float(np.searchsorted(below, max(1, math.ceil(q * below[-1] - 1e-9)))) for q in quantiles]

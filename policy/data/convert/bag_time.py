"""From messages that come when they come to steps at a rate: where topics overlap, without long gaps."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from policy.data.files import DataError

NS = 10**9


@dataclass
class Series:
    """One key's messages: stamps [ns], values (*shape) each; mask (d,) which channels a message brings, None for all.   how: see bag_types."""
    how: str
    stamps: list[int] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)

    def add(self, stamp: int, value: np.ndarray, mask: np.ndarray | None = None) -> None:
        self.stamps.append(stamp)
        self.values.append(value)
        self.masks.append(mask)

    def times(self, key: str, gap: float) -> tuple[np.ndarray, np.ndarray]:
        """Stamps (m,) sorted and the order that sorts them; of equal stamps the last message counts.   DataError when they jump back."""
        t = np.array(self.stamps, np.int64)
        back = float((np.maximum.accumulate(t) - t).max(initial=0)) / NS
        if back > gap:
            raise DataError(f"the stamps of {key} jump back by {back:.3f} s: its clock was set, or the header is not filled in. "
                            "Use options: {clock: receive}")
        order = np.argsort(t, kind="stable")
        order = order[np.append(np.diff(t[order]) > 0, True)]
        return t[order], order


def grids(times: Mapping[str, Sequence[np.ndarray]], rate: float, gap: float, watched: Sequence[str], on_gap: str) -> list[np.ndarray]:
    """Steps [ns] at rate [Hz] while every key has messages around; several pieces where on_gap is `split` and a watched key paused for more than gap [s].

    times {key: stamps of its channels (m,)}.   DataError: topics do not overlap; a gap, where on_gap is `error`.
    """
    every = [(key, t) for key, parts in times.items() for t in parts]
    start_key, start = max(((k, int(t[0])) for k, t in every), key=lambda kt: kt[1])
    stop_key, stop = min(((k, int(t[-1])) for k, t in every), key=lambda kt: kt[1])
    if stop - start < NS / rate:
        raise DataError(f"the topics share {max(0, stop - start) / NS:.3f} s, less than two steps: {start_key} begins {(start - stop) / NS:+.3f} s "
                        f"after {stop_key} ends. "
                        "Their clocks differ (options: {clock: receive}), or one holds few messages: choose with options: {topics: […]}")
    holes = sorted({(int(t[i]), int(t[i + 1]), key) for key in watched for t in times[key] for i in np.flatnonzero(np.diff(t) > gap * NS)
                    if t[i + 1] > start and t[i] < stop})
    if holes and on_gap == "error":
        a, b, key = max(holes, key=lambda h: h[1] - h[0])
        raise DataError(f"{key} pauses for {(b - a) / NS:.3f} s, {(a - start) / NS:.1f} s after the start. Allow that with options: "
                        f"{{gap: {(b - a) / NS + 0.1:.1f}}} (s), or end the episode there and begin another with options: {{on_gap: split}}")
    pieces, at = [], start
    for a, b, _ in holes:
        pieces.append((at, min(a, stop)))
        at = max(at, b)
    pieces.append((at, stop))
    steps = [a + np.round(np.arange(int((b - a) * rate / NS + 1e-6) + 1) * (NS / rate)).astype(np.int64) for a, b in pieces if b > a]
    return [s for s in steps if len(s) > 1]


def held(t: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the latest message at each step."""
    return np.searchsorted(t, grid, side="right") - 1


def linear(t: np.ndarray, x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """x (m, *shape) at times t -> (n, *shape) at grid, in x's dtype."""
    flat, at, new = x.reshape(len(x), -1), (t - grid[0]) / NS, (grid - grid[0]) / NS
    return np.stack([np.interp(new, at, flat[:, c]) for c in range(flat.shape[1])], 1).reshape(len(grid), *x.shape[1:]).astype(x.dtype)


def slerp(t: np.ndarray, q: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Unit quaternions q (m, 4) at times t -> (n, 4) at grid, along the shorter arc, signs continuous."""
    size = np.linalg.norm(q, axis=1, keepdims=True)
    if (size < 1e-6).any():
        raise DataError("an orientation is the zero quaternion: its sender does not fill it in. Leave it out with options: {topics: {…: {fields: [position]}}}")
    q = q / size
    flips = np.cumprod(np.where((q[1:] * q[:-1]).sum(1) < 0, -1.0, 1.0))
    q = q * np.concatenate([[1.0], flips])[:, None]
    i = np.clip(np.searchsorted(t, grid, side="right") - 1, 0, max(0, len(t) - 2))
    j = np.minimum(i + 1, len(t) - 1)
    w = np.where(j > i, (grid - t[i]) / np.maximum(t[j] - t[i], 1), 0.0)[:, None]
    angle = np.arccos(np.clip((q[i] * q[j]).sum(1, keepdims=True), -1, 1))
    s = np.sin(angle)
    near = s < 1e-6  # almost the same: along the chord
    safe = np.where(near, 1, s)
    a, b = (np.where(near, 1 - w, np.sin((1 - w) * angle) / safe), np.where(near, w, np.sin(w * angle) / safe))
    out = a * q[i] + b * q[j]
    return out / np.linalg.norm(out, axis=1, keepdims=True)

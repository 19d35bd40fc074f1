"""What is in this dataset: a text table and one picture. They back `dipole data info path=…`."""
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from policy.data.files import DataError
from policy.data.store import BLOCK_BYTES, Store

EPISODES, STRIPS_PER_KEY, COLUMNS = 50, 16, 3
LINE, ONE = "#4477aa", "#cc3311"  # all episodes pale, one of them strong, so that a single motion can be followed


def describe(store: Store) -> str:
    """A text table: size, episode lengths, rate, and one line per key. Statistics of a key above 64 MB are from a sample, marked ~."""
    lengths = np.diff(store.episode_ends, prepend=0)
    rate = f"{store.fps:g} Hz, {store.steps / store.fps:.0f} s in all" if store.fps else "rate not recorded"
    head = [str(store.path),
            f"zarr v{store.format}, {store.episodes} episodes, {store.steps} steps, {rate}",
            (f"episode length {lengths.min()} / {int(np.median(lengths))} / {lengths.max()} steps (min / median / max)"
             if store.episodes else "no complete episode yet")]
    if store.action_semantics:
        head.append(f"actions: {store.action_semantics}")
    if videos := store.attrs.get("video"):
        head.append(f"kept as video, not bit for bit: {', '.join(videos)}")
    rows = [("key", "shape", "dtype", "min", "max", "mean", "unit", "on disk")]
    rows += [(key, f"{shape}", str(dtype), *_stats(store, key), store.units.get(key, "-"), _bytes(store.disk_bytes(key)))
             for key, (shape, dtype) in store.schema.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(head + ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows])


def draw(store: Store, path: Path | str, keys: Iterable[str] | None = None, *, episodes: int = EPISODES) -> Path:
    """Write a PNG: episode lengths, x-y plots of keys that end in 2, and a strip over time per channel of every low-dimensional key.

    keys: which to draw, default all with at most two axes per frame.   episodes: how many, spread evenly over the dataset.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("drawing a dataset needs matplotlib: pip install matplotlib") from e
    shown = np.unique(np.linspace(0, store.episodes - 1, min(episodes, store.episodes)).round().astype(int)).tolist()
    if not shown:
        raise DataError(f"{store.path} holds no complete episode to draw. Record one first")
    keys = [k for k, (shape, _) in store.schema.items() if len(shape) <= 2] if keys is None else list(keys)
    motion = {key: [store.read(key, *store.span(i)) for i in shown] for key in keys}
    planes = [key for key in keys if store.schema[key][0][-1:] == (2,)][:COLUMNS - 1]
    strips = [(key, c) for key in keys for c in range(min(STRIPS_PER_KEY, math.prod(store.schema[key][0])))]
    columns = [part for i in range(COLUMNS) if (part := strips[i * len(strips) // COLUMNS:(i + 1) * len(strips) // COLUMNS])]
    rows = max(map(len, columns), default=0)

    top = 4.0 if planes else 2.2
    figure = Figure(figsize=(14, top + 1.15 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(2, 1, height_ratios=[top, max(0.1, 1.15 * rows)])
    heads = outer[0].subgridspec(1, 1 + len(planes))
    rate = f" at {store.fps:g} Hz" if store.fps else ""
    figure.suptitle(f"{store.path.name}: {store.episodes} episodes, {store.steps} steps{rate}   "
                    f"(drawn: {len(shown)} episodes, episode {shown[0]} in red)", fontsize=11)
    _lengths(figure.add_subplot(heads[0]), np.diff(store.episode_ends, prepend=0))
    for at, key in enumerate(planes, 1):
        _plane(figure.add_subplot(heads[at]), key, store.units.get(key, ""), motion[key])
    below = outer[1].subgridspec(1, max(1, len(columns)))
    for at, part in enumerate(columns):
        places = below[at].subgridspec(len(part), 1)
        for row, (key, c) in enumerate(part):
            axis = figure.add_subplot(places[row])
            _strip(axis, _label(key, c, store.schema[key][0]), [x.reshape(len(x), -1)[:, c] for x in motion[key]], store.fps)
        axis.set_xlabel("time [s]" if store.fps else "step", fontsize=8)  # the lowest of its column
        axis.tick_params(labelbottom=True)
    figure.savefig(path, dpi=100)
    return Path(path)


def _lengths(axis, lengths: np.ndarray) -> None:
    axis.hist(lengths, bins=min(40, max(5, len(np.unique(lengths)))), color=LINE, alpha=0.8)
    axis.axvline(np.median(lengths), color=ONE, lw=1.2)
    axis.set_title(f"episode length [steps], median {np.median(lengths):g}", fontsize=9)
    _clean(axis)


def _plane(axis, key: str, unit: str, motion: Sequence[np.ndarray]) -> None:
    for i, x in reversed(list(enumerate(motion))):
        axis.plot(*x.reshape(len(x), -1, 2).transpose(2, 0, 1), color=LINE if i else ONE, lw=0.7 if i else 1.4, alpha=0.3 if i else 1)
    starts = np.concatenate([x[0].reshape(-1, 2) for x in motion])
    axis.plot(*starts.T, ".", color="black", ms=3)
    axis.set_title(f"{key}, second over first component{f' [{unit}]' if unit else ''}, • start", fontsize=9)
    axis.set_aspect("equal", adjustable="datalim")
    _clean(axis)


def _strip(axis, label: str, lines: Sequence[np.ndarray], fps: float | None) -> None:
    for i, y in reversed(list(enumerate(lines))):
        axis.plot(np.arange(len(y)) / (fps or 1), y, color=LINE if i else ONE, lw=0.6 if i else 1.3, alpha=0.3 if i else 1)
    axis.set_ylabel(label, fontsize=8)
    axis.margins(x=0)
    axis.tick_params(labelbottom=False)
    _clean(axis)


def _label(key: str, c: int, shape: tuple[int, ...]) -> str:
    return f"{key}[{','.join(map(str, np.unravel_index(c, shape)))}]" if shape else key


def _clean(axis) -> None:
    axis.tick_params(labelsize=7, length=2)
    axis.spines[["top", "right"]].set_visible(False)


def _stats(store: Store, key: str) -> tuple[str, str, str]:
    """min, max, mean over the whole key, or over a spread of its frames when it is large."""
    shape, dtype = store.schema[key]
    if not store.episodes or dtype.kind not in "biuf":
        return "-", "-", "-"
    block = max(1, BLOCK_BYTES // 8 // max(1, math.prod(shape) * dtype.itemsize))
    starts = np.arange(0, store.steps, block)
    sampled = len(starts) > 8
    starts = starts[np.linspace(0, len(starts) - 1, 8).astype(int)] if sampled else starts
    parts = [store.read(key, lo, min(int(lo) + block, store.steps)) for lo in starts.tolist()]
    mean = sum(p.mean(dtype=np.float64) * len(p) for p in parts) / sum(map(len, parts))
    about = "~" if sampled else ""
    return f"{about}{min(p.min() for p in parts):.4g}", f"{about}{max(p.max() for p in parts):.4g}", f"{about}{mean:.4g}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"

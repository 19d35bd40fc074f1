"""A dataset as the checks see it: what each key is, its frames block by block, robust scales from a sample. Memory is bounded, whatever N.

Blocks end where episodes end; an episode longer than a block is cut, and the next block repeats its last OVERLAP frames, so that a fault on the
cut is seen. Decoded blocks are kept while they fit `keep` bytes, so that a dozen checks decode a small dataset once. What grows with N is 13 bytes a frame.
"""
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Place
from policy.data.files import DataError
from policy.data.semantics import Semantics

BLOCK, OVERLAP, SAMPLE = 2**25, 4, 2**17  # bytes; frames; frames
STRETCH = 2048  # of a sample: as many neighbouring frames as are looked at together, at most
FEW = 20        # a channel with at most this many values is a switch or a counter, not a measurement
WORDS = {"time": {"time", "timestamp", "timestamps", "stamp", "stamps", "t", "clock"}, "index": {"index", "step", "frame", "idx"},
         "flag": {"reward", "rewards", "done", "dones", "terminal", "terminals", "terminated", "truncated", "success", "timeout", "timeouts", "return",
                  "returns", "discount", "next"}}


class Reads(Protocol):
    """What is asked of a dataset: policy.data.Store is one."""
    @property
    def path(self) -> Path | str: ...
    @property
    def schema(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]: ...
    @property
    def episode_ends(self) -> np.ndarray: ...
    attrs: dict[str, Any]
    def read(self, key: str, lo: int = 0, hi: int | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Block:
    """Frames [lo, lo + n) of one key.   values: (n, c), float.   first: (n,), begins an episode.   fresh: frames before it were in the last block too.

    at: (n,) frames of the dataset, where they are a sample."""
    lo: int
    values: NDArray[Any]
    first: NDArray[np.bool_]
    fresh: int = 0
    at: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @cached_property
    def steps(self) -> NDArray[Any]:
        """(n-1, c): values[t+1] - values[t], nan across the border of an episode."""
        with np.errstate(invalid="ignore"):
            steps = np.diff(self.values, axis=0)
        steps[self.first[1:]] = np.nan
        return steps


@dataclass(frozen=True)
class Scales:
    """Of each channel (c,), from a sample.   lo, hi: 0.1 % and 99.9 % quantile, range between them.   step: 97 % quantile of |change in one frame| > 0.

    few: at most FEW values.   moves: neither a clock nor what the normaliser takes for constant.   smooth: a step is small beside the range, so that a
    jump means something.
    """
    lo: NDArray[np.float64]
    hi: NDArray[np.float64]
    step: NDArray[np.float64]
    typical: NDArray[np.float64]  # their median
    still: NDArray[np.float64]    # share of frames without any change
    few: NDArray[np.bool_]
    clock: NDArray[np.bool_]      # counts on evenly, at the rate of the dataset: a time stamp, even if nobody calls it one

    @property
    def range(self) -> NDArray[np.float64]:
        return self.hi - self.lo

    @property
    def moves(self) -> NDArray[np.bool_]:
        return ~self.clock & (self.range > least_range(self.lo, self.hi))

    @property
    def smooth(self) -> NDArray[np.bool_]:
        return self.moves & ~self.few & (self.step <= 0.05 * self.range)


class Data:
    """One dataset and how it is going to be trained on.

    action: key of the actions, '' where there is none (a DataError where it was said, and is no default).
    horizon [steps], val_ratio and seed: as `dipole train` has them.
    image_bytes: of each image key, decoded; keep: of the others, held.
    fps: of a dataset that does not say.   called: what commands call it, when it is a copy.   observed: keys that a policy sees, unless told otherwise.
    chunks {key: frames that are decoded together}.   looked {image key: share of its frames that was looked at}.
    roles {key: image, action, time, index, flag, text or state}.   lengths (E,), starts (E,).   fps [1/s] or None.
    """

    def __init__(self, store: Reads, *, action: str = "action", horizon: int = 16, val_ratio: float = 0.02, seed: int = 42,
                 image_bytes: float = 2**30, keep: int = 2**29, chunks: Mapping[str, int] | None = None, fps: float | None = None, called: str = ""):
        self.store, self.horizon, self.val_ratio, self.seed, self.image_bytes = store, horizon, val_ratio, seed, image_bytes
        self.chunks, self.looked = dict(chunks or {}), {}  # type: dict[str, int], dict[str, float]
        self.path, self.schema, attrs = called or store.path, dict(store.schema), store.attrs
        self.action = actions_of(self.schema, action)
        self.ends = np.asarray(store.episode_ends, np.int64)
        self.lengths = np.diff(self.ends, prepend=0)
        self.starts = self.ends - self.lengths
        self.frames = int(self.ends[-1]) if len(self.ends) else 0
        self.fps: float | None = attrs.get("fps") or fps
        self.observed = observed(attrs.get("obs"), self.action, self.schema)
        self.units: Mapping[str, str] = attrs.get("units") or {}
        self.names: Mapping[str, Any] = attrs.get("names") or {}
        self.semantics = Semantics.from_json(attrs.get("action"))
        self.roles = {key: role(key, shape, dtype, self.action) for key, (shape, dtype) in self.schema.items()}
        self._room, self._kept = keep, {}  # type: int, dict[tuple[str, int], NDArray[Any]]
        self._memo: dict[tuple[str, str], Any] = {}

    def keys(self, *roles: str) -> list[str]:
        """Keys of these roles that have numbers in them."""
        return [key for key, is_a in self.roles.items() if is_a in roles and self.width(key)]

    @property
    def motion(self) -> list[str]:
        """What moves: states and the action."""
        return self.keys("state", "action")

    def width(self, key: str) -> int:
        return math.prod(self.schema[key][0])

    def label(self, key: str, channel: int) -> str:
        """key[elbow] where the attribute `names` {key: [name of each channel]} says so, else key[3]."""
        if isinstance(names := self.names.get(key), list) and len(names) == self.width(key):
            return f"{key}[{names[channel]}]"
        shape = self.schema[key][0]
        return f"{key}[{','.join(map(str, np.unravel_index(channel, shape)))}]" if shape else key

    def short(self, key: str, channel: int) -> str:
        """The label without the key, where that is said already."""
        return self.label(key, channel).removeprefix(f"{key}[").removesuffix("]")

    def down(self, key: str) -> bool:
        """Whether the second component of points in the plane counts downwards, as in a picture: in pixels, or in no unit, where there are pictures."""
        unit = self.units.get(key) or ""
        return unit in ("px", "pixel", "pixels") or self.semantics.space == "image" or (not unit and "image" in self.roles.values())

    def place(self, lo: int, hi: int | None = None, channel: int | None = None, text: str = "") -> Place:
        """Frames [lo, hi) of the dataset, all of one episode, as steps of it."""
        e = int(np.searchsorted(self.ends, lo, side="right"))
        start = int(self.starts[e])
        return Place(e, int(lo) - start, (int(lo) + 1 if hi is None else int(hi)) - start, channel, text)

    def spans(self, row_bytes: int) -> list[tuple[int, int, int]]:
        """(lo, hi, frames repeated from before) of blocks of whole episodes, an episode cut only where it is longer than a block."""
        most, out, lo = max(STRETCH, BLOCK // max(1, row_bytes)), [], 0
        while lo < self.frames:
            last = int(np.searchsorted(self.ends, lo + most, side="right"))
            hi = int(self.ends[last - 1]) if last and self.ends[last - 1] > lo else min(lo + most, self.frames)
            repeats = 0 if lo == 0 or lo in self._borders else OVERLAP
            out.append((lo - repeats, hi, repeats))
            lo = hi
        return out

    def blocks(self, key: str) -> Iterator[Block]:
        shape, dtype = self.schema[key]
        for lo, hi, fresh in self.spans(max(1, math.prod(shape)) * max(4, dtype.itemsize)):
            values = self._kept.get((key, lo))
            if values is None:
                raw = self.store.read(key, lo, hi).reshape(hi - lo, -1)
                values = raw if raw.dtype in (np.float32, np.float64) else raw.astype(np.float32 if raw.dtype == np.float16 else np.float64)
                if values.nbytes <= self._room:
                    self._room -= values.nbytes
                    self._kept[key, lo] = values
            yield Block(lo, values, self.first(lo, hi), fresh)

    def first(self, lo: int, hi: int) -> NDArray[np.bool_]:
        out = np.zeros(hi - lo, bool)
        a, b = np.searchsorted(self.starts, [lo, hi])
        out[self.starts[a:b] - lo] = True
        return out

    def sample(self, key: str) -> Block:
        """At most about SAMPLE frames in stretches of neighbours, those with a nan or infinity left out; `first` marks where a stretch begins."""
        return self.once("sample", key, lambda: thinned(self.blocks(key), SAMPLE / max(1, self.frames)))

    def scales(self, key: str) -> Scales:
        return self.once("scales", key, lambda: measure(self.sample(key), self.fps))

    def per_episode(self, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Least and greatest value of each episode and channel: (E, c) twice; nan and infinity count as nothing."""
        return self.once("per_episode", key, lambda: extremes(self, key))

    def once(self, what: str, key: str, make: Any) -> Any:
        if (what, key) not in self._memo:
            self._memo[what, key] = make()
        return self._memo[what, key]

    @cached_property
    def _borders(self) -> set[int]:
        return set(self.starts.tolist())


def actions_of(schema: Mapping[str, tuple[tuple[int, ...], np.dtype]], said: str) -> str:
    """The key of the actions: as said; `actions`, or '' for none, where nothing but the default is said. DataError when it is not there."""
    numeric = [key for key, (_, dtype) in schema.items() if dtype.kind in "biuf"]
    if said in numeric:
        return said
    if said != "action":
        what = "is text, no numbers" if said in schema else "is no key of the dataset"
        raise DataError(f"action={said} {what}; use one of {', '.join(numeric)}")
    return "actions" if "actions" in numeric else ""


def least_range(lo: NDArray[Any], hi: NDArray[Any]) -> NDArray[Any]:
    """Below it policy.data.normalize takes a channel for constant."""
    return np.maximum(1e-6 * np.maximum(np.abs(lo), np.abs(hi)), 1e-4)


def observed(said: Any, action: str, schema: Mapping[str, Any]) -> set[str]:
    """Keys of the attribute `obs`, a list of keys or {name: key or {key: …}}; without it every key but the action."""
    if not said:
        return set(schema) - {action}
    specs = said.values() if isinstance(said, Mapping) else said
    return {spec["key"] if isinstance(spec, Mapping) else spec for spec in specs}


def role(key: str, shape: tuple[int, ...], dtype: np.dtype, action: str) -> str:
    """What a key is, by its name and the shape of one frame."""
    if dtype.kind not in "biuf":
        return "text"
    if key == action:
        return "action"
    colour = len(shape) >= 3 and ((min(shape[-3:-1]) >= 8 and shape[-1] <= 4) or (shape[-3] <= 4 and min(shape[-2:]) >= 8))
    if colour or (len(shape) == 2 and min(shape) >= 32):
        return "image"
    words = re.split(r"[^a-z]+", key.lower())
    for name, known in WORDS.items():
        if (math.prod(shape) == 1 and words[-1] in known) or (name == "flag" and words[0] in known):
            return name
    return "flag" if dtype.kind == "b" else "state"


def thinned(blocks: Iterator[Block], share: float) -> Block:
    values, first, at = [], [], []
    for block in blocks:
        keep = (np.arange(block.lo, block.lo + len(block.values)) % STRETCH) < max(8, share * STRETCH)
        keep[:block.fresh] = False
        keep &= np.isfinite(block.values).all(axis=1)
        begins = block.first | ~np.concatenate([[False], keep[:-1]])
        values.append(block.values[keep])
        first.append(begins[keep])
        at.append(block.lo + np.flatnonzero(keep))
    return Block(0, np.concatenate(values), np.concatenate(first), 0, np.concatenate(at))


def measure(sample: Block, fps: float | None) -> Scales:
    x, steps = sample.values, sample.steps[~sample.first[1:]]
    if not len(x):
        x = np.zeros((1, x.shape[1]))
    if not len(steps):
        steps = np.zeros((1, x.shape[1]))
    low, middle, high = np.quantile(steps, [0.1, 0.5, 0.9], axis=0)
    rate = middle * (fps or 1)
    ticks = [(rate > unit / 3) & (rate < 3 * unit) for unit in ((1, 1e3, 1e6, 1e9) if fps else ())]
    clock = ((steps > 0).mean(axis=0) > 0.99) & (high - low < 0.5 * middle) & (np.any(ticks, axis=0) if ticks else middle == 1)
    steps = np.abs(steps)
    lo, hi = np.quantile(x, [0.001, 0.999], axis=0, method="nearest").astype(np.float64)
    moving = [d[d > 1e-3 * width] for d, width in zip(steps.T, hi - lo, strict=True)]  # an object that rests most of the time has a pace all the same
    typical, step = (np.array([np.quantile(d, q) if len(d) else 0.0 for d in moving]) for q in (0.5, 0.97))
    few = np.array([len(np.unique(column[:4096])) <= FEW and len(np.unique(column)) <= FEW for column in x.T])
    return Scales(lo, hi, step, typical, (steps == 0).mean(axis=0), few, clock)


def extremes(data: Data, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
    lo = np.full((len(data.ends), data.width(key)), np.inf)
    hi = -lo
    for block in data.blocks(key):
        at = np.unique(np.concatenate([[0], np.flatnonzero(block.first)]))
        e = np.searchsorted(data.ends, at + block.lo, side="right")
        with np.errstate(invalid="ignore"):
            x = block.values if np.isfinite(block.values.sum()) else np.where(np.isfinite(block.values), block.values, np.nan)
            lo[e] = np.fmin(lo[e], np.fmin.reduceat(x, at, axis=0))
            hi[e] = np.fmax(hi[e], np.fmax.reduceat(x, at, axis=0))
    return lo, hi


def runs(mask: NDArray[np.bool_], breaks: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[lo, hi) of each stretch of True, cut where breaks is True (a frame that begins something new)."""
    before = np.concatenate([[False], mask[:-1]])
    begins = np.flatnonzero(mask & (~before | breaks))
    after = np.concatenate([mask[1:], [False]])
    cut = np.concatenate([breaks[1:], [True]])
    return list(zip(begins.tolist(), (np.flatnonzero(mask & (~after | cut)) + 1).tolist(), strict=True))

"""New datasets from old ones: merged, split, trimmed. The old ones stay as they are; attributes go along; nothing is overwritten."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.building import Filler, beside, free
from policy.data.convert.keep import read_keep, write_keep
from policy.data.files import DataError
from policy.data.semantics import Semantics
from policy.data.store import BLOCK_BYTES, Store

AGREE = ("action", "action_semantics", "obs", "transforms")  # attributes that mean something else for other numbers
OWN = ("fps", "units", "action_semantics")  # arguments of Store.create
BASIS = "provenance"


def merge(sources: Sequence[Path | str], dst: Path | str, *, missing: str = "error") -> Store:
    """All episodes of the sources, one dataset after the other.

    Keys, shapes, dtypes, rate, units and what the actions mean must agree: DataError tells the differences. Other attributes that differ are kept for
    each source in `provenance`.   missing: of Store.open, as below.
    """
    if len(sources) < 2:
        raise ValueError(f"merging takes at least two datasets, got src={[str(s) for s in sources]}. Write src=[a.zarr,b.zarr]")
    free(dst, *sources)
    stores = [Store.open(s, missing=missing) for s in sources]
    if wrong := [line for other in stores[1:] for line in differences(stores[0], other)]:
        raise DataError("these datasets do not fit together:\n  " + "\n  ".join(wrong)
                        + "\nMake them equal first: dipole data convert format=store renames keys and resamples, dipole data trim leaves keys out")
    attrs = {k: v for k, v in stores[0].attrs.items() if all(s.attrs.get(k) == v for s in stores)}
    attrs |= {k: next(v for s in stores if (v := s.attrs.get(k))) for k in AGREE if any(s.attrs.get(k) for s in stores)}
    attrs["units"] = {k: u for s in stores for k, u in s.units.items()}
    attrs["fps"] = next((s.fps for s in stores if s.fps), None)
    attrs[BASIS] = [{"made": "merge", "path": str(s.path), "episodes": s.episodes, "steps": s.steps,
                     "attrs": {k: v for k, v in s.attrs.items() if k not in (*AGREE, *OWN, "source") and attrs.get(k) != v}} for s in stores]
    attrs.pop("source", None)
    origins = [s.attrs.get("source") or {} for s in stores]
    keep: dict[str, Any] = {}
    if all(_way_back(o) == _way_back(origins[0]) != {} for o in origins):
        attrs["source"] = {**origins[0], "name": ", ".join(dict.fromkeys(str(o.get("name")) for o in origins))}
        keeps = [read_keep(s) for s in stores]
        keep = {**keeps[0], **({"episodes": [e for k, s in zip(keeps, stores, strict=True) for e in _entries(k, s)]} if "episodes" in keeps[0] else {})}
    return _made(dst, [Piece(s, i) for s in stores for i in range(s.episodes)], attrs, keep)


def split(source: Path | str, dsts: Sequence[Path | str], *, ratio: float | Sequence[float] | None = None, episodes: Sequence[Sequence[int]] | None = None,
          seed: int = 0, missing: str = "error") -> list[Store]:
    """Whole episodes dealt out to several datasets.

    ratio: share of each dataset, or of the first of two, of a permutation from seed; at least one episode goes to each.   episodes: a list for each.
    """
    store = Store.open(source, missing=missing)
    for i, dst in enumerate(dsts):
        if str(dst) in [str(d) for d in dsts[:i]]:
            raise ValueError(f"dst names {dst} twice")
        free(dst, source)
    if (ratio is None) == (episodes is None) or len(dsts) < 2:
        raise ValueError("splitting takes two or more dst and either a ratio or the episodes of each: dst=[train.zarr,val.zarr] ratio=0.9, or "
                         "episodes=[[0,1,2],[3]]")
    if episodes is not None and (isinstance(episodes, str) or not all(isinstance(e, Sequence) and not isinstance(e, str) for e in episodes)):
        raise ValueError(f"episodes is a list of episodes for each dst, like episodes=[[0,1,2],[3]], got {episodes}")
    dealt = [list(e) for e in episodes] if episodes is not None else deal(store.episodes, ratio if ratio is not None else 0, len(dsts), seed)
    if len(dealt) != len(dsts):
        raise ValueError(f"{len(dsts)} datasets are to be made, but episodes has {len(dealt)} lists")
    whole = [i for part in dealt for i in part]
    if len(set(whole)) != len(whole) or not all(dealt):
        raise ValueError("every dataset gets at least one episode, and none that another has: "
                         f"{sorted({i for i in whole if whole.count(i) > 1}) or [str(d) for d, p in zip(dsts, dealt, strict=True) if not p]}")
    _are_there(store, whole, "episodes")
    how = {"seed": seed} if episodes is None else {}
    return [_edited(store, dst, [Piece(store, i) for i in part], {"made": "split", "kept": part, **how}) for dst, part in zip(dsts, dealt, strict=True)]


def _are_there(store: Store, named: Sequence[int], setting: str) -> None:
    if wrong := [i for i in named if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < store.episodes]:
        raise ValueError(f"{setting} names episode {wrong[0]!r}, but {store.path} has {store.episodes} episodes: 0 to {store.episodes - 1}")


def deal(n: int, ratio: float | Sequence[float], parts: int, seed: int) -> list[list[int]]:
    """Sorted episode numbers of each part."""
    said: list[Any] = [ratio, 1 - ratio] if isinstance(ratio, int | float) else list(ratio)
    shares = [float(r) if isinstance(r, int | float) else math.nan for r in said]
    if len(shares) != parts or not min(shares) > 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(f"ratio is a share above 0 for each of the {parts} datasets, one in all (or the first one's, of two), got {ratio}")
    if n < parts:
        raise ValueError(f"{n} episodes cannot be dealt out to {parts} datasets")
    counts = np.maximum(1, np.diff(np.floor(np.cumsum([0, *shares]) * n + 0.5)).astype(int))
    while counts.sum() > n:
        counts[counts.argmax()] -= 1
    order = np.random.default_rng(seed).permutation(n)
    return [sorted(part.tolist()) for part in np.split(order, np.cumsum(counts)[:-1])]


@dataclass(frozen=True)
class Idle:
    """A step is idle when no channel of key changes, until the next one, by more than `still` of that channel's range over the whole dataset; where the
    key is an action that is a change or a velocity (kind delta, velocity, effort), when no channel but the gripper's is larger than `still` of its
    largest magnitude and the gripper's do not change. Runs of idle steps are cut at the head, the tail or both, all but `margin` steps of each.
    """
    where: str = "both"
    key: str = "action"
    still: float = 1e-3
    margin: int = 0

    def __post_init__(self) -> None:
        if self.where not in ("head", "tail", "both") or not 0 <= self.still < 1 or self.margin < 0:
            raise ValueError(f"idle: where is head, tail or both, still a share in [0, 1), margin steps from 0; got {self}")


def trim(source: Path | str, dst: Path | str, *, drop: Sequence[int] = (), keep: Sequence[int] | None = None, steps: Sequence[int | None] | None = None,
         idle: Idle | None = None, drop_keys: Sequence[str] = (), shortest: int = 1, missing: str = "error") -> tuple[Store, list[str]]:
    """A dataset without some episodes (drop, or all but keep), steps and keys; and what was cut, in words.

    steps [lo, hi): of every episode, as python slices; null is the end.   shortest: episodes that have fewer steps left are left out.
    """
    store = Store.open(source, missing=missing)
    free(dst, source)
    if drop and keep is not None:
        raise ValueError("say which episodes to drop or which to keep, not both")
    chosen = [i for i in (range(store.episodes) if keep is None else keep) if i not in set(drop)]
    _are_there(store, [*drop, *(keep or ())], "drop" if drop else "keep")
    if unknown := [k for k in drop_keys if k not in store.keys]:
        raise KeyError(f"drop_keys: {unknown[0]!r} is not in {store.path} (known: {', '.join(store.keys)})")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"keep names an episode twice: {sorted({i for i in chosen if chosen.count(i) > 1})}")
    keys = [k for k in store.keys if k not in drop_keys]
    scale = _scale(store, idle) if idle else np.zeros(0)
    pieces, said = [], []
    for i in chosen:
        a, b = store.span(i)
        lo, hi = range(b - a)[slice(*steps)].start if steps else 0, range(b - a)[slice(*steps)].stop if steps else b - a
        if idle and hi > lo:
            x, y = active(store, idle, a + lo, a + hi, scale)
            lo, hi = lo + x, lo + y
        if hi - lo < max(1, shortest):
            said.append(f"episode {i} has {max(0, hi - lo)} of {b - a} steps left and is left out")
            continue
        pieces.append(Piece(store, i, lo, hi))
    if not pieces or not keys:
        raise DataError(f"nothing of {store.path} would be left. Cut less")
    gone = store.steps - sum(p.hi - p.lo for p in pieces)
    said.append(f"{gone} of {store.steps} steps and {store.episodes - len(pieces)} of {store.episodes} episodes cut")
    basis = {"made": "trim", "kept": [[p.i, p.lo, p.hi] for p in pieces], **({"dropped keys": list(drop_keys)} if drop_keys else {})}
    return _edited(store, dst, pieces, basis, keys), said


def active(store: Store, idle: Idle, lo: int, hi: int, scale: np.ndarray) -> tuple[int, int]:
    """The steps [a, b) of frames [lo, hi) that are left when idle heads and tails are cut; (0, 0) when all are idle."""
    x = store.read(idle.key, lo, hi).reshape(hi - lo, -1).astype(np.float64)
    change = np.abs(np.diff(x, axis=0, append=x[-1:]))
    effort, gripper = _efforts(store, idle, x.shape[1])
    moving = ((np.abs(x), effort & ~gripper), (change, ~effort | gripper))
    pushes, turns = (np.flatnonzero((size > idle.still * scale)[:, some].any(1)) for size, some in moving)
    if not len(pushes) + len(turns):
        return 0, 0
    first, last = min([*pushes[:1], *turns[:1]]), max([*pushes[-1:], *(turns[-1:] + 1)])  # a change needs the step that it leads to
    return max(0, int(first) - idle.margin) if idle.where != "tail" else 0, min(hi - lo, int(last) + 1 + idle.margin) if idle.where != "head" else hi - lo


def _efforts(store: Store, idle: Idle, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether the key says how much to move, rather than where to be; and which channels are a gripper's."""
    meant = Semantics.from_json(store.attrs.get("action")) if idle.key == "action" else Semantics()
    gripper = np.isin(np.arange(d), meant.parts.get("gripper", ()))
    return np.full(d, meant.kind in ("delta", "velocity", "effort")), gripper


def _scale(store: Store, idle: Idle) -> np.ndarray:
    """(d,): range of each channel, or its largest magnitude."""
    shape, dtype = store.schema.get(idle.key) or store.read(idle.key)  # read raises the KeyError that lists the keys
    d = int(np.prod(shape, dtype=np.int64))
    effort, gripper = _efforts(store, idle, d)
    low, high = np.full(d, np.inf), np.full(d, -np.inf)
    block = max(1, BLOCK_BYTES // max(1, d * dtype.itemsize))
    for lo in range(0, store.steps, block):
        x = store.read(idle.key, lo, min(lo + block, store.steps)).reshape(-1, d).astype(np.float64)
        low, high = np.minimum(low, x.min(0)), np.maximum(high, x.max(0))
    return np.where(effort & ~gripper, np.maximum(np.abs(low), np.abs(high)), high - low)


def differences(a: Store, b: Store) -> list[str]:
    """Why the episodes of b do not fit into a dataset like a, one sentence each."""
    out = [f"{k!r} is only in {s.path}" for s, o in ((a, b), (b, a)) for k in s.keys if k not in o.keys]
    for k in (k for k in a.keys if k in b.keys):
        (sa, da), (sb, db) = a.schema[k], b.schema[k]
        if sa != sb or da.newbyteorder("=") != db.newbyteorder("="):
            out.append(f"{k!r} is {sa} {da} in {a.path} and {sb} {db} in {b.path}")
        if a.units.get(k) and b.units.get(k) and a.units[k] != b.units[k]:
            out.append(f"{k!r} is in {a.units[k]} in {a.path} and in {b.units[k]} in {b.path}")
    if a.fps and b.fps and abs(a.fps - b.fps) > 1e-6 * a.fps:
        out.append(f"{a.path} has {a.fps:g} Hz and {b.path} {b.fps:g} Hz")
    for k in AGREE:
        for name, x, y in _unequal(k, a.attrs.get(k), b.attrs.get(k)):
            out.append(f"{name} is {x} in {a.path} and {y} in {b.path}")
    return out


def _unequal(name: str, x: Any, y: Any) -> list[tuple[str, Any, Any]]:
    """Where two attributes that are both there differ."""
    if not x or not y or x == y:
        return []
    if isinstance(x, dict) and isinstance(y, dict):
        return [(f"{name}.{k}", x.get(k), y.get(k)) for k in {**x, **y} if x.get(k) != y.get(k) and k != "text"]
    return [(name, x, y)]


@dataclass(frozen=True)
class Piece:
    """Steps [lo, hi) of episode i, all by default."""
    store: Store
    i: int
    lo: int = 0
    hi: int = -1

    def span(self) -> tuple[int, int]:
        a, b = self.store.span(self.i)
        return a + self.lo, b if self.hi < 0 else a + self.hi

    @property
    def whole(self) -> bool:
        return self.span() == self.store.span(self.i)


def _edited(store: Store, dst: Path | str, pieces: list[Piece], how: Mapping[str, Any], keys: Sequence[str] | None = None) -> Store:
    """A dataset of pieces of one store, with its attributes and what its source said about the episodes that are whole."""
    attrs = {**store.attrs, BASIS: [*_before(store), {**how, "path": str(store.path), "episodes": store.episodes, "steps": store.steps}]}
    was = read_keep(store)
    keep = {**was, **({"episodes": [_entries(was, store)[p.i] if p.whole else None for p in pieces]} if "episodes" in was else {})}
    return _made(dst, pieces, attrs, keep, keys)


def _before(store: Store) -> list[Any]:
    said = store.attrs.get(BASIS) or []
    return said if isinstance(said, list) else [said]


def _entries(keep: Mapping[str, Any], store: Store) -> list[Any]:
    each = keep.get("episodes", [])
    return each if len(each) == store.episodes else [None] * store.episodes


def _way_back(source: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in source.items() if k != "name"}


def _made(dst: Path | str, pieces: list[Piece], attrs: dict[str, Any], keep: Mapping[str, Any], keys: Sequence[str] | None = None) -> Store:
    store = pieces[0].store
    schema = {k: v for k, v in store.schema.items() if keys is None or k in keys}
    units = {k: u for k, u in (attrs.get("units") or {}).items() if k in schema}
    if isinstance(attrs.get("obs"), dict):
        attrs = {**attrs, "obs": {n: s for n, s in attrs["obs"].items() if (s if isinstance(s, str) else s["key"]) in schema}}
    if not attrs.get("fps"):
        raise DataError(f"{store.path} does not say how many steps there are in a second. Convert it first: dipole data convert src={store.path} dst=… fps=…")
    with beside(dst) as part:
        made = Store.create(part, schema, fps=attrs["fps"], units=units, action_semantics=attrs.get("action_semantics"),
                            attrs={k: v for k, v in attrs.items() if k not in OWN})
        filler = Filler(made)
        for piece in pieces:
            filler.copy(piece.store, *piece.span(), keys={k: k for k in schema})
        filler.flush()
        write_keep(part, keep)
    return Store.open(dst)

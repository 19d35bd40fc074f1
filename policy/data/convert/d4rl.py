"""D4RL and its like: an HDF5 file with observations, actions, rewards, terminals and timeouts of all episodes end to end; infos/… beside them.

An episode ends where terminals or timeouts are set; steps after the last such one are an episode too. Everything with one row a step is a key; what has
not (metadata/…, attributes) is kept. Files that dipole wrote say which keys their observations are made of (own.py), which are keys again.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from policy.data.convert import h5
from policy.data.convert.back import Origin, observed
from policy.data.convert.own import NAME, Own, dump, load
from policy.data.convert.rows import Rows
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.store import Schema, Store

FLAGS = ("terminals", "timeouts")
SEEN = "observations"


def detects(path: Path) -> bool:
    if not h5.is_hdf5(path):
        return False
    with h5.opened(path) as f:
        return isinstance(f.get("actions"), h5.h5py().Dataset) and "observations" in f


def read(path: Path, *, skip: Sequence[str] = ()) -> Source:
    rows = Rows(skip)
    with h5.opened(path) as f:
        found, n = dict(h5.leaves(f)), len(f["actions"])
        schema, more, rest = rows.add(f, found, n, str(path))
        left = rows.settle([rest], lambda i, keys: {k: h5.whole(f[k]) for k in keys})
        last = {k: found[k][n] for k in more}
        flags = [k for k in FLAGS if k in schema]
        over = np.zeros(n, bool)
        for k in flags:
            over |= f[k][()].reshape(n).astype(bool)
        keep = {**rest, "filters": {k: how for k in schema if (how := h5.filters(f[k]))}}
    ends = np.flatnonzero(over) + 1
    notes = left if flags else [*left, f"neither {' nor '.join(FLAGS)} tells the episodes apart, so all {n} steps are one"]
    if not len(ends) or ends[-1] != n:
        if flags:
            notes.append(f"the last {n - (ends[-1] if len(ends) else 0)} steps are not ended by {' or '.join(flags)} and are an episode too")
        ends = np.append(ends, n)
    if keep["arrays"]:
        notes.append(f"not one row a step, so kept but no keys: {', '.join(keep['arrays'])}")
    if last:
        keep["episodes"] = [*({} for _ in ends[1:]), {"final": last}]
    own = load(keep["attrs"].get(NAME), notes)
    side = {} if last else _apart(own, schema)
    if side:
        keep["side"] = list(side)
    elif own.columns:
        own = replace(own, obs=None)
        notes.append(f"{SEEN} are no longer {' and '.join(k for k, _, _ in own.columns)} side by side, as they were written, and stay one key")
    apart = {**side, **{k: x for k, x in schema.items() if not side or k != SEEN}}
    return Source(path, "d4rl", apart, lambda: _stream(path, list(schema), ends, side), len(ends), fps=own.fps, units=own.units, action="actions",
                  semantics=own.semantics, attrs=own.attrs(path.stem), obs=own.obs, beside=rows.beside, names=own.keys, keep=keep, notes=notes)


def write(store: Store, path: Path) -> list[str]:
    """As it came. A store from elsewhere: what a policy observes side by side in observations, the rest in infos/, rewards 0 where there are none; and
    what only we say, see own.py."""
    origin = Origin.of(store, "d4rl", obs="infos/", action="actions")
    notes, side = list(origin.notes), list(origin.keep.get("side", []))
    seen: list[str] = []
    if not origin.came:
        seen = [k for k in observed(store) if k != "action" and store.schema[k][1].kind in "fiub" and len(store.schema[k][0]) < 3]
        if not seen or "action" not in store.keys:
            raise DataError(f"{store.path} has no {'observations' if not seen else 'action'}, and D4RL needs them (keys: {', '.join(store.keys)})")
        side = [f"{SEEN}/{k}" for k in seen]
        origin.names = {k: f"{SEEN}/{k}" if k in seen else "rewards" if k in ("reward", "rewards") else name for k, name in origin.names.items()}
        origin.schema = {name: store.schema[k] for k, name in origin.names.items()}
        notes.append(f"observations are {', '.join(f'{k} {store.schema[k][0]}' for k in seen)} side by side; an episode ends with timeouts")
    how = origin.keep.get("filters", {})
    with h5.h5py().File(path, "w") as f:
        for i in range(store.episodes):
            episode, (lo, hi) = _joined(origin.episode(i), side), store.span(i)
            for key, x in {**({} if origin.came else _outcomes(hi - lo)), **episode}.items():
                if key not in f:
                    f.create_dataset(key, (store.steps, *x.shape[1:]), x.dtype, **how.get(key, {}))
                f[key][lo:hi] = x
        for key, x in origin.of_episode(store.episodes - 1).get("final", {}).items():
            whole, attrs = np.concatenate([f[key][()], x[None]]), h5.attrs_of(f[key])
            del f[key]
            f.create_dataset(key, data=whole, **how.get(key, {}))
            h5.set_attrs(f[key], attrs)
        h5.write_rest(f, origin.keep)
        if not origin.came:
            f.attrs[NAME] = dump(origin, columns=seen, made=_outcomes(0))
    return notes


def _outcomes(n: int) -> Episode:
    """Rewards and ends for a store that has none."""
    return {"rewards": np.zeros(n, np.float32), "terminals": np.zeros(n, bool), "timeouts": np.arange(n) == n - 1}


def _joined(episode: Episode, side: list[str]) -> Episode:
    """The keys in side as one array, in their order."""
    parts = [x.reshape(len(x), -1) for x in (episode[k] for k in side if k in episode)]
    return {**({SEEN: np.concatenate(parts, 1)} if parts else {}), **{k: x for k, x in episode.items() if k not in side}}


def _apart(own: Own, schema: Schema) -> Schema:
    """The keys that the observations are made of; {} where nobody says so, or where it cannot be so."""
    side = {f"{SEEN}/{key}": (shape, dtype) for key, shape, dtype in own.columns}
    whole = (sum(math.prod(s) for s, _ in side.values()),), np.result_type(*(d for _, d in side.values())) if side else None
    return side if schema.get(SEEN) == whole else {}


def _stream(path: Path, keys: list[str], ends: np.ndarray, side: Schema) -> Iterator[Episode]:
    cuts = np.cumsum([math.prod(shape) for shape, _ in side.values()])[:-1]
    with h5.opened(path) as f:
        lo = 0
        for hi in ends.tolist():
            episode = {k: f[k][lo:hi] for k in keys}
            if side:
                parts = zip(side.items(), np.split(episode.pop(SEEN), cuts, 1), strict=True)
                episode |= {k: x.reshape(hi - lo, *shape).astype(dtype) for (k, (shape, dtype)), x in parts}
            yield episode
            lo = hi

"""D4RL and its like: an HDF5 file with observations, actions, rewards, terminals and timeouts of all episodes end to end; infos/… beside them.

An episode ends where terminals or timeouts are set; steps after the last such one are an episode too. Everything with one row a step is a key; what has
not (metadata/…, attributes) is kept.
"""
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from policy.data.convert import h5
from policy.data.convert.back import Origin, observed
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.store import Store

FLAGS = ("terminals", "timeouts")


def detects(path: Path) -> bool:
    if not h5.is_hdf5(path):
        return False
    with h5.opened(path) as f:
        return isinstance(f.get("actions"), h5.h5py().Dataset) and "observations" in f


def read(path: Path) -> Source:
    with h5.opened(path) as f:
        found, n = dict(h5.leaves(f)), len(f["actions"])
        schema, more = h5.steps(found, n, str(path))
        last = {k: found[k][n] for k in more}
        flags = [k for k in FLAGS if k in schema]
        over = np.zeros(n, bool)
        for k in flags:
            over |= f[k][()].reshape(n).astype(bool)
        keep = {**h5.rest(f, found, schema), "filters": {k: how for k in schema if (how := h5.filters(f[k]))}}
    ends = np.flatnonzero(over) + 1
    notes = [] if flags else [f"neither {' nor '.join(FLAGS)} tells the episodes apart, so all {n} steps are one"]
    if not len(ends) or ends[-1] != n:
        if flags:
            notes.append(f"the last {n - (ends[-1] if len(ends) else 0)} steps are not ended by {' or '.join(flags)} and are an episode too")
        ends = np.append(ends, n)
    if keep["arrays"]:
        notes.append(f"not one row a step, so kept but no keys: {', '.join(keep['arrays'])}")
    if last:
        keep["episodes"] = [*({} for _ in ends[1:]), {"final": last}]
    return Source(path, "d4rl", schema, lambda: _stream(path, list(schema), ends), len(ends), action="actions", attrs={"task": path.stem},
                  keep=keep, notes=notes)


def write(store: Store, path: Path) -> list[str]:
    """As it came. A store from elsewhere: what a policy observes side by side in observations, the rest in infos/, rewards 0 where there are none."""
    origin = Origin.of(store, "d4rl", obs="infos/", action="actions")
    notes = list(origin.notes)
    seen: list[str] = []
    if not origin.came:
        seen = [k for k in observed(store) if store.schema[k][1].kind in "fiub" and len(store.schema[k][0]) < 3]
        if not seen or "action" not in store.keys:
            raise DataError(f"{store.path} has no {'observations' if not seen else 'action'}, and D4RL needs them (keys: {', '.join(store.keys)})")
        origin.names = {k: "rewards" if k in ("reward", "rewards") else name for k, name in origin.names.items() if k not in seen}
        origin.schema = {name: store.schema[k] for k, name in origin.names.items()}
        notes.append(f"observations are {', '.join(f'{k} {store.schema[k][0]}' for k in seen)} side by side; an episode ends with timeouts")
    how = origin.keep.get("filters", {})
    with h5.h5py().File(path, "w") as f:
        for i in range(store.episodes):
            episode, (lo, hi) = origin.episode(i), store.span(i)
            for key, x in {**episode, **(_made(store, seen, episode, lo, hi) if seen else {})}.items():
                if key not in f:
                    f.create_dataset(key, (store.steps, *x.shape[1:]), x.dtype, **how.get(key, {}))
                f[key][lo:hi] = x
        for key, x in origin.of_episode(store.episodes - 1).get("final", {}).items():
            whole, attrs = np.concatenate([f[key][()], x[None]]), h5.attrs_of(f[key])
            del f[key]
            f.create_dataset(key, data=whole, **how.get(key, {}))
            h5.set_attrs(f[key], attrs)
        h5.write_rest(f, origin.keep)
    return notes


def _made(store: Store, seen: list[str], episode: Episode, lo: int, hi: int) -> Episode:
    n = hi - lo
    parts = [store.read(k, lo, hi).reshape(n, -1) for k in seen]
    made = {"observations": np.concatenate(parts, 1), "rewards": np.zeros(n, np.float32), "terminals": np.zeros(n, bool), "timeouts": np.arange(n) == n - 1}
    return {k: v for k, v in made.items() if k not in episode}


def _stream(path: Path, keys: list[str], ends: np.ndarray) -> Iterator[Episode]:
    with h5.opened(path) as f:
        lo = 0
        for hi in ends.tolist():
            yield {k: f[k][lo:hi] for k in keys}
            lo = hi

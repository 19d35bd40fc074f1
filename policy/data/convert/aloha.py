"""ACT and ALOHA: a folder with one HDF5 file an episode, each with action, observations/qpos, observations/images/….

Every dataset with one row an action is a key. Images that were compressed are decoded as OpenCV does, which gives back the colours that went in, and are
written back as plain arrays. The files do not tell their rate: fps=… (ALOHA: 50); those that dipole wrote do, see own.py.
"""
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import h5
from policy.data.convert.back import Origin, inside
from policy.data.convert.npz import natural
from policy.data.convert.own import NAME, dump, load
from policy.data.convert.rows import Rows
from policy.data.convert.source import Episode, Source
from policy.data.semantics import Semantics
from policy.data.store import Store

ACTION, STATE = "action", "observations/qpos"


def detects(path: Path) -> bool:
    files = _files(path)
    if not files or not h5.is_hdf5(files[0]):
        return False
    with h5.opened(files[0]) as f:
        return isinstance(f.get(ACTION), h5.h5py().Dataset) and "observations" in f


def read(path: Path, *, skip: Sequence[str] = ()) -> Source:
    files = _files(path)
    rows, each, packed, how = Rows(skip, images=True), list[dict[str, Any]](), set[str](), dict[str, dict]()
    for file in files:
        with h5.opened(file) as f:
            found, n = dict(h5.leaves(f)), len(f[ACTION])
            here, more, rest = rows.add(f, found, n, str(file))
            if not each:
                how = {k: x for k in here if (x := h5.filters(f[k])) and not h5.jpeg(f[k])}
            packed |= {k for k in here if h5.jpeg(f[k])}
            last = {k: _colours(h5.rows(f[k], n, n + 1), k in packed)[0] for k in more}
            each.append({"file": file.name, **({"final": last} if last else {}), **rest})
    notes = rows.settle(each, lambda i, keys: _whole(files[i], keys))
    notes += h5.left_out({"arrays": {k: x for k, x in e["arrays"].items() if k != "compress_len"}} for e in each)
    schema = rows.schemas[0]
    for file, other in zip(files, rows.schemas, strict=True):
        if other != schema:
            raise h5.differs(file.parent, other, file.name, schema, files[0].name)
    own = load(next((e["attrs"][NAME] for e in each if NAME in e["attrs"]), None), notes)
    meant = Semantics("absolute", "joint", of=STATE, text="target of qpos") if STATE in schema and schema[STATE][0] == schema[ACTION][0] else Semantics()
    return Source(path, "aloha", schema, lambda: _stream(files, list(schema), packed), len(files), fps=own.fps, units=own.units, action=ACTION,
                  semantics=own.semantics if own.said else meant, attrs=own.attrs(path.name), obs=own.obs, names=own.keys,
                  keep={"episodes": each, "filters": how, "jpeg": sorted(packed & set(schema))}, notes=notes, beside=rows.beside)


def write(store: Store, path: Path) -> list[str]:
    """As it came; a store from elsewhere as observations/<key> and action, its images too; and what only we say in each file."""
    origin = Origin.of(store, "aloha", obs="observations/", action=ACTION)
    packed, own = origin.keep.get("jpeg", []), "" if origin.came else dump(origin)
    path.mkdir()
    for i in range(store.episodes):
        said = origin.of_episode(i)
        with h5.h5py().File(inside(path, said.get("file", f"episode_{i}.hdf5")), "w") as f:
            for key, x in origin.episode(i).items():
                last = said.get("final", {})
                f.create_dataset(key, data=np.concatenate([x, last[key][None]]) if key in last else x, **origin.keep.get("filters", {}).get(key, {}))
            plain = {"attrs": {**said.get("attrs", {}), **({"compress": np.bool_(False)} if packed and "compress" in said.get("attrs", {}) else {})}}
            arrays = {k: x for k, x in said.get("arrays", {}).items() if not (packed and k == "compress_len")}
            h5.write_rest(f, {**said, "arrays": arrays, **plain})
            if not origin.came:
                f.attrs[NAME] = own
    return origin.notes + ([f"{', '.join(packed)}: JPEG in the source, plain arrays now"] if packed else [])


def _files(path: Path) -> list[Path]:
    return sorted((p for p in path.iterdir() if p.suffix in (".hdf5", ".h5") and p.name != "demo.hdf5"), key=natural) if path.is_dir() else []


def _whole(file: Path, names: Collection[str]) -> dict[str, Any]:
    with h5.opened(file) as f:
        return {k: h5.whole(f[k]) for k in names}


def _stream(files: list[Path], keys: list[str], packed: set[str]) -> Iterator[Episode]:
    for file in files:
        with h5.opened(file) as f:
            n = len(f[ACTION])
            yield {k: _colours(h5.rows(f[k], 0, n), k in packed) for k in keys}


def _colours(x: np.ndarray, packed: bool) -> np.ndarray:
    """As OpenCV decodes JPEG: the channels turned round."""
    return np.ascontiguousarray(x[..., ::-1]) if packed and x.shape[-1] == 3 else x

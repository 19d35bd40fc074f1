"""numpy arrays: an .npz with all steps end to end, a folder with one .npz an episode, or a folder with one .npy a key.

Steps are the first axis. Episodes are told apart by an array of ends (episode_ends) or of lengths (episode_lengths), or by flags (terminals, dones,
timeouts) at their last steps. Arrays with one row an episode, or of any other length, are no keys of the store; they are kept for the way back.
Files are read in pieces; a pickled array in them is refused.
"""
import re
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from policy.data.convert.back import Origin, inside
from policy.data.convert.own import NAME, dump, load
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.store import Store

ENDS = ("episode_ends", "episode_end", "ends")
LENGTHS = ("episode_lengths", "episode_length", "lengths", "traj_lengths")
FLAGS = ("terminals", "terminal", "dones", "done", "timeouts", "timeout", "terminations", "truncations", "is_last")
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, MemoryError, SyntaxError,
           struct.error, tokenize.TokenError)  # what zipfile and numpy raise
ACTIONS = ("action", "actions", "act", "acts")


def detects(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.npz")) or (path / "actions.npy").exists() or (path / "action.npy").exists() or any((path / f"{n}.npy").exists() for n in ENDS)
    return path.suffix == ".npz"


def read(path: Path) -> Source:
    files = sorted(path.glob("*.npz"), key=natural) if path.is_dir() else [path]
    if path.is_dir() and files:
        return _each_an_episode(path, files)
    with _Arrays(path) as arrays:
        n, ends, cut, note = _cut(arrays)
        frames = {k: (shape[1:], dtype) for k, (shape, dtype) in arrays.heads.items() if shape[:1] == (n,) and k != cut.get("key")}
        own = load(_text(arrays), note)
        whole = {k: arrays.whole(k) for k in arrays.heads if k not in frames and k != cut.get("key")}
    per = {k: x for k, x in whole.items() if x.shape[:1] == (len(ends),)}
    keep = {"layout": "npz" if path.is_file() else "npy", "order": list(arrays.heads), "deflated": arrays.deflated, "cut": cut,
            "arrays": {k: x for k, x in whole.items() if k not in per}, "per_episode": {k: [x.dtype.str, list(x.shape[1:])] for k, x in per.items()},
            "episodes": [{k: x[i] for k, x in per.items()} for i in range(len(ends))]}
    return Source(path, "npz", frames, lambda: _cut_out(path, frames, ends), len(ends), fps=own.fps, units=own.units, action=_action(frames),
                  semantics=own.semantics, attrs={"task": own.task} if own.task else {}, obs=own.obs, keep=keep, notes=[*note, *_kept(whole)])


def write(store: Store, path: Path) -> list[str]:
    """One .npz with episode_ends and what only we say (own.py), or the layout the store came from."""
    origin = Origin.of(store, "npz")
    layout = origin.keep.get("layout", "npz")
    if layout == "files":
        path.mkdir()
        for i in range(store.episodes):
            extra = dict(origin.of_episode(i))
            name = extra.pop("__file__", f"episode_{i:06d}.npz")
            arrays = {**origin.episode(i), **extra}
            save = np.savez_compressed if origin.keep["deflated"] else np.savez
            save(inside(path, name), **{k: arrays[k] for k in origin.keep["order"] if k in arrays})
        return origin.notes
    schema, small = {**origin.schema, **origin.empty}, _small(origin)
    order = [*(k for k in origin.keep.get("order", ()) if k in schema or k in small), *(k for k in [*schema, *small] if k not in origin.keep.get("order", ()))]
    with ExitStack() as stack:
        if layout == "npz":
            how = zipfile.ZIP_DEFLATED if origin.keep.get("deflated", True) else zipfile.ZIP_STORED
            out = stack.enter_context(zipfile.ZipFile(path, "w", how))
        else:
            path.mkdir()
        for key in order:
            with out.open(f"{key}.npy", "w", force_zip64=True) if layout == "npz" else open(inside(path, f"{key}.npy"), "wb") as f:
                if key in small:
                    npy.write_array(f, small[key], allow_pickle=False)
                    continue
                shape, dtype = schema[key]
                npy.write_array_header_2_0(f, {"shape": (store.steps, *shape), "fortran_order": False, "descr": npy.dtype_to_descr(dtype)})
                for episode in _one_key(origin, key):
                    f.write(episode.tobytes())
    return origin.notes


def _one_key(origin: Origin, key: str) -> Iterator[np.ndarray]:
    for stored in [s for s, name in origin.names.items() if name == key]:  # none for a key of no channels
        for i in range(origin.store.episodes):
            yield origin.store.read(stored, *origin.store.span(i)).astype(origin.schema[key][1], copy=False)


def _small(origin: Origin) -> dict[str, np.ndarray]:
    """The arrays that are not one row a step: how episodes are cut, what belongs to each, and the rest."""
    keep, store = origin.keep, origin.store
    out = dict(keep.get("arrays", {}))
    for key, (dtype, shape) in keep.get("per_episode", {}).items():
        rows = [origin.of_episode(i).get(key) for i in range(store.episodes)]
        if any(r is None for r in rows):
            origin.notes.append(f"{key} had one row an episode, and some episodes were changed since: it is not written back")
        else:
            out[key] = np.array(rows, dtype).reshape(len(rows), *shape)
    cut = keep.get("cut", {"kind": "ends", "key": "episode_ends", "dtype": "<i8"})
    if cut["kind"] == "ends":
        out[cut["key"]] = store.episode_ends.astype(cut["dtype"])
    elif cut["kind"] == "lengths":
        out[cut["key"]] = np.diff(store.episode_ends, prepend=0).astype(cut["dtype"])
    return out if origin.came else {**out, NAME: np.array(dump(origin))}


def _each_an_episode(path: Path, files: list[Path]) -> Source:
    first: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    each, order, deflated, left = [], list[str](), False, set[str]()
    for file in files:
        with _Arrays(file) as arrays:
            n = _steps(arrays.heads, file)
            frames = {k: (shape[1:], dtype) for k, (shape, dtype) in arrays.heads.items() if shape[:1] == (n,)}
            each.append({"__file__": file.name, **{k: arrays.whole(k) for k in arrays.heads if k not in frames}})
            left |= {k for k in arrays.heads if k not in frames}
        if not first:
            first, order, deflated = frames, list(arrays.heads), arrays.deflated
        if frames != first:
            other = sorted({*frames.items()} ^ {*first.items()})[0][0]
            raise DataError(f"{file} differs from {files[0].name} in {other!r} ({_told(frames, other)}, {_told(first, other)}). "
                            "The files of a folder are episodes of one dataset: convert others alone")
    keep = {"layout": "files", "order": order, "deflated": deflated, "episodes": each}
    notes = [f"not one row a step, so kept but no keys: {', '.join(sorted(left))}"] if left else []
    return Source(path, "npz", first, lambda: (_whole_file(file, first) for file in files), len(files), action=_action(first), keep=keep, notes=notes)


def _whole_file(file: Path, schema: Mapping[str, Any]) -> Episode:
    with _Arrays(file) as arrays:
        return {k: arrays.whole(k) for k in schema}


def _cut_out(path: Path, schema: Mapping[str, Any], ends: np.ndarray) -> Iterator[Episode]:
    with _Arrays(path) as arrays:
        rows = {k: arrays.rows(k) for k in schema}
        for n in np.diff(ends, prepend=0).tolist():
            yield {k: take(n) for k, take in rows.items()}


def _cut(arrays: "_Arrays") -> tuple[int, np.ndarray, dict[str, Any], list[str]]:
    """Steps in all, ends of the episodes (E,), how that is told, and what to say about it."""
    heads, where = arrays.heads, arrays.path
    for kind, known in (("ends", ENDS), ("lengths", LENGTHS)):
        key = next((k for k in known if k in heads and len(heads[k][0]) == 1 and heads[k][1].kind in "iu"), None)
        if key:
            told = arrays.whole(key)
            ends = told.astype(np.int64) if kind == "ends" else np.cumsum(told, dtype=np.int64)
            if not len(ends) or (np.diff(ends, prepend=0) <= 0).any() or not any(shape[:1] == (ends[-1],) for shape, _ in heads.values()):
                raise DataError(f"{where}: {key} does not cut its arrays, of {sorted({s[0] for s, _ in heads.values() if s})} rows, into episodes: "
                                f"{told[:5]} … {told[-1:]}. Ends are cumulative and the last is the number of steps; lengths add up to it")
            return int(ends[-1]), ends, {"kind": kind, "key": key, "dtype": told.dtype.str}, []
    n = _steps(heads, where)
    flags = [k for k in FLAGS if k in heads and heads[k][0] in ((n,), (n, 1))]
    over = np.zeros(n, bool)
    for k in flags:
        over |= arrays.whole(k).reshape(n).astype(bool)
    ends = np.flatnonzero(over) + 1
    note = [] if flags else [f"no array tells the episodes apart (looked for {', '.join((*ENDS[:1], *LENGTHS[:1], *FLAGS[:4]))}), so all {n} steps are one"]
    if flags and (not len(ends) or ends[-1] != n):
        note = [f"the last {n - (ends[-1] if len(ends) else 0)} steps have no {' or '.join(flags)} at their end and are an episode too"]
    return n, np.append(ends, n) if not len(ends) or ends[-1] != n else ends, {"kind": "flags"}, note


def _steps(heads: Mapping[str, tuple[tuple[int, ...], np.dtype]], where: Path) -> int:
    """Rows of the actions, or what most arrays have."""
    action = _action(heads)
    if action and heads[action][0]:
        return heads[action][0][0]
    rows = Counter(shape[0] for shape, _ in heads.values() if shape)
    if not rows:
        raise DataError(f"{where} holds no array with a row for each step")
    return max(rows, key=lambda n: (rows[n], n))


def _action(names: Mapping[str, Any]) -> str | None:
    return next((k for k in ACTIONS if k in names), None)


def _kept(whole: Mapping[str, np.ndarray]) -> list[str]:
    names = [k for k in whole if k != NAME]
    return [f"not one row a step, so kept but no keys: {', '.join(names)}"] if names else []


def _text(arrays: "_Arrays") -> Any:
    """Of the array called dipole, see own.py; None where there is none."""
    shape, dtype = arrays.heads.get(NAME, ((), np.dtype(bool)))
    return None if NAME not in arrays.heads else arrays.whole(NAME)[()].item() if not shape and dtype.kind == "U" else ""


def _told(schema: Mapping[str, Any], key: str) -> str:
    return f"{schema[key][0]} {schema[key][1]}" if key in schema else "missing"


def natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


class _Arrays:
    """The arrays of an .npz or of a folder of .npy: heads {name: (shape, dtype)}, read whole or some rows at a time."""

    def __init__(self, path: Path):
        self.path, self.deflated = path, False
        self._stack = ExitStack()
        try:
            self._zip = self._stack.enter_context(zipfile.ZipFile(path)) if path.is_file() else None
        except DAMAGED as e:
            raise DataError(f"{path} is not a readable .npz ({e}). If it was downloaded, download it again") from e
        names = [n for n in self._zip.namelist() if n.endswith(".npy")] if self._zip else sorted(p.name for p in path.glob("*.npy"))
        self.deflated = bool(self._zip and any(i.compress_type for i in self._zip.infolist()))
        self.heads, self._fortran = {}, set()
        for name in names:
            with self._intact(name), self._open(name) as f:
                shape, fortran, dtype = self._head(f, name)
            self.heads[name.removesuffix(".npy")] = (shape, dtype)
            if fortran and len(shape) > 1:
                self._fortran.add(name.removesuffix(".npy"))

    def __enter__(self) -> "_Arrays":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def whole(self, key: str) -> np.ndarray:
        with self._intact(key), self._open(f"{key}.npy") as f:
            return npy.read_array(f, allow_pickle=False)

    @contextmanager
    def _intact(self, key: str) -> Iterator[None]:
        """Bytes that are not those written show at the first read or at the last, which compares a checksum."""
        try:
            yield
        except DAMAGED as e:
            if isinstance(e, DataError):
                raise
            raise DataError(f"{self.path}: {key} cannot be read ({e}). The file is damaged or truncated: copy it again from its source") from e

    def rows(self, key: str):
        """A function: the next n rows -> (n, *shape)."""
        shape, dtype = self.heads[key]
        if key in self._fortran or not (size := int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize):  # columns first: nothing to stream
            x = iter(self.whole(key))
            return lambda n: np.stack([next(x) for _ in range(n)]) if n else np.zeros((0, *shape[1:]), dtype)
        with self._intact(key):
            f = self._stack.enter_context(self._open(f"{key}.npy"))
            self._head(f, key)

        def take(n: int) -> np.ndarray:
            with self._intact(key):
                data = f.read(n * size)
            if len(data) != n * size:
                raise DataError(f"{self.path}: {key} ends early. The file is truncated: copy it again from its source")
            return np.frombuffer(data, dtype).reshape(n, *shape[1:])
        return take

    def _open(self, name: str) -> IO[bytes]:
        return self._zip.open(name) if self._zip else open(self.path / name, "rb")

    def _head(self, f: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = npy.read_magic(f)
            shape, fortran, dtype = npy.read_array_header_1_0(f) if version == (1, 0) else npy.read_array_header_2_0(f)
        except ValueError as e:
            raise DataError(f"{self.path}: {name} is not a numpy array ({e})") from e
        if dtype.hasobject:
            raise DataError(f"{self.path}: {name} holds pickled Python objects, and unpickling runs whatever program they hold, so dipole does not. "
                            "Load it where you trust it, and save its numbers as arrays (np.stack, np.concatenate)")
        return shape, fortran, dtype

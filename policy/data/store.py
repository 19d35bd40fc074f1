"""Episodes in zarr, the layout the field uses: data/<key> (N, *shape) frame after frame, meta/episode_ends (E,) cumulative.

Reads zarr v2 and v3, directory or .zip. Writes v3, chunked for random windows and sharded so that an hour of video is not a million files.

A recorder may be killed at any moment. zarr replaces each file atomically (temporary file, then rename), and an episode's frames are
written before its end, so a frame beyond the last end belongs to an episode that never finished: it is invisible, and the next append
overwrites it. Growing episode_ends and writing the new value are two files; in between the new entry reads 0, which no episode can end
at, so trailing zeros are ignored. One process writes at a time. (Power loss is another matter: nothing here calls fsync.)
"""
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import DTypeLike

from policy.data.files import DataError, Files, read_rows
from policy.data.making import ENDS, hold, make
from policy.data.semantics import Semantics, described
from policy.data.video import PARTIAL, Video, settings

BLOCK_BYTES = 2**26  # whole keys are walked this much at a time
Schema = dict[str, tuple[tuple[int, ...], np.dtype]]


class Store:
    """One dataset. `Store.create` makes it, `Store.open` finds it; `append` records, `read` and `episode` give numpy arrays back.

    fps [1/s], units {key: text}, action_semantics (a sentence, or Semantics or its fields, kept as `action`) and anything else are attributes.
    Frames are counted over the whole dataset: episode i is [episode_ends[i-1], episode_ends[i]).
    """

    def __init__(self, files: Files, *, fill_missing: bool):
        """Use Store.open or Store.create."""
        self._files, self._fill_missing = files, fill_missing
        self.attrs = files.attrs()
        arrays: dict[str, zarr.Array | Video] = {key: files.array(f"data/{key}") for key in files.data_keys()}
        videos = {key: Video(files, key, about, self.attrs["fps"]) for key, about in (self.attrs.get("video") or {}).items()}
        self._arrays = dict(sorted({**arrays, **videos}.items()))
        if not self._arrays:
            raise DataError(f"{files.path}: there is nothing under data/. A dataset has data/<key> (N, …) for each observation and action")
        self._ends, self._pending = _committed_ends(files), 0  # frames written behind the last episode's end
        self._check()

    @classmethod
    def create(cls, path: Path | str, schema: Mapping[str, tuple[Sequence[int], DTypeLike]], *, fps: float,
               units: Mapping[str, str] | None = None, action_semantics: str | Semantics | Mapping | None = None, attrs: Mapping | None = None,
               video: Sequence[str] | Mapping[str, Mapping[str, int]] = ()) -> "Store":
        """Make an empty dataset, open for appending.   schema: {key: (shape of one frame, dtype)}.   DataError when path is taken.

        video: keys of camera images that are kept as mp4 (policy.data.video), smaller by far and not bit for bit; {key: {gop, crf}} says how.
        """
        path, videos = Path(path), settings(path, schema, video)
        make(path, schema, {"fps": float(fps), "units": dict(units or {}), **described(action_semantics, attrs, schema)}, videos)
        return cls.open(path, mode="a")

    @classmethod
    def open(cls, path: Path | str, mode: str = "r", *, missing: str = "error") -> "Store":
        """mode "r" reads the complete episodes (at least one), "a" also appends (zarr v3 directories).

        missing: "error" refuses a chunk file that is not there; "zeros" reads it as zarr does, for writers that leave out chunks of zeros.
        """
        if mode not in ("r", "a") or missing not in ("error", "zeros"):
            raise ValueError(f"missing={missing!r} is unknown; use error or zeros" if mode in ("r", "a") else f"mode is 'r' or 'a', got {mode!r}")
        files = Files(path, writable=mode == "a")
        if files.writable and (lock := hold(files.path)) is not None:  # what a live recorder is writing is no stray
            os.close(lock)
            for stray in [*files.path.rglob("*.partial"), *files.path.rglob(f"*{PARTIAL}")]:  # a killed write leaves its temporary file behind
                stray.unlink(missing_ok=True)
        store = cls(files, fill_missing=missing == "zeros")
        if mode == "r" and not store.episodes:
            raise DataError(f"{path}: {ENDS} holds no complete episode. Record one, or copy the dataset again if it had some")
        return store

    # ------------------------------------------------------------ what is in it
    @property
    def path(self) -> Path:
        return self._files.path

    @property
    def format(self) -> int:
        """zarr format, 2 or 3."""
        return self._files.format

    @property
    def keys(self) -> list[str]:
        return list(self._arrays)

    @property
    def schema(self) -> Schema:
        """{key: (shape of one frame, dtype)}"""
        return {key: (a.shape[1:], a.dtype) for key, a in self._arrays.items()}

    @property
    def episode_ends(self) -> np.ndarray:
        """(E,) int64, cumulative and strictly increasing."""
        return self._ends.copy()

    @property
    def episodes(self) -> int:
        return len(self._ends)

    @property
    def steps(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def fps(self) -> float | None:
        """Control rate [1/s], None where the dataset does not say."""
        return self.attrs.get("fps")

    @property
    def units(self) -> dict[str, str]:
        return self.attrs.get("units") or {}

    @property
    def action_semantics(self) -> str | None:
        return self.attrs.get("action_semantics")

    @property
    def local(self) -> bool:
        """Whether it lies here and not behind a URL."""
        return self._files.local

    def chunk(self, key: str) -> int:
        """Frames that are decoded together."""
        return self._array(key).chunks[0]

    def disk_bytes(self, key: str) -> int:
        """Bytes that key takes on disk."""
        return self._files.disk_bytes(f"{'video' if isinstance(self._array(key), Video) else 'data'}/{key}")

    # ------------------------------------------------------------ reading
    def read(self, key: str, lo: int = 0, hi: int | None = None, *, out: np.ndarray | None = None) -> np.ndarray:
        """Frames [lo, hi) of key -> (hi - lo, *shape), put into out when given.   KeyError lists the keys; DataError names a missing or damaged file."""
        hi = self.steps if hi is None else hi
        if not 0 <= lo <= hi <= self.steps:
            raise IndexError(f"frames [{lo}, {hi}) of {key!r}: {self.path} has {self.steps} frames")
        if isinstance(array := self._array(key), Video):
            return array.read(lo, hi, self.steps, self._where, out)
        return read_rows(self._files, array, f"data/{key}", lo, hi, fill_missing=self._fill_missing, holding=self._where, out=out)

    def span(self, i: int) -> tuple[int, int]:
        """First frame and end frame of episode i."""
        if not 0 <= i < self.episodes:
            raise IndexError(f"episode {i}: {self.path} has {self.episodes} episodes")
        return int(self._ends[i - 1]) if i else 0, int(self._ends[i])

    def episode(self, i: int) -> dict[str, np.ndarray]:
        """{key: (steps of episode i, *shape)}"""
        return {key: self.read(key, *self.span(i)) for key in self._arrays}

    # ------------------------------------------------------------ writing
    def append(self, episode: Mapping[str, np.ndarray]) -> None:
        """Add one episode {key: (n, *shape)}, safe against being killed.   DataError when keys, shapes or dtypes do not fit."""
        self.extend([episode])

    def extend(self, episodes: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Add several episodes in one write per key: about as fast for 50 as `append` is for one."""
        episodes = [self._checked(e, self.episodes + i) for i, e in enumerate(episodes)]
        if not episodes:
            return
        self._writing()
        if self._pending:
            raise DataError(f"{self.path}: an episode of {self._pending} frames is being written. commit() or discard() it first")
        try:
            ends = np.cumsum([len(next(iter(e.values()))) for e in episodes])
            self._put({key: np.concatenate([e[key] for e in episodes]) for key in self._arrays}, ends[:-1].tolist())
            self._commit(np.concatenate([self._ends, self.steps + ends]))
        finally:
            self._pending = 0

    def write(self, frames: Mapping[str, np.ndarray]) -> None:
        """Put down the next frames {key: (n, *shape)} of an episode that goes on: invisible until `commit`. Long episodes need no memory so."""
        self._writing()
        self._put(self._checked(frames, self.episodes))

    def commit(self) -> None:
        """The frames written since the last episode are one now. DataError when there are none."""
        if not self._pending:
            raise DataError(f"{self.path}: an episode needs at least one frame, none was written")
        self._writing()
        self._commit(np.append(self._ends, self.steps + self._pending))
        self._pending = 0

    def discard(self) -> None:
        """Forget the frames written since the last episode."""
        self._pending = 0

    def _put(self, frames: Mapping[str, np.ndarray], cuts: Sequence[int] = ()) -> None:
        """cuts: where another episode begins."""
        lo = self.steps + self._pending
        n = len(next(iter(frames.values())))
        for key, array in self._arrays.items():
            if isinstance(array, Video):
                for a, b in zip([0, *cuts], [*cuts, n], strict=True):
                    array.put(lo + a, frames[key][a:b])
                continue
            array.resize((lo + n, *array.shape[1:]))
            array[lo:] = frames[key]
        self._pending += n

    def _writing(self) -> None:
        if not self._files.writable:
            raise DataError(f"{self.path} is open for reading. Store.open(path, mode='a') appends")
        if len(on_disk := _committed_ends(self._files)) != self.episodes:
            raise DataError(f"{self.path} has {len(on_disk)} episodes on disk, this writer knows {self.episodes}: another process "
                            "writes to it. Stop that one, or record into separate datasets")

    def _commit(self, ends: np.ndarray) -> None:
        """Make episodes visible: one file per step, the first entry of a new file alone, so that a kill never looks like a lost file."""
        array, done = self._files.array(ENDS), self.episodes
        chunk = array.chunks[0]
        while done < len(ends):
            stop = min(len(ends), (done // chunk + 1) * chunk) if done % chunk else done + 1
            array.resize((stop,))
            array[done:stop] = ends[done:stop]
            done = stop
            self._ends = ends[:done].copy()

    # ------------------------------------------------------------ checks
    def _array(self, key: str) -> zarr.Array | Video:
        if key not in self._arrays:
            raise KeyError(f"{key!r} is not in {self.path} (known: {', '.join(self._arrays)})")
        return self._arrays[key]

    def _where(self, lo: int, hi: int) -> str:
        """The episodes that frames [lo, hi) belong to, in words."""
        hi = min(hi, self.steps)
        first, last = np.searchsorted(self._ends, [lo, hi - 1], side="right")
        return f"frames {lo} to {hi - 1} of " + (f"episode {first}" if first == last else f"episodes {first} to {last}")

    def _check(self) -> None:
        ends, path = self._ends, self.path
        if len(ends) and (ends[0] <= 0 or (np.diff(ends) <= 0).any()):
            i = 0 if ends[0] <= 0 else int(np.argmax(np.diff(ends) <= 0)) + 1
            after = f" after {ends[i - 1]}" if i else ""
            raise DataError(f"{path}: {ENDS} must be positive and strictly increasing, but entry {i} is {ends[i]}{after}. "
                            "It holds cumulative frame counts, not lengths: write np.cumsum(lengths)")
        for key, array in self._arrays.items():
            if isinstance(array, Video):
                continue
            if array.ndim < 1 or array.shape[0] < self.steps:
                raise DataError(f"{path}: data/{key} has {array.shape[0] if array.ndim else 'no'} frames, but {ENDS} counts "
                                f"{self.steps}. Every key needs one row per frame: write the missing rows, or remove the key")

    def _checked(self, episode: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
        """The episode in the store's dtypes, or DataError."""
        if set(episode) != set(self._arrays):
            raise DataError(f"{self.path}: episode {i} has the keys {sorted(episode)}, the dataset has {sorted(self._arrays)}. "
                            "They must be the same")
        out, lengths = {}, {}
        for key, (shape, dtype) in self.schema.items():
            x = np.asarray(episode[key])
            if x.shape[1:] != shape or x.ndim != len(shape) + 1:
                raise DataError(f"{self.path}: {key!r} of episode {i} has shape {x.shape}, expected (n, {', '.join(map(str, shape))}): "
                                "n frames of the shape the dataset was created with")
            if not np.can_cast(x.dtype, dtype, "same_kind"):
                raise DataError(f"{self.path}: {key!r} of episode {i} is {x.dtype}, which does not fit {dtype}. Convert it first")
            out[key], lengths[key] = x.astype(dtype, copy=False), len(x)
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise DataError(f"{self.path}: episode {i} needs the same number of frames (at least 1) in every key, got {lengths}")
        return out


def _committed_ends(files: Files) -> np.ndarray:
    """meta/episode_ends (E,) int64 without the trailing zeros of an episode that was never finished."""
    array = files.array(ENDS)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{files.path}: {ENDS} must be one row of integers, got {array.dtype} {array.shape}. "
                        "Write np.cumsum(lengths) as int64")
    n, chunk = array.shape[0], (array.shards or array.chunks)[0]
    for lo in range(0, n, chunk):
        file = f"{ENDS}/{array.metadata.encode_chunk_key((lo // chunk,))}"
        if not files.size(file) and min(n - lo, chunk) > 1:  # a single entry may be a first episode that was never finished
            raise DataError(f"{files.path}: {ENDS} lacks the file {file}, so its episodes cannot be told apart. Copy the dataset again")
    ends = read_rows(files, array, ENDS, 0, n, fill_missing=True, holding=lambda lo, hi: f"ends {lo} to {min(hi, n) - 1}").astype(np.int64)
    return ends[:len(np.trim_zeros(ends, "b"))]


def check_finite(store: Store, keys: Iterable[str] | None = None) -> None:
    """DataError naming key, episode and step of the first NaN or infinity in the float keys."""
    for key in store.keys if keys is None else keys:
        shape, dtype = store.schema.get(key) or store.read(key)  # read raises the KeyError that lists the keys
        block = max(1, BLOCK_BYTES // max(1, math.prod(shape) * dtype.itemsize))
        for lo in range(0, store.steps if dtype.kind == "f" else 0, block):
            refuse_not_finite(store, key, store.read(key, lo, min(lo + block, store.steps)), lo)


def refuse_not_finite(store: Store, key: str, values: np.ndarray, lo: int) -> None:
    """DataError when values (n, *shape), the frames of key from frame lo on, hold a NaN or infinity."""
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if bad.any():
        frame = lo + int(bad.argmax())
        i = int(np.searchsorted(store.episode_ends, frame, side="right"))
        raise DataError(f"{store.path}: {key!r} is not finite at step {frame - store.span(i)[0]} of episode {i} "
                        f"(frame {frame}, {bad.sum()} such frames read). Find out why the recorder wrote NaN or "
                        "infinity, and drop or repair that episode")

"""Episodes recorded as they happen, by whatever acts: a deployed policy, a teleoperator, an expert.

The loop that acts never waits for the disk: `add` copies the frame and returns, a thread writes. Whoever is killed at any moment leaves every
episode whose `end` returned, and at most the running one is lost (policy.data.store says why).
"""
import os
import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from policy.data.semantics import Semantics
from policy.data.store import DataError, Store, hold

Frame = Mapping[str, Any]
BLOCK_BYTES = 2**23  # written at once: about two shards of each key
STAMPS = 2**24 * 1e-3  # s: from here on float32 cannot tell stamps apart that are 1 ms from one another
WAIT = 0.25  # s between two looks whether the thread still lives


class Recorder:
    """Appends to the dataset at path, made with the first frame when there is none; goes on behind its last episode otherwise.

        with Recorder("demos/mine.zarr", fps=20, units={"q": "rad"}, action_semantics={"kind": "absolute", "space": "joint", "of": "q"}) as recorder:
            for each episode:
                for each control step:
                    recorder.add({"q": q, "action": action})   # what was seen, and what was done about it
                recorder.end()                                 # or recorder.cancel()

    NaN and infinity are recorded as they are, for an episode is worth more than a frame: dipole data validate finds them, and training refuses them.
    action_semantics: what validation and transforms read, the fields of policy.data.semantics.Semantics; a sentence is for people alone.
    schema: {key: (shape of one frame, dtype)}; that of the first frame when absent, Python numbers and float64 as float32, but for values beyond
    STAMPS in that frame, which are taken for time stamps (time.time()) and stay float64.
    memory: bytes that may wait for the disk; add raises DataError beyond them, and the episode is lost.
    attrs: more of the store's attributes, such as task, action and obs.   ValueError when fps or keys are not the dataset's.
    """

    def __init__(self, path: Path | str, *, fps: float, schema: Mapping[str, tuple[Sequence[int], DTypeLike]] | None = None,
                 units: Mapping[str, str] | None = None, action_semantics: str | Semantics | Mapping[str, Any] | None = None,
                 attrs: Mapping[str, Any] | None = None, memory: int = 2**28):
        self.path, self.fps, self.memory = Path(path), float(fps), memory
        meant = Semantics.from_json(action_semantics) if isinstance(action_semantics, Mapping) else action_semantics
        self._facts: dict[str, Any] = {"units": units, "action_semantics": meant, "attrs": attrs}
        self._schema = {key: (tuple(shape), np.dtype(dtype)) for key, (shape, dtype) in schema.items()} if schema is not None else None
        self._store = self._opened() if self.path.exists() else None
        self._lock = self._locked() if self._store is not None else None
        self._block: list[dict[str, np.ndarray]] = []
        self._bytes, self._waiting, self.frames, self._attempt = 0, 0, 0, 0  # of the block, handed to the thread, of the running episode; cancelled ones
        self._count = threading.Lock()
        self._todo: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()  # ("write", frames), or what to do then and whom to tell
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def episodes(self) -> int:
        """Complete ones in the dataset, those of before included."""
        return self._store.episodes if self._store is not None else 0

    def add(self, frame: Frame) -> None:
        """One control step {key: array of one frame}. DataError when keys, shapes or kinds of numbers are not those of the first."""
        self._still_open()
        self._complain()
        self._open(frame)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write, name=f"recorder of {self.path.name}", daemon=True)
            self._thread.start()
        taken = self._taken(frame)
        size = sum(x.nbytes for x in taken.values())
        if self._waiting + self._bytes + size > self.memory:
            frames = self.frames
            self.cancel()
            raise DataError(f"{self.path}: the disk is slower than the recording: more than {self.memory / 1e6:.0f} MB wait for it after {frames} frames. This "
                            "episode is lost, the ones before are kept. Record smaller images, or to a faster disk, or allow more memory=")
        self._block.append(taken)
        self._bytes, self.frames = self._bytes + size, self.frames + 1
        if self._bytes >= BLOCK_BYTES:
            self._hand_over()

    def end(self, *, wait: bool = True) -> None:
        """The frames added since the last end are an episode, on disk when this returns. DataError when there are none, or the disk refuses.

        wait: False returns at once, for a loop that must go on; what the disk refuses is then told by the next call.
        """
        self._still_open()
        self._complain()
        if not self.frames:
            raise DataError(f"{self.path}: an episode needs at least one frame, none was added")
        self._hand_over()
        self.frames = 0
        if not wait:
            self._todo.put(("commit", None))
            return
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._todo.put(("commit", done))
        if (error := self._answer(done)) is not None:
            self._error = None
            raise self._lost(error) from error

    def cancel(self) -> None:
        """Forget the frames added since the last end. Returns at once; nothing is left to forget once it is closed."""
        if self._closed:
            return
        self._block, self._bytes, self.frames = [], 0, 0
        self._attempt += 1  # what waits for the disk need not be written any more
        self._todo.put(("discard", None))

    def extend(self, episodes: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Whole ones {key: (n, *shape)} at once, several in about the time of one."""
        self._still_open()
        if self.frames:
            raise DataError(f"{self.path}: {self.frames} frames of another episode were added and not ended. end() or cancel() it first")
        ready = []
        for episode in episodes:
            if not (lengths := {key: len(x) for key, x in episode.items()}) or len(set(lengths.values())) != 1 or 0 in lengths.values():
                raise DataError(f"{self.path}: an episode needs the same number of frames (at least 1) in every key, got {lengths}")
            self._open({key: x[0] for key, x in episode.items()})
            ready.append({key: self._cast(key, x, (len(x), *self._schema_of(key)[0])) for key, x in episode.items()})
        if self._thread is not None:  # it may still be at what came before
            done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
            self._todo.put(("discard", done))
            self._answer(done)
            self._complain()
        if self._store is not None:
            self._store.extend(ready)

    def close(self) -> None:
        """Stop the thread when all is written; an episode that was not ended is forgotten, as if the process had died. Nothing can be added any more."""
        self._closed = True
        if self._thread is not None:
            self._todo.put(("stop", None))
            self._thread.join()
            self._thread = None
        self._block, self._bytes, self.frames = [], 0, 0
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        error, self._error = self._error, None
        if error is not None:
            raise self._lost(error) from error

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ the thread
    def _hand_over(self) -> None:
        if self._block:
            with self._count:
                self._waiting += self._bytes
            self._todo.put(("write", (self._attempt, self._block)))
            self._block, self._bytes = [], 0

    def _answer(self, done: queue.SimpleQueue[Exception | None]) -> Exception | None:
        """What the thread says when it is that far."""
        while True:
            try:
                return done.get(timeout=WAIT)
            except queue.Empty:
                if self._thread is None or not self._thread.is_alive():
                    return RuntimeError("the recording thread died: start a new Recorder")

    def _still_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.path}: this recorder is closed, and another may write there now. A new Recorder goes on behind the last episode")

    def _complain(self) -> None:
        if (error := self._error) is not None:
            self._error = None
            self.cancel()
            raise self._lost(error) from error

    def _lost(self, error: Exception) -> DataError:
        return DataError(f"{self.path}: an episode could not be written ({error}). It is lost, the ones before are kept")

    def _write(self) -> None:
        store = self._store
        assert store is not None
        failed: Exception | None = None
        while (job := self._todo.get())[0] != "stop":
            what, told = job
            attempt, frames = told if what == "write" else (0, [])
            try:
                if what == "write" and failed is None and attempt == self._attempt:
                    store.write({key: np.stack([frame[key] for frame in frames]) for key in frames[0]})
                elif what == "commit" and failed is None:
                    store.commit()
            except Exception as e:  # told to whoever records, by the next call
                failed = self._error = e
            if what == "write":
                with self._count:
                    self._waiting -= sum(x.nbytes for frame in frames for x in frame.values())
                continue
            if told is not None:
                told.put(failed)
            store.discard()
            failed = None

    # ------------------------------------------------------------ the dataset
    def _opened(self) -> Store:
        store = Store.open(self.path, mode="a")
        if store.fps is not None and abs(store.fps - self.fps) > 1e-9 * self.fps:
            raise ValueError(f"{self.path} was recorded at {store.fps:g} Hz and this is {self.fps:g} Hz: record to another path")
        if self._schema is not None and self._schema != store.schema:
            raise ValueError(f"{self.path} holds {_words(store.schema)}, and this records {_words(self._schema)}: record to another path")
        self._schema = store.schema
        return store

    def _open(self, frame: Frame) -> None:
        """Make the dataset for frames like this one, where there is none yet."""
        if self._store is not None:
            return
        if self._schema is None:
            self._schema = {key: (np.shape(x), _kept(np.asarray(x))) for key, x in frame.items()}
        if isinstance(said := (self._facts["attrs"] or {}).get("action"), Mapping) and (wrong := Semantics.from_json(said).misfit(self._schema)):
            raise ValueError(f"{self.path}: attribute action: {wrong}")
        self._store = Store.create(self.path, self._schema, fps=self.fps, **self._facts)
        self._lock = self._locked()

    def _locked(self) -> int:
        """One recorder at a time; the system lets go of a dead one's lock."""
        if (lock := hold(self.path)) is None:
            raise DataError(f"{self.path}: another recorder writes to it. Stop that one, or record to another path and merge them (dipole data merge)")
        return lock

    def _schema_of(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        assert self._schema is not None
        if key not in self._schema:
            raise DataError(f"{self.path}: {key!r} is none of its keys {sorted(self._schema)}: every frame has the same")
        return self._schema[key]

    def _taken(self, frame: Frame) -> dict[str, np.ndarray]:
        """Copies in the dataset's types."""
        taken = {key: self._cast(key, np.array(x), self._schema_of(key)[0]) for key, x in frame.items()}
        if len(taken) != len(self._schema or ()):
            raise DataError(f"{self.path}: a frame lacks {sorted(set(self._schema or ()) - set(taken))}: every frame has the same keys")
        return taken

    def _cast(self, key: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        dtype = self._schema_of(key)[1]
        if x.shape != shape:
            raise DataError(f"{self.path}: {key!r} has shape {x.shape}, the first frame had {self._schema_of(key)[0]}")
        if not np.can_cast(x.dtype, dtype, "same_kind"):
            raise DataError(f"{self.path}: {key!r} is {x.dtype}, which does not fit {dtype}. Convert it first")
        return x.astype(dtype, copy=False)


def _kept(x: np.ndarray) -> np.dtype:
    return np.dtype("float32") if x.dtype == np.float64 and not (np.abs(x) > STAMPS).any() else x.dtype


def _words(schema: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{key} {shape} {dtype}" for key, (shape, dtype) in sorted(schema.items()))

"""Datasets made from others: written beside their place and moved into it when complete, in bounded memory."""
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np

from policy.data.files import DataError, Url, where
from policy.data.store import Store

BATCH_BYTES = 2**26  # episodes are gathered up to this size and written together; one that is larger is written in pieces of it


def free(dst: Path | str, *sources: Path | str) -> Path:
    """dst, or DataError when something is there, or when it lies inside one of the sources."""
    dst = Path(dst)
    if dst.exists():
        raise DataError(f"{dst} exists and is not overwritten. Choose another dst=…, or remove it yourself")
    for source in (where(s) for s in sources):
        if not isinstance(source, Url) and dst.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{dst} lies inside {source}, which stays as it is. Choose a dst=… beside it")
    return dst


@contextmanager
def beside(dst: Path | str) -> Iterator[Path]:
    """`with beside(dst) as part`: what is made at part is moved to dst at the end; dst exists entirely or not at all, and is never overwritten.

    Ctrl-C and SIGTERM leave nothing; what a killed process left is removed by the next that makes the same dst.
    """
    dst = free(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    _sweep(dst)
    with _terminated():
        folder = Path(tempfile.mkdtemp(prefix=f"{_prefix(dst)}{os.getpid()}.", dir=dst.parent))
        try:
            yield folder / dst.name
            free(dst)  # made meanwhile; rename would replace a file
            (folder / dst.name).rename(dst)
        finally:
            _remove(folder)


def _prefix(dst: Path) -> str:
    """With the computer's name, for a folder that several share; the process follows."""
    return f".{dst.name}.{os.uname().nodename}-"


def _sweep(dst: Path) -> None:
    pattern = re.compile(rf"{re.escape(_prefix(dst))}(\d+)\.\w+")
    for path in list(dst.parent.iterdir()):
        if (made := pattern.fullmatch(path.name)) and not _alive(int(made[1])):
            _remove(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(folder: Path) -> None:
    for _ in range(20):  # a thread of zarr's may be writing its last file there
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM inside is a SystemExit, so that what is half made is removed; a second one waits for that."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Filler:
    """Adds whole episodes to a store, several at a time.   `add` them, then `flush`."""

    def __init__(self, store: Store):
        self.store, self._batch, self._bytes = store, list[Mapping[str, np.ndarray]](), 0

    @property
    def steps(self) -> int:
        """With those that wait to be written."""
        return self.store.steps + sum(len(next(iter(e.values()))) for e in self._batch)

    def add(self, episode: Mapping[str, np.ndarray]) -> None:
        size, n = sum(x.nbytes for x in episode.values()), len(next(iter(episode.values())))
        if size > BATCH_BYTES:
            self.flush()
            block = max(1, n * BATCH_BYTES // size)
            for lo in range(0, n, block):
                self.store.write({k: x[lo:lo + block] for k, x in episode.items()})
            return self.store.commit()
        self._batch.append(episode)
        self._bytes += size
        if self._bytes >= BATCH_BYTES:
            self.flush()

    def copy(self, source: Store, lo: int, hi: int, keys: Mapping[str, str] | None = None) -> None:
        """One episode: frames [lo, hi) of source.   keys {there: here}, all by default."""
        keys = keys or {k: k for k in source.keys}
        frame = sum(source.schema[k][1].itemsize * int(np.prod(source.schema[k][0])) for k in keys)
        block = max(1, BATCH_BYTES // max(1, frame))
        if hi - lo <= block:
            return self.add({here: source.read(k, lo, hi) for k, here in keys.items()})
        self.flush()
        for at in range(lo, hi, block):
            self.store.write({here: source.read(k, at, min(at + block, hi)) for k, here in keys.items()})
        self.store.commit()

    def flush(self) -> None:
        self.store.extend(self._batch)
        self._batch, self._bytes = [], 0

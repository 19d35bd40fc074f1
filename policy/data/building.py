"""Datasets made from others: written beside their place and moved into it when complete, in bounded memory."""
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.files import DataError
from policy.data.store import Store

BATCH_BYTES = 2**26  # episodes are gathered up to this size and written together; one that is larger is written in pieces of it


def free(dst: Path | str) -> Path:
    """dst, or DataError when something is there."""
    if Path(dst).exists():
        raise DataError(f"{dst} exists and is not overwritten. Choose another dst=…, or remove it yourself")
    return Path(dst)


class beside:
    """`with beside(dst) as part`: what is made at part is moved to dst at the end; dst exists entirely or not at all, and is never overwritten."""

    def __init__(self, dst: Path | str):
        self.dst = free(dst)

    def __enter__(self) -> Path:
        self.dst.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.dst.name}.", dir=self.dst.parent))
        return self.folder / self.dst.name

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                free(self.dst)  # made meanwhile; rename would replace a file
                (self.folder / self.dst.name).rename(self.dst)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


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

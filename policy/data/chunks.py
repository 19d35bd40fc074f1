"""Frames decoded straight from a chunk file, eight times as fast as through zarr, and by as many threads as there are cores.

For arrays whose chunks hold whole frames in C order behind at most one compressor, which is how image datasets are written, sharded or not. Others are
zarr's to read (`Chunks.of` is None). Decompressors release the GIL.
"""
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from google_crc32c import value as crc32c
from numcodecs import GZip, Zlib, Zstd
from numcodecs.blosc import Blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata

from policy.data.places import Opened

ABSENT = 2**64 - 1
FAR = 2**16  # bytes nobody asked for that are read rather than making another request


class Damaged(ValueError):
    """What a file holds is not what was written: truncated, or bits have changed."""


@dataclass(frozen=True)
class Chunks:
    """How to decode an array.   steps: frames a chunk.   per_file: chunks a file, 1 without shards.   index: what follows a shard's index, bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype
    steps: int
    per_file: int
    codec: Any
    fill: Any
    crc: bool
    index_first: bool = False

    @classmethod
    def of(cls, array: zarr.Array) -> "Chunks | None":
        """None where zarr has to read."""
        meta, shape = array.metadata, array.shape[1:]
        if array.ndim < 1 or array.chunks[1:] != shape or math.prod(shape) == 0 or array.dtype.byteorder == ">" or array.dtype.hasobject:
            return None
        steps = array.chunks[0]
        if isinstance(meta, ArrayV2Metadata):
            known = not meta.filters and (meta.order == "C" or not shape) and isinstance(meta.compressor, Blosc | Zstd | GZip | Zlib | None)
            return cls(shape, array.dtype, steps, 1, meta.compressor, meta.fill_value, False) if known else None
        return cls._v3(meta, shape, array.dtype, steps) if isinstance(meta, ArrayV3Metadata) else None

    @classmethod
    def _v3(cls, meta: ArrayV3Metadata, shape: tuple[int, ...], dtype: np.dtype, steps: int) -> "Chunks | None":
        codecs, per_file, crc, first = tuple(meta.codecs), 1, False, False
        if len(codecs) == 1 and isinstance(shard := codecs[0], ShardingCodec):
            grid = meta.chunk_grid.chunk_shape  # type: ignore[attr-defined]
            index = tuple(shard.index_codecs)
            if tuple(grid[1:]) != shape or not index or not _plain(index[0]) or len(index) > 2 or not isinstance(index[-1], BytesCodec | Crc32cCodec):
                return None
            codecs, per_file, crc = tuple(shard.codecs), grid[0] // steps, len(index) == 2
            first = str(getattr(shard.index_location, "value", shard.index_location)) == "start"
        if len(codecs) > 2 or not codecs or not _plain(codecs[0]):
            return None
        codec = None
        if len(codecs) == 2:
            made = {ZstdCodec: Zstd, BloscCodec: Blosc, GzipCodec: GZip}.get(type(codecs[1]))
            if made is None:
                return None
            codec = made()
        return cls(shape, dtype, steps, per_file, codec, meta.fill_value, crc, first)

    @property
    def nbytes(self) -> int:
        """Of a decoded chunk."""
        return self.steps * math.prod(self.shape) * self.dtype.itemsize

    def read(self, file: Opened, which: Sequence[int]) -> Iterator[np.ndarray]:
        """Chunks `which` of a file, ascending -> each (steps, *shape).   Damaged says why one cannot be decoded."""
        if self.per_file == 1:
            yield self._decoded(_whole(file))
            return
        spans = self._spans(file, which)
        raw = _together(file, [s for s in spans if s is not None])
        for s in spans:
            yield np.full((self.steps, *self.shape), self.fill, self.dtype) if s is None else self._decoded(raw[s])

    def _spans(self, file: Opened, which: Sequence[int]) -> list[tuple[int, int] | None]:
        """Where the chunks lie in a shard, None for one that was left out because it is all fill value."""
        n = 16 * self.per_file + 4 * self.crc
        if file.size < n:
            raise Damaged(f"a shard of {file.size} bytes cannot hold its index of {n}")
        said = file.read(0, n) if self.index_first else file.read(file.size - n, file.size)
        if self.crc and crc32c(said[:-4]) != int.from_bytes(said[-4:], "little"):
            raise Damaged("the shard's index is not what was written")
        index = np.frombuffer(said[:16 * self.per_file], "<u8").reshape(-1, 2)[list(which)].tolist()
        if wrong := [(at, n) for at, n in index if at != ABSENT and at + n > file.size]:
            raise Damaged(f"a chunk should end at byte {sum(wrong[0])}")
        return [None if at == ABSENT else (at, at + n) for at, n in index]

    def _decoded(self, raw: bytes | memoryview) -> np.ndarray:
        # Blosc believes its header and reads past the end of a truncated chunk, into whatever memory comes next.
        if isinstance(self.codec, Blosc) and (len(raw) < 16 or int.from_bytes(raw[12:16], "little") != len(raw)):
            raise Damaged(f"Blosc announces {int.from_bytes(raw[12:16], 'little')} bytes, there are {len(raw)}")
        try:
            out = raw if self.codec is None else self.codec.decode(raw)
        except (RuntimeError, ValueError, OSError, EOFError, zlib.error) as e:
            raise Damaged(str(e)) from e
        if memoryview(out).nbytes != self.nbytes:
            raise Damaged(f"it decodes to {memoryview(out).nbytes} bytes instead of {self.nbytes}")
        return np.frombuffer(out, self.dtype).reshape(self.steps, *self.shape)


def _plain(codec: Any) -> bool:
    return isinstance(codec, BytesCodec) and str(getattr(codec.endian, "value", codec.endian)) in ("little", "None")


def _whole(file: Opened) -> bytes:
    try:
        data = file.read(0, file.size)
    except zipfile.BadZipFile as e:
        raise Damaged(str(e)) from e
    if len(data) != file.size:
        raise Damaged(f"it ends at byte {len(data)} of {file.size}")
    return data


def _together(file: Opened, spans: Sequence[tuple[int, int]]) -> dict[tuple[int, int], memoryview]:
    """The bytes of every span, spans that lie close to each other in one read."""
    out: dict[tuple[int, int], memoryview] = {}
    runs: list[list[tuple[int, int]]] = []
    for span in sorted(spans):
        if runs and span[0] - runs[-1][-1][1] <= FAR:
            runs[-1].append(span)
        else:
            runs.append([span])
    for run in runs:
        lo, hi = run[0][0], max(b for _, b in run)
        raw = memoryview(file.read(lo, hi))
        if len(raw) != hi - lo:
            raise Damaged(f"it ends at byte {lo + len(raw)}, a chunk should end at {hi}")
        out |= {(a, b): raw[a - lo:b - lo] for a, b in run}
    return out

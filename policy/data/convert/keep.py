"""What a dataset was before it became a store, kept in it as one compressed array `meta/source`: JSON whose arrays follow it as raw bytes.

An attribute would be parsed each time the store is opened; a robomimic file has an XML of 100 kB for every episode.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from policy.data.files import DataError, Files
from policy.data.store import Store

NAME = "meta/source"


def write_keep(path: Path | str, keep: Mapping[str, Any]) -> None:
    """Put keep, JSON and numpy arrays of numbers or text, into the store (a folder) at path; nothing when it is empty."""
    if not keep:
        return
    blob = np.frombuffer(dump(keep), np.uint8)
    array = zarr.open_group(path, mode="r+").create_array(NAME, shape=blob.shape, chunks=(max(1, len(blob)),), dtype="uint8",
                                                          compressors=ZstdCodec(level=3, checksum=True))
    array[:] = blob


def read_keep(store: Store) -> dict[str, Any]:
    """What write_keep put there, {} where there is nothing.   DataError when it is damaged."""
    files = Files(store.path)
    if not files.size(f"{NAME}/zarr.json"):
        return {}
    try:
        return load(np.asarray(files.array(NAME)[:]).tobytes())
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise DataError(f"{store.path}: {NAME}, what its source looked like, is damaged ({e}). Convert it again from its source; "
                        "the episodes themselves can still be read") from e


def dump(keep: Mapping[str, Any]) -> bytes:
    arrays: list[np.ndarray] = []
    head = json.dumps(_packed(keep, arrays)).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *(a.tobytes() for a in arrays)])


def load(blob: bytes) -> dict[str, Any]:
    n = int.from_bytes(blob[:8], "little") + 8
    return _unpacked(json.loads(blob[8:n]), blob, [n])


def _packed(x: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(x, np.ndarray | np.generic):
        a = np.asarray(x)
        if a.dtype.hasobject:
            raise DataError(f"an array of Python objects cannot be kept (shape {a.shape})")
        arrays.append(a)
        kind = a.dtype.descr if a.dtype.names else a.dtype.str
        return {"__array__": kind, "shape": list(a.shape), "scalar": isinstance(x, np.generic)}
    if isinstance(x, Mapping):
        return {str(k): _packed(v, arrays) for k, v in x.items()}
    return [_packed(v, arrays) for v in x] if isinstance(x, list | tuple) else x


def _unpacked(x: Any, blob: bytes, at: list[int]) -> Any:
    if isinstance(x, dict) and "__array__" in x:
        kind = x["__array__"]
        dtype = np.dtype(kind if isinstance(kind, str) else [tuple(tuple(p) if isinstance(p, list) else p for p in f) for f in kind])
        count = int(np.prod(x["shape"], dtype=np.int64))
        a = np.frombuffer(blob, dtype, count, at[0]).reshape(x["shape"]) if count else np.zeros(x["shape"], dtype)
        at[0] += a.nbytes
        return a[()] if x["scalar"] else a.copy()
    if isinstance(x, dict):
        return {k: _unpacked(v, blob, at) for k, v in x.items()}
    return [_unpacked(v, blob, at) for v in x] if isinstance(x, list) else x

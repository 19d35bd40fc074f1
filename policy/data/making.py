"""An empty dataset on disk, and who may record into it."""
import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore

from policy.data.files import DataError

ENDS = "meta/episode_ends"
CHUNK_BYTES, CHUNK_STEPS, CHUNKS_PER_SHARD = 2**18, 1024, 16  # a random window decodes one chunk; an append rewrites at most one shard
ENDS_CHUNK = 8192
# zstd 3 with checksums, which Blosc's codecs have none of: a flipped bit in a demonstration must not become a motion. Images, eight of 96 x 96 x 3 a chunk, by
# seconds of one core (`dipole bench data`): Push-T's 95 times smaller, decoded at 4.8 GB/s (zstd 1: 83 times, 4.5 GB/s; Blosc's zstd 5: 116 times, 7.6 GB/s);
# noisy ones 2.5 times smaller, written at 160, decoded at 680 MB/s (zstd 1: 2.1 times, 240 and 830 MB/s; Blosc's zstd 5: 2.7 times, 37 and 860 MB/s; its lz4:
# 1.2 times, 3.2 GB/s). Shuffling the bytes of uint8 changes nothing, shuffling bits makes Push-T's three times larger.
CODEC = ZstdCodec(level=3, checksum=True)


def make(path: Path, schema: Mapping[str, tuple[Sequence[int], DTypeLike]], attributes: Mapping[str, Any], video: Mapping[str, Any]) -> None:
    """Write it, entirely or not at all.   schema: {key: (shape of one frame, dtype)}.   video: keys of it without an array.   DataError: path is taken."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path} already holds data and is not overwritten. Append with Store.open(path, mode='a'), "
                        "choose another path, or remove it yourself")
    if not schema or not attributes["fps"] > 0:
        raise DataError(f"{path}: a dataset needs at least one key and fps > 0, got keys {list(schema)} and fps={attributes['fps']}")
    if bad := [key for key in schema if not key or "/" in key or key.startswith((".", "__"))]:
        raise DataError(f"{path}: {bad} cannot be keys, since each key is a folder name. Use letters, digits, _ and .")
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # beside its place, and renamed into it
    try:
        building.chmod(0o777 & ~_umask())
        attributes = {k: v for k, v in attributes.items() if k != "video"}  # those of another store may say how that one keeps its images
        root = zarr.create_group(LocalStore(building), zarr_format=3, attributes={**attributes, "video": dict(video)} if video else attributes)
        for key, (shape, dtype) in schema.items():
            if key in video:
                (building / "video" / key).mkdir(parents=True)
            else:
                _create_array(root, f"data/{key}", tuple(shape), np.dtype(dtype))
        root.create_array(ENDS, shape=(0,), chunks=(ENDS_CHUNK,), dtype="int64", fill_value=0)
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def hold(path: Path) -> int | None:
    """Keep recorders (policy.data.record) out of the dataset at path until the descriptor is closed or its process dies; None: there is one."""
    lock = os.open(path / ".recording", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _create_array(root: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    frame = max(1, math.prod(shape) * dtype.itemsize)
    steps = 2 ** min(int(math.log2(CHUNK_STEPS)), max(0, int(math.log2(max(1, CHUNK_BYTES // frame)))))
    root.create_array(name, shape=(0, *shape), chunks=(steps, *shape), shards=(steps * CHUNKS_PER_SHARD, *shape), dtype=dtype,
                      compressors=CODEC, fill_value=0)


def _umask() -> int:
    os.umask(now := os.umask(0))
    return now

"""What the data tests share: small datasets with known contents, as we and as others write them."""
import shutil
import zipfile
from pathlib import Path

import numpy as np
import zarr

from policy.data import Store

LENGTHS = (7, 1, 30, 12)
SCHEMA = {"pose": ((3,), "float32"), "image": ((4, 5, 3), "uint8"), "reward": ((), "float64"), "action": ((2,), "float32")}


def make_episode(i: int, n: int, schema=SCHEMA) -> dict[str, np.ndarray]:
    """Episode i with n frames, the same every time it is asked for."""
    rng = np.random.default_rng([i, n])
    return {key: (rng.integers(0, 256, (n, *shape)) if np.dtype(dtype).kind == "u" else rng.normal(size=(n, *shape))).astype(dtype)
            for key, (shape, dtype) in schema.items()}


EPISODES = [make_episode(i, n) for i, n in enumerate(LENGTHS)]


def assert_same(store: Store, episodes) -> None:
    """Every bit of every episode."""
    assert store.episodes == len(episodes)
    for i, want in enumerate(episodes):
        assert_equal(store.episode(i), want)


def assert_equal(got, want) -> None:
    assert set(got) == set(want)
    for key in want:
        assert got[key].dtype == want[key].dtype
        np.testing.assert_array_equal(got[key], want[key])


def foreign(path: Path, zarr_format: int, episodes=EPISODES, chunk: int = 8, **how) -> Path:
    """A dataset as somebody else's script writes it: unsharded chunks, no attributes."""
    root = zarr.create_group(path, zarr_format=zarr_format)
    for key in episodes[0]:
        x = np.concatenate([e[key] for e in episodes])
        root.create_array(f"data/{key}", data=x, chunks=(chunk, *x.shape[1:]), config={"write_empty_chunks": True}, **how)
    root.create_array("meta/episode_ends", data=np.cumsum([len(e["action"]) for e in episodes]), chunks=(chunk,))
    return path


def zipped(path: Path) -> Path:
    out = path.with_name(path.name + ".zip")
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as z:
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            z.write(file, file.relative_to(path).as_posix())
    shutil.rmtree(path)
    return out

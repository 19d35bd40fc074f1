"""Arrays and HDF5 files whose bytes were changed: values, or one DataError that names the file."""
import h5py
import numpy as np
import pytest

from policy.data import DataError
from policy.data.convert import convert
from policy.data.convert.core import open_source

N = 40


def npz(path):
    x = np.sin(np.arange(N)[:, None] * 0.1 + np.arange(3))
    np.savez_compressed(path, observations=x, actions=x[:, :2], episode_ends=[15, N])
    return path


def plain(path):
    x = np.sin(np.arange(N)[:, None] * 0.1 + np.arange(3))
    np.savez(path, observations=x, actions=x[:, :2], episode_ends=[15, N])
    return path


def robomimic(path):
    with h5py.File(path, "w") as f:
        for i, n in enumerate((15, 25)):
            demo = f.create_group(f"data/demo_{i}")
            demo.create_dataset("actions", data=np.ones((n, 2)), compression="gzip", fletcher32=True)
            demo.create_dataset("obs/q", data=np.ones((n, 3)), compression="gzip", fletcher32=True)
            demo.attrs["num_samples"] = n
    return path


@pytest.mark.parametrize("make, name, form", [(npz, "a.npz", "npz"), (plain, "a.npz", "npz"), (robomimic, "a.hdf5", "robomimic")])
def test_damaged_bytes(tmp_path, make, name, form):
    raw, rng, refused = make(tmp_path / name).read_bytes(), np.random.default_rng(0), 0
    for k in range(150):
        bad = bytearray(raw)
        at = int(rng.integers(len(bad)))
        if k % 3:
            bad[at] ^= 1 << rng.integers(8)
        else:
            bad = bad[:at]
        (tmp_path / name).write_bytes(bad)
        try:
            for _ in open_source(tmp_path / name, form).episodes():
                pass
        except DataError as e:
            assert str(tmp_path) in str(e), (k, at)
            refused += 1
        except Exception as e:
            raise AssertionError(f"damage {k} at {at}") from e
    assert refused > 50


def test_a_flipped_byte_is_told_and_nothing_is_left(tmp_path):
    raw = bytearray(plain(tmp_path / "a.npz").read_bytes())
    raw[raw.index(b"actions.npy") + 400] ^= 8
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.npz: actions\.npy cannot be read \(Bad CRC-32.*copy it again"):
        convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=10)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]

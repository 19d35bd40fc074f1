"""numpy files of every layout come back bit for bit; what cannot be read safely is refused."""
import zipfile

import numpy as np
import pytest

from policy.data import DataError, Store
from policy.data.convert import convert, open_source

RNG = np.random.default_rng(5)
N = 10


def frames(n=N):
    return {"obs": RNG.normal(size=(n, 3)), "actions": RNG.normal(size=(n, 2)).astype(np.float32), "img": RNG.integers(0, 256, (n, 4, 4, 3), np.uint8),
            "big": RNG.normal(size=(n, 2)).astype(">f8"), "wide": np.asfortranarray(RNG.normal(size=(n, 5))), "flag": RNG.random(n) < 0.5,
            "none": np.zeros((n, 0)), "half": RNG.normal(size=n).astype(np.float16), "count": np.arange(n, dtype=np.int16)}


def assert_same_npz(a, b):
    with np.load(a, allow_pickle=False) as x, np.load(b, allow_pickle=False) as y:
        assert x.files == y.files
        for k in x.files:
            assert x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and x[k].tobytes() == y[k].tobytes(), k


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("cut, ends", [
    ({"episode_ends": np.array([4, 10], np.int32)}, [4, 10]), ({"episode_lengths": np.array([1, 9], np.uint16)}, [1, 10]),
    ({"terminals": np.isin(np.arange(N), [2, 9])}, [3, 10]), ({}, [10]),
    ({"done": np.isin(np.arange(N), [2]).astype(np.float32), "timeouts": np.isin(np.arange(N), [6])}, [3, 7, 10])],
    ids=["ends", "lengths", "terminals", "one", "dones and timeouts"])
def test_an_npz_comes_back(tmp_path, save, cut, ends):
    save(tmp_path / "a.npz", **frames(), **cut, name=np.array(["a", "längst"][:len(ends)]), scalar=np.float64(3), note=np.array("text"))
    done = convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=10)
    store = Store.open(done.path)
    assert store.episode_ends.tolist() == ends and store.schema["big"][1] == np.dtype("f8") and "none" not in store.keys
    assert any("kept but no keys: " in note and "scalar" in note for note in done.notes)
    back = convert(done.path, tmp_path / "b.npz").path
    assert_same_npz(tmp_path / "a.npz", back)
    with zipfile.ZipFile(back) as z:
        assert {i.compress_type for i in z.infolist()} == {zipfile.ZIP_DEFLATED if save is np.savez_compressed else zipfile.ZIP_STORED}


def test_a_folder_of_one_npz_an_episode_comes_back(tmp_path):
    (tmp_path / "demos").mkdir()
    lengths = {f"demo_{i}": 3 + i for i in range(12)}
    for name, n in lengths.items():
        np.savez(tmp_path / "demos" / f"{name}.npz", **frames(n), success=np.bool_(n % 2), goal=RNG.normal(size=2))
    done = convert(tmp_path / "demos", tmp_path / "a.zarr", fps=10)
    assert np.diff(Store.open(done.path).episode_ends, prepend=0).tolist() == list(lengths.values())  # demo_10 after demo_9
    back = convert(done.path, tmp_path / "back").path
    assert sorted(p.name for p in back.iterdir()) == sorted(f"{n}.npz" for n in lengths)
    for name in lengths:
        assert_same_npz(tmp_path / "demos" / f"{name}.npz", back / f"{name}.npz")


def test_a_folder_of_one_npy_a_key_comes_back(tmp_path):
    (tmp_path / "set").mkdir()
    content = {**frames(), "episode_ends": np.array([7, 10]), "seed": np.array([3, 4])}
    for key, x in content.items():
        np.save(tmp_path / "set" / f"{key}.npy", x)
    done = convert(tmp_path / "set", tmp_path / "a.zarr", fps=10)
    back = convert(done.path, tmp_path / "back").path
    assert sorted(p.stem for p in back.iterdir()) == sorted(content)
    for key, x in content.items():
        y = np.load(back / f"{key}.npy")
        assert y.dtype == x.dtype and y.tobytes() == x.tobytes() and y.shape == x.shape


def test_a_store_from_elsewhere_becomes_an_npz(dataset, tmp_path):
    store = Store.open(dataset)
    with np.load(convert(dataset, tmp_path / "a.npz", format="npz").path, allow_pickle=False) as x:
        assert x["episode_ends"].tolist() == [7, 8, 38, 50]
        for key in store.keys:
            np.testing.assert_array_equal(x[key], store.read(key))


@pytest.mark.parametrize("arrays, message", [
    ({"action": np.zeros((4, 2)), "x": np.array([{"a": 1}], object)}, r"x\.npy holds pickled Python objects.*unpickling runs.*np\.stack"),
    ({"action": np.zeros((4, 2)), "episode_ends": np.array([2, 5])}, r"episode_ends does not cut its arrays, of \[2, 4\] rows.*cumulative"),
    ({"action": np.zeros((4, 2)), "episode_ends": np.array([3, 1])}, r"episode_ends does not cut"),
    ({"action": np.zeros((4, 2)), "lengths": np.array([4, 0])}, "lengths does not cut"), ({"x": np.float64(1)}, "no array with a row for each step"),
])
def test_what_cannot_be_read_is_told(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=1)


def test_files_of_a_folder_are_episodes_of_one_dataset(tmp_path):
    np.savez(tmp_path / "ant.npz", action=np.zeros((4, 8)))
    np.savez(tmp_path / "hopper.npz", action=np.zeros((4, 3)))
    with pytest.raises(DataError, match=r"hopper.npz differs from ant.npz in 'action' \(\(3,\) float64, \(8,\) float64\).*convert others alone"):
        open_source(tmp_path)
    (tmp_path / "ant.npz").write_bytes((tmp_path / "ant.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="download it again"):
        open_source(tmp_path)


def test_a_truncated_array_in_a_whole_zip_is_told(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((100, 4)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z:
        z.writestr("action.npy", (tmp_path / "x.npy").read_bytes()[:-50])
    with pytest.raises(DataError, match="action ends early"):
        convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=1)

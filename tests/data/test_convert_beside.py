"""Arrays below obs/ that have no row a step, such as a camera's matrix: kept beside where that is plain or was said, else an error that says how."""
import json
import re

import h5py
import numpy as np
import pytest
from h5_same import assert_same_hdf5
from hydra import compose, initialize_config_module

from policy.data import DataError, Store
from policy.data.convert import convert
from scripts.settings import plain

RNG = np.random.default_rng(5)
FORMS = {"robomimic": "obs/camera/matrix", "aloha": "observations/camera/matrix"}


def made(form, path, lengths, rows):
    """Episodes of these lengths, with an array of rows(n) rows below the observations of each."""
    path.mkdir()
    key, action, state = FORMS[form], *(("actions", "obs/q") if form == "robomimic" else ("action", "observations/qpos"))
    for i, n in enumerate(lengths):
        with h5py.File(path / ("demo.hdf5" if form == "robomimic" else f"episode_{i}.hdf5"), "a") as f:
            group = f.require_group(f"data/demo_{i}") if form == "robomimic" else f
            group[action], group[state], group[key] = RNG.normal(size=(n, 2)), RNG.normal(size=(n, 3)), RNG.normal(size=(rows(n), 3))
            group[key].attrs["camera"] = "front"
            if form == "robomimic":
                f["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
    return path


def assert_comes_back(source, store, tmp_path):
    back = convert(store, tmp_path / "back").path
    for file in source.glob("*.hdf5"):
        assert_same_hdf5(file, back / file.name if back.is_dir() else back)


@pytest.mark.parametrize("form", FORMS)
def test_one_shape_in_episodes_of_different_lengths_is_kept_beside(tmp_path, form):
    source = made(form, tmp_path / "a", (3, 10, 2, 4), lambda n: 3)  # in the first it looks like a row a step, in the third like that and a last one
    done = convert(source, tmp_path / "a.zarr", fps=20)
    assert done.notes == (f"not one row a step, so kept but no keys: {FORMS[form]}",) and len(done.keys) == 2
    assert Store.open(done.path).episode_ends.tolist() == [3, 13, 15, 19]
    assert_comes_back(source, done.path, tmp_path)
    assert convert(source, tmp_path / "b.zarr", fps=20, skip=[FORMS[form]]).keys == done.keys  # to say it too is no slip


@pytest.mark.parametrize("lengths, rows", [((10, 10), lambda n: 3), ((10, 4), lambda n: n + 3), ((7,), lambda n: 5)], ids=["one length", "too many", "alone"])
@pytest.mark.parametrize("form", FORMS)
def test_others_are_errors_until_skipped_as_the_error_says(tmp_path, form, lengths, rows):
    source = made(form, tmp_path / "a", lengths, rows)
    with pytest.raises(DataError, match=rf"{FORMS[form]}' has {rows(lengths[0])} rows for {lengths[0]} steps.*Repair it, or remove it") as error:
        convert(source, tmp_path / "a.zarr", fps=20)
    typed = re.findall(r"'(skip=\[.*?\])' after dipole data convert", str(error.value))[0]
    with initialize_config_module("conf", version_base=None):
        said = {k: v for k, v in plain(compose("data_convert", [f"src={source}", "dst=b", "fps=20", typed])).items() if k not in ("src", "dst")}
    done = convert(source, tmp_path / "a.zarr", **said)
    assert done.notes == (f"not one row a step, so kept but no keys: {FORMS[form]}",) and len(done.keys) == 2
    assert_comes_back(source, done.path, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_one_that_fits_some_episodes_is_a_key_that_is_skipped(tmp_path, form):
    source = made(form, tmp_path / "a", (10, 4), lambda n: 10)  # as long as the longest: padded, not fixed
    with pytest.raises(DataError, match=rf"{FORMS[form]}' has 10 rows for 4 steps"):
        convert(source, tmp_path / "a.zarr", fps=20)
    done = convert(source, tmp_path / "a.zarr", fps=20, skip=["obs*matrix"])
    assert done.notes == (f"left out as asked: {FORMS[form]}",) and len(done.keys) == 2
    with pytest.raises(ValueError, match=r"skip: 'obs\*matrices' matches none of"):
        convert(source, tmp_path / "b.zarr", fps=20, skip=["obs*matrix", "obs*matrices"])


def test_d4rl(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        f["actions"], f["observations"], f["obs/matrix"] = RNG.normal(size=(14, 2)), RNG.normal(size=(14, 3)), np.eye(3)
        f["terminals"], f["timeouts"] = np.zeros(14, bool), np.isin(np.arange(14), [9, 13])
    with pytest.raises(DataError, match=r"'obs/matrix' has 3 rows for 14 steps.*'skip=\[obs/matrix\]' after dipole data convert"):
        convert(tmp_path / "a.hdf5", tmp_path / "a.zarr", fps=20)
    done = convert(tmp_path / "a.hdf5", tmp_path / "a.zarr", fps=20, skip=["obs/matrix"])
    assert done.notes == ("not one row a step, so kept but no keys: obs/matrix",)
    assert_same_hdf5(tmp_path / "a.hdf5", convert(done.path, tmp_path / "b.hdf5").path)

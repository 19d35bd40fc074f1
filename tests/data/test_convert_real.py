"""Every real dataset at hand converts, comes back bit for bit, and (slow) is validated and trains from the command line."""
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5_same import assert_same_hdf5
from real_sets import ARRAYS, BAXTER, OTHERS, PUSHT, ROBOSUITE, Real

from policy.data import Store
from policy.data.convert import convert
from policy.data.semantics import Semantics

pytestmark = pytest.mark.data


def named(real: Real) -> str:
    return real.path.split("/panda")[0].replace("/", "_").split(".npz")[0]


def converted(real: Real, tmp_path) -> tuple[Path, Store]:
    src = real.find()
    done = convert(src, tmp_path / "a.zarr", mapping=real.say)
    store = Store.open(done.path)
    assert (done.format, store.episodes, store.steps, tuple(sorted(store.attrs["obs"]))) == (real.format, real.episodes, real.steps, real.obs)
    return src, store


@pytest.mark.parametrize("real", ARRAYS, ids=named)
def test_arrays_come_back(real, tmp_path):
    src, store = converted(real, tmp_path)
    with np.load(src, allow_pickle=False) as x, np.load(convert(store.path, tmp_path / "b.npz").path, allow_pickle=False) as y:
        assert x.files == y.files
        for k in x.files:
            assert x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and x[k].tobytes() == y[k].tobytes(), k
        np.testing.assert_array_equal(store.read("action"), x["actions" if "actions" in x.files else "action"])


@pytest.mark.parametrize("real", ROBOSUITE, ids=named)
def test_robosuite_comes_back(real, tmp_path):
    src, store = converted(real, tmp_path)
    src = src / "demo.hdf5" if src.is_dir() else src
    assert_same_hdf5(src, convert(store.path, tmp_path / "b.hdf5").path)
    with h5py.File(src) as f:
        assert store.attrs["task"] == f["data"].attrs["env"] and store.fps == (100 if "0.3.0" in str(src) else 20)
        np.testing.assert_array_equal(store.read("states"), np.concatenate([f[f"data/demo_{i + 1}/states"] for i in range(store.episodes)]))


@pytest.mark.parametrize("fps", [20, 10])
@pytest.mark.parametrize("real", [r for r in ROBOSUITE if "0.3.0" in r.path], ids=named)
def test_robosuite_of_100_hz_lies_on_another_rate(real, fps, tmp_path):
    """States are numpy's interpolation at the new times; commanded velocities the latest one; targets the state one new step later."""
    store = Store.open(convert(real.find(), tmp_path / "a.zarr", mapping={**real.say, "fps": fps}).path)
    with h5py.File(real.find() / "demo.hdf5") as f:
        for i in range(store.episodes):
            demo, got = f[f"data/demo_{i + 1}"], store.episode(i)
            old = demo["states"][()]
            new = old[0, 0] + np.arange(len(got["states"])) / fps
            assert len(new) == int(np.floor((old[-1, 0] - old[0, 0]) * fps + 1e-3)) + 1
            np.testing.assert_allclose(got["states"][:, 0], new, atol=1e-9)
            np.testing.assert_allclose(got["states"][:, 5], np.interp(new, old[:, 0], old[:, 5]), atol=1e-12)
            if "Baxter" in real.path:
                later = np.minimum(np.arange(len(new)) + 1, len(new) - 1)
                np.testing.assert_array_equal(got["action"], got["states"][later][:, BAXTER["take"]])
            else:
                latest = [np.flatnonzero(old[:, 0] <= t + 1e-6)[-1] for t in new]
                np.testing.assert_array_equal(got["action"], np.concatenate([demo["joint_velocities"][()], demo["gripper_actuations"][()]], 1)[latest])


def test_the_baxters_next_joints_follow_its_joints(tmp_path):
    """Absolute joint targets made of states: what is commanded at one step is what is measured at the next."""
    real = next(r for r in ROBOSUITE if "Baxter" in r.path)
    store = converted(real, tmp_path)[1]
    meant = Semantics.from_json(store.attrs["action"])
    assert (meant.kind, meant.of, meant.of_take) == ("absolute", "states", tuple(BAXTER["take"]))
    for i in range(2):
        x = store.episode(i)
        np.testing.assert_array_equal(x["action"][:-1], x["states"][1:, BAXTER["take"]])


def shell(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "scripts.cli", *words], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout


def text(value) -> str:
    """A value as hydra's command line takes it."""
    return json.dumps(value).replace('"', "") if isinstance(value, dict | list) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize("real", [*ARRAYS, *ROBOSUITE, *OTHERS, PUSHT], ids=named)
def test_every_dataset_converts_validates_and_trains(real, tmp_path):
    src, store = real.find(), tmp_path / "a.zarr"
    said = shell("data", "convert", f"src={src}", f"dst={store}", *(f"{k}={text(v)}" for k, v in real.say.items()))
    assert f"{real.episodes} episode" in said.splitlines()[-1] and said.splitlines()[-1].endswith(f"-> {store}")
    assert "0 errors" in shell("data", "validate", f"path={store}")
    trained = shell("train", "recipe=own", f"data.path={store}", f"run={tmp_path / 'run'}", "train.steps=200", "train.log=50", "log.wandb=disabled",
                    "net.widths=[32,64]", "train.batch=32")
    assert "trained 200 steps" in trained
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < 0.9 * losses[0], losses

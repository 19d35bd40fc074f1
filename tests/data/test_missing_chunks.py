"""What zarr-python 3 writes by default, chunks of zeros left out: refused until missing=zeros is said, then read by every task of dipole data."""
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from hydra import compose, initialize_config_module

from policy.data import DataError, Store
from policy.data.convert import convert
from policy.data.edit import merge, split, trim
from policy.data.validate import validate
from scripts import data_info, data_stats, data_view
from scripts.data import TASKS

ENDS = [20, 45]
GRIP = np.r_[np.zeros(24), np.ones(21)].astype("float32")[:, None]


@pytest.fixture
def theirs(tmp_path) -> Path:
    """A gripper that is open in the whole first chunk and closed later: one file is missing between its neighbours."""
    root = zarr.create_group(tmp_path / "theirs.zarr")
    root.attrs.update(fps=10, action_semantics="position")
    x = np.sin(np.arange(45)[:, None] * 0.3 + np.arange(2)).astype("float32")
    for key, values in (("action", x), ("pose", x + 1), ("grip", GRIP)):
        root.create_array(f"data/{key}", shape=values.shape, chunks=(8, values.shape[1]), dtype="float32")[:] = values
    root.create_array("meta/episode_ends", data=np.array(ENDS))
    assert not (tmp_path / "theirs.zarr/data/grip/c/1").exists() and (tmp_path / "theirs.zarr/data/grip/c/3/0").exists()
    return tmp_path / "theirs.zarr"


def test_converted_edited_and_validated(theirs, tmp_path):
    assert [f.code for f in validate(theirs).findings if f.severity == "error"] == ["unreadable"]
    assert not [f for f in validate(theirs, missing="zeros").findings if f.code == "unreadable"]
    for i, make in enumerate((lambda to, **how: convert(theirs, to, format="store", **how), lambda to, **how: convert(theirs, to, format="npz", **how),
                              lambda to, **how: merge([theirs, theirs], to, **how), lambda to, **how: trim(theirs, to, **how))):
        make(to := tmp_path / f"made{i}", missing="zeros")
        got = np.load(to)["grip"] if to.is_file() else Store.open(to).read("grip")
        np.testing.assert_array_equal(got[:45], GRIP)
        with pytest.raises(DataError, match="missing=zeros after dipole data"):
            make(tmp_path / "refused")
    made = split(theirs, [tmp_path / "a.zarr", tmp_path / "b.zarr"], episodes=[[0], [1]], missing="zeros")
    np.testing.assert_array_equal(np.concatenate([s.read("grip") for s in made]), GRIP)


def test_a_foreign_zarr(theirs, tmp_path):
    del zarr.open_group(theirs, mode="r+").attrs["action_semantics"]
    with pytest.raises(DataError, match="missing=zeros"):
        convert(theirs, tmp_path / "a.zarr")
    np.testing.assert_array_equal(Store.open(convert(theirs, tmp_path / "a.zarr", missing="zeros").path).read("grip"), GRIP)


def test_every_task_has_the_setting(theirs, monkeypatch, tmp_path):
    with initialize_config_module("conf", version_base=None):
        assert all(compose(f"data_{task}").missing == "error" for task in TASKS) and compose("train").data.missing == "error"
        monkeypatch.chdir(tmp_path)
        for task, more in ((data_info, ()), (data_stats, (f"out={tmp_path / 's.json'}",)), (data_view, ("findings=false", "out=e.html"))):
            cfg = compose(task.__name__.rpartition(".")[2], [f"path={theirs}", *more])
            with pytest.raises(DataError, match="missing=zeros"):
                task.start.__wrapped__(cfg)
            cfg.missing = "zeros"
            task.start.__wrapped__(cfg)
    assert json.loads((tmp_path / "s.json").read_text())["grip"]["mean"][0] == pytest.approx(float(GRIP.mean()))

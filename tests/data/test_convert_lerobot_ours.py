"""A store through LeRobot and back: the same keys, shapes, dtypes and values, no key more; and LeRobot again, file by file."""
import json

import numpy as np
import pytest
from test_convert_lerobot import assert_equal_files, files_of

from policy.data import Store
from policy.data.convert import convert
from policy.data.edit import trim

SCHEMA = {"hand": ((3,), "float32"), "one": ((1,), "float64"), "grid": ((2, 3), "float64"), "camera": ((16, 16, 3), "uint8"), "depth": ((6, 8, 1), "uint16"),
          "reward": ((), "float64"), "grip": ((), "bool"), "count": ((1,), "int16"), "observation.x": ((2,), "float32"), "index": ((), "int32"),
          "action": ((2,), "float32")}
MEANT = {"kind": "absolute", "space": "ee", "of": "hand", "of_take": [0, 1], "text": "where to be"}


def ours(path, more=None, attrs=None):
    rng, schema = np.random.default_rng(0), {**SCHEMA, **(more or {})}
    store = Store.create(path, schema, fps=12.5, units={"hand": "m", "one": "s"}, action_semantics="where to be",
                         attrs={"action": MEANT, "task": "Lift ü", "obs": {"y": {"key": "hand", "take": [1]}, "one": "one"}} if attrs is None else attrs)
    store.extend([{k: (rng.normal(size=(n, *s)) * 100).astype(d) for k, (s, d) in schema.items()} for n in (5, 9)])
    return store


@pytest.mark.parametrize("more", [{}, {"timestamp": ((), "float64"), "task_index": ((), "int64")}], ids=["plain", "names of LeRobot's"])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_store_comes_back_from_lerobot(tmp_path, version, more):
    told = ours(tmp_path / "a.zarr", more)
    convert(told.path, tmp_path / "b", format="lerobot", options={"version": version})
    again = Store.open(convert(tmp_path / "b", tmp_path / "c.zarr").path)
    assert again.schema == told.schema and again.episode_ends.tolist() == told.episode_ends.tolist()
    for key in told.keys:
        np.testing.assert_array_equal(again.read(key), told.read(key))
    assert (again.fps, again.units, again.action_semantics, again.attrs["task"]) == (12.5, told.units, "where to be", "Lift ü")
    assert again.attrs["obs"] == told.attrs["obs"] and {k: again.attrs["action"][k] for k in MEANT} == MEANT
    convert(again.path, tmp_path / "d")
    assert_equal_files(files_of(tmp_path / "d"), files_of(tmp_path / "b"))
    third = Store.open(convert(tmp_path / "d", tmp_path / "e.zarr").path)
    assert third.schema == told.schema and third.attrs["obs"] == told.attrs["obs"]


def test_one_that_says_little_says_no_more(tmp_path):
    told = ours(tmp_path / "a.zarr", attrs={})
    convert(told.path, tmp_path / "b", format="lerobot", options={"images": "skip"})
    again = Store.open(convert(tmp_path / "b", tmp_path / "c.zarr").path)
    assert again.schema == {k: s for k, s in told.schema.items() if k not in ("camera", "depth")}
    assert "task" not in again.attrs and again.attrs["action"]["kind"] == "unknown" and again.action_semantics == "where to be"


def test_what_was_changed_since_is_written(tmp_path):
    convert(ours(tmp_path / "a.zarr").path, tmp_path / "b", format="lerobot")
    less, _ = trim(convert(tmp_path / "b", tmp_path / "c.zarr", action={"kind": "delta"}, units={"hand": "mm"}).path, tmp_path / "d.zarr", drop_keys=["grid"])
    again = Store.open(convert(convert(less.path, tmp_path / "e").path, tmp_path / "f.zarr").path)
    assert again.keys == less.keys and again.units["hand"] == "mm" and again.attrs["action"]["kind"] == "delta"


@pytest.mark.parametrize("said", ["{", "[1]", json.dumps({"keys": {"observation.hand": "../x"}, "columns": [["hand", [7], "<f4"]]}),
                                  json.dumps({"columns": [["hand", [-3], "<f4"]]})])
def test_garbage_there_is_passed_over(tmp_path, said):
    convert(ours(tmp_path / "a.zarr").path, tmp_path / "b", format="lerobot")
    (tmp_path / "b/meta/dipole.json").write_text(said)
    again = Store.open(convert(tmp_path / "b", tmp_path / "c.zarr").path)
    assert again.schema["observation.hand"] == ((3,), np.dtype("float32"))
    np.testing.assert_array_equal(again.read("observation.hand"), Store.open(tmp_path / "a.zarr").read("hand"))

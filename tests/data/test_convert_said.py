"""What convert says and keeps: a last observation, rows that do not fit, numbers that are none, an action made of parts, what only a store says."""
import json

import h5py
import numpy as np
import pytest
from h5_same import assert_same_hdf5

from policy.data import DataError, Store
from policy.data.convert import convert
from policy.data.convert.own import NAME
from policy.data.edit import trim
from policy.data.sources import entries
from policy.data.validate import validate

RNG = np.random.default_rng(3)
MEANT = {"kind": "absolute", "space": "ee", "of": "pose", "of_take": [0, 1], "parts": {"position": [0, 1], "gripper": [2]}, "text": "where to be"}


def demos(path, longer, action="float64"):
    with h5py.File(path, "w") as f:
        for i, n in enumerate((10, 4)):
            f[f"data/demo_{i}/actions"] = RNG.normal(size=(n, 2)).astype(action)
            f[f"data/demo_{i}/obs/x"] = RNG.normal(size=(n + longer, 3))
        f["data"].attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
    return path


def aloha(folder, longer):
    folder.mkdir()
    for i, n in enumerate((10, 4)):
        with h5py.File(folder / f"episode_{i}.hdf5", "w") as f:
            f["action"], f["observations/qpos"] = RNG.normal(size=(n, 2)), RNG.normal(size=(n + longer, 2))
    return folder


def d4rl(path, longer):
    with h5py.File(path, "w") as f:
        f["actions"], f["observations"] = RNG.normal(size=(14, 2)), RNG.normal(size=(14 + longer, 3))
        f["terminals"], f["timeouts"] = np.zeros(14, bool), np.isin(np.arange(14), [9, 13])
    return path


@pytest.mark.parametrize("make, name, key", [(demos, "a.hdf5", "x"), (aloha, "a", "qpos"), (d4rl, "a.hdf5", "observations")])
def test_a_last_observation_is_kept_and_other_numbers_of_rows_are_refused(tmp_path, make, name, key):
    source = make(tmp_path / name, 1)
    done = convert(source, tmp_path / "a.zarr", fps=20)
    store = Store.open(done.path)
    assert list(store.attrs["obs"]) == [key] and store.episode_ends.tolist() == [10, 14] and len(store.read(key)) == 14
    back = convert(done.path, tmp_path / "back").path
    for a, b in zip(sorted(source.iterdir()), sorted(back.iterdir()), strict=True) if source.is_dir() else [(source, back)]:
        assert_same_hdf5(a, b)
    trimmed, _ = trim(done.path, tmp_path / "b.zarr", steps=[0, -1])  # the last observation goes with the last step
    assert convert(trimmed.path, tmp_path / "short").steps == 12
    with pytest.raises(DataError, match=rf"{key}' has \d+ rows for \d+ steps"):
        convert(make(tmp_path / f"odd{name}", 3), tmp_path / "c.zarr", fps=20)


def test_complex_numbers_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"actions' holds complex numbers \(complex128\)"):
        convert(demos(tmp_path / "a.hdf5", 0, "complex128"), tmp_path / "a.zarr", fps=20)
    np.savez(tmp_path / "a.npz", actions=np.ones((5, 2), complex), q=np.ones((5, 2)), name=np.array(list("abcde")))
    with pytest.raises(DataError, match=r"holds complex numbers.*skip="):
        convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=20, skip=["name"])
    with pytest.raises(DataError, match=r"'name' holds no numbers.*skip=\[name\]"):
        convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=20, skip=["actions"], action_from="q")


@pytest.mark.parametrize("use", [
    lambda path, to: convert(path, to, missing="zero"), lambda path, to: convert(path, to, format="store", missing="zero"),
    lambda path, to: validate(path, missing="zero"), lambda path, to: entries(path, {"pose": "pose"}, missing="zero")],
    ids=["back", "store", "validate", "train"])
def test_an_unknown_missing_is_named_with_what_there_is(dataset, tmp_path, use):
    with pytest.raises(ValueError, match="missing='zero' is unknown; use error or zeros"):
        use(dataset, tmp_path / "b.npz")


def test_an_action_made_of_parts_is_said(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        f["data/demo_1/states"], f["data/demo_1/joint_velocities"] = np.ones((6, 3)), np.ones((6, 7))
        f["data/demo_1/gripper_actuations"] = np.ones((6, 1))
    notes = convert(tmp_path / "a.hdf5", tmp_path / "a.zarr", fps=100).notes
    assert any("it was made of joint_velocities and gripper_actuations side by side" in n for n in notes)
    notes = convert(tmp_path / "a.hdf5", tmp_path / "b.zarr", fps=100, action_from="joint_velocities").notes
    assert not any("made of" in n for n in notes)


@pytest.fixture
def told(tmp_path):
    return ours(tmp_path / "ours.zarr", {"pose": "pose"})


def ours(path, obs, **more):
    """Two episodes with pose, action, extra and more {key: dtype}, of one number each."""
    schema = {"pose": ((2,), "float32"), "action": ((3,), "float32"), "extra": ((1,), "float64"), **{k: ((), t) for k, t in more.items()}}
    store = Store.create(path, schema, fps=12.5, units={"pose": "m", "action": "mm", "extra": "s"}, action_semantics="where to be",
                         attrs={"action": MEANT, "task": "Push ü", "obs": obs})
    store.extend([{k: (9 * RNG.normal(size=(n, *shape))).astype(t) for k, (shape, t) in schema.items()} for n in (5, 8)])
    return store


@pytest.mark.parametrize("obs, more", [
    ({"pose": "pose"}, {}), ({"y": {"key": "pose", "take": [1]}, "count": "count", "grip": "grip"}, {"count": "i2", "grip": "f8", "reward": "f4"})],
    ids=["one", "several"])
@pytest.mark.parametrize("form, name", [("robomimic", "b.hdf5"), ("npz", "b.npz"), ("aloha", "b"), ("d4rl", "b.hdf5"), ("minari", "b"),
                                        ("diffusion_policy", "b.zarr"), ("diffusion_policy", "b.zarr.zip")])
def test_what_a_store_says_comes_back_from_other_formats(tmp_path, form, name, obs, more):
    told = ours(tmp_path / "ours.zarr", obs, **more)
    convert(told.path, tmp_path / name, format=form)
    done = convert(tmp_path / name, tmp_path / "again.zarr")
    again = Store.open(done.path)
    assert (done.format, again.fps, again.units, again.action_semantics, done.notes) == (form, 12.5, told.units, "where to be", ())
    assert again.attrs["task"] == "Push ü" and again.attrs["obs"] == obs
    assert {**again.attrs["action"], "rotation": None} == {**MEANT, "rotation": None}
    made = {"d4rl": {"terminals", "timeouts"}, "minari": {"terminations", "truncations"}}.get(form, set())
    assert set(again.keys) - set(told.keys) == made | ({"rewards"} if made and "reward" not in more else set())
    assert {k: again.schema[k] for k in told.keys} == told.schema
    for key in told.keys:
        np.testing.assert_array_equal(again.read(key), told.read(key))
    back = convert(done.path, tmp_path / "back").path  # and the format itself, from the store that came from it
    if form == "diffusion_policy" and back.is_dir():
        for file in (f for f in (tmp_path / name).rglob("*") if f.is_file()):
            assert file.read_bytes() == (back / file.relative_to(tmp_path / name)).read_bytes(), file
    files = sorted(p for p in (tmp_path / name).rglob("*.hdf5")) if back.is_dir() else [tmp_path / name]
    for file in files if form not in ("npz", "diffusion_policy") else []:
        assert_same_hdf5(file, back / file.relative_to(tmp_path / name) if back.is_dir() else back)


def test_images_that_are_floats_come_back_from_a_replay_buffer_as_floats(tmp_path):
    schema = {"image": ((16, 16, 3), "float32"), "action": ((2,), "float32")}
    store = Store.create(tmp_path / "a.zarr", schema, fps=10)
    store.append({"image": RNG.integers(0, 256, (5, 16, 16, 3)).astype("f4"), "action": np.ones((5, 2), "f4")})
    again = Store.open(convert(convert(store.path, tmp_path / "b.zarr", format="diffusion_policy").path, tmp_path / "c.zarr").path)
    assert again.schema == {k: (s, np.dtype(t)) for k, (s, t) in schema.items()} and "task" not in again.attrs
    np.testing.assert_array_equal(again.read("image"), store.read("image"))


@pytest.mark.parametrize("form, key", [("d4rl", "terminals"), ("minari", "terminations")])
def test_a_key_that_is_called_as_what_the_format_adds_keeps_a_name_of_its_own(tmp_path, form, key):
    told = ours(tmp_path / "ours.zarr", {"pose": "pose"}, **{key: "bool"})
    again = Store.open(convert(convert(told.path, tmp_path / "b", format=form).path, tmp_path / "again.zarr").path)
    np.testing.assert_array_equal(again.read(f"infos_{key}"), told.read(key))
    assert not again.read(key).any() and again.episodes == 2


def test_observations_that_another_program_made_wider_stay_one_key(told, tmp_path):
    with h5py.File(convert(told.path, tmp_path / "b.hdf5", format="d4rl").path, "r+") as f:
        x = np.concatenate([f["observations"], f["observations"]], 1)
        del f["observations"]
        f["observations"] = x
    done = convert(tmp_path / "b.hdf5", tmp_path / "again.zarr")
    again = Store.open(done.path)
    np.testing.assert_array_equal(again.read("observations"), x)
    assert list(again.attrs["obs"]) == ["observations"] and "no longer pose side by side" in done.notes[0]


@pytest.mark.parametrize("text, note", [
    ("{", "is not understood"), ("[1]", "is not understood"), ("[" * 60000, "is not understood"),
    (json.dumps({"fps": "x", "units": [1], "action": {"kind": "no"}, "task": 3, "obs": "pose"}), "fps, units, action, task, obs in dipole"),
    (json.dumps({"keys": {"obs/pose": "../pose"}, "columns": [["pose", [2], "O"]]}), "keys, columns in dipole"),
    (json.dumps({"columns": [["pose", [-2], "<f4"]], "keys": [1]}), "keys, columns in dipole"),
    (json.dumps({"fps": 1e999, "action": 3, "units": {"pose": 1}, "obs": [{"k": 1}]}), "fps, units, action, obs in dipole")])
def test_garbage_there_is_passed_over_with_a_note(told, tmp_path, text, note):
    with h5py.File(convert(told.path, tmp_path / "b.hdf5", format="robomimic").path, "r+") as f:
        f["data"].attrs.create(NAME, text)
    done = convert(tmp_path / "b.hdf5", tmp_path / "again.zarr", fps=12.5)
    assert any(note in n for n in done.notes), done.notes
    assert Store.open(done.path).steps == 13

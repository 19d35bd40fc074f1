"""An action that is described as it cannot be, or that would not be there, is refused by convert."""
import json

import h5py
import numpy as np
import pytest

from policy.data import DataError, Store
from policy.data.convert import convert
from policy.data.convert.own import NAME


@pytest.fixture
def arrays(tmp_path):
    """Four action channels; hand has three, width one."""
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    np.savez(path, actions=rng.normal(size=(9, 4)), hand=rng.normal(size=(9, 3)), width=rng.normal(size=9), nothing=np.zeros((9, 0)))
    return path


@pytest.mark.parametrize("said, message", [
    ({"of": "nosuchkey"}, r"action: of: 'nosuchkey' is not a stored key \(known: action, hand, width\)"),
    ({"parts": {"position": [0, 1, 20], "gripper": [3]}}, "action: parts names channel 20, and the action has 4: 0 to 3"),
    ({"parts": {"position": [0, 1, -1]}}, "parts names channel -1"),
    ({"parts": {"position": [0, 1, 2], "gripper": [2]}}, "parts names channel 2 twice"),
    ({"of": "hand", "of_take": [0, 3], "parts": {"position": [0, 1]}}, "of_take names channel 3 of 'hand', which has 3: 0 to 2"),
    ({"of": "hand"}, r"of: 4 channels of the action cannot be about 3 of 'hand'.*of_take.*parts: \{position: \[0, 1, 2\], gripper: \[3\]\}"),
    ({"of": "width", "parts": {"position": [0, 1, 2], "gripper": [3]}}, "3 channels of the action cannot be about 1 of 'width'"),
])
def test_a_description_that_cannot_be_true_is_refused(arrays, tmp_path, said, message):
    with pytest.raises(ValueError, match=message):
        convert(arrays, tmp_path / "a.zarr", fps=20, action={"kind": "absolute", **said})
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize("said", [{"of": "hand", "parts": {"position": [0, 1, 2], "gripper": [3]}}, {"of": "width", "parts": {"x": [2], "gripper": [0, 1, 3]}},
                                  {"of": "palm", "of_take": [2, 0], "parts": {"joints": [1, 3]}}])
def test_one_that_can_be_is_kept(arrays, tmp_path, said):
    done = convert(arrays, tmp_path / "a.zarr", fps=20, action={"kind": "absolute", **said}, keys={"hand": "palm"})
    kept = Store.open(done.path).attrs["action"]
    assert kept["of"] == said["of"].replace("hand", "palm") and kept["parts"] == said["parts"] and not any("action" in n for n in done.notes)


def test_what_a_file_says_and_cannot_be_is_passed_over_with_a_note(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        f["data/demo_0/actions"], f["data/demo_0/obs/x"] = np.ones((5, 2)), np.ones((5, 2))
        f["data"].attrs[NAME] = json.dumps({"fps": 10, "action": {"kind": "delta", "parts": {"position": [0, 7]}, "text": "steps"}})
    done = convert(tmp_path / "a.hdf5", tmp_path / "a.zarr")
    said = Store.open(done.path).attrs["action"]
    assert (said["kind"], said["text"], said["parts"]) == ("delta", "steps", {})
    assert any("parts names channel 7" in n for n in done.notes)


@pytest.mark.parametrize("how, message", [
    ({"skip": ["act*"]}, "'actions' is the action, and skip leaves it out. Name another with action_from=KEY"),
    ({"action_from": "nothing"}, r"its action, nothing, has no channels\. Name another with action_from=KEY.*known: actions, hand"),
    ({"action_from": ["nothing", "nothing"]}, "its action, nothing and nothing, has no channels")])
def test_an_action_that_would_not_be_there_is_an_error(arrays, tmp_path, how, message):
    with pytest.raises(DataError, match=message):
        convert(arrays, tmp_path / "a.zarr", fps=20, **how)
    without = convert(arrays, tmp_path / "b.zarr", fps=20, skip=["act*"], action_from="none")
    assert Store.open(without.path).keys == ["hand", "width"]

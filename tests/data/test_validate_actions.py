"""What actions mean: scaled targets are targets, and the torques of a gait are neither targets nor changes."""
import numpy as np
import pytest
from real_sets import ARRAYS
from recordings import Arrays, clean

from policy.data import Store
from policy.data.convert import convert
from policy.data.validate import check


def said(data: Arrays, kind: str) -> tuple[str, set[str]]:
    """What the actions look like, and the errors, when they are declared as kind."""
    data.attrs["action"] = {"kind": kind, "space": "joint"}
    report = check(data)
    return report.facts["action"]["looks"], {f.code for f in report.findings if f.severity == "error"}


@pytest.mark.parametrize("slope, offset", [(1, 0), (0.7, -0.3), (1 / 256, -1), (180 / np.pi, 10)])
def test_scaled_targets_are_targets_and_scaled_changes_are_changes(slope, offset):
    data = clean(8).copy("joints", "action")
    target = data.arrays["action"][:, :6].astype(float)
    for kind, errors in (("absolute", set()), ("delta", {"action_kind"}), ("unknown", set())):
        data.arrays["action"] = (slope * target + offset).astype(np.float32)
        assert said(data, kind) == ("absolute", errors), kind
    step = np.diff(target, axis=0, append=target[-1:])
    step[data.episode_ends - 1] = step[data.episode_ends - 2]
    for kind, errors in (("absolute", {"action_kind"}), ("delta", set()), ("unknown", set())):
        data.arrays["action"] = (slope * step).astype(np.float32)
        assert said(data, kind) == ("delta", errors), kind


@pytest.mark.data
def test_joint_targets_scaled_to_one_whose_joints_follow_slowly(tmp_path):
    """Adroit: the level of most joints follows (0.86 to 0.99), their changes hardly do (0.04 to 0.29 beside the arm)."""
    store = Store.open(convert(ARRAYS[0].find(), tmp_path / "a.zarr", mapping=ARRAYS[0].say).path)
    data = Arrays({k: store.read(k) for k in store.keys}, store.episode_ends, {"fps": 100.0})
    assert said(data, "absolute") == ("absolute", set())
    assert said(data, "unknown") == ("absolute", set())
    assert said(data, "delta") == ("absolute", {"action_kind"})


@pytest.mark.data
@pytest.mark.parametrize("real", [r for r in ARRAYS if "mujoco" in r.path], ids=lambda r: r.path[14:20])
def test_torques_of_a_gait_are_called_neither(real, tmp_path):
    store = Store.open(convert(real.find(), tmp_path / "a.zarr", mapping=real.say).path)
    data = Arrays({k: store.read(k) for k in store.keys}, store.episode_ends, {"fps": store.fps})
    assert said(data, "unknown") == ("unclear", set())

"""What actions mean and when they come: scaled targets are targets, torques of a gait are neither, an episode that is later than the others is named."""
import numpy as np
import pytest
from planted_meaning import as_deltas, delay
from real_sets import ARRAYS
from recordings import Arrays, clean, lengths

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


def uneven(data: Arrays) -> tuple[list[str], list[int]]:
    """Severity of what is said of lags, and the episodes that are named."""
    found = [f for f in check(data, skip=["odd", "copies", "images"]).findings if f.code in ("lag_mixed", "action_lag")]
    return [f.severity for f in found], [p.episode for f in found for p in f.places]


@pytest.mark.data
def test_human_demonstrations_whose_actions_come_late_are_named(pusht):
    """From 2 steps on in one of 40, as many as half of them; all of them are named, and no other."""
    store = Store.open(pusht)
    ends = store.episode_ends[:40]
    clear = Arrays({k: store.read(k, 0, int(ends[-1])) for k in ("state", "action", "keypoint")}, ends, {"fps": 10.0})
    assert uneven(clear) == ([], [])
    for steps, late, severity in ((2, [31], "warning"), (3, [0], "error"), (6, [0], "error"), (6, range(20, 24), "error"), (6, range(0, 40, 4), "error"),
                                  (6, range(20), "error"), (6, range(30), "error"), (12, [39], "error"), (-3, [5], "warning")):
        data = clear.copy()
        delay(data, late, steps)
        assert uneven(data) == ([severity], list(late)), (steps, late)


def test_delta_actions_of_an_episode_that_come_late_are_named():
    data = clean(12).copy("joints", "action")
    as_deltas(data, range(12))
    data.attrs["action"] = {"kind": "delta", "space": "joint", "of": "joints"}
    assert uneven(data) == ([], [])
    delay(data, [4, 9], 5)
    assert uneven(data) == (["error"], [4, 9])


def test_a_robot_whose_lag_depends_on_the_motion_is_no_fault():
    """It goes at most so far in a step: a quick motion is followed later than a slow one, in every episode by something else."""
    data, rng = clean(24).copy("joints", "action"), np.random.default_rng(0)
    q, far = data.arrays["joints"], np.repeat(rng.uniform(0.3, 3, 24), lengths(data))
    target = (data.arrays["action"] * far[:, None]).astype(np.float32)
    for e in range(24):
        s = data.span(e)
        for t in range(s.start + 1, s.stop):
            q[t] = q[t - 1] + np.clip(target[t - 1, :6] - q[t - 1], -0.03, 0.03)
    data.arrays["action"] = target
    assert uneven(data)[1] == []

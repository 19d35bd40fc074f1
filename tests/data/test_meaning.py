"""What transforms leave open is filled in from what a dataset says of its actions, or the error names the line to add."""
import numpy as np
import pytest

from policy.data.meaning import OURS, Known, chain, complete, described
from policy.data.relative import AbsoluteToDelta, DeltaToAbsolute, RelativeToChunk
from policy.data.semantics import Semantics
from policy.data.transform import NOTHING, Binarise, Chain, Rotation, Transform

POSE = {"kind": "absolute", "space": "ee", "rotation": "axis_angle", "parts": {"position": [0, 1, 2], "rotation": [3, 4, 5], "gripper": [6]}}
LOW, HIGH = [0.0, 0, 0, -3, -3, -3, 0.25], [1.0, 1, 1, 3, 3, 3, 0.75]
SEEN = {"hand": ("state", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]), "image": ("img", None)}


def node(kind: type, **given) -> dict:
    return {"_target_": f"{kind.__module__}.{kind.__name__}", **{k: given.get(k) for k in kind.__dataclass_fields__}, **given}


def known(said: dict, width: int = 7, seen=SEEN, widths=None) -> Known:
    return Known.of(Semantics.from_json(said), width, seen, lambda: (LOW, HIGH), "demo.zarr", widths)


def filled(kind: type, said: dict, width: int = 7, **given) -> Transform:
    return chain(complete({"t": node(kind, **given)}, known(said, width))).parts[0]


def test_the_first_two_of_a_state_that_is_observed_in_part():
    """Push-T: the action is about channels 0 and 1 of `state`, which the policy sees as agent_pos."""
    said = {"kind": "absolute", "of": "state", "of_take": [0, 1]}
    got = complete({"t": node(AbsoluteToDelta)}, known(said, 2, {"keypoint": ("keypoint", None), "agent_pos": ("state", [0, 1])}))
    assert chain(got).parts == (AbsoluteToDelta("agent_pos", [0, 1], [0, 1]),)
    swapped = complete({"t": node(RelativeToChunk)}, known(said, 2, {"all": ("state", [4, 1, 0])}))
    assert chain(swapped).parts == (RelativeToChunk("all", [0, 1], [2, 1]),)


def test_a_pose_with_its_gripper():
    said = {**POSE, "of": "state", "of_take": [7, 8, 9, 1, 2, 3]}  # the observation holds state's channels in reverse
    want = {"state": "hand", "channels": [0, 1, 2], "take": [2, 1, 0], "rotation": "axis_angle", "turns": [3, 4, 5], "turns_take": [8, 7, 6],
            "state_rotation": "axis_angle"}
    assert filled(RelativeToChunk, said) == RelativeToChunk(**want)
    assert filled(RelativeToChunk, said, frame="tool") == RelativeToChunk(**want, frame="tool", position=[0, 1, 2])
    assert filled(DeltaToAbsolute, {**said, "kind": "delta"}, scale=0.05) == DeltaToAbsolute(**want, scale=0.05)
    assert filled(Rotation, said, to="rotation_6d", obs={}) == Rotation("axis_angle", "rotation_6d", [3, 4, 5])
    assert filled(Binarise, said) == Binarise([6], 0.5, 0.25, 0.75)
    assert filled(Binarise, said, low=-1, high=1) == Binarise([6], 0, -1, 1)
    assert filled(AbsoluteToDelta, said, turns=[]) == AbsoluteToDelta("hand", [0, 1, 2], [2, 1, 0], turns=[])  # the rotation left as it is


def test_channels_have_other_numbers_behind_a_wider_rotation():
    said = {**POSE, "of": "state", "of_take": [7, 8, 9, 1, 2, 3]}
    nodes = {"six": node(Rotation, to="rotation_6d", obs={}), "relative": node(RelativeToChunk), "gripper": node(Binarise)}
    six, relative, gripper = chain(complete(nodes, known(said))).parts
    assert six == Rotation("axis_angle", "rotation_6d", [3, 4, 5])
    assert relative == RelativeToChunk("hand", [0, 1, 2], [2, 1, 0], "rotation_6d", list(range(3, 9)), [8, 7, 6], "axis_angle")
    assert gripper == Binarise([9], 0.5, 0.25, 0.75)
    made = Chain((six, relative, gripper))
    x = np.random.default_rng(0).standard_normal((2, 4, 7))
    x[..., 6] = np.where(x[..., 6] > 0, 0.75, 0.25)
    obs = {"hand": np.random.default_rng(1).standard_normal((2, 2, 10))}
    assert made.width(7, {"hand": (10,)}) == 10
    np.testing.assert_allclose(made.decode(made.encode(x, obs), obs)[..., [0, 1, 2, 6]], x[..., [0, 1, 2, 6]], atol=1e-12)


def test_steps_are_summed_up_before_they_are_made_relative():
    said = {"kind": "delta", "of": "q"}
    nodes = {"absolute": node(DeltaToAbsolute), "relative": node(RelativeToChunk)}
    got = chain(complete(nodes, known(said, 3, {"joints": ("q", None)}, {"q": 3})))
    assert got == Chain((DeltaToAbsolute("joints", [0, 1, 2], [0, 1, 2]), RelativeToChunk("joints", [0, 1, 2], [0, 1, 2])))


def test_what_is_said_wins():
    assert filled(RelativeToChunk, {}, 4, state="image", channels=[1], take=[5]) == RelativeToChunk("image", [1], [5])
    assert filled(RelativeToChunk, {"kind": "absolute", "of": "state", "of_take": [9, 8]}, 2, channels=[1]) == RelativeToChunk("hand", [1], [1])
    quaternion = {"state": "hand", "take": [0, 1, 2], "turns_take": [3, 4, 5, 6], "state_rotation": "quaternion_xyzw"}  # robosuite: axis-angle to a quaternion
    assert filled(RelativeToChunk, {**POSE, "of": "state", "of_take": list(range(7))}, **quaternion) == RelativeToChunk(
        **quaternion, channels=[0, 1, 2], rotation="axis_angle", turns=[3, 4, 5])
    assert filled(Rotation, {}, source="quaternion_xyzw", to="rotation_6d", channels=[], obs={"hand": [0, 1, 2, 3]}) == Rotation(
        "quaternion_xyzw", "rotation_6d", [], {"hand": [0, 1, 2, 3]})


@pytest.mark.parametrize("said, width, kind, given, says", [
    ({}, 3, AbsoluteToDelta, {}, r"transform.t needs to know .* demo.zarr does not say which observation .*transform.t.state=OBSERVATION.*data.semantics="),
    ({"of": "state", "of_take": [0, 1, 2]}, 3, AbsoluteToDelta, {}, r"does not say whether its actions are absolute or deltas \(attribute action: kind\)"),
    ({"kind": "absolute", "of": "state", "of_take": [0, 1]}, 3, AbsoluteToDelta, {}, "3 action channels are about 2 of 'state', so which belongs to which"),
    ({"kind": "absolute", "of": "depth"}, 3, RelativeToChunk, {}, r"which the policy does not observe: data.obs={…, depth: depth} shows it"),
    ({"kind": "delta", "of": "img"}, 3, RelativeToChunk, {}, r"for actions that are absolute, .* are delta here; sum them up first: transform=\[absolute,…\]"),
    ({"kind": "absolute", "of": "img"}, 3, DeltaToAbsolute, {}, "are absolute here; leave transform=absolute out"),
    ({"kind": "velocity", "of": "img"}, 3, AbsoluteToDelta, {}, "are velocity here; use transform=none"),
    ({"kind": "absolute", "of": "img"}, 3, RelativeToChunk, {"frame": "tool"}, r"frame=tool is about poses, .*data.semantics={rotation"),
    ({}, 3, Rotation, {"to": "rotation_6d"}, r"demo.zarr does not say that its actions have one.*transform.t.source=axis_angle"),
    ({}, 3, Binarise, {}, r"does not say which action channel is one.*transform.t.channels=\[6\]"),
])
def test_what_is_not_known_is_told(said, width, kind, given, says):
    with pytest.raises(ValueError, match=says):
        filled(kind, said, width, **given)


def test_a_gripper_that_never_moves_is_told():
    with pytest.raises(ValueError, match=r"never moves, it is always 0.5: leave transform.t out"):
        complete({"t": node(Binarise)}, Known.of(Semantics.from_json(POSE), 7, {}, lambda: ([0.5] * 7, [0.5] * 7), "demo.zarr"))


def test_a_chain_is_written_down_and_made_again():
    made = Chain((DeltaToAbsolute("q", [0, 1], [0, 1], scale=0.5), Rotation("axis_angle", "matrix", [2, 3, 4], {"q": None}), Binarise([11], 0, -1, 1)))
    assert chain(described(made)) == made and described(NOTHING) == {} and len(OURS) == 5

    class Mine(Transform):
        pass
    with pytest.raises(ValueError, match=r"transform Mine cannot leave torch.*format=torch"):
        described(Chain((Mine(),)))
    with pytest.raises(ValueError, match=r"'os.system' is no transform of dipole's"):
        chain({"evil": {"_target_": "os.system"}})
    foreign = {"mine": {"_target_": "my_pkg.Mine", "a": 1, "b": None}}
    assert complete(foreign, known({})) == {"mine": {"_target_": "my_pkg.Mine", "a": 1}}

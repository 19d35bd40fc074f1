"""Transforms: the inverse gives the actions back, to 1e-6 of the largest number in float32 and 1e-12 in float64; beside formulas written out with scipy."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation as R

from policy.data import Store
from policy.data.relative import AbsoluteToDelta, DeltaToAbsolute, RelativeToChunk
from policy.data.rotation import convert
from policy.data.semantics import ROTATIONS, WIDTHS
from policy.data.transform import Binarise, Chain, Rotation, Transform
from policy.data.windows import TrajectoryDataset

TOLERANCE = {np.float64: 1e-12, np.float32: 1e-6}
DATA = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")
OF = {"state": "pos", "channels": [0, 1, 2], "take": [0, 1, 2]}


def poses(rotation: str, b: int = 4, t: int = 9, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Actions x, y, z, a rotation, a gripper of 0 or .08, and an observation `pos` (b,2,3 + w): where the hand is; smooth paths all over SO(3)."""
    rng, w = np.random.default_rng(seed), WIDTHS[rotation]
    now, step = R.random(b, random_state=seed), 0.2 * rng.standard_normal((b, t + 1, 3))
    path, turned = [], now
    for k in range(t + 1):
        turned = turned * R.from_rotvec(step[:, k])
        path.append(convert(turned.as_matrix().reshape(b, 9), "matrix", rotation))
    places = 0.5 + 0.02 * rng.standard_normal((b, t + 1, 3)).cumsum(1)
    pose = np.concatenate([places, np.stack(path, 1)], -1)
    assert pose.shape == (b, t + 1, 3 + w)
    gripper = np.where(rng.random((b, t, 1)) < 0.5, 0.0, 0.08)
    return np.concatenate([pose[:, 1:], gripper], -1), {"pos": np.stack([pose[:, 0] + 7, pose[:, 0]], 1), "other": rng.standard_normal((b, 2, 5))}


def pose_of(rotation: str) -> dict:
    w = list(range(3, 3 + WIDTHS[rotation]))
    return {**OF, "rotation": rotation, "turns": w, "turns_take": w}


def same(a: np.ndarray, b: np.ndarray, rotation: str, tolerance: float) -> None:
    """Places and gripper as numbers, rotations as matrices."""
    w = slice(3, 3 + WIDTHS[rotation])
    np.testing.assert_allclose(np.delete(a, w, -1), np.delete(b, w, -1), atol=tolerance, rtol=0)
    np.testing.assert_allclose(convert(a[..., w], rotation, "matrix"), convert(b[..., w], rotation, "matrix"), atol=2 * tolerance, rtol=0)


def chains(rotation: str) -> dict[str, Transform]:
    """Every transform alone, and what belongs together."""
    pose, w = pose_of(rotation), WIDTHS[rotation]
    six = {**OF, "rotation": "rotation_6d", "turns": list(range(3, 9)), "turns_take": pose["turns"], "state_rotation": rotation}
    turned, open_ = Rotation(rotation, "rotation_6d", pose["turns"]), Binarise([3 + w], 0.04, 0.0, 0.08)
    made: dict[str, Transform] = {"binarise": open_}
    for frame in ("mixed", "tool", "base"):
        place = {"position": [0, 1, 2]} if frame == "tool" else {}
        made |= {f"relative {frame}": RelativeToChunk(**pose, frame=frame, **place), f"delta {frame}": AbsoluteToDelta(**pose, frame=frame, **place),
                 f"summed {frame}": DeltaToAbsolute(**pose, frame=frame, **place)}
    return {**made, **{f"to {to}": Rotation(rotation, to, pose["turns"]) for to in ROTATIONS},
            "umi": Chain((made["relative tool"], turned, Binarise([9], 0.04, 0.0, 0.08))), "6d, then delta": Chain((turned, AbsoluteToDelta(**six))),
            "binarise, delta, quaternion": Chain((open_, made["delta mixed"], Rotation(rotation, "quaternion_wxyz", pose["turns"]))),
            "summed, relative": Chain((made["summed base"], made["relative base"])), "delta and back": Chain((made["delta tool"], made["summed tool"]))}


NAMES = list(chains("axis_angle"))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("rotation", ["axis_angle", "quaternion_xyzw", "rotation_6d", "euler_xyz"])
@pytest.mark.parametrize("name", NAMES)
def test_the_inverse_gives_the_actions_back(name, rotation, dtype):
    """In numpy and torch, which agree; a chunk of any length."""
    transform = chains(rotation)[name]
    for t in (1, 13):
        actions, obs = poses(rotation, t=t)
        x, seen = actions.astype(dtype), {k: v.astype(dtype) for k, v in obs.items()}
        kept = {k: v.copy() for k, v in seen.items()}
        code = transform.encode(x, seen)
        back = transform.decode(code, seen)
        assert code.dtype == back.dtype == dtype and code.shape == (4, t, transform.width(x.shape[-1], {"pos": (3 + WIDTHS[rotation],), "other": (5,)}))
        tolerance = TOLERANCE[dtype] * max(1, np.abs(code).max())
        same(back, x, rotation, tolerance)
        tensors = {k: torch.from_numpy(v) for k, v in seen.items()}
        torched = transform.encode(torch.from_numpy(x), tensors)
        np.testing.assert_allclose(torched, code, atol=10 * tolerance)
        same(transform.decode(torched, tensors).numpy(), x, rotation, tolerance)
        assert (x == actions.astype(dtype)).all() and all((seen[k] == kept[k]).all() for k in seen)  # nothing is written into


@pytest.mark.parametrize("rotation", ["quaternion_xyzw", "euler_xyz", "rotation_6d"])
def test_relative_poses_are_those_of_the_formulas(rotation):
    """T_now^-1 T for SE(3), written with scipy; the first delta is the same as the first relative one, the others follow one another."""
    actions, obs = poses(rotation)
    turns = pose_of(rotation)["turns"]

    def matrices(x):
        return convert(x[..., turns], rotation, "matrix").reshape(*x.shape[:-1], 3, 3)
    p, m, p0, m0 = actions[..., :3], matrices(actions), obs["pos"][:, -1:, :3], matrices(obs["pos"][:, -1:])
    back = m0.swapaxes(-1, -2)
    wanted = {"mixed": (p - p0, back @ m), "tool": ((back @ (p - p0)[..., None])[..., 0], back @ m), "base": (p - p0, m @ back)}
    made = chains(rotation)
    for frame, (place, turn) in wanted.items():
        code = made[f"relative {frame}"].encode(actions, obs)
        np.testing.assert_allclose(code[..., :3], place, atol=1e-12)
        np.testing.assert_allclose(matrices(code), turn, atol=1e-12)
        np.testing.assert_array_equal(code[..., -1], actions[..., -1])  # the gripper is left alone
        delta = made[f"delta {frame}"].encode(actions, obs)
        np.testing.assert_allclose(delta[:, 0], code[:, 0], atol=1e-12)
        moved = {**obs, "pos": actions[:, None, 3, :-1]}
        np.testing.assert_allclose(delta[:, 4:5], made[f"relative {frame}"].encode(actions[:, 4:5], moved), atol=1e-12)


def test_joints_subtract_channel_by_channel():
    """Channels in any order, of an observation with axes of its own; the newest step counts."""
    actions, obs = np.random.default_rng(0).standard_normal((2, 5, 4)), {"q": np.random.default_rng(1).standard_normal((2, 3, 2, 3))}
    code = RelativeToChunk("q", channels=[2, 0], take=[5, 1]).encode(actions, obs)
    want = actions.copy()
    want[..., 2] -= obs["q"][:, -1, 1, 2][:, None]
    want[..., 0] -= obs["q"][:, -1, 0, 1][:, None]
    np.testing.assert_array_equal(code, want)
    whole = AbsoluteToDelta("q").encode(np.zeros((2, 3, 6)), obs)
    np.testing.assert_array_equal(whole[:, 0], -obs["q"][:, -1].reshape(2, 6))
    assert not whole[:, 1:].any()


def test_a_target_repeated_behind_the_end_is_a_step_of_zero_and_a_step_repeated_is_none():
    x, valid = np.array([[[1.0], [3.0], [3.0], [3.0]]]), np.array([[True, True, False, False]])
    obs = {"q": np.array([[[0.5]]])}
    np.testing.assert_array_equal(AbsoluteToDelta("q").encode(x, obs, valid)[0, :, 0], [0.5, 2, 0, 0])
    steps = np.array([[[0.5], [2.0], [2.0], [2.0]]])  # what a dataset of steps repeats
    np.testing.assert_array_equal(DeltaToAbsolute("q").encode(steps, obs, valid)[0, :, 0], [1, 3, 3, 3])
    np.testing.assert_array_equal(DeltaToAbsolute("q").encode(steps, obs)[0, :, 0], [1, 3, 5, 7])
    chained = Chain((DeltaToAbsolute("q"), RelativeToChunk("q")))
    np.testing.assert_array_equal(chained.encode(steps, obs, valid)[0, :, 0], [0.5, 2.5, 2.5, 2.5])
    actions, seen = poses("axis_angle")
    ended = np.zeros(actions.shape[:2], bool)
    summed = chains("axis_angle")["summed mixed"].encode(actions, seen, ended)
    np.testing.assert_allclose(summed[..., :6], np.broadcast_to(seen["pos"][:, -1:, :6], (4, 9, 6)), atol=1e-12)  # it stays where it is


def test_steps_in_units_of_a_controller():
    """robosuite's OSC_POSE: actions in [-1, 1] are up to 5 cm and .5 rad about the base's axes."""
    rng = np.random.default_rng(2)
    steps, now = rng.uniform(-1, 1, (3, 6, 7)), R.random(3, random_state=3)
    pos = np.concatenate([rng.uniform(0, 1, (3, 3)), now.as_quat()], 1)
    transform = DeltaToAbsolute("pos", [0, 1, 2], [0, 1, 2], "axis_angle", [3, 4, 5], [3, 4, 5, 6], "quaternion_xyzw", "base", scale=0.05, turns_scale=0.5)
    got, place, turned = transform.encode(steps, {"pos": pos[:, None]}), pos[:, :3], now
    for k in range(6):
        place, turned = place + 0.05 * steps[:, k, :3], R.from_rotvec(0.5 * steps[:, k, 3:6]) * turned
        np.testing.assert_allclose(got[:, k, :3], place, atol=1e-12)
        np.testing.assert_allclose(R.from_rotvec(got[:, k, 3:6]).as_matrix(), turned.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(transform.decode(got, {"pos": pos[:, None]}), steps, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.floats(1e-3, 1e4), st.sampled_from(["float32", "float64"]))
def test_steps_add_up_whatever_the_scale(seed, t, size, dtype):
    rng = np.random.default_rng(seed)
    x, obs = (size * rng.standard_normal((2, t, 3))).astype(dtype), {"q": (size * rng.standard_normal((2, 1, 3))).astype(dtype)}
    largest = max(np.abs(x).max(), np.abs(obs["q"]).max())
    for transform in (AbsoluteToDelta("q"), RelativeToChunk("q"), DeltaToAbsolute("q", scale=0.3)):
        most = largest * (t if isinstance(transform, DeltaToAbsolute) else 1)  # sums of t numbers
        np.testing.assert_allclose(transform.decode(transform.encode(x, obs), obs), x, atol=TOLERANCE[np.dtype(dtype).type] * most, rtol=0)


def test_a_gripper_is_open_or_closed():
    transform = Binarise([1], 0.04, 0.0, 0.08)
    x = np.array([[[5, 0.0], [6, 0.08], [7, 0.03], [8, 0.041]]], np.float32)
    np.testing.assert_array_equal(transform.encode(x, {})[0], [[5, -1], [6, 1], [7, -1], [8, 1]])
    np.testing.assert_array_equal(transform.decode(transform.encode(x, {}), {})[0, :, 1], np.float32([0, 0.08, 0, 0.08]))
    np.testing.assert_array_equal(transform.decode(np.float32([[[0, 0.01], [0, -3.0]]]), {})[0, :, 1], np.float32([0.08, 0]))
    closes = Binarise([0], 0, -1, 1)
    np.testing.assert_array_equal(closes.decode(closes.encode(x[..., :1] - 6.5, {}), {})[0, :, 0], [-1, -1, 1, 1])


def test_observations_are_shown_in_another_representation_and_come_back():
    actions, obs = poses("quaternion_wxyz")
    transform = Rotation("quaternion_wxyz", "rotation_6d", [3, 4, 5, 6], {"pos": [3, 4, 5, 6]})
    shown = transform.encode_obs(obs)
    assert shown["pos"].shape == (4, 2, 9) and shown["other"] is obs["other"]
    assert transform.sizes({"pos": (7,), "other": (5,)}) == {"pos": (9,), "other": (5,)}
    np.testing.assert_allclose(shown["pos"][:, 1, 3:], convert(obs["pos"][:, 1, 3:], "quaternion_wxyz", "rotation_6d"), atol=1e-12)
    np.testing.assert_allclose(transform.decode_obs(shown)["pos"][:, 1], obs["pos"][:, 1], atol=1e-12)
    own = Rotation("axis_angle", "rotation_6d", [], {"quat": None}, "quaternion_xyzw")
    assert own.width(3, {"quat": (4,)}) == 3 and own.sizes({"quat": (4,)}) == {"quat": (6,)}
    assert own.encode(actions, obs) is actions


def test_a_rotation_that_lies_in_pieces():
    """A 3 x 4 pose matrix, row after row: its rotation is in channels 0-2, 4-6 and 8-10; what else there is keeps its order."""
    m, place = R.random(5, random_state=1).as_matrix(), np.random.default_rng(0).standard_normal((5, 3, 1))
    x = np.concatenate([np.full((1, 5, 1), 9.0), np.concatenate([m, place], 2).reshape(1, 5, 12)], -1)
    transform = Rotation("matrix", "axis_angle", [1, 2, 3, 5, 6, 7, 9, 10, 11])
    code = transform.encode(x, {})
    np.testing.assert_allclose(code[0], np.concatenate([np.full((5, 1), 9.0), R.from_matrix(m).as_rotvec(), place[..., 0]], 1), atol=1e-12)
    np.testing.assert_allclose(transform.decode(code, {}), x, atol=1e-12)
    swapped = Rotation("axis_angle", "quaternion_xyzw", [3, 1, 2])
    y = np.random.default_rng(1).standard_normal((1, 4, 5))
    np.testing.assert_allclose(swapped.decode(swapped.encode(y, {}), {}), y, atol=1e-12)


@pytest.mark.parametrize("name", ["umi", "6d, then delta", "summed tool", "relative base"])
def test_guides_take_gradients_through_it(name):
    """decode and encode are differentiable, beside finite differences."""
    actions, obs = poses("axis_angle", b=1, t=3)
    transform, seen = chains("axis_angle")[name], {k: torch.from_numpy(v) for k, v in obs.items()}
    assert torch.autograd.gradcheck(lambda x: transform.decode(x, seen)[..., :-1], (transform.encode(torch.from_numpy(actions), seen).requires_grad_(),),
                                    eps=1e-6, atol=1e-5)
    x = torch.from_numpy(actions)[..., :-1].requires_grad_()
    whole = torch.from_numpy(actions)[..., -1:]
    assert torch.autograd.gradcheck(lambda x: transform.encode(torch.cat([x, whole], -1), seen), (x,), eps=1e-6, atol=1e-5)


def test_misfits_are_told():
    for make, says in ((lambda: RelativeToChunk("q", frame="world"), "frame='world' is unknown; use one of mixed"),
                       (lambda: RelativeToChunk("q", rotation="axis_angle", turns=[3, 4], turns_take=[0, 1, 2]), r"turns=\[3, 4\] is not rotation=axis_angle"),
                       (lambda: RelativeToChunk("q", rotation="axis_angle", turns=[3, 4, 5]), r"turns_take=\[\] is not"),
                       (lambda: RelativeToChunk("q", turns=[1]), "is not rotation=None"),
                       (lambda: RelativeToChunk("q", [0, 1, 2], frame="tool"), "frame=tool .* needs rotation"),
                       (lambda: DeltaToAbsolute("q", scale=0), "scale=0"), (lambda: DeltaToAbsolute("q", turns_scale=2), "turns_scale 1 unless"),
                       (lambda: Rotation("quaternion", "matrix"), "'quaternion' is no representation"),
                       (lambda: Rotation("axis_angle", "matrix", [1, 2]), r"channels=\[1, 2\] cannot be a rotation in axis_angle"),
                       (lambda: Binarise([0], 2, 0, 1), "threshold=2 must lie between low=0 and high=1")):
        with pytest.raises(ValueError, match=says):
            make()
    for transform, says in ((RelativeToChunk("q"), r"observation 'q', which the policy does not have \(it sees x\): observe it, data.obs.q=…"),
                            (RelativeToChunk("x"), "takes 4 action channels from 3 of 'x'"),
                            (RelativeToChunk("x", [0, 4], [0, 1]), "channel 4 is named, and actions"),
                            (RelativeToChunk("x", [0], [3]), "channel 3 is named, and 'x' has channels 0 to 2"),
                            (AbsoluteToDelta("x", [1, 1], [0, 1]), "one twice"),
                            (Rotation("axis_angle", "matrix", [2, 3, 4]), "channel 4"), (Binarise([-1], 0, 0, 1), "channel -1")):
        with pytest.raises(ValueError, match=says):
            transform.width(4, {"x": (3,)})
    for transform, says in ((Rotation("axis_angle", "matrix", [], {"y": None}), r"Rotation.obs names y, .* \(it sees x\)"),
                            (Rotation("quaternion_wxyz", "matrix", [], {"x": None}),
                             "'x' .* gives all of its channels to a rotation in quaternion_wxyz, which has 4"),
                            (Rotation("axis_angle", "matrix", [], {"x": [1, 2, 3]}), "channel 3")):
        with pytest.raises(ValueError, match=says):
            transform.sizes({"x": (3,)})


@pytest.mark.data
def test_human_pushes_come_back():
    """Push-T: absolute px of the finger, whose place is the first two of state; integers, so relative and delta are exact to rounding of the state alone."""
    path = DATA / "pusht" / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"{path} is not there; set DIPOLE_DATA to the folder that holds pusht/")
    data = TrajectoryDataset(Store.open(path), {"agent_pos": {"key": "state", "take": [0, 1]}, "state": "state"}, "action", split="all")
    batch = data.batch(torch.arange(0, len(data), 3))
    for transform in (AbsoluteToDelta("agent_pos"), RelativeToChunk("state", take=[0, 1])):
        code = transform.encode(batch.action, batch.obs, batch.valid)
        assert (transform.decode(code, batch.obs) - batch.action).abs().max() < 1e-6 * 512
        wide = {k: v.double() for k, v in batch.obs.items()}
        assert (transform.decode(transform.encode(batch.action.double(), wide), wide) - batch.action.double()).abs().max() < 1e-12 * 512
    assert (AbsoluteToDelta("agent_pos").encode(batch.action, batch.obs)[:, 1:].numpy() == np.diff(batch.action.numpy(), axis=1)).all()
    assert not AbsoluteToDelta("agent_pos").encode(batch.action, batch.obs)[~batch.valid].any()


@pytest.mark.data
def test_keyboard_steps_come_back():
    """IKEA: steps of -1, 0, 1 in place and turn, a gripper of +-1 and a flag; summed up from the hand's place and back."""
    path = DATA / "ikea_toy_table" / "toy_table_human_first.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there; set DIPOLE_DATA to the folder that holds ikea_toy_table/")
    with np.load(path, allow_pickle=False) as z:
        hand, actions = z["robot_ob"][:, 1:4], z["actions"]
    n = len(actions) // 16 * 16
    x, obs = actions[:n].reshape(-1, 16, 8), {"hand": hand[:n:16, None]}
    places = DeltaToAbsolute("hand", [0, 1, 2], scale=2.0**-6)
    for transform in (places, Chain((places, RelativeToChunk("hand", [0, 1, 2]), Binarise([6], 0, -1, 1)))):
        back = transform.decode(transform.encode(x, obs), obs)
        np.testing.assert_allclose(back, x, atol=1e-12)
        single = {"hand": obs["hand"].astype(np.float32)}
        np.testing.assert_allclose(transform.decode(transform.encode(x.astype(np.float32), single), single), x, atol=1e-6 * 2**6)  # 1e-6 of a metre, in steps
    np.testing.assert_allclose(places.encode(x, obs)[:, -1, :3] - obs["hand"][:, 0], x[..., :3].sum(1) / 64, atol=1e-12)


@pytest.mark.data
def test_joint_targets_of_a_humanoid_come_back():
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'dipole[data]'")
    files = sorted((DATA / "g1_bottle_lerobot_v21" / "data").rglob("*.parquet"))[:3]
    if not files:
        pytest.skip("g1_bottle_lerobot_v21/ is not there; set DIPOLE_DATA to the folder that holds it")
    for file in files:
        table = parquet.read_table(file)
        action, state = (np.stack(table[k].to_numpy()) for k in ("action", "observation.state"))
        n = len(action) // 16 * 16
        x, obs = action[:n].reshape(-1, 16, 26), {"joints": state[:n:16, None]}
        for transform in (AbsoluteToDelta("joints"), RelativeToChunk("joints", channels=list(range(14)), take=list(range(14)))):
            code = transform.encode(x, obs)
            assert np.abs(transform.decode(code, obs) - x).max() < 1e-6 * max(1, np.abs(x).max()) and np.abs(code[..., :14]).max() < np.abs(x[..., :14]).max()

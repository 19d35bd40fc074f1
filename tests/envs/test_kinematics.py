"""The kinematics against MuJoCo's own, and the rotations against scipy's."""

from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation, Slerp

from envs import kinematics
from envs.gantry import Gantry
from envs.kinematics import Chain
from envs.panda import PandaPick

# Every joint off its body's origin and twisted, two on one body, a reference position that is not zero, a slide in between, a site on top.
CRANE = """
<mujoco>
  <compiler angle="radian" autolimits="true"/>
  <worldbody>
    <body name="mast" pos=".1 .2 .3" euler=".3 -.2 .7">
      <joint type="hinge" axis="1 2 3" pos=".05 .02 -.1" ref=".4" range="-1 2"/> <geom size=".1"/>
      <body pos=".3 0 .4" euler="1 .2 0">
        <joint type="slide" axis="1 0 1" range="-.2 .3" ref=".1"/> <joint type="hinge" axis="0 1 0" pos="0 .1 0"/> <geom size=".1"/>
        <body>
          <joint type="hinge" axis="0 0 1"/> <geom size=".1"/>
          <body name="jib" pos=".2 .1 0" quat=".5 .1 -.7 .3">
            <joint type="hinge" axis="-1 0 2" pos="0 0 .2" range="-2 2"/> <joint type="hinge" axis="0 1 0" range="-2 2"/>
            <joint type="hinge" axis="1 0 0" range="-2.5 2.5"/> <geom size=".1"/>
            <site name="hook" pos=".1 -.2 .3" euler=".2 .3 .4"/>
          </body>
        </body>
      </body>
    </body>
    <body name="load"><freejoint/><geom size=".1"/><body name="label"><geom size=".1"/></body></body>
  </worldbody>
</mujoco>"""


def crane() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_string(CRANE)


def aloha() -> mujoco.MjModel:
    package = pytest.importorskip("gym_aloha", reason="its MJCF is one of the arms to compare on: pip install gym-aloha")
    return mujoco.MjModel.from_xml_path(str(Path(package.__file__).parent / "assets" / "bimanual_viperx_transfer_cube.xml"))


PLACES = [
    (crane, {"body": "jib"}),
    (crane, {"site": "hook"}),
    (crane, {"site": "hook", "offset": (0.1, 0.2, -0.3)}),
    (lambda: Gantry().model, {"body": "left", "offset": (0, 0, 0.02)}),
    (lambda: PandaPick().model, {"site": "grip"}),
    (aloha, {"body": "vx300s_left/gripper_link"}),
    (aloha, {"body": "vx300s_right/right_finger_link", "offset": (0.02, 0, 0)}),
]


def configurations(model: mujoco.MjModel, chain: Chain, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(np.maximum(chain.low, -3), np.minimum(chain.high, 3), (n, len(chain.home)))


def mujocos(model: mujoco.MjModel, chain: Chain, q: np.ndarray, place: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, rotation and jacobian by MuJoCo, one configuration after the other."""
    data, found = mujoco.MjData(model), []
    for row in q:
        data.qpos[chain.qpos] = row
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        at = data.site(place["site"]) if "site" in place else data.body(place["body"])
        rotation = at.xmat.reshape(3, 3).copy()
        position = at.xpos + rotation @ np.array(place.get("offset", (0, 0, 0)))
        jacobian = np.zeros((6, model.nv))
        body = model.site(place["site"]).bodyid[0] if "site" in place else model.body(place["body"]).id
        mujoco.mj_jac(model, data, jacobian[:3], jacobian[3:], position, body)
        found.append((position, rotation, jacobian[:, chain.dof]))
    return tuple(np.stack(parts) for parts in zip(*found, strict=True))


@pytest.mark.parametrize(("build", "place"), PLACES)
def test_pose_and_jacobian_are_mujocos(build, place):
    model = build()
    chain = Chain(model, **place)
    q = configurations(model, chain, 40)
    expected = mujocos(model, chain, q, place)
    for got, right in zip((*chain.pose(q.reshape(8, 5, -1)), chain.jacobian(q.reshape(8, 5, -1))), expected, strict=True):
        assert got.shape == (8, 5, *right.shape[1:])
        np.testing.assert_allclose(got.reshape(right.shape), right, rtol=0, atol=1e-12)
    for got, right in zip((*chain.pose(torch.from_numpy(q)), chain.jacobian(torch.from_numpy(q))), expected, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=1e-12)
    single = chain.pose(torch.from_numpy(q).float())[0]
    assert single.dtype == torch.float32 and np.abs(single.numpy() - expected[0]).max() < 1e-5


def test_a_chain_knows_its_joints():
    model = crane()
    chain = Chain(model, site="hook")
    assert chain.qpos.tolist() == list(range(7)) and chain.dof.tolist() == list(range(7))
    assert chain.low.tolist() == [-1, -0.2, -np.inf, -np.inf, -2, -2, -2.5] and chain.high.tolist() == [2, 0.3, np.inf, np.inf, 2, 2, 2.5]
    assert chain.home.tolist() == [0.4, 0.1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"body": "arm"}, "no body 'arm' .*mast, jib"),
        ({"site": "jib"}, "no site 'jib' .*hook"),
        ({"body": "label"}, "neither hinge nor slide"),
        ({"body": "world"}, "hangs on no joint"),
        ({}, "name one place"),
        ({"body": "jib", "site": "hook"}, "name one place"),
    ],
)
def test_places_that_do_not_work_say_why(place, message):
    with pytest.raises(ValueError, match=message):
        Chain(crane(), **place)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize(("build", "place"), [PLACES[1], PLACES[4], PLACES[5]])
def test_solve_reaches_what_can_be_reached(build, place, kind):
    """From joints up to 0.5 rad away on each: to 1e-6 m and rad, within the limits, all but a few that run into them."""
    model = build()
    chain = Chain(model, **place)
    target = configurations(model, chain, 300, seed=1)
    start = np.clip(target + np.random.default_rng(2).uniform(-0.5, 0.5, target.shape), chain.low, chain.high)
    array = torch.from_numpy if kind == "torch" else np.asarray
    position, rotation = chain.pose(array(target))
    q = chain.solve(array(start), position, rotation, steps=60)
    at, turned = chain.pose(q)
    assert (np.asarray(q) >= chain.low).all() and (np.asarray(q) <= chain.high).all()
    error = np.linalg.norm(at - position, axis=-1) + np.linalg.norm(np.asarray(turned) - np.asarray(rotation), axis=(-2, -1))
    print(f"\nreached {np.mean(error < 1e-6):.3f} of 300")
    assert np.mean(error < 1e-6) > 0.97
    at = chain.pose(chain.solve(array(start), position, steps=40))[0]
    assert np.mean(np.linalg.norm(at - position, axis=-1) < 1e-6) > 0.97


def test_solve_moves_no_faster_than_told_and_stays_where_it_is_asked_to_be():
    chain = Chain(crane(), site="hook")
    q = configurations(crane(), chain, 50)
    assert np.abs(chain.solve(q, *chain.pose(q)) - q).max() < 1e-6
    far = chain.solve(q, np.full((50, 3), 100.0), steps=1, max_step=0.1)
    assert np.abs(far - q).max() < 0.1 + 1e-12 and np.abs(far - q).max(axis=1).mean() > 0.05


def test_joints_without_a_task_are_drawn_to_rest():
    chain = Chain(crane(), site="hook")
    rest = np.array([0.4, 0.1, 0.2, -0.3, 0.1, -0.2, 0.3])
    position, rotation = chain.pose(rest + 0.02)
    q = chain.solve(rest + np.random.default_rng(0).uniform(-0.2, 0.2, (20, 7)), position, rotation, steps=200, rest=rest)
    assert np.linalg.norm(chain.pose(q)[0] - position, axis=-1).max() < 1e-6
    assert np.ptp(q, axis=0).max() < 1e-4, "one pose, one answer: the redundant joint is settled by rest"


def rotations(n: int = 200) -> Rotation:
    """Random ones and the awkward ones: none, tiny, half turns, nearly half turns."""
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(60, 3))
    axes = np.concatenate([np.eye(3), -np.eye(3), axes / np.linalg.norm(axes, axis=1, keepdims=True)])
    awkward = [axes * angle for angle in (0.0, 1e-10, 1e-5, np.pi - 1e-6, np.pi)]
    return Rotation.concatenate([Rotation.random(n, rng=rng), Rotation.from_rotvec(np.concatenate(awkward))])


@pytest.mark.parametrize("array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_rotations_are_scipys(array):
    right = rotations()
    quat, matrix = right.as_quat(scalar_first=True), right.as_matrix()
    np.testing.assert_allclose(kinematics.matrix(array(quat)), matrix, rtol=0, atol=1e-14)
    got = np.asarray(kinematics.quaternion(array(matrix)))
    assert (got[:, 0] >= 0).all() and np.abs(np.abs((got * quat).sum(1)) - 1).max() < 1e-14
    vector = np.asarray(kinematics.rotation_vector(array(matrix)))
    assert np.linalg.norm(vector, axis=1).max() <= np.pi + 1e-15
    np.testing.assert_allclose(Rotation.from_rotvec(vector).as_matrix(), matrix, rtol=0, atol=1e-14)
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), right.magnitude(), rtol=0, atol=1e-7)
    back = Rotation.from_quat(np.asarray(kinematics.from_rotation_vector(array(vector))), scalar_first=True)
    np.testing.assert_allclose(back.as_matrix(), matrix, rtol=0, atol=1e-14)
    product = np.asarray(kinematics.multiply(array(quat), array(quat[::-1].copy())))
    np.testing.assert_allclose(Rotation.from_quat(product, scalar_first=True).as_matrix(), (right * right[::-1]).as_matrix(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("array", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_slerp_is_scipys_and_takes_the_shorter_way(array):
    pairs = Rotation.random(40, rng=np.random.default_rng(1))
    start, end = (part.as_quat(scalar_first=True) for part in (pairs[:20], pairs[20:]))
    share = np.linspace(0, 1, 20)[:, None]
    got = np.asarray(kinematics.slerp(array(start), array(-end), array(share)))
    for i in range(20):
        right = Slerp([0, 1], Rotation.concatenate([pairs[i], pairs[20 + i]]))(share[i, 0])
        assert (Rotation.from_quat(got[i], scalar_first=True) * right.inv()).magnitude() < 1e-7
    same = np.asarray(kinematics.slerp(array(start), array(start), array(share)))
    np.testing.assert_allclose(same, start, rtol=0, atol=1e-15)

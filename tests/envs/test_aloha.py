"""ALOHA is gym-aloha's: model, start, cubes, actions and stages; and its expert hands the cube over."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from scipy.optimize import linprog

from envs import aloha, render
from envs.aloha import ARMS, AlohaTransfer
from envs.batch import BatchEnv
from envs.collect import KEEP, demonstrations
from envs.kinematics import matrix
from envs.simulator import Simulator, State
from envs.task import TaskEnv

pytest.importorskip("gym_aloha", reason="the XML and the meshes are gym-aloha's: pip install 'dipole[aloha]'")

from gym_aloha import constants, utils

FINGERS = [(0, "left"), (0, "right"), (1, "left"), (1, "right")]


def roll(task: AlohaTransfer, act: Any, n: int, t: int) -> State:
    """The states (t, n, ...) of n worlds from seeds 0, 1, ..., past success."""
    simulator, state, states = Simulator(task.model, n, substeps=task.substeps), State.stack([task.reset(seed) for seed in range(n)]), []
    simulator.write(np.arange(n), state)
    for _ in range(t):
        states.append(state)
        state = simulator.run(np.arange(n), task.control(act(task.observe(state)))[:, None])[:, 0]
    simulator.close()
    return State.stack(states)


def with_noise(task: AlohaTransfer, n: int, scale: float) -> Any:
    expert, rng = task.expert(n, 0), np.random.default_rng(0)
    return lambda obs: expert.act(obs) + rng.normal(size=(n, 14)) * scale * np.array(task.expert_noise)


def knocking(task: AlohaTransfer, n: int) -> Any:
    """The expert led astray for a third of a second at a time: cubes are pushed, tilted, dropped and touched from all sides."""
    expert, rng = task.expert(n, 0), np.random.default_rng(0)
    moved = np.zeros((n, 14))

    def act(obs: dict[str, np.ndarray]) -> np.ndarray:
        some = rng.random(n) < 0.05
        moved[some] = rng.normal(size=(some.sum(), 14)) * (([0.03] * 6 + [0.2]) * 2) * (rng.random((some.sum(), 1)) < 0.5)
        return expert.act(obs) + moved

    return act


def violent_actions(task: AlohaTransfer, n: int, t: int) -> np.ndarray:
    """Targets (n, t, 14) up to half of each joint's way from the start, held for a fifth of a second; larger jumps can make the model unstable."""
    start, space = np.array([*aloha.START[:6], 0.1] * 2), task.action_space
    there = np.random.default_rng(0).uniform(space.low, space.high, (n, t // 10, 14))
    return np.repeat(start + 0.5 * (there - start), 10, axis=1)


def contacts(model: mujoco.MjModel, qpos: np.ndarray) -> np.ndarray:
    """Whether MuJoCo finds the cube in contact with each of FINGERS and with the table, (t, 5)."""
    data, cube = mujoco.MjData(model), model.geom("red_box").id
    others = [*(model.geom(f"vx300s_{ARMS[arm]}/10_{side}_gripper_finger").id for arm, side in FINGERS), model.geom("table").id]
    found = np.zeros((len(qpos), 5), bool)
    for row, each in zip(found, qpos, strict=True):
        data.qpos[:] = each
        mujoco.mj_fwdPosition(model, data)
        pairs = data.contact.geom[(data.contact.geom == cube).any(axis=1)]
        row[:] = [(pairs == other).any() for other in others]
    return found


def contact_stages(model: mujoco.MjModel, qpos: np.ndarray) -> np.ndarray:
    """gym-aloha's reward, worked out from contacts as it does."""
    left, _, right, _, table = contacts(model, qpos).T
    return np.where(left, 3 + ~table, np.where(right, 1 + ~table, 0))


@pytest.fixture(scope="module")
def handed() -> State:
    """16 episodes of the expert with its noise, 220 steps each."""
    task = AlohaTransfer()
    return roll(task, with_noise(task, 16, 1.0), 16, 220)


@pytest.mark.gl
def test_gymnasium_finds_nothing_to_warn_of(gl):
    env = gymnasium.make("dipole/AlohaTransfer-v0").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")
        check_env(env)
    env.close()


def test_everything_but_the_looks_is_the_packages_own():
    assets = Path(find_spec("gym_aloha").submodule_search_locations[0]) / "assets"
    task, theirs = AlohaTransfer(), mujoco.MjModel.from_xml_path(str(assets / "bimanual_viperx_transfer_cube.xml"))
    kinds = ("body_", "jnt_", "dof_", "geom_", "mesh_", "actuator_", "eq_", "qpos0")
    physics = [name for name in dir(theirs) if name.startswith(kinds) and isinstance(getattr(theirs, name), np.ndarray)]
    assert len(physics) > 100
    assert not [name for name in physics if not np.array_equal(getattr(task.model, name), getattr(theirs, name)) and not name.endswith("pathadr")]
    assert task.model.opt.timestep * task.substeps == constants.DT and task.fps == constants.FPS
    assert [*aloha.START, *aloha.START] == constants.START_ARM_POSE
    low, high = theirs.actuator_ctrlrange.T
    arms = [*range(6), *range(8, 14)]
    space = task.action_space
    assert (space.low[[*range(6), *range(7, 13)]] == low[arms].astype(np.float32)).all()
    assert (space.high[[*range(6), *range(7, 13)]] == high[arms].astype(np.float32)).all()


def test_seeds_mean_the_same_cubes():
    task = AlohaTransfer()
    for seed in range(50):
        assert (task.reset(seed).qpos == [*constants.START_ARM_POSE, *utils.sample_box_pose(seed)]).all()


def test_actions_and_joints_are_gym_alohas():
    task, rng = AlohaTransfer(), np.random.default_rng(0)
    action = rng.uniform(task.action_space.low, task.action_space.high, (3, 4, 14))
    ctrl = task.control(action)
    for i, fingers in ((6, (6, 7)), (13, (14, 15))):
        opening = constants.unnormalize_puppet_gripper_position(action[..., i])
        assert np.allclose(ctrl[..., fingers[0]], opening, atol=1e-15) and np.allclose(ctrl[..., fingers[1]], -opening, atol=1e-15)
    assert (ctrl[..., [*range(6), *range(8, 14)]] == action[..., [*range(6), *range(7, 13)]]).all()
    state = task.reset(0)
    state.qpos[[6, 14]] = 0.03, 0.05
    grips = constants.normalize_puppet_gripper_position(np.array([0.03, 0.05]))
    assert task.observe(state)["agent_pos"][[6, 13]] == pytest.approx(grips, abs=1e-6)


def test_hands_are_where_mujoco_has_them(handed):
    task = AlohaTransfer()
    data = mujoco.MjData(task.model)
    for qpos in handed.qpos[::25].reshape(-1, 23):
        data.qpos[:] = qpos
        mujoco.mj_kinematics(task.model, data)
        for arm, (at, turned) in zip(ARMS, task.hands(qpos), strict=True):
            body = data.body(f"vx300s_{arm}/gripper_link")
            assert np.abs(at - body.xpos).max() < 1e-12 and np.abs(turned.ravel() - body.xmat).max() < 1e-12


def test_the_gap_says_whether_hull_and_cube_overlap():
    """Oracle: a linear programme for how large the cube has to be for some mixture of the hull's vertices to lie in it."""
    rng, hull, close = np.random.default_rng(0), AlohaTransfer().hull, 0
    vertices = hull.vertices
    for _ in range(500):
        centre, axes = np.array([0.04, 0, 0]) + rng.uniform(-0.06, 0.06, 3), matrix(_unit(rng.normal(size=4)))
        seen = (vertices - centre) @ axes
        ones = np.ones((3, 1))
        least = linprog([*np.zeros(len(vertices)), 1], np.block([[seen.T, -ones], [-seen.T, -ones]]), np.zeros(6), [[*np.ones(len(vertices)), 0]], [1]).fun
        gap = hull.gap(centre, axes)
        assert (gap <= 0) == (least <= aloha.CUBE), f"gap {gap}, cube {least}"
        close += abs(gap) < 0.005
    assert close > 20


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize("kind", ["expert", "shaken", "knocked", "random"])
def test_stages_are_those_of_the_contacts(kind, handed):
    task, n = AlohaTransfer(), 10
    if kind == "random":
        actions = iter(np.moveaxis(violent_actions(task, n, 200), 1, 0))
        state = roll(task, lambda obs: next(actions), n, 100)
    else:
        state = handed if kind == "expert" else roll(task, with_noise(task, n, 4.0) if kind == "shaken" else knocking(task, n), n, 220)
    qpos = state.qpos.reshape(-1, 23)
    ours, theirs = task.reward(state).ravel(), contact_stages(task.model, qpos)
    agree, stage4 = (ours == theirs).mean(), ((ours == 4) == (theirs == 4)).mean()
    print(f"\n{kind}: {len(qpos)} steps, stages {np.bincount(theirs, minlength=5)}, equal {agree:.5f}, stage 4 equal {stage4:.5f}")
    assert agree >= 0.999 and stage4 >= 0.999
    assert kind == "random" or (np.bincount(theirs, minlength=5)[[0, 2]] > 100).all()


def test_release_asks_the_right_hand_to_be_gone(handed):
    touch, gone = AlohaTransfer().success(handed), AlohaTransfer(release=True).success(handed)
    first, last = touch.argmax(axis=0), gone.argmax(axis=0)
    assert touch.any(axis=0).all() and gone.any(axis=0).all() and (gone <= touch).all()
    assert (last > first + 5).all()  # the gripper has to open
    shown = handed[gone]
    assert not contacts(AlohaTransfer().model, shown.qpos)[:, 2:].any()  # neither finger of the right hand, nor the table
    assert np.linalg.norm(AlohaTransfer().observe(shown)["cube_from_right"], axis=-1).min() > 0.05


def test_batch_equals_single_bit_for_bit():
    task, n, t = AlohaTransfer(), 2, 80
    actions = violent_actions(task, n, t)
    batch = BatchEnv(task, n, threads=2)
    batch.reset(seed=7)
    obs, reward, _, _, info = batch.step_chunk(actions)
    batch.close()
    for i in range(n):
        single = TaskEnv(task)
        single.reset(seed=7 + i)
        for k in range(t):
            o, r, _, _, one = single.step(actions[i, k])
            assert (single.state.qpos[0] == info["qpos"][i, k]).all(), f"step {k}"
            assert all((o[key] == obs[key][i, k]).all() for key in o) and (r, one["height"]) == (reward[i, k], info["height"][i, k])
        single.close()


def test_torch_sees_what_numpy_sees(handed):
    task, state = AlohaTransfer(release=True), handed[::7]
    other = State(*(torch.from_numpy(getattr(state, name)) for name in ("qpos", "qvel", "mocap_pos")))
    obs, result, action = task.observe(state), task.outcome(state), np.random.default_rng(0).uniform(size=(3, 14))
    assert all(torch.allclose(value, torch.from_numpy(obs[key]), atol=1e-6) for key, value in task.observe(other).items())
    theirs = task.outcome(other)
    assert (theirs.reward.numpy() == result.reward).all() and (theirs.success.numpy() == result.success).all()
    assert (task.control(torch.from_numpy(action)).numpy() == task.control(action)).all()
    single = task.outcome(State(*(getattr(other, name).float() for name in ("qpos", "qvel", "mocap_pos"))))
    assert (single.reward.numpy() == result.reward).mean() > 0.99


def test_the_expert_hands_the_cube_over_and_keeps_it():
    task = AlohaTransfer()
    alone = task.metrics(roll(task, task.expert(30, 1).act, 30, 220))["alone"]
    print(f"\nexpert: the left hand alone has it after {np.median(alone.argmax(axis=0)):.0f} steps, at the end in {alone[-1].mean():.3f} of 30 seeds")
    assert alone[-1].mean() >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_expert_over_200_seeds(scale):
    task = AlohaTransfer()
    state = roll(task, with_noise(task, 200, scale), 200, 300)
    outcome = task.outcome(state)
    ever, last = (outcome.reward == 4).any(axis=0).mean(), outcome.reward[-1] == 4
    alone = outcome.metrics["alone"]
    print(f"\nnoise {scale}: stage 4 {ever:.3f}, at the end {last.mean():.3f}; alone {alone.any(axis=0).mean():.3f}, at the end {alone[-1].mean():.3f}")
    assert ever >= 0.99 and alone.any(axis=0).mean() >= 0.97 and last.mean() >= (0.97 if scale == 0 else 0.9)


def test_demonstrations_go_on_after_the_hand_over():
    task = AlohaTransfer(release=True)
    for episode in demonstrations(task, task.expert, 2, batch=2):
        assert 80 < len(episode["action"]) < 250
        gone = np.linalg.norm(episode["cube_from_right"], axis=1) > 0.05
        assert gone[-KEEP:].all() and np.linalg.norm(episode["cube_from_left"][-1]) < 0.02
        assert np.abs(episode["action"][:, [*range(6), *range(7, 13)]] - episode["agent_pos"][:, [*range(6), *range(7, 13)]]).max() < 0.2 + 1e-6


def test_without_the_package_the_pip_line_is_named(monkeypatch):
    monkeypatch.setattr(aloha, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dipole\[aloha\]'"):
        TaskEnv(AlohaTransfer())


@pytest.mark.gl
def test_the_camera_sees_the_cube_all_the_way(gl, handed):
    task = AlohaTransfer()
    images = render.frames(task.model, handed.qpos[::24, 0], handed.mocap_pos[::24, 0], camera=task.camera, size=256).astype(int)
    red = (images[..., 0] > 150) & (images[..., 1] < 60)
    assert (red.sum(axis=(1, 2)) > 15).all()
    assert np.argwhere(red[0])[:, 1].mean() > 128 > np.argwhere(red[-1])[:, 1].mean() - 5  # from the right to the middle
    assert images[:, 0, :, 2].min() > 200  # the sky

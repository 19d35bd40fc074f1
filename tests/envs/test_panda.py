"""The Panda against Franka's numbers, its physics, its expert; and what gymnasium and the batch ask of every task."""

import itertools
import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs.batch import BatchEnv
from envs.collect import demonstrations
from envs.kinematics import matrix
from envs.panda import AREA, CUBE, HIGH, HOME, LOW, OPEN, SPEED, PandaPick, quarter_turn
from envs.simulator import State
from envs.task import TaskEnv

# Franka Control Interface, "Denavit-Hartenberg parameters" (Craig's convention): a, d m, alpha rad; the flange last.
TABLE = [
    (0, 0.333, 0), (0, 0, -np.pi / 2), (0, 0.316, np.pi / 2), (0.0825, 0, np.pi / 2), (-0.0825, 0.384, -np.pi / 2), (0, 0, np.pi / 2),
    (0.088, 0, np.pi / 2), (0, 0.107, 0),
]  # fmt: skip
TORQUE = [87, 87, 87, 87, 12, 12, 12]  # N m


def violent_actions(n: int, t: int, seed: int = 0) -> np.ndarray:
    """Targets anywhere within the robot's ranges, each held for half a second."""
    return np.random.default_rng(seed).uniform([*LOW, 0.0], [*HIGH, OPEN], (n, -(-t // 10), 8)).repeat(10, axis=1)[:, :t]


def expert_run(task: PandaPick, n: int, noise: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Success (n,), the actions executed (n, t, 8) and how many of them belong to the episode (n,)."""
    env, expert, rng = BatchEnv(task, n, threads=1), task.expert(n, 1), np.random.default_rng(0)
    obs, _ = env.reset(seed=seed)
    terminated, actions = np.zeros(n, bool), []
    for _ in range(task.max_steps):
        action = expert.act(obs)
        actions.append(action + noise * rng.normal(size=action.shape) * task.expert_noise)
        obs, _, terminated, truncated, info = env.step(actions[-1])
        if (terminated | truncated).all():
            break
    env.close()
    return terminated, np.stack(actions, axis=1), info["elapsed"]


def every_physics_step(actions: np.ndarray, seed: int = 0) -> State:
    """The states (n, 10 t) that actions (n, t, 8) lead to, one for each 5 ms."""
    task = PandaPick(max_steps=10**6)
    task.substeps = 1
    env = BatchEnv(task, len(actions), threads=1)
    env.reset(seed=seed)
    path = env._simulator.run(np.arange(len(actions)), task.control(actions.repeat(10, axis=1)))  # on past success, which would end an episode
    env.close()
    return path


def depth(model: mujoco.MjModel, qpos: np.ndarray) -> float:
    """How far any two bodies reach into each other at states (t, nq), m."""
    data, worst = mujoco.MjData(model), 0.0
    for row in qpos:
        data.qpos[:] = row
        mujoco.mj_fwdPosition(model, data)
        worst = max([worst, *(-contact.dist for contact in data.contact[: data.ncon])])
    return worst


def gripped(height: float = 0.12) -> tuple[PandaPick, BatchEnv, np.ndarray]:
    """A cube gripped askew and held at this height, in four worlds of cube yaws 0 to 0.3 rad, and the joints (7,) that hold it there."""
    task = PandaPick(max_steps=10**6)
    down = np.diag([1.0, -1.0, -1.0])
    low, high = (task.arm.solve(np.array(HOME), np.array([0.5, 0.0, z]), down, steps=50) for z in (CUBE, height))
    qpos = np.tile([*low, 0.04, 0.04, 0.503, 0.002, CUBE, 1, 0, 0, 0], (4, 1))
    yaw = np.linspace(0, 0.3, 4)
    qpos[:, 12], qpos[:, 15] = np.cos(yaw / 2), np.sin(yaw / 2)
    env = BatchEnv(task, 4, threads=1)
    env.reset(options={"state": State(qpos, np.zeros((4, task.model.nv)), np.tile([0.6, 0.2, 0.0], (4, 1, 1)))})
    for joints, steps in ((low, 25), (high, 40)):
        env.step_chunk(np.tile([*joints, 0.0], (4, steps, 1)))
    return task, env, high


def test_the_arm_is_frankas():
    task = PandaPick()
    rng = np.random.default_rng(0)
    for q in rng.uniform(LOW, HIGH, (50, 7)):
        frame = np.eye(4)
        for (a, d, alpha), angle in zip(TABLE, [*q, 0.0], strict=True):
            ca, sa, c, s = np.cos(alpha), np.sin(alpha), np.cos(angle), np.sin(angle)
            frame = frame @ [[c, -s, 0, a], [s * ca, c * ca, -sa, -d * sa], [s * sa, c * sa, ca, d * ca], [0, 0, 0, 1]]
        turned = np.array([[1, 1, 0], [-1, 1, 0], [0, 0, np.sqrt(2)]]) / np.sqrt(2)  # the hand: 45 degrees about the flange, 103.4 mm to the fingertips
        position, rotation = task.arm.pose(q)
        np.testing.assert_allclose(position, frame[:3, 3] + 0.1034 * frame[:3, 2], rtol=0, atol=1e-9)
        np.testing.assert_allclose(rotation, frame[:3, :3] @ turned, rtol=0, atol=1e-9)
    model = task.model
    assert task.arm.low.tolist() == list(LOW) and task.arm.high.tolist() == list(HIGH)
    assert model.jnt_actfrcrange[:7].tolist() == [[-torque, torque] for torque in TORQUE]
    np.testing.assert_allclose(model.dof_damping[:7], np.array(TORQUE) / SPEED, rtol=1e-2)
    assert sum(model.body(f"link{i}").mass[0] for i in range(1, 8)) == pytest.approx(16.06, abs=0.01)  # kg, of franka_description's links
    np.testing.assert_allclose(task.arm.pose(np.array(HOME))[0], [0.5, 0, 0.2], atol=0.01)


@pytest.mark.gl
def test_gymnasium_finds_nothing_to_warn_of(gl):
    env = gymnasium.make("dipole/PandaPick-v0").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")
        check_env(env)
    env.close()


def test_the_task_says_what_it_promises():
    env = gymnasium.make("dipole/PandaPick-v0").unwrapped
    task = env.task
    assert set(task.units) == set(task.observation_space) | {"action"} and "joints" in task.action_semantics
    obs, info = env.reset(seed=3)
    state = task.reset(3)
    assert env.observation_space.contains(obs) and not info["success"]
    assert info["distance"] == pytest.approx(np.linalg.norm(obs["goal_from_cube"]), abs=1e-6)
    two_axes = task.observe(State.stack([State.stack([state] * 4)] * 2))
    assert all((two_axes[key] == obs[key]).all() and two_axes[key].shape == (2, 4, *obs[key].shape) for key in obs)
    np.testing.assert_allclose(obs["cube_from_hand"], obs["cube"] - obs["hand"], atol=1e-6)
    assert (task.control(np.full((2, 3, 8), 9.0)) == task.action_space.high).all()


def test_the_same_on_torch():
    task = PandaPick()
    env = BatchEnv(task, 3, threads=1)
    env.reset(seed=0)
    path = env.step_chunk(violent_actions(3, 20))[-1]
    env.close()
    state = State(path["qpos"], np.zeros((3, 20, 15)), path["mocap_pos"])
    other = State(*(torch.from_numpy(part) for part in (state.qpos, state.qvel, state.mocap_pos)))
    for key, value in task.observe(state).items():
        got = task.observe(other)[key]
        assert got.dtype == torch.float32 and np.abs(got.numpy() - value).max() < 1e-6, key
    assert np.array_equal(task.outcome(other).success, task.outcome(state).success)
    assert np.array_equal(task.control(torch.from_numpy(violent_actions(3, 20))), task.control(violent_actions(3, 20)))


def test_batch_equals_single_bit_for_bit():
    task, n, t = PandaPick(max_steps=300), 3, 300
    actions = violent_actions(n, t)
    batch = BatchEnv(task, n, threads=2)
    batch.reset(seed=7)
    obs, reward, terminated, truncated, info = batch.step_chunk(actions)
    batch.close()
    for i in range(n):
        single = TaskEnv(task)
        single.reset(seed=7 + i)
        for k in range(t):
            o, r, te, tr, one = single.step(actions[i, k])
            assert (single.state.qpos[0] == info["qpos"][i, k]).all(), f"step {k}"
            assert all((o[key] == obs[key][i, k]).all() for key in o)
            assert (r, te, tr, one["distance"]) == (reward[i, k], terminated[i, k], truncated[i, k], info["distance"][i, k])
        single.close()
    assert truncated[:, -1].all() and np.ptp(info["qpos"], axis=1)[:, :7].max() > 3


def test_starts_have_room():
    task = PandaPick()
    for seed in range(100):
        state = task.reset(seed)
        cube, goal = state.qpos[9:11], state.mocap_pos[0, :2]
        assert all((AREA[0] <= place).all() and (place <= AREA[1]).all() for place in (cube, goal))
        assert np.linalg.norm(cube - goal) > 0.1 and task.observe(state)["hand"][2] > 0.08
        assert not task.success(state)


def test_success_asks_for_place_height_and_release():
    task = PandaPick()
    state = State.stack([task.reset(0)] * 5)
    state.qpos[:, 9:11] = state.mocap_pos[:, 0, :2]
    state.qpos[1, 9] += 0.021  # beside the disc's middle
    state.qpos[2, 11] = 0.05  # held up
    state.qpos[3, 7:9] = 0.02  # still gripped
    state.qpos[4, 10] += 0.019
    assert task.success(state).tolist() == [True, False, False, False, True]
    assert task.reward(state).tolist() == [1, 0, 0, 0, 1]


def test_quarter_turn_tells_yaw_and_not_faces():
    yaw = np.linspace(-3, 3, 40)
    quat = np.stack([np.cos(yaw / 2), 0 * yaw, 0 * yaw, np.sin(yaw / 2)], axis=-1)
    expected = np.stack([np.cos(4 * yaw), np.sin(4 * yaw)], axis=-1)
    faces = [
        np.diag(signs)[:, order]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1.0, -1.0), repeat=3)
        if np.linalg.det(np.diag(signs)[:, order]) > 0
    ]
    assert len(faces) == 24
    for face in faces:
        np.testing.assert_allclose(quarter_turn(matrix(quat) @ face), expected, atol=1e-12)


def test_the_arm_stays_where_it_is_wherever_that_is():
    """Gravity is compensated: for 5 s nothing moves by more than 10 microradians, in twenty postures clear of the table."""
    task = PandaPick()
    rng = np.random.default_rng(0)
    joints = np.array([q for q in rng.uniform(LOW, HIGH, (400, 7)) if depth(task.model, np.array([[*q, 0, 0, 0.9, 0.5, CUBE, 1, 0, 0, 0]])) == 0][:20])
    start = State.stack([task.reset(0)] * 20)
    start.qpos[:, :7], start.qpos[:, 9:11] = joints, [0.8, 0.5]
    env = BatchEnv(task, 20, threads=1)
    env.reset(options={"state": start})
    info = env.step_chunk(np.column_stack([joints, np.full(20, OPEN)])[:, None].repeat(100, axis=1))[-1]
    env.close()
    moved = np.abs(info["qpos"][..., :7] - joints[:, None]).max()
    print(f"\nmoved {moved:.1e} rad")
    assert moved < 1e-5


@pytest.mark.parametrize("joint", range(7))
def test_a_joint_alone_levels_off_at_the_data_sheets_speed(joint):
    """Sent from end to end of what is free of the table, at every physics step; its stops give way by less than half a degree."""
    model, most = PandaPick().model, 0.0
    low, high = np.array(LOW), np.array(HIGH)
    low[[1, 3]], high[[1, 3]] = [-0.8, -2.6], [0.5, -0.5]
    data = mujoco.MjData(model)
    data.qpos[:] = [0, -0.3, 0, -1.6, 0, 1.4, 0.8, 0.04, 0.04, 0.8, 0.5, CUBE, 1, 0, 0, 0]
    data.ctrl[:7] = data.qpos[:7]
    for target in (low, high, low, high):
        data.ctrl[joint] = target[joint]
        for _ in range(400):
            mujoco.mj_step(model, data)
            most = max(most, abs(data.qvel[joint]) / SPEED[joint])
        assert LOW[joint] - 0.008 < data.qpos[joint] < HIGH[joint] + 0.008
    print(f"\njoint {joint + 1}: {most:.3f} of its speed limit")
    assert 0.9 < most < 1.05


def test_a_held_cube_neither_slips_nor_trembles():
    """A second still, after one to come to rest, then 0.4 rad there and back at 0.4 rad/s."""
    task, env, joints = gripped()
    still = env.step_chunk(np.tile([*joints, 0.0], (4, 40, 1)))
    turns = np.column_stack([0.4 * np.sin(np.linspace(0, 2 * np.pi, 100)), *np.zeros((7, 100))])
    swing = env.step_chunk(np.tile(np.array([*joints, 0.0]) + turns, (4, 1, 1)))
    env.close()

    def in_hand(qpos):
        position, rotation = task.arm.pose(qpos[..., :7])
        return ((qpos[..., 9:12] - position)[..., None, :] @ rotation)[..., 0, :]

    rest, after = in_hand(still[-1]["qpos"]), in_hand(swing[-1]["qpos"])
    trembling, slip = np.ptp(rest[:, 20:], axis=1).max(), np.abs(after - rest[:, -1:]).max()
    deepest = max(depth(task.model, each[-1]["qpos"].reshape(-1, 16)) for each in (still, swing))
    print(f"\ntrembles by {1e6 * trembling:.0f} um, slips by {1e3 * slip:.2f} mm, fingers reach {1e3 * deepest:.2f} mm into the cube")
    assert still[-1]["qpos"][:, -1, 11].min() > 0.1, "it was lifted"
    assert np.ptp(swing[-1]["qpos"][..., 0]) > 0.7 and trembling < 1e-4 and slip < 1e-3 and deepest < 2e-3


@pytest.mark.parametrize("noise", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_expert_succeeds(noise):
    task = PandaPick()
    success, actions, elapsed = expert_run(task, 200, noise)
    print(f"\nexpert, noise {noise}: {success.mean():.3f} of 200 seeds, {elapsed.mean():.1f} steps, at most {elapsed[success].max()}")
    assert success.mean() >= 0.99
    assert (actions[..., :7] >= np.array(LOW)).all() and (actions[..., :7] <= np.array(HIGH)).all()


def test_the_expert_keeps_to_the_data_sheet_at_every_physics_step():
    _, actions, elapsed = expert_run(PandaPick(), 20, noise=True)
    path = every_physics_step(actions)
    speed = np.abs(path.qvel[..., :7]).max((0, 1)) / SPEED
    deepest = max(depth(PandaPick().model, path.qpos[i, : 10 * elapsed[i] : 3]) for i in range(20))
    print(f"\nspeeds over limits {speed.round(2)}, bodies reach {1e3 * deepest:.2f} mm into each other")
    assert speed.max() < 0.8 and deepest < 2e-3
    assert (path.qpos[..., :7] > LOW).all() and (path.qpos[..., :7] < HIGH).all()


def test_the_expert_reads_the_phase_off_the_observation():
    """A fresh expert of the same seed in the middle of an episode does what the one that was there all along does."""
    task = PandaPick()
    old, env = task.expert(5, 3), BatchEnv(task, 5, threads=1)
    obs, _ = env.reset(seed=0)
    for _ in range(40):
        action = old.act(obs)
        assert (task.expert(5, 3).act(obs) == action).all()
        obs, *_ = env.step(action)
    env.close()


def test_demonstrations_are_short_and_go_on_after_success():
    task = PandaPick()
    episodes = list(demonstrations(task, task.expert, 10, batch=10))
    assert max(len(episode["action"]) for episode in episodes) < 100
    for episode in episodes:
        left = np.linalg.norm(episode["goal_from_cube"], axis=1)
        assert left[0] > 0.1 and left[-1] < 0.02 and episode["opening"][-1] > 0.055 and episode["action"].shape[1] == 8
        assert np.abs(np.diff(episode["action"][:, :7], axis=0)).max() < 0.2

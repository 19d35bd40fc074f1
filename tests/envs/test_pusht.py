"""The twin against 206 recorded human demonstrations, and its own interface."""

import numpy as np
import pytest

from envs.batch import BatchEnv
from envs.pusht import BARS, GOAL, KEYPOINTS, PushT, to_world
from envs.simulator import Simulator, State

CORNERS = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in BARS]).reshape(8, 2)


def corner_error(vector: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Mean distance (n,) px between the block's corners in two state vectors (n, 5)."""
    return np.linalg.norm(to_world(CORNERS, vector[:, 2:]) - to_world(CORNERS, recorded[:, 2:]), axis=-1).mean(-1)


@pytest.mark.data
def test_reset_gives_the_first_recorded_states(human):
    task = PushT()
    ours = np.stack([task.vector(task.reset(seed)) for seed in range(206)])
    difference = ours - human.state[human.starts]
    difference[:, 4] = (difference[:, 4] + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(difference).max() < 1e-4


@pytest.mark.data
def test_keypoints_are_those_of_the_data(human):
    task = PushT()
    obs = task.observe(task.state(human.state))
    error = np.abs(obs["keypoint"] - human.keypoint).max((1, 2))
    # The recording itself is off by up to 2 px in 58 frames.
    assert np.median(error) < 1e-3 and (error > 0.1).sum() <= 58 and error.max() < 2.1
    np.testing.assert_array_equal(obs["agent_pos"], human.state[:, :2].astype(np.float32))


@pytest.mark.data
def test_eight_steps_from_recorded_states_follow_the_recording(human):
    task, horizon = PushT(), 8
    velocities = human.velocities()
    frames = np.concatenate([np.arange(s, e - horizon, 8) for s, e in zip(human.starts, human.ends, strict=True)])
    frames = frames[corner_error(human.state[frames], human.state[frames + horizon]) > 1]
    actions = human.action[frames[:, None] + np.arange(horizon)]
    simulator = Simulator(task.model, len(frames), substeps=task.substeps)
    worlds = np.arange(len(frames))
    simulator.write(worlds, task.state(human.state[frames], velocity=velocities[frames]))
    ours = task.vector(simulator.run(worlds, task.control(actions))[:, -1])
    simulator.close()
    error = corner_error(ours, human.state[frames + horizon])
    print(f"\n8 steps open loop from {len(frames)} states: mean {error.mean():.3f}, p90 {np.quantile(error, 0.9):.3f} px")
    assert np.abs(ours[:, :2] - human.state[frames + horizon, :2]).max() < 0.2  # a thousandth of what it pushes
    assert error.mean() < 0.2


@pytest.mark.data
def test_replaying_whole_demonstrations_ends_where_they_ended(human):
    task = PushT(success_coverage=2.0)  # never ends early
    length = human.ends - human.starts
    index = np.minimum(human.starts[:, None] + np.arange(length.max()), human.ends[:, None] - 1)
    env = BatchEnv(task, len(length))
    env.reset(options={"state": task.state(human.state[human.starts])})
    *_, info = env.step_chunk(human.action[index])
    env.close()
    each = np.arange(len(length))
    states = task.vector(State(info["qpos"], info["qpos"], info["mocap_pos"]))
    error = corner_error(states[each, length - 2], human.state[human.ends - 1])  # the last state precedes the last action
    final = info["coverage"][each, length - 1]
    p50, p90, p99 = np.quantile(error, [0.5, 0.9, 0.99])
    print(f"\n206 whole replays end {p50:.3f} / {p90:.3f} / {p99:.2f} px (p50/p90/p99) away; final coverage {final.mean():.3f}")
    assert p50 < 0.2 and p90 < 0.5
    assert np.median(final) == pytest.approx(0.894, abs=0.01)  # of the same replays in the original simulator


def test_state_and_vector_are_inverse():
    task, rng = PushT(), np.random.default_rng(0)
    vector = rng.uniform([0, 0, 0, 0, -9], [512, 512, 512, 512, 9], (20, 5))
    state = task.state(vector, velocity=np.full((20, 2), 30.0))
    np.testing.assert_allclose(task.vector(state), vector, atol=1e-9)
    np.testing.assert_allclose(state.qvel[:, :2], np.tile([0.03, -0.03], (20, 1)))


def test_observations_by_hand():
    vector = np.array([10.0, 20.0, 100.0, 200.0, -np.pi / 2])
    task = PushT()
    obs = task.observe(task.state(vector))
    turned = np.stack([KEYPOINTS[:, 1], -KEYPOINTS[:, 0]], axis=-1) + [100, 200]
    np.testing.assert_allclose(obs["keypoint"], turned, atol=1e-3)
    np.testing.assert_allclose(obs["agent_pos"], [10, 20], atol=1e-4)
    state = PushT(obs="state").observe(task.state(vector))["state"]
    np.testing.assert_allclose(state, [10, 20, 100, 200, 1.5 * np.pi], atol=1e-4)
    full = PushT(obs="full").observe(task.state(vector, velocity=np.array([300.0, -70.0])))
    np.testing.assert_allclose(full["velocity"], [300, -70], atol=1e-3)
    assert (full["state"] == state).all()
    with pytest.raises(ValueError, match="'keypoint', 'image', 'state' or 'full'"):
        PushT(obs="pixels")  # type: ignore[arg-type]


def test_reward_is_coverage_over_the_threshold():
    task = PushT(success_coverage=0.9)
    slide = np.array([0.0, 2.0, 10.0])
    poses = GOAL + slide[:, None] * [np.cos(GOAL[2]), np.sin(GOAL[2]), 0.0]
    outcome = task.outcome(task.state(np.column_stack([np.full((3, 2), 50.0), poses])))
    covered = (30 * (120 - slide) + 90 * (30 - slide)) / 6300
    np.testing.assert_allclose(outcome.metrics["coverage"], covered, atol=1e-9)
    np.testing.assert_allclose(outcome.reward, np.minimum(covered / 0.9, 1), atol=1e-9)
    assert outcome.success.tolist() == [True, True, False]


def test_the_finger_pushes_the_block_and_walls_hold_it():
    task = PushT(success_coverage=2.0)
    env = BatchEnv(task, 1, threads=1)
    env.reset(options={"state": task.state(np.array([[256.0, 100.0, 256.0, 200.0, 0.0]]))})
    env.step_chunk(np.tile([256.0, 512.0], (1, 30, 1)))
    x, y, block_x, block_y, _ = task.vector(env.state)[0]
    assert (x, y) == pytest.approx((256, 512), abs=0.1)  # nothing stops the finger
    assert np.abs(block_x - 256) > 1 or block_y > 300  # but it moved the block
    assert to_world(CORNERS, task.vector(env.state)[0, 2:]).max() < 504 + 2

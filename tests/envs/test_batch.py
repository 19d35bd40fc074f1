"""The batch against the single environment, chunks against steps, and what happens when episodes end."""

import numpy as np
import pytest

from envs.batch import BatchEnv
from envs.pusht import GOAL, PushT
from envs.task import Task, TaskEnv
from tests.envs.own import endless, own_tasks, random_actions


@pytest.fixture(params=own_tasks())
def task(request) -> Task:
    return endless(own_tasks()[request.param], 300)


def near_the_goal(task: PushT, far: bool = False) -> np.ndarray:
    """A state vector (5,) the finger, driven down the block's axis, soon pushes past the goal; or one far from it."""
    back = np.array([np.sin(GOAL[2]), -np.cos(GOAL[2])])  # from the bar's outer edge away from the block
    block = GOAL[:2] + 12 * back
    return np.array([*(block + 40 * back), *block, GOAL[2]]) if not far else np.array([50.0, 50.0, 400.0, 150.0, 0.0])


def finishing_batch(threads=2) -> tuple[BatchEnv, np.ndarray]:
    """Two Push-T envs that succeed within 8 steps of the returned actions and one that does not."""
    task = PushT(success_coverage=0.9)
    env = BatchEnv(task, 3, threads=threads)
    env.reset(options={"state": task.state(np.stack([near_the_goal(task), near_the_goal(task, far=True), near_the_goal(task)]))})
    target = GOAL[:2] + 14 * np.array([np.sin(GOAL[2]), -np.cos(GOAL[2])])
    return env, np.tile(target, (3, 8, 1))


def test_batch_equals_single_bit_for_bit(task):
    n, t = 3, 300
    actions = random_actions(task, n, t)
    batch = BatchEnv(task, n, threads=2)
    first, _ = batch.reset(seed=7)
    obs, reward, terminated, truncated, info = batch.step_chunk(actions)
    batch.close()
    for i in range(n):
        single = TaskEnv(task)
        start, _ = single.reset(seed=7 + i)
        assert all((start[key] == first[key][i]).all() for key in start)
        for k in range(t):
            o, r, te, tr, one = single.step(actions[i, k])
            assert (single.state.qpos[0] == info["qpos"][i, k]).all(), f"step {k}"
            assert all((o[key] == obs[key][i, k]).all() for key in o)
            assert (r, te, tr, one["success"]) == (reward[i, k], terminated[i, k], truncated[i, k], info["success"][i, k])
        single.close()
    assert truncated[:, -1].all() and not truncated[:, :-1].any()
    assert np.ptp(info["qpos"], axis=1).max() > 0.05


def test_chunks_equal_steps(task):
    actions = random_actions(task, 4, 24, seed=1)
    chunked, stepped = BatchEnv(task, 4, threads=2), BatchEnv(task, 4, threads=1)
    chunked.reset(seed=3)
    stepped.reset(seed=3)
    for c in range(0, 24, 8):
        obs, *flags, info = chunked.step_chunk(actions[:, c : c + 8])
        for k in range(8):
            o, *f, i = stepped.step(actions[:, c + k])
            assert all((o[key] == obs[key][:, k]).all() for key in o)
            assert all((a == b[:, k]).all() for a, b in zip(f, flags, strict=True))
            assert all((i[key] == info[key][:, k]).all() for key in i if key != "error")


def test_nothing_survives_a_reset(task):
    actions = random_actions(task, 2, 60, seed=2)
    used, fresh = BatchEnv(task, 2), BatchEnv(task, 2)
    used.reset(seed=50)
    used.step_chunk(actions[::-1, :37])
    used.reset(seed=8)
    fresh.reset(seed=8)
    assert (used.step_chunk(actions)[-1]["qpos"] == fresh.step_chunk(actions)[-1]["qpos"]).all()


def test_chunks_equal_steps_when_episodes_end_inside():
    (chunked, actions), (stepped, _) = finishing_batch(), finishing_batch(threads=1)
    obs, reward, terminated, truncated, info = chunked.step_chunk(actions)
    for k in range(8):
        o, r, te, tr, i = stepped.step(actions[:, k])
        assert (o["keypoint"] == obs["keypoint"][:, k]).all()
        assert (r == reward[:, k]).all() and (te == terminated[:, k]).all() and (tr == truncated[:, k]).all()
        assert (i["elapsed"] == info["elapsed"][:, k]).all() and (i["coverage"] == info["coverage"][:, k]).all()


def test_an_episode_that_ends_stands_still():
    env, actions = finishing_batch()
    obs, reward, terminated, _, info = env.step_chunk(actions)
    assert terminated[:, -1].tolist() == [True, False, True]
    last = terminated[0].argmax()
    assert 0 < last < 7, "the test wants an end inside the chunk"
    for rows in (obs["keypoint"][0], info["qpos"][0], info["coverage"][0], info["elapsed"][0]):
        assert (rows[last:] == rows[last]).all() and (rows[last - 1] != rows[last]).any()
    assert reward[0, last] == 1 and (reward[0, last + 1 :] == 0).all() and terminated[0, last:].all()
    assert info["elapsed"][:, -1].tolist() == [last + 1, 8, last + 1]

    obs2, reward2, terminated2, _, info2 = env.step_chunk(np.full((3, 4, 2), 400.0))
    assert (info2["qpos"][0] == info["qpos"][0, -1]).all() and (obs2["keypoint"][0] == obs["keypoint"][0, -1]).all()
    assert (reward2[0] == 0).all() and terminated2[0].all() and info2["success"][0].all()
    assert (info2["qpos"][1, 0] != info["qpos"][1, -1]).any()


def test_a_reset_mask_restarts_only_those():
    env, actions = finishing_batch()
    _, _, _, _, info = env.step_chunk(actions)
    with_mask, _ = env.reset(seed=20, options={"reset_mask": np.array([True, False, False])})
    assert (env.state.qpos[0] == env.task.reset(20).qpos).all()
    assert (env.state.qpos[1:] == info["qpos"][1:, -1]).all()
    assert with_mask["keypoint"].shape == (3, 9, 2)
    _, _, terminated, _, info = env.step_chunk(actions)
    assert terminated[:, 0].tolist() == [False, False, True] and info["elapsed"][:, -1].tolist() == [8, 16, info["elapsed"][2, 0]]


def test_truncation_and_reset_count_per_env():
    env = BatchEnv(PushT(max_steps=6), 2)
    env.reset(seed=0)
    *_, truncated, info = env.step_chunk(random_actions(env.task, 2, 4), active=np.array([True, False]))
    assert info["elapsed"][:, -1].tolist() == [4, 0]
    *_, truncated, info = env.step_chunk(random_actions(env.task, 2, 4))
    assert truncated.tolist() == [[False, True, True, True], [False] * 4]
    assert info["elapsed"].tolist() == [[5, 6, 6, 6], [1, 2, 3, 4]]


def test_inactive_envs_wait_and_their_actions_do_not_matter():
    env, other = BatchEnv(PushT(), 2), BatchEnv(PushT(), 2)
    start, _ = env.reset(seed=5)
    other.reset(seed=5)
    actions = random_actions(env.task, 2, 8)
    waiting = np.where(np.array([True, False])[:, None, None], actions, np.nan)
    obs, reward, terminated, _, _ = env.step_chunk(waiting, active=np.array([True, False]))
    assert (obs["keypoint"][1] == start["keypoint"][1]).all() and (reward[1] == 0).all() and not terminated[1].any()
    env.step_chunk(actions, active=np.array([False, True]))
    other.step_chunk(actions)
    assert (env.state.qpos == other.state.qpos).all()


def test_bad_actions_say_which_env_and_what_was_expected():
    env = BatchEnv(PushT(), 3)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros((3, 2)))
    env.reset(seed=0)
    actions = np.zeros((3, 8, 2))
    actions[1, 4, 0] = np.inf
    with pytest.raises(ValueError, match=r"env 1 is not finite.*\(8, 2\)"):
        env.step_chunk(actions)
    with pytest.raises(ValueError, match=r"\(3, 8, 3\), expected \(3, 8, 2\)"):
        env.step_chunk(np.zeros((3, 8, 3)))
    with pytest.raises(ValueError, match=r"expected \(3, 1, 2\)"):
        env.step(np.zeros((2, 2)))


def test_seeds():
    env = BatchEnv(PushT(), 3)
    counted, _ = env.reset(seed=11)
    listed, _ = env.reset(seed=[13, 12, 11])
    assert (counted["keypoint"] == listed["keypoint"][::-1]).all()
    unseeded, _ = env.reset()
    assert (unseeded["keypoint"] != listed["keypoint"]).any()
    with pytest.raises(ValueError, match="2 seeds for 3 envs"):
        env.reset(seed=[1, 2])
    assert env.observation_space.contains(unseeded) and env.action_space.contains(env.action_space.sample())


def test_a_chunk_of_no_steps_is_refused():
    envs = BatchEnv(PushT(), 2, threads=1)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(2, 0, 2\).*one control step"):
        envs.step_chunk(np.zeros((2, 0, 2)))
    envs.close()

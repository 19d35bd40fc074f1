"""The expert solves the task; with a pillar it has two ways of doing so, with a belt only one moment."""

import numpy as np
import pytest

from envs.batch import BatchEnv
from envs.collect import KEEP, demonstrations
from envs.gantry import Gantry, GantryExpert
from envs.simulator import State
from tests.envs.own import endless


def expert_success(task: Gantry, expert: GantryExpert, n: int, noise: bool) -> float:
    env, rng = BatchEnv(task, n), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    terminated = truncated = np.zeros(n, bool)
    while not (terminated | truncated).all():
        action = expert.act(obs)
        action += noise * rng.normal(size=action.shape) * task.expert_noise
        obs, _, terminated, truncated, _ = env.step(action)
    env.close()
    return terminated.mean()


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("options", "least"), [({}, 0.99), ({"pillar": True}, 0.97), ({"belt": 0.2}, 0.97)])
def test_the_expert_succeeds(options, least, noise):
    task = Gantry(**options)
    rate = expert_success(task, task.expert(200, 1), 200, noise)
    print(f"\nexpert, {options}, noise {noise}: {rate:.3f} of 200 seeds")
    assert rate >= least


@pytest.mark.parametrize(("belt", "least", "most"), [(0.0, 0.95, 1.0), (0.2, 0.0, 0.1)])
def test_on_a_belt_an_expert_that_sees_late_misses_and_elsewhere_it_does_not(belt, least, most):
    class Late(GantryExpert):
        seen: list = []

        def act(self, obs):
            self.seen = [*self.seen, obs][-3:]
            return super().act(self.seen[0])

    task = Gantry(belt=belt)
    rate = expert_success(task, Late(task, 100, 1), 100, noise=False)
    print(f"\nbelt {belt} m/s, seen 0.2 s late: {rate:.2f} of 100 seeds")
    assert least <= rate <= most


def test_the_disc_rides_at_its_speed_and_takes_the_cube_along():
    task = endless(lambda: Gantry(belt=0.2), 100)
    states = State.stack([task.reset(seed) for seed in range(20)])
    velocity = states.qvel[:, -2:].copy()
    assert set(np.round(np.abs(velocity[:, 0]), 9)) == {0.2} and set(np.sign(velocity[:, 0])) == {-1, 1} and not velocity[:, 1].any()
    assert (np.abs(states.qpos[:, 6] - states.qpos[:, -1]) > 0.08).all()  # passing the cube where it lies is no success
    states.qpos[:, 5:8] = np.column_stack([states.qpos[:, -2:], np.full(20, 0.023)])
    states.qvel[:, 5:7] = velocity
    env, start = BatchEnv(task, 20), states.qpos.copy()
    env.reset(options={"state": states})
    for _ in range(20):
        obs, *_ = env.step(np.concatenate([start[:, :3], np.full((20, 1), 0.04)], 1))
    env.close()
    assert np.abs(obs["goal"] - (start[:, -2:] + 2.0 * velocity)).max() < 1e-5
    assert np.abs(obs["goal_from_cube"]).max() < 2e-3 and np.abs(obs["goal_velocity"] - velocity).max() < 1e-5


@pytest.mark.parametrize("options", [{"belt": -0.1}, {"belt": 0.5}, {"belt": float("nan")}, {"belt": "fast"}, {"belt": None}, {"belt": [0.2]},
                                     {"belt": 0.1, "pillar": True}])
def test_a_belt_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="belt"):
        Gantry(**options)


def test_the_straight_way_through_the_pillar_fails():
    class Straight(GantryExpert):
        def _via(self, obs):
            return obs["goal"]

    task = Gantry(pillar=True)
    rate = expert_success(task, Straight(task, 50, 1), 50, noise=True)
    print(f"\ncarrying straight ahead: {rate:.2f} of 50 seeds")
    assert rate <= 0.05


def test_demonstrations_pass_the_pillar_on_both_sides():
    task = Gantry(pillar=True)
    left = []
    for episode in demonstrations(task, task.expert, 200):
        goal, pillar, cube = episode["goal"][0], episode["pillar"][0], episode["cube"][:, :2]
        ahead = goal - pillar
        passing = cube[np.argmin(np.abs((cube - pillar) @ ahead))] - pillar
        left.append(ahead[0] * passing[1] - ahead[1] * passing[0] > 0)
    print(f"\npassed on the left: {np.mean(left):.2f} of {len(left)}")
    assert 0.4 <= np.mean(left) <= 0.6


def test_demonstrations_hold_clean_actions_and_go_on_after_success():
    task = Gantry()
    episodes = list(demonstrations(task, task.expert, 7, batch=4))
    assert [episode["seed"] for episode in episodes] == list(range(10_000, 10_007))
    for episode in episodes:
        steps = len(episode["action"])
        assert {key: value.shape for key, value in episode.items() if key not in ("action", "seed")} == {
            key: (steps, *space.shape) for key, space in task.observation_space.items()
        }
        start = task.observe(task.reset(episode["seed"]))
        assert all((episode[key][0] == start[key]).all() for key in start)
        done = (
            (np.linalg.norm(episode["goal_from_cube"], axis=1) < 0.02)
            & (episode["cube"][:, 2] < 0.03)
            & (episode["opening"][:, 0] > 0.05)
        )
        assert done.argmax() == steps - KEEP  # one step after the successful action
        # Clean: never further from the hand than the fastest expert asks for, which noise would break.
        assert np.linalg.norm(episode["action"][:, :3] - episode["hand"], axis=1).max() < 0.07 + 1e-6
    again = list(demonstrations(task, task.expert, 7, batch=4))
    assert all((a["action"] == b["action"]).all() for a, b in zip(episodes, again, strict=True))


def test_noise_widens_the_states_the_demonstrations_visit():
    task = Gantry()
    clean, noisy = (next(iter(demonstrations(task, task.expert, 1, noise=noise)))["hand"] for noise in (0.0, None))
    assert (clean[0] == noisy[0]).all() and np.abs(clean[5] - noisy[5]).max() > 1e-4


def test_an_expert_that_always_fails_is_reported():
    class Idle:
        def act(self, obs):
            return np.zeros((2, 4))

    with pytest.raises(RuntimeError, match=r"gantry failed from all of seeds 5\.\.6"):
        next(demonstrations(Gantry(max_steps=5), lambda n, seed: Idle(), 1, seed=5, batch=2))


def test_success_asks_for_place_height_and_release():
    task = Gantry()
    state = State.stack([task.reset(0)] * 5)
    state.qpos[:, 5:7] = state.mocap_pos[:, 0, :2]
    state.qpos[1, 5] += 0.021  # beside the disc's middle
    state.qpos[2, 7] = 0.05  # held up
    state.qpos[3, 3:5] = 0.02  # still gripped
    state.qpos[4, 6] += 0.019
    assert task.success(state).tolist() == [True, False, False, False, True]
    assert task.reward(state).tolist() == [1, 0, 0, 0, 1]


def test_a_layout_with_pillar_leaves_room_on_both_sides():
    task = Gantry(pillar=True)
    for seed in range(50):
        state = task.reset(seed)
        goal, pillar = state.mocap_pos[:, :2]
        cube, hand = state.qpos[5:7], state.qpos[:2]
        assert min(np.linalg.norm(point - pillar) for point in (cube, goal, hand)) > 0.1
        assert np.abs([cube, goal, hand]).max() <= 0.17

"""Recording in an environment: the dataset replays to the same episodes."""
import gymnasium
import numpy as np
import pytest

from envs.gantry import Gantry
from envs.record import Record, everything, successes
from envs.task import TaskEnv
from policy.data import Recorder, Store


def episode(env, seed, steps=None, rng=None):
    """Random actions until the end, or so many steps: observations before each, actions, rewards."""
    rng = np.random.default_rng(seed) if rng is None else rng
    obs, _ = env.reset(seed=seed)
    seen, acts, rewards = [], [], []
    while steps is None or len(acts) < steps:
        low, high = (env.action_space.low, env.action_space.high) if isinstance(env.action_space, gymnasium.spaces.Box) else (0, env.action_space.n)
        action = rng.uniform(low, high).astype(np.float32) if isinstance(env.action_space, gymnasium.spaces.Box) else int(rng.integers(low, high))
        seen.append(obs)
        acts.append(action)
        obs, reward, terminated, truncated, _ = env.step(action)
        rewards.append(reward)
        if terminated or truncated:
            break
    return seen, acts, rewards


def test_a_box_environment_is_recorded_as_obs_and_replays(tmp_path):
    with Recorder(tmp_path / "d.zarr", fps=50) as recorder:
        env = Record(gymnasium.make("CartPole-v1"), recorder)
        want = [episode(env, seed) for seed in range(3)]
        episode(env, 3, steps=4)  # cut short: forgotten
    env.close()
    store = Store.open(tmp_path / "d.zarr")
    assert store.episodes == 3
    plain = gymnasium.make("CartPole-v1")
    for i, (seen, acts, rewards) in enumerate(want):
        got = store.episode(i)
        np.testing.assert_array_equal(got["obs"], np.stack(seen))
        assert got["action"].tolist() == acts and got["reward"].tolist() == rewards
        obs, _ = plain.reset(seed=i)
        for k, action in enumerate(got["action"].tolist()):
            np.testing.assert_array_equal(obs, got["obs"][k])
            obs, *_ = plain.step(action)


def test_named_observations_keep_their_names_and_only_successes_are_kept_when_asked(tmp_path):
    class Lucky(gymnasium.Wrapper):
        """Every other episode succeeds, in its second step."""
        count = -1

        def reset(self, **how):
            self.count, self.k = self.count + 1, 0
            return self.env.reset(**how)

        def step(self, action):
            obs, reward, terminated, _, info = self.env.step(action)
            self.k += 1
            return obs, reward, terminated, self.k == 5, {**info, "success": self.count % 2 == 0 and self.k == 2}
    with Recorder(tmp_path / "d.zarr", fps=10) as recorder:
        env = Record(Lucky(TaskEnv(Gantry())), recorder, keep=successes)
        runs = [episode(env, seed) for seed in range(4)]
        env.close()
    store = Store.open(tmp_path / "d.zarr")
    assert store.episodes == 2
    for at, i in enumerate((0, 2)):
        got = store.episode(at)
        assert set(got) == {*runs[i][0][0], "action", "reward"} and len(got["action"]) == 5
        for key in runs[i][0][0]:
            np.testing.assert_array_equal(got[key], np.stack([o[key] for o in runs[i][0]]))
    assert everything({}) and not successes({}) and successes({"is_success": True})


def test_an_environment_that_reuses_its_buffer_is_recorded_as_it_was(tmp_path):
    class Reuses(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-9, 99, (2,)), gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, *, seed=None, options=None):
            self.x = np.zeros(2, np.float32)
            return self.x, {}

        def step(self, action):
            self.x += 1
            return self.x, 0.0, self.x[0] == 4, False, {}
    with Recorder(tmp_path / "d.zarr", fps=10) as recorder:
        episode(Record(Reuses(), recorder), 0)
    assert Store.open(tmp_path / "d.zarr").episode(0)["obs"][:, 0].tolist() == [0, 1, 2, 3]


def test_names_that_a_recording_needs_itself_are_refused():
    class Clash(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict(action=gymnasium.spaces.Box(-1, 1, (1,)))
        action_space = gymnasium.spaces.Box(-1, 1, (1,))
    with pytest.raises(ValueError, match="'action'"):
        Record(Clash(), None)

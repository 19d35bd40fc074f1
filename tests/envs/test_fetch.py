"""The Fetch adapter: the original's starts, numbers and success under our names, and experts that solve three of its tasks."""

import os
import subprocess
import sys

import numpy as np
import pytest

from envs import fetch
from envs.fetch import Fetch
from tests.envs import contract

TARGET = "envs.fetch:Fetch"


@pytest.fixture(scope="module")
def original():
    pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed: pip install dipole[robotics]")
    return lambda module, name: getattr(fetch.robotics(f"fetch.{module}"), name)()


@pytest.mark.parametrize("task", ["reach", "pick_and_place"])
def test_gymnasium_finds_nothing_to_warn_of(original, task):
    contract.gymnasium_finds_nothing(TARGET, {"task": task})


@pytest.mark.parametrize("task", ["push", pytest.param("slide", marks=pytest.mark.slow), pytest.param("reach", marks=pytest.mark.slow)])
def test_starts_are_functions_of_the_seed(original, task):
    contract.starts_are_functions_of_the_seed(TARGET, {"task": task}, 50)


def test_it_is_the_original_under_other_names(original):
    env, theirs = Fetch(), original("pick_and_place", "MujocoFetchPickAndPlaceEnv")
    raw, _ = theirs.reset(seed=5)
    obs, info = env.reset(seed=5)
    assert not info["success"]
    rng = np.random.default_rng(0)
    for _ in range(30):
        named = [obs[key] for key in fetch.OBJECT]
        np.testing.assert_allclose(np.concatenate([*named, obs["goal"]]), np.concatenate([raw["observation"], raw["desired_goal"]]), atol=1e-6)
        np.testing.assert_allclose(obs["goal_from_object"], raw["desired_goal"] - raw["achieved_goal"], atol=1e-6)
        action = rng.uniform(-1, 1, 4)
        raw, reward, _, _, said = theirs.step(action)
        obs, ours, terminated, _, info = env.step(action)
        assert ours == reward and info["success"] == terminated == bool(said["is_success"])
        assert info["distance"] == pytest.approx(np.linalg.norm(raw["achieved_goal"] - raw["desired_goal"]))


def test_success_ends_an_episode_and_the_limit_cuts_one(original):
    env = Fetch(task="reach", max_steps=3)
    obs, info = env.reset(seed=1)
    while not info["success"]:
        obs, reward, terminated, _, info = env.step(env.expert(1)(obs))
    assert terminated and reward == 0 and info["distance"] < 0.05
    env.reset(seed=1)
    assert [env.step(np.zeros(4))[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]


@pytest.mark.parametrize("task, steps", [("reach", 8), ("pick_and_place", 40), ("push", 50)])
def test_experts_succeed_in_spite_of_noise(original, task, steps):
    env = Fetch(task=task)
    rate, lengths = contract.success_rate(env, range(10_000, 10_010), env.expert_noise)
    assert rate == 1 and max(lengths) <= steps


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reach", "pick_and_place", "push"])
def test_experts_succeed_on_two_hundred_seeds(original, task):
    rate, lengths = contract.success_rate(Fetch(task=task), range(100_000, 100_200))
    print(f"\nfetch {task}: {rate:.3f} of 200 seeds, {np.mean(lengths):.1f} steps, at most {max(lengths)}")
    assert rate >= 0.99


@pytest.mark.gl
def test_it_draws_the_goal_where_it_is(original, gl):
    env = Fetch(render_mode="rgb_array", size=96)
    env.reset(seed=3)
    red = []
    for offset in (0.0, 0.15):
        env._world.goal = env._world.goal + [0, 0, offset]
        frame = env.render().astype(int)
        rows, _ = np.nonzero((frame[..., 0] > 150) & (frame[..., 1:].max(-1) < 60))
        red.append(rows.mean())
    assert frame.shape == (96, 96, 3) and red[1] < red[0] - 5
    env.close()


def test_mistakes_are_answered(original, monkeypatch):
    with pytest.raises(ValueError, match=r"no task 'lift'; it has: reach, push, slide, pick_and_place"):
        Fetch(task="lift")
    with pytest.raises(NotImplementedError, match=r"env\.task=push"):
        Fetch(task="slide").expert(0)
    monkeypatch.setattr("envs.adapter.version", lambda package: {"mujoco": "3.12.0"}[package])
    with pytest.raises(ValueError, match=r"does not work with mujoco 3.12.0: pip install 'mujoco<3.12'"):
        Fetch()


def test_without_gymnasium_robotics_the_error_says_what_to_install(monkeypatch):
    for module in ("gymnasium_robotics", "gymnasium_robotics.envs", "gymnasium_robotics.envs.fetch", "gymnasium_robotics.envs.fetch.pick_and_place"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'dipole\[robotics\]'"):
        Fetch()


def test_importing_the_module_needs_no_gymnasium_robotics():
    code = "import sys, envs.fetch; sys.exit('gymnasium_robotics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0

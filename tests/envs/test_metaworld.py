"""The Meta-World adapter: starts that depend on the seed alone, Meta-World's numbers under our names, its experts."""

import importlib.metadata
import os
import subprocess
import sys

import numpy as np
import pytest

from envs import render  # before mujoco: it chooses the OpenGL back end
from envs.metaworld import FRAME, MetaWorld
from tests.envs import contract

WHY = "Meta-World is not installed: pip install dipole[metaworld]"
TARGET = "envs.metaworld:MetaWorld"


@pytest.fixture(scope="module")
def worlds():
    pytest.importorskip("metaworld", reason=WHY)
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    return ALL_V3_ENVIRONMENTS


@pytest.mark.parametrize("task", ["pick-place-v3", "stick-pull-v3"])
def test_gymnasium_finds_nothing_to_warn_of(worlds, task):
    contract.gymnasium_finds_nothing(TARGET, {"task": task})


def test_starts_are_functions_of_the_seed(worlds):
    contract.starts_are_functions_of_the_seed(TARGET, {"task": "peg-insert-side-v3"})


@pytest.mark.slow
def test_all_fifty_tasks_start_and_go_on_from_the_seed_alone(worlds):
    """The box, drawer or peg that an earlier episode moved must not be met again: compare with a fresh process."""
    tasks = sorted(worlds)
    assert len(tasks) == 50
    elsewhere = contract.fingerprints_elsewhere(TARGET, [{"task": task} for task in tasks], 100_003)
    for task, expected in zip(tasks, elsewhere, strict=True):
        env = MetaWorld(task=task)
        for seed in range(3):
            contract.fingerprint(env, seed, 30)
        assert contract.fingerprint(env, 100_003) == expected, task


def test_observations_are_metaworlds_under_other_names(worlds):
    """Fifty steps beside the original: same goal and start, same numbers."""
    env, original = MetaWorld(task="hammer-v3"), worlds["hammer-v3"]()
    original._set_task_called, original._partially_observable, original._freeze_rand_vec, original.seeded_rand_vec = True, False, False, True
    original.__dict__.pop("sawyer_observation_space", None)
    original.seed(11)
    flat, _ = original.reset()
    obs, _ = env.reset(seed=11)
    rng = np.random.default_rng(0)
    for _ in range(50):
        both = [np.concatenate([obs[key] for key in (*FRAME, "previous", "goal")]), flat]
        np.testing.assert_allclose(*both, atol=1e-6)
        np.testing.assert_allclose(obs["object1_from_hand"], obs["object1"] - obs["hand"], atol=1e-6)
        np.testing.assert_allclose(obs["goal_from_object1"], obs["goal"] - obs["object1"], atol=1e-6)
        np.testing.assert_allclose(obs["object2_from_object1"], obs["object2"] - obs["object1"], atol=1e-6)
        action = rng.uniform(-1, 1, 4)
        flat, reward, *_ = original.step(action)
        obs, ours, *_ = env.step(action)
        assert ours == pytest.approx(reward, abs=1e-9)


def test_the_first_observation_shows_the_object_where_it_is(worlds):
    """The original's shows a drawer where the draw before had put it, up to 10 cm away, until the first step."""
    for task in ("drawer-open-v3", "window-open-v3", "lever-pull-v3"):
        env = MetaWorld(task=task)
        before, _ = env.reset(seed=5)
        after, *_ = env.step(np.zeros(4))
        assert np.abs(after["object1"] - before["object1"]).max() < 2e-3, task


def test_success_ends_an_episode_and_the_limit_cuts_one(worlds):
    env = MetaWorld(task="reach-v3")
    obs, info = env.reset(seed=3)
    act = env.expert(3)
    assert info == {"success": False}
    for _ in range(100):
        obs, _, terminated, truncated, info = env.step(act(obs))
        if terminated:
            break
    assert info["success"] and not truncated and np.linalg.norm(obs["goal"] - obs["hand"]) < 0.06
    env = MetaWorld(task="reach-v3", max_steps=2)
    env.reset(seed=3)
    ends = [env.step(np.zeros(4))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, True), (False, True)]


def test_its_expert_opens_the_drawer(worlds):
    rate, lengths = contract.success_rate(MetaWorld(task="drawer-open-v3"), range(10_000, 10_005), 0.1)
    assert rate == 1 and max(lengths) < 110


EXPERTS = {
    "reach": 0.98, "push": 0.95, "pick-place": 0.98, "drawer-open": 0.98, "button-press-topdown": 0.98, "window-open": 0.98, "assembly": 0.95,
    "stick-pull": 0.9, "hammer": 0.95, "door-open": 0.85, "peg-insert-side": 0.75, "basketball": 0.7,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("task", EXPERTS)
def test_experts_succeed(worlds, task):
    rate, lengths = contract.success_rate(MetaWorld(task=f"{task}-v3"), range(100_000, 100_050))
    print(f"\n{task}: {rate:.2f} of 50 seeds, {np.mean(lengths):.0f} steps, at most {max(lengths)}")
    assert rate >= EXPERTS[task]


@pytest.mark.slow
@pytest.mark.gl
def test_it_draws(worlds, gl):
    with pytest.raises(ValueError, match="rgb_array"):
        MetaWorld(render_mode="human")
    env = MetaWorld(render_mode="rgb_array", size=64)
    with pytest.raises(RuntimeError, match="call reset"):
        env.render()
    env.reset(seed=0)
    first = env.render()
    for _ in range(20):
        env.step(np.array([1.0, 1.0, -1.0, 1.0]))
    assert first.shape == (64, 64, 3) and first.std() > 10 and (env.render() != first).any()
    env.close()


def test_mistakes_are_answered(worlds, monkeypatch):
    with pytest.raises(ValueError, match=r"no task 'pick-place'; it has: assembly-v3, "):
        MetaWorld(task="pick-place")
    env = MetaWorld()
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(4))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.array([0, 0, np.nan, 0]))
    monkeypatch.setattr("envs.adapter.version", lambda package: {"mujoco": "3.17.0"}[package])
    with pytest.raises(ValueError, match=r"metaworld\S* does not work with mujoco 3.17.0: pip install 'mujoco<3.17'"):
        MetaWorld()


def test_without_metaworld_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(ImportError, match=r"pip install 'dipole\[metaworld\]'") as raised:
        MetaWorld()
    assert raised.value.name == "metaworld"
    assert importlib.metadata.version("mujoco")


def test_importing_the_module_needs_no_metaworld():
    code = "import sys, envs.metaworld; sys.exit('metaworld' in sys.modules or 'gymnasium_robotics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


@pytest.mark.gl
def test_pictures_stand_upright(worlds, gl):
    """Beside MuJoCo's free camera, whose up is up, from the same place."""
    env = MetaWorld(task="drawer-open-v3", render_mode="rgb_array", size=64)
    env.reset(seed=3)
    model, data = env._scene()
    place, forward = data.camera(env.camera).xpos, -data.camera(env.camera).xmat.reshape(3, 3)[:, 2]
    import mujoco
    free = mujoco.MjvCamera()
    free.lookat, free.distance = place + forward, 1.0
    free.azimuth, free.elevation = np.degrees([np.arctan2(forward[1], forward[0]), np.arcsin(forward[2])])
    upright = render.frames(model, data.qpos[None], data.mocap_pos[None], camera=free, size=64)[0]
    seen, rolled = env.render(), env.render()[::-1, ::-1]
    assert np.corrcoef(upright.ravel(), seen.ravel())[0, 1] > np.corrcoef(upright.ravel(), rolled.ravel())[0, 1] + 0.2
    env.close()

"""The robosuite adapter: robomimic's observations, starts from the seed, recorded states that are successes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs.robosuite import TASKS, Robosuite
from tests.envs import contract

TARGET = "envs.robosuite:Robosuite"
OBJECT = {"lift": 10, "can": 14, "square": 14, "tool_hang": 44, "transport": 41}  # robomimic's sizes
DATA = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="module")
def suite():
    import importlib.util

    if importlib.util.find_spec("robosuite") is None:  # importing it takes seconds and prints advice
        pytest.skip("robosuite is not installed: pip install --no-deps robosuite==1.5.2, see pyproject.toml")


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_it_keeps_the_contract(suite, task):
    contract.gymnasium_finds_nothing(TARGET, {"task": task})
    contract.starts_are_functions_of_the_seed(TARGET, {"task": task}, 10)
    env = Robosuite(task=task)
    sizes = {key: space.shape[0] for key, space in env.observation_space.spaces.items()}
    arm = {f"robot{i}_{part}": n for i in range(TASKS[task][1]) for part, n in (("eef_pos", 3), ("eef_quat", 4), ("gripper_qpos", 2))}
    assert sizes == {**arm, "object": OBJECT[task]} and env.max_steps == TASKS[task][2] and env.metadata["render_fps"] == 20


@pytest.mark.slow
def test_deltas_move_the_hands_along_the_worlds_axes(suite):
    """Transport's arms face each other, so their own frames would send them in opposite directions."""
    env = Robosuite(task="transport")
    for axis in range(3):
        before, _ = env.reset(seed=0)
        delta = np.append(0.5 * np.eye(3)[axis], np.zeros(4))
        for _ in range(8):
            after, *_ = env.step(np.append(delta, delta))
        for arm in ("robot0", "robot1"):
            moved = after[f"{arm}_eef_pos"] - before[f"{arm}_eef_pos"]
            assert moved[axis] > 0.035 and np.abs(np.delete(moved, axis)).max() < 0.01
            assert np.abs(np.linalg.norm(after[f"{arm}_eef_quat"]) - 1) < 1e-4


@pytest.mark.slow
def test_lifting_the_cube_is_success(suite):
    env = Robosuite(task="lift", max_steps=2)
    env.reset(seed=0)
    joint = env._world.cube.joints[0]
    for height, won in ((0.0, False), (0.1, True)):
        pose = env._world.sim.data.get_joint_qpos(joint).copy()
        pose[2] += height
        env._world.sim.data.set_joint_qpos(joint, pose)
        obs, reward, terminated, truncated, info = env.step(np.zeros(7))
        assert (terminated, info["success"], reward == 1) == (won, won, won)
    np.testing.assert_allclose(obs["object"][:3], env._world.sim.data.body_xpos[env._world.cube_body_id], atol=1e-2)
    assert truncated


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("folder, task", [("lift", "lift"), ("pick-place", "can"), ("nut-assembly", "square")])
def test_the_end_of_a_recorded_demonstration_is_success(suite, folder, task):
    h5py = pytest.importorskip("h5py", reason="reading the recordings needs h5py")
    path = DATA / "robosuite_1.0.0" / folder / "panda" / "demo.hdf5"
    if not path.exists():
        pytest.skip(f"{path} is not there; set DIPOLE_DATA to the folder that holds robosuite_1.0.0")
    with h5py.File(path) as file:
        states = file["data/demo_1/states"][:]
    env, won = Robosuite(task=task), []
    for state in (states[0], states[-1]):
        _, info = env.reset(seed=0)
        assert not info["success"]
        env._world.sim.set_state_from_flattened(state)
        env._world.sim.forward()
        obs, _, terminated, _, info = env.step(np.append(np.zeros(6), 1.0))
        won.append(info["success"])
        assert terminated == info["success"] and all(np.isfinite(value).all() for value in obs.values())
    assert won == [False, True]


@pytest.mark.slow
@pytest.mark.gl
def test_it_draws(suite, gl):
    env = Robosuite(render_mode="rgb_array", size=64)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (64, 64, 3) and frame.std() > 10
    env.close()


def test_mistakes_are_answered(monkeypatch):
    with pytest.raises(ValueError, match="'stack' is not set up here; use lift, can, square, tool_hang, transport"):
        Robosuite(task="stack")
    monkeypatch.setattr("envs.adapter.version", lambda package: {"mujoco": "4.0.0"}[package])
    with pytest.raises(ValueError, match=r"robosuite does not work with mujoco 4\.0\.0: pip install 'mujoco>=3\.3,<3\.10'"):
        Robosuite()


def test_without_robosuite_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(ImportError, match=r"pip install --no-deps robosuite==1\.5\.2"):
        Robosuite()


def test_importing_the_module_needs_no_robosuite():
    code = "import sys, envs.robosuite; sys.exit('robosuite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0

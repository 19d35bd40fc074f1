"""What gymnasium asks of every environment, and drawing."""

import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs.batch import BatchEnv
from envs.gantry import Gantry
from envs.pusht import PushT, to_world
from envs.simulator import State
from envs.task import TaskEnv

CASES = [("PushT", {}), ("PushT", {"obs": "state"}), ("PushT", {"obs": "full"}), ("Gantry", {}), ("Gantry", {"pillar": True})]


@pytest.mark.gl
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gymnasium_finds_nothing_to_warn_of(gl, name, options):
    env = gymnasium.make(f"dipole/{name}-v0", **options).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # A recommendation for policies without a normaliser; robots take px and metres.
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")
        check_env(env)
    env.close()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_task_says_what_it_promises(name, options):
    env = gymnasium.make(f"dipole/{name}-v0", **options).unwrapped
    task = env.task
    assert set(task.units) == set(task.observation_space) | {"action"} and task.action_semantics
    state = task.reset(3)
    assert all((getattr(state, part) == getattr(task.reset(3), part)).all() for part in ("qpos", "qvel", "mocap_pos"))
    obs, info = env.reset(seed=3)
    assert env.observation_space.contains(obs) and not info["success"]
    assert task.observe(task.reset(3)).keys() == obs.keys()
    two_axes = task.observe(State.stack([State.stack([state] * 4)] * 2))
    assert all((two_axes[key] == obs[key]).all() and two_axes[key].shape == (2, 4, *obs[key].shape) for key in obs)


def test_seeded_and_unseeded_resets():
    env = TaskEnv(PushT())
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(2))
    env.reset(seed=4)
    assert (env.state.qpos[0] == env.task.reset(4).qpos).all()
    first, _ = env.reset()
    second, _ = env.reset()
    assert (first["keypoint"] != second["keypoint"]).any()
    state = env.task.state(np.array([256.0, 100.0, 256.0, 256.0, np.pi / 4]))
    _, info = env.reset(options={"state": state})
    assert info["success"] and info["coverage"] == pytest.approx(1)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.array([np.nan, 0.0]))


def test_a_task_without_an_expert_says_so():
    with pytest.raises(NotImplementedError, match="pusht has no scripted expert"):
        PushT().expert(1, 0)


@pytest.mark.gl
def test_pusht_is_drawn_the_right_way_up(gl):
    """Every pixel at a finger, block and goal position has its colour; x to the right, y down, as the data's images."""
    task = PushT()
    vector = np.array([400.0, 60.0, 100.0, 300.0, 0.7])
    state = task.state(vector[None])
    env = BatchEnv(task, 1)
    image = env.render_states(state.qpos, state.mocap_pos, size=512)[0].astype(int)
    env.close()
    assert image.shape == (512, 512, 3)

    def colour(x, y):
        return image[round(y), round(x)]

    red, green, blue = colour(400, 60)
    assert blue > 200 and blue > 2 * red
    stem = to_world(np.array([[0.0, 110.0], [-50.0, 15.0], [50.0, 15.0]]), vector[2:])
    for x, y in stem:
        red, green, blue = colour(x, y)
        assert red < green < blue < 220, (x, y)
    red, green, blue = colour(256 - 60, 256 + 60)  # the goal's stem points down and left
    assert green > 200 and green > 1.3 * red
    assert (colour(320, 400) > 240).all()


@pytest.mark.gl
@pytest.mark.parametrize("task", [PushT(), Gantry(pillar=True)], ids=["pusht", "gantry"])
def test_single_and_batch_draw_the_same(gl, task):
    single, batch = TaskEnv(task, render_mode="rgb_array", size=64), BatchEnv(task, 2)
    single.reset(seed=1)
    _, info = batch.reset(seed=1)
    frames = batch.render_states(info["qpos"], info["mocap_pos"], size=64)
    assert frames.shape == (2, 64, 64, 3) and frames.dtype == np.uint8
    assert (single.render() == frames[0]).all() and (frames[0] != frames[1]).any()
    single.close()
    batch.close()


@pytest.mark.gl
def test_leaving_without_closing_frees_the_renderer_silently(gl):
    code = """
import atexit, envs, gymnasium
from envs import render
atexit.register(lambda: print(render._renderer.cache_info().currsize, "left"))  # exit hooks: last in, first out
env = gymnasium.make("dipole/PushT-v0", render_mode="rgb_array")
env.reset(seed=0)
env.render()
print(render._renderer.cache_info().currsize, "drawing")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 drawing\n0 left\n", "")

"""Push-T seen as pictures: against the recorded ones, and what observing costs."""

import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import render  # envs before mujoco: it chooses the OpenGL back end
from envs.batch import BatchEnv
from envs.gantry import Gantry
from envs.pusht import GOAL, PushT
from envs.task import TaskEnv
from policy.data.store import Store

import mujoco  # isort: skip


@pytest.mark.gl
@pytest.mark.data
def test_pictures_are_those_recorded_with_the_original(gl, human):
    """pygame draws other edges than OpenGL, so some pixels of an outline differ; the same frame one step later differs more."""
    task, rows = PushT(obs="image"), np.random.default_rng(0).choice(human.ends[-1] - 1, 100, replace=False)
    rows = rows[np.linalg.norm(human.state[rows + 1, :2] - human.state[rows, :2], axis=-1) > 3]
    recorded = np.stack([human.image[int(row)] for row in rows])
    drawn, later = (task.observe(task.state(human.state[at]))["image"].astype(float) for at in (rows, rows + 1))
    difference, moved = (np.abs(each - recorded).mean((1, 2, 3)) for each in (drawn, later))
    assert len(rows) > 40 and difference.mean() < 0.25 and difference.max() < 0.7
    assert (np.abs(drawn - recorded).max(-1) > 32).mean() < 0.002
    assert (moved > difference).mean() > 0.97


@pytest.mark.gl
def test_an_observed_picture_is_what_mujoco_draws(gl):
    """Whatever was drawn before, of another size or another model."""
    task, gantry = PushT(obs="image"), Gantry()
    starts = [task.reset(seed) for seed in range(3)]
    for other, state in ((gantry, gantry.reset(0)), (task, starts[0])):
        render.frames(other.model, state.qpos[None], state.mocap_pos[None], camera=other.camera, size=64)
    task.model.vis.quality.offsamples = 0
    renderer = mujoco.Renderer(task.model, 96, 96)
    for state in starts:
        data = mujoco.MjData(task.model)
        data.qpos[:] = state.qpos
        mujoco.mj_forward(task.model, data)
        renderer.update_scene(data, camera="top")
        assert (renderer.render() == task.observe(state)["image"]).all()
    renderer.close()
    assert task.model.vis.global_.offwidth == 1024  # as the MJCF says


@pytest.mark.gl
def test_gymnasium_finds_nothing_to_warn_of(gl):
    env = gymnasium.make("dipole/PushT-v0", obs="image").unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")
        check_env(env)
    assert env.observation_space["image"].dtype == np.uint8 and set(env.task.units) == {"image", "agent_pos", "action"}
    env.close()


@pytest.mark.gl
def test_single_and_batch_see_the_same(gl):
    task = PushT(obs="image")
    batch, singles = BatchEnv(task, 3, threads=2), [TaskEnv(task) for _ in range(3)]
    actions = np.random.default_rng(0).uniform(0, 512, (3, 4, 2))
    first, _ = batch.reset(seed=[5, 3, 9])
    obs, *_ = batch.step_chunk(actions, last=2)
    for i, (single, seed) in enumerate(zip(singles, (5, 3, 9), strict=True)):
        seen = [single.reset(seed=seed)[0]] + [single.step(action)[0] for action in actions[i]]
        assert (seen[0]["image"] == first["image"][i]).all() and len({each["image"].tobytes() for each in seen}) == 5
        assert all((seen[3 + k][key] == obs[key][i, k]).all() for k in range(2) for key in obs)
        assert all(single.observation_space.contains(each) for each in seen)
    batch.close()


@pytest.mark.gl
def test_pictures_are_recorded_as_they_are(gl, tmp_path):
    task = PushT(obs="image")
    env = BatchEnv(task, 1)
    env.reset(seed=0)
    episode = {key: value[0] for key, value in env.step_chunk(np.full((1, 5, 2), 200.0))[0].items()}
    schema = {key: (space.shape, space.dtype) for key, space in task.observation_space.items()}
    store = Store.create(tmp_path / "pictures.zarr", schema, fps=task.fps, units=task.units)
    store.append(episode)
    back = Store.open(tmp_path / "pictures.zarr").episode(0)
    assert back["image"].dtype == np.uint8 and all((back[key] == episode[key]).all() for key in episode)
    env.close()


def test_without_opengl_the_error_says_what_to_do():
    code = "from envs.batch import BatchEnv; from envs.pusht import PushT; BatchEnv(PushT(obs='image'), 3).reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, "MUJOCO_GL": "disable"})
    assert done.returncode == 1 and "`dipole doctor` says how to get an OpenGL backend" in done.stderr.splitlines()[-1]


class Counting(PushT):
    """Counts the states it observes."""

    seen = 0

    def observe(self, state):
        self.seen += state.qpos[..., 0].size
        return super().observe(state)


@pytest.mark.parametrize("last", [1, 2, 8, 50])
def test_the_last_observations_are_those_of_a_whole_chunk(last):
    """Three episodes: one that succeeds inside the chunk, one that is truncated there, one that goes on."""
    task = Counting(success_coverage=0.9, max_steps=20)
    back = np.array([np.sin(GOAL[2]), -np.cos(GOAL[2])])
    near = np.array([*(GOAL[:2] + 52 * back), *(GOAL[:2] + 12 * back), GOAL[2]])
    starts = task.state(np.stack([near, [50.0, 50.0, 400.0, 150.0, 0.0], [60.0, 50.0, 300.0, 150.0, 0.0]]))
    whole, part = BatchEnv(task, 3, threads=1), BatchEnv(task, 3, threads=1)
    actions = np.tile(GOAL[:2] + 14 * back, (3, 16, 1))
    for env in (whole, part):
        env.reset(options={"state": starts})
        env.step_chunk(actions[:, :12], active=np.array([False, True, False]))
    expected, *_, info = whole.step_chunk(actions)
    task.seen = 0
    obs, *_, same = part.step_chunk(actions, last=last)
    ends = info["elapsed"][:, -1] - [0, 12, 0]
    assert 0 < ends[0] < 8 and ends[1] == 8 and ends[2] == 16
    assert task.seen == sum(min(end, max(1, end - (16 - min(last, 16)))) for end in ends)
    for key, value in obs.items():
        assert value.shape[1] == min(last, 16) and (value == expected[key][:, -last:]).all()
    assert all((same[key] == info[key]).all() for key in info if key != "error")
    assert all((a == b).all() for a, b in zip(whole.step_chunk(actions)[0].values(), part.step_chunk(actions)[0].values(), strict=True))


def test_no_observation_at_all_is_refused():
    env = BatchEnv(PushT(), 1, threads=1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="last=0 must be at least 1"):
        env.step_chunk(np.zeros((1, 2, 2)), last=0)


def test_the_last_good_observation_of_a_failing_world_may_lie_before_the_last():
    class Breaks(PushT):
        def observe(self, state):
            obs = super().observe(state)
            return {**obs, "agent_pos": np.where(obs["agent_pos"] > 300, np.nan, obs["agent_pos"])}

    start = PushT().state(np.array([[200.0, 50.0, 400.0, 400.0, 0.0], [200.0, 60.0, 400.0, 400.0, 0.0]]))
    actions = np.stack([np.linspace([200, 50], [500, 50], 16), np.linspace([200, 60], [100, 60], 16)])
    whole, part = BatchEnv(Breaks(), 2, threads=1), BatchEnv(Breaks(), 2, threads=1)
    for env in (whole, part):
        env.reset(options={"state": start})
    expected, *_, told = whole.step_chunk(actions)
    obs, *_, info = part.step_chunk(actions, last=2)
    assert "not finite" in info["error"][0] and info["error"][1] is None and told["error"][0] == info["error"][0]
    assert all((obs[key] == expected[key][:, -2:]).all() for key in obs) and obs["agent_pos"][0, -1, 0] > 250

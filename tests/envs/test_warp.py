"""mujoco_warp against MuJoCo: one control step from equal states, whole episodes, the batch's rules, room that grows, faults.

All of it runs on warp's CPU device; where there is a GPU the same tests run there.
"""

import importlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mujoco_warp", reason="pip install dipole[warp]")

from envs.batch import BatchEnv
from envs.gantry import Gantry
from envs.maze import Maze
from envs.pusht import PushT
from envs.simulator import State
from envs.task import Task
from envs.warp import WarpEnv, closed_loop
from envs.worlds import Room
from policy.control import Controller
from policy.rollout import evaluate
from policy.types import Spec
from tests.envs.own import endless, flat, own_tasks, played, random_actions
from tests.envs.test_batch import finishing_batch

# How far a coordinate is off, m or rad, after one control step from equal states: rounding in the median and in 9 of 10, and in the steps
# in which mujoco_warp finds other contacts than MuJoCo, whose share is `other`.
ROUNDING = {"median": 1e-6, "most": 1e-5, "other": 0.01}
TOLERANCE = {
    "gantry-pillar": {"other": 0.05},  # between pillar and hand no contact is found before they are about 10 um into each other
    # Nor between a box and a mesh, and gym-aloha's contacts are so hard that the cube lies 0.1 um deep: it jitters. The arms' joints keep to ROUNDING.
    "aloha_transfer": {"median": 5e-4, "most": 5e-3, "other": 1.0},
}
# In the median world during 300 steps, others 1e-4. Random play knocks ALOHA's arms together and its cube about: nothing to hold it to.
ALONE = {"gantry": 1e-3, "gantry-pillar": 1e-3, "gantry-belt": 1e-3, "aloha_transfer": np.inf}
FAST = {"pusht", "maze"}
TASKS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in own_tasks()]


def numpy_of(value: Any) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


@pytest.mark.parametrize("name", TASKS)
def test_one_control_step_from_equal_states(name):
    t, (states, actions) = 300, played(name, 300)
    env = WarpEnv(endless(own_tasks()[name], t), 4 * t)
    env.reset(options={"state": flat(State(states.qpos[:, :-1], states.qvel[:, :-1], states.mocap_pos[:, :-1]))})
    obs, *_, info = env.step(actions.reshape(4 * t, -1))
    assert info["error"].tolist() == [None] * (4 * t)
    wrong = np.abs(numpy_of(info["qpos"]) - states.qpos[:, 1:].reshape(4 * t, -1))
    seen = {"median": np.median(wrong.max(1)), "most": np.quantile(wrong.max(1), 0.9), "other": (wrong.max(1) > 1e-4).mean(), "max": wrong.max()}
    print(name, {key: f"{value:.2g}" for key, value in seen.items()})
    assert all(seen[key] <= allowed for key, allowed in {**ROUNDING, **TOLERANCE.get(name, {})}.items()), seen
    assert np.median(wrong, axis=0)[: env.task.model.nu].max() < ROUNDING["median"]
    assert all(value.dtype == torch.float32 and value.device == env.device for value in obs.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", own_tasks())
def test_300_steps_alone(name):
    task, (states, actions) = endless(own_tasks()[name], 300), played(name, 300)
    env = WarpEnv(task, 4, arrays="numpy")
    env.reset(seed=7)
    *_, truncated, info = env.step_chunk(actions)
    wrong = np.abs(info["qpos"] - states.qpos[:, 1:]).max(axis=2)
    print(name, "after 100, 200, 300 steps, each world:", *(f"{wrong[:, k]}" for k in (99, 199, 299)))
    assert info["error"].tolist() == [None] * 4 and truncated[:, -1].all() and not truncated[:, :-1].any()
    assert np.median(wrong.max(axis=1)) < ALONE.get(name, 1e-4)


def both(**options) -> tuple[WarpEnv, BatchEnv, np.ndarray]:
    """Push-T in mujoco_warp and in MuJoCo, two of three worlds about to succeed within 8 steps of the actions."""
    batch, actions = finishing_batch(threads=1)
    env = WarpEnv(batch.task, 3, arrays="numpy", **options)
    env.reset(options={"state": batch.state})
    return env, batch, actions


def agree(ours: tuple, theirs: tuple) -> None:
    for mine, other in zip(ours[1:4], theirs[1:4], strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, atol=1e-4)
    for mine, other, off in ((ours[0], theirs[0], 1e-2), (ours[-1], theirs[-1], 1e-4)):
        assert mine.keys() == other.keys()
        for key in mine.keys() - {"error"}:
            np.testing.assert_allclose(mine[key], other[key], atol=off, err_msg=key)
    assert ours[-1]["error"].tolist() == theirs[-1]["error"].tolist()


def test_episodes_end_wait_and_start_again_as_in_the_batch():
    env, batch, actions = both()
    waiting = np.where(np.array([True, True, False])[:, None, None], actions[:, :2], np.nan)
    agree(*(each.step_chunk(waiting, active=np.array([True, True, False])) for each in (env, batch)))
    agree(*(each.step_chunk(actions, last=3) for each in (env, batch)))
    assert env._rows["terminated"].tolist() == [True, False, True]
    restart = {"options": {"reset_mask": np.array([True, False, False])}, "seed": 20}
    for ours, theirs in zip(env.reset(**restart), batch.reset(**restart), strict=True):
        assert all(np.allclose(ours[key], theirs[key], atol=1e-3) for key in ours.keys() - {"error"})
    agree(*(each.step_chunk(actions[:, :3]) for each in (env, batch)))
    one = env.step(actions[:, 0])
    agree(one, batch.step(actions[:, 0]))
    assert one[1].shape == (3,) and one[0]["keypoint"].shape == (3, 9, 2) and one[1].dtype == np.float32


def test_who_waits_does_not_change_who_runs():
    task, actions = PushT(), random_actions(PushT(), 2, 4)
    pause, through = WarpEnv(task, 2), WarpEnv(task, 2)
    for env in (pause, through):
        env.reset(seed=5)
        env.step_chunk(actions)
    pause.step_chunk(actions, active=torch.tensor([True, False], device=pause.device))
    *_, late = pause.step_chunk(actions, active=np.array([False, True]))
    *_, soon = through.step_chunk(actions)
    assert (pause.state.qpos == through.state.qpos).all() and (pause.state.qvel == through.state.qvel).all()
    assert (late["qpos"][1] == soon["qpos"][1]).all() and late["elapsed"][:, -1].tolist() == [8, 8]


def test_nothing_survives_a_reset():
    actions = random_actions(PushT(), 2, 4, seed=2)
    used, fresh = WarpEnv(PushT(), 2), WarpEnv(PushT(), 2)
    used.reset(seed=50)
    used.step_chunk(actions[::-1].copy())
    for env in (used, fresh):
        env.reset(seed=8)
    assert all((used.worlds.carried[name] == fresh.worlds.carried[name]).all() for name in used.worlds.carried)
    assert (used.step_chunk(actions)[-1]["qpos"] == fresh.step_chunk(actions)[-1]["qpos"]).all()


def test_room_grows_when_contacts_would_be_dropped():
    task, seen = PushT(), []
    through_the_wall = State.stack([task.state(np.array([50.0, 50.0, x, 300.0, 0.0])) for x in (450.0, 480.0)])
    for room in (None, Room(1, 1)):
        env = WarpEnv(task, 2, room=room)
        env.reset(options={"state": through_the_wall})
        seen.append(env.step_chunk(np.full((2, 2, 2), 50.0))[-1]["qpos"])
    assert env.worlds.room.contacts > 1 and env.worlds.room.constraints > 1
    assert (seen[0] == seen[1]).all() and np.abs(numpy_of(seen[0][:, -1]) - through_the_wall.qpos).max() > 0.01


def test_a_world_that_blows_up_leaves_alone():
    task, n = Maze(), 3
    env, well = WarpEnv(task, n), WarpEnv(task, n)
    actions = random_actions(task, n, 4)
    start = State.stack([task.reset(seed) for seed in range(n)])
    well.reset(options={"state": start})
    start.qvel[1] = np.nan
    env.reset(options={"state": start})
    *_, truncated, info = env.step_chunk(actions)
    assert truncated.tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert "copy 1, control step 1" in info["error"][1] and info["error"][[0, 2]].tolist() == [None, None]
    assert torch.isfinite(info["qpos"]).all()
    *_, expected = well.step_chunk(actions)
    assert (info["qpos"][[0, 2]] == expected["qpos"][[0, 2]]).all()
    _, info = env.reset(seed=4, options={"reset_mask": np.array([False, True, False])})
    assert info["error"].tolist() == [None] * n and env.step_chunk(actions)[-1]["error"].tolist() == [None] * n


class Expert(nn.Module):
    """A task's scripted expert as a planner, always of one kind: its answer to the newest observation."""

    def __init__(self, task: Task):
        super().__init__()
        obs = {key: space.shape for key, space in task.observation_space.spaces.items()}
        self.spec = Spec(obs=obs, action_dim=task.action_shape[0], t_obs=1, horizon=2, fps=task.fps)
        self.task, self.anchor = task, nn.Parameter(torch.zeros(1))

    def plan(self, obs, *, noise=None, prefix=None, draw=None):
        expert = self.task.expert(len(noise), 0)
        for name in {"speed", "choice", "side"} & set(vars(expert)):
            getattr(expert, name)[:] = {"speed": 3.5 if self.task.name == "maze" else 0.06, "choice": 0, "side": 1}[name]
        actions = torch.from_numpy(expert.act({key: value[:, -1].numpy() for key, value in obs.items()})).float()
        return actions[:, None].expand(-1, 2, -1)


@pytest.mark.parametrize(("task", "episodes"), [(Maze(), 4), pytest.param(Gantry(), 16, marks=pytest.mark.slow)], ids=["maze", "gantry"])
def test_evaluate_finds_the_same_success(task, episodes):
    reports = []
    for envs in (BatchEnv(task, episodes), WarpEnv(task, episodes, arrays="numpy")):
        reports.append(evaluate(Controller(Expert(task), execute=1), envs, episodes, 100, task=task.name).episodes)
        envs.close()
    (ours, theirs) = ([(episode.seed, episode.success, len(episode.reward)) for episode in each] for each in reports)
    assert [each[:2] for each in ours] == [each[:2] for each in theirs] and all(success for _, success, _ in ours)
    assert all(abs(a[2] - b[2]) <= 2 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in own_tasks() if "pusht" not in name])
def test_experts_do_the_same_there(name):
    task, n, seen = own_tasks()[name](), 16, []
    for env in (BatchEnv(task, n), WarpEnv(task, n, arrays="numpy")):
        (obs, _), expert, over = env.reset(seed=1000), task.expert(n, 3), np.zeros(n, bool)
        while not over.all():
            obs, _, terminated, truncated, info = env.step(expert.act(obs))
            over = terminated | truncated
        seen.append((info["success"], info["elapsed"]))
        env.close()
    (ours, steps), (theirs, other) = seen
    assert ours.all() and theirs.all()
    assert (np.abs(steps - other) <= 2).mean() > 0.8, (steps, other)  # another contact may cost a second grasp


def test_what_cannot_be_simulated_or_is_missing_is_told(monkeypatch):
    class NoSlip(PushT):
        def mjcf(self) -> str:
            return super().mjcf().replace("<option ", '<option noslip_iterations="3" ')

    with pytest.raises(ValueError, match=r"mujoco_warp cannot simulate pusht \(noslip.*simulator=threads"):
        WarpEnv(NoSlip(), 2)
    with pytest.raises(ValueError, match="arrays 'jax' is unknown"):
        WarpEnv(PushT(), 2, arrays="jax")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    for module in ("envs.warp", "envs.worlds"):
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=r"pip install dipole\[warp\]"):
        importlib.import_module("envs.warp")


def test_bad_calls_are_told_as_in_the_batch():
    env = WarpEnv(Maze(), 2)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros((2, 2)))
    with pytest.raises(RuntimeError, match="first reset starts every env"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"env 1 is not finite.*\(1, 2\)"):
        env.step(np.array([[0.0, 0.0], [np.inf, 0.0]]))
    with pytest.raises(ValueError, match=r"\(2, 3, 3\), expected \(2, 3, 2\)"):
        env.step_chunk(np.zeros((2, 3, 3)))
    with pytest.raises(ValueError, match="last=0"):
        env.step_chunk(np.zeros((2, 3, 2)), last=0)
    with pytest.raises(ValueError, match="1 seeds for 2 envs"):
        env.reset(seed=[3])


def test_simulator_is_chosen_by_name():
    from hydra import compose, initialize_config_module

    from scripts.common import make_envs

    with initialize_config_module("conf", version_base="1.3"):
        maze, third = (compose("eval", [f"env={name}", "run=x"]).env for name in ("maze", "gym_pusht"))
    name, fps, envs = make_envs(maze, 2, simulator="warp")
    assert (name, fps, type(envs), envs.arrays) == ("maze", 20.0, WarpEnv, "numpy")
    with pytest.raises(ValueError, match="simulator=gpu does not run"):
        make_envs(maze, 2, simulator="gpu")
    with pytest.raises(ValueError, match=r"simulator=warp does not run envs\.gym_pusht"):
        make_envs(third, 2, simulator="warp")


def test_closed_loop_counts_the_steps_of_every_episode():
    task, seen = Maze(max_steps=5), []

    def plan(obs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(obs["position"])
        return torch.zeros(len(obs["position"]), 4, 2, device=obs["position"].device)

    env = WarpEnv(task, 3)
    assert closed_loop(env, plan, t_obs=2, execute=3, chunks=4) == 3 * (5 + 5)
    starts = numpy_of(State.stack([task.reset(seed) for seed in range(3)]).qpos)
    for k in (0, 2):  # before the first chunk, and after the two that an episode takes
        np.testing.assert_allclose(numpy_of(seen[k]), np.repeat(starts[:, None], 2, axis=1), atol=1e-6)
    assert all(positions.shape == (3, 2, 2) for positions in seen)
    with pytest.raises(ValueError, match="t_obs=4 is more than execute=3"):
        closed_loop(env, plan, t_obs=4, execute=3, chunks=1)

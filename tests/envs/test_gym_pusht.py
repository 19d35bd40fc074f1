"""The original Push-T behind our names: against its own recordings, against the MuJoCo twin, and in a rollout."""

import importlib
import subprocess
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from envs.batch import BatchEnv
from envs.copies import Copies
from envs.gym_pusht import GymPushT
from envs.pusht import PushT
from policy.control import Controller
from policy.data.normalize import Normalizer
from policy.rollout import evaluate
from policy.train import checkpoint
from policy.types import Spec
from tests.helpers import CONFIG


@pytest.fixture
def original():
    try:
        importlib.import_module("gym_pusht.envs")
    except ImportError as error:
        pytest.skip(f"gym-pusht does not import ({error}): pip install dipole[pymunk]")


def keypoint_error(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Mean distance (...) px between two sets of block points (..., 9, 2)."""
    return np.linalg.norm(ours - theirs, axis=-1).mean(-1)


@pytest.mark.parametrize("obs", ["keypoint", "state"])
def test_gymnasium_finds_nothing_to_warn_of(original, obs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*symmetric and normalized")  # a recommendation for policies without a normaliser
        warnings.filterwarnings("ignore", message=".*pkg_resources", category=Warning)  # pygame's
        gymnasium.register("dipole-test/GymPushT-v0", lambda **options: GymPushT(obs=obs, **options))
        env = gymnasium.make("dipole-test/GymPushT-v0").unwrapped
        check_env(env)
    env.close()
    gymnasium.registry.pop("dipole-test/GymPushT-v0")


def test_it_starts_where_the_twin_starts_and_offers_the_same_spaces(original):
    task, env = PushT(), GymPushT()
    assert env.observation_space == task.observation_space and env.action_space == task.action_space
    assert env.metadata["render_fps"] == task.fps
    for seed in (*range(10), *range(100_000, 100_010)):
        start = task.reset(seed)
        obs, info = env.reset(seed=seed)
        assert np.abs(env.vector - task.vector(start)).max() < 1e-3
        assert keypoint_error(obs["keypoint"], task.observe(start)["keypoint"]) < 1e-3 and obs["keypoint"].dtype == np.float32
        assert info == {"success": False, "coverage": pytest.approx(float(task.metrics(start)["coverage"]))}
    first, _ = env.reset()
    second, _ = env.reset()
    assert (first["keypoint"] != second["keypoint"]).any()


@pytest.mark.data
def test_it_replays_the_recordings_and_the_twin_stays_close(original, human):
    """It is the simulator the humans drove, so their episodes come back; the twin is given the same 50 actions."""
    task, env, episodes, steps = PushT(success_coverage=2.0), GymPushT(success_coverage=2.0), np.arange(3, 206, 20), 50
    starts, ends = human.starts[episodes], human.ends[episodes]
    length = np.minimum(ends - starts - 1, steps)
    actions = human.action[np.minimum(starts[:, None] + np.arange(steps), ends[:, None] - 1)]
    twin = BatchEnv(task, len(episodes), threads=1)
    twin.reset(seed=episodes.tolist())
    seen, *_ = twin.step_chunk(actions)
    twin.close()
    apart = []
    for i, episode in enumerate(episodes):
        env.reset(seed=int(episode))
        for k in range(steps):
            obs, *_ = env.step(actions[i, k])
            if k + 1 <= length[i]:
                assert np.abs(env.vector - human.state[starts[i] + k + 1])[:4].max() < 1e-3
        np.testing.assert_allclose(obs["agent_pos"], seen["agent_pos"][i, -1], atol=0.2)
        apart.append(keypoint_error(obs["keypoint"], seen["keypoint"][i, -1]))
    p50, p90 = np.quantile(apart, [0.5, 0.9])
    print(f"\nafter {steps} human actions the simulators' blocks are {p50:.3f} / {p90:.3f} / {max(apart):.2f} px (p50/p90/max) apart")
    assert p50 < 1


def test_smooth_random_pushing_ends_at_the_same_block_poses(original):
    rng, seeds, steps = np.random.default_rng(0), list(range(100_000, 100_010)), 50
    knots = rng.uniform(100, 412, (len(seeds), 6, 2))
    actions = np.stack([[np.interp(np.linspace(0, 5, steps), range(6), k[:, d]) for d in (0, 1)] for k in knots]).swapaxes(1, 2)
    twin, env = BatchEnv(PushT(success_coverage=2.0), len(seeds), threads=1), GymPushT(success_coverage=2.0)
    start, _ = twin.reset(seed=seeds)
    seen, *_ = twin.step_chunk(actions)
    twin.close()
    apart, moved = [], []
    for i, seed in enumerate(seeds):
        env.reset(seed=seed)
        for action in actions[i]:
            obs, *_ = env.step(action)
        apart.append(keypoint_error(obs["keypoint"], seen["keypoint"][i, -1]))
        moved.append(keypoint_error(obs["keypoint"], start["keypoint"][i]))
    print(f"\nblocks moved {np.median(moved):.0f} px and are {np.median(apart):.3f} px (median) apart, at most {max(apart):.2f}")
    assert np.median(moved) > 20 and np.median(apart) < 1


def test_reward_success_and_the_ends_of_an_episode(original):
    env = GymPushT(max_steps=3)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(np.zeros(2))
    away = np.array([60.0, 60.0])
    _, info = env.reset(options={"vector": [*away, 256, 256, np.pi / 4]})
    assert info["success"] and info["coverage"] == pytest.approx(1)
    _, reward, terminated, truncated, info = env.step(away)
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    env.reset(options={"vector": [*away, 276, 256, np.pi / 4]})
    ends = []
    for _ in range(3):
        _, reward, terminated, truncated, info = env.step(away)
        assert 0 < info["coverage"] == pytest.approx(env._pymunk._get_coverage(), abs=1e-9) and reward == info["coverage"] / 0.95
        ends.append((terminated, truncated))
    assert ends == [(False, False), (False, False), (False, True)]
    for _ in range(30):
        obs, *_ = env.step(np.array([900.0, -900.0]))  # clipped, as in the twin; gym-pusht itself lets the finger leave
    np.testing.assert_allclose(obs["agent_pos"], [512, 0], atol=0.1)
    with pytest.raises(ValueError, match="not finite"):
        env.step(np.array([np.nan, 0.0]))


def test_it_draws_without_a_window(original):
    with pytest.raises(ValueError, match="rgb_array"):
        GymPushT(render_mode="human")
    env = GymPushT(render_mode="rgb_array", size=64)
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and frame.std() > 10
    assert not importlib.import_module("pygame").display.get_init()


class Watched(Controller):
    """Remembers the plans of every seed."""

    def reset(self, seeds, rows=None):
        self.seeds, self.plans = list(seeds), {**getattr(self, "plans", {}), **{seed: [] for seed in seeds}}
        super().reset(seeds, rows)

    def plan(self, rows=None):
        chunk = super().plan(rows)
        for row, actions in zip(rows, chunk, strict=True):
            self.plans[self.seeds[row]].append(actions)
        return chunk


def tiny_planner():
    torch.manual_seed(0)
    seen = {key: 512 * torch.rand(64, *size) for key, size in {"keypoint": (9, 2), "agent_pos": (2,), "action": (2,)}.items()}
    spec = Spec(obs={"keypoint": (9, 2), "agent_pos": (2,)}, action_dim=2, t_obs=2, horizon=8, fps=10, task="pusht")
    return checkpoint.build(CONFIG, spec, Normalizer.fit(seen))


def test_rollouts_do_not_depend_on_the_copies_and_survive_those_that_finish_early(original):
    """Copies end in the middle of a chunk, at different steps, while the others go on."""
    planner, options, seeds = tiny_planner(), {"max_steps": 20, "success_coverage": 0.2}, 10
    reports = []
    for copies in (4, 1):  # 4 copies: waves of 4, 4 and 2
        envs = Copies(partial(GymPushT, **options), copies, workers=0)
        controller = Watched(planner, execute=8)
        reports.append(evaluate(controller, envs, seeds, 100_000, task=envs.name))
        envs.close()
    many, one = (report.episodes for report in reports)
    assert [e.seed for e in many] == list(range(100_000, 100_000 + seeds)) == [e.seed for e in one]
    assert len({len(e.reward) for e in many}) > 1 and any(e.success for e in many) and not all(e.success for e in many)
    for a, b in zip(many, one, strict=True):
        np.testing.assert_allclose(a.reward, b.reward, atol=1e-4)
        assert a.success == b.success and a.reward.size and len(a.reward) <= 20
        # The same actions in a lone environment give the same rewards: no other copy and no automatic reset has interfered.
        env = GymPushT(**options)
        env.reset(seed=b.seed)
        alone = [env.step(action)[1:] for action in np.concatenate(controller.plans[b.seed])[: len(b.reward)]]
        np.testing.assert_array_equal([step[0] for step in alone], b.reward)
        assert alone[-1][1] == b.success and not any(step[1] or step[2] for step in alone[:-1])
    assert reports[0].metrics()["task"] == "gym_pusht"


def test_make_envs_builds_it_from_its_config(original):
    from hydra import compose, initialize_config_module

    from scripts.common import make_envs

    with initialize_config_module("conf", version_base=None):
        name, fps, envs = make_envs(compose("eval", ["env=gym_pusht", "run=x"]).env, 2)
    assert (name, fps, envs.num_envs) == ("gym_pusht", 10.0, 2)
    envs.close()


def test_without_gym_pusht_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gym_pusht.envs", None)
    monkeypatch.setitem(sys.modules, "gym_pusht", SimpleNamespace())
    with pytest.raises(ImportError, match=r"pip install dipole\[pymunk\]"):
        GymPushT()


def test_importing_the_module_needs_no_gym_pusht():
    code = "import sys, envs.gym_pusht; sys.exit(any(m in sys.modules for m in ('gym_pusht', 'pymunk', 'pygame')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

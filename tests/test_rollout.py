"""Evaluation: honest intervals, distinct episodes, the same ones however many run at once and whatever vector environment runs them."""
import functools
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from scipy.stats import binomtest
from torch import nn

from envs.batch import BatchEnv
from envs.gantry import Gantry
from envs.task import TaskEnv
from policy.control import Controller
from policy.rollout import Episode, bootstrap, evaluate, wilson
from policy.types import Spec


def test_wilson_is_scipys():
    for n in (1, 2, 5, 10, 50, 100, 997):
        for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
            want = binomtest(k, n).proportion_ci(0.95, method="wilson")
            assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-12)
    for k, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="is not a rate"):
            wilson(k, n)


def test_the_bootstrap_covers_the_mean():
    """Of 300 samples of 60 skewed scores about 95 % of the intervals hold the true mean (percentile intervals fall a little short)."""
    rng = np.random.default_rng(0)
    samples = rng.beta(0.5, 0.2, (300, 60))
    found = [bootstrap(s, seed=i, draws=1000) for i, s in enumerate(samples)]
    assert 0.90 < np.mean([lo <= 0.5 / 0.7 <= hi for lo, hi in found]) < 0.98
    width = np.mean([hi - lo for lo, hi in found])
    assert width == pytest.approx(2 * 1.96 * samples.std() / np.sqrt(60), rel=0.05)
    assert bootstrap(samples[0]) == bootstrap(samples[0]) and bootstrap(np.ones(5)) == (1.0, 1.0)


def test_a_score_is_the_best_reward_of_a_step():
    e = Episode(3, False, np.array([-3.0, -1.0, -2.0]), {})
    assert e.summary() == {"seed": 3, "success": False, "score": -1.0, "return": -6.0, "steps": 3}


class Expert(nn.Module):
    """The gantry's scripted expert as a planner: its answer to the newest observation, held for the chunk, and the row's own noise."""

    def __init__(self, task: Gantry, noise: float = 0.01):
        super().__init__()
        obs = {k: v.shape for k, v in task.observation_space.spaces.items()}
        self.spec, self.task, self.noise = Spec(obs=obs, action_dim=4, t_obs=2, horizon=4, fps=10), task, noise
        self.anchor = nn.Parameter(torch.zeros(1))

    def plan(self, obs, *, noise=None, prefix=None):
        expert = self.task.expert(len(noise), 0)
        expert.speed[:] = 0.07
        actions = torch.from_numpy(expert.act({k: v[:, -1].numpy() for k, v in obs.items()})).float()
        return actions[:, None] + self.noise * noise * torch.tensor([1, 1, 1, 0])


STEPS = 40  # some episodes of the noisy expert end in success, others in time
TASK = Gantry(max_steps=STEPS)


def episodes(envs, n: int = 10, execute: int = 3, **options) -> list[Episode]:
    try:
        return evaluate(Controller(Expert(TASK), execute=execute), envs, n, 50, **options).episodes
    finally:
        envs.close()


def plain(mode: AutoresetMode, copies: int) -> SyncVectorEnv:
    return SyncVectorEnv([functools.partial(TaskEnv, TASK)] * copies, autoreset_mode=mode)


@pytest.fixture(scope="module")
def reference() -> list[Episode]:
    return episodes(BatchEnv(TASK, 10, threads=1))


def same(a: list[Episode], b: list[Episode]) -> None:
    assert [e.summary() for e in a] == [e.summary() for e in b]
    assert all(np.array_equal(x.reward, y.reward) for x, y in zip(a, b, strict=True))


def test_the_reference_has_both_outcomes(reference):
    lengths = [len(e.reward) for e in reference]
    assert [e.seed for e in reference] == list(range(50, 60))
    assert 2 <= sum(e.success for e in reference) <= 8 and max(lengths) == STEPS and len(set(lengths)) > 3
    for e in reference:  # success ends an episode, and its last reward is the one that says so
        assert e.success == (e.reward[-1] == 1) == (e.score == 1) and not e.reward[:-1].any()
        assert len(e.states["qpos"]) == len(e.reward)


@pytest.mark.parametrize("copies", [1, 3, 7])
def test_episodes_do_not_depend_on_how_many_run_at_once(reference, copies):
    """Waves of 3 leave a last one of 1: its spare copies count for nothing."""
    told: list[int] = []
    found = episodes(BatchEnv(TASK, copies, threads=1), on_progress=told.append)
    same(found, reference)
    for a, b in zip(found, reference, strict=True):
        assert np.array_equal(a.states["qpos"], b.states["qpos"])
    assert told == sorted(told) and told[-1] == 10


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
@pytest.mark.parametrize("copies", [10, 4])
def test_stepping_a_plain_vector_env_gives_the_episodes_of_step_chunk(reference, mode, copies):
    same(episodes(plain(mode, copies)), reference)


def test_the_length_of_a_chunk_is_the_controllers(reference):
    again, longer = (evaluate(Controller(Expert(TASK), execute=k), BatchEnv(TASK, 10, threads=1), 10, 50) for k in (3, 4))
    assert [e.summary() for e in again.episodes] == [e.summary() for e in reference]
    assert [e.summary() for e in longer.episodes] != [e.summary() for e in reference]
    assert len(longer.plan_s) == -(-max(len(e.reward) for e in longer.episodes) // 4)


def test_metrics_say_what_the_design_promises():
    report = evaluate(Controller(Expert(TASK), execute=4), BatchEnv(TASK, 5, threads=1), 10, 50, task="gantry")
    metrics = json.loads(json.dumps(report.metrics()))
    assert {"task", "episodes", "seeds", "success", "success_ci", "score", "score_ci", "return", "plan_ms", "env_steps_per_s", "wall_s"} <= metrics.keys()
    wins = sum(e.success for e in report.episodes)
    assert metrics["task"] == "gantry" and metrics["seeds"] == list(range(50, 60)) and metrics["success"] == wins / 10 == metrics["score"]
    assert metrics["success_ci"] == pytest.approx(list(wilson(wins, 10))) and metrics["return"] == wins / 10
    assert metrics["score_ci"][0] <= metrics["score"] <= metrics["score_ci"][1]
    assert metrics["steps"] == sum(len(e.reward) for e in report.episodes) == sum(e["steps"] for e in metrics["per_episode"])
    assert 0 < metrics["plan_ms"]["p50"] <= metrics["plan_ms"]["p99"] and 0 < metrics["env_s"] < metrics["wall_s"]
    assert metrics["env_steps_per_s"] == pytest.approx(metrics["steps"] / metrics["env_s"])


class Deaf(Gantry):
    """Starts seed 3 k, 3 k + 1 and 3 k + 2 alike."""

    def reset(self, seed):
        return super().reset(seed // 3)


@pytest.mark.parametrize("copies", [4, 1])
def test_two_seeds_that_start_alike_are_refused(copies):
    """At once, in one wave or across two."""
    envs = BatchEnv(Deaf(max_steps=5), copies, threads=1)
    with pytest.raises(ValueError, match="the lazy gantry starts seeds 51 and 52 with the same observation"):
        evaluate(Controller(Expert(TASK), execute=4), envs, 4, 50, task="the lazy gantry")
    assert len(evaluate(Controller(Expert(TASK), execute=4), envs, 1, 50).episodes) == 1
    envs.close()


class Walk(gymnasium.Env):
    """Says success only in info, or not at all; ends after 3 steps."""

    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(-9, 9, (1,))})
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float64)

    def __init__(self, key: str, terminates: bool):
        self.key, self.terminates = key, terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.k, self.start = 0, self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return {"x": self.start}, {}

    def step(self, action):
        assert action.dtype == np.float64  # the environment's own
        self.k += 1
        over = self.k == 3
        info = {self.key: bool(self.start > 0) and over} if self.key else {}
        return {"x": self.start}, 0.0, over and self.terminates, over and not self.terminates, info


class Still(nn.Module):
    def __init__(self):
        super().__init__()
        self.spec, self.anchor = Spec(obs={"x": (1,)}, action_dim=1, t_obs=1, horizon=4), nn.Parameter(torch.zeros(1))

    def plan(self, obs, *, noise=None, prefix=None):
        return torch.zeros_like(noise)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
@pytest.mark.parametrize("key, terminates", [("success", True), ("is_success", False), ("", True), ("", False)])
def test_success_is_what_info_says_else_termination(mode, key, terminates):
    starts = [Walk("", True).reset(seed=s)[0]["x"] > 0 for s in range(8)]
    envs = SyncVectorEnv([functools.partial(Walk, key, terminates)] * 3, autoreset_mode=mode)
    found = evaluate(Controller(Still(), execute=4), envs, 8, 0).episodes
    assert [e.success for e in found] == ([bool(s) for s in starts] if key else [terminates] * 8)
    assert 0 < sum(map(bool, starts)) < 8 and all(len(e.reward) == 3 for e in found)

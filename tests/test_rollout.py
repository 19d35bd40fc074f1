"""Evaluation: distinct episodes, the same ones however many run at once and whatever vector environment runs them; faults cost one each."""
import functools
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from envs.batch import BatchEnv
from envs.copies import Copies
from envs.gantry import Gantry
from envs.task import TaskEnv
from policy.control import Controller, NotFinite
from policy.episodes import Episode, reason, smoothness
from policy.rollout import evaluate
from policy.stats import Z_LOOKED, enough, wilson
from policy.types import Spec


def test_a_score_is_the_best_reward_of_a_step():
    e = Episode(3, False, np.array([-3.0, -1.0, -2.0]), np.zeros((3, 1)), "truncated")
    assert e.summary() == {"seed": 3, "success": False, "score": -1.0, "return": -6.0, "steps": 3, "ended": "truncated"}
    lost = Episode(4, False, np.zeros(0), np.zeros((0, 1)), "fault", error="it came off")
    assert lost.summary() == {"seed": 4, "success": False, "score": None, "return": 0.0, "steps": 0, "ended": "fault", "error": "it came off"}


class Expert(nn.Module):
    """The gantry's scripted expert as a planner: its answer to the newest observation, held for the chunk, and the row's own noise."""

    def __init__(self, task: Gantry, noise: float = 0.01):
        super().__init__()
        obs = {k: v.shape for k, v in task.observation_space.spaces.items()}
        self.spec, self.task, self.noise = Spec(obs=obs, action_dim=4, t_obs=2, horizon=4, fps=10), task, noise
        self.anchor = nn.Parameter(torch.zeros(1))

    def plan(self, obs, *, noise=None, prefix=None, draw=None):
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


def test_until_widens_both_intervals():
    """Where the score is success, success that is looked at again and again has one interval, not two."""
    found = evaluate(Controller(Expert(TASK), execute=4), BatchEnv(TASK, 5, threads=1), 10, 50, until=0.01).metrics()
    assert found["success_ci"] == found["score_ci"] == list(wilson(round(10 * found["success"]), 10, Z_LOOKED))


def test_the_reason_of_a_fault_is_one_line():
    assert reason("copy 3 (seed 5), control step 6: Traceback (most recent call last):\n  File x\nRuntimeError: it came off") == "RuntimeError: it came off"
    hang = 'copy 0 (seed 3), control step 12: no answer for 2 s.\nStack (most recent call first):\n  File "<string>", line 1 in <module>'
    assert reason(hang) == "copy 0 (seed 3), control step 12: no answer for 2 s." and reason("") == ""


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
    """Says success only in info, or not at all; ends after 3 steps: terminated, truncated or both."""

    observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(-9, 9, (1,))})
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float64)

    def __init__(self, key: str, ends: str):
        self.key, self.ends = key, ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.k, self.start = 0, self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return {"x": self.start}, {}

    def step(self, action):
        assert action.dtype == np.float64  # the environment's own
        self.k += 1
        over = self.k == 3
        info = {self.key: bool(self.start > 0) and over} if self.key else {}
        return {"x": self.start}, 0.0, over and self.ends != "truncated", over and self.ends != "terminated", {"height": self.k * 1.5, **info}


class Still(nn.Module):
    """Plans nothing but zeros; NaN for a row whose observation is below `sick`."""

    def __init__(self, sick: float = -9):
        super().__init__()
        self.spec, self.anchor, self.sick = Spec(obs={"x": (1,)}, action_dim=1, t_obs=1, horizon=4), nn.Parameter(torch.zeros(1)), sick

    def plan(self, obs, *, noise=None, prefix=None, draw=None):
        return torch.where(obs["x"][:, -1:] < self.sick, float("nan"), torch.zeros_like(noise))


STARTS = np.array([Walk("", "").reset(seed=s)[0]["x"].item() for s in range(64)])


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
@pytest.mark.parametrize("key, ends", [("success", "terminated"), ("is_success", "truncated"), ("success", "both"), ("", "terminated"),
                                       ("", "truncated"), ("", "both")])
def test_success_is_what_info_says_else_termination(mode, key, ends):
    """One in the last step that time allows is a termination all the same, and the step that raises both flags no truncation."""
    envs = SyncVectorEnv([functools.partial(Walk, key, ends)] * 3, autoreset_mode=mode)
    report = evaluate(Controller(Still(), execute=4), envs, 8, 0)
    found, otherwise = report.episodes, "truncated" if ends == "truncated" else "terminated"
    if key:
        assert [e.ended for e in found] == ["success" if x > 0 else otherwise for x in STARTS[:8]]
    else:
        assert {e.ended for e in found} == {"truncated" if ends == "truncated" else "success"}
    assert all(e.success == (e.ended == "success") and len(e.reward) == len(e.actions) == 3 for e in found)
    assert report.metrics()["measures"] == {"height": {"max": 4.5, "min": 1.5, "last": 4.5}}


def test_a_termination_in_the_last_step_is_one_in_worker_processes_too():
    """gymnasium's TimeLimit raises truncated beside it."""
    limited = lambda: gymnasium.wrappers.TimeLimit(Walk("", "terminated"), 3)  # noqa: E731
    for factory in (limited, functools.partial(Walk, "", "both")):
        envs = Copies(factory, 2, workers=0)
        assert [e.ended for e in evaluate(Controller(Still(), execute=4), envs, 2, 0).episodes] == ["success"] * 2
        envs.close()


def test_time_that_is_up_is_never_a_termination(reference):
    """Nor is success at the very last step a truncation, though BatchEnv and TaskEnv raise both flags then."""
    assert [e.ended for e in reference] == ["success" if e.success else "truncated" for e in reference]
    quick = min((e for e in reference if e.success), key=lambda e: len(e.reward))
    task = Gantry(max_steps=len(quick.reward))
    sync = SyncVectorEnv([functools.partial(TaskEnv, task)] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
    for envs in (BatchEnv(task, 2, threads=1), sync):
        first, second = evaluate(Controller(Expert(task), execute=3), envs, 2, quick.seed).episodes
        assert (first.ended, len(first.reward)) == ("success", task.max_steps) and second.ended == "truncated"
        envs.close()


class Sick(Walk):
    """20 steps, success where it starts above 0. A start within .05 of -.5 raises, of 0 says NaN, in its step 6; one below -.95 at once."""

    def reset(self, *, seed=None, options=None):
        found = super().reset(seed=seed)
        if seed is not None and self.start < -0.95:  # not in a reset of the vector environment itself
            raise OSError("the door is shut")
        return found

    def step(self, action):
        self.k += 1
        if self.k == 6 and abs(self.start + 0.5) < 0.05:
            raise RuntimeError("the arm came off")
        x = np.full(1, np.nan, np.float32) if self.k == 6 and abs(self.start) < 0.05 else self.start
        return {"x": x}, float(self.k), False, self.k == 20, {"success": bool(self.start > 0) and self.k == 20}


def test_a_copy_that_fails_costs_its_own_episode():
    """One of 64 does not answer, two come off, some see NaN; the other episodes are those of the sound environment, and the seed replays the fault."""
    factory = functools.partial(Sick, "", "")
    envs = Copies(factory, 40, workers=0)
    report = evaluate(Controller(Still(), execute=4), envs, 64, 0)
    shut, off, nan = STARTS < -0.95, abs(STARTS + 0.5) < 0.05, abs(STARTS) < 0.05
    for e, x, *wrong in zip(report.episodes, STARTS, shut, off, nan, strict=True):
        assert (e.ended == "fault") == any(wrong) and e.success == (x > 0 and not any(wrong))
        assert len(e.reward) == len(e.actions) == (0 if wrong[0] else 5 if any(wrong) else 20)
        assert ("the door is shut" in e.error, "the arm came off" in e.error, "not finite" in e.error) == tuple(wrong)
    metrics = json.loads(json.dumps(report.metrics(), allow_nan=False))
    assert shut.sum() and off.sum() and nan.sum() and metrics["ended"] == {
        "success": report.wins, "terminated": 0, "truncated": 64 - report.wins - len(metrics["faults"]), "fault": (shut | off | nan).sum()}
    assert [(f["seed"], f["step"]) for f in metrics["faults"]] == [(s, 0 if shut[s] else 5) for s in np.flatnonzero(shut | off | nan)]
    assert metrics["success"] == report.wins / 64 and metrics["score"] == 20 and metrics["length"]["mean"] == 20
    seed = int(np.flatnonzero(off)[0])
    again, = evaluate(Controller(Still(), execute=4), envs, 1, seed).episodes
    assert {**again.summary(), "error": 0} == {**report.episodes[seed].summary(), "error": 0}
    assert again.error.partition("(seed")[2] == report.episodes[seed].error.partition("(seed")[2]  # before it, the number of the copy
    envs.close()


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.name)
def test_nan_in_a_plain_vector_env_costs_one_episode(mode):
    calm = np.flatnonzero((abs(STARTS + 0.5) > 0.05) & (STARTS > -0.95))
    seed = int(next(s for s in calm if abs(STARTS[s]) < 0.05 and s - 1 in calm and s + 1 in calm))
    envs = SyncVectorEnv([functools.partial(Sick, "", "")] * 3, autoreset_mode=mode)
    before, sick, after = evaluate(Controller(Still(), execute=4), envs, 3, seed - 1).episodes
    assert (sick.ended, len(sick.reward)) == ("fault", 5) and len(before.reward) == len(after.reward) == 20


def test_a_plan_that_is_not_finite_costs_one_episode_but_not_the_first_for_all():
    envs = SyncVectorEnv([functools.partial(Walk, "success", "truncated")] * 8)
    ill = np.sort(STARTS[:8])[1]
    found = evaluate(Controller(Still(sick=ill), execute=4), envs, 8, 0).episodes
    assert [e.ended == "fault" for e in found] == (STARTS[:8] < ill).tolist() and found[STARTS[:8].argmin()].error == "the plan is not finite"
    with pytest.raises(NotFinite):
        evaluate(Controller(Still(sick=9), execute=4), envs, 8, 0)


@pytest.mark.parametrize("copies, until", [(4, 0.2), (10, 0.15), (64, 0.2), (7, 0.01)])
def test_it_stops_at_the_first_look_that_is_enough(copies, until):
    envs = SyncVectorEnv([functools.partial(Walk, "success", "truncated")] * copies)
    report = evaluate(Controller(Still(), execute=4), envs, 64, 0, until=until)
    looks = [min(n, 64) for n in range(copies, 64 + copies, copies)]
    n = next((n for n in looks if enough(int((STARTS[:n] > 0).sum()), n, until)), 64)
    found = report.metrics()
    assert len(report.episodes) == n and found["seeds"] == list(range(n)) and found["success_ci"] == list(wilson(report.wins, n, Z_LOOKED))
    assert found["until"] == {"half_width": until, "reached": until > 0.1, "most": 64, "looks": -(-n // copies), "every": copies, "z": Z_LOOKED}
    with pytest.raises(ValueError, match=r"until=3 must be between 0 and .5"):
        evaluate(Controller(Still(), execute=4), envs, 64, 0, until=3)


def test_smoothness_has_the_values_of_a_staircase():
    """Within a plan the action climbs by .1 a step, and falls by .6 where the next one takes over: after 4 steps and a delay of 2."""
    def stairs(steps: int, delay: int) -> np.ndarray:
        t = np.arange(steps)
        joins = np.where(t < 4 + delay, 0, (t - delay) // 4)
        return np.stack([0.1 * t - 0.7 * joins, np.zeros(steps)], 1).astype(np.float32)

    for delay in (0, 2):
        found = smoothness([stairs(23, delay), stairs(5, delay)], 4, delay, np.array([2.0, np.nan]), 10)
        assert (found["inside"], found["seam"]) == pytest.approx((0.1 / 2 / 2, 0.6 / 2 / 2)) and found["seam_ratio"] == pytest.approx(6)
    t = np.arange(50)[:, None] / 10
    cubic = smoothness([t**3 / 6 * np.array([1, -2, 0])], 8, 0, np.array([4.0, 2.0, 0.0]), 10)  # third derivative 1, -2 and 0
    assert cubic["jerk"] == pytest.approx([1, 2, 0], abs=1e-8) and cubic["jerk_normalised"] == pytest.approx(np.sqrt((1 / 16 + 1) / 3))
    assert cubic["accel_peak"] == pytest.approx(4.8 * np.sqrt(5)) and cubic["accel_peak_normalised"] == pytest.approx(4.8 * np.sqrt(1 / 16 + 1))
    both = smoothness([np.array([[0.0, 0], [0, 0], [3, 4], [3, 4]]), np.zeros((5, 2)), np.ones((2, 2))], 8, 0, np.array([2.0, 4.0]), 10)
    assert both["accel_peak"] == pytest.approx(500 / 2) and both["range"] == [2, 4]  # a jump by 5 at 10 Hz, and none; two steps have no second difference
    nothing = dict.fromkeys(("seam", "inside", "seam_ratio", "jerk", "jerk_normalised", "accel_peak", "accel_peak_normalised", "range"))
    assert smoothness([], 8, 0, np.ones(1), 10) == nothing
    assert smoothness([np.zeros((1, 1))], 8, 0, np.ones(1), 10) == {**nothing, "range": [1]}
    still = {"seam": 0, "inside": 0, "seam_ratio": None, "jerk": [0], "jerk_normalised": 0, "accel_peak": 0, "accel_peak_normalised": 0, "range": [1]}
    assert smoothness([np.ones((9, 1))], 8, 0, np.array([np.inf]), 0) == still


def test_a_seam_is_where_the_controller_changes_plans():
    class Ramp(Still):
        def plan(self, obs, *, noise=None, prefix=None, draw=None):
            return torch.arange(4.0)[None, :, None].expand(len(noise), 4, 1)  # climbs by 1 a step from 0 again

    for execute, delay in ((2, 0), (2, 1), (3, 1), (1, 2)):
        envs = SyncVectorEnv([functools.partial(Sick, "", "")] * 1)
        report = evaluate(Controller(Ramp(), execute=execute, delay=delay), envs, 1, int((STARTS > 0.5).argmax()))
        found = report.metrics()["smoothness"]  # shares of the action range, 2
        assert found["seam"] == pytest.approx((execute - 1) / 2) and found["inside"] == pytest.approx(0.5)

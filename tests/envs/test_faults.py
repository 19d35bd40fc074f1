"""One of 64 copies raises, hangs, dies or goes NaN: the other 63 finish as if nothing had been, and the error names the seed that replays it."""

import os
import re
import signal
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

from envs.batch import BatchEnv
from envs.copies import Copies
from envs.pusht import PushT
from policy.control import Controller
from policy.data.normalize import Normalizer
from policy.rollout import evaluate
from policy.train import checkpoint
from policy.types import Spec
from tests.envs.faulty import Faulty, Forgetful
from tests.helpers import CONFIG

N, FIRST = 64, 100
ACTIONS = np.random.default_rng(0).uniform(-1, 0.6, (N, 24, 2)).astype(np.float32)
TEXTS = {
    "raise": r'faulty.py", line \d+, in fail\n.*\nZeroDivisionError: the gripper fell off',
    "exit": "SystemExit: bye",
    "nan": r"observation 'place' is not finite: \[nan nan\]",
    "reward": "reward is not finite: inf",
    "sleep": r'no answer for 2 s.\nStack.*\n  File ".*faulty.py", line \d+ in fail',
    "sleep in C": r'no answer for 2 s.\nStack.*\n  File ".*faulty.py", line \d+ in fail',
    "stop": "no answer for 2 s.\nIt left no traceback",
    "kill": "its process died of SIGKILL",
    "segfault": r'died of SIGSEGV.\nFatal Python error: Segmentation fault.*faulty.py", line \d+ in fail',
}


def run(envs, actions=ACTIONS, seed=FIRST):
    """All there is to know of the episodes: obs and flags (n, t, ...), and the errors."""
    _, info = envs.reset(seed=seed)
    chunks = [envs.step_chunk(actions[:, k : k + 8]) for k in range(0, actions.shape[1], 8)]
    envs.close()
    named = [{**obs, "reward": reward, "terminated": terminated, "truncated": truncated, **info} for obs, reward, terminated, truncated, info in chunks]
    error = named[-1]["error"]
    assert all(e is None or e == last for e, last in zip(info["error"], error, strict=True))
    return {key: np.concatenate([each[key] for each in named], 1) for key in named[0] if key not in ("error", "torch")}, error


@pytest.fixture(scope="module")
def unharmed():
    path, error = run(Copies(Faulty, N, workers=0))
    assert not error.any()
    return path


def check(path, error, unharmed, faults, at=11, lost=()):
    """faults: {copy: kind}; lost: the kinds whose last chunk is lost with the process."""
    others = [i for i in range(N) if i not in faults]
    assert all((path[key][others] == unharmed[key][others]).all() for key in unharmed)
    assert [i for i in range(N) if error[i]] == sorted(faults)
    for i, kind in faults.items():
        place = "reset" if at == 0 else f"control step {at}"
        assert error[i].startswith(f"copy {i} (seed {FIRST + i}), {place}: "), error[i]
        assert re.search(f"(?s){TEXTS[kind]}", error[i]), error[i]
        known = max(0, (at - 1) // 8 * 8 if kind in lost else at - 1)
        assert all((path[key][i, :known] == unharmed[key][i, :known]).all() for key in unharmed if at)
        assert path["truncated"][i, known:].all() and not path["success"][i].any() and (path["reward"][i, known:] == 0).all()
        assert all(np.isfinite(path[key]).all() for key in ("place", "speed", "reward"))
        assert (path["elapsed"][i, known:] == known).all() and (path["place"][i, known:] == path["place"][i, known - bool(known)]).all()


def survivors(unharmed, count, at=11):
    """Copies whose episode is longer than that."""
    return np.flatnonzero(unharmed["elapsed"].max(1) > at)[:: N // 8][:count].tolist()


@pytest.mark.parametrize("at", [0, 1, 11])
def test_copies_that_raise_or_go_nan_leave_alone(unharmed, at):
    kinds = ["raise", "nan", "exit"] + ["reward"] * (at > 0)
    faults = dict(zip(survivors(unharmed, len(kinds)), kinds, strict=True))
    told = {FIRST + i: kind for i, kind in faults.items()}
    path, error = run(Copies(partial(Faulty, {**told, -1: "close"}, at=at), N, workers=0))
    check(path, error, unharmed, faults, at)
    for i in faults:  # the seed the error names does it again
        _, again = run(Copies(partial(Faulty, told, at=at), 1, workers=0), ACTIONS[i : i + 1], FIRST + i)
        assert again[0].splitlines()[-1].split(": ", 1)[-1] == error[i].splitlines()[-1].split(": ", 1)[-1]


def test_a_copy_that_hangs_and_one_that_dies_leave_alone(unharmed):
    faults = dict(zip(survivors(unharmed, 3), ["sleep", "raise", "kill"], strict=True))
    path, error = run(Copies(partial(Faulty, {FIRST + i: kind for i, kind in faults.items()}), N, workers=2, timeout=2.0))
    check(path, error, unharmed, faults, lost=("sleep", "kill"))


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 11])
@pytest.mark.parametrize("kind", ["sleep", "sleep in C", "stop", "kill", "segfault"])
def test_whatever_happens_to_a_process(unharmed, kind, at):
    faults = dict.fromkeys(survivors(unharmed, 1), kind)
    path, error = run(Copies(partial(Faulty, {FIRST + i: kind for i in faults}, at=at), N, workers=2, timeout=2.0))
    check(path, error, unharmed, faults, at, lost=(kind,))


@pytest.mark.slow
def test_three_in_one_process_and_a_reset_brings_them_back(unharmed):
    faults = dict(zip(survivors(unharmed, 3), ["stop", "segfault", "sleep in C"], strict=True))
    envs = Copies(partial(Faulty, {FIRST + i: kind for i, kind in faults.items()}), N, workers=1, timeout=2.0)
    envs.reset(seed=FIRST)
    for k in (0, 8, 16):
        *_, info = envs.step_chunk(ACTIONS[:, k : k + 8])
    assert [i for i in range(N) if info["error"][i]] == sorted(faults)
    path, error = run(envs, seed=FIRST + N)  # other seeds, so no faults
    expected, _ = run(Copies(Faulty, N, workers=0), seed=FIRST + N)
    assert not error.any() and all((path[key] == expected[key]).all() for key in path)


def test_a_process_killed_while_it_waits_costs_nothing(unharmed):
    envs = Copies(Faulty, N, workers=2, timeout=10.0)
    envs.reset(seed=FIRST)
    envs.step_chunk(ACTIONS[:, :8])
    os.kill(envs._processes[0]._process.pid, signal.SIGKILL)
    obs, reward, *_, info = envs.step_chunk(ACTIONS[:, 8:16])
    envs.close()
    assert not info["error"].any() and (obs["place"] == unharmed["place"][:, 8:16]).all() and (reward == unharmed["reward"][:, 8:16]).all()


def test_what_a_replay_does_not_bring_back_is_lost_with_a_reason():
    envs = Copies(Forgetful, 2, workers=1, timeout=10.0)
    envs.reset(seed=0)
    envs.step_chunk(ACTIONS[:2, :8])
    os.kill(envs._processes[0]._process.pid, signal.SIGKILL)
    *_, truncated, info = envs.step_chunk(ACTIONS[:2, 8:16])
    envs.close()
    assert truncated.all() and all("do not follow from its seed" in text for text in info["error"])


def tiny_planner():
    torch.manual_seed(0)
    seen = {key: torch.randn(64, size) for key, size in {"place": 2, "speed": 1, "action": 2}.items()}
    spec = Spec(obs={"place": (2,), "speed": (1,)}, action_dim=2, t_obs=2, horizon=8, fps=10, task="faulty")
    return checkpoint.build(CONFIG, spec, Normalizer.fit(seen))


def test_evaluate_goes_on_and_names_the_seed():
    reports = []
    for faults in ({}, {FIRST + 2: "raise", FIRST + 5: "nan", FIRST + 6: "kill"}):
        envs = Copies(partial(Faulty, faults, at=3), 8, workers=1, timeout=10.0)
        reports.append(evaluate(Controller(tiny_planner(), execute=4), envs, 12, FIRST))
        envs.close()
    for well, ill in zip(*(report.episodes for report in reports), strict=True):
        assert well.seed == ill.seed and not well.error
        if ill.seed in (FIRST + 2, FIRST + 5, FIRST + 6):
            assert f"(seed {ill.seed}), control step 3: " in ill.error and not ill.success
            assert (ill.reward == well.reward[: len(ill.reward)]).all()
        else:
            assert not ill.error and ill.success == well.success
            np.testing.assert_allclose(ill.reward, well.reward, atol=1e-4)  # a smaller batch of plans may round otherwise


@pytest.mark.slow
def test_gymnasiums_async_env_raises_here_and_shows_the_workers_traceback():
    envs = AsyncVectorEnv([partial(Faulty, {FIRST + 1: "raise"}, at=3)] * 2, context="spawn")
    with pytest.warns(UserWarning, match=r'(?s)faulty.py", line \d+, in fail'), pytest.raises(ZeroDivisionError, match="the gripper fell off"):
        evaluate(Controller(tiny_planner(), execute=4), envs, 2, FIRST)
    envs.close(terminate=True)


class Trouble(PushT):
    """Push-T with a function that fails where the finger has gone too far right."""

    def __init__(self, where: str, how: str):
        super().__init__()
        self.where, self.how = where, how

    def trip(self, where, wrong, value):
        if where == self.where and np.any(wrong):
            if self.how == "raise":
                raise ZeroDivisionError("too far right")
            value[wrong] = {"nan": np.nan, "huge": 1e9, "dropped": 1e12}[self.how]
        return value

    def reset(self, seed):
        state = super().reset(seed)
        self.trip("reset", seed == FIRST + 17, state.qpos)
        return state

    def control(self, action):
        return self.trip("control", action[..., 0] > 480, super().control(action))

    def observe(self, state):
        obs = super().observe(state)
        self.trip("observe", self.vector(state)[..., 0] > 470, obs["agent_pos"])
        return obs

    def outcome(self, state):
        outcome = super().outcome(state)
        self.trip("outcome", self.vector(state)[..., 0] > 470, outcome.reward)
        return outcome


def pushes():
    """Only copy 17 is sent to the right, in its twelfth step."""
    actions = np.random.default_rng(1).uniform(60, 380, (N, 6, 2)).repeat(4, 1)
    actions[17, 11:, 0] = 500
    return actions


@pytest.fixture(scope="module")
def smooth():
    path, error = run(BatchEnv(PushT(), N, threads=2), pushes())
    assert not error.any()
    return path


EVERYWHERE = [(where, how) for where in ("reset", "control", "observe", "outcome") for how in ("raise", "nan")]


@pytest.mark.parametrize("where, how", [*EVERYWHERE, ("control", "huge"), ("control", "dropped")])
def test_one_world_of_our_own_tasks_leaves_alone(smooth, where, how, capfd):
    path, error = run(BatchEnv(Trouble(where, how), N, threads=2), pushes())
    others = np.arange(N) != 17
    assert all((path[key][others] == smooth[key][others]).all() for key in smooth)
    assert [i for i in range(N) if error[i]] == [17]
    end = 0 if where == "reset" else int(path["truncated"][17].argmax())
    assert error[17].startswith(f"copy 17 (seed 117), {f'control step {end + 1}' if end else 'reset'}: ")
    expected = {"raise": r"in trip\n.*ZeroDivisionError: too far right", "nan": "not finite", "huge": r"unstable: .* in qacc\[", "dropped": r" in ctrl\["}
    assert re.search(f"(?s){expected[how]}", error[17]), error[17]
    if where == "control":  # a chunk's controls are made at once, so one that raises takes the whole chunk
        assert end == (8 if how == "raise" else 11)
    assert path["truncated"][17, end:].all() and (path["reward"][17, end:] == 0).all()
    if end:
        assert all((path[key][17, :end] == smooth[key][17, :end]).all() for key in smooth)
        assert (path["keypoint"][17, end:] == path["keypoint"][17, end - 1]).all() and (path["qpos"][17, end:] == path["qpos"][17, end - 1]).all()


def test_a_broken_task_is_no_fault_of_a_copy():
    class Broken(PushT):
        def outcome(self, state):
            raise KeyError("coverage")

    with pytest.raises(KeyError, match="coverage"):
        BatchEnv(Broken(), 3).reset(seed=0)


def test_a_world_that_was_unstable_starts_again_as_if_fresh(capfd):
    used, fresh = BatchEnv(Trouble("control", "huge"), 2), BatchEnv(PushT(), 2)
    used.reset(seed=0)
    *_, info = used.step_chunk(np.full((2, 8, 2), 500.0))
    assert info["error"].all()
    assert not used.reset(seed=3)[1]["error"].any()
    fresh.reset(seed=3)
    assert (used.step_chunk(np.full((2, 8, 2), 200.0))[-1]["qpos"] == fresh.step_chunk(np.full((2, 8, 2), 200.0))[-1]["qpos"]).all()

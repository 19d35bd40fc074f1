"""Evaluation in lanes: the same episodes in the same order, a fault or an error of one lane told as evaluate tells it."""
import numpy as np
import pytest

from envs.batch import BatchEnv
from policy.control import Controller
from policy.lanes import evaluate_in_lanes
from policy.rollout import evaluate
from tests.shell import SHORT, metrics, refused
from tests.test_rollout import TASK, Deaf, Expert


def lanes(n: int, copies: int):
    return [(Controller(Expert(TASK), execute=3), BatchEnv(TASK, copies, threads=1)) for _ in range(n)]


def test_the_same_episodes_in_the_same_order():
    seen: list[int] = []
    alone = evaluate(*lanes(1, 9)[0], 9, 50)
    for n in (1, 2, 4):
        report = evaluate_in_lanes(lanes(n, 3), 9, 50, task="gantry", on_progress=seen.append)
        assert [e.seed for e in report.episodes] == list(range(50, 59))
        assert [e.summary() for e in report.episodes] == [e.summary() for e in alone.episodes]
        assert all(np.array_equal(a.states["qpos"], b.states["qpos"]) for a, b in zip(report.episodes, alone.episodes, strict=True))
        assert report.metrics()["steps"] == alone.metrics()["steps"] and seen[-1] == 9


def test_what_a_lane_raises_is_raised():
    both = lanes(2, 3)
    both[1][1].reset = lambda **_: (_ for _ in ()).throw(RuntimeError("lane two broke"))
    with pytest.raises(RuntimeError, match="lane two broke"):
        evaluate_in_lanes(both, 6, 50)


@pytest.mark.parametrize("n, copies", [(2, 1), (2, 2), (3, 1)])
def test_seeds_that_start_alike_in_different_lanes_are_refused(n, copies):
    """Seeds 51, 52 and 53 start alike."""
    made = [(Controller(Expert(TASK), execute=3), BatchEnv(Deaf(max_steps=5), copies, threads=1)) for _ in range(n)]
    with pytest.raises(ValueError, match=r"starts seeds 5[123] and 5[123] with the same observation"):
        evaluate_in_lanes(made, n, 51)


def test_eval_in_lanes_and_in_bf16(shell, run):
    found = {}
    for name, more in {"plain": [], "lanes": ["lanes=2"], "bf16": ["lanes=2", "precision=bf16"]}.items():
        done = shell("eval", "run=run", f"out={name}", *SHORT, *more)
        assert done.code == 0, done.err
        assert [e["seed"] for e in metrics(shell, name)["per_episode"]] == [100000, 100001, 100002]
        with np.load(shell.folder / name / "actions.npz") as kept:
            found[name] = kept["actions"]
    assert np.abs(found["lanes"] - found["plain"]).max() < 1e-5  # metres
    assert 1e-6 < np.abs(found["bf16"] - found["plain"]).max() < 0.02
    refused(shell("eval", "run=run", "precision=fp8", *SHORT), "precision=fp8", "use fp32 or bf16")
    refused(shell("eval", "run=run", "lanes=0", *SHORT), "lanes=0")
    refused(shell("eval", "run=run", "until=0.1", "lanes=2", "+env.max_steps=16", "videos=0"), "lanes=1")

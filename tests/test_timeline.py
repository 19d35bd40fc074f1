"""Chunks in time: what is due when, who takes over, how much a step matters to real-time chunking."""
import numpy as np
import pytest

from policy.timeline import MERGES, Plan, committed_steps, shifted, soft_mask, take_over


def test_the_soft_mask_has_the_papers_values():
    """H=8, d=2, s=2 of arXiv 2506.07339 eq. 5: c_i = (6 - i) / 5, w_i = c_i (e^c_i - 1) / (e - 1)."""
    np.testing.assert_allclose(soft_mask(8, 2, 6), [1, 1, 0.571, 0.287, 0.114, 0.026, 0, 0], atol=6e-4)
    assert soft_mask(4, 0, 0).tolist() == [0, 0, 0, 0] and soft_mask(4, 4, 4).tolist() == [1, 1, 1, 1] and soft_mask(4, 2, 2).tolist() == [1, 1, 0, 0]
    for horizon, committed, known in ((16, 0, 8), (16, 3, 16), (32, 5, 24)):
        weight = soft_mask(horizon, committed, known)
        assert (np.diff(weight) <= 0).all() and (weight[:committed] == 1).all() and (weight[known:] == 0).all() and 0 < weight[known - 1] < 1
    for committed, known in ((3, 2), (-1, 2), (2, 9)):
        with pytest.raises(ValueError, match="must not exceed"):
            soft_mask(8, committed, known)


@pytest.mark.parametrize("shift", [0, 1, 3, 0.25, 2.5, 6.9, -2, -0.5])
def test_a_line_stays_itself_when_it_is_shifted(shift):
    """Linear interpolation of a line is exact, also between steps; outside it is held and said to be unknown."""
    t = np.arange(8.0)
    line = np.stack([2 * t + 1, -t], 1)[None]
    moved, known = shifted(line, shift, 10)
    at = shift + np.arange(10)
    assert known.tolist() == ((at >= 0) & (at <= 7)).tolist()
    want = np.clip(at, 0, 7)
    np.testing.assert_allclose(moved[0], np.stack([2 * want + 1, -want], 1), atol=1e-12)


def test_an_ensemble_is_the_weighted_mean_of_all_chunks_that_say_something():
    """Against ACT's own formula, exp(-.1 i) with i = 0 the oldest, chunk by chunk."""
    rng, t, every = np.random.default_rng(0), 8, 3
    chunks = rng.normal(size=(4, 1, t, 2))
    plan = Plan.of(chunks[0])
    for chunk in chunks[1:]:
        plan = take_over(plan, chunk, every, "ensemble")
    for i in range(t):
        now = 3 * every + i
        said = [c[0, now - k * every] for k, c in enumerate(chunks) if 0 <= now - k * every < t]
        weight = np.exp(-0.1 * np.arange(len(said)))
        np.testing.assert_allclose(plan.actions[0, i], weight @ np.array(said) / weight.sum(), atol=1e-12)
        assert plan.count[0, i] == len(said)


@pytest.mark.parametrize("merge", MERGES)
def test_who_takes_over(merge):
    old, chunk = Plan.of(np.zeros((2, 4, 1))), np.ones((2, 4, 1))
    new = take_over(old, chunk, 1, merge).actions[0, :, 0]
    half = np.exp(-0.1) / (1 + np.exp(-0.1))
    np.testing.assert_allclose(new, [half, half, half, 1] if merge == "ensemble" else [1, 1, 1, 1])


def test_an_unknown_merge_is_told_the_known_ones():
    with pytest.raises(ValueError, match="merge 'mean' is unknown; use one of naive, ensemble"):
        take_over(Plan.of(np.zeros((1, 4, 1))), np.ones((1, 4, 1)), 1, "mean")


def test_rows_of_a_plan_are_plans():
    plan = Plan(np.arange(6.0).reshape(3, 2, 1), np.arange(6.0).reshape(3, 2), np.ones((3, 2)))
    some = plan[np.array([2, 0])]
    assert some.actions[..., 0].tolist() == [[4, 5], [0, 1]] and some.weight.tolist() == [[4, 5], [0, 1]] and some.count.shape == (2, 2)


def test_measured_delays_become_committed_steps():
    """A step is committed once it begins before the plan lands: 120 ms at 50 Hz are the 6 steps at 0, 20 … 100 ms."""
    assert committed_steps([0.12], 0.02, 16) == 6 and committed_steps([0.121], 0.02, 16) == 7 and committed_steps([0.12], 0.05, 16) == 3
    assert committed_steps([], 0.02, 16) == committed_steps([0.0], 0.02, 16) == 0
    assert committed_steps([0.01, 0.09, 0.03], 0.02, 16) == 5 and committed_steps([0.4], 0.02, 8) == 8
    slow_start = [5.0] + [0.03] * 10
    assert committed_steps(slow_start, 0.02, 100) == 2 and committed_steps(slow_start[:10], 0.02, 1000) == 250  # forgotten after ten
    for delays, dt in (([0.1], 0.0), ([-0.1], 0.02), ([float("nan")], 0.02), ([float("inf")], 0.02)):
        with pytest.raises(ValueError, match="must be above 0 and delays"):
            committed_steps(delays, dt, 8)

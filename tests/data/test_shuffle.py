"""The order of windows under a memory bound: each once, never more blocks in use than fit, and as far from a perfect shuffle as it says."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.data.pool import Pool
from policy.data.shuffle import expected_distinct, schedule


def blocks_of(count: int, size: int) -> np.ndarray:
    return np.repeat(np.arange(count), size)


def in_use(plan) -> np.ndarray:
    """(n,): readings begun and not finished at each draw."""
    n = len(plan.order)
    first = np.searchsorted(plan.begun, np.arange(1, len(plan.block) + 1))
    return np.cumsum(np.bincount(first, minlength=n + 1) - np.bincount(plan.last + 1, minlength=n + 1))[:n]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 45), st.integers(0, 9))
def test_every_window_once_and_no_more_blocks_than_fit(sizes, live, seed):
    block = np.repeat(np.arange(len(sizes)), sizes)
    plan = schedule(block, live, seed)
    assert sorted(plan.order.tolist()) == list(range(len(block)))
    np.testing.assert_array_equal(plan.block[plan.visit], block[plan.order])  # the reading a window is drawn from is of its block
    assert in_use(plan).max() <= live
    assert (np.diff(plan.begun) >= 0).all() and len(plan.block) <= len(sizes) + min(live, len(sizes))
    again = schedule(block, live, seed)
    np.testing.assert_array_equal(plan.order, again.order)
    if len(block) > 20:
        assert not np.array_equal(plan.order, schedule(block, live, seed + 100).order)


def test_with_everything_in_memory_it_is_a_uniform_permutation():
    """Each window at each place equally often: chi-square of 12 x 12 counts."""
    n, trials = 12, 6000
    counts = np.zeros((n, n))
    for seed in range(trials):
        counts[schedule(blocks_of(4, 3), 4, seed).order, np.arange(n)] += 1
    expected = trials / n
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi2 - (n - 1) ** 2) < 4 * np.sqrt(2 * (n - 1) ** 2)


def test_the_quality_it_states():
    count, size, live, b = 800, 32, 100, 64
    plan = schedule(blocks_of(count, size), live, 0)
    batches = (plan.order // size)[: count * size // b * b].reshape(-1, b)
    distinct = np.mean([len(np.unique(x)) for x in batches])
    assert distinct == pytest.approx(expected_distinct(live, b), rel=0.02) and distinct > 0.75 * expected_distinct(count, b)
    first, last = np.mean([len(np.unique(x)) for x in batches[:20]]), np.mean([len(np.unique(x)) for x in batches[-20:]])
    assert first == pytest.approx(distinct, rel=0.05) and last == pytest.approx(distinct, rel=0.05)  # the edges of an epoch are no worse
    at = plan.order - plan.order.mean()
    for lag in (1, 7, 40):
        assert abs((at[lag:] * at[:-lag]).mean() / at.var() - 1 / live) < 4 / np.sqrt(len(at))
    place = np.empty(len(plan.order))
    place[plan.order] = np.arange(len(place))
    spread = place.reshape(count, size)
    away = np.abs(spread[:, :1] - spread[:, 1:]) / len(place)
    assert np.minimum(away, 1 - away).max() <= live / count * 1.05
    meets = np.mean([1 - len(np.unique(x)) / b for x in batches]) / (1 - expected_distinct(count, b) / b)
    assert meets == pytest.approx(count / live, rel=0.3)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.floats(0, 1))
def test_a_pool_has_what_is_drawn_from_wherever_it_starts(count, size, live, readers, batch, where):
    live = min(live, count)
    slots = live if live == count else live + 1
    content = [-1] * slots

    def read(block, slot):
        content[slot] = block
    pool = Pool(slots, read, readers)
    try:
        for epoch in range(2):
            plan = schedule(blocks_of(count, size), live, epoch)
            start = int(where * len(plan.order) * 0.99) if epoch == 0 else 0
            pool.follow(plan, start)
            at = start
            while at < len(plan.order):
                end = min(pool.take(at), at + batch)
                assert end > at
                for i in range(at, end):
                    assert content[pool.slot[plan.visit[i]]] == plan.block[plan.visit[i]]
                at = end
        if live == count:
            assert pool.reads == count  # what is in memory is not read again
        assert pool.reads <= 2 * (count + live)
    finally:
        pool.close()


@pytest.mark.parametrize("kind", [OSError, BaseException])
def test_a_reader_that_fails_is_heard(kind):
    broken = [True]

    def read(block, slot):
        if broken[0]:
            raise kind("the disk is gone")
    pool, plan = Pool(3, read, 2), schedule(blocks_of(9, 4), 2, 0)
    pool.follow(plan, 0)
    with pytest.raises(kind, match="the disk is gone"):
        pool.take(0)
    broken[0] = False
    pool.follow(plan, 0)  # what was half read is read again
    at = 0
    while at < 36:
        at = pool.take(at)
    assert pool.reads >= 9
    pool.close()

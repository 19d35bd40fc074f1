"""Intervals and tests keep what they promise: against scipy, against published examples, and by exact sums or simulation."""
from functools import cache

import numpy as np
import pytest
from scipy import stats as oracle

from policy import stats
from policy.stats import Paired, bootstrap, enough, episodes_needed, holm, mcnemar, mean_interval, newcombe, wilson

RATES = (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)


def test_wilson_is_scipys():
    for n in (1, 2, 5, 10, 50, 100, 997):
        for k in sorted({0, 1, n // 3, n // 2, n - 1, n}):
            want = oracle.binomtest(k, n).proportion_ci(0.95, method="wilson")
            assert wilson(k, n) == pytest.approx((want.low, want.high), abs=1e-12)
    for k, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="is not a rate"):
            wilson(k, n)


def test_wilson_ends_at_0_and_1_exactly():
    """A bar of errors from them may not be negative by a rounding."""
    for z in (stats.Z, stats.Z_LOOKED):
        assert all(wilson(n, n, z)[1] == 1.0 and wilson(0, n, z)[0] == 0.0 for n in range(1, 1001))


def coverage(p: float, half_width: float, look_every: int, most: int = 2000, z: float = stats.Z_LOOKED) -> tuple[float, float]:
    """Exact share of evaluations whose final interval holds p, and their mean length, when they stop at the first look that is enough."""
    alive, n, held, length = np.ones(1), 0, 0.0, 0.0  # alive[k]: probability of being here with k successes
    while n < most:
        n += look_every
        alive = np.convolve(alive, oracle.binom.pmf(np.arange(look_every + 1), look_every, p))
        ends = [wilson(k, n, z) for k in range(n + 1)]
        stop = np.array([(hi - lo) / 2 <= half_width or n >= most for lo, hi in ends])
        held += sum(alive[k] for k in np.flatnonzero(stop) if ends[k][0] - 1e-12 <= p <= ends[k][1] + 1e-12)
        length += n * alive[stop].sum()
        alive[stop] = 0
    return held, length


def test_wilson_covers_95_percent():
    """At one n the coverage of any interval jumps with p; over p it is .95, and never below .90."""
    found = [coverage(p, 1, 100, 100, stats.Z)[0] for p in np.linspace(0.5, 1, 101)]
    assert np.mean(found) == pytest.approx(0.951, abs=0.003) and min(found) > 0.90


def test_stopping_when_the_interval_is_narrow_keeps_its_coverage():
    """Looking after every 20 episodes: .957 to .981 at these rates; with 1.96 in place of 2.05 it falls to .946."""
    found = {p: coverage(p, 0.05, 20) for p in RATES}
    assert min(held for held, _ in found.values()) >= 0.95, found
    assert [round(n, -1) for _, n in found.values()] == [420, 270, 160, 90, 50, 40]


@pytest.mark.slow
@pytest.mark.parametrize("half_width, look_every", [(0.03, 10), (0.03, 100), (0.05, 10), (0.05, 100)])
def test_stopping_covers_whatever_the_waves(half_width, look_every):
    """Over p in .5 … 1 the mean is .961. With z 1.96 the worst is .928 (±3 %, waves of 10); what is left is Wilson's own: .91 at n = 100, p = .995."""
    held = {p: coverage(p, half_width, look_every)[0] for p in (*RATES, *np.linspace(0.5, 1, 26))}
    assert min(held[p] for p in RATES) >= 0.95 and np.mean(list(held.values())) >= 0.958 and min(held.values()) >= 0.94, held


def test_enough_is_asked_of_the_interval_that_is_reported():
    assert not enough(50, 100, 0.05) and enough(100, 100, 0.05) and enough(0, 100, 0.05)
    lo, hi = wilson(340, 400, stats.Z_LOOKED)
    assert enough(340, 400, (hi - lo) / 2 + 1e-9) and not enough(340, 400, (hi - lo) / 2 - 1e-9)


def test_the_bootstrap_is_scipys_bca():
    rng = np.random.default_rng(0)
    for x in (rng.beta(0.5, 0.2, 60), np.r_[np.ones(90), rng.random(10)], rng.normal(3, 2, 40)):
        want = oracle.bootstrap((x,), np.mean, n_resamples=50_000, method="BCa", rng=1, batch=2000).confidence_interval
        assert bootstrap(x) == pytest.approx(tuple(want), abs=0.03 * (want.high - want.low))
    assert bootstrap(x) == bootstrap(x) and bootstrap([3.5, 3.5]) == (3.5, 3.5)
    with pytest.raises(ValueError, match="one value per episode"):
        bootstrap([])


def test_the_bootstrap_covers_the_mean_of_push_ts_scores():
    """Nine of ten scores are 1, the rest anything. Over 5000 samples: .947 (100 scores) and .933 (50); uncorrected .924 and .905."""
    rng = np.random.default_rng(0)
    held = []
    for i in range(1500):
        lo, hi = bootstrap(np.where(rng.random(100) < 0.9, 1.0, rng.random(100)), seed=i, draws=1000)
        held.append(lo <= 0.95 <= hi)
    assert 0.932 < np.mean(held) < 0.965


def test_the_bootstrap_widens_with_z():
    """By 2.05 / 1.96 where it is nearly normal."""
    x = np.random.default_rng(0).normal(3, 2, 200)
    (lo, hi), (low, high) = bootstrap(x), mean_interval(x, stats.Z_LOOKED)
    assert (high - low) / (hi - lo) == pytest.approx(stats.Z_LOOKED / stats.Z, abs=0.02)


def test_a_score_that_is_success_has_the_interval_of_success():
    assert mean_interval([1.0] * 50) == wilson(50, 50) and mean_interval([0, 1, 1, 0]) == wilson(2, 4)
    assert mean_interval([0.5, 1, 1, 0]) == bootstrap([0.5, 1, 1, 0])


def test_published_examples_of_pairs():
    """Airway hyper-responsiveness before and after (Fagerland, Lydersen & Laake 2014): [-.507, -.026], mid-p .039."""
    assert newcombe(1, 1, 7, 12) == pytest.approx((-0.507, -0.026), abs=5e-4)
    assert mcnemar(1, 7) == pytest.approx(0.039, abs=5e-4)
    for b, c in ((1, 7), (6, 16), (0, 3), (0, 0), (4, 4), (120, 90)):
        few, n = min(b, c), b + c
        want = 2 * oracle.binom.cdf(few, n, 0.5) - oracle.binom.pmf(few, n, 0.5) if n else 1.0
        assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(min(1.0, want), rel=1e-9)


def test_the_paired_interval_turns_with_its_arguments():
    rng = np.random.default_rng(0)
    for both, b, c, neither in rng.integers(0, 20, (50, 4)) + [1, 0, 0, 0]:
        lo, hi = newcombe(both, b, c, neither)
        assert newcombe(both, c, b, neither) == pytest.approx((-hi, -lo)) and newcombe(neither, b, c, both) == pytest.approx((lo, hi))
        assert -1 <= lo <= (b - c) / (both + b + c + neither) <= hi <= 1


def shares(p_a: float, p_b: float, phi: float) -> list[float]:
    """Probabilities of (both, only a, only b, neither) for two rates with correlation phi."""
    both = p_a * p_b + phi * np.sqrt(p_a * (1 - p_a) * p_b * (1 - p_b))
    return [both, p_a - both, p_b - both, 1 - p_a - p_b + both]


@pytest.mark.parametrize("n", [50, 100])
@pytest.mark.parametrize("p_a, p_b, phi", [(0.5, 0.5, 0), (0.8, 0.7, 0.3), (0.9, 0.8, 0.3), (0.95, 0.9, 0), (0.99, 0.95, 0.3), (1, 0.9, 0), (1, 1, 0)])
def test_the_paired_interval_covers_the_difference(n, p_a, p_b, phi):
    """.947 and more everywhere; Tango's score interval, tried beside it, falls to .936 at (1, .9) and n = 100."""
    interval = cache(lambda *counts: newcombe(*map(int, counts)))
    found = [interval(*counts) for counts in np.random.default_rng(0).multinomial(n, shares(p_a, p_b, phi), 4000)]
    assert np.mean([lo - 1e-12 <= p_a - p_b <= hi + 1e-12 for lo, hi in found]) > 0.94


@pytest.mark.parametrize("p_a, p_b, phi, n", [(0.8, 0.7, 0, 296), (0.8, 0.7, 0.5, 153), (0.9, 0.8, 0.3, 146), (0.6, 0.5, 0.3, 275)])
def test_a_planted_10_point_difference_is_found_with_the_episodes_predicted(p_a, p_b, phi, n):
    """80 % of the time; and where there is none, one is found in 5 %."""
    split = shares(p_a, p_b, phi)
    assert episodes_needed(p_a, p_b, split[1] + split[2]) == n
    p = cache(mcnemar)
    rng = np.random.default_rng(0)
    power = np.mean([p(int(b), int(c)) < 0.05 for _, b, c, _ in rng.multinomial(n, split, 5000)])
    even = (split[1] + split[2]) / 2
    level = np.mean([p(int(b), int(c)) < 0.05 for _, b, c, _ in rng.multinomial(n, [split[0], even, even, split[3]], 5000)])
    assert 0.78 < power < 0.84 and 0.035 < level < 0.06


def test_episodes_needed_follow_from_the_discordant_share_alone():
    assert episodes_needed(0.8, 0.7) == episodes_needed(0.7, 0.8) == episodes_needed(0.8, 0.7, 0.8 * 0.3 + 0.7 * 0.2) == 296
    assert episodes_needed(0.8, 0.7, 0.1) < 80 < episodes_needed(0.8, 0.7, power=0.9) and episodes_needed(0.9, 0.9) is None
    assert 25 * 0.85 < episodes_needed(0.7, 0.68) / episodes_needed(0.7, 0.6) < 25  # a fifth of the difference, 25 times the episodes
    for discordant in (0.05, 0.6):
        with pytest.raises(ValueError, match="cannot differ on a share"):
            episodes_needed(0.8, 0.7, discordant)


def test_holm_is_the_textbooks():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([0.03]) == [0.03] and holm([]) == []


def test_pairs_are_counted_seed_by_seed():
    pair = Paired.of([True, True, False, False, True], [True, False, True, False, False])
    assert pair == Paired(1, 2, 1, 1) and pair.n == 5
    found = pair.summary()
    assert found["difference"] == pytest.approx(-0.2) and found["difference_ci"] == pytest.approx([-x for x in newcombe(1, 2, 1, 1)[::-1]])
    assert found["p"] == mcnemar(2, 1) and found["episodes_needed"] == episodes_needed(0.6, 0.4, 0.6)
    assert Paired.of([True] * 3, [True] * 3).summary()["episodes_needed"] is None
    with pytest.raises(ValueError, match="3 and 2 episodes make no pairs"):
        Paired.of([True] * 3, [True] * 2)

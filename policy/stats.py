"""How sure a measured rate, mean or difference is. What the intervals and the test promise is checked by simulation in tests/test_stats.py."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

NORMAL = NormalDist()
Z = NORMAL.inv_cdf(0.975)
Z_LOOKED = 2.05  # after repeated looks: 1.96 would cover down to .93, this covers .95 and costs 9 % more episodes

Interval = tuple[float, float]


def wilson(successes: int, n: int, z: float = Z) -> Interval:
    """95 % interval of a success rate (Wilson 1927): honest at 0 and 1, where the normal one has no width."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} episodes is not a rate")
    p, d = successes / n, 1 + z**2 / n
    centre, half = (p + z**2 / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)  # exact, where rounding is not


def bootstrap(values: Sequence[float] | np.ndarray, seed: int = 0, draws: int = 10_000, z: float = Z) -> Interval:
    """95 % interval of the mean of values (n,), bias-corrected and accelerated (Efron 1987), because scores are skewed."""
    x = np.asarray(values, float)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"the mean of values of shape {x.shape} has no interval: give one value per episode")
    n, rng = len(x), np.random.default_rng(seed)
    away = x - x.mean()
    if not away.any():
        return float(x[0]), float(x[0])
    block = max(1, 2_000_000 // n)  # draws at once, for the memory's sake
    means = np.concatenate([x[rng.integers(0, n, (min(block, draws - k), n))].mean(1) for k in range(0, draws, block)])
    below = np.mean(means < x.mean()) + np.mean(means == x.mean()) / 2
    bias = NORMAL.inv_cdf(float(np.clip(below, 0.5 / draws, 1 - 0.5 / draws)))
    skew = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    at = [NORMAL.cdf(bias + (bias + end) / (1 - skew * (bias + end))) for end in (-z, z)]
    lo, hi = np.quantile(means, at)
    return float(lo), float(hi)


def mean_interval(values: Sequence[float] | np.ndarray, z: float = Z) -> Interval:
    """95 % interval of the mean of values (n,): Wilson's where they are 0 and 1 (resampling 100 ones would claim certainty), else the bootstrap."""
    x = np.asarray(values, float)
    return wilson(int(x.sum()), len(x), z) if len(x) and np.isin(x, (0, 1)).all() else bootstrap(x, z=z)


def enough(successes: int, n: int, half_width: float) -> bool:
    """Whether a run that looks again and again may stop here: its interval, with the z that pays for the looks, is ± half_width."""
    lo, hi = wilson(successes, n, Z_LOOKED)
    return (hi - lo) / 2 <= half_width


def newcombe(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """95 % interval of rate a - rate b over the same seeds, by what came of each seed (Newcombe 1998, method 10)."""
    n = both + only_a + only_b + neither
    a, b = both + only_a, both + only_b
    (lo_a, hi_a), (lo_b, hi_b) = wilson(a, n), wilson(b, n)
    lo_a, hi_a, lo_b, hi_b = a / n - lo_a, hi_a - a / n, b / n - lo_b, hi_b - b / n  # widths to either side
    margins = a * (n - a) * b * (n - b)
    odds = both * neither - only_a * only_b
    phi = (max(odds - n / 2, 0) if odds > 0 else odds) / math.sqrt(margins) if margins else 0.0
    difference = (only_a - only_b) / n
    below, above = lo_a**2 - 2 * phi * lo_a * hi_b + hi_b**2, hi_a**2 - 2 * phi * hi_a * lo_b + lo_b**2
    return difference - math.sqrt(max(0.0, below)), difference + math.sqrt(max(0.0, above))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided mid-p value that a and b succeed equally often, by the seeds only one of them wins (Fagerland et al. 2013)."""
    n, few = only_a + only_b, min(only_a, only_b)
    log_half = n * math.log(2)
    tail = [math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - log_half) for k in range(few + 1)]
    return min(1.0, 2 * sum(tail) - tail[-1])


def episodes_needed(p_a: float, p_b: float, discordant: float | None = None, *, power: float = 0.8, z: float = Z) -> int | None:
    """Seeds on which both must run for a 5 % paired test to tell their rates apart with this power (Connor 1987); None for equal rates.

    discordant: share of the seeds that exactly one of them wins; None: as if they won independently, which is pessimistic.
    """
    if discordant is None:
        discordant = p_a * (1 - p_b) + p_b * (1 - p_a)
    gap = abs(p_a - p_b)
    if not gap - 1e-9 <= discordant <= min(p_a + p_b, 2 - p_a - p_b) + 1e-9:
        raise ValueError(f"rates {p_a:g} and {p_b:g} cannot differ on a share of {discordant:g} of the seeds")
    if gap < 1e-9:
        return None
    root = z * math.sqrt(discordant) + NORMAL.inv_cdf(power) * math.sqrt(max(0.0, discordant - gap**2))
    return math.ceil(root**2 / gap**2)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979), in the order given."""
    order, out, worst = sorted(range(len(p)), key=lambda i: p[i]), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


@dataclass(frozen=True)
class Paired:
    """Two policies on the same seeds: how many both win, only the first (a), only the second (b), neither."""
    both: int
    only_a: int
    only_b: int
    neither: int

    @classmethod
    def of(cls, a: Sequence[bool], b: Sequence[bool]) -> "Paired":
        """From the successes (n,) of both, seed by seed."""
        if len(a) != len(b) or not len(a):
            raise ValueError(f"{len(a)} and {len(b)} episodes make no pairs")
        pairs = list(zip(map(bool, a), map(bool, b), strict=True))
        return cls(*(pairs.count(each) for each in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    def summary(self) -> dict[str, object]:
        """b against a: difference of the rates with its interval, p, and the seeds that would tell them apart."""
        lo, hi = newcombe(self.both, self.only_a, self.only_b, self.neither)
        rates = (self.both + self.only_a) / self.n, (self.both + self.only_b) / self.n
        return {"n": self.n, "both": self.both, "only_first": self.only_a, "only_second": self.only_b, "neither": self.neither,
                "difference": rates[1] - rates[0], "difference_ci": [-hi, -lo], "p": mcnemar(self.only_a, self.only_b),
                "episodes_needed": episodes_needed(*rates, (self.only_a + self.only_b) / self.n)}

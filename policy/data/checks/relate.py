"""What goes with what: moving channels of several keys side by side, correlations at a lag, and which channels are the rate of others."""
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.look import STRETCH, Data

FRAMES = 2**15  # of the sample, for correlations
RATE = 0.8      # correlation of a channel with the change of another, whose rate it then is
RATES = re.compile(r"vel|speed|torque|force|effort|current|accel|gyro|imu|contact")  # what may change at once when something is touched
LEFT = 0.75     # share of the unexplained variance that a clearly better correlation leaves, where all are high
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Joined:
    """values (n, c) of the same sampled frames `at` (n,); columns: key and channel of each; episode (n,): which stretch a frame belongs to."""
    values: Array
    columns: list[tuple[str, int]]
    episode: NDArray[np.int64]
    at: NDArray[np.int64]


def moving_states(data: Data, keys: Iterable[str] | None = None) -> dict[str, NDArray[np.int64]]:
    """{key: channels of states (of keys, or all) that move and take many values}"""
    moving = {key: np.flatnonzero(data.scales(key).moves & ~data.scales(key).few) for key in data.keys("state") if keys is None or key in keys}
    return {key: use for key, use in moving.items() if len(use)}


def joined(data: Data, channels: Mapping[str, NDArray[np.int64]]) -> Joined | None:
    """None where there are no channels."""
    if not channels:
        return None
    samples = {key: data.sample(key) for key in channels}
    at = reduce(np.intersect1d, [s.at for s in samples.values()])
    at = at[(at // STRETCH) % max(1, len(at) // FRAMES) == 0]
    values = [samples[key].values[np.searchsorted(samples[key].at, at)][:, use] for key, use in channels.items()]
    episode = np.searchsorted(data.ends, at, side="right") + np.cumsum(np.diff(at, prepend=at[:1]) > 1) * (len(data.ends) + 1)
    return Joined(np.concatenate(values, axis=1).astype(np.float64), [(key, int(c)) for key, use in channels.items() for c in use], episode, at)


def changes(x: Array, episode: NDArray[np.int64]) -> Array:
    """(n, c): x[t+1] - x[t], 0 at the end of a stretch."""
    d = np.diff(x, axis=0, append=x[-1:])
    d[:-1][episode[1:] != episode[:-1]] = 0
    return d


def shifted(n: int, lag: int) -> tuple[slice, slice]:
    """Rows t and t + lag."""
    return slice(max(0, -lag), n - max(0, lag)), slice(max(0, lag), n - max(0, -lag))


def correlation(a: Array, s: Array, episode: NDArray[np.int64], lag: int) -> Array:
    """(d, s): of a at t and s at t + lag, within stretches."""
    i, j = shifted(len(a), lag)
    a = a[i] * (episode[i] == episode[j])[:, None]
    s = s[j]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.nan_to_num(a.T @ s / np.sqrt((a * a).sum(axis=0)[:, None] * (s * s).sum(axis=0)))


def better(a: Array, b: Array) -> NDArray[np.bool_]:
    """Whether correlations a explain clearly more than b."""
    return (a > b) & (1 - a ** 2 < LEFT * (1 - np.maximum(b, 0) ** 2))


def rates(data: Data, key: str) -> NDArray[np.bool_]:
    """(c,): channels of a state that are velocities or forces, by the name of the key, or because they go with the change of another channel
    or rest at 0."""
    if RATES.search(key.lower()):
        return np.ones(data.width(key), bool)
    found = data.once("rates", "", lambda: all_rates(data))
    return np.array([(key, c) in found for c in range(data.width(key))]) | pulses(data, key)


def pulses(data: Data, key: str) -> NDArray[np.bool_]:
    """(c,): channels that are 0 most of the time and go to both sides of it, as an object's velocity does."""
    x, scales = data.sample(key).values, data.scales(key)
    if not len(x):
        return np.zeros(data.width(key), bool)
    return (np.abs(x) < 0.01 * scales.range).mean(axis=0) * (scales.lo < -0.1 * scales.range) * (scales.hi > 0.1 * scales.range) > 0.5


def all_rates(data: Data) -> set[tuple[str, int]]:
    together = joined(data, moving_states(data))
    if together is None or len(together.values) < 20:
        return set()
    x, d = together.values - together.values.mean(axis=0), changes(together.values, together.episode)
    clipped = np.clip(d, *np.quantile(d, [0.005, 0.995], axis=0))  # a teleport is no rate
    found = set()
    for lag in (0, 1):
        c = correlation(clipped, x, together.episode, lag)
        np.fill_diagonal(c, 0)
        found |= {together.columns[j] for j in np.flatnonzero((c > RATE).any(axis=0))}
    return found


def moving(data: Data, lo: int, hi: int) -> NDArray[np.bool_]:
    """(hi - lo,): whether a state channel moves at an ordinary pace in the step to this frame."""
    out = np.zeros(hi - lo, bool)
    for key in data.keys("state"):
        scales = data.scales(key)
        use = scales.moves & ~scales.few & (scales.typical > 0)
        x = np.asarray(data.store.read(key, lo, hi), np.float64).reshape(hi - lo, -1)[:, use]
        out[1:] |= (np.abs(np.diff(x, axis=0)) > 0.5 * scales.typical[use]).any(axis=1)
    return out

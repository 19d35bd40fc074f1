"""When the state follows the action in each episode: one whose actions come at another time than the others' is hidden in a mean over all."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, drop, finding, some
from policy.data.checks.look import Data
from policy.data.checks.relate import Array
from policy.page import counted

SPAN = 24            # lags looked at, before and after [steps]
LEAST = 5            # episodes of which the lag is clear
SHORT = 40           # frames: shorter episodes are left out
OVERLAP = 0.25       # of the energy of both, at least
SURE, LIKE = 0.5, 0.75   # least correlation at an episode's lag, and as a share of what is usual
LEAD, LEAST_LEAD, REST = 0.15, 0.02, 0.6  # ahead of the correlation at the usual lag; or, where all are high, the share of what is unexplained that is left
APART, WIDE = 2, 2   # steps from the usual lag, and more where the usual ones differ: by so many times as much
MOST, AGREE = 0.6, 0.9  # of the episodes: they are the usual ones; they are usual or clearly odd
PEAK = 0.8           # of the best lag's correlation: another peak this high, and the motion is periodic


@dataclass(frozen=True)
class Goes:
    """What goes together: action channels use (d,), with columns [(key, channel)] of states.   level: the action itself, not its change, goes with changes.

    scale, leap: (2, d) rms change of both, and from where on it is no motion.   sign: (d,), -1 where they go against each other."""
    use: NDArray[np.intp]
    columns: Sequence[tuple[str, int]]
    level: bool
    scale: Array
    leap: Array
    sign: Array


def uneven(data: Data, goes: Goes, skip: Sequence[int]) -> list[Finding]:
    """Episodes but those to skip whose lag is another than that of the others."""
    if (unlike := apart(each(data, goes), skip)) is None:
        return []
    odd, lag, r, there, middle = unlike
    before = bool((lag[odd] < 0).any())
    at = np.flatnonzero(odd)
    places = [Place(int(e), 0, int(data.lengths[e]), text=f"lag {lag[e]}, correlation {r[e]:.2f}; at {middle}: {there[e]:.2f}") for e in at]
    late = middle - int(np.median(lag[odd]))
    what = f"about {counted(abs(late), 'step')} {'later' if late > 0 else 'earlier'}"
    return [finding("error" if before else "warning", "lag_mixed", f"the actions of {counted(len(at), 'episode')} come {what} than those of the "
                    f"others, whose state follows after {counted(middle, 'step')}: {some([f'episode {e}' for e in at], 8)}", key=data.action, channels=goes.use,
                    places=places,
                    why="Cause and effect are exchanged there: the policy learns to repeat what has happened." if before else
                    "The network is told two things about the same motion: when to act.",
                    fix=f"Check which clock stamped them, and shift them in the source; or {drop(data.path, places)}", lag=middle)]


def apart(curves: Array, skip: Sequence[int]) -> tuple[NDArray[np.bool_], NDArray[np.int64], Array, Array, int] | None:
    """(E,) each: which episodes clearly have another lag than the others, the lag, the correlation there and at the usual lag; and the usual lag.

    curves: (E, 2 SPAN + 1).   None where there are none."""
    lags = np.arange(-SPAN, SPAN + 1)
    lag, r = lags[curves.argmax(axis=1)], curves.max(axis=1)
    clear = (r > SURE) & ~np.isin(np.arange(len(r)), skip)
    clear &= np.array([good and not periodic(lags, curve, int(best)) for good, curve, best in zip(clear, curves, lag, strict=True)], bool)
    if clear.sum() < LEAST or (usual := usually(lag[clear])) is None:
        return None
    middle, lo, hi = usual
    inside = clear & (lag >= lo) & (lag <= hi)
    there = np.abs(curves[:, (lags >= lo) & (lags <= hi)]).max(axis=1)  # turned round, they go together at the usual lag
    shape = np.median(curves[inside], axis=0)  # sharp enough that such a lag would be seen in the others too
    odd = clear & (np.abs(lag - middle) >= APART + WIDE * (hi - lo)) & (r > LIKE * np.median(r[inside]))
    odd &= leads(r, there) & leads(shape.max(), np.abs(shape[lag + SPAN]))
    if not odd.any() or (inside | odd).sum() < AGREE * clear.sum():
        return None  # alike, or each of its own: a slow robot follows a quick motion later than a slow one
    return odd, lag, r, there, middle


def leads(r: Array, other: Array) -> NDArray[np.bool_]:
    """Whether correlations are clearly greater than others; of high ones the rest tells, of low ones the difference."""
    return (r > other + LEAD) | ((r > other + LEAST_LEAD) & (1 - r ** 2 < REST * (1 - other ** 2)))


def usually(lag: NDArray[np.int64]) -> tuple[int, int, int] | None:
    """(median, least, greatest) of the usual lags: of the larger part of the episodes; where neither is, of those that follow soonest. Lags APART or more
    from the next belong to another part. None where there is one part, or the usual one is before the action: that is said of all."""
    values = np.sort(lag)
    parts = np.split(values, np.flatnonzero(np.diff(values) >= APART) + 1)
    largest = max(parts, key=len)
    most = len(largest) >= MOST * len(lag) and np.median(largest) >= 0
    chosen = largest if most else next((p for p in parts if np.median(p) >= 0 and len(p) >= len(largest) / 4), largest)
    middle = int(np.median(chosen))
    return None if len(parts) == 1 or middle < 0 else (middle, int(chosen[0]), int(chosen[-1]))


def each(data: Data, goes: Goes) -> Array:
    """(E, 2 SPAN + 1): correlation of action and state at each lag, all channels together; 0 where an episode is too short. Of one that is cut its longest
    piece speaks."""
    out, longest = np.zeros((len(data.ends), 2 * SPAN + 1)), np.full(len(data.ends), SHORT - 1)
    keys = sorted({key for key, _ in goes.columns})
    at = {key: [i for i, (k, _) in enumerate(goes.columns) if k == key] for key in keys}
    row = 8 * sum(data.width(key) for key in (data.action, *keys))
    for lo, hi, _ in data.spans(row):
        n = hi - lo
        state = np.zeros((n, len(goes.columns)))
        for key in keys:
            state[:, at[key]] = data.store.read(key, lo, hi).reshape(n, -1)[:, [goes.columns[i][1] for i in at[key]]]
        action = np.asarray(data.store.read(data.action, lo, hi).reshape(n, -1)[:, goes.use], np.float64)
        first, last = np.searchsorted(data.ends, [lo, hi - 1], side="right")
        for e in range(int(first), int(last) + 1):
            a, b = max(0, int(data.starts[e]) - lo), min(n, int(data.ends[e]) - lo)
            if b - a > longest[e]:
                longest[e] = b - a
                out[e] = correlated(action[a:b], state[a:b], goes)
    return out


def correlated(action: Array, state: Array, goes: Goes) -> Array:
    """(2 SPAN + 1,) of (n, d) and (n, d): of one episode."""
    x, y = (action - action.mean(axis=0))[:-1] if goes.level else np.diff(action, axis=0), np.diff(state, axis=0)
    x, y = (np.where(np.abs(v) < leap, v / s, 0) for v, s, leap in ((x, goes.scale[0] * goes.sign, goes.leap[0]), (y, goes.scale[1], goes.leap[1])))
    return crossed(x, y)


def crossed(x: Array, y: Array) -> Array:
    """(2 SPAN + 1,): correlation of x (n, d) at t and y (n, d) at t + lag, nothing removed, for lags of -SPAN … SPAN; 0 where little overlaps."""
    if not (x.any() and y.any()):
        return np.zeros(2 * SPAN + 1)
    n, length, lags = len(x), len(x) + SPAN + 1, np.arange(-SPAN, SPAN + 1)
    with_all = np.fft.irfft((np.fft.rfft(x, length, axis=0).conj() * np.fft.rfft(y, length, axis=0)).sum(axis=1), length)
    # Energy of what overlaps, or an episode's best lag would be drawn to 0.
    of_x, of_y = (np.concatenate([[0.0], np.cumsum((v * v).sum(axis=1))]) for v in (x, y))
    energy = (of_x[n - np.maximum(lags, 0)] - of_x[np.maximum(-lags, 0)]) * (of_y[n - np.maximum(-lags, 0)] - of_y[np.maximum(lags, 0)])
    part = energy > OVERLAP * of_x[-1] * of_y[-1]
    return np.where(part, np.concatenate([with_all[-SPAN:], with_all[:SPAN + 1]]) / np.sqrt(np.where(part, energy, 1)), 0.0)


def periodic(lags: NDArray[np.int64], mean: Array, best: int) -> bool:
    """Whether another lag fits about as well, beyond a valley: a gait, in which before and after are the same."""
    far = np.abs(lags - best) > 3
    valley = [mean[(lags > min(k, best)) & (lags < max(k, best))].min() for k in lags[far]]
    return bool(((mean[far] > PEAK * mean.max()) & (np.array(valley) < 0.6 * mean.max())).any())

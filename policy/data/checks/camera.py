"""Whether pictures belong to the motion beside them: pictures change when things move, in every episode after the same time, and no two motions look alike.

How much a picture changes is predicted from how much each state channel does, with weights fitted to the whole dataset; where that says little (a camera
at the wrist of a resting arm, a crowd behind it), nothing is said.
"""
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, drop, finding, some
from policy.data.checks.late import SHORT, SPAN, apart, crossed
from policy.data.checks.look import Data, runs
from policy.data.checks.relate import Array, moving_states
from policy.page import counted

FITS = 0.6      # correlation of predicted and true change over all episodes, from which on it can be judged
MOST = 1.5      # of a channel's quick steps: what is more is a leap
SAME = 20       # pictures that two episodes share
DIFFER = 0.02   # of the range of a state: the robot was elsewhere


def lagging(data: Data, key: str, at: NDArray[np.int64], change: Array) -> list[Finding]:
    """Episodes whose pictures come at another time than those of the others.   at: (n,) frames looked at.   change: (n,) of the picture before each."""
    pieces, states = whole(data, at), moving_states(data)
    if len(pieces) < 5 or not states:
        return []
    top = float(np.nanquantile(change, 0.98))
    moved = {e: (paces(data, states, int(at[a]), int(at[b - 1]) + 1), np.minimum(change[a + 1:b], top)) for e, (a, b) in pieces.items()}
    moved = {e: xy for e, xy in moved.items() if np.isfinite(xy[0]).all() and np.isfinite(xy[1]).all()}
    if not moved:
        return []
    n = sum(len(y) for _, y in moved.values())
    middle = sum(x.sum(axis=0) for x, _ in moved.values()) / n, sum(y.sum() for _, y in moved.values()) / n
    xx, xy, yy = (sum(f(x - middle[0], y - middle[1]) for x, y in moved.values()) for f in (lambda x, y: x.T @ x, lambda x, y: x.T @ y, lambda x, y: y @ y))
    weights = np.linalg.solve(xx + 1e-2 * n * np.eye(len(xx)), xy)
    if weights @ xy < FITS * np.sqrt(yy * (weights @ xx @ weights) + 1e-300):
        return []
    curves = np.zeros((len(data.ends), 2 * SPAN + 1))
    for e, (x, y) in moved.items():
        curves[e] = crossed(centred(x @ weights)[:, None], centred(y)[:, None])
    if (unlike := apart(curves, ())) is None:
        return []
    odd, lag, r, there, usual = unlike
    places = [Place(int(e), 0, int(data.lengths[e]), text=f"lag {lag[e]}, correlation {r[e]:.2f}; at {usual}: {there[e]:.2f}") for e in np.flatnonzero(odd)]
    by = int(np.median(lag[odd])) - usual
    return [finding("warning", "image_lag", f"the pictures of {counted(len(places), 'episode')} come about {counted(abs(by), 'step')} "
                    f"{'later' if by > 0 else 'earlier'} than in the others: {some([f'episode {p.episode}' for p in places], 8)}", key=key, places=places,
                    why="Picture and motion do not belong together: the policy is told what was to be seen at another time.",
                    fix=f"Check which clock stamped them, and shift them in the source; or {drop(data.path, places)}", lag=usual)]


def centred(x: Array) -> Array:
    return x - x.mean()


def whole(data: Data, at: NDArray[np.int64]) -> dict[int, tuple[int, int]]:
    """{episode: [a, b) of its frames looked at one after the other}, its longest piece; of SHORT frames at least."""
    begins = np.isin(at, data.starts) | (np.diff(at, prepend=-2) != 1)
    out: dict[int, tuple[int, int]] = {}
    for a, b in runs(np.ones(len(at), bool), begins):
        e = int(np.searchsorted(data.ends, at[a], side="right"))
        if b - a >= SHORT and b - a > np.subtract(*out.get(e, (0, 0))[::-1]):
            out[e] = a, b
    return out


def paces(data: Data, states: dict[str, NDArray[np.int64]], lo: int, hi: int) -> Array:
    """(hi - lo - 1, 2c): how fast each state channel moves, and its root, in quick steps of that channel."""
    steps = []
    for key, use in states.items():
        x = np.asarray(data.store.read(key, lo, hi), np.float64).reshape(hi - lo, -1)[:, use]
        steps.append(np.minimum(np.abs(np.diff(x, axis=0)) / (data.scales(key).step[use] + 1e-300), MOST))
    far = np.concatenate(steps, axis=1)
    return np.concatenate([far, np.sqrt(far)], axis=1)


def copied(data: Data, key: str, at: NDArray[np.int64], code: NDArray[np.int64]) -> list[Finding]:
    """Episodes with the pictures of another one, while the robot was elsewhere.   code: (n,), equal for equal pictures."""
    episode = np.searchsorted(data.ends, at, side="right")
    pairs, first = np.unique(np.stack([code, episode], axis=1), axis=0, return_index=True)
    each = Counter(pairs[:, 1].tolist())
    again = np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])
    shared = Counter(zip(pairs[again, 1].tolist(), pairs[again + 1, 1].tolist(), strict=True))
    found = []
    for (e, other), n in shared.items():
        if n >= max(SAME, 0.5 * min(each[e], each[other])):
            rows = again[(pairs[again, 1] == e) & (pairs[again + 1, 1] == other)]
            if elsewhere(data, at[first[rows]], at[first[rows + 1]]):
                found.append((e, other, n))
    if not found:
        return []
    places = [Place(e, 0, int(data.lengths[e]), text=f"{n} pictures of episode {o}") for a, b, n in found for e, o in ((a, b), (b, a))]
    return [finding("error", "image_copy", f"{counted(len(found), 'pair')} of episodes show the same pictures, while the robot moves otherwise: "
                    f"{some([f'episodes {a} and {b}' for a, b, _ in found], 4)}", key=key, places=places,
                    why="At least one of the two shows what did not happen: the policy learns to ignore what it sees.",
                    fix=f"dipole data view path={data.path} episode={places[0].episode} shows which; {drop(data.path, places[:1])}, or the other")]


def elsewhere(data: Data, a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    """Whether a state that moves is different at frames a (n,) from what it is at b, most of the time."""
    for key, use in moving_states(data).items():
        def values(at: NDArray[np.int64], key: str = key) -> NDArray[np.float64]:
            lo, hi = int(at.min()), int(at.max()) + 1
            return np.asarray(data.store.read(key, lo, hi), np.float64).reshape(hi - lo, -1)[at - lo]
        far = np.abs(values(a) - values(b))[:, use] / data.scales(key).range[use]
        if (np.median(far, axis=0) > DIFFER).any():
            return True
    return False

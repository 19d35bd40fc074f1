"""Checks of independence: episodes that are there twice, and validation episodes that training has seen."""
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, finding, some, trim
from policy.data.checks.look import Data
from policy.data.split import split_episodes
from policy.page import counted

WINDOW = 4        # frames that must agree one after the other
LEAST = 8         # windows
WINDOWS, STEP = 4_000_000, 2**19  # compared at most, and looked at at once
SAME = 0.95       # share of an episode's moving windows that are in another one: the same recording
PART = 0.2        # of a part: cut twice out of one recording
POINTS = 12       # places along an episode that near copies are compared at
MANY = 4000       # episodes compared with each other at most
NEAR = 0.1        # of the usual distance to the nearest other episode
CLOSE = 0.05      # root mean square, in spreads of each channel
Pair = tuple[int, int, float]  # of episodes, and how much of the first is in the second, or their distance


def copies(data: Data) -> list[Finding]:
    """Duplicates, exact and near, and what they do to the split that training makes."""
    exact = repeated(data)
    same = [p for p in exact if p[2] >= SAME]
    part = [p for p in exact if PART <= p[2] < SAME]
    known = {frozenset(p[:2]) for p in exact}
    near = [p for p in alike(data) if frozenset(p[:2]) not in known]
    out = []
    for code, found, text, unit in (("duplicate", same, "there twice, frame by frame", "of it"), ("overlap", part, "in part there twice", "of it"),
                                    ("near_duplicate", near, "nearly there twice", "spreads apart")):
        if found:
            once = sorted({max(p[:2]) for p in found})
            names = [f"{j} {'=' if code == 'duplicate' else '~'} {i}" for i, j, _ in found]
            out.append(finding("warning", code, f"{counted(len(once), 'episode')} {text}: {some(names, 6)}",
                               places=[Place(max(i, j), 0, int(data.lengths[max(i, j)]), text=f"as episode {min(i, j)}: {x:.2g} {unit}") for i, j, x in found],
                               why="Counted twice in training, it weighs twice; in both splits, the validation loss is that of the training data.",
                               fix=trim(data.path, f"drop=[{','.join(map(str, once))}]")))
    leaking = leaks(data, [*same, *part, *near])
    return [*out, *leaking, *(same_start(data) if not leaking else [])]


def leaks(data: Data, found: list[Pair]) -> list[Finding]:
    """Copies on both sides of the split: train and val as TrajectoryDataset would make them."""
    val = held_out(data)
    across = sorted({tuple(sorted((i, j), key=lambda e: e in val)) for i, j, _ in found if (i in val) != (j in val)})
    if not across:
        return []
    held = sorted({j for _, j in across})
    return [finding("warning", "split_leak", f"{len(held)} of {len(val)} validation episodes (val_ratio={data.val_ratio:g}) are in the training split too: "
                    + some([f"{j} as {i}" for i, j in across], 6), places=[Place(j, 0, int(data.lengths[j]), text=f"as episode {i}") for i, j in across],
                    why="The validation loss cannot show overfitting: it is measured on what was learned by heart.",
                    fix="Drop the copies first; no split keeps them apart")]


def held_out(data: Data) -> set[int]:
    """Validation episodes, as TrajectoryDataset would choose them."""
    n = len(data.ends)
    return set(split_episodes(n, "val", val_ratio=data.val_ratio, seed=data.seed, max_episodes=None)) if n >= 2 and data.val_ratio else set()


def same_start(data: Data) -> list[Finding]:
    """Validation episodes that begin where a training episode begins, though starts differ as a rule."""
    val = held_out(data)
    train = np.array([e for e in range(len(data.ends)) if e not in val], np.int64)
    keys = [key for key in data.keys("state") if (data.scales(key).moves & ~data.scales(key).few).any()]
    if not val or len(train) < 3 or not keys:
        return []
    first = np.concatenate([along(data, key, np.arange(len(data.ends)), 1) for key in keys], axis=1)
    sample = train[np.linspace(0, len(train) - 1, min(len(train), 256)).astype(int)]
    usual = float(np.median([nearest(first, e, train[train != e])[1] for e in sample]))
    found = [(e, *nearest(first, e, train)) for e in sorted(val)]
    same = [(e, other) for e, other, far in found if far < CLOSE * usual and usual > CLOSE]
    if not same:
        return []
    return [finding("note", "same_start", f"{len(same)} of {len(val)} validation episodes begin where a training episode does: "
                    + some([f"{e} as {other}" for e, other in same], 6), places=[Place(e, 0, 1, text=f"as episode {other}") for e, other in same],
                    why="The validation loss says little of new starts: the policy has seen how this one went on.",
                    fix="Record from other starts; or take more of the episodes for validation: data.val_ratio=0.1 in training")]


def nearest(first: NDArray[np.float64], e: int, others: NDArray[np.int64]) -> tuple[int, float]:
    """Which of the others is closest to row e, and how far: root mean square, in spreads."""
    d = np.sqrt(((first[others] - first[e]) ** 2).mean(axis=1))
    return int(others[d.argmin()]), float(d.min())


def repeated(data: Data) -> list[Pair]:
    """(first, second, share of the second's moving windows that the first has too), frame by frame, bit by bit."""
    hashed, moving = np.zeros(data.frames, np.uint64), np.zeros(data.frames, bool)
    keys = [key for key in data.motion if data.scales(key).moves.any()]
    if not keys:
        return []
    for i, key in enumerate(keys):
        use = np.flatnonzero(data.scales(key).moves)
        rng = np.random.default_rng([i, len(use)])
        odd = rng.integers(1, 2**63, len(use), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        for block in data.blocks(key):
            x = block.values[:, use]
            bits = (np.ascontiguousarray(x) + 0.0).view(f"u{x.itemsize}").astype(np.uint64)  # + 0.0: -0 is 0
            mixed = (bits ^ (bits >> np.uint64(29))) * odd
            new, after = slice(block.lo + block.fresh, block.lo + len(x)), max(1, block.fresh)
            hashed[new] += (mixed ^ (mixed >> np.uint64(31))).sum(axis=1, dtype=np.uint64)[block.fresh:]
            moving[block.lo + after:block.lo + len(x)] |= (x[after:] != x[after - 1:-1]).any(axis=1)
    return shared(data, hashed, moving)


def shared(data: Data, hashed: NDArray[np.uint64], moving: NDArray[np.bool_]) -> list[Pair]:
    """Pairs of episodes by the windows they have in common. Windows in which nothing moves do not count, nor those longer than their episode.

    Of a dataset of more than WINDOWS frames a part of the windows is looked at, chosen by what is in them: the same ones in every copy.
    """
    every, parts, episodes = np.uint64(1 + data.frames // WINDOWS), [], []
    for lo in range(0, data.frames - WINDOW + 1, STEP):
        n = min(STEP, data.frames - WINDOW + 1 - lo)
        window = np.zeros(n, np.uint64)
        for i in range(WINDOW):
            window += hashed[lo + i:lo + i + n] * np.uint64(2654435761 ** (i + 1) % 2**64 | 1)
        episode = np.searchsorted(data.ends, np.arange(lo, lo + n + WINDOW - 1), side="right")
        use = (episode[:n] == episode[WINDOW - 1:]) & np.logical_or.reduce([moving[lo + i:lo + i + n] for i in range(1, WINDOW)])
        use &= (window >> np.uint64(32)) % every == 0
        parts.append(window[use])
        episodes.append(episode[:n][use].astype(np.int32))
    if not parts:
        return []
    windows, of = np.concatenate(parts), np.concatenate(episodes)
    order = np.argsort(windows, kind="stable")
    again = np.flatnonzero(windows[order[1:]] == windows[order[:-1]]) + 1
    count = Counter((a, b) for a, b in zip(of[order[again - 1]].tolist(), of[order[again]].tolist(), strict=True) if a != b)
    total, least = np.bincount(of, minlength=len(data.ends)), max(2, LEAST // int(every))
    share = {(a, b): n / max(1, min(total[a], total[b])) for (a, b), n in count.items() if n >= least}
    return sorted((a, b, float(x)) for (a, b), x in share.items() if x >= PART)


def alike(data: Data) -> list[Pair]:
    """(first, second, distance) of episodes that run nearly the same way: POINTS places along each, in spreads of the channels."""
    if len(data.ends) < 3:
        return []
    chosen = np.arange(len(data.ends))
    if len(chosen) > MANY:
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:MANY])
    points = np.concatenate([along(data, key, chosen) for key in data.motion if (data.scales(key).moves & ~data.scales(key).few).any()] or
                            [np.zeros((len(chosen), 0))], axis=1).astype(np.float32)
    if not points.shape[1]:
        return []
    square = (points ** 2).sum(axis=1)
    nearest, distance = np.zeros(len(chosen), np.int64), np.zeros(len(chosen))
    for lo in range(0, len(chosen), 512):
        d = square[lo:lo + 512, None] + square - 2 * points[lo:lo + 512] @ points.T
        d[np.arange(len(d)), np.arange(lo, lo + len(d))] = np.inf
        nearest[lo:lo + 512] = d.argmin(axis=1)
        distance[lo:lo + 512] = np.sqrt(np.maximum(d.min(axis=1), 0) / points.shape[1])
    limit = min(CLOSE, NEAR * float(np.median(distance)))
    found = {(int(min(chosen[i], chosen[j])), int(max(chosen[i], chosen[j]))): float(distance[i]) for i, j in enumerate(nearest) if distance[i] < limit}
    return sorted((i, j, x) for (i, j), x in found.items())


def along(data: Data, key: str, chosen: NDArray[np.int64], points: int = POINTS) -> NDArray[np.float64]:
    """(len(chosen), points * c): the frames at even places along each episode, from its first."""
    scales = data.scales(key)
    use = np.flatnonzero(scales.moves & ~scales.few)
    frames = data.starts[chosen, None] + np.round(np.linspace(0, 1, points) * (np.maximum(data.lengths[chosen, None], 1) - 1)).astype(np.int64)
    out = np.zeros((frames.size, len(use)))
    for block in data.blocks(key):
        inside = np.flatnonzero((frames.ravel() >= block.lo) & (frames.ravel() < block.lo + len(block.values)))
        out[inside] = np.nan_to_num(block.values[frames.ravel()[inside] - block.lo][:, use])
    return (out / (scales.range[use] / 4)).reshape(len(chosen), -1)

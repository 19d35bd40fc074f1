"""Checks of angles and rotations, which numbers do not show as what they are: wraps, sign flips, quaternions that are none."""
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, finding
from policy.data.checks.look import Data
from policy.data.checks.relate import rates
from policy.page import counted

UNIT = 1e-2      # a norm this far from 1 is no rotation any more
FAR = 0.1        # the same where nobody says that it is one
SURE = 2e-3      # four channels whose norm is this close to 1, in nearly every frame, are a quaternion
TURNS = ((2 * np.pi, "rad"), (360.0, "degrees"))


def quaternions(data: Data) -> list[Finding]:
    """Non-unit quaternions and sign flips: q and -q are the same rotation, and far apart for a network."""
    out = []
    for key in data.motion:
        for at in quaternion_groups(data, key):
            out += of_quaternion(data, key, at)
    return out


def of_quaternion(data: Data, key: str, at: int) -> list[Finding]:
    bad: list[Place] = []
    flips: list[Place] = []
    worst = 1.0
    for block in data.blocks(key):
        q = block.values[:, at:at + 4].astype(np.float64)
        with np.errstate(invalid="ignore"):
            norm = np.linalg.norm(q, axis=1)
            off = np.abs(norm - 1) > (UNIT if at in named(data, key) else FAR)
            off[:block.fresh] = False
            flip = ~block.first[1:] & ((q[1:] * q[:-1]).sum(axis=1) < -0.5 * norm[1:] * norm[:-1])
        if off.any():
            worst = max(worst, norm[off].max(), 2 - norm[off].min())
            bad += [data.place(block.lo + t, channel=at, text=f"norm {norm[t]:.3g}") for t in np.flatnonzero(off)[:5000].tolist()]
        flips += [data.place(block.lo + t + 1, channel=at) for t in np.flatnonzero(flip).tolist() if t + 1 >= block.fresh]
    out, channels = [], range(at, at + 4)
    if bad:
        out.append(finding("error" if len(bad) > 0.5 * data.frames else "warning", "quaternion_norm", f"{counted(len(bad), 'frame')} without a unit quaternion",
                           key=key, channels=channels, places=bad, why="It is not a rotation: interpolated, averaged or zeroed where the tracker lost it.",
                           fix="Normalise it where it is a little off; drop the frames where it is zero"))
    if flips:
        out.append(finding("warning", "quaternion_sign", f"the sign flips in {counted(len(flips), 'place')} within episodes", key=key, channels=channels,
                           places=flips, why="q and -q are the same rotation; the network sees the largest change there is, and a mean of both is no rotation.",
                           fix="Make it continuous (flip where q·q_before < 0), or train on the 6-D rotation"))
    return out


def quaternion_groups(data: Data, key: str) -> list[int]:
    """First channels of the quaternions in key: said by its name or the action's semantics, or seen: four neighbours whose norm is always 1."""
    def look() -> list[int]:
        x, width = data.sample(key).values, data.width(key)
        few = data.scales(key).few  # one axis at a time of a keyboard has norm 1 too
        said = named(data, key)
        seen, c = [], 0
        columns = frames_of_axes(x)
        while c + 4 <= width and len(x) >= 20:
            part = x[:, c:c + 4].astype(np.float64)
            sure = (np.abs(np.linalg.norm(part, axis=1) - 1) < SURE).mean()
            turns = part.std(axis=0) > 1e-4
            if sure > 0.9 and turns.sum() >= 2 and not (turns & few[c:c + 4]).any() and c not in said and not columns & {c, c + 1, c + 2, c + 3}:
                seen.append(c)
                c += 3
            c += 1
        return sorted({*said, *seen})
    return data.once("quaternions", key, look)


def named(data: Data, key: str) -> list[int]:
    """First channels of quaternions that are said to be some."""
    said = [0] if data.width(key) == 4 and re.search("quat|orientation|rotation", key.lower()) else []
    if key == data.action and data.semantics.rotation in ("quaternion_xyzw", "quaternion_wxyz"):
        said.append(data.semantics.parts["rotation"][0])
    return said


def frames_of_axes(x: NDArray[Any]) -> set[int]:
    """Channels of two unit vectors side by side, at right angles: of a 6-D rotation or a matrix, of which four may look like a quaternion."""
    found: set[int] = set()
    for c in range(x.shape[1] - 5):
        a, b = x[:, c:c + 3].astype(np.float64), x[:, c + 3:c + 6].astype(np.float64)
        unit = (np.abs(np.linalg.norm(a, axis=1) - 1) < SURE) & (np.abs(np.linalg.norm(b, axis=1) - 1) < SURE) & (np.abs((a * b).sum(axis=1)) < SURE)
        if len(x) and unit.mean() > 0.9:
            found |= set(range(c, c + 6))
    return found


def wraps(data: Data) -> list[Finding]:
    """Angles that jump by a whole turn, and rotation vectors that jump to the other end of the same axis."""
    out = []
    for key in data.motion:
        found = whole_turns(data, key)
        for (c, unit), frames in sorted(found.items()):
            low, high = (float(x[:, c].min() if i == 0 else x[:, c].max()) for i, x in enumerate(data.per_episode(key)))
            out.append(finding("warning", "angle_wrap", f"{data.label(key, c)} jumps by a whole turn in {counted(len(frames), 'place')}: it is an "
                               f"angle in {unit}, kept from {low:.3g} to {high:.3g}", key=key, channels=[c], places=[data.place(f, channel=c) for f in frames],
                               why="Two neighbouring directions are as far apart as can be for the network, and the mean of both points the other way.",
                               fix="Train on its sine and cosine instead, or unwrap it within each episode (numpy.unwrap)"))
        vectors = axis_flips(data, key)
        for c, frames in sorted(vectors.items()):
            out.append(finding("warning", "axis_angle_wrap", f"{key}[{c}-{c + 2}] is a rotation vector that jumps to the other end of its axis "
                               f"in {counted(len(frames), 'place')}, where it passes half a turn", key=key, channels=range(c, c + 3),
                               places=[data.place(f, channel=c) for f in frames],
                               why="The same rotation is written as v and as v·(1 - 2π/|v|): the network sees a leap where nothing happened.",
                               fix="Train on the 6-D rotation; or continue the vector beyond π within each episode"))
    return out


def whole_turns(data: Data, key: str) -> dict[tuple[int, str], list[int]]:
    """{(channel, unit): frames reached by a step of a whole turn}, in channels that stay within about one turn."""
    def look() -> dict[tuple[int, str], list[int]]:
        scales = data.scales(key)
        lo, hi = data.per_episode(key)
        speeds = rates(data, key) if data.roles[key] == "state" else np.zeros(data.width(key), bool)
        whole = hi.max(axis=0) - lo.min(axis=0)
        found: dict[tuple[int, str], list[int]] = {}
        for turn, unit in TURNS:
            use = np.flatnonzero(~scales.few & ~speeds & (whole > 0.9 * turn) & (whole < 1.1 * turn) & (scales.step < 0.2 * turn))
            low, high = lo.min(axis=0)[use], hi.max(axis=0)[use]

            def ends(x: NDArray[Any], low: NDArray[Any] = low, high: NDArray[Any] = high, near: float = 0.1 * turn) -> NDArray[np.bool_]:
                return (x < low + near) | (x > high - near)
            for block in data.blocks(key) if len(use) else ():
                with np.errstate(invalid="ignore"):
                    near = np.clip(3 * scales.step[use], 0.01 * turn, 0.1 * turn)
                    at = np.abs(np.abs(block.steps[:, use]) - turn) < near
                    at &= ends(block.values[:-1, use]) & ends(block.values[1:, use])
                for t, c in zip(*np.nonzero(at), strict=True):
                    if t + 1 >= block.fresh:
                        found.setdefault((int(use[c]), unit), []).append(block.lo + int(t) + 1)
        return found
    return data.once("turns", key, look)


def axis_flips(data: Data, key: str) -> dict[int, list[int]]:
    """{first of three channels: frames where the vector v became v·(1 - 2π/|v|)}."""
    def look() -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        alone = {c for c, _ in whole_turns(data, key)}
        lo, hi = data.per_episode(key)
        size = np.maximum(np.abs(lo), np.abs(hi)).max(axis=0)
        groups = [c for c in range(data.width(key) - 2) if not alone & {c, c + 1, c + 2} and (size[c:c + 3] < 2 * np.pi).all() and size[c:c + 3].max() > 1.5]
        for block in data.blocks(key) if groups else ():
            big = np.abs(block.steps) > 1.4  # at least one of three channels carries a third of (2π - a little)²
            for c in groups:
                for t in np.flatnonzero(big[:, c:c + 3].any(axis=1)).tolist():
                    v, w = block.values[t, c:c + 3].astype(float), block.values[t + 1, c:c + 3].astype(float)
                    n = float(np.linalg.norm(v))
                    if t + 1 >= block.fresh and 2.4 < n < 3.9 and np.linalg.norm(v * (1 - 2 * np.pi / n) - w) < 0.3:
                        found.setdefault(c, []).append(block.lo + t + 1)
        return {c: f for c, f in found.items() if len(f) > max((len(found.get(o, ())) for o in (c - 2, c - 1)), default=0)}
    return data.once("axis_flips", key, look)


def turning(data: Data, key: str, channels: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """These channels without those whose jumps are explained here: angles that wrap, quaternions, rotation vectors."""
    out = channels.copy()
    out[[c for c, _ in whole_turns(data, key)]] = False
    for c in quaternion_groups(data, key):
        out[c:c + 4] = False
    for c in axis_flips(data, key):
        out[c:c + 3] = False
    return out


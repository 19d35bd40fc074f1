"""Checks of motion: stretches in which nothing happens, teleports, glitches, and episodes that were run together."""
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, drop, finding, trim
from policy.data.checks.look import OVERLAP, Data, runs
from policy.data.checks.relate import rates
from policy.data.checks.rotation import turning
from policy.page import counted

IDLE = 0.005        # of its range a channel may drift in an idle stretch
IDLE_SECONDS = 1.0  # how long nothing happens before it is worth a word; IDLE_STEPS where the rate is unknown
IDLE_STEPS = 15
IDLE_SHARE = 0.05   # of all frames: from here on idling is a warning
JUMP = 6            # times the step that 97 % of the steps stay below
REACH = 0.12        # of the channel's range, at least
ALONE = 4           # times the steps before and after
TOGETHER = 0.5      # of all smooth channels step at once: that is another episode
LEVELS, AT = 0.85, 0.1  # share of frames within as much of its range of either end: a hand that is open or closed
OFTEN = 0.5         # of the episodes: what leaps there in one step is made so
IDLE_WHY = {"idle_start": ("at the start", "The policy learns to wait at the start, and one without memory then waits for ever.", "head"),
            "idle_middle": ("within", "The policy learns that standing still is right there, and may get stuck.", ""),
            "idle_end": ("at the end", "The policy learns to rest there: harmless where the task is done, a trap where it is not.", "tail")}


def idle(data: Data) -> list[Finding]:
    """Stretches without motion at the start, at the end and within episodes: every state channel and the action rest."""
    keys = [key for key in data.motion if data.scales(key).moves.any()]
    if not data.keys("state") or not keys:
        return []
    wait = max(4, round(IDLE_SECONDS * data.fps) if data.fps else IDLE_STEPS)
    still = np.ones(data.frames, bool)  # frames t to t + wait rest
    for key in keys:
        still &= resting(data, key, wait)
    rest, first = np.zeros(data.frames, bool), data.first(0, data.frames)
    for a, b in runs(still, first):
        rest[a:b + wait] = True
    found: dict[str, list[Place]] = {code: [] for code in IDLE_WHY}
    for a, b in runs(rest, first):
        p = data.place(a, b)
        found["idle_start" if p.lo == 0 else "idle_end" if p.hi >= data.lengths[p.episode] else "idle_middle"].append(p)
    return [idled(data, code, places) for code, places in found.items() if places]


def resting(data: Data, key: str, wait: int) -> NDArray[np.bool_]:
    """(frames,): whether this key rests from frame t to t + wait, within one episode. Drift is compared over the whole time, so that noise is no motion."""
    out = np.zeros(data.frames, bool)
    scales = data.scales(key)
    # A channel that moves a thousandth of what its neighbours do is an object that trembles on a table.
    use = np.flatnonzero(scales.moves & (scales.range > 1e-3 * scales.range.max()))
    drift = np.where(scales.few, 0, IDLE * scales.range)[use]
    for block in data.blocks(key):
        x, n = block.values[:, use], len(block.values) - wait
        if n <= 0:
            continue
        whole = np.cumsum(block.first)
        ok = whole[wait:] == whole[:n]
        with np.errstate(invalid="ignore"):
            for ahead in {1, max(1, wait // 4), wait // 2, 3 * wait // 4, wait}:
                for c in range(x.shape[1]):  # column by column: ends early where nothing rests
                    if not ok.any():
                        break
                    ok &= np.abs(x[ahead:ahead + n, c] - x[:n, c]) <= drift[c]
        out[block.lo:block.lo + n] = ok
    return out


def idled(data: Data, code: str, places: list[Place]) -> Finding:
    where, why, word = IDLE_WHY[code]
    frames = sum(p.hi - p.lo for p in places)
    share, longest = frames / data.frames, max(p.hi - p.lo for p in places)
    said = f"{longest} steps" + (f" ({longest / data.fps:.1f} s)" if data.fps else "")
    return finding("warning" if share >= IDLE_SHARE and code != "idle_end" else "note", code,
                   f"nothing moves {where} of {len({p.episode for p in places})} of {len(data.ends)} episodes: {frames:,} frames, "
                   f"{100 * share:.1f} % of all, {said} at most", why=why, fix=trim(data.path, f"idle.where={word}") if word else
                   f"Nothing, where the task asks for it; where the person hesitated, {drop(data.path, places)}", places=places,
                   frames=frames, share=round(share, 4))


def jumps(data: Data) -> list[Finding]:
    """Steps that no motion explains: teleports (it stays there), glitches (one frame, and back), missed borders (everything jumps at once)."""
    step_at: dict[int, dict[str, list[int]]] = {}  # frame the step leads to: {key: channels}
    glitch: dict[str, dict[int, list[int]]] = {}
    smooth = {key: turning(data, key, data.scales(key).smooth) for key in data.motion}
    for key in data.keys("state"):
        smooth[key] &= ~rates(data, key)  # what touches something changes its speed at once
    for key in data.motion:
        smooth[key] &= ~two_levels(data, key)
    for key in data.motion:
        for frame, channels, back in steps_out(data, key, smooth[key]):
            if back:
                glitch.setdefault(key, {})[frame] = channels
            else:
                step_at.setdefault(frame, {})[key] = channels
    out = []
    states = data.keys("state")
    borders = {frame for frame, of in step_at.items() if is_border(data, frame, of, {k: int(smooth[k].sum()) for k in states})}
    if borders:
        places = [data.place(f) for f in borders]
        out.append(finding("error", "missed_border", f"everything jumps at once in {counted(len(borders), 'place')} within episodes: two were run together",
                           places=places,
                           why="Windows across the border teach a motion that no robot can make.",
                           fix=f"Write the missing ends ({', '.join(map(str, sorted(borders)[:8]))}) into meta/episode_ends; or {drop(data.path, places)}"))
    for key in data.motion:
        teleports = {f: of[key] for f, of in step_at.items() if key in of and f not in borders}
        usual = in_most(data, teleports)
        parts = [{f: part for f, of in teleports.items() if (part := [c for c in of if (c in usual) == often])} for often in (False, True)]
        out += [jumped(data, key, code, at) for code, at in (("jump", parts[0]), ("glitch", glitch.get(key, {}))) if at]
        out += [switched(data, key, parts[1])] if parts[1] else []
    return out


def two_levels(data: Data, key: str) -> NDArray[np.bool_]:
    """(c,): channels that are at either end nearly always and come from one to the other in a step: a gripper, though noise gives it many values."""
    x, scales = data.sample(key).values, data.scales(key)
    if not len(x):
        return np.zeros(data.width(key), bool)
    place = (x - scales.lo) / np.maximum(scales.range, 1e-12)
    ends = (place < AT).mean(axis=0), (place > 1 - AT).mean(axis=0)
    return (ends[0] + ends[1] > LEVELS) & (np.minimum(*ends) > 0.02)


def steps_out(data: Data, key: str, smooth: NDArray[np.bool_]) -> Iterable[tuple[int, list[int], bool]]:
    """(frame, channels, whether it comes back in the next frame) of each step that stands out of its surroundings and of the whole dataset."""
    scales, use = data.scales(key), np.flatnonzero(smooth)
    least = np.maximum((1 if key != data.action else 2) * JUMP * scales.step, REACH * scales.range)[use]
    for block in data.blocks(key):
        with np.errstate(invalid="ignore"):
            d = block.steps[:, use]  # d[t] leads to frame t + 1
            d[~np.isfinite(d)] = 0
            rows = np.flatnonzero((np.abs(d) > least).any(axis=1))
        for t in rows[rows >= max(0, block.fresh - 2)].tolist():
            if block.fresh and t + 1 < OVERLAP - 1:
                continue
            size, ahead = np.abs(d[t]), d[t + 1] if t + 1 < len(d) else np.zeros_like(d[t])
            if block.first[t + 1]:
                continue
            before = np.abs(d[t - 1]) if t else np.zeros_like(size)
            back = (np.abs(d[t] + ahead) < 0.3 * size) & (size > least)
            if back.any():
                yield block.lo + t + 1, use[back].tolist(), True
            came = np.abs(d[t - 1] + d[t]) < 0.3 * size if t else np.zeros(len(use), bool)  # the way back of a glitch
            alone = (size > least) & ~back & ~came & (size > ALONE * before) & (size > ALONE * np.abs(ahead))
            if alone.any():
                yield block.lo + t + 1, use[alone].tolist(), False


def is_border(data: Data, frame: int, of: dict[str, list[int]], smooth: dict[str, int]) -> bool:
    """Half of the channels of the states, which are at least three, step out of line together."""
    n = sum(len(of.get(key, ())) for key in smooth)
    return n >= 3 and n >= TOGETHER * sum(smooth.values())


def in_most(data: Data, at: dict[int, list[int]]) -> set[int]:
    """Channels that leap in most episodes, of which there are at least four."""
    episodes: dict[int, set[int]] = {}
    for frame, of in at.items():
        for c in of:
            episodes.setdefault(c, set()).add(data.place(frame).episode)
    return {c for c, some_of in episodes.items() if len(some_of) > OFTEN * len(data.ends) >= 2}


def switched(data: Data, key: str, at: dict[int, list[int]]) -> Finding:
    places = [data.place(frame, channel=of[0]) for frame, of in sorted(at.items())]
    return finding("note", "jump", f"leaps in one step in most episodes, in {counted(len(at), 'place')}: a gripper, a switch, a reset within each?",
                   key=key, channels={c for of in at.values() for c in of}, places=places, count=len(at),
                   why="What happens in every episode is rarely a fault of the recording.",
                   fix=f"Nothing, where it is a gripper; else dipole data view path={data.path} episode={places[0].episode}")


def jumped(data: Data, key: str, code: str, at: dict[int, list[int]]) -> Finding:
    action = key == data.action
    channels = {c for of in at.values() for c in of}
    places = []
    for frame, of in sorted(at.items())[:2000]:
        before, after = np.asarray(data.store.read(key, frame - 1, frame + 1)).reshape(2, -1)[:, of[0]]
        places.append(data.place(frame, channel=of[0], text=f"{data.label(key, of[0])} {before:.4g} → {after:.4g}"))
    if code == "glitch":
        return finding("warning", code, f"{counted(len(at), 'frame')} far from both neighbours", key=key, channels=channels, places=places,
                       count=len(at), why="A lost packet or a wrong reading; it widens the limits of the normaliser, and a robot would twitch.",
                       fix=f"Replace the frame by the mean of its neighbours, or {drop(data.path, places)}")
    why = ("The robot would be asked to leap: a teleoperation that was released and taken up elsewhere." if action
           else "The robot cannot have moved like that: a reset, lost frames or a tracking error; the policy learns a leap.")
    return finding("note" if action else "warning", code, f"leaps in one step, in {counted(len(at), 'place')}", key=key, channels=channels, places=places,
                   count=len(at),
                   why=why, fix=f"dipole data view path={data.path} episode={places[0].episode}; if it is none of the robot's, {drop(data.path, places)}")

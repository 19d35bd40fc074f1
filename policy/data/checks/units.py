"""Checks of units: degrees among radians, millimetres among metres, declared or from episode to episode."""
import re

import numpy as np

from policy.data.checks.actions import kinds_of_episodes, pairs
from policy.data.checks.finding import Finding, Place, finding, some, trim
from policy.data.checks.look import Data
from policy.page import counted

FACTORS = {180 / np.pi: "degrees among radians", np.pi / 180: "radians among degrees", 1000.0: "milli-units among units", 1e-3: "units among milli-units"}
EPISODES = {**FACTORS, 100.0: "centimetres among metres", 0.01: "metres among centimetres"}
NEAR = 1.25        # how far from such a factor
RADIANS = 4 * np.pi  # a joint that turns further is rare
METRES = 50.0
JOINTS = re.compile(r"joint|qpos|\barm|angle|servo|motor")
FIX = "Multiply it when converting, and write the unit into the mapping"
WHY = "A command in the wrong unit is wrong by that factor on the robot."


def units(data: Data) -> list[Finding]:
    out = []
    for key in data.motion:
        scales, unit = data.scales(key), (data.units.get(key) or "").strip().lower()
        lo, hi = data.per_episode(key)  # the usual episode: one in another unit is told apart below
        size = np.where(scales.moves & ~scales.few, np.median(np.maximum(np.abs(lo), np.abs(hi)), axis=0), 0)
        if not size.max():
            continue
        big = np.flatnonzero(size > RADIANS)
        if unit in ("rad", "radian", "radians") and len(big):
            out.append(said(key, big, "warning", f"declared in radians, but reaches {size.max():.4g}: degrees?"))
        elif unit in ("deg", "degree", "degrees", "°") and size.max() < 2 * np.pi:
            out.append(said(key, np.flatnonzero(size), "warning", f"declared in degrees, but never beyond {size.max():.3g}: radians?"))
        elif unit in ("m", "metre", "meter", "metres", "meters") and size.max() > METRES:
            out.append(said(key, np.flatnonzero(size > METRES), "warning", f"declared in metres, but reaches {size.max():.4g}: millimetres?"))
        elif not unit and JOINTS.search(key.lower()) and len(big) > 0.5 * (size > 0).sum() and size.max() < 400:
            out.append(said(key, big, "note", f"joints that reach {size.max():.4g} look like degrees; no unit is stored"))
        out += between_episodes(data, key)
    return [*out, *action_against_state(data)]


def said(key: str, channels: np.ndarray, severity: str, text: str) -> Finding:
    return finding(severity, "units", text, key=key, channels=channels, why=WHY, fix=FIX)


def between_episodes(data: Data, key: str) -> list[Finding]:
    """Episodes in which every channel is larger than usual by the same telling factor."""
    scales = data.scales(key)
    lo, hi = data.per_episode(key)
    size = np.maximum(np.abs(lo), np.abs(hi))
    use = np.flatnonzero(scales.moves & ~scales.few & (np.median(size, axis=0) > 0) & np.isfinite(size).all(axis=0))
    if len(use) < 2 or len(data.ends) < 3:
        return []
    ratio = np.log(np.maximum(size[:, use], 1e-300) / np.median(size[:, use], axis=0))
    middle = np.median(ratio, axis=1)
    if key == data.action and all(kinds_of_episodes(data).values()):
        return []  # targets among changes: action_mixed
    rests = not (np.median((hi - lo)[:, use], axis=0) > 0).all()  # a goal is near the origin now and then
    out = []
    named = np.array(list(EPISODES))[np.abs(middle[:, None] - np.log(list(EPISODES))).argmin(axis=1)]
    for factor, name in EPISODES.items():
        alike = np.median(np.abs(ratio - np.log(factor)), axis=1) < np.log(2)
        at = np.flatnonzero((named == factor) & (np.abs(middle - np.log(factor)) < np.log(2)) & alike)
        if len(at) and len(at) < 0.5 * len(data.ends) and not (rests and factor < 1):
            episodes = ",".join(map(str, at))
            out.append(finding("error", "units_mixed", f"{counted(len(at), 'episode')} about {factor:.3g} times as large as the others, in every channel: "
                               f"{name}? {some([f'episode {e}' for e in at], 4)}", key=key, channels=use,
                               places=[Place(int(e), 0, int(data.lengths[e])) for e in at],
                               why="The network is told two things about the same motion, and the larger ones set the limits of the normaliser.",
                               fix=f"Scale these episodes in the source and convert it again; or {trim(data.path, f'drop=[{episodes}]')}", factor=factor))
    return out


def action_against_state(data: Data) -> list[Finding]:
    """An action that goes with a state, in another unit."""
    found = pairs(data)
    if found is None:
        return []
    clear = found.target.max(axis=0) > 0.7
    for factor in FACTORS:
        at = np.flatnonzero(clear & (found.slope * factor < NEAR) & (found.slope * factor > 1 / NEAR))
        if len(at) and len(at) >= 0.5 * clear.sum():
            key = found.columns[found.of_target[at[0]]][0]
            return [finding("warning", "units", f"the actions are {factor:.3g} times the states of {key!r} that follow them: different units?", key=data.action,
                            channels=at, why="As targets they are wrong by that factor; as a difference of both they mean nothing.", fix=FIX, factor=factor)]
    return []

"""Episodes at another rate, by their time stamps.

New steps are at t0, t0 + 1/fps, … up to the last stamp. Floating-point channels are interpolated linearly (so quaternions that turn fast come out
slightly shorter than 1); whole numbers, flags, images and actions keep the latest value that was known at that time (zero-order hold). An action
that is a change in one step (delta) is summed over the steps it now spans, except for its gripper; a rotation among its parts must be left out,
since turns do not add up.
"""
import re

import numpy as np

from policy.data.convert.source import Episode
from policy.data.files import DataError
from policy.data.semantics import Semantics

FRAMES = "frames"


def clock_key(clock: str) -> tuple[str, int | None]:
    """`states[0]` -> ("states", 0);  `timestamp` -> ("timestamp", None)."""
    found = re.fullmatch(r"(.+?)(?:\[(-?\d+)\])?", clock)
    assert found
    return found[1], None if found[2] is None else int(found[2])


def stamps(episode: Episode, clock: str, rate: float | None, i: int) -> np.ndarray:
    """Seconds (n,) of the steps of episode i.   DataError when they go backwards or are not one number a step."""
    if clock == FRAMES:
        if not rate:
            raise DataError("clock: frames needs the rate of the recording, which the source does not tell. Name its time stamps instead: clock: key[channel]")
        return np.arange(len(next(iter(episode.values())))) / rate
    key, channel = clock_key(clock)
    if key not in episode:
        raise DataError(f"clock: {key!r} is not in the source (known: {', '.join(episode)})")
    x = np.asarray(episode[key], np.float64)
    x = x[..., channel] if channel is not None else x[:, 0] if x.shape[1:] == (1,) else x
    if x.ndim != 1:
        raise DataError(f"clock: {clock} has shape {x.shape[1:]} per step; name one channel of it, such as {key}[0]")
    if not np.isfinite(x).all() or (np.diff(x) < 0).any():
        at = int(np.argmax(~np.isfinite(x) if not np.isfinite(x).all() else np.append(np.diff(x) < 0, False)))
        raise DataError(f"clock: {clock} goes backwards or is not finite after step {at} of episode {i}. Cut the episode there, or convert without fps")
    return x


def resampled(episode: Episode, times: np.ndarray, fps: float, action: set[str], semantics: Semantics) -> Episode:
    """episode {key: (n, *shape)} with time stamps (n,) in s -> {key: (m, *shape)} at fps Hz.   action: keys that are (parts of) an action."""
    steps = int(np.floor((times[-1] - times[0]) * fps + 1e-3)) + 1
    new = times[0] + np.arange(steps) / fps
    held = np.clip(np.searchsorted(times, new + 1e-3 / fps, side="right") - 1, 0, None)
    out = {}
    for key, x in episode.items():
        if key in action and semantics.kind == "delta":
            out[key] = _summed(x, held, semantics)
        else:
            out[key] = x[held] if key in action or x.dtype.kind != "f" else _linear(x, times, new)
    return out


def _linear(x: np.ndarray, times: np.ndarray, new: np.ndarray) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    return np.stack([np.interp(new, times, flat[:, c]) for c in range(flat.shape[1])], 1).reshape(len(new), *x.shape[1:]).astype(x.dtype) \
        if flat.shape[1] else np.zeros((len(new), *x.shape[1:]), x.dtype)


def _summed(x: np.ndarray, held: np.ndarray, semantics: Semantics) -> np.ndarray:
    """x (n, d): the changes of all steps that one new step spans, added; the gripper's latest value."""
    if semantics.parts.get("rotation"):
        raise DataError("an action that turns by a rotation in each step cannot be resampled: turns do not add up. Convert at the "
                        "recorded rate, or compose the action of parts that can: action_from, with action: {kind: velocity} or {kind: absolute}")
    total = np.concatenate([np.zeros((1, *x.shape[1:])), np.cumsum(x, 0, dtype=np.float64)])
    out = total[np.append(held[1:], len(x))] - total[held]
    gripper = list(semantics.parts.get("gripper", ()))
    out[:, gripper] = x[held][:, gripper]
    return out.astype(x.dtype)

"""Plants a fault into a dataset and returns where: of values, motion, rotations and time stamps. [(key, channel, episode, first step, end step)]"""
from collections.abc import Callable

import numpy as np
from recordings import FPS, Arrays, cut, lengths, repeat, smooth


def nan(d: Arrays) -> list[tuple]:
    d.arrays["joints"][d.start(5) + 40:d.start(5) + 43, 2] = np.nan
    return [("joints", 2, 5, 40, 43)]


def infinite(d: Arrays) -> list[tuple]:
    d.arrays["action"][d.start(9) + 7, 3] = np.inf
    return [("action", 3, 9, 7, 8)]


def short(d: Arrays) -> list[tuple]:
    keep = np.ones(int(d.episode_ends[-1]), bool)
    keep[d.start(4) + 3:d.episode_ends[4]] = False
    cut(d, keep)
    return [("", None, 4, 0, 3)]


def long(d: Arrays) -> list[tuple]:
    n, e = lengths(d), 6
    there_and_back = np.concatenate([np.arange(d.start(e), d.episode_ends[e]), np.arange(d.start(e), d.episode_ends[e])[::-1]] * 3)
    order = np.concatenate([np.arange(d.start(e)), there_and_back, np.arange(d.episode_ends[e], d.episode_ends[-1])])
    n[e] = len(there_and_back)
    d.arrays = {k: x for k, x in d.arrays.items() if k != "timestamp"}
    repeat(d, order, n)
    rng = np.random.default_rng(1)
    for key in ("joints", "pose", "action"):
        x = d.arrays[key][d.span(e)]
        x[:, :3] += (0.05 * smooth(rng, len(x), 3, 300)).astype(x.dtype)
    return [("", None, e, 0, n[e])]


def hold(d: Arrays, e: int, lo: int, n: int) -> None:
    """The robot rests for n steps from step lo on, with the noise of its sensors."""
    order = np.arange(d.episode_ends[-1])
    at = d.start(e) + lo
    order = np.concatenate([order[:at], np.full(n, at), order[at:]])
    ends = lengths(d)
    ends[e] += n
    stamps = d.arrays["timestamp"].copy()
    repeat(d, order, ends)
    d.arrays["joints"][at:at + n] += (0.0005 * np.random.default_rng(2).normal(size=(n, 6))).astype(np.float32)
    d.arrays["image"][at:at + n] += np.random.default_rng(2).integers(0, 3, (n, 16, 16, 3)).astype(np.uint8)
    d.arrays["timestamp"] = np.concatenate([stamps[:at], stamps[at] + np.arange(n) / FPS, stamps[at:] + (n / FPS) * (order[at + n:] < d.episode_ends[e] - n)])


def idle(e: int, lo: int, n: int = 45) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        at = lo if lo >= 0 else lengths(d)[e] - 1
        hold(d, e, at, n)
        return [("", None, e, at, at + n)]
    return plant


def teleport(d: Arrays) -> list[tuple]:
    d.arrays["pose"][d.start(7) + 60:d.episode_ends[7], 1] += 0.25
    return [("pose", 1, 7, 60, 61)]


def glitch(d: Arrays) -> list[tuple]:
    d.arrays["joints"][d.start(3) + 50, 4] += 0.9
    return [("joints", 4, 3, 50, 51)]


def action_jump(d: Arrays) -> list[tuple]:
    x = d.arrays["action"][d.span(11)]
    x[70:, 2] += 0.9
    return [("action", 2, 11, 70, 71)]


def border(d: Arrays) -> list[tuple]:
    n = lengths(d)
    d.episode_ends = np.delete(d.episode_ends, 10)
    d.arrays["timestamp"] = np.concatenate([np.arange(m) / FPS for m in lengths(d)])
    return [("", None, 10, n[10], n[10] + 1)]


def constant(d: Arrays) -> list[tuple]:
    d.arrays["joints"][:, 5] = 0.25
    d.arrays["action"][:, 5] = 0.25
    return [("joints", 5, None, 0, 0), ("action", 5, None, 0, 0)]


def dead(d: Arrays) -> list[tuple]:
    x = d.arrays["joints"][d.span(8)]
    x[:, 1] = 0.111
    return [("joints", 1, 8, 0, len(x))]


def stuck(d: Arrays) -> list[tuple]:
    x = d.arrays["joints"][d.span(12)]
    speed = np.abs(np.diff(x[:, 0]))
    at = 30 + int(np.convolve(speed, np.ones(20), "valid")[25:60].argmax())
    x[at:at + 20, 0] = x[at, 0]
    return [("joints", 0, 12, at, at + 20)]


def clipped(d: Arrays) -> list[tuple]:
    d.arrays["action"][:, 3] = d.arrays["action"][:, 3].clip(0.8, 1.2)
    return [("action", 3, None, 0, 0)]


def quaternion_norm(d: Arrays) -> list[tuple]:
    d.arrays["pose"][d.start(13) + 20:d.start(13) + 24, 3:7] *= 0.5
    return [("pose", 3, 13, 20, 24)]


def quaternion_zero(d: Arrays) -> list[tuple]:
    d.arrays["pose"][d.start(2) + 90, 3:7] = 0
    return [("pose", 3, 2, 90, 91)]


def quaternion_sign(d: Arrays) -> list[tuple]:
    d.arrays["pose"][d.start(14) + 33:d.episode_ends[14], 3:7] *= -1
    return [("pose", 3, 14, 33, 34)]


def wrap(turn: float, offset: float) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        d.arrays["heading"] = ((3 * d.arrays["heading"] * turn / (2 * np.pi) + offset) % turn).astype(np.float32)
        x = d.arrays["heading"]
        at = [(e, t + 1) for e in range(len(d.episode_ends)) for t in np.flatnonzero(np.abs(np.diff(x[d.span(e)])) > 0.8 * turn)]
        return [("heading", 0, e, t, t + 1) for e, t in at]
    return plant


def axis_angle(d: Arrays) -> list[tuple]:
    """A tool that turns about a slanted axis, its rotation vector kept within π."""
    axis, places, out = np.array([0.6, 0.0, 0.8]), [], []
    for e in range(len(d.episode_ends)):
        n = lengths(d)[e]
        angle = np.linspace(2.0, 2.6, n) + (np.linspace(0, 1.2, n) if e == 15 else 0) + 0.05 * smooth(np.random.default_rng(e), n, 1)[:, 0]
        wrapped = np.where(angle > np.pi, angle - 2 * np.pi, angle)
        out.append(wrapped[:, None] * axis + 0.1 * smooth(np.random.default_rng(100 + e), n, 3) * np.array([0, 0.2, 0]))
        places += [("tool", 0, e, int(t) + 1, int(t) + 2) for t in np.flatnonzero(np.abs(np.diff(wrapped)) > 3)]
    d.arrays["tool"] = np.concatenate(out).astype(np.float32)
    return places


def time_gap(d: Arrays) -> list[tuple]:
    d.arrays["timestamp"][d.start(16) + 55:d.episode_ends[16]] += 7 / FPS
    return [("timestamp", 0, 16, 55, 56)]


def time_order(d: Arrays) -> list[tuple]:
    x = d.arrays["timestamp"][d.span(17)]
    x[[20, 21]] = x[[21, 20]]
    return [("timestamp", 0, 17, 21, 22)]


def time_repeat(d: Arrays) -> list[tuple]:
    x = d.arrays["timestamp"][d.span(18)]
    x[31] = x[30]
    x[32:] -= 1 / FPS
    return [("timestamp", 0, 18, 31, 32)]


def jitter(d: Arrays) -> list[tuple]:
    d.arrays["timestamp"] += 0.25 / FPS * np.random.default_rng(3).uniform(-1, 1, len(d.arrays["timestamp"]))
    return [("timestamp", 0, None, 0, 0)]


def jitter_of_one(d: Arrays) -> list[tuple]:
    x = d.arrays["timestamp"][d.span(11)]
    x += 0.2 / FPS * np.random.default_rng(3).normal(size=len(x)).clip(-2, 2)
    x.sort()
    return [("timestamp", 0, 11, 0, len(x))]


def rate(d: Arrays) -> list[tuple]:
    d.attrs["fps"] = 30.0
    return [("timestamp", 0, None, 0, 0)]

"""Plants a fault into a dataset and returns where: of what actions mean, copies, units, digits and images. [(key, channel, episode, first step, end step)]"""
from collections.abc import Callable

import numpy as np
from recordings import Arrays, lengths, repeat

from policy.data.semantics import Semantics


def delay(d: Arrays, episodes, steps: int) -> None:
    """The first action repeated; negative: the last one, and they come early."""
    for e in episodes:
        n, x = lengths(d)[e], d.arrays["action"][d.span(e)]
        x[:] = x[np.clip(np.arange(n) - steps, 0, n - 1)]


def late(steps: int) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        delay(d, range(len(d.episode_ends)), steps)
        return [("action", 0, None, 0, 0)]
    return plant


def late_in(episodes, steps: int) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        delay(d, episodes, steps)
        return [("action", 0, e, 0, lengths(d)[e]) for e in episodes]
    return plant


def copy_of_state(d: Arrays) -> list[tuple]:
    d.arrays["action"][:, :6] = d.arrays["joints"]
    return [("action", 0, None, 0, 0)]


def copy_of_three(d: Arrays) -> list[tuple]:
    d.arrays["action"][:, :3] = d.arrays["joints"][:, :3]
    return [("action", c, None, 0, 0) for c in range(3)]


def as_deltas(d: Arrays, episodes) -> None:
    for e in episodes:
        target = d.arrays["action"][d.span(e)][:, :6].astype(np.float64)
        d.arrays["action"][d.span(e)][:, :6] = np.diff(target, axis=0, append=2 * target[-1:] - target[-2:-1])


def kind(d: Arrays) -> list[tuple]:
    as_deltas(d, range(len(d.episode_ends)))
    return [("action", 1, None, 0, 0)]


def kind_of_delta(d: Arrays) -> list[tuple]:
    d.attrs["action"] = Semantics(kind="delta", space="joint", of="joints").to_json()
    return [("action", 0, None, 0, 0)]


def mixed(d: Arrays) -> list[tuple]:
    as_deltas(d, (3, 19))
    return [("action", None, e, 0, lengths(d)[e]) for e in (3, 19)]


def duplicate(d: Arrays) -> list[tuple]:
    n = lengths(d)
    repeat(d, np.concatenate([np.arange(d.episode_ends[-1]), np.arange(d.start(1), d.episode_ends[1])]), [*n, n[1]])
    return [("", None, len(n), 0, n[1])]


def near_duplicate(d: Arrays) -> list[tuple]:
    duplicate(d)
    last = len(d.episode_ends) - 1
    rng = np.random.default_rng(4)
    for key in ("joints", "pose", "heading", "action"):
        x = d.arrays[key][d.span(last)]
        x += (1e-3 * rng.normal(size=x.shape)).astype(x.dtype)
    return [("", None, last, 0, lengths(d)[last])]


def overlap(d: Arrays) -> list[tuple]:
    """Episode 5 comes in two pieces that share 30 frames."""
    n, at = lengths(d), d.start(5)
    order = np.concatenate([np.arange(at + 70), np.arange(at + 40, d.episode_ends[-1])])
    repeat(d, order, [*n[:5], 70, n[5] - 40, *n[6:]])
    return [("", None, 6, 0, n[5] - 40)]


def degrees(d: Arrays) -> list[tuple]:
    d.arrays["joints"] *= np.float32(180 / np.pi)
    d.arrays["action"][:, :6] *= np.float32(180 / np.pi)
    return [("joints", 0, None, 0, 0)]


def degrees_in_action(d: Arrays) -> list[tuple]:
    d.arrays["action"][:, :6] *= np.float32(180 / np.pi)
    return [("action", 0, None, 0, 0)]


def degrees_in_some(d: Arrays) -> list[tuple]:
    for key in ("joints", "action"):
        d.arrays[key][d.span(20)] = d.arrays[key][d.span(20)] * np.r_[np.full(6, 180 / np.pi), 1][:d.arrays[key].shape[1]].astype(np.float32)
    return [("joints", None, 20, 0, lengths(d)[20]), ("action", None, 20, 0, lengths(d)[20])]


def scaled(key: str, factor: float, also: tuple[str, ...] = (), n: int = 6) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        for k in (key, *also):
            d.arrays[k][d.span(7)][:, :3 if key == "pose" else n] *= np.float32(factor)
        return [(k, c, 7, 0, lengths(d)[7]) for k in (key, *also) for c in (0, 1)]
    return plant


def exchanged(d: Arrays) -> list[tuple]:
    x = d.arrays["action"][d.span(9)]
    x[:, [0, 1]] = x[:, [1, 0]].copy()
    return [("action", c, 9, 0, len(x)) for c in (0, 1)]


def flipped(d: Arrays) -> list[tuple]:
    x = d.arrays["action"][d.span(9)]
    x[:, 2] *= -1
    return [("action", 2, 9, 0, len(x))]


def width(d: Arrays) -> None:
    """The opening of the gripper, which takes 8 steps to open or close."""
    g = d.arrays["action"][:, 6]
    each = [np.convolve(np.r_[np.full(7, g[d.start(e)]), g[d.span(e)]], np.ones(8) / 8, "valid") for e in range(len(d.episode_ends))]
    d.arrays["width"] = (0.04 + 0.04 * np.concatenate(each)).astype(np.float32)


def gripper_inverted(d: Arrays) -> list[tuple]:
    width(d)
    d.arrays["action"][d.span(9)][:, 6] *= -1
    return [("action", 6, 9, 0, lengths(d)[9])]


def noise(key: str, channel: int, size: float) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        x = d.arrays[key][d.span(9)]
        x[:, channel] += (size * np.random.default_rng(0).normal(size=len(x))).astype(np.float32)
        return [(key, channel, 9, 0, len(x))]
    return plant


def quaternion_order(d: Arrays) -> list[tuple]:
    x = d.arrays["pose"][d.span(9)]
    x[:, 3:7] = np.roll(x[:, 3:7], 1, axis=1)
    return [("pose", 3, 9, 0, len(x))]


def half(d: Arrays) -> list[tuple]:
    d.arrays["heading"] = (d.arrays["heading"] + 100).astype(np.float16)
    return [("heading", 0, None, 0, 0)]


def epoch(d: Arrays) -> list[tuple]:
    d.arrays["timestamp"] = (d.arrays["timestamp"] + 1.7e9).astype(np.float32)
    return [("timestamp", 0, None, 0, 0)]


def outlier(d: Arrays) -> list[tuple]:
    d.arrays["joints"][d.start(21) + 66, 3] = 60.0
    d.attrs["units"] = {}
    return [("joints", 3, 21, 66, 67)]


def huge(d: Arrays) -> list[tuple]:
    d.arrays["joints"][d.start(21) + 66, 3] = 1e30
    d.attrs["units"] = {}
    return [("joints", 3, 21, 66, 67)]


def whole_numbers(d: Arrays) -> list[tuple]:
    for key in ("joints", "action"):
        d.arrays[key] = 1000 * d.arrays[key]
    d.arrays["action"] = d.arrays["action"].astype(np.int32)
    d.attrs["units"] = {}
    return [("action", None, None, 0, 0)]


def half_but_near(d: Arrays) -> list[tuple]:
    d.arrays["heading"] = d.arrays["heading"].astype(np.float16)
    return [("heading", None, None, 0, 0)]


def image_normalised(d: Arrays) -> list[tuple]:
    d.arrays["image"] = d.arrays["image"].astype(np.float32) / 127.5 - 1
    return [("image", None, None, 0, 0)]


def image_float(d: Arrays) -> list[tuple]:
    d.arrays["image"] = d.arrays["image"].astype(np.float32) / 255
    return [("image", None, None, 0, 0)]


def image_mixed(d: Arrays) -> list[tuple]:
    d.arrays["image"] = d.arrays["image"].astype(np.float32)
    d.arrays["image"][d.span(6)] /= 255
    return [("image", None, 6, 0, 1)]


def image_half(d: Arrays) -> list[tuple]:
    """Two sources, one that normalises: most frames are of 0 … 1."""
    d.arrays["image"] = d.arrays["image"].astype(np.float32)
    for e in range(16):
        d.arrays["image"][d.span(e)] /= 255
    return [("image", None, 6, 0, 1)]


def image_lost(d: Arrays) -> list[tuple]:
    d.arrays["image"] = (d.arrays["image"] / 255).astype(np.uint8)
    d.arrays["image"][:, 3, 3] = np.arange(len(d.arrays["image"]))[:, None] % 2
    return [("image", None, None, 0, 0)]


def black(d: Arrays) -> list[tuple]:
    d.arrays["image"][d.start(10) + 12:d.start(10) + 20] = 0
    return [("image", None, 10, 12, 13)]


def frozen(d: Arrays) -> list[tuple]:
    x = d.arrays["image"][d.span(22)]
    x[40:70] = x[40]
    return [("image", None, 22, 40, 70)]

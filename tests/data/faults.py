"""A clean dataset, smooth and noisy like a robot's, and every fault of `dipole data validate` as something that can be planted into a dataset."""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.semantics import Semantics

FPS = 20.0
HOME = np.array([0.0, -0.5, 0.3, 1.0, 0.2, -0.4])


@dataclass
class Arrays:
    """A dataset in memory that reads like a Store."""
    arrays: dict[str, np.ndarray]
    episode_ends: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)
    path: Path = Path("memory")

    @property
    def schema(self):
        return {key: (x.shape[1:], x.dtype) for key, x in self.arrays.items()}

    def read(self, key, lo=0, hi=None):
        return self.arrays[key][lo:hi]

    def copy(self, *keys: str) -> "Arrays":
        """These keys alone, all by default, free to be written to."""
        return Arrays({k: self.arrays[k].copy() for k in keys or self.arrays}, self.episode_ends.copy(), dict(self.attrs), self.path)

    def start(self, e: int) -> int:
        return int(self.episode_ends[e - 1]) if e else 0

    def span(self, e: int) -> slice:
        return slice(self.start(e), int(self.episode_ends[e]))


def smooth(rng, n: int, c: int, period: float = 50.0) -> np.ndarray:
    """(n, c) sums of a few slow waves, about 1 in size."""
    t = np.arange(n)[:, None]
    return sum(rng.normal(size=c) * np.sin(2 * np.pi * t / (period * rng.uniform(1, 3, c)) + rng.uniform(0, 6.3, c)) for _ in range(3)) / 2


def rotations(angles: np.ndarray) -> np.ndarray:
    """(n, 3) rotation vectors -> (n, 4) quaternions xyzw, continuous."""
    size = np.linalg.norm(angles, axis=1, keepdims=True) + 1e-9
    return np.concatenate([angles / size * np.sin(size / 2), np.cos(size / 2)], axis=1)


def clean(episodes: int = 24, seed: int = 0) -> Arrays:
    """joints (6,) rad, pose (7,) m and quaternion, heading () rad, timestamp () s, image (16, 16, 3), action (7,): joint targets, which the
    joints follow after 2 steps, and a gripper that opens and closes."""
    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {k: [] for k in ("joints", "pose", "heading", "timestamp", "image", "action")}
    for _ in range(episodes):
        n = int(rng.integers(110, 170))
        target = HOME + 0.4 * smooth(rng, n + 2, 6)
        joints = target[:-2] + 0.001 * rng.normal(size=(n, 6))
        place = np.array([0.4, 0.0, 0.3]) + 0.1 * smooth(rng, n, 3)
        turn = 0.5 * smooth(rng, n, 3) + 0.3
        gripper = np.where(np.sin(np.arange(n) / 25 + rng.uniform(0, 6)) > 0, 1.0, -1.0)
        shade = (60 * smooth(rng, n, 1) + 128).clip(40, 210)[:, :, None, None]
        scene = rng.integers(0, 40, (16, 16, 3))
        parts["joints"].append(joints.astype(np.float32))
        parts["pose"].append(np.concatenate([place, rotations(turn)], axis=1).astype(np.float32))
        parts["heading"].append((1.2 * smooth(rng, n, 1)[:, 0]).astype(np.float32))
        parts["timestamp"].append(np.arange(n) / FPS + 0.0005 * rng.normal(size=n))
        parts["image"].append((shade + scene + rng.integers(0, 3, (n, 16, 16, 3))).astype(np.uint8))
        parts["action"].append(np.concatenate([target[2:], gripper[:, None]], axis=1).astype(np.float32))
    ends = np.cumsum([len(x) for x in parts["action"]])
    said = Semantics(kind="absolute", space="joint", of="joints", parts={"joints": tuple(range(6)), "gripper": (6,)})
    return Arrays({k: np.concatenate(v) for k, v in parts.items()}, ends, {"fps": FPS, "units": {"joints": "rad"}, "action": said.to_json()})


@dataclass(frozen=True)
class Fault:
    """plant(data) changes a dataset in place and returns where: [(key, channel or None, episode or None, first step, end step)]; found as code, severity.

    also: codes that are true of the same fault as well.
    """
    code: str
    severity: str
    plant: Callable[[Arrays], list[tuple]]
    also: tuple[str, ...] = ()


def cut(d: Arrays, keep: np.ndarray) -> None:
    """Frames that are kept; episode ends follow."""
    lengths = [int(keep[d.span(e)].sum()) for e in range(len(d.episode_ends))]
    d.arrays = {k: x[keep] for k, x in d.arrays.items()}
    d.episode_ends = np.cumsum([n for n in lengths if n])


def repeat(d: Arrays, index: np.ndarray, ends: list[int]) -> None:
    """Frames in another order, or several times; lengths of the episodes."""
    d.arrays = {k: x[index] for k, x in d.arrays.items()}
    d.episode_ends = np.cumsum(ends)


def lengths(d: Arrays) -> list[int]:
    return np.diff(d.episode_ends, prepend=0).tolist()


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


def rate(d: Arrays) -> list[tuple]:
    d.attrs["fps"] = 30.0
    return [("timestamp", 0, None, 0, 0)]


def late(steps: int) -> Callable[[Arrays], list[tuple]]:
    def plant(d: Arrays) -> list[tuple]:
        for e in range(len(d.episode_ends)):
            x = d.arrays["action"][d.span(e)]
            x[steps:], x[:steps] = x[:-steps].copy(), x[0]
        return [("action", 0, None, 0, 0)]
    return plant


def copy_of_state(d: Arrays) -> list[tuple]:
    d.arrays["action"][:, :6] = d.arrays["joints"]
    return [("action", 0, None, 0, 0)]


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


def image_float(d: Arrays) -> list[tuple]:
    d.arrays["image"] = d.arrays["image"].astype(np.float32) / 255
    return [("image", None, None, 0, 0)]


def image_mixed(d: Arrays) -> list[tuple]:
    d.arrays["image"] = d.arrays["image"].astype(np.float32)
    d.arrays["image"][d.span(6)] /= 255
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


FAULTS = {
    "nan": Fault("not_finite", "error", nan), "infinity": Fault("not_finite", "error", infinite),
    "short": Fault("short_episode", "warning", short), "long": Fault("odd_length", "note", long),
    "idle start": Fault("idle_start", "note", idle(2, 0)), "idle middle": Fault("idle_middle", "note", idle(3, 60)),
    "idle end": Fault("idle_end", "note", idle(4, -1)),
    "teleport": Fault("jump", "warning", teleport), "glitch": Fault("glitch", "warning", glitch), "action leaps": Fault("jump", "note", action_jump),
    "border": Fault("missed_border", "error", border), "constant": Fault("constant", "note", constant), "dead": Fault("dead_sensor", "warning", dead),
    "stuck": Fault("stuck_sensor", "warning", stuck, also=("jump",)), "clipped": Fault("clipped", "warning", clipped),
    "quaternion norm": Fault("quaternion_norm", "warning", quaternion_norm), "quaternion zero": Fault("quaternion_norm", "warning", quaternion_zero),
    "quaternion sign": Fault("quaternion_sign", "warning", quaternion_sign),
    "wrap": Fault("angle_wrap", "warning", wrap(2 * np.pi, 0)), "wrap at 180": Fault("angle_wrap", "warning", wrap(360.0, 180)),
    "axis angle": Fault("axis_angle_wrap", "warning", axis_angle),
    "time gap": Fault("time_gap", "warning", time_gap), "time order": Fault("time_order", "error", time_order, also=("time_gap",)),
    "time repeat": Fault("time_repeat", "warning", time_repeat), "jitter": Fault("time_jitter", "warning", jitter), "rate": Fault("rate", "error", rate),
    "late": Fault("action_lag", "error", late(5)), "copy": Fault("action_lag", "error", copy_of_state),
    "kind": Fault("action_kind", "error", kind), "kind of delta": Fault("action_kind", "error", kind_of_delta), "mixed": Fault("action_mixed", "error", mixed),
    "duplicate": Fault("duplicate", "warning", duplicate), "near duplicate": Fault("near_duplicate", "warning", near_duplicate),
    "overlap": Fault("overlap", "warning", overlap),
    "degrees": Fault("units", "warning", degrees), "degrees in action": Fault("units", "warning", degrees_in_action),
    "degrees in some": Fault("units_mixed", "error", degrees_in_some),
    "half": Fault("precision", "warning", half), "epoch": Fault("precision", "warning", epoch),
    "outlier": Fault("outlier", "warning", outlier, also=("glitch",)),
    "image float": Fault("image_range", "warning", image_float), "image mixed": Fault("image_range", "error", image_mixed),
    "image lost": Fault("image_range", "error", image_lost), "black": Fault("image_blank", "warning", black),
    "frozen": Fault("image_frozen", "warning", frozen),
}

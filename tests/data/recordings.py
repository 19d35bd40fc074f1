"""A clean dataset, smooth and noisy like a robot's, in memory; and how to cut and repeat its frames."""
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

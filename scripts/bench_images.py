"""Synthetic data for `dipole bench data`: made up, but neither constant nor noise alone."""
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from policy.data.store import Store

SIDE, STEPS, WRITE = 96, 200, 8  # pixels, frames of an episode, episodes written at once
NOISE, OCTAVES = 2, 5  # grey levels of the sensor's noise; detail of the texture


def synthetic(path: Path, episodes: int = 200, steps: int = 120) -> Store:
    """Smooth trajectories of Push-T's shape: 20 observed numbers, 2 actions that follow two of them."""
    rng = np.random.default_rng(0)
    store = Store.create(path, {"state": ((20,), "float32"), "action": ((2,), "float32")}, fps=10)
    phase = rng.uniform(0, 6, (episodes, 1, 20)) + np.arange(steps)[None, :, None] * rng.uniform(0.02, 0.2, (episodes, 1, 20))
    store.extend({"state": np.sin(p).astype(np.float32), "action": np.sin(p[:, :2] + 0.3).astype(np.float32)} for p in phase)
    return store


class Camera:
    """A camera of SIDE x SIDE that moves over a textured plane, with a sensor's noise: neither constant nor noise alone, so it compresses, but not away."""

    def __init__(self, size: int = 1024):
        rng = np.random.default_rng(0)
        texture = np.zeros((size, size, 3))
        for k in range(1, OCTAVES + 1):
            n = 2 ** (k + 2)
            small = rng.normal(size=(n, n, 3))
            texture += np.kron(small, np.ones((size // n, size // n, 1))) / 2**k
        texture = 40 + 170 * (texture - texture.min()) / np.ptp(texture)
        self.texture, self.size = texture.astype(np.uint8), size
        self.noise = rng.integers(0, NOISE, (64, SIDE + 64, SIDE, 3)).astype(np.uint8)

    def episode(self, rng: np.random.Generator, steps: int) -> dict[str, np.ndarray]:
        """image (n, SIDE, SIDE, 3), state (n, 4) place and speed [px, px/step], action (n, 2) the place to go to."""
        t = np.arange(steps + 1)[:, None]
        at = self.size / 2 + (self.size / 2 - SIDE) * np.sin(rng.uniform(0.01, 0.06, 2) * t + rng.uniform(0, 6, 2)) * rng.uniform(0.3, 1, 2)
        corner = (at - SIDE / 2).astype(int)
        image = np.empty((steps, SIDE, SIDE, 3), np.uint8)
        which, shift = rng.permutation(np.arange(steps) % 64), rng.integers(0, 64, steps)
        for k in range(steps):
            y, x = corner[k]
            image[k] = self.texture[y:y + SIDE, x:x + SIDE] + self.noise[which[k], shift[k]:shift[k] + SIDE]
        return {"image": image, "state": np.concatenate([at[:-1], np.diff(at, axis=0)], 1).astype(np.float32), "action": at[1:].astype(np.float32)}


def generate(path: Path, size: int, progress: Progress) -> dict[str, Any]:
    """A dataset of about `size` bytes of images at path; one of that size that is there is used again."""
    episodes = max(2, round(size / (STEPS * SIDE * SIDE * 3)))
    schema = {"image": ((SIDE, SIDE, 3), "uint8"), "state": ((4,), "float32"), "action": ((2,), "float32")}
    store = Store.open(path, mode="a") if path.exists() else Store.create(path, schema, fps=10, units={"state": "px", "action": "px"})
    task, camera, start = progress.add_task("make images", total=episodes, completed=store.episodes, note=""), Camera(), time.perf_counter()
    made = -store.episodes
    while store.episodes < episodes:
        store.extend(camera.episode(np.random.default_rng([1, store.episodes + k]), STEPS) for k in range(min(WRITE, episodes - store.episodes)))
        progress.update(task, completed=store.episodes)
    made += store.episodes
    whole = store.steps * SIDE * SIDE * 3
    return {"bytes": whole, "on_disk": store.disk_bytes("image"), "ratio": whole / store.disk_bytes("image"), "episodes": store.episodes, "steps": store.steps,
            "write_bytes_per_s": made * STEPS * SIDE * SIDE * 3 / max(1e-9, time.perf_counter() - start)}

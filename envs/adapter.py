"""What the adapters of other packages' environments share: the episode's bookkeeping, pictures, and version limits with a message."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

import gymnasium
import mujoco
import numpy as np
from packaging.specifiers import SpecifierSet

from envs import render
from envs.task import Obs, check_actions


class Adapter(gymnasium.Env):
    """One world of another package. Terminates on success, truncates after max_steps; info: success (bool) and metrics (float).

    reset(seed=) is a pure function of the seed, without a seed the start is random. An episode may be stepped on after success, as
    collecting demonstrations does. A subclass sets the attributes and the spaces, and writes _start, _advance and, to be drawn, _scene.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}
    name: str
    units: dict[str, str]  # of every observation key and of "action"
    action_semantics: str
    expert_noise: float | tuple[float, ...] = 0.0  # standard deviation per action dimension, for collecting demonstrations
    camera: Any = -1  # an MJCF camera's name, or a mujoco.MjvCamera

    def __init__(self, *, max_steps: int, fps: float, render_mode: str | None = None, size: int = 256) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r} is unknown: use 'rgb_array' or None")
        self.max_steps, self.render_mode, self.size = max_steps, render_mode, size
        self.metadata = {**Adapter.metadata, "render_fps": fps}
        self._elapsed = -1

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        """Begin the seed's episode: observation, success, metrics."""
        raise NotImplementedError

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        """One control step with action (d,) float64, inside the action space: observation, reward, success, metrics."""
        raise NotImplementedError

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        """What render draws."""
        raise NotImplementedError

    def expert(self, seed: int) -> Any:
        """A scripted controller of one episode: obs {key: (...)} -> action (d,)."""
        raise NotImplementedError(f"{self.name} has no scripted expert: train on recorded demonstrations instead")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        obs, success, metrics = self._start(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._elapsed = 0
        return obs, {"success": success, **metrics}

    def step(self, action: np.ndarray) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        space = self.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        checked = check_actions(np.asarray(action)[None, None], (1, 1, *space.shape), np.zeros(1, int))[0, 0]
        if self._elapsed < 0:
            raise RuntimeError("no episode is running: call reset first")
        obs, reward, success, metrics = self._advance(np.clip(checked, space.low, space.high))
        self._elapsed += 1
        return obs, reward, success, self._elapsed >= self.max_steps, {"success": success, **metrics}

    def render(self) -> np.ndarray | None:
        if self.render_mode is None:
            return None
        if self._elapsed < 0:
            raise RuntimeError("no episode is running: call reset first")
        model, data = self._scene()
        return render.frames(model, data.qpos[None], data.mocap_pos[None], camera=self.camera, size=self.size)[0]

    def close(self) -> None:
        render.release()


def need(module: str, install: str, **limits: str) -> Any:
    """Import an optional package; limits are version specifiers of what it works with: need("metaworld", "pip install …", mujoco="<3.17").

    ImportError says how to install it, ValueError which installed package does not fit.
    """
    for package, limit in limits.items():
        if not SpecifierSet(limit).contains(installed := version(package), prereleases=True):
            raise ValueError(f"{module} does not work with {package} {installed}: pip install '{package}{limit}'")
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} does not import ({error}): {install}", name=module.partition(".")[0]) from error


def seen(low: np.ndarray | float, high: np.ndarray | float, shape: tuple[int, ...]) -> gymnasium.spaces.Box:
    """A float32 Box for observations, a little wider than the bounds: float32 may round a value at a bound to beyond it."""
    low, high = np.broadcast_to(low, shape), np.broadcast_to(high, shape)
    return gymnasium.spaces.Box((low - 1e-6).astype(np.float32), (high + 1e-6).astype(np.float32), dtype=np.float32)

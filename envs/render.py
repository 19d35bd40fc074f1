"""Pictures of states after the fact: one OpenGL renderer per process, closed before OpenGL itself is."""

import atexit
from functools import lru_cache

import mujoco
import numpy as np


def frames(model: mujoco.MjModel, qpos: np.ndarray, mocap_pos: np.ndarray, *, camera: str, size: int = 256) -> np.ndarray:
    """Draw states qpos (t, nq), mocap_pos (t, nmocap, 3) as (t, size, size, 3) uint8 RGB. Call it from one thread only."""
    renderer, data = _renderer(model, size), mujoco.MjData(model)
    images = np.empty((len(qpos), size, size, 3), np.uint8)
    for k in range(len(qpos)):
        data.qpos[:], data.mocap_pos[:] = qpos[k], mocap_pos[k]
        mujoco.mj_forward(model, data)
        renderer.update_scene(data, camera=camera)
        renderer.render(out=images[k])
    return images


def release() -> None:
    """Free the renderer; the next `frames` makes a new one."""
    _renderer.cache_clear()


@lru_cache(maxsize=1)
def _renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    renderer = mujoco.Renderer(model, size, size)
    # Exit hooks run last in, first out: registered after the display's own, this one runs while the display still lives.
    atexit.register(release)
    return renderer

"""Pictures of states after the fact: one OpenGL renderer per process, model and size, closed before OpenGL itself is."""

import atexit
from functools import lru_cache

import mujoco
import numpy as np


def frames(model: mujoco.MjModel, qpos: np.ndarray, mocap_pos: np.ndarray, *, camera: str, size: int = 256, samples: int = 4) -> np.ndarray:
    """Draw states qpos (t, nq), mocap_pos (t, nmocap, 3) as (t, size, size, 3) uint8 RGB. Call it from one thread only.

    samples: per pixel, for smooth edges; 0 takes a third of the time.   OSError where MuJoCo cannot draw.
    """
    images = np.empty((len(qpos), size, size, 3), np.uint8)
    if not len(images):
        return images
    renderer, data = _renderer(model, size, samples)
    for k in range(len(qpos)):
        data.qpos[:], data.mocap_pos[:] = qpos[k], mocap_pos[k]
        mujoco.mj_forward(model, data)
        renderer.update_scene(data, camera=camera)
        renderer.render(out=images[k])
    return images


def release() -> None:
    """Free the renderers; the next `frames` makes a new one."""
    _renderer.cache_clear()


@lru_cache(maxsize=4)
def _renderer(model: mujoco.MjModel, size: int, samples: int) -> tuple[mujoco.Renderer, mujoco.MjData]:
    window, quality = model.vis.global_, model.vis.quality
    kept = window.offwidth, window.offheight, quality.offsamples
    # Read once, here: every frame clears the whole buffer, so it should be no larger than the picture.
    window.offwidth, window.offheight, quality.offsamples = size, size, samples
    try:
        renderer = mujoco.Renderer(model, size, size)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"MuJoCo cannot draw here ({reason}): `dipole doctor` says how to get an OpenGL backend") from error
    finally:
        window.offwidth, window.offheight, quality.offsamples = kept
    # Exit hooks run last in, first out: registered after the display's own, this one runs while the display still lives.
    atexit.register(release)
    return renderer, mujoco.MjData(model)

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr

from envs import render  # envs before mujoco: it chooses the OpenGL back end
from envs.gantry import Gantry


@dataclass(frozen=True)
class HumanData:
    """The 206 Push-T demonstrations: state (n, 5), action (n, 2), keypoint (n, 9, 2), float64 px; starts and ends (206,).

    image (n, 96, 96, 3) float32, 0 to 255, stays on disk: index it.
    """

    state: np.ndarray
    action: np.ndarray
    keypoint: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    image: zarr.Array

    def velocities(self) -> np.ndarray:
        """The finger's velocity (n, 2) px/s at each recorded state, which the data lack: its path is a function of the actions."""
        velocity = np.zeros_like(self.action)
        for start, end in zip(self.starts, self.ends, strict=True):
            x, v = self.state[start, :2].copy(), np.zeros(2)
            for k in range(start, end):
                assert np.abs(x - self.state[k, :2]).max() < 1e-3
                velocity[k] = v
                for _ in range(10):
                    v = v + 0.01 * (100 * (self.action[k] - x) - 20 * v)
                    x = x + 0.01 * v
        return velocity


@pytest.fixture(scope="session")
def human() -> HumanData:
    root = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = root / "pusht" / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set DIPOLE_DATA to the folder that holds pusht/{path.name}")
    group = zarr.open_group(path, mode="r")
    state, action, keypoint = (np.asarray(group[f"data/{key}"][:], np.float64) for key in ("state", "action", "keypoint"))
    ends = np.asarray(group["meta/episode_ends"][:])
    return HumanData(state, action, keypoint, np.concatenate([[0], ends[:-1]]), ends, group["data/img"])


@pytest.fixture(scope="session")
def gl() -> None:
    try:
        task = Gantry()
        state = task.reset(0)
        render.frames(task.model, state.qpos[None], state.mocap_pos[None], camera=task.camera, size=8)
    except Exception as error:
        pytest.skip(f"MuJoCo cannot draw here: {error!r}")

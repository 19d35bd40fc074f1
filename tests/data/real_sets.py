"""The real datasets: where they lie below DIPOLE_DATA, what convert is told about them, and what must come out."""
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")
BAXTER = {"key": "states", "take": list(range(2, 20)), "shift": 1}  # both arms and grippers, measured one step later: no action was recorded


@dataclass(frozen=True)
class Real:
    """say: entries of the mapping.   lengths: steps of every episode, or their sum alone.   obs: what a policy observes by default."""
    path: str
    format: str
    episodes: int
    steps: int
    obs: tuple[str, ...]
    say: dict[str, Any] = field(default_factory=dict)

    def find(self) -> Path:
        if not (ROOT / self.path).exists():
            pytest.skip(f"{self.path} is not there; set DIPOLE_DATA to the folder that holds it")
        return ROOT / self.path


ARRAYS = [
    Real("adroit_door/door_human_00-19.npz", "npz", 20, 5445, ("observations",), {"fps": 100}),
    Real("ikea_toy_table/toy_table_human_first.npz", "npz", 82, 11216, ("arm_qpos", "object_ob", "robot_ob"), {"fps": 10}),
    *(Real(f"mujoco_expert/{name}-v4_rollout0.npz", "npz", 1, 1000, ("observation",), {"fps": fps})
      for name, fps in (("Ant", 20), ("HalfCheetah", 20), ("Hopper", 125), ("Walker2d", 125))),
]
ROBOSUITE = [
    *(Real(f"robosuite_1.0.0/{name}/panda/demo.hdf5", "robomimic", 1, steps, ("states",))
      for name, steps in (("lift", 412), ("door", 261), ("nut-assembly", 1036), ("pick-place", 1482))),
    Real("robosuite_0.3.0/SawyerLift", "robomimic", 2, 1895, ("states",)),
    Real("robosuite_0.3.0/SawyerStack", "robomimic", 2, 2426, ("states",)),
    Real("robosuite_0.3.0/BaxterLift", "robomimic", 2, 3568, ("states",), {"action_from": BAXTER}),
]
OTHERS = [
    Real("pusht_lerobot_v3", "lerobot", 206, 25650, ("observation.state",)),
    Real("g1_bottle_lerobot_v21", "lerobot", 80, 29417, ("observation.state",)),
]
PUSHT = Real("pusht/pusht_cchi_v7_replay.zarr", "diffusion_policy", 206, 25650, ("keypoint", "n_contacts", "state"), {"fps": 10})

"""Simulated tasks: gymnasium + MuJoCo + numpy, never the policy library. One task is one file; task.py and batch.py run them all."""

import os
import sys

# MuJoCo picks its OpenGL back end while it is imported, so this has to come first.
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")

from gymnasium.envs.registration import register

register("dipole/PushT-v0", entry_point="envs.task:make", kwargs={"task": "envs.pusht:PushT"})
register("dipole/Gantry-v0", entry_point="envs.task:make", kwargs={"task": "envs.gantry:Gantry"})
register("dipole/Maze-v0", entry_point="envs.maze:make")
register("dipole/PandaPick-v0", entry_point="envs.task:make", kwargs={"task": "envs.panda:PandaPick"})
register("dipole/AlohaTransfer-v0", entry_point="envs.task:make", kwargs={"task": "envs.aloha:AlohaTransfer"})

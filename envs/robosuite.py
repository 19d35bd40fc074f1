"""robosuite's manipulation tasks (Zhu et al. 2020; package robosuite 1.5) as robomimic sets them up (Mandlekar et al. 2021).

The observations are robomimic's low-dimensional ones under its names, the action its OSC_POSE with deltas in the world's frame, as in the
robosuite versions (1.4 and before) that its demonstrations were recorded with. Contacts and controller of 1.5 are not those versions':
recorded states are reproduced, recorded actions are not. Success is the task's own check, once; the original goes on.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import gymnasium
import mujoco
import numpy as np

from envs.adapter import Adapter, need, seen
from envs.task import Obs, box

TASKS = {  # task: robosuite's name, arms, robomimic's limit of steps
    "lift": ("Lift", 1, 400), "can": ("PickPlaceCan", 1, 400), "square": ("NutAssemblySquare", 1, 400),
    "tool_hang": ("ToolHang", 1, 700), "transport": ("TwoArmTransport", 2, 700),
}  # fmt: skip
ARM = {"eef_pos": (3, "m"), "eef_quat": (4, "quaternion x y z w"), "gripper_qpos": (2, "m")}
INSTALL = "pip install 'dipole[robosuite]' && pip install --no-deps robosuite==1.5.2 (its pin mink==0.0.5 demands numpy 1, but is not needed here)"


class Robosuite(Adapter):
    """task: "lift", "can", "square", "tool_hang" or "transport", with Panda arms at 20 Hz.   Reward is 1 at success, else 0."""

    action_semantics = "per arm: position delta (1: 5 cm), axis-angle delta (1: 0.5 rad) in the world's frame, gripper (1 closes); clipped to [-1, 1]"
    camera = "agentview"

    def __init__(self, *, task: str = "lift", max_steps: int | None = None, render_mode: str | None = None, size: int = 256) -> None:
        if task not in TASKS:
            raise ValueError(f"robosuite's task {task!r} is not set up here; use {', '.join(TASKS)}")
        logging.getLogger("robosuite_logs").addFilter(_severe)  # advice about optional files, in every process
        suite = need("robosuite", INSTALL, mujoco=">=3.3,<3.10")
        name, arms, limit = TASKS[task]
        control = suite.load_composite_controller_config(robot="Panda")
        for part in control["body_parts"].values():
            part["input_ref_frame"] = "world"
        self._world: Any = suite.make(
            name, robots=["Panda"] * arms, controller_configs=[control] * arms, control_freq=20, has_renderer=False, has_offscreen_renderer=False,
            use_camera_obs=False, ignore_done=True, hard_reset=False, seed=0,  # the seed of what is drawn once, as the size of Lift's cube
        )  # fmt: skip
        super().__init__(max_steps=limit if max_steps is None else max_steps, fps=20, render_mode=render_mode, size=size)
        self.task, self.name = task, f"robosuite/{task}"
        self._keys = {f"robot{arm}_{part}": what for arm in range(arms) for part, what in ARM.items()}
        self._keys["object"] = (self._world.observation_spec()["object-state"].size, "poses of the objects: m and quaternions x y z w")
        self.observation_space = gymnasium.spaces.Dict({key: seen(-np.inf, np.inf, (n,)) for key, (n, _) in self._keys.items()})
        self.action_space = box(-1, 1, (7 * arms,))
        self.units = {**{key: unit for key, (_, unit) in self._keys.items()}, "action": "see action_semantics"}
        self._drawn: mujoco.MjModel | None = None

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        # The samplers hold this generator, so it is set and not replaced.
        self._world.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        return self._named(self._world.reset()), bool(self._world._check_success()), {}

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        raw, reward, *_ = self._world.step(action)
        return self._named(raw), float(reward), bool(self._world._check_success()), {}

    def _named(self, raw: dict[str, np.ndarray]) -> Obs:
        return {key: np.asarray(raw["object-state" if key == "object" else key], np.float32) for key in self._keys}

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        if self._drawn is None:  # without the shapes that only collide
            self._drawn = copy.copy(self._world.sim.model._model)
            self._drawn.geom_rgba[self._drawn.geom_group == 0, 3] = 0
        return self._drawn, self._world.sim.data._data


def _severe(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR

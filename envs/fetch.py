"""The Fetch arm's four goal tasks (Plappert et al. 2018; package gymnasium-robotics, versions v4) with scripted experts for three.

Different on purpose: the observation's 25 numbers have names. An episode ends with the original's is_success, once: the hand or the object is
within 5 cm of the goal. The original never ends one and papers ask at step 50, so what passes through the goal, a sliding puck above
all, counts here. Starts and goals are the original's draws from the same seed; some pushes and picks begin at the goal, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import mujoco
import numpy as np

from envs.adapter import Adapter, seen
from envs.robotics import named, robotics
from envs.task import Obs, box

CLASSES = {  # task: module and class below gymnasium_robotics.envs.fetch
    "reach": "reach.MujocoFetchReachEnv", "push": "push.MujocoFetchPushEnv",
    "slide": "slide.MujocoFetchSlideEnv", "pick_and_place": "pick_and_place.MujocoFetchPickAndPlaceEnv",
}  # fmt: skip
HAND = {"hand": 3, "fingers": 2, "hand_velocity": 3, "fingers_velocity": 2}
OBJECT = {
    "hand": 3, "object": 3, "object_from_hand": 3, "fingers": 2, "object_euler": 3, "object_velocity": 3, "object_spin": 3,
    "hand_velocity": 3, "fingers_velocity": 2,
}  # fmt: skip
UNITS = {
    "hand": "m", "fingers": "m each, from closed", "hand_velocity": "m per step", "fingers_velocity": "m per step", "object": "m",
    "object_from_hand": "m", "object_euler": "rad", "object_velocity": "m per step, less the hand's", "object_spin": "rad per step",
    "goal": "m", "goal_from_hand": "m", "goal_from_object": "m", "action": "5 cm per step asked for, 3.2 cm reached",
}  # fmt: skip
GAIN = 25.0  # 1/m: asks for 1.25 of the way that is left; the weld goes 0.64 of what it is asked


class Fetch(Adapter):
    """task: "reach", "push", "slide" or "pick_and_place".   Reward is -1 away from the goal and 0 at it."""

    action_semantics = "hand velocity x, y, z (1: 5 cm ahead of the hand, for 40 ms) and fingers (1 opens, -1 closes), clipped to [-1, 1]"
    expert_noise = (0.2, 0.2, 0.2, 0.0)

    def __init__(self, *, task: str = "pick_and_place", max_steps: int = 50, render_mode: str | None = None, size: int = 256) -> None:
        if task not in CLASSES:
            raise ValueError(f"Fetch has no task {task!r}; it has: {', '.join(CLASSES)}")
        module, _, name = CLASSES[task].partition(".")
        self._world: Any = getattr(robotics(f"fetch.{module}", mujoco="<3.12"), name)()
        super().__init__(max_steps=max_steps, fps=1 / self._world.dt, render_mode=render_mode, size=size)
        self.task, self.name, self._parts = task, f"fetch/{task}", OBJECT if self._world.has_object else HAND
        self.action_space = box(-1, 1, (4,))
        away = "goal_from_object" if self._world.has_object else "goal_from_hand"
        sizes = {**self._parts, "goal": 3, away: 3}
        self.observation_space = gymnasium.spaces.Dict({key: seen(-np.inf, np.inf, (n,)) for key, n in sizes.items()})
        self.units = {key: UNITS[key] for key in (*sizes, "action")}
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:], self.camera.distance, self.camera.azimuth, self.camera.elevation = (1.3, 0.75, 0.55), 1.6, 132, -20

    def expert(self, seed: int) -> Callable[[Obs], np.ndarray]:
        """Functions of the observation alone, so what they do after a disturbance is what they would do without its history."""
        experts = {"reach": reach, "push": push, "pick_and_place": pick_and_place}
        if self.task not in experts:
            raise NotImplementedError("nobody has written an expert for Fetch's slide: collect env=fetch env.task=push, or train on recorded demonstrations")
        return experts[self.task]

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        raw, _ = self._world.reset(seed=seed)
        return self._observe(raw), bool(self._world._is_success(raw["achieved_goal"], raw["desired_goal"])), _distance(raw)

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        raw, reward, _, _, info = self._world.step(action)
        return self._observe(raw), float(reward), bool(info["is_success"]), _distance(raw)

    def _observe(self, raw: dict[str, np.ndarray]) -> Obs:
        away = "goal_from_object" if self._world.has_object else "goal_from_hand"
        goal, way = raw["desired_goal"], raw["desired_goal"] - raw["achieved_goal"]
        return {**named(raw["observation"], self._parts), "goal": goal.astype(np.float32), away: way.astype(np.float32)}

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model, data = self._world.model, self._world.data
        target = model.site("target0")  # it hangs on a body that is never turned
        target.pos = self._world.goal - data.xpos[target.bodyid[0]]
        return model, data


def reach(obs: Obs) -> np.ndarray:
    return _act(obs["goal_from_hand"], 0.0)


def pick_and_place(obs: Obs) -> np.ndarray:
    """Over the cube, down, close, to the goal."""
    away, held = obs["object_from_hand"], obs["fingers"].sum() < 0.055  # m; the cube is 5 cm wide
    if np.linalg.norm(away) < 0.02 or (held and np.linalg.norm(away) < 0.03):
        return _act(obs["goal"] - obs["hand"] if held else away, -1.0)
    if np.linalg.norm(away[:2]) < 0.015:
        return _act(away, 1.0)
    return _act(away + [0, 0, 0.06], 1.0)


LOW, HIGH = 0.42, 0.50  # m, height of the fingers: at the cube's middle, and clear of it
CONTACT, BEHIND = 0.045, 0.075  # m, hand to the cube's middle while it pushes, and before


def push(obs: Obs) -> np.ndarray:
    """Over to the place behind the cube as seen from the goal, down, and along the line to the goal."""
    hand, cube, way = obs["hand"], obs["object"], obs["goal_from_object"][:2]
    length = float(np.linalg.norm(way))
    ahead = way / max(length, 1e-6)
    left = np.array([-ahead[1], ahead[0]])
    along, side = float((hand - cube)[:2] @ ahead), float((hand - cube)[:2] @ left)
    if along < -0.03 and abs(side) < 0.02 and hand[2] < LOW + 0.02:
        step = ahead * (min(length, 0.03) - CONTACT - along) - 1.5 * side * left
        return _act(np.append(step, LOW - hand[2]), 0.0, 0.7)
    place = np.append(cube[:2] - ahead * BEHIND, LOW)
    if np.linalg.norm((place - hand)[:2]) < 0.015:
        return _act(place - hand, 0.0)
    if hand[2] < HIGH - 0.02 and np.linalg.norm((place - hand)[:2]) > 0.03:
        return _act(np.array([0, 0, HIGH - hand[2]]), 0.0)
    return _act(np.append((place - hand)[:2], HIGH - hand[2]), 0.0)


def _act(way: np.ndarray, fingers: float, most: float = 1.0) -> np.ndarray:
    """Towards way [m] by the proportion the weld follows."""
    return np.append(np.clip(GAIN * way, -most, most), fingers).astype(np.float32)


def _distance(raw: dict[str, np.ndarray]) -> dict[str, float]:
    return {"distance": float(np.linalg.norm(raw["achieved_goal"] - raw["desired_goal"]))}

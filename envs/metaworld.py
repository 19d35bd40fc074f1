"""Meta-World's 50 Sawyer tasks (Yu et al. 2019; package metaworld 3.0.0) with the experts it ships.

The goal is visible ("multi-task" rather than "meta-learning" mode) and drawn anew, with the object's place, from every seed. In six tasks
Meta-World's first observation still shows the object where the draw before had put it, up to 20 cm away; here it shows where it is.
Success is Meta-World's own flag, once. The original never terminates; its limit of 500 steps is kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import gymnasium
import mujoco
import numpy as np

from envs.adapter import Adapter, need, seen
from envs.task import Obs, box

FRAME = {"hand": (0, 3), "opening": (3, 4), "object1": (4, 7), "object1_quat": (7, 11), "object2": (11, 14), "object2_quat": (14, 18)}
GOAL = slice(36, 39)
UNITS = {
    "hand": "m", "opening": "0 closed, 1 open", "object1": "m", "object1_quat": "quaternion, in either order, zeros if none",
    "object2": "m, zeros if none", "object2_quat": "as object1_quat", "goal": "m", "object1_from_hand": "m", "goal_from_object1": "m",
    "object2_from_object1": "m, zeros if there is no second object", "previous": "the first six keys one step earlier",
    "action": "1 cm per step and closing effort",
}  # fmt: skip


class MetaWorld(Adapter):
    """task: one of Meta-World's names, "pick-place-v3".   Reward is Meta-World's, 0 to 10.

    Observations are the named parts of Meta-World's 39 numbers (hand ... object2_quat, previous, goal) and three differences of them.
    """

    action_semantics = "hand velocity x, y, z (1: 1 cm per step of 12.5 ms) and gripper effort (1 closes, -1 opens), clipped to [-1, 1]"
    expert_noise = 0.1
    camera = "corner2"

    def __init__(self, *, task: str = "pick-place-v3", max_steps: int = 500, render_mode: str | None = None, size: int = 256) -> None:
        classes = need("metaworld.env_dict", "pip install 'dipole[metaworld]'", mujoco="<3.17").ALL_V3_ENVIRONMENTS
        if task not in classes:
            raise ValueError(f"Meta-World has no task {task!r}; it has: {', '.join(sorted(classes))}")
        self.task, self.name, self.units, self._world = task, f"metaworld/{task}", UNITS, classes[task]()
        # What set_task does with a goal from Meta-World's list of 50; here the goal comes from the world's own generator.
        self._world._set_task_called, self._world._partially_observable = True, False
        self._world._freeze_rand_vec, self._world.seeded_rand_vec = False, True
        self._world.__dict__.pop("sawyer_observation_space", None)  # cached for the hidden goal
        self._world.max_path_length = np.inf  # the limit is max_steps
        super().__init__(max_steps=max_steps, fps=1 / self._world.dt, render_mode=render_mode, size=size)
        self.action_space = box(-1, 1, (4,))
        bounds = self._world.sawyer_observation_space
        spaces: dict[str, gymnasium.spaces.Space] = {key: seen(bounds.low[a:b], bounds.high[a:b], (b - a,)) for key, (a, b) in FRAME.items()}
        spaces |= {key: seen(-np.inf, np.inf, (3,)) for key in ("object1_from_hand", "goal_from_object1", "object2_from_object1")}
        spaces |= {"goal": seen(bounds.low[GOAL], bounds.high[GOAL], (3,)), "previous": seen(bounds.low[18:36], bounds.high[18:36], (18,))}
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def expert(self, seed: int) -> Callable[[Obs], np.ndarray]:
        """Meta-World's own policy; it looks at the observation only."""
        policies = need("metaworld.policies", "pip install 'dipole[metaworld]'").ENV_POLICY_MAP
        warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high", module="metaworld")  # they mean to be clipped
        policy = policies[self.task]()

        def act(obs: Obs) -> np.ndarray:
            frame = [obs[key] for key in FRAME]
            return np.clip(policy.get_action(np.concatenate([*frame, obs["previous"], obs["goal"]]).astype(np.float64)), -1, 1)

        return act

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        self._world.seed(seed)
        self._world.reset()  # draws and moves into place twice, which is what leaves nothing of the episode before
        mujoco.mj_forward(self._world.model, self._world.data)
        now = self._world._get_curr_obs_combined_no_goal()
        self._world._prev_obs = now.copy()
        low, high = self._world.sawyer_observation_space.low, self._world.sawyer_observation_space.high
        return observe(np.clip(np.concatenate([now, now, self._world._get_pos_goal()]), low, high)), False, {}

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        flat, reward, _, _, info = self._world.step(action)
        return observe(flat), float(reward), bool(info["success"]), {}

    def render(self) -> np.ndarray | None:
        frame = super().render()
        return None if frame is None else np.ascontiguousarray(frame[::-1, ::-1])  # corner2 hangs upside down in Meta-World's MJCF

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self._world.model, self._world.data


def observe(flat: np.ndarray) -> Obs:
    """Meta-World's observation (39,) by name, float32."""
    obs = {key: flat[a:b] for key, (a, b) in FRAME.items()}
    second = obs["object2"] - obs["object1"] if obs["object2"].any() else np.zeros(3)
    obs |= {"goal": flat[GOAL], "previous": flat[18:36], "object1_from_hand": obs["object1"] - obs["hand"]}
    obs |= {"goal_from_object1": obs["goal"] - obs["object1"], "object2_from_object1": second}
    return {key: value.astype(np.float32) for key, value in obs.items()}

"""gymnasium-robotics' Adroit hand, Franka kitchen and point maze behind our names (its Fetch arm is envs/fetch.py).

Starts are the original's draws from the same seed. An episode ends with the original's success flag, once; the originals go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np

from envs.adapter import Adapter, need, seen
from envs.maze import LAYOUTS, Maze, MazeExpert
from envs.task import Obs, box


def robotics(module: str, **limits: str) -> Any:
    """A module below gymnasium_robotics.envs, without the message the package prints in every process that imports it."""
    try:
        from farama_notifications import notifications

        notifications.pop("gymnasium_robotics", None)
    except ImportError:
        pass
    return need(f"gymnasium_robotics.envs.{module}", "pip install 'dipole[robotics]'", **limits)


def named(flat: np.ndarray, sizes: dict[str, int]) -> Obs:
    """An observation (..., d) cut into parts of these sizes, float32."""
    parts = np.split(np.asarray(flat, np.float32), np.cumsum(list(sizes.values()))[:-1], axis=-1)
    return dict(zip(sizes, parts, strict=True))


class _Named(Adapter):
    """An environment whose flat observation is cut into named parts."""

    _parts: dict[str, tuple[int, str]]  # size and unit
    _world: Any

    def _spaces(self, action_unit: str) -> None:
        self.observation_space = gymnasium.spaces.Dict({key: seen(-np.inf, np.inf, (n,)) for key, (n, _) in self._parts.items()})
        self.action_space = box(-1, 1, self._world.action_space.shape)
        self.units = {**{key: unit for key, (_, unit) in self._parts.items()}, "action": action_unit}

    def _named(self, flat: np.ndarray) -> Obs:
        return named(flat, {key: n for key, (n, _) in self._parts.items()})

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self._world.model, self._world.data


ADROIT: dict[str, dict[str, tuple[int, str]]] = {
    "door": {
        "joints": (27, "rad"), "latch": (1, "rad"), "hinge": (1, "rad"), "palm": (3, "m"), "handle": (3, "m"), "palm_from_handle": (3, "m"),
        "open": (1, "1 beyond 1 rad, else -1"), "to_go": (1, "rad"),
    },
    "hammer": {
        "joints": (26, "rad"), "nail_depth": (1, "m"), "hammer_velocity": (6, "m/s and rad/s, clipped to 1"), "palm": (3, "m"),
        "hammer": (3, "m"), "hammer_euler": (3, "rad"), "nail": (3, "m"), "impact": (1, "N, clipped to 1"),
    },
    "pen": {
        "joints": (24, "rad"), "pen": (3, "m"), "pen_velocity": (6, "m/s and rad/s"), "pen_direction": (3, "unit vector"),
        "goal_direction": (3, "unit vector"), "pen_from_goal": (3, "m"), "direction_from_goal": (3, ""),
    },
    "relocate": {"joints": (30, "m for the first three, then rad"), "palm_from_ball": (3, "m"), "palm_from_goal": (3, "m"), "ball_from_goal": (3, "m")},
}  # fmt: skip


HINGE, NEAR = 28, 0.3  # index of the door's hinge in the original's observation; rad, the most that to_go says


class Adroit(_Named):
    """A 24-joint hand on an arm (Rajeswaran et al. 2018): task "door", "hammer", "pen" or "relocate", at 100 Hz.

    Success: door hinge from 1.35 rad, nail within 1 cm of the board, pen within 7.5 cm and cos 0.95, ball within 10 cm. Reward is the
    original's dense one. The original cuts after 200 steps; the human demonstrations of the door take 223 to 300, hence its 300.

    opening: rad, what the door is to be opened to, for its observation to_go = min(opening - hinge, 0.3), not below 0: how far the
    hinge still has to turn, near the end. Most people stopped short of 1.35 rad; labelled in hindsight with what each of them reached
    (Andrychowicz et al. 2017) they still show how to get there, and a policy can be asked for more.
    """

    action_semantics = "joint position targets, -1 to 1 over each actuator's range, clipped"

    def __init__(
        self, *, task: str = "door", opening: float = 1.6, max_steps: int | None = None, render_mode: str | None = None, size: int = 256
    ) -> None:
        if task not in ADROIT:
            raise ValueError(f"Adroit has no task {task!r}; it has: {', '.join(ADROIT)}")
        self._world = getattr(robotics(f"adroit_hand.adroit_{task}"), f"AdroitHand{task.title()}Env")()
        limit = (300 if task == "door" else 200) if max_steps is None else max_steps
        super().__init__(max_steps=limit, fps=1 / self._world.dt, render_mode=render_mode, size=size)
        self.task, self.opening, self.name, self._parts, self.camera = task, opening, f"adroit/{task}", ADROIT[task], "vil_camera"
        self._spaces("half the actuator's range")

    def expert(self, seed: int) -> Any:
        raise NotImplementedError(
            "nobody has written an expert for the Adroit hand. Take human demonstrations of it (github.com/aravindr93/hand_dapg, as npz with "
            f"observations, actions, episode_ends): dipole collect env=adroit env.task={self.task} recording=….npz path=…"
        )

    def recorded(self, path: str | Path) -> Iterator[dict[str, np.ndarray]]:
        """Episodes {observation key: (t, ...), "action": (t, d)} of an npz with observations (n, D), actions (n, d), episode_ends (e,).

        Those of the door end where it is widest open: what follows shows how to let it fall shut.
        """
        with np.load(path, allow_pickle=False) as file:
            if missing := {"observations", "actions", "episode_ends"} - set(file):
                raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; a recording has observations (n, D), actions (n, d), episode_ends (e,)")
            flat, actions, ends = (file[key] for key in ("observations", "actions", "episode_ends"))
        width: int = self._world.observation_space.shape[0]
        if flat.shape[1:] != (width,) or actions.shape != (len(flat), self._world.action_space.shape[0]) or ends[-1] != len(flat):
            raise ValueError(f"{path} does not record {self.name}: observations {flat.shape}, actions {actions.shape}, {ends[-1]} frames in episodes")
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
            rows, opening = flat[start:end], 0.0
            if self.task == "door":
                opening = rows[:, HINGE].max()
                rows = rows[: rows[:, HINGE].argmax() + 1]
            said = np.clip(actions[start : start + len(rows)], -1, 1)  # as the environment clips
            yield {**self._seen(rows, opening), "action": said.astype(np.float32)}

    def _seen(self, flat: np.ndarray, opening: float) -> Obs:
        """The original's observation (..., D) by name, and the door's to_go."""
        if self.task != "door":
            return self._named(flat)
        to_go = np.clip(opening - flat[..., HINGE : HINGE + 1], 0.0, NEAR)
        return self._named(np.concatenate([flat, to_go], axis=-1))

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        flat, _ = self._world.reset(seed=seed)
        return self._seen(flat, self.opening), False, {}

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        flat, reward, _, _, info = self._world.step(action)
        return self._seen(flat, self.opening), float(reward), bool(info["success"]), {}


KITCHEN = ("bottom burner", "top burner", "light switch", "slide cabinet", "hinge cabinet", "microwave", "kettle")


class Kitchen(_Named):
    """A Franka arm in a kitchen (Gupta et al. 2019), at 12.5 Hz: success is all of `tasks` done, reward how many this step did.

    tasks: of KITCHEN, each done when its joints are within 0.3 of the goal; default: those of D4RL's "partial".   info: completed, how many.
    Every start is the same but for the sensors' noise, as in the original.
    """

    name = "kitchen"
    action_semantics = "joint velocities, -1 to 1 over the robot's range"
    _parts = {
        "joints": (9, "rad, the fingers m"), "joint_velocity": (9, "rad/s, the fingers m/s"), "burners": (8, "rad"), "light": (2, "rad"),
        "slide_cabinet": (1, "m"), "hinge_cabinet": (2, "rad"), "microwave": (1, "rad"), "kettle": (7, "m and quaternion w x y z"),
        "object_velocity": (20, "m/s or rad/s"),
    }  # fmt: skip

    def __init__(
        self,
        *,
        tasks: Sequence[str] = ("microwave", "kettle", "light switch", "slide cabinet"),
        max_steps: int = 280,
        render_mode: str | None = None,
        size: int = 256,
    ) -> None:
        if not tasks or (unknown := set(tasks) - set(KITCHEN)):
            raise ValueError(f"tasks must name some of: {', '.join(KITCHEN)}; unknown: {', '.join(sorted(unknown)) if tasks else 'none given'}")
        self._world = robotics("franka_kitchen.kitchen_env", mujoco="<3.12").KitchenEnv(tasks_to_complete=list(tasks))
        super().__init__(max_steps=max_steps, fps=1 / self._world.robot_env.dt, render_mode=render_mode, size=size)
        self._spaces("2 rad/s at most")
        self.camera = mujoco.MjvCamera()
        self.camera.lookat[:], self.camera.distance, self.camera.azimuth, self.camera.elevation = (-0.2, 0.5, 2.0), 2.2, 70, -35

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        raw, _ = self._world.reset(seed=seed)
        return self._named(raw["observation"]), False, {"completed": 0.0}

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        raw, reward, done, _, info = self._world.step(action)
        return self._named(raw["observation"]), float(reward), bool(done), {"completed": float(len(info["episode_task_completions"]))}


class PointMaze(_Named):
    """maze: "umaze", "medium" or "large"; 100 Hz, goal radius 0.45 m. The observation and the expert are envs.maze.Maze's."""

    action_semantics = "force along x and y in units of 100 N, clipped to [-1, 1]"
    expert_noise = 0.3
    _parts = {"position": (2, "m"), "velocity": (2, "m/s"), "goal": (2, "m")}
    _steps = {"umaze": 300, "medium": 600, "large": 800}

    def __init__(self, *, maze: str = "umaze", max_steps: int | None = None, render_mode: str | None = None, size: int = 256) -> None:
        if maze not in LAYOUTS:
            raise ValueError(f"there is no maze {maze!r}; there are: {', '.join(LAYOUTS)}")
        self._maze = Maze(size=maze)
        self._world = robotics("maze.point_maze").PointMazeEnv(maze_map=[[int(cell == "#") for cell in row] for row in self._maze.rows])
        limit = self._steps[maze] if max_steps is None else max_steps
        super().__init__(max_steps=limit, fps=1 / self._world.point_env.dt, render_mode=render_mode, size=size)
        self.name = f"pointmaze/{maze}"
        self._spaces("100 N")
        self.camera = mujoco.MjvCamera()
        self.camera.distance, self.camera.elevation, self.camera.azimuth = 1.3 * max(map(len, (self._maze.rows, self._maze.rows[0]))), -90, 90

    def expert(self, seed: int) -> Callable[[Obs], np.ndarray]:
        expert = MazeExpert(self._maze, 1, seed)
        return lambda obs: expert.act({key: value[None] for key, value in obs.items()})[0]

    def _scene(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        return self._world.point_env.model, self._world.point_env.data

    def _start(self, seed: int) -> tuple[Obs, bool, dict[str, float]]:
        raw, info = self._world.reset(seed=seed)
        return self._named(np.append(raw["observation"], raw["desired_goal"])), bool(info["success"]), {}

    def _advance(self, action: np.ndarray) -> tuple[Obs, float, bool, dict[str, float]]:
        raw, reward, _, _, info = self._world.step(action)
        return self._named(np.append(raw["observation"], raw["desired_goal"])), float(reward), bool(info["success"]), {}

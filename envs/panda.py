"""Panda: a seven-joint arm with a parallel gripper picks up a cube, puts it down on a disc and lets go, by joint targets at 20 Hz.

The arm is Franka's Panda from published numbers (assets/panda_pick.xml says which) with capsules for a body, so nothing is downloaded.
meshes=True dresses it in the visual meshes of MuJoCo Menagerie; its physics stays the same to the last bit.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import gymnasium
import mujoco
import numpy as np

from envs.arrays import Array, clip, namespace
from envs.kinematics import Chain, matrix
from envs.task import Obs, Outcome, State, Task, box

LOW = (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)  # rad
HIGH = (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)
SPEED = (2.175,) * 4 + (2.61,) * 3  # rad/s
OPEN = 0.08  # m, between the fingers
CUBE = 0.02  # m, half the edge: also the height the cube is gripped and rests at
HOME = (0.0, 0.06, 0.0, -2.35, 0.0, 2.41, 0.785)  # rad, the hand pointing down 0.2 m above (0.5, 0)
AREA = np.array([[0.38, -0.2], [0.62, 0.2]])  # m, where cube and disc lie


class PandaPick(Task):
    """Reward is 1 on success: the cube within 2 cm of the disc's middle, on the table, the gripper open. Success ends an episode.

    Rotations are seen as the first two columns of a matrix. A cube looks the same after a quarter turn, so its yaw is seen as
    (cos 4 yaw, sin 4 yaw), and so is the turn that is left from the hand to the cube.
    """

    name, fps, substeps, camera = "panda_pick", 20.0, 10, "front"
    action_semantics = "absolute targets of the seven joints, rad, and of the gap between the fingers, m, clipped to the robot's ranges"
    expert_noise = (0.01,) * 7 + (0.0,)

    def __init__(self, *, meshes: bool = False, max_steps: int = 200) -> None:
        self.meshes, self.max_steps = meshes, max_steps
        self.action_space = box([*LOW, 0.0], [*HIGH, OPEN], (8,))
        metres = {"opening": 1, "hand": 3, "cube": 3, "cube_from_hand": 3, "goal": 2, "goal_from_cube": 2}
        turns = {"hand_rotation": 6, "cube_yaw": 2, "yaw_from_hand": 2}
        # The joints' stops give way a little.
        joints = {"joints": box(np.array(LOW) - 0.1, np.array(HIGH) + 0.1, (7,))}
        lengths, ratios = ({key: box(-most, most, (size,)) for key, size in each.items()} for each, most in ((metres, 5.0), (turns, 1.1)))
        self.observation_space = gymnasium.spaces.Dict({**joints, **lengths, **ratios})
        self.units = {"joints": "rad", **dict.fromkeys(metres, "m"), **dict.fromkeys(turns, "1"), "action": "rad, gripper m"}

    def reset(self, seed: int) -> State:
        rng = np.random.default_rng(seed)
        while True:
            cube, goal = rng.uniform(AREA[0], AREA[1], (2, 2))
            if np.linalg.norm(goal - cube) > 0.1:
                break
        yaw = rng.uniform(-np.pi, np.pi)
        joints = HOME + rng.uniform(-0.1, 0.1, 7)
        qpos = np.array([*joints, OPEN / 2, OPEN / 2, *cube, CUBE, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)])
        return State(qpos, np.zeros(self.model.nv), np.array([[*goal, 0.0]]))

    def control(self, action: Array) -> Array:
        return clip(action, self.action_space.low, self.action_space.high)

    def observe(self, state: State) -> Obs:
        xp, qpos, goal = namespace(state.qpos), state.qpos, state.mocap_pos[..., 0, :2]
        hand, rotation = self.arm.pose(qpos[..., :7])
        cube = clip(qpos[..., 9:12], -2.0, 2.0)  # it may be shot off the table
        cube_yaw, hand_yaw = quarter_turn(matrix(qpos[..., 12:])), quarter_turn(rotation)
        sideways = xp.stack([-hand_yaw[..., 1], hand_yaw[..., 0]], axis=-1)
        obs = {
            "joints": qpos[..., :7],
            "opening": qpos[..., 7:8] + qpos[..., 8:9],
            "hand": hand,
            "hand_rotation": xp.concat([rotation[..., 0], rotation[..., 1]], axis=-1),
            "cube": cube,
            "cube_yaw": cube_yaw,
            "cube_from_hand": cube - hand,
            "yaw_from_hand": xp.stack([xp.sum(cube_yaw * hand_yaw, axis=-1), xp.sum(cube_yaw * sideways, axis=-1)], axis=-1),
            "goal": goal,
            "goal_from_cube": goal - cube[..., :2],
        }
        return {key: xp.astype(value, xp.float32) for key, value in obs.items()}

    def outcome(self, state: State) -> Outcome:
        xp, cube, opening = namespace(state.qpos), state.qpos[..., 9:12], state.qpos[..., 7] + state.qpos[..., 8]
        distance = xp.linalg.vector_norm(cube[..., :2] - state.mocap_pos[..., 0, :2], axis=-1)
        success = (distance < 0.02) & (cube[..., 2] < 0.03) & (opening > 0.055)
        return Outcome(xp.astype(success, xp.float64), success, {"distance": distance})

    @cached_property
    def arm(self) -> Chain:
        """The seven joints up to the point between the fingertips; there z points out of the hand and the fingers move along y."""
        return Chain(self.model, site="grip")

    def expert(self, n: int, seed: int) -> PandaExpert:
        return PandaExpert(self, n, seed)

    def mjcf(self) -> str:
        return (Path(__file__).parent / "assets" / "panda_pick.xml").read_text()

    @cached_property
    def model(self) -> mujoco.MjModel:
        spec = mujoco.MjSpec.from_string(self.mjcf())
        if self.meshes:
            dress(spec)
        return spec.compile()


class PandaExpert:
    """Over the cube, turn, descend, grip, lift, carry, lower, let go, rise; what to do is read off the observation alone.

    Heights are funnels: how high the hand should be follows from how far it still is from cube or disc, so phases flow into
    each other. Its own state is what differs between demonstrators: each env's speed, fixed for an episode.
    """

    def __init__(self, task: PandaPick, n: int, seed: int) -> None:
        self.task, self._rng = task, np.random.default_rng(seed)
        self.speed = np.empty(n)  # m, how far ahead of itself the hand is sent
        self.reset(np.ones(n, bool))

    def reset(self, done: np.ndarray) -> None:
        """Draw the speed anew for the envs (n,) that start an episode."""
        self.speed[done] = self._rng.uniform(0.06, 0.08, done.sum())

    def act(self, obs: Obs) -> np.ndarray:
        """obs {key: (n, ...)} -> actions (n, 8)."""
        obs = {key: value.astype(float) for key, value in obs.items()}
        place, height, turn, opening = self._aim(obs)
        way = np.column_stack([place - obs["hand"][:, :2], height - obs["hand"][:, 2]])
        way[:, :2] *= np.clip(1 - (way[:, 2:] - 0.01) / 0.03, 0, 1)  # what is too low rises before it goes sideways
        way *= np.minimum(1.0, self.speed / np.maximum(np.linalg.norm(way, axis=1), 1e-9))[:, None]
        joints = obs["joints"]
        straight = joints * [1, 1, 0, 1, 1, 1, 1]  # of the seven joints the third one is spare
        yaw = np.arctan2(obs["hand_rotation"][:, 1], obs["hand_rotation"][:, 0]) + turn
        target = self.task.arm.solve(joints, obs["hand"] + way, pointing_down(yaw), steps=3, rest=straight, pull=0.3)
        step = target - joints
        step *= np.minimum(1.0, 0.15 / np.abs(step).max(axis=1))[:, None]
        return np.column_stack([joints + step, opening])

    def _aim(self, obs: Obs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the hand should be: place (n, 2) m, height m, the turn about the vertical that is left rad, and the fingers' gap m."""
        cube, opening = obs["cube"], obs["opening"][:, 0]
        level, deep = np.linalg.norm(obs["cube_from_hand"][:, :2], axis=1), np.abs(obs["cube_from_hand"][:, 2])
        left, turn = np.linalg.norm(obs["goal_from_cube"], axis=1), np.arctan2(*obs["yaw_from_hand"].T[::-1]) / 4
        off = level + 0.04 * np.abs(turn)  # m, how far from a good grip
        around = (off < 0.016) & (deep < 0.012)
        held = (level < 0.016) & (deep < 0.018) & (opening < 2 * CUBE + 0.0012)
        there = (left < 0.01) & (cube[:, 2] < CUBE + 0.004)
        free = opening > 0.07
        reach = cube[:, 2] + np.clip(2 * (off - 0.01), 0, 0.1)
        carry = CUBE + np.clip(2 * (left - 0.006), 0, 0.08)
        leave = obs["hand"][:, 2] + 0.06 * free
        loose = ~held | there
        place = np.where((held & ~there)[:, None], obs["hand"][:, :2] + obs["goal_from_cube"], cube[:, :2])
        height = np.where(there, leave, np.where(held, carry, reach))
        grip = np.where(there, OPEN, np.where(around | held, 0.0, OPEN))
        return place, height, np.where(loose & ~there, np.clip(turn, -0.25, 0.25), 0.0), grip


def pointing_down(yaw: Array) -> Array:
    """Rotations (..., 3, 3) of a hand that points down, its x axis turned by yaw (...) rad about the vertical."""
    xp = namespace(yaw)
    c, s, zero = xp.cos(yaw), xp.sin(yaw), 0 * yaw
    rows = [[c, s, zero], [s, -c, zero], [zero, zero, zero - 1]]
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def quarter_turn(rotation: Array) -> Array:
    """(cos 4 yaw, sin 4 yaw) of rotations (..., 3, 3) with an axis upright, whichever: the same for all 24 ways to name a cube's faces."""
    xp = namespace(rotation)
    x, y = rotation[..., 0, :], rotation[..., 1, :]
    x, y = x * x - y * y, 2 * x * y
    return xp.stack([xp.sum(x * x - y * y, axis=-1), xp.sum(2 * x * y, axis=-1)], axis=-1) / 2


def dress(spec: mujoco.MjSpec) -> None:
    """Show Menagerie's visual meshes instead of the capsules, which still collide; bodies of the same name have the same frame in both models."""
    try:
        import mujoco_menagerie as menagerie
    except ImportError as error:
        raise ImportError("meshes=true shows the Panda of MuJoCo Menagerie: pip install 'dipole[menagerie]', or leave meshes=false",
                          name="mujoco_menagerie") from error
    try:
        donor = menagerie.get("franka_emika_panda").spec("panda")
    except menagerie.MenagerieError as error:
        raise OSError(
            f"meshes=true needs 3 MB that Menagerie downloads once ({error}). Run 'mujoco-menagerie prefetch franka_emika_panda' where there is a network"
            " and copy its cache here (MENAGERIE_CACHE_DIR), set MENAGERIE_ROOT to a checkout of mujoco_menagerie, or leave meshes=false"
        ) from error
    files = {mesh.name or Path(mesh.file).stem: mesh for mesh in donor.meshes}
    bodies = {body.name: body for body in spec.bodies}
    for geom in [geom for geom in spec.geoms if geom.group == 2]:
        geom.group = 4  # not drawn
    for material in donor.materials:
        spec.add_material(name=f"menagerie/{material.name}", rgba=material.rgba, specular=material.specular, shininess=material.shininess)
    for geom in donor.geoms:
        seen = geom.type == mujoco.mjtGeom.mjGEOM_MESH and not geom.contype and not geom.conaffinity
        if not seen or geom.parent.name not in bodies:
            continue
        name, mesh = f"menagerie/{geom.meshname}", files[geom.meshname]
        if spec.mesh(name) is None:
            path = Path(donor.modelfiledir, donor.meshdir, mesh.file)
            spec.add_mesh(name=name, file=str(path), scale=mesh.scale, inertia=mujoco.mjtMeshInertia.mjMESH_INERTIA_SHELL)
        look = {"material": f"menagerie/{geom.material}"} if geom.material else {"rgba": geom.rgba}
        bodies[geom.parent.name].add_geom(
            type=mujoco.mjtGeom.mjGEOM_MESH, meshname=name, pos=geom.pos, quat=geom.quat, contype=0, conaffinity=0, mass=0, group=2, **look
        )

"""ALOHA: the right arm picks up a cube and hands it to the left one in mid-air; 14 joint-position actions. Scripted expert included.

Model, start, cube positions, actions and reward are gym-aloha's (Zhao et al. 2023, "sim_transfer_cube"), read from that package's XML and
meshes. Its environment is not used: it draws three 640 x 480 pictures per step, which costs 50 times the physics. Its reward asks MuJoCo for
contacts; here the same question is put to the geometry, so that it can be asked of any state: do the convex hulls that MuJoCo
collides, finger and cube, overlap?
"""

from __future__ import annotations

from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from xml.sax.saxutils import quoteattr

import gymnasium
import mujoco
import numpy as np

from envs.arrays import Array, clip, like, namespace
from envs.kinematics import Chain, matrix
from envs.task import Obs, Outcome, State, Task, box

ARMS = ("left", "right")
START = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.02239, -0.02239)  # rad, m: an arm's joints and its two fingers
ARM_LOW = (-3.14158, -1.85005, -1.76278, -3.14158, -1.8675, -3.14158)  # rad, as in the XML
ARM_HIGH = (3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158)
CLOSED, OPEN = 0.01844, 0.058  # m, a finger's joint at gripper 0 and 1
CUBE = 0.02  # m, half the edge
FINGER = 0.0687  # m, from the gripper link to the fingers'
PINCH = 0.138  # m, from the gripper link to where the fingers hold the cube, 16 mm from their tips
CLEAR = 0.05  # m, from the cube to a hand that has let go and withdrawn
MEET = np.array([0.0, 0.5, 0.25])  # m, where the expert's hands give and take
SPEED = (0.03, 0.045)  # rad per control step, of an expert's fastest joint
STEEP = np.deg2rad(75)  # how far down the expert's right hand points


class AlohaTransfer(Task):
    """Reward is gym-aloha's stage 0..4: right hand touches, has lifted; left hand touches, has it off the table, which is success.

    Success ends an episode while both hands hold the cube. release=True asks for more: the left hand alone has the
    cube, and the right one has withdrawn from it by 5 cm. Commands that jump from one end of the joints' ranges to the other can make this
    model unstable, which is reported as a fault.
    """

    name, fps, substeps, camera = "aloha_transfer", 50.0, 10, "front"
    action_semantics = (
        "absolute targets of the left arm's waist, shoulder, elbow, forearm roll, wrist angle and wrist rotation, rad, and gripper, 0 closed to 1 open;"
        " then the right arm's, all clipped to the joints' ranges"
    )
    expert_noise = ((0.005,) * 6 + (0.0,)) * 2

    def __init__(self, *, release: bool = False, max_steps: int = 400) -> None:
        self.release, self.max_steps = release, max_steps
        self.action_space = box([*ARM_LOW, 0.0] * 2, [*ARM_HIGH, 1.0] * 2, (14,))
        places = dict.fromkeys(("cube", "left_hand", "right_hand", "cube_from_left", "cube_from_right"), 3)
        sizes = {"agent_pos": 14, "cube_axes": 6, **places}
        self.observation_space = gymnasium.spaces.Dict({key: box(-4, 4, (size,)) for key, size in sizes.items()})
        joints = "rad, grippers 0 to 1"
        self.units = {"agent_pos": joints, "cube_axes": "1", **dict.fromkeys(places, "m"), "action": joints}

    def reset(self, seed: int) -> State:
        cube = np.random.RandomState(seed).uniform([0.0, 0.4, 0.05], [0.2, 0.6, 0.05])  # gym-aloha's generator, so its seeds mean the same
        return State(np.array([*START, *START, *cube, 1, 0, 0, 0]), np.zeros(self.model.nv), np.zeros((0, 3)))

    def control(self, action: Array) -> Array:
        xp = namespace(action)
        left, right = (CLOSED + (OPEN - CLOSED) * action[..., i : i + 1] for i in (6, 13))
        return xp.concat([action[..., :6], left, -left, action[..., 7:13], right, -right], axis=-1)

    def observe(self, state: State) -> Obs:
        xp, q = namespace(state.qpos), state.qpos
        left, right = ((q[..., i : i + 1] - CLOSED) / (OPEN - CLOSED) for i in (6, 14))
        # There is no floor: a cube that has left the table falls for good.
        cube = clip(q[..., 16:19], -1.0, 1.0)
        axes = matrix(q[..., 19:23])[..., :2]
        hands = [pinch(hand) for hand in self.hands(q)]
        obs = {
            "agent_pos": xp.concat([q[..., :6], left, q[..., 8:14], right], axis=-1),
            "cube": cube,
            "cube_axes": xp.reshape(axes, (*q.shape[:-1], 6)),
            "left_hand": hands[0],
            "right_hand": hands[1],
            "cube_from_left": cube - hands[0],
            "cube_from_right": cube - hands[1],
        }
        return {key: xp.astype(value, xp.float32) for key, value in obs.items()}

    def outcome(self, state: State) -> Outcome:
        xp, q = namespace(state.qpos), state.qpos
        cube, axes, hands = q[..., 16:19], matrix(q[..., 19:23]), self.hands(q)
        height = cube[..., 2] - CUBE * xp.sum(xp.abs(axes[..., 2, :]), axis=-1)  # of the lowest corner

        def touches(arm: int) -> Array:
            at, turned = hands[arm]
            finger = at + FINGER * turned[..., 0] + q[..., 8 * arm + 6, None] * turned[..., 1]
            back = xp.matrix_transpose(turned)
            return self.hull.gap((back @ (cube - finger)[..., None])[..., 0], back @ axes) <= 0

        # As gym-aloha, which asks only each hand's left finger.
        left, right, lifted = touches(0), touches(1), height > 0
        done = xp.astype(lifted, q.dtype)
        stage = xp.where(left, 3 + done, xp.where(right, 1 + done, 0 * height))
        away = xp.linalg.vector_norm(cube - pinch(hands[1]), axis=-1)
        alone = left & lifted & ~right & (away > CLEAR)
        return Outcome(stage, alone if self.release else stage == 4, {"height": height, "alone": xp.astype(alone, q.dtype)})

    def hands(self, qpos: Array) -> list[tuple[Array, Array]]:
        """Position (..., 3) m and axes (..., 3, 3) of the left and the right gripper link; x points at what it grips, the fingers move along y."""
        return [chain.pose(qpos[..., start : start + 6]) for chain, start in zip(self.chains, (0, 8), strict=True)]

    @cached_property
    def chains(self) -> list[Chain]:
        return [Chain(self.model, body=f"vx300s_{arm}/gripper_link") for arm in ARMS]

    @cached_property
    def hull(self) -> Hull:
        """Of the left finger, which both hands share."""
        return Hull(self.model, "vx300s_left/10_left_gripper_finger")

    def expert(self, n: int, seed: int) -> AlohaExpert:
        return AlohaExpert(self, n, seed)

    def mjcf(self) -> str:
        return _mjcf()


class AlohaExpert:
    """Right hand: over the cube, down, grip, to the middle. Left: wait beside it, come, grip. Right: open, withdraw.

    What to do is read off the observation. Its own state is what differs between demonstrators, each env's speed, and where the arms
    were told to be: friction keeps them up to 5 degrees behind, so commands that started anew from where they are would not move them.
    """

    def __init__(self, task: AlohaTransfer, n: int, seed: int) -> None:
        self.task, self._rng = task, np.random.default_rng(seed)
        c, s = np.cos(STEEP), np.sin(STEEP)
        self.turned = np.array([[[1, 0, 0], [0, 0, -1], [0, 1, 0]], [[-c, 0, -s], [0, -1, 0], [-s, 0, c]]])  # left's fingers close vertically
        self.ahead = self.turned[..., 0]
        self.told = np.empty((2, n, 6))  # rad
        self.speed = np.empty(n)  # rad per control step, of the joint that moves most
        self.reset(np.ones(n, bool))

    def reset(self, done: np.ndarray) -> None:
        """Draw the speed anew for the envs (n,) that start an episode."""
        self.speed[done] = self._rng.uniform(*SPEED, done.sum())
        self.told[:, done] = START[:6]

    def act(self, obs: Obs) -> np.ndarray:
        """obs {key: (n, ...)} -> actions (n, 14)."""
        cube, grips = obs["cube"].astype(float), obs["agent_pos"][:, [6, 13]]
        near = np.stack([np.linalg.norm(obs[f"cube_from_{arm}"], axis=1) for arm in ARMS])
        around, (has, had) = near < 0.008, (near < 0.025) & (grips.T < 0.63)  # a gripper around the cube closes no further than .61
        ready = had & (np.linalg.norm(cube - MEET, axis=1) < 0.015)
        (beside, slow), (above, careful) = self._approach(obs, 0, 0.1), self._approach(obs, 1, 0.08)
        middle, wait, leave = (np.broadcast_to(place, cube.shape) for place in (MEET, MEET - 0.1 * self.ahead[0], MEET - 0.12 * self.ahead[1]))
        left = [  # (when, where to, gripper, pace), the first that applies
            (has, middle, 0, 1.0),
            (around[0], cube, 0, 1.0),
            (ready, beside, 1, slow),
            (~has, wait, 1, 1.0),
        ]
        right = [
            (has & (grips[:, 1] > 0.75), leave, 1, 1.0),
            (has, middle, 1, 1.0),
            (had, middle, 0, 1.0),
            (around[1], cube, 0, 1.0),
            (~has, above, 1, careful),
        ]
        return np.concatenate([part for arm, phases in enumerate((left, right)) for part in self._move(arm, obs, phases)], axis=1)

    def _approach(self, obs: Obs, arm: int, distance: float) -> tuple[np.ndarray, np.ndarray]:
        """The next place (n, 3) on the straight way to the cube, at first `distance` before it until the hand is aligned; the pace (n,)."""
        way, ahead = obs[f"cube_from_{ARMS[arm]}"].astype(float), self.ahead[arm]
        along = way @ ahead
        aligned = np.linalg.norm(way - along[:, None] * ahead, axis=1) < 0.01
        left = np.where(aligned, np.maximum(along - 0.02, 0), distance)
        return obs["cube"] - left[:, None] * ahead, np.where(aligned, 0.5, 1.0)

    def _move(self, arm: int, obs: Obs, phases: list[tuple]) -> list[np.ndarray]:
        """Joints (n, 6) and gripper (n, 1) told next."""
        when, told = [phase[0] for phase in phases], self.told[arm]
        place = np.select([each[:, None] for each in when], [phase[1] for phase in phases])
        grip, pace = (np.select(when, [np.broadcast_to(phase[i], len(place)) for phase in phases]) for i in (2, 3))
        turned = np.broadcast_to(self.turned[arm], (len(place), 3, 3))
        step = self.task.chains[arm].solve(told, place - PINCH * self.ahead[arm], turned, steps=4) - told
        step *= np.minimum(1.0, pace * self.speed / np.maximum(np.abs(step).max(axis=1), 1e-9))[:, None]
        joints = obs["agent_pos"][:, 7 * arm : 7 * arm + 6]
        self.told[arm] = np.clip(told + step, joints - 0.2, joints + 0.2)
        return [self.told[arm].copy(), grip[:, None]]


class Hull:
    """The convex hull that MuJoCo collides for a mesh, in the frame of the geom's body: vertices (v, 3), directions of its edges and normals."""

    def __init__(self, model: mujoco.MjModel, geom: str) -> None:
        i = model.geom(geom).id
        mesh = int(model.geom_dataid[i])
        graph = model.mesh_graph[model.mesh_graphadr[mesh] :]
        v, f = graph[:2]
        points = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        points = points @ matrix(model.geom_quat[i]).T + model.geom_pos[i]
        corners = graph[2 + 3 * v + 3 * f :][: 3 * f].reshape(f, 3)  # of the triangles its faces are cut into
        sides = np.sort(np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]]), axis=1)
        a, b, c = (points[corner] for corner in corners.T)
        self.vertices = points[graph[2 + v : 2 + 2 * v]]
        self.normals = _directions(np.cross(b - a, c - a))
        self.edges = _directions(points[sides[:, 1]] - points[sides[:, 0]])

    def gap(self, centre: Array, axes: Array) -> Array:
        """The widest gap (...) m between the hull and the cube at centre (..., 3) with axes (..., 3, 3); negative when they overlap.

        Two convex bodies are apart exactly when they are along a face's normal or across an edge of each.
        """
        xp, normals, edges, vertices = namespace(centre), *(like(each, centre) for each in (self.normals, self.edges, self.vertices))
        columns = xp.matrix_transpose(axes)
        across = xp.linalg.cross(edges[:, None, :], columns[..., None, :, :])
        across = xp.reshape(across, (*columns.shape[:-2], -1, 3))
        length = xp.linalg.vector_norm(across, axis=-1, keepdims=True)
        across = xp.where(length > 1e-3, across / clip(length, low=1e-3), normals[0])  # parallel edges have no direction across both
        directions = xp.concat([xp.broadcast_to(normals, (*columns.shape[:-2], *normals.shape)), columns, across], axis=-2)
        spans = directions @ vertices.T - (directions @ centre[..., None])
        apart = xp.maximum(xp.min(spans, axis=-1), -xp.max(spans, axis=-1)) - CUBE * xp.sum(xp.abs(directions @ axes), axis=-1)
        return xp.max(apart, axis=-1)


def _directions(vectors: np.ndarray) -> np.ndarray:
    """The different directions among vectors (n, 3), opposite ones taken as one."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    unit *= np.sign(np.take_along_axis(unit, np.abs(unit).argmax(axis=1)[:, None], axis=1))
    _, first = np.unique(unit.round(4), axis=0, return_index=True)
    return unit[first]


def pinch(hand: tuple[Array, Array]) -> Array:
    """Where a hand holds things, (..., 3) m: between its fingers, near their tips."""
    at, turned = hand
    return at + PINCH * turned[..., 0]


def _mjcf() -> str:
    package = find_spec("gym_aloha")
    if package is None or not package.submodule_search_locations:
        raise ImportError("aloha_transfer needs gym-aloha's XML and meshes: pip install 'dipole[aloha]'")
    assets = Path(package.submodule_search_locations[0]) / "assets"
    return f"""
<mujoco model="aloha_transfer">
  <compiler meshdir={quoteattr(str(assets))}/>
  <include file={quoteattr(str(assets / "bimanual_viperx_transfer_cube.xml"))}/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <quality shadowsize="0" offsamples="0"/>
  </visual>
  <asset><texture type="skybox" builtin="flat" rgb1=".86 .89 .93" width="8" height="8"/></asset>
  <worldbody><camera name="front" pos="0 -.3 .75" xyaxes="1 0 0 0 .55 .84" fovy="58"/></worldbody>
</mujoco>"""

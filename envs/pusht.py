"""Push-T: push a T-shaped block onto a drawn T with a round finger. A MuJoCo twin of the pymunk original.

The original is quasi-static: its damping of 0 wipes the block's velocity before every 10 ms impulse solve, its shapes have no
friction, and its finger is kinematic, a PD recursion that no contact disturbs. Plain MJCF can say the same: joint damping
mass/dt applied explicitly, frictionless contacts with Chipmunk's bias as a direct solref, a finger 1000 times the block's mass.
Replaying the human demonstrations puts the block's corners within 0.2 px of the recording after 8 steps.

Lengths outside the model are pixels of the original's 512 x 512 window, y down; inside, 1 px is 1 mm and y points up, so that
a camera above sees what the original draws. A pose is (x, y, angle) of the block's origin: the middle of the bar's outer edge.
"""

from __future__ import annotations

from typing import Literal

import gymnasium
import numpy as np
from array_api_compat import device, to_device

from envs import render
from envs.arrays import Array, clip, like, namespace
from envs.overlap import overlap
from envs.task import Obs, Outcome, State, Task, box

METRES = 1e-3  # per pixel
GOAL = np.array([256.0, 256.0, np.pi / 4])  # px, px, rad
BARS = np.array([[-60.0, 0.0, 60.0, 30.0], [-15.0, 30.0, 15.0, 120.0]])  # px in the block frame: x and y from, x and y to
GOAL_AREA = 6300.0  # px^2, both bars
FINGER = 15.0  # px, radius
WALLS = (7.0, 504.0)  # px, their inner faces in x and in y
CENTRE_OF_MASS = 45.0  # px down the stem
# px^2 per unit of mass. The original computes both bars' moments from the bar's vertices: odd, but 2160 ruins every replay.
INERTIA = 3000.0
TIMESTEP = 0.01  # s
SIZE = 96  # px, side of an observed picture
WINDOW = 0.2555  # m, the middle of the window as drawn: the original names its pixels by their corners

# px in the block frame: the nine points the human demonstrations store as `keypoint` (on the T, not its corners).
KEYPOINTS = np.array(
    [
        [9.2698, 90.0410], [-60.9835, -1.1867], [60.9128, -1.3934], [-0.2705, 25.5436], [-14.0649, 122.8159],
        [39.0027, 32.8574], [-39.9664, 32.7297], [-16.8243, 62.8632], [23.5415, -1.7003],
    ]
)  # fmt: skip


class PushT(Task):
    """obs "keypoint": `keypoint` (9, 2) and `agent_pos` (2,); "image": `image` (96, 96, 3) uint8 and `agent_pos`; "state": `state` (5,),
    agent xy, block xy, angle in [0, 2 pi); "full": `state` and `velocity` (2,) of the finger, enough to simulate from.

    Reward is coverage/success_coverage, at most 1, as in the original; success is coverage above success_coverage.
    Seeds 0..205 are the first states of the 206 human demonstrations: evaluate on others (the paper: from 100000).
    """

    name, fps, substeps, camera = "pusht", 10.0, 10, "top"
    action_semantics = "absolute target position of the finger, px, clipped to the window"

    def __init__(
        self, *, obs: Literal["keypoint", "image", "state", "full"] = "keypoint", success_coverage: float = 0.95, max_steps: int = 300
    ) -> None:
        self.obs, self.success_coverage, self.max_steps = obs, success_coverage, max_steps
        self.action_space = box(0, 512, (2,))
        # A block may start with its stem outside the walls, and is then pushed in.
        if obs == "keypoint":
            spaces: dict[str, gymnasium.Space] = {"keypoint": box(-128, 640, (9, 2)), "agent_pos": box(0, 512, (2,))}
            self.units = {"keypoint": "px", "agent_pos": "px", "action": "px"}
        elif obs == "image":
            spaces = {"image": gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8), "agent_pos": box(0, 512, (2,))}
            self.units = {"image": "RGB, 0 to 255", "agent_pos": "px", "action": "px"}
        elif obs in ("state", "full"):
            spaces = {"state": box([0, 0, -128, -128, 0], [512, 512, 640, 640, 2 * np.pi], (5,))}
            self.units = {"state": "px, px, px, px, rad", "action": "px"}
            if obs == "full":
                spaces["velocity"], self.units["velocity"] = box(-5120, 5120, (2,)), "px/s"
        else:
            raise ValueError(f"obs {obs!r} is unknown: use 'keypoint', 'image', 'state' or 'full'")
        self.observation_space = gymnasium.spaces.Dict(spaces)

    def reset(self, seed: int) -> State:
        """The original's legacy reset, which sets the block's position before its angle and so turns it about its centre of mass."""
        rng = np.random.RandomState(seed)
        agent, block = rng.randint(50, 450, size=2), rng.randint(100, 400, size=2)
        angle = rng.randn() * 2 * np.pi - np.pi
        origin = block + [0.0, CENTRE_OF_MASS] - _stem(np.asarray(angle))
        return self.state(np.array([*agent, *origin, angle]))

    def state(self, vector: np.ndarray, *, velocity: np.ndarray | float = 0.0) -> State:
        """The state of vector (..., 5) = agent xy, block xy [px], angle [rad], the finger moving at velocity (..., 2) px/s."""
        vector = np.asarray(vector, np.float64)
        qpos = np.concatenate([_flip(vector[..., :2]), _flip(vector[..., 2:4] + _stem(vector[..., 4])), -vector[..., 4:]], axis=-1)
        qvel = np.zeros_like(qpos)
        qvel[..., :2] = _flip(np.asarray(velocity) * np.ones(2))
        return State(qpos, qvel, np.empty((*qpos.shape[:-1], 0, 3)))

    def vector(self, state: State) -> Array:
        """The inverse of `state`: (..., 5) px and rad, the angle not wrapped."""
        angle = -state.qpos[..., 4:]
        origin = _unflip(state.qpos[..., 2:4]) - _stem(angle[..., 0])
        return namespace(angle).concat([_unflip(state.qpos[..., :2]), origin, angle], axis=-1)

    def control(self, action: Array) -> Array:
        return _flip(clip(action, self.action_space.low, self.action_space.high))

    def observe(self, state: State) -> Obs:
        vector = self.vector(state)
        xp = namespace(vector)
        if self.obs in ("state", "full"):
            obs = {"state": xp.astype(xp.concat([vector[..., :4], vector[..., 4:] % (2 * np.pi)], axis=-1), xp.float32)}
            return obs if self.obs == "state" else {**obs, "velocity": xp.astype(_unflip(state.qvel[..., :2]), xp.float32)}
        agent = xp.astype(vector[..., :2], xp.float32)
        if self.obs == "image":
            return {"image": self._pictures(state), "agent_pos": agent}
        return {"keypoint": xp.astype(to_world(KEYPOINTS, vector[..., 2:]), xp.float32), "agent_pos": agent}

    def _pictures(self, state: State) -> Array:
        """What the original draws of states (...), (..., 96, 96, 3) uint8 RGB: no mark for the action."""
        leading = state.qpos.shape[:-1]
        qpos = np.asarray(to_device(state.qpos, "cpu"), np.float64).reshape(-1, self.model.nq)
        # No smooth edges: the original shrinks a window five times as large by picking pixels.
        drawn = render.frames(self.model, qpos, np.empty((len(qpos), 0, 3)), camera=self.camera, size=SIZE, samples=0)
        return namespace(state.qpos).asarray(drawn.reshape(*leading, SIZE, SIZE, 3), device=device(state.qpos))

    def outcome(self, state: State) -> Outcome:
        covered = coverage(self.vector(state)[..., 2:])
        reward = clip(covered / self.success_coverage, 0.0, 1.0)
        return Outcome(reward, covered > self.success_coverage, {"coverage": covered})

    def mjcf(self) -> str:
        return _mjcf()


def to_world(points: np.ndarray, pose: Array) -> Array:
    """Points (k, 2) of the block frame at poses (..., 3), as (..., k, 2) px."""
    xp, points = namespace(pose), like(points, pose)
    cos, sin = xp.cos(pose[..., 2, None]), xp.sin(pose[..., 2, None])
    x = cos * points[:, 0] - sin * points[:, 1] + pose[..., 0, None]
    y = sin * points[:, 0] + cos * points[:, 1] + pose[..., 1, None]
    return xp.stack([x, y], axis=-1)


def coverage(pose: Array) -> Array:
    """The share (...) of the goal T that the block at pose (..., 3) covers: exact, 0 where they are apart; float64 whatever comes in."""
    xp = namespace(pose)
    pose = xp.astype(pose, xp.float64)
    goal, centre, radii = like(_GOAL_BARS, pose), like(GOAL[:2], pose), like(_RADII, pose)
    block = xp.reshape(to_world(_CORNERS, pose), (*pose.shape[:-1], 2, 4, 2))
    apart = xp.mean(block, axis=-2)[..., :, None, :] - xp.mean(goal, axis=-2)  # (..., 2, 2, 2) between bar centres
    near = xp.linalg.vector_norm(apart, axis=-1) < radii[:, None] + radii  # elsewhere the bars' circumscribed circles are apart
    *where, i, j = xp.nonzero(near)
    shared = xp.zeros_like(apart[..., 0])
    if i.shape[0]:
        shared[near] = overlap(block[(*where, i)] - centre, goal[j] - centre)
    return xp.sum(shared, axis=(-2, -1)) / GOAL_AREA


_CORNERS = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in BARS]).reshape(8, 2)
_GOAL_BARS = to_world(_CORNERS, GOAL).reshape(2, 4, 2)
_RADII = np.hypot(BARS[:, 2] - BARS[:, 0], BARS[:, 3] - BARS[:, 1]) / 2


def _flip(px: Array) -> Array:
    """px, y down -> m, y up."""
    return px * like([METRES, -METRES], px)


def _unflip(metres: Array) -> Array:
    return metres / like([METRES, -METRES], metres)


def _stem(angle: Array) -> Array:
    """From the block's origin to its centre of mass, (..., 2) px."""
    xp = namespace(angle)
    return CENTRE_OF_MASS * xp.stack([-xp.sin(angle), xp.cos(angle)], axis=-1)


def _colour(red: int, green: int, blue: int) -> str:
    return f"{red / 255:.4f} {green / 255:.4f} {blue / 255:.4f} 1"


def _sheet(margin: int, z: float, grey: int) -> str:
    """A square that leaves a margin of so many observed pixels around it."""
    half = 0.256 - margin * 0.512 / SIZE
    return f'<geom class="drawn" type="box" pos="{WINDOW} {-WINDOW} {z}" size="{half} {half} .0002" rgba="{_colour(grey, grey, grey)}"/>'


def _bars(name: str, *, half_height: float, z: float, origin: float, rim: float = 0.0) -> str:
    """Both bars, each so many px larger on every side."""
    return "".join(
        f'<geom class="{name}" type="box" size="{METRES * ((x1 - x0) / 2 + rim)} {METRES * ((y1 - y0) / 2 + rim)} {half_height}" '
        f'pos="{METRES * (x0 + x1) / 2} {METRES * (origin - (y0 + y1) / 2)} {z}"/>'
        for x0, y0, x1, y1 in BARS
    )


def _mjcf() -> str:
    # Contacts: a direct solref (-stiffness, -damping) that MuJoCo scales by the impedance, here constant.
    impedance, bias = 0.99, 1 - 0.9 ** (60 * TIMESTEP)  # Chipmunk's collision bias per step
    solref = f"{-impedance * bias / TIMESTEP**2} {-impedance / TIMESTEP}"
    finger_mass, stiffness, damping = 1000.0, 100.0, 20.0  # the original's PD gains, per unit of mass
    wipe = 1 / TIMESTEP  # damping that takes all of a unit mass's velocity within one step
    inertia = INERTIA * METRES**2
    low, high = (METRES * wall for wall in WALLS)
    # The block's collision boxes are tall, so that the face nearest to the finger is never their top.
    return f"""
<mujoco model="pusht">
  <compiler angle="radian" autolimits="true"/>
  <option timestep="{TIMESTEP}" gravity="0 0 0" integrator="Euler" iterations="10" ls_iterations="20" tolerance="1e-10">
    <flag eulerdamp="disable"/>
  </option>
  <size memory="256K"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <headlight ambient=".6 .6 .6" diffuse=".4 .4 .4" specular="0 0 0"/>
    <map znear=".05"/>
    <quality shadowsize="0"/>
  </visual>
  <default>
    <geom condim="1" solref="{solref}" solimp="{impedance} {impedance} .001 .5 1" friction="0 0 0"/>
    <default class="drawn"><geom contype="0" conaffinity="0" rgba="{_colour(119, 136, 153)}"/></default>
    <default class="fill"><geom contype="0" conaffinity="0" rgba="{_colour(143, 163, 184)}"/></default>
    <default class="goal"><geom contype="0" conaffinity="0" rgba="{_colour(144, 238, 144)}"/></default>
    <default class="block"><geom contype="1" conaffinity="2" group="3" rgba="0 0 0 0"/></default>
    <default class="wall"><geom type="plane" size="1 1 .1" contype="2" conaffinity="0" group="3" rgba="0 0 0 0"/></default>
    <default class="finger"><general biastype="affine" gainprm="{stiffness * finger_mass}"
      biasprm="0 {-stiffness * finger_mass} {-damping * finger_mass}"/></default>
  </default>
  <worldbody>
    <camera name="top" pos="{WINDOW} {-WINDOW} 1" projection="orthographic" fovy=".512"/>
    <geom class="drawn" type="plane" pos=".256 -.256 -.012" size=".4 .4 .1" rgba="{_colour(248, 248, 248)}"/>
    {_sheet(1, -0.0115, 233)}
    {_sheet(2, -0.0112, 255)}
    <geom class="wall" pos="{low} 0 0" zaxis="1 0 0"/>
    <geom class="wall" pos="{high} 0 0" zaxis="-1 0 0"/>
    <geom class="wall" pos="0 {-low} 0" zaxis="0 -1 0"/>
    <geom class="wall" pos="0 {-high} 0" zaxis="0 1 0"/>
    <body name="goal" pos="{METRES * GOAL[0]} {-METRES * GOAL[1]} 0" euler="0 0 {-GOAL[2]}">
      {_bars("goal", half_height=0.0005, z=-0.0105, origin=0.0, rim=0.5)}
    </body>
    <body name="agent">
      <inertial pos="0 0 0" mass="{finger_mass}" diaginertia="1 1 1"/>
      <joint name="agent_x" type="slide" axis="1 0 0"/>
      <joint name="agent_y" type="slide" axis="0 1 0"/>
      <geom type="sphere" size="{METRES * FINGER}" contype="2" conaffinity="0" group="3" rgba="0 0 0 0"/>
      <geom class="drawn" type="cylinder" size="{METRES * FINGER} .012" rgba="{_colour(65, 105, 225)}"/>
      <geom class="drawn" type="cylinder" size="{METRES * (FINGER - 4)} .0121" rgba="{_colour(78, 126, 255)}"/>
    </body>
    <body name="block">
      <inertial pos="0 0 0" mass="1" diaginertia="{inertia} {inertia} {inertia}"/>
      <joint name="block_x" type="slide" axis="1 0 0" damping="{wipe}"/>
      <joint name="block_y" type="slide" axis="0 1 0" damping="{wipe}"/>
      <joint name="block_angle" type="hinge" axis="0 0 1" damping="{wipe * inertia}"/>
      {_bars("block", half_height=0.2, z=0.0, origin=CENTRE_OF_MASS)}
      {_bars("drawn", half_height=0.009, z=0.0, origin=CENTRE_OF_MASS, rim=2.0)}
      {_bars("fill", half_height=0.009, z=0.0005, origin=CENTRE_OF_MASS, rim=-2.0)}
    </body>
  </worldbody>
  <actuator>
    <general class="finger" joint="agent_x"/>
    <general class="finger" joint="agent_y"/>
  </actuator>
</mujoco>"""

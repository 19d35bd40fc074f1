"""Gantry: pick up a cube with a three-axis gantry and a parallel gripper, put it down on a disc and let go. Scripted expert included.

With pillar=True a pillar stands between cube and disc, taller than the gantry reaches. The expert passes it left or right at
random, so its demonstrations have two modes and their mean runs into the pillar. With belt=0.2 the disc rides past on a belt,
at 0.2 m/s: the world does not wait for a plan, and one that acts late misses.
"""

from __future__ import annotations

import gymnasium
import numpy as np

from envs.arrays import Array, clip, namespace
from envs.task import Obs, Outcome, State, Task, box

REACH = 0.22  # m, of the hand in x and y
PLACE = 0.17  # m, cube and disc lie within +- this
OPEN = 0.045  # m, each finger's way out
CUBE = 0.02  # m, half the edge: also the height the cube is gripped and rests at
PILLAR = 0.03  # m, radius
DETOUR = 0.15  # m, from the pillar's middle to where the expert passes it
ARRIVAL = (2.2, 2.9)  # s until a disc on a belt passes the middle: out of reach until the cube is up
LEAD = 0.16  # s, so far ahead the expert aims on a belt: the step that an action lasts, of which the servos make 63 %


class Gantry(Task):
    """Reward is 1 on success: the cube within 2 cm of the disc's middle, on the table, the gripper open. Success ends an episode."""

    name, fps, substeps, camera = "gantry", 10.0, 20, "front"
    action_semantics = "absolute target of the hand x, y, z and of each finger's opening, m, clipped to the gantry's reach"
    expert_noise = (0.004, 0.004, 0.004, 0.0)

    def __init__(self, *, pillar: bool = False, belt: float = 0.0, max_steps: int = 100) -> None:
        if not isinstance(belt, int | float | np.integer | np.floating) or (belt and not 0.1 <= belt <= 0.3):
            raise ValueError(f"belt={belt} m/s must be 0 (none) or 0.1 to 0.3: a slower disc is there before the cube is up, a faster one cannot be followed")
        if pillar and belt:
            raise ValueError("a gantry has a pillar or a belt, not both: the pillar stands where the belt runs")
        self.pillar, self.belt, self.max_steps = pillar, belt, max_steps
        self.action_space = box([-REACH, -REACH, 0.01, 0.0], [REACH, REACH, 0.3, OPEN], (4,))
        shapes = {"hand": 3, "cube": 3, "cube_from_hand": 3, "opening": 1, "goal": 2, "goal_from_cube": 2}
        if pillar:
            shapes["pillar"] = 2
        if belt:
            shapes["goal_velocity"] = 2
        # A dropped cube can slide off the table, never a metre away; a disc on a belt goes as far as an episode lasts.
        far = max(1.0, belt * max(ARRIVAL[1], max_steps / self.fps))
        self.observation_space = gymnasium.spaces.Dict({key: box(-far, far, (size,)) for key, size in shapes.items()})
        self.units = {**dict.fromkeys(shapes, "m"), "action": "m", **({"goal_velocity": "m/s"} if belt else {})}

    def reset(self, seed: int) -> State:
        rng = np.random.default_rng(seed)
        cube, goal, hand, pillar = self._layout(rng)
        height, yaw = rng.uniform(0.1, 0.2), rng.uniform(-0.3, 0.3)
        cube_quat = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        mocap = [[*goal, 0.001], [*pillar, 0.0]]
        qpos, qvel = [*hand, height, 0.04, 0.04, *cube, CUBE, *cube_quat], np.zeros(self.model.nv)
        if self.belt:
            side = rng.choice([-1.0, 1.0])
            qpos += [side * self.belt * rng.uniform(*ARRIVAL), goal[1]]
            qvel[-2] = -side * self.belt
        return State(np.array(qpos), qvel, np.array(mocap[: self.model.nmocap]).reshape(-1, 3))

    def _layout(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """xy of cube, disc, hand and pillar, drawn until there is room for gripper and detours."""
        while True:
            cube, goal, hand = rng.uniform(-PLACE, PLACE, (3, 2))
            way, pillar = goal - cube, (cube + goal) / 2
            length = np.linalg.norm(way)
            if not self.pillar:
                if (abs(way[1]) if self.belt else length) > 0.08:
                    return cube, goal, hand, pillar
            elif length > 0.28:
                side = DETOUR * np.array([-way[1], way[0]]) / length
                if np.abs([pillar + side, pillar - side]).max() < REACH - 0.01 and _clearance(hand, cube, pillar) > 0.11:
                    return cube, goal, hand, pillar

    def control(self, action: Array) -> Array:
        return clip(action, self.action_space.low, self.action_space.high)[..., [0, 1, 2, 3, 3]]

    def observe(self, state: State) -> Obs:
        xp = namespace(state.qpos)
        hand, cube, goal = state.qpos[..., :3], state.qpos[..., 5:8], self._goal(state)
        obs = {
            "hand": hand,
            "cube": cube,
            "cube_from_hand": cube - hand,
            "opening": state.qpos[..., 3:4] + state.qpos[..., 4:5],
            "goal": goal,
            "goal_from_cube": goal - cube[..., :2],
        }
        if self.pillar:
            obs["pillar"] = state.mocap_pos[..., 1, :2]
        if self.belt:
            obs["goal_velocity"] = state.qvel[..., -2:]
        return {key: xp.astype(value, xp.float32) for key, value in obs.items()}

    def outcome(self, state: State) -> Outcome:
        xp = namespace(state.qpos)
        cube, opening = state.qpos[..., 5:8], state.qpos[..., 3] + state.qpos[..., 4]
        distance = xp.linalg.vector_norm(cube[..., :2] - self._goal(state), axis=-1)
        success = (distance < 0.02) & (cube[..., 2] < 0.03) & (opening > 0.05)
        return Outcome(xp.astype(success, xp.float64), success, {"distance": distance})

    def _goal(self, state: State) -> Array:
        return state.qpos[..., -2:] if self.belt else state.mocap_pos[..., 0, :2]

    def expert(self, n: int, seed: int) -> GantryExpert:
        return GantryExpert(self, n, seed)

    def mjcf(self) -> str:
        return _mjcf(self.pillar, self.belt > 0)


class GantryExpert:
    """Reach over the cube, descend, grip, lift, carry, lower, let go: the phase is read off the observation.

    Its own state is what differs between demonstrators: each env's speed and the side it passes the pillar on, fixed for an episode.
    """

    def __init__(self, task: Gantry, n: int, seed: int) -> None:
        self.task, self._rng = task, np.random.default_rng(seed)
        self.speed, self.side = np.empty(n), np.empty(n)  # m per step; +1 left, -1 right, seen along the way to the disc
        self.reset(np.ones(n, bool))

    def reset(self, done: np.ndarray) -> None:
        """Draw speed and side anew for the envs (n,) that start an episode."""
        self.speed[done] = self._rng.uniform(0.045, 0.07, done.sum())
        self.side[done] = self._rng.choice([-1.0, 1.0], done.sum())

    def act(self, obs: Obs) -> np.ndarray:
        """obs {key: (n, ...)} -> actions (n, 4)."""
        hand, cube, goal, opening = obs["hand"], obs["cube"], obs["goal"], obs["opening"][:, 0]
        level, deep = np.linalg.norm(obs["cube_from_hand"][:, :2], axis=1), np.abs(obs["cube_from_hand"][:, 2])
        above, left = level < 0.012, np.linalg.norm(obs["goal_from_cube"], axis=1)
        around = above & (deep < 0.014)
        held, there = around & (opening < 0.052), left < 0.012

        def over(place: np.ndarray, height: np.ndarray | float) -> np.ndarray:
            return np.column_stack([place, np.broadcast_to(height, len(hand))])

        along = LEAD * obs["goal_velocity"] if self.task.belt else 0.0  # so much further the disc is when the hand gets there
        phases = [  # (when, where to, fingers), the first that applies
            (there & (cube[:, 2] < 0.028), over(hand[:, :2] + along, hand[:, 2] + 0.06 * (opening > 0.06)), OPEN),  # let go, leave
            (held & there, over(self._via(obs) if self.task.belt else goal, CUBE), 0.0),  # lower
            (held & ((left < 0.05) | (hand[:, 2] > 0.075)), over(self._via(obs), 0.09), 0.0),  # carry
            (held, over(hand[:, :2], 0.1), 0.0),  # lift
            (around, over(cube[:, :2], CUBE), 0.0),  # grip
            (above, over(cube[:, :2], CUBE), OPEN),  # descend
        ]
        reach = over(cube[:, :2], np.clip(hand[:, 2], 0.09, 0.12))
        target = np.select([when[:, None] for when, _, _ in phases], [where for _, where, _ in phases], reach)
        fingers = np.select([when for when, _, _ in phases], [np.full(len(hand), width) for _, _, width in phases], OPEN)
        if self.task.belt:  # the disc comes from beyond the reach and goes there
            target[:, :2] = target[:, :2].clip(0.02 - REACH, REACH - 0.02)
        step = target - hand
        step *= np.minimum(1.0, self.speed / np.maximum(np.linalg.norm(step, axis=1), 1e-9))[:, None]
        return np.column_stack([hand + step, fingers])

    def _via(self, obs: Obs) -> np.ndarray:
        """Where to carry the cube (n, 2): beside the pillar until past it, then to the disc."""
        if self.task.belt:
            return obs["hand"][:, :2] + obs["goal_from_cube"] + LEAD * obs["goal_velocity"]
        if not self.task.pillar:
            return obs["goal"]
        ahead = obs["goal"] - obs["pillar"]
        ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
        beside = obs["pillar"] + (self.side * DETOUR * np.stack([-ahead[:, 1], ahead[:, 0]])).T
        past = ((obs["hand"][:, :2] - obs["pillar"]) * ahead).sum(1) > -0.02
        return np.where(past[:, None], obs["goal"], beside)


def _clearance(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> float:
    """Distance between a point and the segment from start to end."""
    along = end - start
    s = np.clip((point - start) @ along / max(along @ along, 1e-12), 0, 1)
    return float(np.linalg.norm(start + s * along - point))


def _mjcf(pillar: bool, belt: bool) -> str:
    # multiccd: whether a pillar touches in one place or in five of equal depth differs between versions of MuJoCo, and mujoco_warp knows one.
    # Contact bits: 1 world, 2 fingers, 4 the hand above them, which only the pillar can touch.
    obstacle = f"""
    <body name="pillar" mocap="true">
      <geom type="cylinder" size="{PILLAR} .25" pos="0 0 .25" conaffinity="5" friction="1 .01 .001" rgba=".55 .5 .75 .7"/>
    </body>"""
    still = """
    <body name="goal" mocap="true">
      <geom type="cylinder" size=".03 .001" contype="0" conaffinity="0" rgba=".3 .8 .4 1"/>
    </body>"""
    # The disc on a belt carries the cube: a plate (contact bit 8, which only the cube meets), too heavy to be slowed by it, clear of the table.
    moving = """
    <body name="goal" gravcomp="1">
      <joint name="along" type="slide" axis="1 0 0"/>
      <joint name="across" type="slide" axis="0 1 0"/>
      <geom type="box" size=".03 .03 .0015" pos="0 0 .0015" mass="100" contype="8" conaffinity="8" friction="1 .01 .001" rgba="0 0 0 0"/>
      <geom type="cylinder" size=".03 .0015" pos="0 0 .0015" mass="0" contype="0" conaffinity="0" rgba=".3 .8 .4 1"/>
      <geom type="box" size="2 .035 .0002" mass="0" contype="0" conaffinity="0" rgba=".5 .52 .56 1"/>
    </body>"""
    bits = 11 if belt else 3
    axis = '<inertial pos="0 0 0" mass=".5" diaginertia=".01 .01 .01"/>'
    finger = f'type="slide" range="0 {OPEN}" damping="5"'
    pad = 'class="finger" type="box" size=".005 .015 .035"'
    return f"""
<mujoco model="gantry">
  <compiler angle="radian" autolimits="true"/>
  <option timestep=".005" integrator="implicitfast" cone="elliptic" impratio="10" iterations="20">
    <flag multiccd="disable"/>
  </option>
  <size memory="1M"/>
  <statistic extent=".6" center="0 0 .1"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <headlight ambient=".45 .45 .45" diffuse=".2 .2 .2" specular="0 0 0"/>
    <quality shadowsize="1024"/>
  </visual>
  <asset><texture type="skybox" builtin="flat" rgb1=".86 .89 .93" width="8" height="8"/></asset>
  <default>
    <position kp="400" kv="40"/>
    <geom rgba=".6 .62 .66 1"/>
    <default class="finger"><geom mass=".1" friction="2 .05 .001" condim="4" contype="2" conaffinity="3"/></default>
  </default>
  <worldbody>
    <camera name="front" pos="0 -.62 .6" xyaxes="1 0 0 0 .72 .69"/>
    <light pos="0 0 1.5" dir="0 0 -1" directional="true" diffuse=".35 .35 .35" specular="0 0 0"/>
    <geom name="floor" type="plane" pos="0 0 -.04" size="1 1 .1" rgba=".7 .73 .78 1"/>
    <geom name="table" type="box" size=".26 .26 .02" pos="0 0 -.02" friction="1 .01 .001" rgba=".93 .92 .88 1"/>
    {"" if belt else still}{obstacle if pillar else ""}
    <body name="bridge">{axis}
      <joint name="x" type="slide" axis="1 0 0" range="{-REACH} {REACH}" damping="2"/>
      <body name="trolley">{axis}
        <joint name="y" type="slide" axis="0 1 0" range="{-REACH} {REACH}" damping="2"/>
        <body name="hand">{axis}
          <joint name="z" type="slide" axis="0 0 1" range=".01 .3" damping="2"/>
          <geom type="box" size=".006 .006 .2" pos="0 0 .285" contype="0" conaffinity="0"/>
          <geom type="box" size=".05 .02 .012" pos="0 0 .075" contype="4" conaffinity="0" rgba=".25 .41 .88 1"/>
          <body name="left"><joint name="left" axis="-1 0 0" {finger}/><geom {pad} pos="-.005 0 .03"/></body>
          <body name="right"><joint name="right" axis="1 0 0" {finger}/><geom {pad} pos=".005 0 .03"/></body>
        </body>
      </body>
    </body>
    <body name="cube">
      <freejoint/>
      <geom type="box" size="{CUBE} {CUBE} {CUBE}" mass=".05" condim="4" friction="1 .01 .001" contype="{bits}" conaffinity="{bits}"
        rgba=".9 .3 .25 1"/>
    </body>{moving if belt else ""}
  </worldbody>
  <actuator>
    <position joint="x"/>
    <position joint="y"/>
    <position joint="z" kp="800"/>
    <position joint="left" kp="150" kv="10"/>
    <position joint="right" kp="150" kv="10"/>
  </actuator>
</mujoco>"""

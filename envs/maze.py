"""Maze: push a point mass with forces through a maze of one-metre cells to a goal, in at most the time D4RL's Maze2D allows.

From D4RL (Fu et al. 2020, d4rl/pointmaze) and gymnasium-robotics' PointMaze, which share them: the three layouts, a ball of radius
0.1 m and 1000 kg/m^3 (4.19 kg) on two slide joints with damping 1 N s/m, motors of gear 100, so 100 N and 24 m/s^2 per axis at most,
and frictionless walls. From D4RL alone: starts within 0.1 m of a cell's middle at about 0.1 m/s, success within 0.5 m of the goal
(PointMaze: 0.25 and 0.45 m).

Different on purpose. Actions come at 20 Hz, not 100, so that a chunk of 16 spans 0.8 s, about two cells, instead of a fraction of one;
at 10 Hz a single push would change the velocity by 2.4 m/s, too much to brake before a corner. Physics steps are 5 ms, not 10: the ball
sinks about 4 cm into a wall at full speed, not 6. Quadratic drag limits the speed to 5 m/s per axis, smoothly, where the originals cut the
velocity off. An episode ends at the goal; start and goal are both drawn from the seed (Diffuser's Multi2D), where D4RL's Maze2D has one
goal per layout. x runs along a row of the map and y up the page, the origin is the map's middle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np

from envs.arrays import Array, clip, namespace
from envs.task import Obs, Outcome, State, Task, TaskEnv, box

# D4RL's maze2d-{umaze,medium,large}-v1: '#' is wall, '.' is free.
LAYOUTS = {
    "umaze": ("#####", "#...#", "###.#", "#...#", "#####"),
    "medium": ("########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#..#", "########"),
    "large": (
        "############", "#....#.....#", "#.##.#.#.#.#", "#......#...#", "#.####.###.#",
        "#..#.#.....#", "##.#.#.#.###", "#..#...#...#", "############",
    ),
}  # fmt: skip
SECONDS = {"umaze": 3.0, "medium": 6.0, "large": 8.0}  # D4RL: 300, 600, 800 steps of 10 ms
REFERENCE = {"umaze": (23.85, 161.86), "medium": (13.13, 277.39), "large": (6.7, 273.99)}  # D4RL v1, sparse: random, expert
RADIUS = 0.1  # m, of the ball
JITTER = 0.1  # m, start and goal lie within +- this of a cell's middle
SUCCESS = 0.5  # m, from the goal
FORCE, SPEED = 100.0, 5.0  # N and m/s, the most per axis
STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))  # row, column to the four neighbours of a cell


def normalised_score(total_reward: float | np.ndarray, size: str) -> float | np.ndarray:
    """D4RL's score as papers print it, 0 a random and 100 its reference policy: 100 (r - min)/(max - min), v1 sparse references.

    total_reward counts the 10 ms steps of a whole 3, 6 or 8 s within 0.5 m of the goal. D4RL's episodes go on at the goal; ours end there
    with a total of 1, which this must not be given: let worlds run on (envs.simulator) and sum reward * 100/fps. Its references
    belong to one fixed goal per layout; for drawn goals they are the convention of Diffuser's Multi2D, not a measurement.
    """
    if size not in REFERENCE:
        raise ValueError(f"D4RL has no reference for size {size!r} (it has: {', '.join(REFERENCE)})")
    low, high = REFERENCE[size]
    return 100 * (total_reward - low) / (high - low)


def make(render_mode: str | None = None, pixels: int = 256, **options: Any) -> TaskEnv:
    """The entry point behind gymnasium.make, where `size` is the maze's and not the picture's."""
    return TaskEnv(Maze(**options), render_mode=render_mode, size=pixels)


class Maze(Task):
    """Reward is 1 while the point is within 0.5 m of the goal, which is success and ends an episode.

    size: "umaze", "medium" or "large".   map: rows of '#' and '.' instead of a size, a string with newlines or a list.
    max_steps: default D4RL's time, for an own map 1 s and 0.5 s per cell of its longest way.
    """

    name, fps, substeps, camera = "maze", 20.0, 10, "top"
    action_semantics = "force along x and y in units of 100 N, clipped to [-1, 1], held for a control step"
    expert_noise = (0.3, 0.3)

    def __init__(self, *, size: str = "umaze", map: str | Iterable[str] | None = None, max_steps: int | None = None) -> None:
        if map is None and size not in LAYOUTS:
            raise ValueError(f"size {size!r} is unknown: use {', '.join(LAYOUTS)}, or give your own map=['#####', '#...#', '#####']")
        if isinstance(map, str) and map in LAYOUTS:
            raise ValueError(f"map={map!r} is the name of a layout: write size={map} (env.size={map}); map takes rows of '#' and '.'")
        rows = LAYOUTS[size] if map is None else map.split() if isinstance(map, str) else map
        self.rows = tuple(str(row) for row in rows)
        self.cells = free_cells(self.rows)  # (c, 2) row, column
        self.middles = (self.cells - (np.array([len(self.rows), len(self.rows[0])]) - 1) / 2)[:, ::-1] * [1, -1]  # (c, 2) m
        self.next_cell = next_cells(self.cells), next_cells(self.cells, STEPS[::-1])  # the same lengths, other choices
        seconds = SECONDS[size] if map is None else 1 + 0.5 * _longest(self.next_cell[0])
        self.max_steps = round(seconds * self.fps) if max_steps is None else max_steps
        self.action_space = box(-1, 1, (2,))
        reach = np.abs(self.middles).max(axis=0) + 0.5
        self.observation_space = gymnasium.spaces.Dict({"position": box(-reach, reach, (2,)), "velocity": box(-6, 6, (2,)), "goal": box(-reach, reach, (2,))})
        self.units = {"position": "m", "velocity": "m/s", "goal": "m", "action": "100 N"}

    def reset(self, seed: int) -> State:
        rng = np.random.default_rng(seed)
        start, goal = self.middles[rng.choice(len(self.cells), 2, replace=False)] + rng.uniform(-JITTER, JITTER, (2, 2))
        return State(start, rng.normal(0, 0.1, 2), np.array([[*goal, 0.0]]))

    def control(self, action: Array) -> Array:
        return clip(action, -1, 1)

    def observe(self, state: State) -> Obs:
        xp = namespace(state.qpos)
        obs = {"position": state.qpos, "velocity": state.qvel, "goal": state.mocap_pos[..., 0, :2]}
        return {key: xp.astype(value, xp.float32) for key, value in obs.items()}

    def outcome(self, state: State) -> Outcome:
        xp = namespace(state.qpos)
        distance = xp.linalg.vector_norm(state.qpos - state.mocap_pos[..., 0, :2], axis=-1)
        success = distance <= SUCCESS
        return Outcome(xp.astype(success, xp.float64), success, {"distance": distance})

    def expert(self, n: int, seed: int) -> MazeExpert:
        return MazeExpert(self, n, seed)

    def mjcf(self) -> str:
        return _mjcf(self.rows)


class MazeExpert:
    """Along a shortest way: head for the end of the straight stretch one is in, slow down before it, turn, repeat.

    Its own state is what differs between demonstrators, fixed for an episode: the speed, and the choice between equally short ways.
    """

    def __init__(self, task: Maze, n: int, seed: int) -> None:
        self.task, self._rng = task, np.random.default_rng(seed)
        self._stretch = np.stack([stretch_ends(table, task.cells) for table in task.next_cell])  # (2, c, c)
        self.speed, self.choice = np.empty(n), np.zeros(n, int)  # m/s per axis; 0 or 1
        self.reset(np.ones(n, bool))

    def reset(self, done: np.ndarray) -> None:
        """Draw speed and choice anew for the envs (n,) that start an episode."""
        self.speed[done] = self._rng.uniform(3.0, 4.0, done.sum())
        self.choice[done] = self._rng.integers(2, size=done.sum())

    def act(self, obs: Obs) -> np.ndarray:
        """obs {key: (n, ...)} -> actions (n, 2): PD per axis, so that what is left of the old direction brakes while the new one starts."""
        position, goal = obs["position"].astype(float), obs["goal"].astype(float)
        end, last = self._stretch[self.choice, self._cell(position), self._cell(goal)], self._cell(goal)
        target = np.where((end == last)[:, None], goal, self.task.middles[end])
        velocity = np.clip(5.0 * (target - position), -self.speed[:, None], self.speed[:, None])
        return np.clip(0.6 * (velocity - obs["velocity"]), -1, 1)

    def _cell(self, position: np.ndarray) -> np.ndarray:
        """The free cell (n,) nearest to each position (n, 2)."""
        return np.square(position[:, None] - self.task.middles).sum(-1).argmin(-1)


def free_cells(rows: tuple[str, ...]) -> np.ndarray:
    """Row and column (c, 2) of each '.' of a map, which has to be a rectangle with a closed border and one connected inside."""
    if not rows or len({len(row) for row in rows}) > 1:
        raise ValueError(f"the map's rows have lengths {[len(row) for row in rows]}: make them equally long, a rectangle of '#' and '.'")
    if unknown := sorted(set("".join(rows)) - set("#.")):
        raise ValueError(f"the map has characters {unknown}: write '#' for a wall and '.' for a free cell")
    cells = np.argwhere(np.array([list(row) for row in rows]) == ".")
    if len(cells) < 2:
        raise ValueError(f"the map has {len(cells)} free cells: give it at least two '.', one for the start and one for the goal")
    border = ((cells == 0) | (cells == np.array([len(rows), len(rows[0])]) - 1)).any(axis=1)
    if border.any():
        raise ValueError(f"the map's border is open at row {cells[border][0][0]}, column {cells[border][0][1]}: close it with '#'")
    return cells


def next_cells(cells: np.ndarray, steps: tuple[tuple[int, int], ...] = STEPS) -> np.ndarray:
    """The cell (c, c) that follows [from, goal] on a shortest way, by breadth-first search; the goal follows itself.

    Cells are numbered as in `cells`. Among equally short ways the order of `steps` decides.
    """
    index = {tuple(cell): i for i, cell in enumerate(cells.tolist())}
    around = [[index[r + dr, c + dc] for dr, dc in steps if (r + dr, c + dc) in index] for r, c in index]
    table = np.full((len(cells), len(cells)), -1)
    for goal in range(len(cells)):
        table[goal, goal] = goal
        queue = deque([goal])
        while queue:
            here = queue.popleft()
            for cell in around[here]:
                if table[cell, goal] < 0:
                    table[cell, goal] = here
                    queue.append(cell)
    if (table < 0).any():
        start, goal = (cells[i].tolist() for i in np.argwhere(table < 0)[0])
        raise ValueError(f"the map has parts without a way between them, as from row, column {start} to {goal}: join them")
    return table


def stretch_ends(table: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The last cell (c, c) of the straight stretch that a way begins with, by [from, goal]."""
    goals = np.arange(len(cells))
    ends, direction = table, cells[table] - cells[:, None]
    while True:
        after = table[ends, goals]
        straight = (cells[after] - cells[ends] == direction).all(-1) & (after != ends)
        if not straight.any():
            return ends
        ends = np.where(straight, after, ends)


def _longest(table: np.ndarray) -> int:
    """Cells on the longest of the shortest ways."""
    goals, cells, length = np.arange(len(table)), np.repeat(np.arange(len(table))[:, None], len(table), axis=1), 0
    while (cells != goals).any():
        cells, length = table[cells, goals], length + 1
    return length


def _mjcf(rows: tuple[str, ...]) -> str:
    height, width = len(rows), len(rows[0])
    # MuJoCo's drag on a body in a fluid, per axis: 2 density (0.6 radius^2) v^2 for a solid ball. With the damping's 1 N s/m: FORCE at SPEED.
    density = (FORCE - SPEED) / (1.2 * RADIUS**2 * SPEED**2)
    # One box for each run of walls along a row. Taller than the ball, so that the nearest face is never the top.
    walls = "".join(
        f'<geom class="wall" size="{(end - start) / 2} .5 .2" pos="{(start + end - width) / 2} {(height - 1) / 2 - r} .1"/>\n    '
        for r, row in enumerate(rows)
        for start, end in _runs(row)
    )
    return f"""
<mujoco model="maze">
  <compiler autolimits="true"/>
  <option timestep=".005" gravity="0 0 0" integrator="Euler" iterations="20" density="{density}"/>
  <size memory="1M"/>
  <statistic extent="{max(width, height)}" center="0 0 0"/>
  <visual>
    <global offwidth="1024" offheight="1024"/>
    <headlight ambient=".6 .6 .6" diffuse=".4 .4 .4" specular="0 0 0"/>
    <quality shadowsize="0"/>
  </visual>
  <default>
    <geom condim="1" margin=".002"/>
    <default class="wall"><geom type="box" rgba=".47 .53 .6 1"/></default>
    <default class="drawn"><geom type="cylinder" contype="0" conaffinity="0"/></default>
  </default>
  <worldbody>
    <camera name="top" pos="0 0 5" projection="orthographic" fovy="{max(width, height)}"/>
    <geom class="drawn" type="plane" pos="0 0 -.1" size="{width} {height} .1" rgba=".96 .96 .94 1"/>
    {walls}<body name="goal" mocap="true"><geom class="drawn" size="{SUCCESS} .001" pos="0 0 -.09" rgba=".45 .85 .5 1"/></body>
    <body name="point">
      <joint name="x" type="slide" axis="1 0 0" damping="1"/>
      <joint name="y" type="slide" axis="0 1 0" damping="1"/>
      <geom type="sphere" size="{RADIUS}" density="1000" rgba=".25 .41 .88 1"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" gear="{FORCE}" ctrlrange="-1 1"/>
    <motor joint="y" gear="{FORCE}" ctrlrange="-1 1"/>
  </actuator>
</mujoco>"""


def _runs(row: str) -> list[tuple[int, int]]:
    """First column and the one after the last of every run of '#'."""
    edges = np.flatnonzero(np.diff([0, *(symbol == "#" for symbol in row), 0]))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]

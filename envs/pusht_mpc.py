"""Sampling MPC for Push-T: it plans with the true simulator and learns nothing. The baseline to compare a learned planner with.

A candidate is a push: walk around the block to a point of its outline, then push straight. What is searched is these four numbers,
not the actions: pushes are drawn, all are rolled out by mujoco.rollout on the task's own model, and the best are varied and rolled
out again, as in the cross-entropy method. A plan depends on the state and a seed only, not on the plan before.

It is no source of demonstrations. It jumps between pushes that are equally good: a policy that imitated 129 episodes of an earlier
version reached success .08, where one that imitated people reached .54.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import mujoco
import numpy as np
from mujoco import rollout

from envs.pusht import BARS, CENTRE_OF_MASS, FINGER, GOAL, PushT, to_world
from envs.task import State

BAR, STEM = BARS
CORNERS = np.array(
    [BAR[:2], BAR[[2, 1]], BAR[2:], [STEM[2], BAR[3]], STEM[2:], STEM[[0, 3]], [STEM[0], BAR[3]], BAR[[0, 3]]]
)  # px in the block frame, along the T's outline
EDGES = np.roll(CORNERS, -1, axis=0) - CORNERS
LENGTHS = np.linalg.norm(EDGES, axis=-1)
ENDS = np.cumsum(LENGTHS)  # px along the outline; the last is its length
CENTRE = np.array([[0.0, CENTRE_OF_MASS]])  # px in the block frame
AROUND = 105.0  # px from the block's centre of mass: a finger on this circle meets nothing
GAP = 9.0  # px between finger and block before a push
WALK = 40.0  # px per control step on the way to a push
LEGS = 8  # straight pieces of that way


def outline(contact: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points (..., 2) of the outline, contact (...) px along it, and the normals (..., 2) into the block; block frame."""
    along = contact % ENDS[-1]
    edge = np.minimum(np.searchsorted(ENDS, along, side="right"), len(EDGES) - 1)
    direction = EDGES[edge] / LENGTHS[edge, None]
    return CORNERS[edge] + direction * (along - ENDS[edge] + LENGTHS[edge])[..., None], turn(direction, np.pi / 2)


def turn(vector: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Vectors (..., 2) turned by angle (...) rad."""
    (x, y), cos, sin = np.moveaxis(vector, -1, 0), np.cos(angle), np.sin(angle)
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)


def distance(pose: np.ndarray) -> np.ndarray:
    """Mean distance (...) px of the block's corners at pose (..., 3) from where they belong."""
    return np.linalg.norm(to_world(CORNERS, pose) - to_world(CORNERS, GOAL), axis=-1).mean(-1)


def cost(vector: np.ndarray) -> np.ndarray:
    """What paths of states vector (..., t, 5) cost, (...) px: the distance at their end and, for it may be success, some of the least."""
    path = distance(vector[..., 2:])
    return path[..., -1] + 0.15 * path.min(-1)


def draw(vector: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Pushes (n, 4) for the state vector (5,).

    Columns: contact, px along the outline; angle of the push to the normal there, rad; length past the contact, px; speed, px per step.
    """
    short = np.clip(2.5 * distance(vector[2:]), 12, 150)
    length = np.where(rng.random(n) < 0.5, rng.uniform(2, 150, n), rng.uniform(1, short, n))
    return np.stack([rng.uniform(0, ENDS[-1], n), rng.normal(0, 0.35, n), length, rng.uniform(8, 30, n)], axis=-1)


def vary(push: np.ndarray, n: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """n variations (n, 4) of pushes (k, 4)."""
    contact, angle, length, speed = push[rng.integers(len(push), size=n)].T
    noise = scale * rng.normal(size=(4, n))
    speed = np.clip(speed * np.exp(0.25 * noise[3]), 4, WALK)
    return np.stack([contact + 14 * noise[0], angle + 0.15 * noise[1], length * np.exp(0.25 * noise[2]), speed], axis=-1)


def follow(vector: np.ndarray, push: np.ndarray, horizon: int) -> np.ndarray:
    """Pushes (c, 4) from the state vector (5,) as actions (c, horizon, 2): where the finger should be at each step, px."""
    way = np.clip(_way(vector, push), 0, 512)
    legs = np.diff(way, axis=1)
    steps = np.linalg.norm(legs, axis=-1) / WALK
    steps[:, -1] *= WALK / push[:, 3]
    begun = np.cumsum(steps, axis=1) - steps
    done = (np.arange(1.0, horizon + 1)[:, None] - begun[:, None]) / np.maximum(steps, 1e-6)[:, None]  # (c, horizon, legs)
    return way[:, :1] + np.clip(done, 0, 1) @ legs


def _way(vector: np.ndarray, push: np.ndarray) -> np.ndarray:
    """Waypoints (c, LEGS + 4, 2): the finger, the shorter way around the block or, if it is free, the straight one, the push's start and end."""
    finger, pose = vector[:2], vector[2:]
    contact, angle, length, _ = push.T
    point, normal = outline(contact)
    start = pose[:2] + turn(point - (FINGER + GAP) * normal, pose[2])
    end = start + turn(normal, pose[2] + angle) * (GAP + length)[:, None]

    part = np.linspace(0, 1, LEGS + 1)
    straight = finger + (start - finger)[:, None] * part[:, None]
    free = _clearance(straight, pose).min(-1) > FINGER + 1
    centre = to_world(CENTRE, pose)[0]
    (x, y), (x0, y0) = (start - centre).T, finger - centre
    by = (np.arctan2(y, x) - np.arctan2(y0, x0) + np.pi) % (2 * np.pi) - np.pi
    bearing = np.arctan2(y0, x0) + by[:, None] * part
    radius = AROUND + max(np.hypot(x0, y0) - AROUND, 0) * (1 - part)
    around = centre + radius[:, None] * np.stack([np.cos(bearing), np.sin(bearing)], axis=-1)
    walk = np.where(free[:, None, None], straight, around)
    return np.concatenate([np.broadcast_to(finger, (len(push), 1, 2)), walk, start[:, None], end[:, None]], axis=1)


def _clearance(point: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Distance (...) px of points (..., 2) from the block at pose (3,)."""
    inside = turn(point - pose[:2], -pose[2])[..., None, :]
    return np.linalg.norm(np.maximum(np.maximum(BARS[:, :2] - inside, inside - BARS[:, 2:]), 0), axis=-1).min(-1)


class PushPlanner:
    """Plans for Push-T worlds from their full states.

    A plan costs drawn + rounds * varied rollouts of `horizon` control steps, on `threads` threads (default: every core).
    best: how many candidates a round varies.
    """

    def __init__(
        self, task: PushT, *, horizon: int = 20, drawn: int = 48, rounds: int = 2, varied: int = 24, best: int = 8, threads: int | None = None
    ) -> None:
        self.task, self.horizon = task, horizon
        self.drawn, self.rounds, self.varied, self.best = drawn, rounds, varied, best
        threads = threads or os.cpu_count() or 1
        self._pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
        self._worlds = [mujoco.MjData(task.model) for _ in range(threads)]

    def plan(self, state: State, rngs: Sequence[np.random.Generator]) -> np.ndarray:
        """Actions (n, horizon, 2) px from states (n, ...), each drawn with its own generator: what else is planned for changes nothing."""
        return np.stack([self.search(state[i], rng) for i, rng in enumerate(rngs)])

    def search(self, state: State, rng: np.random.Generator) -> np.ndarray:
        """The cheapest actions (horizon, 2) found from one state."""
        vector = self.task.vector(state)
        push = draw(vector, self.drawn, rng)
        plans = follow(vector, push, self.horizon)
        costs = cost(self.task.vector(self.simulate(state, plans)))
        for k in range(self.rounds):
            more = vary(push[np.argsort(costs)[: self.best]], self.varied, 0.6**k, rng)
            tried = follow(vector, more, self.horizon)
            costs = np.concatenate([costs, cost(self.task.vector(self.simulate(state, tried)))])
            push, plans = np.concatenate([push, more]), np.concatenate([plans, tried])
        return plans[costs.argmin()]

    def simulate(self, state: State, actions: np.ndarray) -> State:
        """The states (c, t) that actions (c, t, 2) lead to from one state: bit for bit what an environment reset to it goes through."""
        model, substeps = self.task.model, self.task.substeps
        start = np.tile(np.concatenate([[0.0], state.qpos, state.qvel]), (len(actions), 1))  # MuJoCo's "full physics": time, qpos, qvel
        path, _ = self._pool.rollout(model, self._worlds, start, np.repeat(self.task.control(actions), substeps, axis=1))
        path = path[:, substeps - 1 :: substeps]
        return State(path[..., 1 : 1 + model.nq], path[..., 1 + model.nq :], np.empty((*path.shape[:2], 0, 3)))

    def close(self) -> None:
        self._pool.close()

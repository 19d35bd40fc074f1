"""Motions of piecewise constant jerk, in closed form and for many joints at once: what the limiter is made of. numpy only."""
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

TINY = 1e-9  # share of a limit that rounding may cost
# What jerks j0, j1, j2, each held for a third h of the time, add: (2 q'' h^2, ...) in units of h; its inverse finds the jerks.
_EFFECT = np.array([[19 / 6, 7 / 6, 1 / 6], [5 / 2, 3 / 2, 1 / 2], [1, 1, 1]])
_JERKS = np.linalg.inv(_EFFECT)


class Motion(NamedTuple):
    """Positions, velocities and accelerations, arrays of equal shape (..., dof)."""
    q: np.ndarray
    dq: np.ndarray
    ddq: np.ndarray

    def rows(self, index: Any) -> "Motion":
        return Motion(self.q[index], self.dq[index], self.ddq[index])

    def where(self, choose: np.ndarray, other: "Motion") -> "Motion":
        """This one where `choose`, the other elsewhere."""
        return Motion(np.where(choose, self.q, other.q), np.where(choose, self.dq, other.dq), np.where(choose, self.ddq, other.ddq))

    def after(self, jerk: np.ndarray, time: np.ndarray) -> "Motion":
        q, v, a = self
        return Motion(q + time * (v + time * (a / 2 + time * jerk / 6)), v + time * (a + time * jerk / 2), a + time * jerk)


@dataclass(frozen=True)
class Profile:
    """From `start` (..., dof) by constant jerks (k, ..., dof), each for its time (k, ..., dof) s; then on at the velocity reached."""
    start: Motion
    jerks: np.ndarray
    times: np.ndarray

    @property
    def duration(self) -> np.ndarray:
        return self.times.sum(0)

    def at(self, t: np.ndarray) -> Motion:
        """States (n, dof) at times (n,) or (n, dof) s; start is (dof,). Behind the end they stay what they are there."""
        t = t if t.ndim > 1 else t[:, None]
        now, began = self.start, np.zeros(self.jerks.shape[1:])
        for jerk, time in zip(self.jerks, self.times, strict=True):
            now, began = now.after(jerk, (t - began).clip(0, time)), began + time
        return now

    def within(self, speed: np.ndarray, acceleration: np.ndarray, jerk: np.ndarray) -> np.ndarray:
        """(..., dof) whether the limits are kept all the way."""
        good = (np.abs(self.jerks) <= jerk).all(0)
        now = self.start
        for j, time in zip(self.jerks, self.times, strict=True):
            turn = np.divide(-now.ddq, j, out=np.zeros_like(j), where=j != 0).clip(0, time)  # there the velocity is extreme
            fastest, now = now.dq + turn * (now.ddq + turn * j / 2), now.after(j, time)
            good &= (np.abs(now.ddq) <= acceleration * (1 + TINY)) & (np.maximum(np.abs(now.dq), np.abs(fastest)) <= speed * (1 + TINY))
        return good


def join(start: Motion, goal: Motion, time: np.ndarray | float) -> Profile:
    """From one state to another in `time` s, exactly then, by three constant jerks of equal length. Shapes broadcast to those of goal."""
    h = np.asarray(time) / 3
    q, v, a = start
    miss = np.stack([(goal.q - q - time * (v + time * a / 2)) / h**3, (goal.dq - v - time * a) / h**2, (goal.ddq - a) / h])
    jerks = np.einsum("ij,j...->i...", _JERKS, miss)
    return Profile(start, jerks, np.broadcast_to(h, jerks.shape))


def brake(start: Motion, acceleration: np.ndarray, jerk: np.ndarray) -> Profile:
    """The fastest way to rest within acceleration and jerk; closed form, from any state within them."""
    _, v, a = start
    sign = np.where(v + a * np.abs(a) / (2 * jerk) >= 0, 1.0, -1.0)  # the way it goes once its acceleration is gone
    v, a = sign * v, sign * a
    speed = (v + a * a / (2 * jerk)).clip(0)  # to lose from where the acceleration is, or would have been, 0
    peak = np.minimum(np.sqrt((jerk * (v + a * a / (2 * jerk))).clip(0)), acceleration)
    hold = np.divide(speed - peak**2 / jerk, peak, out=np.zeros_like(peak), where=peak >= acceleration)
    times = np.stack([(a + peak) / jerk, hold, peak / jerk]).clip(0)
    return Profile(start, np.stack([-sign * jerk, np.zeros_like(peak), sign * jerk]), times)


def braked(way: Profile, t: np.ndarray) -> Motion:
    """States (n, dof) on a way to rest, at times (n,) or (n, dof) s; exactly at rest from its end on."""
    out, moving = way.at(t), (t if t.ndim > 1 else t[:, None]) < way.duration
    return Motion(out.q, out.dq * moving, out.ddq * moving)


def braking_reach(start: Motion, acceleration: np.ndarray, jerk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest position on the fastest way to rest, (..., dof) each."""
    way = brake(start, acceleration, jerk)
    now = start
    for j, time in zip(way.jerks, way.times, strict=True):
        now = now.after(j, time)
    j = way.jerks[0]
    root = np.sqrt((start.ddq**2 - 2 * j * start.dq).clip(0))
    back = np.where(start.dq * j > 0, (np.abs(start.ddq) - root) / np.abs(j), 0.0).clip(0, way.times[0])  # until it turns round
    turn = start.after(j, back).q
    return np.minimum(np.minimum(start.q, now.q), turn), np.maximum(np.maximum(start.q, now.q), turn)


def braking_bound(start: Motion, acceleration: np.ndarray, jerk: np.ndarray) -> np.ndarray:
    """More than it moves on the fastest way to rest, at a fifth of the cost of braking_reach: its highest speed, all the way."""
    ramp = np.abs(start.ddq) / jerk
    speed = np.abs(start.dq) + ramp * np.abs(start.ddq) / 2
    return speed * (ramp + speed / acceleration + acceleration / jerk)


def speed_within(room: np.ndarray, acceleration: np.ndarray, jerk: np.ndarray) -> np.ndarray:
    """The speed from which a joint without acceleration comes to rest within `room`."""
    room = np.maximum(room, 0.0)
    short = np.cbrt(room**2 * jerk)  # v sqrt(v / J): the acceleration limit is not reached
    half = acceleration**2 / (2 * jerk)
    return np.where(short <= 2 * half, short, np.sqrt(half**2 + 2 * room * acceleration) - half)  # v / 2 (v / A + A / J)

"""The last thing between a plan and the motors: setpoints that never leave a robot's limits of position, velocity, acceleration and jerk.

A target stream that keeps to the limits passes unchanged. Any other is rejoined as soon as the limits allow: in one to six control periods by three
constant jerks, or, from afar, by ruckig's fastest way. What holds at every setpoint: from here the robot can brake to rest inside its range.
Setpoints are samples of a motion with continuous acceleration inside all limits, so their finite differences keep to them too.
"""
import numpy as np

from policy.serve.motion import TINY, Motion, Profile, brake, braked, braking_bound, braking_reach, join, speed_within
from policy.serve.robot import RobotSpec

try:
    import ruckig
except ImportError as error:
    raise ImportError("the limiter needs ruckig: pip install 'dipole[deploy]'", name="ruckig") from error

JOIN = (1, 2, 3, 4, 6)  # control periods in which a target stream is rejoined: the fewest that the limits allow


class Limiter:
    """Limits one robot's setpoints; joints are limited each on its own. Starts nowhere: call reset(q) first.

    dt: s between setpoints.   steps: setpoints in a control period.
    q, dq, ddq: (dof,) commanded at the end of the last period.
    interventions: setpoints that are not the target asked for.   largest: (dof,) most that one lay beside its target.
    errors: periods in which ruckig found no way, so that the robot braked.
    """

    def __init__(self, robot: RobotSpec, dt: float, steps: int):
        if not dt > 0 or steps < 1:
            raise ValueError(f"dt={dt} s must be above 0 and steps={steps} at least 1")
        self.robot, self.dt, self.steps = robot, dt, steps
        self.lower, self.upper = np.asarray(robot.lower, float), np.asarray(robot.upper, float)
        self.speed, self.acceleration, self.jerk = (np.asarray(x, float) for x in (robot.velocity, robot.acceleration, robot.jerk))
        self.interventions, self.errors, self.largest = 0, 0, np.zeros(robot.dof)
        self._ruckig, self._given = ruckig.Ruckig(robot.dof), ruckig.InputParameter(robot.dof)
        self._ways = [ruckig.Trajectory(robot.dof) for _ in JOIN]
        self._given.synchronization = ruckig.Synchronization.No
        self._given.max_velocity, self._given.max_acceleration = self.speed.tolist(), self.acceleration.tolist()
        self._given.max_jerk = self.jerk.tolist()
        self._times = dt * np.arange(1, steps + 1)
        self._arrivals = dt * steps * np.array(JOIN, float)[:, None]

    def reset(self, q: np.ndarray) -> None:
        """At rest at q (dof,). A joint that stands outside its range may move inwards only. ValueError when q is not dof finite numbers."""
        q = np.array(q, float)
        if q.shape != (self.robot.dof,) or not np.isfinite(q).all():
            raise ValueError(f"robot {self.robot.name} cannot start at {q}: give {self.robot.dof} finite numbers")
        self._low, self._high = np.minimum(self.lower, q), np.maximum(self.upper, q)
        self._at(Motion(q, np.zeros_like(q), np.zeros_like(q)))

    def _at(self, now: Motion) -> None:
        self._now = now
        way = brake(now, self.acceleration, self.jerk)
        duration = float(way.duration.max())
        self._tail = braked(way, self.dt * np.arange(1, int(np.ceil(duration / self.dt + 1e-6)) + 2))

    @property
    def q(self) -> np.ndarray:
        return self._now.q

    @property
    def dq(self) -> np.ndarray:
        return self._now.dq

    @property
    def ddq(self) -> np.ndarray:
        return self._now.ddq

    def follow(self, q: np.ndarray, dq: np.ndarray, ddq: np.ndarray | None = None) -> Motion:
        """Setpoints (steps, dof) of the coming period, as near to the targets as the limits allow.

        q, dq, ddq: (m, dof) wanted after 1, 2 … m times dt, m >= steps; what is behind the period is looked at to rejoin the stream, which goes on at
        its last velocity. ddq is the change of dq when absent. A target that is not finite, or farther outside the range than the range is wide, is
        none, and a period with such a one is braked through.
        """
        q, dq = np.asarray(q, float), np.asarray(dq, float)
        if q.shape != dq.shape or q.shape[1:] != self.q.shape or len(q) < self.steps:
            raise ValueError(f"targets must be ({self.steps} or more, {self.robot.dof}), got positions {q.shape} and velocities {dq.shape}")
        wide = self.upper - self.lower
        given = ((q >= self.lower - wide) & (q <= self.upper + wide) & np.isfinite(dq)).all(1)
        m = len(q) if given.all() else int(np.argmin(given))
        if m < self.steps:
            self.interventions += self.steps
            return self.brake()
        if ddq is None:
            ddq = np.gradient(dq[:m], self.dt, axis=0, edge_order=2 if m > 2 else 1) if m > 1 else np.zeros_like(dq)
        wanted = Motion(q[:m], dq[:m], np.where(np.isfinite(ddq[:m]), ddq[:m], 0.0))
        out = self._limited(self._inside(wanted))
        beside = np.abs(out.q - q[:self.steps])
        self.interventions += int((beside > 1e-9).any(1).sum())
        self.largest = np.maximum(self.largest, beside.max(0))
        self._at(out.rows(-1))
        return out

    def brake(self) -> Motion:
        """Setpoints (steps, dof) of a period in which the robot brakes, standing from where it has come to rest."""
        return self.skip(self.steps)

    def skip(self, steps: int) -> Motion:
        """The robot plays `steps` of the last tail, because nothing newer comes in time: (steps, dof). What follows goes on from there."""
        out = self._tail.rows(np.minimum(np.arange(steps), len(self._tail.q) - 1))
        if steps:
            self._now, self._tail = out.rows(-1), self._tail.rows(slice(min(steps, len(self._tail.q) - 1), None))
        return out

    def tail(self) -> Motion:
        """From the end of the period to rest, (n, dof); the last setpoint stands still."""
        return self._tail

    def _inside(self, goal: Motion) -> Motion:
        """Targets within the limits: positions in range, velocities from which there is room to brake."""
        q = goal.q.clip(self._low, self._high)
        room = np.where(goal.dq > 0, self._high - q, q - self._low)
        most = np.minimum(self.speed, speed_within(room, self.acceleration, self.jerk)) * (1 - TINY)
        slow = (np.abs(goal.dq) > most) | (q != goal.q)
        return Motion(q, goal.dq.clip(-most, most), np.where(slow, 0.0, goal.ddq.clip(-self.acceleration, self.acceleration)))

    def _limited(self, goal: Motion) -> Motion:
        """The period's setpoints towards targets (m, dof) that lie within the limits."""
        period = goal.rows(slice(self.steps))
        before = Motion(*(np.concatenate([now[None], x[:-1]]) for now, x in zip(self._now, period, strict=True)))
        todo = ~(join(before, period, self.dt).within(self.speed, self.acceleration, self.jerk).all(0) & self._safe(period))
        if not todo.any():
            return period
        out, ahead = period, self._ahead(goal)
        ways = join(self._now, ahead, self._arrivals)
        fits = ways.within(self.speed, self.acceleration, self.jerk)
        if (todo & fits.any(0)).any():
            fewest = fits.argmax(0), np.arange(self.robot.dof)
            way = Profile(self._now, ways.jerks[:, *fewest], ways.times[:, *fewest]).at(self._times)
            joined = todo & fits.any(0) & self._safe(way)
            out, todo = way.where(joined, out), todo & ~joined
        return self._from_afar(ahead).where(todo, out) if todo.any() else out

    def _ahead(self, goal: Motion) -> Motion:
        """The targets (len(JOIN), dof) at which the stream may be rejoined."""
        n = self.steps * np.array(JOIN) - 1
        row = np.minimum(n, len(goal.q) - 1)
        there, beyond = goal.rows(row), (n - row)[:, None]
        return self._inside(Motion(there.q + beyond * self.dt * there.dq, there.dq, there.ddq * (beyond == 0)))

    def _from_afar(self, ahead: Motion) -> Motion:
        """ruckig's fastest way to the first of the targets (len(JOIN), dof) that is reached in time, else to the last; the brake where it is unsafe."""
        given, found, late = self._given, [], np.ones(self.robot.dof, bool)
        given.current_position, given.current_velocity, given.current_acceleration = (x.tolist() for x in self._now)
        out = self._tail.rows(np.minimum(np.arange(self.steps), len(self._tail.q) - 1))
        for i, way in enumerate(self._ways):
            given.target_position, given.target_velocity = ahead.q[i].tolist(), ahead.dq[i].tolist()
            try:
                self._ruckig.calculate(given, way)
            except (ruckig.RuckigError, ValueError):  # the latter where its result has no name in Python
                continue
            in_time = late & (np.array(way.independent_min_durations) <= self._arrivals[i])
            found.append((way, late if i == len(JOIN) - 1 else in_time))
            late = late & ~in_time
            if not late.any():
                break
        self.errors += not found
        for way, joints in found:
            if joints.any():
                out = self._sampled(way).where(joints, out)
        return self._or_brake(out)

    def _sampled(self, way: "ruckig.Trajectory") -> Motion:
        return Motion(*(np.array(x) for x in zip(*(way.at_time(t) for t in self._times), strict=True)))

    def _or_brake(self, way: Motion) -> Motion:
        """The way (steps, dof) as far as it is safe, then the brake."""
        good = np.logical_and.accumulate(self._reach_inside(way), 0)
        if good.all():
            return way
        kept = good.sum(0)
        rows = Motion(*(np.concatenate([now[None], x]) for now, x in zip(self._now, way, strict=True)))
        last = Motion(*(np.take_along_axis(x, kept[None], 0)[0] for x in rows))
        stop = braked(brake(last, self.acceleration, self.jerk), (self._times[:, None] - self.dt * kept).clip(0))
        return way.where(good, stop)

    def _safe(self, states: Motion) -> np.ndarray:
        """(dof,) whether from all of the states (n, dof) a joint comes to rest inside its range and speed."""
        return np.asarray(self._reach_inside(states).all(0))

    def _reach_inside(self, states: Motion) -> np.ndarray:
        speed = np.abs(states.dq + states.ddq * np.abs(states.ddq) / (2 * self.jerk)) <= self.speed * (1 + TINY)
        bound = braking_bound(states, self.acceleration, self.jerk)
        if ((states.q - bound >= self._low) & (states.q + bound <= self._high)).all():
            return speed
        low, high = braking_reach(states, self.acceleration, self.jerk)
        slack = 1e-13 * (self.upper - self.lower)
        return speed & (low >= self._low - slack) & (high <= self._high + slack)

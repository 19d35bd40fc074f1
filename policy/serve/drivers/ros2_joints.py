"""Between setpoints and joint states of robot.py and the messages of ROS 2; no network here."""
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from cyclonedds.internal import InvalidSample

from policy.serve.drivers import ros2_types as ros
from policy.serve.robot import DriverError, RobotSpec, Setpoints

NS = 1_000_000_000


def split(seconds: float) -> tuple[int, int]:
    """Whole seconds and nanoseconds, as Time and Duration want them."""
    return divmod(round(seconds * NS), NS)


def knots(points: Setpoints, start: float, spacing: float, lead: float) -> tuple[np.ndarray, np.ndarray]:
    """Which setpoints become trajectory points, and when after `start` [s]: every `spacing` s from start + lead on, and the last one.

    A cubic through them with their velocities errs by at most spacing^3 / 192 times the sum of the jumps of jerk within one spacing (the
    deflection of a clamped beam); the segment before the first likewise with lead. DriverError when the setpoints end before start.
    """
    n, stride = len(points.q), max(1, round(spacing / points.dt))
    first = math.ceil((start + lead - points.t0) / points.dt - 1e-6)
    index = np.array([*range(max(first, 0), n - 1, stride), n - 1])
    times = points.t0 + index * points.dt - start
    if len(index) == 1 and times[0] > 0:
        times = times.clip(spacing)  # the robot is all but there, and not to be hurried
    if times[-1] <= 0:
        raise DriverError(f"the setpoints ended {-times[-1]:.3f} s ago: t0 is in seconds of time.monotonic()")
    return index, times


def trajectory(points: Setpoints, names: Sequence[str], now: float, spacing: float, lead: float, *, stamp: float = 0.0,
               accelerations: bool = False) -> ros.JointTrajectory:
    """Setpoints that end at rest as a JointTrajectoryController takes them: all joints, times strictly increasing, the last velocity exactly 0.

    now: s, monotonic, when times start to count.   stamp: the same moment in ROS time, 0: when the controller receives it.
    """
    index, times = knots(points, now, spacing, lead)
    return ros.JointTrajectory(ros.Header(ros.Time(*split(stamp))), list(names), [
        ros.JointTrajectoryPoint(points.q[i].tolist(), points.dq[i].tolist(), points.ddq[i].tolist() if accelerations else [], [], ros.Duration(*split(t)))
        for i, t in zip(index, times, strict=True)])


def hold(q: np.ndarray, dq: np.ndarray, robot: RobotSpec, shortest: float) -> tuple[np.ndarray, float]:
    """Where (dof,) and in how many seconds to stop: the cubic from (q, dq) to rest there decelerates evenly, with at most half the limits."""
    seconds = max(shortest, 2 * float(np.max(np.abs(dq) / np.asarray(robot.acceleration, float))))
    return np.clip(q + dq * seconds / 2, robot.lower, robot.upper), seconds


class JointStates:
    """What is known of the joints `names`, gathered from the messages of one or several publishers.

    clock: reception, or header: the message's stamp, set to this computer's clock by the fastest message of the last seconds.
    """

    def __init__(self, names: Sequence[str], clock: str = "reception"):
        self.names, self.clock = list(names), clock
        self.index = {name: i for i, name in enumerate(self.names)}
        n = len(self.names)
        self.q, self.dq, self.t, self.stamp = np.full(n, np.nan), np.zeros(n), np.full(n, -np.inf), np.full(n, -np.inf)
        self.counts: Counter[str] = Counter()
        self.others: set[str] = set()
        self._offset = [math.inf, math.inf]
        self._since = -math.inf

    @property
    def missing(self) -> list[str]:
        return [name for name, t in zip(self.names, self.t, strict=True) if t == -np.inf]

    def add(self, message: Any, now: float) -> bool:
        """Take over a JointState received at `now`; whether it says something about our joints. What is unusable is counted."""
        if isinstance(message, InvalidSample):
            self.counts["disposed"] += 1
            return False
        if len(message.position) != len(message.name) or len(set(message.name)) != len(message.name):
            self.counts["malformed"] += 1
            return False
        pairs = [(self.index[name], k) for k, name in enumerate(message.name) if name in self.index]
        if not pairs:
            self.others.update(message.name[:20] if len(self.others) < 100 else ())
            self.counts["other joints"] += 1
            return False
        mine, theirs = (list(x) for x in zip(*pairs, strict=True))
        q = np.asarray(message.position, float)[theirs]
        if not np.isfinite(q).all():
            self.counts["not finite"] += 1
            return False
        stamp = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        elapsed = (stamp if stamp else now) - (self.stamp[mine] if stamp else self.t[mine])
        if stamp and ((elapsed <= 0) & (elapsed > -1)).any():  # older by more: the publisher's clock was set back
            self.counts["out of order"] += 1
            return False
        given = np.asarray(message.velocity, float)[theirs] if len(message.velocity) == len(message.name) else np.full(len(mine), np.nan)
        usual = np.isfinite(elapsed) & (elapsed > 0) & (elapsed < 1)
        difference = np.divide(q - self.q[mine], elapsed, out=np.zeros(len(mine)), where=usual)
        self.dq[mine] = np.where(np.isfinite(given), given, difference)
        self.q[mine], self.stamp[mine], self.t[mine] = q, stamp, self._time(stamp, now)
        self.counts["used"] += 1
        return True

    def _time(self, stamp: float, now: float) -> float:
        if self.clock == "reception" or not stamp:
            return now
        offset = now - stamp
        if offset - min(self._offset) > 0.5:  # s: set back
            self._offset = [math.inf, math.inf]
        if now - self._since > 10:
            self._since, self._offset = now, [self._offset[1], math.inf]
        self._offset[1] = min(self._offset[1], offset)
        return stamp + min(self._offset)


def command(q: np.ndarray) -> ros.Float64MultiArray:
    """Positions (dof,) for a forward_command_controller, in the order of its parameter `joints`."""
    return ros.Float64MultiArray(ros.MultiArrayLayout([ros.MultiArrayDimension("joints", len(q), len(q))]), q.tolist())

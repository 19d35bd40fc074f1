"""The far side of test_ros2.py, its own process: a joint controller as in ros2_controllers, in front of a robot that follows exactly.

Started with one JSON argument; says "ready" on stdout, then answers each line on stdin with one line of JSON; ends with stdin.
"""
import itertools
import json
import select
import sys
import time

import numpy as np
from cyclonedds.core import Policy, Qos
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic

from policy.serve.drivers.ros2_dds import Link
from policy.serve.drivers.ros2_types import Float64MultiArray, Header, JointState, JointTrajectory, Time


def rejected(message: JointTrajectory, joints: list[str], now: float) -> str:
    """Why a JointTrajectoryController with default parameters drops a message, '' when it takes it; and NaN, which it would take.

    now: ROS time.   Source: validate_trajectory_msg of joint_trajectory_controller.cpp, ros2_controllers 6.9, in its order.
    """
    points = message.points
    if len(message.joint_names) != len(joints):
        return "joints on incoming trajectory don't match the controller joints"
    if not message.joint_names:
        return "empty joint names"
    if not points:
        return "empty trajectory"
    if unknown := set(message.joint_names) - set(joints):
        return f"incoming joints {unknown} don't match the controller's joints"
    if any(abs(v) > np.finfo(np.float32).eps for v in points[-1].velocities):
        return "velocity of last trajectory point is not zero"
    times = [p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in points]
    stamp = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
    if stamp and stamp + times[-1] < now:
        return "ends in the past"
    if any(b <= a for a, b in itertools.pairwise(times)):
        return "time between points is not strictly increasing"
    for p in points:
        if len(p.positions) != len(joints) or any(len(x) not in (0, len(joints)) for x in (p.velocities, p.accelerations)):
            return "mismatch between joint_names size and positions, velocities or accelerations"
        if p.effort:
            return "effort fields are only supported with an effort interface"
        if not np.isfinite([*p.positions, *p.velocities, *p.accelerations]).all():
            return "NaN or infinity (not checked by the controller)"
    if len(set(message.joint_names)) != len(message.joint_names):
        return "a joint twice (not checked by the controller)"
    if times[0] < 0 or any(not 0 <= p.time_from_start.nanosec < 10**9 for p in points):
        return "negative time (not checked by the controller)"
    return ""


def hermite(t, t0, q0, v0, t1, q1, v1):
    """interpolate_between_points of trajectory.cpp with positions and velocities: position, velocity and acceleration at t."""
    h, d = t1 - t0, t - t0
    a2 = (-3 * q0 + 3 * q1 - 2 * h * v0 - h * v1) / h**2
    a3 = (2 * q0 - 2 * q1 + h * v0 + h * v1) / h**3
    return q0 + v0 * d + a2 * d**2 + a3 * d**3, v0 + 2 * a2 * d + 3 * a3 * d**2, 2 * a2 + 6 * a3 * d


class Controller:
    """Plays trajectories (Trajectory::sample), each from the state that was desired when it came (interpolate_from_desired_state)."""

    def __init__(self, joints: list[str], q: np.ndarray):
        self.joints = joints
        self.t, self.q, self.v = np.array([-np.inf]), q[None], np.zeros((1, len(q)))

    def take(self, message: JointTrajectory, now: float, ros_now: float) -> None:
        order = [message.joint_names.index(j) for j in self.joints]
        stamp = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
        start = now + (stamp - ros_now if stamp else 0.0)
        t = np.array([start + p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points])
        q0, v0, _ = self.sample(now)
        q, v = (np.array([getattr(p, f) for p in message.points])[:, order] for f in ("positions", "velocities"))
        ahead = t > now
        self.t, self.q, self.v = np.r_[now, t[ahead]], np.vstack([q0, q[ahead]]), np.vstack([v0, v[ahead]])

    def sample(self, now: float):
        if now >= self.t[-1]:
            return self.q[-1], np.zeros_like(self.q[-1]), np.zeros_like(self.q[-1])
        i = max(0, int(np.searchsorted(self.t, now, side="right")) - 1)
        return hermite(now, self.t[i], self.q[i], self.v[i], self.t[i + 1], self.q[i + 1], self.v[i + 1])


def main(options: dict) -> None:
    joints, home = options["joints"], np.array(options["home"], float)
    link = Link(options["domain"], "localhost")
    trajectories = options["controller"] == "joint_trajectory"
    reader = link.reader(options["topic"], {"joint_trajectory": JointTrajectory, "forward_command": Float64MultiArray}[options["controller"]])
    deaf = [DataReader(link.participant, Topic(link.participant, f"rt{options['latched']}", JointTrajectory),
                       Qos(Policy.Reliability.Reliable(0), Policy.Durability.TransientLocal))] if "latched" in options else []
    states = link.writer(options["states"], JointState) if options.get("states") else None
    told = [j for j in ["extra", *reversed(joints)] if j not in options.get("omit", [])]
    controller, position = Controller(joints, home), dict(zip(joints, home, strict=True))
    log, taken, refused, n = [], [], [], 0
    period = 1 / options.get("rate", 500)
    due = time.monotonic()
    print("ready", flush=True)
    while True:
        for message in reader.take(64):
            if not message.sample_info.valid_data:
                continue
            now, ros_now = time.monotonic(), time.time()
            if trajectories and (why := rejected(message, joints, ros_now)):
                refused.append(why)
                continue
            if trajectories:
                stamp = message.header.stamp.sec + message.header.stamp.nanosec * 1e-9
                taken.append((now, ros_now - stamp if stamp else 0.0, len(message.points)))
                if not options.get("inactive"):
                    controller.take(message, now, ros_now)
            else:
                taken.append((now, 0.0, len(message.data)))
                position = dict(zip(joints, message.data, strict=True))
        now = time.monotonic()
        if trajectories:
            q, v, a = controller.sample(now)
            position = dict(zip(joints, q, strict=True))
        else:
            q, v, a = (np.array([position[j] for j in joints]), np.zeros(len(joints)), np.zeros(len(joints)))
        log.append([now, *q, *v, *a])
        if states is not None and n % options.get("every", 2) == 0:
            bad = options.get("nan") and n % options["nan"] == 0
            velocity = dict(zip(joints, v, strict=True)) if options.get("velocity", True) else {}
            stamp = divmod(time.time_ns() + int(options.get("ahead", 0) * 1e9), 10**9) if options.get("stamps", True) else (0, 0)
            states.write(JointState(Header(Time(*stamp)), told, [float("nan") if bad else float(position.get(j, 9.0)) for j in told],
                                    [float(velocity.get(j, 9.0)) for j in told] if velocity else [], []))
        n += 1
        if select.select([sys.stdin], [], [], 0)[0]:
            line = sys.stdin.readline().strip()
            if not line:
                break
            if line.startswith("save "):
                np.save(line[5:], np.array(log))
            print(json.dumps({"taken": taken, "refused": refused, "ticks": len(log)}), flush=True)
        due = max(due + period, time.monotonic() - period)
        time.sleep(max(0.0, due - time.monotonic()))
    deaf.clear()
    link.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""A robot under ros2_control, from a computer without ROS: setpoints to its controller, joint states back, over DDS.

What ROS does in silence is an error here: nobody listening, a name or type that does not match, joint states that stop, a controller that is not active
or drops what it is sent. The rules of the
JointTrajectoryController are those of ros2_controllers 6.9 (joint_trajectory_controller.cpp, trajectory.cpp). A robot is two lines of yaml:
conf/robot/ros2_panda.yaml. Set `interpolate_from_desired_state: true` in a JointTrajectoryController older than 2026, or each message restarts it from
the measured state, behind by the tracking error.
"""
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from policy.serve.drivers.stream import Playback
from policy.serve.robot import DriverError, RobotSpec, RobotState, Setpoints

try:
    from cyclonedds.core import DDSException, ReadCondition, SampleState, WaitSet

    from policy.serve.drivers.ros2_dds import Link, domain_of
    from policy.serve.drivers.ros2_joints import JointStates, command, hold, trajectory
    from policy.serve.drivers.ros2_types import Float64MultiArray, JointState, JointTrajectory
except ImportError as e:
    raise ImportError("the ROS 2 driver needs Cyclone DDS: pip install 'dipole[ros2]'") from e

# controller: name that is usual, topic below it, message
CONTROLLERS: dict[str, tuple[str, str, type]] = {
    "joint_trajectory": ("joint_trajectory_controller", "joint_trajectory", JointTrajectory),
    "forward_command": ("forward_position_controller", "commands", Float64MultiArray),
}


class Ros2Driver:
    """policy.serve.robot.Driver over ROS 2 topics.

    controller: joint_trajectory (interpolates by itself and plays the braking tail when nothing newer comes) or forward_command (does neither, so this
    process streams to it).   name: of the controller; {name: its joints} when several share the robot, as two arms do. A forward_command_controller takes
    the joints in the order of its own parameter, so name them.   rate: setpoints per second [Hz]; for forward_command the controller manager's.
    namespace, states: of the topics; states beginning with / is taken as it is.   rename: {joint of the robot: its name in ROS} where they differ.
    obs: {observation: q, dq or a list of these}, what the policy sees of the joints.   sense: what else it sees, from your own code:
    sense(state) -> {observation: (*shape)}, called in read() and to be quick (return the newest picture, take none).
    spacing: s between points of a trajectory; use the control period. The controller's cubic through them may exceed a limit of acceleration by jerk
    times half the spacing: leave room.   splice: s; above 0 trajectories say when they start, this far ahead, which takes
    the jitter of the network out but needs clocks that agree (robot on the same computer, or PTP) and no use_sim_time; 0: they start when received.
    lead: s from a trajectory's start to its first point, the way from where the controller is; three times spacing when None, once with splice. Jitter
    of the network makes itself felt as acceleration: at 1 rad/s and 1 ms of jitter 7 rad/s^2 with a lead of 20 ms, 0.4 with 60 ms, none with splice.
    Where the jerk jumps by 200 rad/s^3, 60 ms cost 0.6 mrad.   accelerations: quintic instead of cubic interpolation.   clock: see JointStates.
    stale: s without joint states that is an error.   follow: s; so far as it goes in this time at its velocity limit, a joint may be from all that it was told
    in the last half second, inf: any far.
    domain: ROS_DOMAIN_ID when None.   network: localhost, subnet or an interface; CYCLONEDDS_URI is added. DDS has no passwords: whoever is in the
    domain can move the robot.
    """

    def __init__(self, *, controller: str = "joint_trajectory", name: str | Mapping[str, Sequence[str]] = "", rate: float = 200.0, namespace: str = "",
                 states: str = "joint_states", rename: Mapping[str, str] | None = None, obs: Mapping[str, str | Sequence[str]] | None = None,
                 sense: Callable[[RobotState], Mapping[str, np.ndarray]] | None = None, spacing: float = 0.02, lead: float | None = None,
                 splice: float = 0.0, accelerations: bool = False, clock: str = "reception", stale: float = 0.25, follow: float = 0.25,
                 domain: int | None = None, network: str = "localhost"):
        if controller not in CONTROLLERS:
            raise ValueError(f"controller={controller!r} must be one of {', '.join(CONTROLLERS)}")
        if clock not in ("reception", "header"):
            raise ValueError(f"clock={clock!r} must be reception or header")
        if not 1 <= rate <= 2000 or not 0 < spacing <= 1 or not 0 <= splice <= 1 or not min(stale, follow) > 0:
            raise ValueError(f"rate={rate} Hz must be in [1, 2000], spacing={spacing} s in (0, 1], splice={splice} s in [0, 1], "
                             f"stale={stale} s and follow={follow} s above 0")
        usual, self.below, self.kind = CONTROLLERS[controller]
        self.lead = lead if lead is not None else spacing if splice else 3 * spacing
        self.controller, self.rate, self.spacing, self.splice, self.accelerations = controller, float(rate), spacing, splice, accelerations
        self.names: Mapping[str, Sequence[str]] | str = name or usual
        self.base = "/" + namespace.strip("/") + "/" * bool(namespace.strip("/"))
        self.states = states if states.startswith("/") else self.base + states
        self.rename, self.sense, self.clock, self.stale, self.follow = dict(rename or {}), sense, clock, stale, follow
        self.obs = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in (obs or {}).items()}
        if wrong := sorted({part for parts in self.obs.values() for part in parts} - {"q", "dq"}):
            raise ValueError(f"obs takes q, dq or a list of these, not {', '.join(wrong)}")
        self.domain, self.network = domain_of(domain), network
        self.link: Link | None = None
        self.stopped = True

    def connect(self, robot: RobotSpec, timeout: float = 5.0) -> RobotState:
        """See Driver. Leaves whatever was connected before, so it also serves to start again after a fault."""
        self.close()
        until = time.monotonic() + timeout
        self.robot = robot
        ros = [self.rename.get(j, j) for j in robot.joints]
        groups = {self.names: list(robot.joints)} if isinstance(self.names, str) else {k: list(v) for k, v in self.names.items()}
        if sorted(j for group in groups.values() for j in group) != sorted(robot.joints):
            raise DriverError(f"the controllers' joints {groups} are not those of robot {robot.name}, each once: {', '.join(robot.joints)}")
        self.joints, self.lock, self.fault, self.read_at = JointStates(ros, self.clock), threading.Lock(), "", -math.inf
        self.playback, self.told = Playback(), deque[tuple[float, np.ndarray]]()
        self.closing = threading.Event()
        self.outputs: list[tuple[Any, str, list[int]]] = []  # writer, topic, which joints
        self.threads: list[threading.Thread] = []
        self.link = Link(self.domain, self.network)
        try:
            self.outputs = [(self.link.writer(topic, self.kind), topic, [list(robot.joints).index(j) for j in group])
                            for name, group in groups.items() for topic in [f"{self.base}{name}/{self.below}"]]
            self._start(self._listen, self.link.reader(self.states, JointState))
            self._wait(until, timeout)
            state = self.read()
            assert state is not None
        except BaseException:
            self.close()
            raise
        if self.controller == "forward_command":
            self._start(self._stream)
        self.stopped = False
        return state

    def read(self) -> RobotState | None:
        link, now = self._linked(), time.monotonic()
        with self.lock:
            q, dq, t, fault = self.joints.q.copy(), self.joints.dq.copy(), float(self.joints.t.min()), self.fault
            late = [n for n, at in zip(self.joints.names, self.joints.t, strict=True) if now - at > self.stale]
            counts = dict(self.joints.counts)
        if fault:
            raise DriverError(fault)
        if late:
            raise DriverError(f"no joint states of {', '.join(late)} on {self.states} for {now - t:.2f} s (stale={self.stale}): is the robot running, and its "
                              f"joint_state_broadcaster? Messages so far: {counts}")
        for writer, topic, _ in self.outputs:
            if not writer.get_publication_matched_status().current_count:
                raise DriverError(f"the controller on {topic} is gone: {link.why_not(topic, self.kind, 'subscription')}")
        self._check_following(now, q)
        if t <= self.read_at:
            return None
        self.read_at = t
        parts = {"q": q, "dq": dq}
        state = RobotState(t, q, dq, {k: np.concatenate([parts[p] for p in v]).astype(np.float32) for k, v in self.obs.items()},
                           {"ignored": sum(v for k, v in counts.items() if k != "used")})
        if self.sense is not None:
            state.obs.update(self.sense(state))
        return state

    def write(self, setpoints: Setpoints) -> None:
        """See Driver. DriverError when they are not finite, of the wrong shape, over or not ending at rest: ROS plays or drops these in silence."""
        self._linked()
        if self.stopped:
            raise DriverError("the robot was stopped: connect() again before write()")
        shape = (len(setpoints.q), self.robot.dof)
        if not all(x.shape == shape and np.isfinite(x).all() for x in (setpoints.q, setpoints.dq, setpoints.ddq)) or not shape[0]:
            raise DriverError(f"setpoints q, dq and ddq must be finite and of one shape (n, {self.robot.dof}), got {setpoints.q.shape}")
        if (np.abs(setpoints.dq[-1]) > 1e-3 * np.asarray(self.robot.velocity)).any():
            raise DriverError(f"the last setpoint still moves at {setpoints.dq[-1]}: they must pass the limiter (policy.serve.limiter)")
        setpoints = replace(setpoints, dq=np.concatenate([setpoints.dq[:-1], np.zeros((1, self.robot.dof))]))
        self.playback.put(setpoints)
        if self.controller == "forward_command":
            return
        now = time.monotonic() + self.splice
        stamp = time.time() + self.splice if self.splice else 0.0
        for writer, _, at in self.outputs:
            part = replace(setpoints, q=setpoints.q[:, at], dq=setpoints.dq[:, at], ddq=setpoints.ddq[:, at])
            names = [self.joints.names[i] for i in at]
            self._send(writer, trajectory(part, names, now, self.spacing, self.lead, stamp=stamp, accelerations=self.accelerations))

    def stop(self) -> None:
        """A trajectory controller gets one point to brake to, a forward_command_controller the rest of the braking tail, then its end again and again.

        Without joint states to brake from, a trajectory controller is left to the braking tail it has.
        """
        if self.link is None or self.stopped:
            return
        self.stopped = True
        with self.lock:
            q, dq, age = self.joints.q.copy(), self.joints.dq.copy(), time.monotonic() - self.joints.t
        if self.controller == "joint_trajectory" and (age < self.stale).all():
            to, seconds = hold(q + age * dq, dq, self.robot, 2 * self.spacing)
            for writer, _, at in self.outputs:
                end = Setpoints(seconds, 1.0, to[None, at], np.zeros((1, len(at))), np.zeros((1, len(at))))
                self._send(writer, trajectory(end, [self.joints.names[i] for i in at], 0.0, self.spacing, self.spacing))

    def close(self) -> None:
        """See Driver. A stream to a forward_command_controller ends when the braking tail does."""
        if self.link is not None:
            self.stopped = True
            self.closing.set()
            for thread in self.threads:
                thread.join()
            self.outputs = []
            self.link.close()
            self.link = None

    def _start(self, what: Callable[..., None], *arguments: Any) -> None:
        self.threads.append(threading.Thread(target=what, args=arguments, name=f"ros2 {what.__name__}", daemon=True))
        self.threads[-1].start()

    def _linked(self) -> Link:
        if self.link is None:
            raise DriverError("not connected: call connect(robot) first")
        return self.link

    def _check_following(self, now: float, q: np.ndarray) -> None:
        if (point := self.playback.at(now)) is None or self.stopped:
            return
        self.told.append((now, point[0]))
        while now - self.told[0][0] > 0.5:
            self.told.popleft()
        away = (np.abs(q - np.stack([told for _, told in self.told])) / np.asarray(self.robot.velocity)).min(0)
        if now - self.told[0][0] > 0.4 and away.max() > self.follow:
            raise DriverError(f"{self.robot.joints[int(away.argmax())]} is at {q[away.argmax()]:.3f}, far from all it was told in the last half second: is the "
                              "controller active (ros2 control list_controllers), and what does its log say of rejected trajectories?")

    def _wait(self, until: float, timeout: float) -> None:
        """Until every controller listens and every joint has been seen; DriverError naming who does not."""
        link = self._linked()
        while True:
            deaf = [topic for writer, topic, _ in self.outputs if not writer.get_publication_matched_status().current_count]
            with self.lock:
                missing, counts, others = self.joints.missing, dict(self.joints.counts), sorted(self.joints.others)
            if self.fault or not (deaf or missing):
                return
            if time.monotonic() > until:
                break
            time.sleep(0.005)
        if deaf:
            raise DriverError(f"nobody listens on {deaf[0]} after {timeout:g} s: {link.why_not(deaf[0], self.kind, 'subscription')}")
        if counts:
            raise DriverError(f"{self.states} does not tell of {', '.join(missing)} after {timeout:g} s. Messages so far: {counts}"
                              + f", of other joints: {', '.join(others)}. Use the names in the robot's URDF, or rename" * bool(others))
        raise DriverError(f"no joint states on {self.states} after {timeout:g} s: {link.why_not(self.states, JointState, 'publication')}")

    def _listen(self, reader: Any) -> None:
        """The thread that takes joint states as they come."""
        try:
            ready = WaitSet(reader.participant)
            unread = ReadCondition(reader, SampleState.NotRead)
            ready.attach(unread)
            while not self.closing.is_set():
                if ready.wait(50_000_000):
                    messages, now = reader.take(64), time.monotonic()
                    with self.lock:
                        for message in messages:
                            self.joints.add(message, now)
        except Exception as e:  # whatever it is, the control loop must hear of it
            self.fault = f"joint states cannot be read from {self.states}: {type(e).__name__}: {e}"

    def _stream(self) -> None:
        """The thread that plays setpoints to a forward_command_controller: it neither interpolates nor notices that nothing comes any more."""
        due, moving = time.monotonic(), False
        while moving or not self.closing.is_set():
            now = time.monotonic()
            if (point := self.playback.at(now)) is not None:
                moving = bool(point[1].any())
                try:
                    for writer, _, joints in self.outputs:
                        self._send(writer, command(point[0][joints]))
                except DriverError as e:
                    self.fault = str(e)
                    return
            due = max(due + 1 / self.rate, now)
            time.sleep(max(0.0, due - time.monotonic()))

    def _send(self, writer: Any, message: Any) -> None:
        try:
            writer.write(message)
        except DDSException as e:
            raise DriverError(f"cannot send to {writer.topic.name}: {e}") from e

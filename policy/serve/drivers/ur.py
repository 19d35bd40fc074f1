"""A Universal Robots arm through RTDE (ur-rtde): servoJ at the controller's own rate, 500 Hz on e-Series and UR20/30, 125 Hz on CB3.

What the client would leave to chance is decided here. ur-rtde 1.6.5 holds Python's lock while it connects and can crash its process when the controller is
lost during a call, so it has a process of its own. Who answers and in which mode is asked first, with a time limit. servoJ returns True into a dead
socket, so only the robot's clock counts as news. The robot's watchdog stops its program when our commands stop. Commands go out on the robot's beat, just
after its state came in: two clocks of 500 Hz that drift past each other would make it miss a command now and then, and jump with the next.
"""
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from policy.serve.drivers.apart import Apart
from policy.serve.drivers.stream import Gone, Point, Sense, Streamed, check_joints, within
from policy.serve.robot import DriverError, RobotSpec, RobotState

try:
    import rtde_control
    import rtde_receive
except ImportError as e:
    raise ImportError("the UR driver needs ur-rtde: pip install 'dipole[ur]'") from e

DOF = 6
RTDE, DASHBOARD = 30004, 29999
PLAYING, RUNNING = 2, 7  # runtime_state, robot_mode
POLL = 0.0002  # s between looks for the robot's next state
SAFETY = {  # safety_mode: what happened and what to do
    3: "is in protective stop: look at the arm, free it, and acknowledge on the teach pendant (not sooner than 5 s after the stop)",
    4: "is outside its safety limits: move it back in recovery mode on the teach pendant",
    5: "is stopped by a safeguard: close the door or leave the scanner's field, then reset the safeguard",
    6: "is in system emergency stop: release the stop, then initialise the robot on the teach pendant",
    7: "is in emergency stop: release the stop button, then initialise the robot on the teach pendant",
    8: "has a safety violation: restart the safety system on the teach pendant",
    9: "has a safety fault: restart the controller; call the vendor if it returns",
    12: "is stopped by an automatic-mode safeguard: reset it", 13: "waits for its three-position enabling switch",
}
MODES = {  # robot_mode
    -1: "has no controller", 0: "is disconnected", 1: "waits for its safety settings to be confirmed", 2: "boots", 3: "is switched off",
    4: "is switched on but not started", 5: "holds its brakes", 6: "is backdriven by hand", 8: "updates its firmware",
}


class UrDriver(Apart):
    """host: of the controller, which must be in remote control.   rate: of servoJ [Hz], 500 or less (CB3: 125 or less), a divisor of that.

    lookahead: s, .03 to .2, smooths and delays (about 34 ms at .03).   gain: 100 to 2000, how stiffly the target is followed.   watchdog: Hz, the robot
    ends its program when it hears less often from us.   deceleration: rad/s^2 of stop().   realtime, sense: policy.serve.drivers.apart.Apart.
    stale, obs: policy.serve.drivers.stream.Streamed.
    """

    def __init__(self, host: str, *, rate: float = 500.0, lookahead: float = 0.03, gain: float = 300.0, watchdog: float = 10.0, deceleration: float = 5.0,
                 stale: float = 0.2, obs: Mapping[str, str | Sequence[str]] | None = None, realtime: bool = True, sense: Sense | None = None):
        super().__init__(UrClient, host=host, rate=rate, lookahead=lookahead, gain=gain, watchdog=watchdog, deceleration=deceleration, stale=stale, obs=obs,
                         realtime=realtime, sense=sense)


class UrClient(Streamed):
    """What runs in the process of UrDriver."""

    def __init__(self, host: str, *, rate: float, lookahead: float, gain: float, watchdog: float, deceleration: float, stale: float,
                 obs: Mapping[str, str | Sequence[str]] | None):
        super().__init__(f"the UR robot at {host}", rate=rate, stale=stale, obs=obs)
        if not 0.03 <= lookahead <= 0.2 or not 100 <= gain <= 2000:
            raise ValueError(f"lookahead={lookahead} s must be between .03 and .2, gain={gain} between 100 and 2000: servoJ takes no others")
        if not 1 <= watchdog <= rate / 2 or not deceleration > 0:
            raise ValueError(f"watchdog={watchdog} Hz must be between 1 and half the rate {rate} Hz, deceleration={deceleration} rad/s^2 above 0")
        self.host, self.lookahead, self.gain, self.watchdog, self.deceleration = host, lookahead, gain, watchdog, deceleration
        self._control: Any = None
        self._receive: Any = None

    def _open(self, robot: RobotSpec, timeout: float) -> None:
        check_joints(robot, DOF, "rad", "a UR robot")
        self._native = native = 500.0 if version(self.host, timeout, self.name) > 3 else 125.0
        if self.rate > native or native % self.rate:
            raise DriverError(f"{self.name} takes {native:g} setpoints a second, not {self.rate:g}: set driver.rate to {native:g} or a divisor of it")
        check_mode(self.host, timeout, self.name)
        self._control, self._receive = within(timeout, self._start, f"{self.name} does not start its control program within {timeout:g} s: is another client "
                                              "(a second bridge, PROFINET, EtherNet/IP) using its RTDE registers?")
        self._stamp = self._paced = -1.0

    def _start(self) -> tuple[Any, Any]:
        receive = rtde_receive.RTDEReceiveInterface(self.host)
        control = rtde_control.RTDEControlInterface(self.host)
        if not control.setWatchdog(self.watchdog):
            raise DriverError(f"{self.name} does not set its watchdog: stop its program on the teach pendant and connect again")
        return control, receive

    def _pace(self, deadline: float) -> float:
        late = time.monotonic() + 2 / self.rate
        while (now := time.monotonic()) < late:
            stamp = self._receive.getTimestamp()
            if stamp > self._paced + 1 / self.rate - 0.5 / self._native or stamp < self._paced:
                self._slipped += max(0, round((stamp - self._paced) * self.rate) - 1) if self._paced >= 0 else 0
                self._paced = stamp
                return self._clock.here(stamp, now, self._polled)
            self._polled = now
            time.sleep(POLL)
        self._late = max(self._late, now - deadline)
        return now

    def _tick(self, point: Point | None) -> RobotState | None:
        try:
            return self._stream(point)
        except DriverError:
            raise
        except RuntimeError as e:  # the client's, which tries to connect again by itself, to the dashboard first
            raise Gone(f"{self.name} has closed the connection ({e}): check the controller, then connect again") from e

    def _stream(self, point: Point | None) -> RobotState | None:
        stamp = self._receive.getTimestamp()
        self._check_mode()
        if not self._halting.is_set():
            if self._receive.getRuntimeState() != PLAYING:
                raise DriverError(f"{self.name} has stopped its control program (teach pendant, or its watchdog: it heard less than {self.watchdog:g} "
                                  "times a second from us): look at the log on the teach pendant, then connect again")
            q = point[0].tolist() if point is not None else self._receive.getTargetQ()
            if not self._control.servoJ(q, 0.0, 0.0, 1 / self.rate, self.lookahead, self.gain):
                self._check_mode()
                raise DriverError(f"{self.name} takes no commands: look at the log on the teach pendant, then connect again")
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        return self._state(stamp, self._receive.getActualQ(), self._receive.getActualQd(), speed_scaling=self._receive.getSpeedScaling())

    def _check_mode(self) -> None:
        if not (self._receive.isConnected() and self._control.isConnected()):
            raise Gone(f"{self.name} has closed the connection: check the controller, then connect again")
        safety, mode = self._receive.getSafetyMode(), self._receive.getRobotMode()
        if safety in SAFETY:
            raise DriverError(f"{self.name} {SAFETY[safety]}")
        if mode != RUNNING and mode in MODES:
            raise DriverError(f"{self.name} {MODES[mode]}: initialise it on the teach pendant, then connect again")

    def _halt(self) -> None:
        self._control.servoStop(self.deceleration)

    def _release(self) -> None:
        """The connections close with the process: the client takes half a second for each."""
        control, receive, self._control, self._receive = self._control, self._receive, None, None
        if control is not None and self.fault is None and receive.isConnected() and receive.getRuntimeState() == PLAYING:
            control.stopScript()

    def _explain(self, error: Exception) -> str:
        return f"{self.name}: {str(error).rstrip('.')}. Check address, cable, and that the robot is in remote control and initialised"


def version(host: str, timeout: float, name: str) -> int:
    """Major version of the controller's software: 3 is CB3, above are e-Series and later. DriverError when no RTDE server answers within timeout [s]."""
    try:
        with socket.create_connection((host, RTDE), timeout) as s:
            s.settimeout(timeout)
            s.sendall(struct.pack(">HBH", 5, 86, 2) + struct.pack(">HB", 3, 118))
            answers = {}
            while 118 not in answers:
                size, what = struct.unpack(">HB", _exactly(s, 3))
                answers[what] = _exactly(s, size - 3)
    except (OSError, struct.error) as e:
        raise DriverError(f"{name} does not answer on port {RTDE} ({e or type(e).__name__}): check address, cable and power, and that RTDE is enabled under "
                          "Settings, Security, Services") from e
    return struct.unpack(">I", answers[118][:4])[0]


def check_mode(host: str, timeout: float, name: str) -> None:
    """DriverError when the dashboard says why no program can run: local control, a stop, no power. Robots without a dashboard (PolyScope X) pass."""
    try:
        with socket.create_connection((host, DASHBOARD), timeout) as s, s.makefile("rw", encoding="utf-8", newline="\n") as lines:
            s.settimeout(timeout)
            lines.readline()
            told = {}
            for question in ("is in remote control", "robotmode", "safetystatus"):
                lines.write(question + "\n")
                lines.flush()
                told[question] = lines.readline().strip()
    except ConnectionRefusedError:
        return
    except OSError as e:
        raise DriverError(f"{name} does not answer on port {DASHBOARD} ({e}): enable the dashboard server under Settings, Security, Services") from e
    if told["is in remote control"] == "false":
        raise DriverError(f"{name} is in local control: switch it to remote control (top right on the teach pendant)")
    safety = told["safetystatus"].rpartition(": ")[2]
    if safety not in ("NORMAL", "REDUCED") and told["safetystatus"].startswith("Safetystatus"):
        words = {"PROTECTIVE_STOP": 3, "RECOVERY": 4, "SAFEGUARD_STOP": 5, "SYSTEM_EMERGENCY_STOP": 6, "ROBOT_EMERGENCY_STOP": 7, "VIOLATION": 8, "FAULT": 9,
                 "AUTOMATIC_MODE_SAFEGUARD_STOP": 12, "SYSTEM_THREE_POSITION_ENABLING_STOP": 13}
        raise DriverError(f"{name} {SAFETY.get(words.get(safety, 0), f'says {safety}: clear it on the teach pendant')}")
    mode = told["robotmode"].rpartition(": ")[2]
    if mode != "RUNNING" and told["robotmode"].startswith("Robotmode"):
        raise DriverError(f"{name} is {mode.replace('_', ' ').lower()}: initialise it on the teach pendant (power on, release brakes)")


def _exactly(s: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        more = s.recv(size - len(got))
        if not more:
            raise ConnectionResetError("closed")
        got += more
    return got

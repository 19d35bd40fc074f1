"""A Franka arm (FR3, Panda) through libfranka: setpoints at 50 to 200 Hz for an impedance controller whose 1 kHz loop is C++ (franky).

libfranka stops the arm when a command is missing for 20 ms or jumps; neither reaches it from Python. Torques are limited by the arm itself.
The gripper is not driven here: it answers in hundreds of ms and needs a thread of its own.
"""
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from policy.serve.drivers.stream import Point, Sense, Streamed, check_joints, within
from policy.serve.robot import DriverError, RobotSpec, RobotState

try:
    import franky
except ImportError as e:
    raise ImportError("the Franka driver needs franky: pip install 'dipole[franka]'") from e

DOF = 7
STIFFNESS = (600.0, 600.0, 600.0, 600.0, 250.0, 150.0, 50.0)  # Nm/rad, those of libfranka's joint impedance examples
DESK = "open Desk in a browser (https://<the robot's address>), unlock the joints, activate FCI, and choose execution mode"
ADVICE = {  # by libfranka's exceptions
    "NetworkException": f"check cable and address, then {DESK}",
    "IncompatibleVersionException": "this franky was built for another system version of the robot: install the wheel for yours "
                                    "(https://github.com/TimSchneider42/franky, Installation)",
    "RealtimeException": "libfranka wants a PREEMPT_RT kernel and an rtprio limit for this user; driver.realtime=false does without (simulators)",
    "ControlException": "look at the arm and its surroundings, remove what stopped it, then re-arm: connect() recovers from errors",
    "CommandException": f"the arm refused the command: {DESK}",
    "InvalidOperationException": f"the arm is busy or locked: {DESK}, and end other programs that control it",
    "ProtocolException": "the far side does not speak libfranka's protocol: check the address",
}


class FrankaDriver(Streamed):
    """host: of the arm's control, FCI address.   stiffness, damping: of the joints [Nm/rad, Nms/rad], damping critical when absent.

    realtime: refuse without real-time scheduling, as libfranka does.   torque_threshold, force_threshold: collision reflex [Nm, N].
    feedforward: add the torque that the setpoints' acceleration takes by the arm's own mass matrix (tried in
    simulation only).   rate, stale, obs, sense: policy.serve.drivers.stream.Streamed.
    """

    def __init__(self, host: str, *, rate: float = 100.0, stiffness: Sequence[float] = STIFFNESS, damping: Sequence[float] | None = None,
                 realtime: bool = True, torque_threshold: float = 20.0, force_threshold: float = 30.0, feedforward: bool = False,
                 stale: float = 0.2, obs: Mapping[str, str | Sequence[str]] | None = None, sense: Sense | None = None):
        super().__init__(f"the Franka arm at {host}", rate=rate, stale=stale, obs=obs, sense=sense)
        if len(stiffness) != DOF or (damping is not None and len(damping) != DOF):
            raise ValueError(f"stiffness and damping take {DOF} numbers, one for each joint")
        self.host, self.stiffness, self.damping, self.realtime, self.feedforward = host, np.asarray(stiffness, float), damping, realtime, feedforward
        self.thresholds = {"default_torque_threshold": torque_threshold, "default_force_threshold": force_threshold}
        self._robot: Any = None
        self._tracker: Any = None

    def _open(self, robot: RobotSpec, timeout: float) -> None:
        check_joints(robot, DOF, "rad", "a Franka arm")
        config = franky.RealtimeConfig.Enforce if self.realtime else franky.RealtimeConfig.Ignore
        self._robot, self._tracker = within(timeout, lambda: self._start(config),
                                            f"{self.name} does not answer within {timeout:g} s: {ADVICE['NetworkException']}")
        self._stamp = -1.0

    def _start(self, config: Any) -> tuple[Any, Any]:
        arm = franky.Robot(self.host, realtime_config=config, **self.thresholds)
        mode = arm.state.robot_mode
        if mode == franky.RobotMode.UserStopped:
            raise DriverError(f"{self.name} is stopped by its user: pull the emergency stop or enabling button up, then {DESK}")
        if mode == franky.RobotMode.Guiding:
            raise DriverError(f"{self.name} is being guided by hand: let go of the guiding buttons and choose execution mode in Desk")
        if mode == franky.RobotMode.Reflex and not arm.recover_from_errors():
            raise DriverError(f"{self.name} does not recover from {arm.state.last_motion_errors}: {DESK}")
        return arm, franky.JointImpedanceTracker(arm, stiffness=self.stiffness, damping=self.damping)

    def _tick(self, point: Point | None) -> RobotState | None:
        if not self._halting.is_set() and not self._tracker.is_running:
            self._robot.join_motion(0.0)  # raises what ended it
            raise DriverError(f"{self.name} has ended control: {ADVICE['ControlException']}")
        state = self._robot.state
        if point is not None and not self._halting.is_set():
            q, dq, ddq = point
            self._tracker.set_target(q, dq=dq, tau_ff=self._robot.model.mass(state) @ ddq if self.feedforward else None)
        stamp = state.time.to_sec()
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        return self._state(stamp, state.q, state.dq, mode=state.robot_mode.name,
                           packets=state.control_command_success_rate)

    def _halt(self) -> None:
        if self._tracker.is_running:
            self._robot.move(franky.TorqueStopMotion(), asynchronous=True)

    def _release(self) -> None:
        if self._tracker is not None:
            with suppress(Exception):
                self._tracker.stop()
        self._robot = self._tracker = None

    def _explain(self, error: Exception) -> str:
        kind = next((c.__name__ for c in type(error).__mro__ if c.__name__ in ADVICE), "NetworkException" if isinstance(error, RuntimeError) else "")
        advice = ADVICE.get(kind, "look into the log of the arm in Desk")
        return f"{self.name}: {str(error).rstrip('.')}. {advice[0].upper()}{advice[1:]}"

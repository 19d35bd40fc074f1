"""What a robot is to the bridge: its limits, its state, what it is told, and the five calls of a driver. numpy only."""
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


class DriverError(RuntimeError):
    """The robot cannot be reached or refuses; the text says what to do."""


@dataclass(frozen=True)
class RobotSpec:
    """A robot's joints and limits (conf/robot/*.yaml). One entry per joint, in the order of the policy's action dimensions.

    units: of positions, such as rad or m; velocity, acceleration and jerk are in that unit / s, / s^2 and / s^3.   rate: control loop [Hz].
    task: what the checkpoint must have been trained for; '' accepts any of the same dimensions.   step: largest change between two actions
    of a chunk; () is 1.5 times what `velocity` allows. Grippers, told open or closed, need the whole range here; the limiter makes them move gently.
    latency: s from a measurement to its time stamp (obs) and from a setpoint to the motion (action); both 0 where drivers compensate.
    """
    name: str
    joints: Sequence[str]
    units: Sequence[str]
    lower: Sequence[float]
    upper: Sequence[float]
    velocity: Sequence[float]
    acceleration: Sequence[float]
    jerk: Sequence[float]
    rate: float = 50.0
    task: str = ""
    step: Sequence[float] = ()
    latency_obs: float = 0.0
    latency_action: float = 0.0

    def __post_init__(self) -> None:
        n = len(self.joints)
        if wrong := [k for k in ("units", "lower", "upper", "velocity", "acceleration", "jerk") if len(getattr(self, k)) != n]:
            raise ValueError(f"robot {self.name} has {n} joints, but {', '.join(f'{len(getattr(self, k))} of {k}' for k in wrong)}: one for each")
        if not isinstance(self.step, Sequence | np.ndarray) or len(self.step) not in (0, n) or not all(number(x) and x > 0 for x in self.step):
            raise ValueError(f"robot {self.name}: step={self.step} must be empty, or one finite number above 0 for each of the {n} joints")
        for key in ("latency_obs", "latency_action"):
            if not number(getattr(self, key)) or getattr(self, key) < 0:
                raise ValueError(f"robot {self.name}: {key}={getattr(self, key)!r} must be a finite number of seconds from 0")
        if len(set(self.joints)) != n:
            raise ValueError(f"robot {self.name} names a joint twice: {', '.join(self.joints)}")
        low, high = np.asarray(self.lower, float), np.asarray(self.upper, float)
        limits = np.asarray([self.velocity, self.acceleration, self.jerk], float)
        if not (low < high).all() or not (np.isfinite(limits) & (limits > 0)).all() or not np.isfinite([low, high]).all():
            raise ValueError(f"robot {self.name}: lower must be below upper, and velocity, acceleration and jerk be finite numbers above 0")
        if not 1 <= self.rate <= 2000:
            raise ValueError(f"robot {self.name}: rate={self.rate} Hz must be between 1 and 2000")

    @property
    def dof(self) -> int:
        return len(self.joints)


def number(x: object) -> bool:
    """Whether x is a finite number."""
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool) and bool(np.isfinite(x))


@dataclass(frozen=True)
class RobotState:
    """What a driver reads.   t: s on this computer's monotonic clock when it was measured.   q, dq: (dof,) in the robot's units.

    obs: {key: (*shape)} of the policy's observations that the driver knows.   info: anything else (success, seed …); of it the bridge knows watchdog
    (true: the robot's own has tripped, it takes nothing until connect()) and lost (true: it refused the last setpoints, `why` says why, and brakes by
    itself; once `rest` is true, whoever plans goes on from `commanded`), and commanded (dof,), what it is told to hold after connect(), q when absent.
    """
    t: float
    q: np.ndarray
    dq: np.ndarray
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    info: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Setpoints:
    """Where the joints should be at t0 + i dt [s, monotonic]; the last one is at rest, so a robot that hears nothing more stops there.

    q, dq, ddq: (n, dof): a control period and behind it the braking tail, for when nothing newer comes.
    """
    t0: float
    dt: float
    q: np.ndarray
    dq: np.ndarray
    ddq: np.ndarray


class Driver(Protocol):
    """A robot. None of the calls but connect waits longer than a fraction of a control period.

    rate: setpoints per second that the robot itself runs at [Hz]; Setpoints.dt is 1 / rate.
    """
    rate: float

    def connect(self, robot: RobotSpec, timeout: float = 5.0) -> RobotState:
        """Reach the robot and return its state. DriverError when that fails within timeout [s] or its joints are not those of `robot`."""

    def read(self) -> RobotState | None:
        """The newest state that has not been read yet, None when there is none. DriverError when the robot is gone or at fault."""

    def write(self, setpoints: Setpoints) -> None:
        """Replace what the robot is going to do."""

    def stop(self) -> None:
        """Bring the robot to rest now, by its own means; write() after it is refused until connect()."""

    def close(self) -> None:
        """Let go of the robot; it is to be at rest or come to rest by its own watchdog."""

"""Servos on a bus that take goal positions and tell present ones (SO-101, Koch, …), behind five calls: the position bus (docs/position_bus.md).

The bus speaks its own units (degrees, -100 … 100, 0 … 100) with its own zero and sense; Calibration is where they become the policy's.
"""
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from policy.serve.drivers.stream import Point, Sense, Streamed, within
from policy.serve.robot import DriverError, RobotSpec, RobotState


class PositionBus(Protocol):
    """Any object with these calls is a bus. OSError (TimeoutError, ConnectionError) from one means: this time it failed."""

    def connect(self) -> None:
        """Open the bus and see that every servo answers. OSError when not."""

    def read_positions(self) -> dict[str, float]:
        """{servo: position}, all of them, in the bus's units."""

    def write_goals(self, goals: Mapping[str, float]) -> None:
        """Goal positions {servo: position}; a servo keeps its goal until the next."""

    def torque(self, on: bool) -> None:
        """Let the servos hold (their goal becomes where they are) or go limp."""

    def close(self) -> None:
        """Let go of the bus; servos keep their goals."""


@dataclass(frozen=True)
class Calibration:
    """One servo: policy units = sign * (bus units - offset) * scale.   servo: its name on the bus, '' the joint's.   range: goals it may be given."""
    range: tuple[float, float]
    servo: str = ""
    sign: int = 1
    offset: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1) or not self.scale > 0 or not math.isfinite(self.offset + self.scale):
            raise ValueError(f"calibration takes sign 1 or -1, scale above 0 and a finite offset, not {self.sign}, {self.scale}, {self.offset}")
        if not len(self.range) == 2 or not self.range[0] < self.range[1]:
            raise ValueError(f"calibration range={self.range} must be two numbers, the smaller one first")

    def decode(self, bus: float) -> float:
        return self.sign * (bus - self.offset) * self.scale

    def encode(self, policy: float) -> float:
        return self.sign * policy / self.scale + self.offset


class BusDriver(Streamed):
    """bus: what moves.   calibration: {joint: Calibration or its arguments}.   rate: goals and readings a second; readings may fail for `stale` s.

    follow: bus units that a servo may lag behind its goal for longer than 1 s, so that an overloaded or limp one is noticed; 0 never looks.
    release: let the servos go limp on close(): the arm falls. obs, sense: policy.serve.drivers.stream.Streamed.
    """

    def __init__(self, bus: PositionBus, calibration: Mapping[str, Calibration | Mapping[str, Any]], *, rate: float = 30.0, stale: float = 0.2,
                 follow: float = 0.0, release: bool = False, obs: Mapping[str, str | Sequence[str]] | None = None, sense: Sense | None = None):
        super().__init__("the position bus", rate=rate, stale=stale, obs=obs, sense=sense)
        self.bus, self.follow, self.release = bus, follow, release
        self.calibration = {j: c if isinstance(c, Calibration) else Calibration(**{**c, "range": tuple(c["range"])}) for j, c in calibration.items()}
        self._opened, self._lock = False, threading.Lock()

    def _open(self, robot: RobotSpec, timeout: float) -> None:
        if set(robot.joints) != set(self.calibration):
            raise DriverError(f"robot {robot.name} has the joints {', '.join(robot.joints)}, calibrated are {', '.join(self.calibration)}: calibrate the same")
        self._marks = [self.calibration[j] for j in robot.joints]
        self._servos = [c.servo or j for j, c in zip(robot.joints, self._marks, strict=True)]
        for joint, c, low, high in zip(robot.joints, self._marks, robot.lower, robot.upper, strict=True):
            ends = sorted((c.encode(low), c.encode(high)))
            if ends[0] < c.range[0] - 1e-6 or ends[1] > c.range[1] + 1e-6:
                raise DriverError(f"limits of {joint} ({low:g} … {high:g}) are {ends[0]:g} … {ends[1]:g} on the bus, beyond its range {c.range[0]:g} … "
                                  f"{c.range[1]:g}: narrow lower and upper in conf/robot, or calibrate anew")
        self._goal: np.ndarray | None = None
        self._before: tuple[float, np.ndarray] | None = None
        self._lost = {"reads": 0, "writes": 0}
        self._written = self._followed = time.monotonic()
        within(timeout, self._start, f"{self.name} does not answer within {timeout:g} s: check cable and power of the servos")

    def _start(self) -> bool:
        self.bus.connect()
        self._opened = True
        self.bus.torque(True)
        return True

    def _tick(self, point: Point | None) -> RobotState | None:
        if point is not None and not self._halting.is_set():
            self._goal = self._encode(point[0])
        if self._goal is not None:
            self._write(self._goal)
        try:
            with self._lock:
                told = self.bus.read_positions()
        except OSError:
            self._lost["reads"] += 1
            return None
        now = time.monotonic()
        if missing := [s for s in self._servos if s not in told]:
            raise DriverError(f"{self.name} does not tell of {', '.join(missing)}: check cables and ids of the servos")
        here = np.array([told[s] for s in self._servos], float)
        self._check_following(here, now)
        q = np.array([c.decode(b) for c, b in zip(self._marks, here, strict=True)])
        before, self._before = self._before, (now, q)
        dq = np.zeros_like(q) if before is None else (q - before[1]) / (now - before[0])
        return self._state(now, q, dq, lost_reads=self._lost["reads"], lost_writes=self._lost["writes"])

    def _write(self, goal: np.ndarray) -> None:
        try:
            with self._lock:
                self.bus.write_goals(dict(zip(self._servos, goal.tolist(), strict=True)))
            self._written = time.monotonic()
        except OSError as e:
            self._lost["writes"] += 1
            if time.monotonic() - self._written > self.stale:
                raise DriverError(f"{self.name} has taken no goals for {self.stale:g} s ({e or type(e).__name__}): check cable and power of the servos") from e

    def _check_following(self, here: np.ndarray, now: float) -> None:
        if not self.follow or self._goal is None or (gap := np.abs(here - self._goal)).max() <= self.follow:
            self._followed = now
        elif now - self._followed > 1:
            servo = self._servos[int(gap.argmax())]
            raise DriverError(f"servo {servo} stays {gap.max():.3g} behind its goal: overloaded, limp or blocked. Free it, switch its power off and on, "
                              "then connect again")

    def _halt(self) -> None:
        """Servos have no other stop: where they are becomes their goal, repeated as long as we are connected."""
        if self._before is not None and self._goal is not None:
            self._goal = self._encode(self._before[1])
            with self._lock:
                self.bus.write_goals(dict(zip(self._servos, self._goal.tolist(), strict=True)))

    def _encode(self, q: np.ndarray) -> np.ndarray:
        return np.array([np.clip(c.encode(x), *c.range) for c, x in zip(self._marks, q, strict=True)])

    def _release(self) -> None:
        if self._opened:
            self._opened = False
            if self.release:
                self.bus.torque(False)
            self.bus.close()

    def _explain(self, error: Exception) -> str:
        return f"{self.name}: {str(error).rstrip('.') or type(error).__name__}. Check cable and power of the servos, the port's name and who may open it"

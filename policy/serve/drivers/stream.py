"""What drivers share whose robots remember no trajectory: a thread that tells the robot at its own rate where to be, and reads back where it is.

The thread plays the setpoints it was given last to their end, at rest: a control loop that hangs or dies leaves a robot that stands still.
"""
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from policy.serve.robot import DriverError, RobotSpec, RobotState, Setpoints

T = TypeVar("T")
Point = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, dq, ddq, each (dof,)
Sense = Callable[[RobotState], Mapping[str, np.ndarray]]
DRIFT = 1e-4  # s per s that a robot's clock may run slower than ours


class Gone(DriverError):
    """Nothing is heard from the robot: it cannot be told to stop either and rests by its own watchdog."""


class Playback:
    """What is due when. Setpoints take over at their t0; until then, those before them go on."""

    def __init__(self) -> None:
        self._plans: tuple[Setpoints, ...] = ()  # swapped whole, so that one thread may put and another look

    def put(self, setpoints: Setpoints) -> None:
        self._plans = (*[p for p in self._plans if p.t0 < setpoints.t0][-7:], setpoints)

    def at(self, t: float) -> Point | None:
        """q, dq, ddq (dof,) at t [s, monotonic]; the first setpoint before it is due, the last one after the end, None before any came."""
        plans = self._plans
        if not plans:
            return None
        plan = next((p for p in reversed(plans) if p.t0 <= t), plans[0])
        x = min(max((t - plan.t0) / plan.dt, 0.0), len(plan.q) - 1.0)
        i = min(int(x + 1e-9), max(len(plan.q) - 2, 0))
        part, j = min(max(x - i, 0.0), 1.0), min(i + 1, len(plan.q) - 1)
        q, dq, ddq = (x[i] * (1 - part) + x[j] * part for x in (plan.q, plan.dq, plan.ddq))
        return q, dq, ddq


class Clock:
    """The robot's clock on ours. What arrives soonest was least delayed: the smallest difference seen is the offset, forgotten slowly."""

    def __init__(self) -> None:
        self._offset, self._at = math.inf, 0.0

    def here(self, robot: float, now: float, since: float) -> float:
        """When it was `robot` there [s, its clock]. This became known `now` and was not yet `since` [s, monotonic]; the answer lies between.

        So a simulated robot that is slower than time is not taken for an old state.
        """
        self._offset, self._at = min(self._offset + DRIFT * (now - self._at) if self._at else math.inf, now - robot), now
        self._offset = max(self._offset, since - robot)
        return robot + self._offset


def within(seconds: float, call: Callable[[], T], late: str) -> T:
    """call(), but DriverError(late) when it takes longer. It is then left to itself in a thread of its own."""
    got: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            got.append(call())
        except Exception as e:
            failed.append(e)

    worker = threading.Thread(target=work, daemon=True, name="connect")
    worker.start()
    worker.join(seconds)
    if failed:
        raise failed[0]
    if not got:
        raise DriverError(late)
    return got[0]


def check_joints(robot: RobotSpec, dof: int, unit: str, what: str) -> None:
    """DriverError unless `robot` has dof joints in that unit."""
    if robot.dof != dof:
        raise DriverError(f"{what} has {dof} joints, but robot {robot.name} has {robot.dof} ({', '.join(robot.joints)}): choose this robot's conf/robot file")
    if wrong := [f"{j} in {u}" for j, u in zip(robot.joints, robot.units, strict=True) if u != unit]:
        raise DriverError(f"{what} is told {unit}, but robot {robot.name} has {', '.join(wrong)}: correct units in conf/robot")


class Streamed:
    """A driver (policy.serve.robot.Driver) around a thread. Of one robot: what _open, _tick, _halt and _release do.

    rate: setpoints sent per second [Hz].   stale: s without news from the robot after which it is gone.   name: in errors.   obs: {observation: q, dq
    or a list of these}, what the policy sees of the joints.   sense: what else it sees, from your own code: sense(state) -> {observation: (*shape)},
    called in read() and to be quick (return the newest picture, take none).
    """

    def __init__(self, name: str, *, rate: float, stale: float, obs: Mapping[str, str | Sequence[str]] | None = None, sense: Sense | None = None):
        if not 1 <= rate <= 1000 or not 0 < stale <= 2:
            raise ValueError(f"rate={rate} Hz must be between 1 and 1000, stale={stale} s above 0 and at most 2")
        self.name, self.rate, self.stale, self.sense = name, float(rate), float(stale), sense
        self.obs = {k: (v,) if isinstance(v, str) else tuple(v) for k, v in (obs or {}).items()}
        if wrong := sorted({part for parts in self.obs.values() for part in parts} - {"q", "dq"}):
            raise ValueError(f"obs takes q, dq or a list of these, not {', '.join(wrong)}")
        self._thread: threading.Thread | None = None
        self._halter: threading.Thread | None = None

    def _open(self, robot: RobotSpec, timeout: float) -> None:
        """Reach the robot. DriverError, or anything else that _explain knows, when that fails."""
        raise NotImplementedError

    def _tick(self, point: Point | None) -> RobotState | None:
        """Tell the robot where to be (nothing when None) and return its state if it is a new one. An exception ends the stream."""
        raise NotImplementedError

    def _halt(self) -> None:
        """Bring the robot to rest by its own means. It may wait for that: it has a thread of its own, and nothing else commands the robot then."""
        raise NotImplementedError

    def _release(self) -> None:
        """Let go of the robot."""
        raise NotImplementedError

    def _explain(self, error: Exception) -> str:
        """What went wrong and what to do."""
        return str(error)

    def connect(self, robot: RobotSpec, timeout: float = 5.0) -> RobotState:
        self.close()
        self._joints = robot.joints
        self._playback, self._clock = Playback(), Clock()
        self._newest: RobotState | None = None
        self._last: RobotState | None = None
        self.fault: DriverError | None = None
        self._halting, self._ending, self._late, self._slipped = threading.Event(), threading.Event(), 0.0, 0
        self._halter = None
        until = time.monotonic() + timeout
        try:
            self._open(robot, timeout)
        except Exception as e:
            with suppress(Exception):
                self._release()
            raise self._error(e) from e
        self._heard = self._polled = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"{self.name} stream")
        self._thread.start()
        while time.monotonic() < until and self.fault is None:
            if (state := self.read()) is not None:
                return state
            time.sleep(0.002)
        fault = self.fault or DriverError(f"{self.name} is connected but tells nothing of itself after {timeout:g} s: restart the robot's controller")
        self.close()
        raise fault

    def read(self) -> RobotState | None:
        if self._thread is None:
            raise DriverError(f"{self.name} is not connected: call connect(robot)")
        if self.fault is not None:
            raise self.fault
        newest = self._newest
        if newest is not self._last:
            self._last = newest
            if newest is not None and self.sense is not None:
                newest.obs.update(self.sense(newest))
            return newest
        self._check_heard()
        return None

    def write(self, setpoints: Setpoints) -> None:
        if self._thread is None or self._halting.is_set():
            raise DriverError(f"{self.name} was stopped: it takes no setpoints until connect()")
        if self.fault is not None:
            raise self.fault
        n = len(self._joints)
        if setpoints.q.ndim != 2 or not setpoints.q.shape == setpoints.dq.shape == setpoints.ddq.shape or setpoints.q.shape[1] != n or not len(setpoints.q):
            raise DriverError(f"setpoints must be (n, {n}), got positions {setpoints.q.shape} and velocities {setpoints.dq.shape}")
        if not all(np.isfinite(x).all() for x in (setpoints.q, setpoints.dq, setpoints.ddq)):
            raise DriverError("setpoints hold NaN or infinity: they must pass the limiter (policy.serve.limiter)")
        self._playback.put(setpoints)

    def stop(self) -> None:
        if self._thread is not None:
            self._halting.set()

    def close(self) -> None:
        if self._thread is None:
            return
        self._halting.set()
        self._ending.set()
        self._thread.join(1.0)
        if self._halter is not None:
            self._halter.join(1.0)
        if not self._thread.is_alive() and (self._halter is None or not self._halter.is_alive()):
            with suppress(Exception):  # nothing can be done about a robot that cannot even be let go
                self._release()
        self._thread = None

    def _error(self, e: Exception) -> DriverError:
        return e if isinstance(e, DriverError) else DriverError(self._explain(e))

    def _check_heard(self) -> None:
        if (silent := time.monotonic() - self._heard) > self.stale:
            self.fault = self.fault or Gone(f"{self.name} is gone: nothing heard for {silent:.2f} s. Check cable, power and network, then connect again")
            raise self.fault

    def _state(self, stamp: float, q: Sequence[float] | np.ndarray, dq: Sequence[float] | np.ndarray, **info: Any) -> RobotState:
        """What was read at `stamp` [s, the robot's clock], checked. DriverError when it is no state."""
        position, velocity = np.array(q, float), np.array(dq, float)
        if position.shape != (len(self._joints),) or velocity.shape != position.shape:
            raise DriverError(f"{self.name} tells of {position.shape} positions and {velocity.shape} velocities, {len(self._joints)} joints expected")
        if bad := [j for j, a, b in zip(self._joints, position, velocity, strict=True) if not math.isfinite(a + b)]:
            raise DriverError(f"{self.name} reports NaN for {', '.join(bad)}: encoder or cable fault; check the robot before going on")
        parts = {"q": position, "dq": velocity}
        late, self._late = self._late, 0.0
        t = self._clock.here(stamp, time.monotonic(), self._polled)
        return RobotState(t, position, velocity, {k: np.concatenate([parts[p] for p in v]).astype(np.float32) for k, v in self.obs.items()},
                          {**info, "stream_late": late, "stream_skipped": self._slipped})

    def _run(self) -> None:
        try:
            self._play()
        except Exception as e:
            self.fault = self.fault or self._error(e)
            if not isinstance(e, Gone):
                self._begin_halt()

    def _begin_halt(self) -> None:
        def halt() -> None:
            try:
                self._halt()
            except Exception as e:
                self.fault = self.fault or self._error(e)

        if self._halter is None:
            self._halter = threading.Thread(target=halt, daemon=True, name=f"{self.name} halt")
            self._halter.start()

    def _pace(self, deadline: float) -> float:
        """Wait until the robot is to be told where to be; the moment that it is told for [s, monotonic]."""
        if (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        now = time.monotonic()
        self._late = max(self._late, now - deadline)
        return now

    def _play(self) -> None:
        period, start, i = 1 / self.rate, time.monotonic(), 0
        while not self._ending.is_set():
            if self._halting.is_set():
                self._begin_halt()
            i += 1
            if (behind := int((time.monotonic() - start) * self.rate) - i) > 0:
                i, self._slipped = i + behind, self._slipped + behind
            due, looked = self._pace(start + i * period), time.monotonic()
            state = self._tick(None if self._halting.is_set() else self._playback.at(due))
            self._polled = looked
            if state is not None:
                self._heard, self._newest = time.monotonic(), state
            self._check_heard()
        self._begin_halt()

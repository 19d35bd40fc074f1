"""A robot, a planner and a clock that only tests move: a bridge's hour in a second, the same every time."""
from collections.abc import Callable

import numpy as np

from policy.serve.client import Chunk
from policy.serve.robot import DriverError, RobotSpec, RobotState, Setpoints

ROBOT = RobotSpec("toy", ["a", "b"], ["rad", "rad"], [-1.0, -2.0], [1.0, 2.0], [1.5, 2.0], [20.0, 24.0], [1000.0, 1200.0], rate=50.0)
DT, HORIZON, RATE = 0.05, 16, 200.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeDriver:
    """Plays setpoints sample by sample as a robot does, and keeps them all."""
    rate = RATE

    def __init__(self, clock: Clock, q: np.ndarray):
        self.clock, self.q, self.start = clock, np.array(q, float), clock.now
        self.played: list[np.ndarray] = []
        self.buffer: Setpoints | None = None
        self.broken, self.silent, self.stopped = "", False, False

    def connect(self, robot: RobotSpec, timeout: float = 5.0) -> RobotState:
        self.stopped = False
        return self.state()

    def state(self) -> RobotState:
        return RobotState(self.clock.now, self.q.copy(), np.zeros_like(self.q), {"q": self.q.astype(np.float32)})

    def read(self) -> RobotState | None:
        if self.broken:
            raise DriverError(self.broken)
        return None if self.silent else self.state()

    def write(self, setpoints: Setpoints) -> None:
        if self.stopped:
            raise DriverError("stopped: connect again")
        self.pending = setpoints
        self.play(setpoints.t0 - 1 / RATE)
        self.buffer = setpoints

    def play(self, until: float) -> None:
        """Samples of the buffer due until then [s]."""
        count = round((until - self.start) * RATE) - len(self.played)
        for _ in range(count):
            t = self.start + (len(self.played) + 1) / RATE
            if self.buffer is not None:
                i = round((t - self.buffer.t0) * RATE)
                self.q = self.buffer.q[min(max(i, 0), len(self.buffer.q) - 1)]
            self.played.append(self.q.copy())

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass


class FakeClient:
    """Answers `delay` s after it was asked, with plan(t_obs, obs) (horizon, dof)."""

    def __init__(self, clock: Clock, plan: Callable[..., np.ndarray], delay: float = 0.04):
        self.clock, self.plan, self.delay, self.connected = clock, plan, delay, True
        self.asked: list[dict] = []
        self.open: dict | None = None
        self.tamper: Callable[[Chunk], Chunk | None] = lambda chunk: chunk

    def submit(self, obs, t_obs, *, epoch, prefix=None, committed=0, merge="naive", deadline_s=None, seed=None) -> int:
        self.open = {"obs": obs, "t_obs": t_obs, "epoch": epoch, "prefix": prefix, "committed": committed, "at": self.clock.now, "seq": len(self.asked)}
        self.asked.append(self.open)
        return self.open["seq"]

    def latest(self) -> Chunk | None:
        o = self.open
        if o is None or not self.connected or self.clock.now < o["at"] + self.delay - 1e-9:
            return None
        self.open = None
        actions = np.asarray(self.plan(o["t_obs"], o["obs"], o["prefix"], o["committed"]), float)
        return self.tamper(Chunk(o["seq"], o["epoch"], o["t_obs"], DT, actions, 1e3 * self.delay, 0.0, 1e3 * self.delay, "toy"))


def differences(q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Largest |velocity|, |acceleration|, |jerk| (dof,) of setpoints q (n, dof), by finite differences."""
    return tuple(np.abs(np.diff(q, n=n, axis=0)).max(0) * RATE**n for n in (1, 2, 3))  # type: ignore[return-value]

"""A bench for faults: planner and simulated robot in processes of their own, the bridge in this one. The robot's own recording is what is judged."""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from policy.serve.bridge import Bridge, Settings
from policy.serve.client import PlannerClient
from policy.serve.drivers.mujoco import MujocoDriver
from policy.serve.execution import Execution
from policy.serve.expect import Expect
from policy.serve.journal import Journal
from policy.serve.motion import Motion, brake, braked
from tests.serve import dance

ROOT = Path(__file__).parents[2]


class Bench:
    """fault: of evil_server, from `start` to `end` s after the first observation; "real" is the library's own server, without a fault.

    other: the card that the next server shows.   The rest: Settings.
    """

    def __init__(self, tmp: Path, robot: str = "gantry", fault: str = "none", start: float = 1e9, end: float = 1e9, *, align: bool = True, fast: bool = False,
                 **settings: float):
        self.tmp, self.fault, self.args, self.port = tmp, fault, [fault, str(start), str(end)], 0
        self.robot = dance.spec(robot)
        self.card = self.other = replace(dance.CARDS[robot], facts={**dance.CARDS[robot].facts, **(dance.FAST[robot] if fast else {})})
        self.server = self.serve()
        self.client = PlannerClient(f"ws://127.0.0.1:{self.port}")
        self.client.wait_ready(20)
        self.client.expect = replace(Expect.of(self.robot), dt=self.card.dt, model_id=self.card.model_id)
        self.driver = MujocoDriver(dance.node(robot)["driver"]["task"], log=str(tmp / "robot.npz"))
        self.journal = Journal()
        execution = Execution(self.robot, self.card.horizon, self.card.dt, execute=self.card.horizon * 2 // 5, most=self.card.committed, align=align,
                              knot=1.0)  # the dance says where to be a step later
        self.bridge = Bridge(self.driver, self.client, self.robot, execution, obs=self.card.obs, journal=self.journal,
                             settings=Settings(**{"hold": 30.0, "rejects": 10**6, **settings}))
        self.bridge.connect()

    def serve(self) -> subprocess.Popen:
        card, env = json.dumps(self.other.to_json()), {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = ["tests.serve.dance", card, str(self.port)] if self.fault == "real" else ["tests.serve.evil_server", *self.args, card, str(self.port)]
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, cwd=ROOT, env=env)
        assert process.stdout is not None
        self.port = int(re.findall(rb"\b\d{4,5}\b", process.stdout.readline())[0])
        return process

    def run(self, seconds: float, *then: tuple[float, Callable[[], None]]) -> dict:
        timers = [threading.Timer(at, act) for at, act in then]
        for timer in timers:
            timer.start()
        self.start = time.monotonic()
        facts = self.bridge.run(seconds)
        for timer in timers:
            timer.join()
        return facts

    def close(self) -> None:
        self.client.close()
        with contextlib.suppress(ProcessLookupError):
            self.server.send_signal(signal.SIGCONT)
            self.server.kill()
        self.server.wait()
        assert self.server.stdout is not None
        self.server.stdout.close()
        self.driver.close()

    def judge(self) -> dict[str, np.ndarray]:
        """The recording, after every limit has been checked on it. The robot is let go as soon as the bridge says that it stands."""
        self.driver.close()
        self.close()
        return judged(self.tmp / "robot.npz", self.robot, self.start)

    def modes(self) -> list[str]:
        return [e["mode"] for e in self.journal.events if e["event"] == "mode"]

    def brakes(self) -> list[tuple[float, float, Motion]]:
        """Every BRAKE from motion: when it was decided [s, monotonic], the least time in s that the limits allow for it, and the way, a setpoint a row."""
        a, out = self.journal.arrays(), []
        limits = np.array(self.robot.acceleration, float), np.array(self.robot.jerk, float)
        for i in np.flatnonzero((a["mode"][1:] == "BRAKE") & np.isin(a["mode"][:-1], ("RUN", "DEGRADED"))) + 1:
            way = brake(Motion(*(a[k][i - 1] for k in ("q", "dq", "ddq"))), *limits)
            out.append((float(a["t"][i]), float(way.duration.max()), braked(way, np.arange(1, 200) / self.driver_rate)))
        return out

    driver_rate = 200.0  # Hz, of both simulated robots


def judged(path: Path, robot, start: float = 0.0) -> dict[str, np.ndarray]:
    """The last episode of a recording, whose setpoints keep every limit and which ends with the robot at rest; `moving` (n,), and `at` s since `start`."""
    with np.load(path) as log:
        last = log["episode"] == log["episode"][-1]
        log = {k: log[k][last] if log[k].shape[:1] == last.shape else log[k] for k in log.files}
    q, dt = log["commanded"], float(log["dt"])
    for n, limit in enumerate((robot.velocity, robot.acceleration, robot.jerk), 1):
        most = np.abs(np.diff(q, n=n, axis=0)).max(0) / dt**n
        assert (most <= np.array(limit) * (1 + 1e-6)).all(), (n, most, limit)
    assert (q >= np.array(robot.lower) - 1e-9).all() and (q <= np.array(robot.upper) + 1e-9).all()
    axes = log["qpos"][:, : 3 if robot.name == "gantry" else 7]
    v = np.diff(axes, axis=0) / dt
    speed, force = (np.array(limit)[: axes.shape[1]] for limit in (robot.velocity, robot.acceleration))
    assert (np.abs(v).max(0) <= speed).all(), (np.abs(v).max(0), speed)
    assert (np.abs(np.diff(v, axis=0)).max(0) / dt <= 1.05 * force).all(), (np.abs(np.diff(v, axis=0)).max(0) / dt, force)
    log["moving"] = np.r_[False, np.abs(np.diff(q, axis=0)).max(1) > 1e-12]
    log["at"] = log["t"] - start
    assert not log["moving"][-20:].any() and (np.abs(v[-1]) <= 0.03 * speed).all(), (log["moving"][-20:].sum(), v[-1])  # let go at rest
    return log


def held(log: dict[str, np.ndarray], bench: Bench) -> list[float]:
    """s from each decision to brake until the joints stand, after it has been seen that the robot played the fastest brake, begun one period later.

    That is at most one period, the least time that the limits allow, and a setpoint's rounding; within two periods more it has to be.
    """
    found, period = [], 1 / bench.robot.rate
    for decided, least, way in bench.brakes():
        begun = int(np.searchsorted(log["t"], decided + period - 1e-4))
        n = int(least * bench.driver_rate)
        shown = [np.abs(log["commanded"][begun + k: begun + k + n] - way.q[:n]).max(initial=0.0) for k in range(-9, 4)]  # earlier where a period was skipped
        assert min(shown) < 1e-9, shown
        still = log["t"][begun:][~log["moving"][begun:]][0] - decided
        assert still <= least + 3 * period, (still, least)
        found.append(float(still))
    assert found
    return found

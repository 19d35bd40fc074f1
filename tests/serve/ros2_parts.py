"""What the tests of the ROS 2 driver share: a robot, limited setpoints as the bridge makes them, and the far side."""
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from policy.serve.drivers.ros2 import Ros2Driver
from policy.serve.limiter import Limiter
from policy.serve.robot import RobotSpec, RobotState, Setpoints

ROOT = Path(__file__).parents[2]

JOINTS = ["shoulder", "elbow", "wrist"]
ROBOT = RobotSpec("arm", JOINTS, ["rad"] * 3, [-2.0] * 3, [2.0] * 3, [1.0, 1.2, 1.5], [5.0, 6.0, 8.0], [100.0, 120.0, 150.0])
HOME = [0.0, 0.3, -0.4]
RATE, PERIOD, STEPS = 200.0, 0.02, 4


def at_rest(q: Any, t0: float, n: int = 20) -> Setpoints:
    q = np.tile(np.asarray(q, float), (n, 1))
    return Setpoints(t0, 1 / RATE, q, np.zeros_like(q), np.zeros_like(q))


Course = Callable[[np.ndarray], np.ndarray]


def wave(home: Any, amplitude: Any, w: float, start: float) -> tuple[Course, Course]:
    """From rest at home at `start`, to and fro: positions and velocities at times (n, 1)."""
    a = np.asarray(amplitude, float)
    return lambda t: home + a * (1 - np.cos(w * (t - start))), lambda t: w * a * np.sin(w * (t - start))


class Commander:
    """A control loop without a clock: limited setpoints after a target, as the bridge makes them, and everything that was ever due."""

    def __init__(self, robot: RobotSpec, home: Any):
        self.limiter = Limiter(robot, 1 / RATE, STEPS)
        self.limiter.reset(np.asarray(home, float))
        self.t: list[float] = []
        self.q: list[np.ndarray] = []

    def setpoints(self, first: float, q: Course, dq: Course) -> Setpoints:
        at = (first + np.arange(STEPS + 6) / RATE)[:, None]
        body = self.limiter.follow(q(at), dq(at))
        self.t += [first + i / RATE for i in range(STEPS)]
        self.q += list(body.q)
        parts = (np.concatenate(x) for x in zip(body, self.limiter.tail(), strict=True))
        return Setpoints(first, 1 / RATE, *parts)

    def due(self, t: np.ndarray) -> np.ndarray:
        """(n, dof) what was commanded at times t (n,)."""
        return np.stack([np.interp(t, self.t, q) for q in np.array(self.q).T], 1)


def random_setpoints(rng: np.random.Generator, count: int, robot: RobotSpec = ROBOT) -> Iterator[Setpoints]:
    """Limited motions after targets that jump and turn at will, control period by control period."""
    commander, first = Commander(robot, HOME), 100.0
    for _ in range(count):
        if rng.random() < 0.1 or first == 100.0:
            a, w, p = rng.uniform(0, 2.5, robot.dof), rng.uniform(0, 12, robot.dof), rng.uniform(0, 6, robot.dof)
        yield commander.setpoints(first, lambda t, a=a, w=w, p=p: a * np.sin(w * t + p), lambda t, a=a, w=w, p=p: w * a * np.cos(w * t + p))
        first += PERIOD


class Far:
    """tests/serve/ros2_far.py, running."""

    def __init__(self, **options: Any):
        self.options = {"joints": JOINTS, "home": HOME, "controller": "joint_trajectory", **options}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.serve.ros2_far", json.dumps(self.options)], cwd=ROOT, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout is not None and self.process.stdin is not None
        self.out, self.input = self.process.stdout, self.process.stdin
        assert self.out.readline() == "ready\n"

    def ask(self, what: str = "report") -> dict[str, Any]:
        self.input.write(what + "\n")
        self.input.flush()
        return json.loads(self.out.readline())

    def motion(self, path: Path) -> np.ndarray:
        """(ticks, 1 + 3 dof): time, positions, velocities, accelerations as played."""
        self.ask(f"save {path}")
        return np.load(path)


@contextmanager
def far(place: dict[str, Any], **options: Any) -> Iterator[Far]:
    topic = {"joint_trajectory": "joint_trajectory_controller/joint_trajectory", "forward_command": "forward_position_controller/commands"}
    ns, controller = place["namespace"], options.get("controller", "joint_trajectory")
    it = Far(**{"domain": place["domain"], "topic": f"/{ns}/{topic[controller]}", "states": f"/{ns}/joint_states", **options})
    try:
        yield it
    finally:
        it.process.kill()
        it.process.wait()
        it.out.close()
        it.input.close()


@contextmanager
def connected(place: dict[str, Any], robot: RobotSpec = ROBOT, timeout: float = 10.0, **options: Any) -> Iterator[tuple[Ros2Driver, RobotState]]:
    driver = Ros2Driver(**{**place, **options})
    try:
        yield driver, driver.connect(robot, timeout)
    finally:
        driver.close()


def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return result

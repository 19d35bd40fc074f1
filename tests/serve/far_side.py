"""What the tests of drivers share: a far side in its own process that answers commands on stdin with json lines (fake_rtde, fake_servos), loopback
addresses for fixed ports, and a control loop that drives a robot as the bridge does.
"""
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from policy.serve.robot import DriverError, RobotSpec, Setpoints

ROOT = Path(__file__).parent.parent.parent


def free_address(port: int) -> str:
    """A 127.x.y.z on which nobody listens on `port`: protocols with fixed ports, several at a time."""
    if sys.platform != "linux":
        pytest.skip("only Linux answers on every 127.x.y.z")
    draw = random.SystemRandom()
    while True:
        host = f"127.{draw.randint(1, 250)}.{draw.randint(0, 250)}.{draw.randint(1, 250)}"
        with socket.socket() as s:
            if s.connect_ex((host, port)):
                return host


class FarSide:
    def __init__(self, module: str, *args: object):
        self.process = subprocess.Popen([sys.executable, "-m", module, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.hello = self._line()

    def _line(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the far side ended with {self.process.wait()}"
        return json.loads(line)

    def ask(self, command: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something to happen."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def fails(call: Callable[[], object], why: str, seconds: float) -> None:
    """call() raises DriverError(why) within `seconds`, tried again and again."""
    start = time.monotonic()
    with pytest.raises(DriverError, match=why):
        while time.monotonic() - start < 10:
            call()
            time.sleep(0.005)
    assert time.monotonic() - start < seconds


def sine(q0: np.ndarray, amplitude: float, hz: float) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """amplitude (1 - cos)^2 / 2 around q0 in every joint, so that it starts with no acceleration: t (n,) -> q, dq (n, dof)."""
    w, every = 2 * np.pi * hz, np.ones_like(q0)
    return lambda t: (q0 + amplitude / 2 * (1 - np.cos(w * t))[:, None] ** 2 * every, amplitude * w * ((1 - np.cos(w * t)) * np.sin(w * t))[:, None] * every)


def drive(driver, spec: RobotSpec, q0: np.ndarray, seconds: float, target: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """target(t) through the limiter at spec.rate, a period ahead, as the bridge does.

    t [s since the start], q, dq: of every state that came back.   late [s]: of every period.   rest: where the last tail ends.
    """
    from policy.serve.limiter import Limiter
    from policy.serve.realtime import ticks
    steps, dt = round(driver.rate / spec.rate), 1 / driver.rate
    limiter = Limiter(spec, dt, steps)
    limiter.reset(q0)
    start, rows, lates = time.monotonic() + 1 / spec.rate, [], []
    for deadline, late in ticks(spec.rate):
        first = deadline + 1 / spec.rate
        if first - start > seconds:
            break
        body = limiter.follow(*target((first - start + (1 + np.arange(steps + 16)) * dt).clip(0)))
        tail = limiter.tail()
        driver.write(Setpoints(first, dt, *(np.concatenate(x) for x in zip(body, tail, strict=True))))
        lates.append(late)
        if (state := driver.read()) is not None:
            rows.append((state.t - start, time.monotonic() - state.t, state.q, state.dq))
    return {"t": np.array([r[0] for r in rows]), "age": np.array([r[1] for r in rows]), "q": np.array([r[2] for r in rows]),
            "dq": np.array([r[3] for r in rows]), "late": np.array(lates), "rest": tail[0][-1]}

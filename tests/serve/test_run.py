"""How a run ends, in real time: all has been played, the joints stand; and what watches it costs it nothing."""
import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from policy.serve.bridge import SETTLE, Bridge
from policy.serve.execution import Execution
from policy.serve.robot import RobotState
from policy.serve.view import ROOT, View, facts
from scripts.driving import lateness
from tests.serve.fakes import DT, HORIZON, ROBOT, FakeClient, FakeDriver
from tests.serve.test_bridge import Rig, wave


class Now:
    """The clock of the computer."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def now(self) -> float:
        return time.monotonic()


def bridge_of(driver: type[FakeDriver] = FakeDriver) -> Bridge:
    clock = Now()
    client = FakeClient(clock, lambda t_obs, obs, prefix, committed: wave(t_obs + DT * np.arange(1, HORIZON + 1) - clock.start))
    bridge = Bridge(driver(clock, np.zeros(2)), client, ROBOT, Execution(ROBOT, HORIZON, DT), obs={"q": (2,)})
    bridge.connect()
    return bridge


def test_a_run_is_over_when_all_that_was_sent_has_been_played():
    bridge = bridge_of()
    for seconds in (0.4, 0.53, 0.61):
        before = bridge.driver.q.copy()
        bridge.run(seconds, priority=None)
        bridge.driver.play(time.monotonic())
        now, rest = bridge.driver.q.copy(), bridge.driver.buffer.q
        assert np.abs(now - before).max() > 0.05 and np.array_equal(now, rest[-1]) and np.abs(bridge.limiter.q - now).max() < 1e-12
        assert bridge.supervisor.mode == "HOLD"


def test_a_missed_period_is_an_event_with_what_the_system_took_meanwhile():
    bridge, slept = bridge_of(), []

    def sleepy(state: RobotState) -> bool:
        if not slept and time.monotonic() > start + 0.3:
            slept.append(time.sleep(0.06))
        return False

    start = time.monotonic()
    bridge.run(0.8, until=sleepy, priority=None)
    assert bridge.journal.finish({}, bridge.limiter)["missed"] >= 2
    worst = max(bridge.journal.late, key=lambda e: e["late_ms"])
    assert 35 <= worst["late_ms"] < 500 and worst["put_off"] >= 0 and worst["t"] > start + 0.3
    said = lateness(bridge, start)
    assert said.startswith(f" (the loop was {worst['late_ms']:.0f} ms late") and lateness(bridge, time.monotonic()) == ""
    worst.update(stolen_ms=80, disk_faults=1, late_ms=600)
    assert lateness(bridge, start) == (" (the loop was 600 ms late, in the 2 s before 80 ms of its cores were taken by the host of this virtual machine and "
                                       "1 page had to be read from a disk)")


@pytest.mark.parametrize("lag, told", [(0.3, 0), (1e9, 1)])
def test_joints_that_follow_late_are_waited_for_but_not_for_ever(lag, told):
    class Slow(FakeDriver):
        def state(self) -> RobotState:
            moved = np.flatnonzero(np.abs(np.diff(self.played, axis=0)).any(1)) if len(self.played) > 1 else []
            still = self.start + (moved[-1] + 2) / self.rate if len(moved) else -np.inf
            return dataclasses.replace(super().state(), dq=np.full(2, 0.1 if self.clock.now < still + lag else 0.0))

    bridge, start = bridge_of(Slow), time.monotonic()
    bridge.run(0.4, priority=None)
    took = time.monotonic() - start - 0.4
    assert [e["event"] for e in bridge.journal.events].count("moving") == told
    assert min(lag, SETTLE) < took < min(lag, SETTLE) + 0.5, took


def test_a_run_that_is_interrupted_stops_the_robot():
    bridge = bridge_of()

    def interrupt(state: RobotState) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bridge.run(1.0, until=interrupt, priority=None)
    assert bridge.driver.stopped


def test_a_view_that_hangs_or_dies_costs_the_loop_no_time():
    rig = Rig().run(1.0)
    with View(rig.bridge, hz=50.0) as view:
        assert view.process is not None
        view.process.send_signal(signal.SIGSTOP)
        slowest = 0.0
        for _ in range(2000):  # more than a pipe holds
            start = time.perf_counter()
            view.show(rig.bridge, 1e-4)
            slowest = max(slowest, time.perf_counter() - start)
        assert slowest < 0.1 and view._left and rig.bridge.watchers  # what did not fit is left out, what was begun is kept
        view.process.kill()
        view.process.wait()
        for _ in range(2):
            view.show(rig.bridge, 1e-4)
        assert not rig.bridge.watchers
    with View(rig.bridge) as view:
        view.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
    assert time.monotonic() - start < 2 and view.process.returncode == -signal.SIGKILL


def test_the_view_is_a_process_that_draws_the_newest_line_on_the_terminal_and_ends_with_it():
    rig = Rig().run(2.0)
    mine, its = pty.openpty()
    view = subprocess.Popen([sys.executable, "-m", "policy.serve.view"], stdin=subprocess.PIPE, stdout=its, cwd=ROOT, env={**os.environ, "TERM": "xterm"})
    os.close(its)
    assert view.stdin is not None
    line = json.dumps({**facts(rig.bridge), "late": [1e-4, 2e-4]}).encode() + b"\n"
    view.stdin.write(line.replace(b'"RUN"', b'"HOLD"') + line + line[:20])
    view.stdin.flush()
    shown = b""
    while b"merge naive" not in shown:
        shown += os.read(mine, 4096)
    view.send_signal(signal.SIGINT)  # the bridge's
    view.stdin.write(line[20:].replace(b"naive", b"other"))
    view.stdin.flush()
    while b"merge other" not in shown:
        shown += os.read(mine, 4096)
    view.stdin.close()
    assert view.wait(5) == 0 and b"RUN" in shown and b"HOLD" not in shown and b"late p99 0.20 ms" in shown
    os.close(mine)

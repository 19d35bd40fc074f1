"""The driver against the simulated robot in its own process, in real time: motion, refusals, faults of either side; the scripted expert through it all."""
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from policy.serve import realtime
from policy.serve.drivers.mujoco import MujocoDriver
from policy.serve.interpolate import cubic
from policy.serve.robot import DriverError, RobotSpec, RobotState, Setpoints

pytest.importorskip("mujoco", reason="the simulated robot needs MuJoCo: pip install 'dipole[sim]'")
pytest.importorskip("ruckig", reason="the limiter needs ruckig: pip install 'dipole[deploy]'")
from policy.serve.limiter import Limiter

pytestmark = pytest.mark.slow  # a robot's clock cannot be shared with tests beside it: make realtime

CONF = Path(__file__).parents[2] / "conf" / "robot"


def spec_of(name: str) -> RobotSpec:
    return RobotSpec(**{k: v for k, v in yaml.safe_load((CONF / f"{name}.yaml").read_text())["spec"].items() if k != "_target_"})


GANTRY, PANDA = spec_of("gantry"), spec_of("panda_pick")
TASKS = {"gantry": "envs.gantry:Gantry", "panda_pick": "envs.panda:PandaPick"}


@pytest.fixture
def driver(tmp_path):
    driver = MujocoDriver(TASKS["gantry"], log=str(tmp_path / "log.npz"), silent=50)
    yield driver
    driver.close()


class Loop:
    """A control loop without a planner: `tick` sends a period of targets, one period ahead of its time."""

    def __init__(self, driver: MujocoDriver, robot: RobotSpec, state: RobotState):
        self.driver, self.robot, self.state, self.steps, self.period = driver, robot, state, round(driver.rate / robot.rate), 1 / robot.rate
        self.limiter = Limiter(robot, 1 / driver.rate, self.steps)
        self.sent, self.skipped = np.nan, 0
        self.restart()

    def restart(self) -> None:
        self.limiter.reset(np.asarray(self.state.info["commanded"]))
        self.start, self.k, self.sent = time.monotonic() + 0.02, 0, np.nan

    def wait(self) -> float:
        """The time of the next tick; those that are missed are left out."""
        self.k = max(self.k + 1, int((time.monotonic() - self.start) / self.period))
        now = self.start + self.k * self.period
        time.sleep(max(0.0, now - time.monotonic()))
        self.state = self.driver.read() or self.state
        return now

    def send(self, now: float, body=None) -> None:
        """body(times (n,)) -> targets (q, dq); None brakes."""
        first = now + self.period
        if time.monotonic() > first - 0.002:
            self.skipped += 1
            return
        if np.isfinite(self.sent):
            self.limiter.skip(round((first - self.sent) * self.driver.rate))
        self.sent = first + self.period
        out = self.limiter.brake() if body is None else self.limiter.follow(*body(first + (1 + np.arange(self.steps + 16)) / self.driver.rate))
        q, dq, ddq = (np.concatenate(x) for x in zip(out, self.limiter.tail(), strict=True))
        self.driver.write(Setpoints(first, 1 / self.driver.rate, q, dq, ddq))

    def run(self, seconds: float, body=None, until=lambda state: False) -> None:
        end = time.monotonic() + seconds
        while (now := self.wait()) < end and not until(self.state):
            self.send(now, body)


def swing(loop: Loop, size: float = 0.03, w: float = 6.0):
    centre, start = loop.limiter.q.copy(), time.monotonic()
    way = -np.sign(centre) * (np.arange(len(centre)) < 3)
    return lambda t: (centre + size * way * (1 - np.cos(w * (t - start)))[:, None] / 2, size * way * w * np.sin(w * (t - start))[:, None] / 2)


def wait_for(driver: MujocoDriver, what, seconds: float = 5.0) -> RobotState:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = driver.read()
        if state is not None and what(state):
            return state
        time.sleep(0.005)
    raise AssertionError("it did not come")


def within_limits(q: np.ndarray, dt: float, robot: RobotSpec) -> bool:
    limits = robot.velocity, robot.acceleration, robot.jerk
    return all((np.abs(np.diff(q, order, axis=0)).max(0) / dt**order <= (1 + 1e-6) * np.array(limit)).all() for order, limit in enumerate(limits, 1))


def test_an_episode_moves_is_recorded_and_keeps_every_limit(driver, tmp_path):
    assert driver.rate == pytest.approx(200)
    state = driver.connect(GANTRY)
    state = driver.reset(7)
    np.testing.assert_allclose(state.q, state.info["commanded"], atol=1e-6)  # nothing jumps at the start
    assert state.info["seed"] == 7 and not state.info["success"] and set(state.obs) >= {"hand", "cube", "goal"} and state.obs["hand"].dtype == np.float32
    np.testing.assert_allclose(state.obs["hand"], state.q[:3], atol=1e-6)
    loop = Loop(driver, GANTRY, state)
    loop.run(0.7, swing(loop))
    assert np.abs(loop.state.info["commanded"] - state.info["commanded"]).max() > 1e-3 and not loop.state.info["watchdog"]
    loop.run(0.4)
    driver.close()
    assert driver.summary["steps"] > 100
    with np.load(tmp_path / "log.npz") as kept:
        played = kept["commanded"][kept["episode"] == kept["episode"][-1]]
        assert within_limits(played, 0.005, GANTRY) and np.ptp(played[:, 0]) > 0.02
        assert not within_limits(played[::3], 0.005, GANTRY)  # the check can fail


def test_when_the_bridge_falls_silent_the_robot_comes_to_rest_and_wants_to_be_connected_again(driver, tmp_path):
    loop = Loop(driver, GANTRY, driver.connect(GANTRY))
    loop.run(0.5, swing(loop))
    state = wait_for(driver, lambda s: s.info["watchdog"])
    assert state.info["rest"]
    loop.state = state
    loop.restart()
    loop.run(0.15)
    assert loop.state.info["lost"] and loop.state.info["why"] == "watchdog"
    loop.state = driver.connect(GANTRY)
    assert not loop.state.info["watchdog"]
    loop.restart()
    loop.run(0.5, swing(loop))
    assert not loop.state.info["lost"] and not loop.state.info["rest"]
    driver.close()
    with np.load(tmp_path / "log.npz") as kept:
        assert within_limits(kept["commanded"], 0.005, GANTRY)


def test_a_packet_that_is_lost_or_late_is_told_and_the_robot_goes_on_from_where_it_stands(tmp_path):
    driver = MujocoDriver(TASKS["gantry"], log=str(tmp_path / "log.npz"), silent=50, extra=("--drop", ".1"))
    try:
        loop = Loop(driver, GANTRY, driver.connect(GANTRY))
        moved = []
        for _ in range(6):
            before = loop.limiter.q.copy()
            loop.run(3.0, swing(loop), until=lambda s: loop.k > 4 and (s.info["lost"] or s.info["watchdog"]))
            moved.append(np.abs(np.asarray(loop.state.info["commanded"]) - before).max() > 1e-6)
            if loop.state.info["watchdog"]:
                driver.connect(GANTRY)
            loop.state = wait_for(driver, lambda s: s.info["rest"])
            loop.restart()
        assert sum(moved[1:]) >= 2  # it goes on after a loss
        assert set(loop.state.info["refused"]) <= {"gap", "late", "watchdog"}
        driver.close()
        with np.load(tmp_path / "log.npz") as kept:
            assert within_limits(kept["commanded"], 0.005, GANTRY) and np.ptp(kept["commanded"][:, 0]) > 1e-4
    finally:
        driver.close()


def test_setpoints_that_break_a_limit_or_jump_are_refused_here(driver):
    state = driver.connect(GANTRY)
    q = np.asarray(state.info["commanded"])
    now = time.monotonic()
    with pytest.raises(DriverError, match=r"jerk of .*limiter"):
        driver.write(Setpoints(now + 0.05, 0.005, np.repeat(q[None] - 0.0003, 5, 0), np.zeros((5, 4)), np.zeros((5, 4))))
    with pytest.raises(DriverError, match="velocity"):
        driver.write(Setpoints(now + 0.05, 0.005, np.repeat(q[None] - 0.1, 5, 0), np.zeros((5, 4)), np.zeros((5, 4))))
    with pytest.raises(DriverError, match="do not fit"):
        driver.write(Setpoints(now, 0.01, q[None], q[None] * 0, q[None] * 0))
    driver.write(Setpoints(now + 0.1, 0.005, np.repeat(q[None], 5, 0), np.zeros((5, 4)), np.zeros((5, 4))))
    with pytest.raises(DriverError, match="forward in time"):
        driver.write(Setpoints(now, 0.005, np.repeat(q[None], 5, 0), np.zeros((5, 4)), np.zeros((5, 4))))


def test_stop_brings_it_to_rest_until_connected(driver):
    loop = Loop(driver, GANTRY, driver.connect(GANTRY))
    loop.run(0.4, swing(loop))
    driver.stop()
    state = wait_for(driver, lambda s: s.info["stopped"] and s.info["rest"])
    with pytest.raises(DriverError, match="connect again"):
        loop.send(time.monotonic())
    time.sleep(0.05)
    np.testing.assert_array_equal(wait_for(driver, lambda s: True).info["commanded"], state.info["commanded"])
    assert not driver.connect(GANTRY).info["stopped"]


@pytest.mark.parametrize("end", ["close", "SIGTERM", "parent"])
def test_however_it_is_ended_it_comes_to_rest_first(driver, tmp_path, end):
    loop = Loop(driver, GANTRY, driver.connect(GANTRY))
    loop.run(0.5, swing(loop, size=0.1, w=8.0))
    process = driver.process
    assert np.abs(loop.limiter.dq).max() > 0.05  # in the middle of it
    {"close": driver.close, "SIGTERM": process.terminate, "parent": process.stdin.close}[end]()
    assert process.wait(5) == 0
    process.stdout.close()
    driver.process = None
    with np.load(tmp_path / "log.npz") as kept:
        q = kept["commanded"]
        assert within_limits(q, 0.005, GANTRY) and (q[-90:] == q[-1]).all() and (q[-140:] != q[-1]).any()
        assert np.abs(kept["qvel"][-1, :3]).max() < 1e-3  # the axes follow with a time constant of their own


def test_a_robot_that_died_or_stands_still_is_told(driver):
    driver.silent = 3
    driver.connect(GANTRY)
    os.kill(driver.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DriverError, match=r"said nothing for \d+ ms"):
            for _ in range(200):
                time.sleep(0.01)
                driver.read()
    finally:
        os.kill(driver.process.pid, signal.SIGCONT)
        driver.silent = 500
    wait_for(driver, lambda s: s.info["slips"] >= 0)
    driver.process.kill()
    with pytest.raises(DriverError, match="ended with -9"):
        for _ in range(200):
            time.sleep(0.01)
            driver.read()


def test_the_wrong_robot_or_none_is_told(driver):
    with pytest.raises(DriverError, match="connect before"):
        driver.write(Setpoints(0.0, 0.005, np.zeros((1, 4)), np.zeros((1, 4)), np.zeros((1, 4))))
    with pytest.raises(DriverError, match="8 joints for task PandaPick"):
        driver.connect(PANDA)
    with pytest.raises(DriverError, match="did not start"):
        MujocoDriver("envs.gantry:REACH").connect(GANTRY)
    other = MujocoDriver(TASKS["gantry"], port=driver.port)  # one bridge at a time
    loop = Loop(driver, GANTRY, driver.connect(GANTRY))
    loop.run(0.1)
    missed = other.rate
    with pytest.raises(DriverError, match="no other bridge"):
        end = time.monotonic() + 0.5
        other._ask = lambda *a, ask=MujocoDriver._ask, **k: _while_moving(loop, end, ask, other, *a)
        other.connect(GANTRY, timeout=0.3)
    assert missed == driver.rate
    other.close()


def _while_moving(loop: Loop, end: float, ask, other: MujocoDriver, *args):
    """`ask` of the other driver, while the first one goes on talking."""
    import threading
    failed: list[BaseException] = []

    def run() -> None:
        try:
            ask(other, *args)
        except DriverError as e:
            failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    loop.run(end - time.monotonic())
    thread.join()
    if failed:
        raise failed[0]


def play_expert(driver: MujocoDriver, robot: RobotSpec, task, seed: int, how: str) -> tuple[bool, float, np.ndarray]:
    """Whether the scripted expert, asked at the task's rate, succeeds through limiter and driver; its time [s]; peaks as shares of the limits."""
    loop, expert, dt = Loop(driver, robot, driver.reset(seed)), task.expert(1, seed), 1 / task.fps
    due, knots, t0 = 0.0, loop.limiter.q[None], 0.0
    while not (loop.state.info["success"] or loop.state.info["over"]):
        now = loop.wait()
        if loop.state.info["lost"]:  # a busy computer: what a bridge does then
            loop.limiter.reset(np.asarray(loop.state.info["commanded"]))
            if not loop.state.info["rest"]:
                driver.write(Setpoints(now + loop.period, 1 / driver.rate, loop.limiter.q[None], loop.limiter.dq[None], loop.limiter.ddq[None]))
                continue
            loop.sent, due = np.nan, 0.0
        if now >= due - 1e-6:
            action = expert.act({key: value[None] for key, value in loop.state.obs.items()})[0].clip(robot.lower, robot.upper)
            knots, t0 = (np.stack([loop.limiter.q, action]), now) if how == "cubic" else (action[None], now)
            due = now + dt if not due else due + dt
        loop.send(now, lambda t, knots=knots, t0=t0: _rated(cubic(knots, (t - t0) / dt), dt))
    peak = np.asarray(loop.state.info["peak"])
    return bool(loop.state.info["success"]), float(loop.state.info["elapsed"]), (peak / [robot.velocity, robot.acceleration, robot.jerk]).max(1)


def _rated(motion, dt: float) -> tuple[np.ndarray, np.ndarray]:
    q, dq = motion
    return q, dq / dt


@pytest.mark.slow
@pytest.mark.parametrize("robot, how", [(GANTRY, "hold"), (PANDA, "cubic")], ids=lambda one: getattr(one, "name", one))
def test_the_expert_succeeds_through_limiter_and_driver_in_real_time(robot, how):
    from envs.gantry import Gantry
    from envs.panda import PandaPick
    task = {"gantry": Gantry, "panda_pick": PandaPick}[robot.name]()
    driver = MujocoDriver(TASKS[robot.name], silent=50)
    realtime.claim()
    try:
        driver.connect(robot)
        done = [play_expert(driver, robot, task, 500 + k, how) for k in range(20)]
    finally:
        realtime.release()
        driver.close()
    success, seconds, peaks = (np.array(x) for x in zip(*done, strict=True))
    print(f"{robot.name} {how}: {success.sum()} of 20 in {seconds.mean():.2f} s, peaks {peaks.max(0).round(3)} of the limits, {driver.summary}")
    assert success.sum() >= 19 and (peaks <= 1 + 1e-6).all()

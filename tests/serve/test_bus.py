"""The position bus: calibration, limits, lost messages, and Feetech's own SDK over a serial line to servos in another process (tests/serve/fake_servos.py)."""
import math
import sys
import time

import numpy as np
import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from policy.serve.drivers.bus import BusDriver, Calibration
from policy.serve.robot import DriverError, RobotSpec, Setpoints
from tests.serve.far_side import ROOT, FarSide, fails, until

CONF = OmegaConf.load(ROOT / "conf/robot/so101.yaml")
SO101 = instantiate(CONF.spec)
STALE = 0.4  # s; twice the default, for loaded machines
SPEC = RobotSpec("two", ["lift", "gripper"], ["rad", "1"], [-1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [5.0, 5.0], [50.0, 50.0], rate=30.0)
CALIBRATION = {"lift": {"range": [-70, 90], "sign": -1, "offset": 12.0, "scale": math.pi / 180}, "gripper": {"range": [0, 100], "scale": 0.01}}


class Servos:
    """A bus in this process; positions are the goals. `lost`: calls that fail next, by name."""

    def __init__(self):
        self.positions, self.goals, self.lost, self.log = {"lift": 12.0, "gripper": 50.0}, [], {"read_positions": 0, "write_goals": 0}, []
        self.frozen = False

    def _lose(self, call):
        if self.lost[call]:
            self.lost[call] -= 1
            raise TimeoutError("no answer")

    def connect(self):
        self.log.append("connect")

    def read_positions(self):
        self._lose("read_positions")
        return dict(self.positions)

    def write_goals(self, goals):
        self._lose("write_goals")
        self.goals.append(dict(goals))
        if not self.frozen:
            self.positions.update(goals)

    def torque(self, on):
        self.log.append(f"torque {on}")

    def close(self):
        self.log.append("close")


def to(q, n: int = 3) -> Setpoints:
    q = np.tile(np.asarray(q, float), (n, 1))
    return Setpoints(time.monotonic(), 1 / 30, q, 0 * q, 0 * q)


@pytest.fixture
def servos():
    return Servos()


@pytest.fixture
def driver(servos):
    driver = BusDriver(servos, CALIBRATION, rate=100, stale=STALE, follow=5.0, obs={"state": "q"})
    driver.connect(SPEC)
    yield driver
    driver.close()


def test_calibration_by_hand():
    """Shoulder lift: zero where the bus says 12, turning the other way, in rad."""
    mark = Calibration(range=(-70, 90), sign=-1, offset=12.0, scale=math.pi / 180)
    assert mark.decode(12.0) == 0 and mark.decode(102.0) == pytest.approx(-math.pi / 2) and mark.encode(math.pi / 4) == pytest.approx(-33.0)
    assert Calibration(range=(0, 100), scale=0.01).decode(25.0) == 0.25


@given(st.sampled_from([-1, 1]), st.floats(-180, 180), st.floats(1e-3, 10), st.floats(-200, 200))
def test_calibration_round_trip(sign, offset, scale, bus):
    mark = Calibration(range=(-200, 200), sign=sign, offset=offset, scale=scale)
    assert mark.encode(mark.decode(bus)) == pytest.approx(bus, abs=1e-9)


@pytest.mark.parametrize("wrong", [{"sign": 0}, {"scale": 0.0}, {"scale": -1.0}, {"offset": math.nan}, {"range": (3.0, 3.0)}, {"range": (1.0,)}])
def test_a_calibration_that_is_none(wrong):
    with pytest.raises(ValueError):
        Calibration(**{"range": (-1.0, 1.0), **wrong})


def test_units_of_the_policy_on_one_side_of_the_bus_on_the_other(driver, servos):
    assert servos.log == ["connect", "torque True"] and not servos.goals  # connecting moves nothing
    driver.write(to([math.pi / 4, 0.3]))
    until(lambda: servos.goals and servos.goals[-1] == pytest.approx({"lift": -33.0, "gripper": 30.0}))
    until(lambda: (s := driver.read()) is not None and s.q == pytest.approx([math.pi / 4, 0.3]) and s.obs["state"] == pytest.approx(s.q))


def test_velocity_is_the_change_between_readings(driver, servos):
    start = time.monotonic()
    speeds = []
    while time.monotonic() - start < 0.5:
        servos.positions["lift"] = 12.0 - 20.0 * (time.monotonic() - start)  # degrees, the other way round
        if (state := driver.read()) is not None:
            speeds.append(state.dq[0])
        time.sleep(0.002)
    assert np.median(speeds) == pytest.approx(math.radians(20), rel=0.25)


def test_goals_never_leave_the_calibrated_range(driver, servos):
    driver.write(to([1.7, 1.4]))  # nothing the limiter lets through
    until(lambda: servos.goals and servos.goals[-1] == pytest.approx({"lift": -70.0, "gripper": 100.0}))


def test_limits_beyond_the_range_and_other_joints_are_refused(servos):
    for change, why in (({"lift": {**CALIBRATION["lift"], "range": [-20, 90]}}, "limits of lift .*beyond its range -20 … 90.*narrow"),
                        ({"lift": CALIBRATION["lift"]}, "calibrated are lift: calibrate")):
        given_marks = change if len(change) == 1 and "calibrated" in why else {**CALIBRATION, **change}
        with pytest.raises(DriverError, match=why):
            BusDriver(servos, given_marks).connect(SPEC)
    assert servos.log == []  # nothing was touched


def test_some_lost_messages_are_counted_and_survived(driver, servos):
    driver.write(to([0.1, 0.5]))
    servos.lost.update(read_positions=3, write_goals=3)
    until(lambda: not any(servos.lost.values()))
    until(lambda: servos.goals and servos.goals[-1]["gripper"] == pytest.approx(50.0))  # the goal is sent again
    until(lambda: (s := driver.read()) is not None and s.info["lost_reads"] == 3 and s.info["lost_writes"] == 3)


def test_readings_that_stop_are_an_error(driver, servos):
    servos.lost["read_positions"] = 10**9
    fails(driver.read, "gone", 0.5 + STALE)


def test_goals_that_are_not_taken_are_an_error(driver, servos):
    driver.write(to([0.1, 0.5]))
    servos.lost["write_goals"] = 10**9
    fails(driver.read, "taken no goals.*cable and power", 0.5 + STALE)


def test_a_servo_that_does_not_follow_is_an_error(driver, servos):
    servos.frozen = True
    driver.write(to([0.5, 0.5]))
    fails(driver.read, "servo lift stays 28.6 behind its goal: overloaded", 3.0)


def test_a_servo_that_is_missing_or_says_nan_is_an_error(driver, servos):
    servos.positions["lift"] = math.nan
    fails(driver.read, "NaN for lift", 1.0)
    driver.connect(SPEC) if servos.positions.update(lift=12.0) is None else None
    del servos.positions["lift"]
    fails(driver.read, "does not tell of lift: check cables and ids", 1.0)


def test_stop_makes_the_place_the_goal_and_refuses_until_connect(driver, servos):
    driver.write(to([0.0, 0.5]))
    until(lambda: len(servos.goals) > 3)
    servos.frozen = True  # a servo on its way: goal 0, place 0.2 rad
    servos.positions["lift"] = 12.0 - math.degrees(0.2)
    until(lambda: driver.read() is not None and driver._before is not None and driver._before[1][0] == pytest.approx(0.2))
    driver.stop()
    until(lambda: servos.goals[-1]["lift"] == pytest.approx(12.0 - math.degrees(0.2)))
    with pytest.raises(DriverError, match="connect"):
        driver.write(to([0.0, 0.5]))


def test_servos_keep_their_torque_unless_told(servos):
    BusDriver(servos, CALIBRATION, release=True).connect(SPEC)
    for release, last in ((False, ["close"]), (True, ["torque False", "close"])):
        driver = BusDriver(bus := Servos(), CALIBRATION, release=release)
        driver.connect(SPEC)
        driver.close()
        assert bus.log[2:] == last


def test_a_bus_that_cannot_be_opened(servos):
    def no():
        raise ConnectionError("/dev/ttyACM0 cannot be opened")
    servos.connect = no
    fails(lambda: BusDriver(servos, CALIBRATION).connect(SPEC), "cannot be opened. Check cable and power", 1.0)
    servos.connect = lambda: time.sleep(3)
    fails(lambda: BusDriver(servos, CALIBRATION).connect(SPEC, timeout=0.2), "does not answer within 0.2 s", 1.0)


# Feetech's SDK, servos in another process


@pytest.fixture
def so101():
    pytest.importorskip("scservo_sdk", reason="needs Feetech's SDK: pip install 'dipole[bus]'")
    if sys.platform == "win32":
        pytest.skip("no pseudo terminals")
    far = FarSide("tests.serve.fake_servos", *range(1, 7))
    driver = instantiate(CONF.driver, bus={"port": far.hello["port"]}, stale=STALE)
    yield far, driver
    driver.close()
    far.close()


def test_servos_follow_over_the_serial_line(so101):
    """Every joint to its own place, within a step of 360/4096 degrees: packets, ids, signs and the gripper's per cent are right."""
    far, driver = so101
    far.ask("state")
    first = driver.connect(SO101)
    assert first.q[:5] == pytest.approx(np.zeros(5)) and first.q[5] == pytest.approx(9.09)
    assert far.ask("state")["torque"] == [1] * 6 and far.ask("state")["goals"] == [2048] * 6  # they hold where they were
    goal = np.array([10.0, -20.0, 30.0, -40.0, 50.0, 75.0])
    driver.write(to(goal))
    until(lambda: (s := driver.read()) is not None and np.abs(s.q - goal).max() < 0.1)
    steps = [2048 + d * 4096 / 360 for d in (10, -20, 30, -40, 50, 75 / 0.909 - 10)]
    assert far.ask("state")["steps"] == pytest.approx(steps, abs=2.0)


def test_the_line_drops_messages_and_the_driver_goes_on(so101):
    far, driver = so101
    driver.connect(SO101)
    driver.write(to(np.zeros(6)))
    far.ask("deaf 3")
    far.ask("dumb 3")
    until(lambda: (s := driver.read()) is not None and s.info["lost_reads"] >= 3)
    goal = np.full(6, 15.0)
    driver.write(to(goal))
    until(lambda: (s := driver.read()) is not None and np.abs(s.q - goal).max() < 0.1)


def test_servos_that_vanish_or_go_limp_are_noticed(so101):
    far, driver = so101
    driver.connect(SO101)
    driver.write(to(np.full(6, 50.0)))
    until(lambda: (s := driver.read()) is not None and np.abs(s.q - 50).max() < 0.1)
    far.ask("limp")
    driver.write(to(np.zeros(6)))
    fails(driver.read, "behind its goal: overloaded, limp", 5.0)
    driver.connect(SO101)
    far.kill()
    fails(driver.read, "gone", 0.5 + STALE)


def test_the_robots_own_time_out_holds_it(so101):
    """The driver dies on the way (its stream ends): the servos stay where they are half a second later."""
    far, driver = so101
    driver.connect(SO101)
    driver.write(to(np.full(6, 90.0)))
    until(lambda: far.ask("state")["steps"][0] > 2148)
    driver._ending.set()
    driver._thread.join()
    until(lambda: (s := far.ask("state"))["goals"][0] == round(s["steps"][0]))


def test_wrong_ports_and_silent_servos_say_what_to_check():
    pytest.importorskip("scservo_sdk", reason="needs Feetech's SDK: pip install 'dipole[bus]'")
    driver = instantiate(CONF.driver, bus={"port": "/dev/not-there"})
    fails(lambda: driver.connect(SO101), "not-there.*Check cable and power", 1.0)
    far = FarSide("tests.serve.fake_servos", 1, 2, 3)
    try:
        driver = instantiate(CONF.driver, bus={"port": far.hello["port"]})
        fails(lambda: driver.connect(SO101), r"servo wrist_flex \(id 4\) does not answer", 2.0)
    finally:
        far.close()

"""What drivers share: playback of setpoints, the robot's clock, bounded calls, and the thread around them."""
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from policy.serve.drivers.stream import Clock, Gone, Playback, Streamed, within
from policy.serve.robot import DriverError, RobotSpec, Setpoints
from tests.serve.far_side import ROOT, until

SPEC = RobotSpec("two", ["a", "b"], ["rad", "rad"], [-1, -1], [1, 1], [1, 1], [1, 1], [1, 1])


def ramp(t0: float, n: int = 5, dt: float = 0.1, start: float = 0.0) -> Setpoints:
    """q = start + time since t0, velocity 1, at rest at the last."""
    q = start + np.arange(n)[:, None] * dt * np.ones(2)
    dq = np.ones((n, 2))
    dq[-1] = 0
    return Setpoints(t0, dt, q, dq, 0 * q)


class Toy(Streamed):
    """A robot in this process that is where it was told to be."""

    def __init__(self, **options):
        super().__init__("the toy", rate=options.pop("rate", 200.0), stale=options.pop("stale", 0.3), **options)
        self.told: list[tuple[float, float]] = []
        self.log: list[str] = []
        self.mute = self.nan = False
        self.trouble: Exception | None = None

    def _open(self, robot, timeout):
        self.q = np.zeros(2)

    def _tick(self, point):
        if self.trouble:
            raise self.trouble
        if point is not None:
            self.q = point[0]
            self.told.append((time.monotonic(), point[0][0]))
        return None if self.mute else self._state(time.monotonic(), self.q * (np.nan if self.nan else 1), np.zeros(2))

    def _halt(self):
        self.log.append("halt")

    def _release(self):
        self.log.append("release")


@pytest.fixture
def toy():
    toy = Toy(obs={"state": ["q", "dq"]})
    toy.connect(SPEC)
    yield toy
    toy.close()


def test_playback_is_linear_between_setpoints_and_rests_at_the_end():
    play = Playback()
    assert play.at(0.0) is None
    play.put(ramp(10.0))
    for t, q in ((9.0, 0.0), (10.0, 0.0), (10.15, 0.15), (10.3, 0.3), (10.4, 0.4), (99.0, 0.4)):
        assert play.at(t)[0] == pytest.approx([q, q])
    assert play.at(10.15)[1] == pytest.approx([1, 1]) and play.at(99.0)[1] == pytest.approx([0, 0])


def test_new_setpoints_take_over_when_they_are_due_not_when_they_come():
    play = Playback()
    play.put(ramp(10.0))
    play.put(ramp(10.2, start=5.0))
    assert play.at(10.1)[0][0] == pytest.approx(0.1) and play.at(10.3)[0][0] == pytest.approx(5.1)
    play.put(ramp(10.2, start=7.0))  # replaces what starts no earlier
    assert play.at(10.25)[0][0] == pytest.approx(7.05)
    play.put(ramp(10.1, n=1, start=9.0))
    assert play.at(10.3)[0][0] == 9.0 and play.at(10.05)[0][0] == pytest.approx(0.05)


def test_playback_keeps_up_with_a_stream_whose_setpoints_always_lie_ahead():
    play = Playback()
    for k in range(100):
        play.put(ramp(10.0 + 0.02 * k + 0.05, start=float(k)))
    assert play.at(10.0 + 0.02 * 99)[0][0] == pytest.approx(96.01)


def test_the_clock_takes_the_quickest_message_for_the_offset():
    clock, offset = Clock(), 100.0
    rng = np.random.default_rng(0)
    errors = []
    for k in range(500):
        true = k * 0.01
        delay = 0.001 + rng.exponential(0.004)
        here = clock.here(true, true + offset + delay, true + offset + delay - 0.02)
        errors.append(here - (true + offset))
    assert 0.0009 < np.mean(errors[100:]) < 0.002  # the shortest delay, not the mean one (5 ms)


def test_a_clock_that_runs_slow_does_not_make_states_old():
    """A simulated robot at 80 % of real time: every state is still no older than the look before."""
    clock = Clock()
    for k in range(1, 500):
        now = k * 0.01
        assert now - 0.0101 <= clock.here(0.8 * now, now, now - 0.01) <= now


def test_within_gives_up_in_time_and_hands_errors_on():
    start = time.monotonic()
    with pytest.raises(DriverError, match="too late"):
        within(0.1, lambda: time.sleep(3), "too late")
    assert time.monotonic() - start < 1
    with pytest.raises(KeyError):
        within(1.0, lambda: {}["absent"], "too late")
    assert within(1.0, lambda: 7, "too late") == 7


def test_setpoints_are_played_and_the_tail_is_rest(toy):
    t0 = time.monotonic() + 0.05
    toy.write(ramp(t0, n=4, dt=0.05))
    until(lambda: toy.told and toy.told[-1][1] == pytest.approx(0.15))
    moving = [(t, q) for t, q in toy.told if t0 + 0.01 < t < t0 + 0.14]
    assert len(moving) > 3 and max(abs(q - (t - t0)) for t, q in moving) < 0.03
    state = toy.read()
    assert state.q == pytest.approx([0.15, 0.15]) and state.obs["state"].shape == (4,) and state.obs["state"].dtype == np.float32


def test_read_gives_every_state_once(toy):
    toy.mute = True
    until(lambda: toy.read() is None)
    assert toy.read() is None


def test_what_the_policy_sees_beside_the_joints():
    toy = Toy(obs={"joints": "q"}, sense=lambda state: {"camera": np.full((2, 2), state.q[0])})
    try:
        toy.connect(SPEC)
        until(lambda: (state := toy.read()) is not None and set(state.obs) == {"joints", "camera"} and state.obs["camera"].shape == (2, 2))
    finally:
        toy.close()
    with pytest.raises(ValueError, match="torque"):
        Toy(obs={"state": ["q", "torque"]})


def test_silence_is_an_error_soon(toy):
    toy.mute = True
    start = time.monotonic()
    with pytest.raises(Gone, match="gone"):
        until(lambda: toy.read() == "never")
    assert 0.2 < time.monotonic() - start < 1.5
    with pytest.raises(DriverError):
        toy.write(ramp(time.monotonic()))
    assert "halt" not in toy.log  # nobody hears it


def test_nan_is_an_error_and_stops_the_robot(toy):
    toy.nan = True
    with pytest.raises(DriverError, match="NaN for a, b"):
        until(lambda: toy.read() == "never")
    until(lambda: "halt" in toy.log)


def test_a_fault_of_the_robot_stops_it_and_stays(toy):
    toy.trouble = DriverError("reflex: release it")
    for _ in range(2):
        with pytest.raises(DriverError, match="reflex"):
            until(lambda: toy.read() == "never")
    until(lambda: toy.log == ["halt"])


def test_after_stop_nothing_is_written_until_connect(toy):
    toy.stop()
    with pytest.raises(DriverError, match="connect"):
        toy.write(ramp(time.monotonic()))
    until(lambda: toy.log == ["halt"])
    until(lambda: toy.read() is not None)  # it is still watched
    told = len(toy.told)
    toy.connect(SPEC)
    toy.write(ramp(time.monotonic()))
    until(lambda: len(toy.told) > told)
    assert toy.log == ["halt", "release"]


@pytest.mark.parametrize("q, why", [(np.full((3, 2), np.nan), "NaN"), (np.zeros((3, 3)), r"\(n, 2\)"), (np.zeros((0, 2)), r"\(n, 2\)"),
                                    (np.zeros(2), r"\(n, 2\)")])
def test_setpoints_that_are_none_are_refused(toy, q, why):
    with pytest.raises(DriverError, match=why):
        toy.write(Setpoints(time.monotonic(), 0.01, q, 0 * np.nan_to_num(q), 0 * np.nan_to_num(q)))


def test_nothing_works_before_connect_and_threads_end():
    toy = Toy()
    with pytest.raises(DriverError, match="connect"):
        toy.read()
    with pytest.raises(DriverError):
        toy.write(ramp(0.0))
    toy.stop()
    toy.close()
    toy.connect(SPEC)
    toy.close()
    assert not [t for t in threading.enumerate() if "toy" in t.name] and toy.log == ["halt", "release"]


@pytest.mark.parametrize("module, absent, extra", [("ur", "rtde_control", "ur"), ("franka", "franky", "franka"), ("feetech", "scservo_sdk", "bus")])
def test_an_absent_package_is_named_with_the_pip_line(module, absent, extra):
    code = f"import sys; sys.modules[{absent!r}] = None; import policy.serve.drivers.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and f"pip install 'dipole[{extra}]'" in done.stderr.strip().splitlines()[-1]


def test_a_robot_that_says_nothing_is_not_connected():
    toy = Toy(stale=2.0)
    toy.mute = True
    with pytest.raises(DriverError, match="tells nothing"):
        toy.connect(SPEC, timeout=0.2)
    assert toy.log == ["halt", "release"]

"""The Franka driver: faults by a stand-in of franky, and, marked slow, real libfranka over the network to franky-sim in its own process.

franky-sim needs other versions of MuJoCo than this project, so it gets a virtual environment of its own, once, under $DIPOLE_TEST_CACHE or
~/.cache/dipole-tests; where pip cannot make it, these tests are skipped with pip's words.
"""
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

pytest.importorskip("franky", reason="needs franky: pip install 'dipole[franka]'")

import franky

from policy.serve.drivers import franka
from policy.serve.drivers.franka import FrankaDriver
from policy.serve.robot import DriverError, RobotSpec, Setpoints
from tests.serve.far_side import ROOT, drive, fails, free_address, sine

pytestmark = pytest.mark.franka
CONF = OmegaConf.load(ROOT / "conf/robot/franka.yaml")
SPEC = instantiate(CONF.spec)
ARM_SPEED = (2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26)  # rad/s, https://frankarobotics.github.io/docs/control_parameters.html
FRANKY_SIM = "franky-sim==1.0.4"
STALE = 0.4  # s; twice the default, for loaded machines


# Faults


class Arm:
    """franky.Robot and its tracker, as far as the driver goes."""

    def __init__(self, mode: str = "Idle", recovers: bool = True):
        self.mode, self.recovers = getattr(franky.RobotMode, mode), recovers
        self.q, self.began, self.ended, self.targets, self.recovered, self.stopped = np.zeros(7), time.monotonic(), None, [], 0, 0

    def __call__(self, host, **options):
        return self

    @property
    def state(self):
        return SimpleNamespace(q=self.q, dq=np.zeros(7), time=SimpleNamespace(to_sec=lambda: time.monotonic() - self.began), robot_mode=self.mode,
                               control_command_success_rate=1.0, last_motion_errors="[cartesian_reflex]")

    def recover_from_errors(self):
        self.recovered += 1
        return self.recovers

    def tracker(self, robot, **options):
        return self

    @property
    def is_running(self):
        return self.ended is None

    @property
    def model(self):
        return SimpleNamespace(mass=lambda state: 2 * np.eye(7))

    def set_target(self, q, dq, tau_ff):
        self.targets.append((q, dq, tau_ff))

    def join_motion(self, timeout=None):
        raise self.ended

    def stop(self):
        self.stopped += 1

    def move(self, motion, asynchronous):
        self.stopped += 1


def connected(monkeypatch, arm: Arm) -> FrankaDriver:
    monkeypatch.setattr(franka.franky, "Robot", arm)
    monkeypatch.setattr(franka.franky, "JointImpedanceTracker", arm.tracker)
    driver = FrankaDriver("arm", realtime=False, stale=STALE, feedforward=True)
    driver.connect(SPEC)
    return driver


@pytest.mark.parametrize("error, why", [
    (franky.ControlException("libfranka: Move command aborted: motion aborted by reflex! [cartesian_reflex]"), "reflex.*re-arm"),
    (franky.NetworkException("libfranka: UDP receive: Timeout"), "Timeout. Check cable"),
    (franky.CommandException("libfranka: command rejected: User stopped"), "unlock the joints"),
])
def test_what_ends_control_says_what_to_do(monkeypatch, error, why):
    arm = Arm()
    driver = connected(monkeypatch, arm)
    arm.ended = error
    fails(driver.read, why, 0.5 + STALE)
    with pytest.raises(DriverError, match=why):
        driver.write(hold(np.zeros(7)))
    driver.close()


def test_nan_ends_the_stream_and_stops_the_arm(monkeypatch):
    arm = Arm()
    driver = connected(monkeypatch, arm)
    arm.q = np.full(7, np.nan)
    fails(driver.read, "NaN for joint1", 0.5 + STALE)
    end = time.monotonic() + 2
    while not arm.stopped:
        assert time.monotonic() < end
        time.sleep(0.01)
    driver.close()


def test_connect_recovers_from_a_reflex_but_not_from_people(monkeypatch):
    arm = Arm("Reflex")
    connected(monkeypatch, arm).close()
    assert arm.recovered == 1
    for arm, why in ((Arm("Reflex", recovers=False), "cartesian_reflex"), (Arm("UserStopped"), "stopped by its user"), (Arm("Guiding"), "guided by hand")):
        with pytest.raises(DriverError, match=why):
            connected(monkeypatch, arm)


def test_positions_velocities_and_torques_reach_the_tracker(monkeypatch):
    arm = Arm()
    driver = connected(monkeypatch, arm)
    q = np.full((1, 7), 0.25)
    driver.write(Setpoints(time.monotonic(), 0.01, q, 0 * q, 6 * q))
    end = time.monotonic() + 2
    while not arm.targets:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert arm.targets[-1][0] == pytest.approx(np.full(7, 0.25)) and arm.targets[-1][1] == pytest.approx(np.zeros(7))
    assert arm.targets[-1][2] == pytest.approx(np.full(7, 3.0))  # Nm: mass 2 times 1.5 rad/s^2
    driver.close()


def test_what_keeps_an_arm_from_being_connected():
    fails(lambda: FrankaDriver(free_address(1337), realtime=False).connect(SPEC), "refused.*activate FCI", 1.0)
    with socket.socket() as silent:  # accepts and says nothing
        host = free_address(1337)
        silent.bind((host, 1337))
        silent.listen()
        fails(lambda: FrankaDriver(host, realtime=False).connect(SPEC, timeout=0.3), "does not answer within 0.3 s.*cable", 1.5)
    six = RobotSpec("six", SPEC.joints[:6], *(getattr(SPEC, k)[:6] for k in ("units", "lower", "upper", "velocity", "acceleration", "jerk")))
    fails(lambda: FrankaDriver("arm").connect(six), "has 7 joints, but robot six has 6", 1.0)
    with pytest.raises(ValueError, match="7 numbers"):
        FrankaDriver("arm", stiffness=[1.0])


def test_the_configuration_builds_the_driver():
    driver = instantiate({**OmegaConf.to_container(CONF.driver), "host": "127.0.0.1"}, _convert_="all")
    assert isinstance(driver, FrankaDriver) and driver.rate % SPEC.rate == 0 and driver.obs == {"state": ("q",)}


def hold(q: np.ndarray) -> Setpoints:
    return Setpoints(time.monotonic(), 0.01, q[None], 0 * q[None], 0 * q[None])


# Real libfranka, simulated arm


@pytest.fixture(scope="module")
def franky_sim() -> Path:
    """The program, in its own virtual environment."""
    home = Path(os.environ.get("DIPOLE_TEST_CACHE") or Path.home() / ".cache/dipole-tests") / f"{FRANKY_SIM}-py{sys.version_info.major}{sys.version_info.minor}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / f"{home.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            for command in ([sys.executable, "-m", "venv", "--clear", home], [home / "bin/pip", "install", "-q", FRANKY_SIM]):
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"{FRANKY_SIM} cannot be installed: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
            (home / "complete").touch()
    return home / "bin/franky-sim"


class Sim:
    def __init__(self, program: Path):
        self.host = free_address(1337)
        self.process = subprocess.Popen([program, "-s", "mujoco", "--hostname", self.host], stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "Connect to the server" in line:
                return
        raise AssertionError("franky-sim did not start")

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def sim(franky_sim):
    sim = Sim(franky_sim)
    yield sim
    sim.close()


@pytest.fixture
def driver(sim):
    driver = FrankaDriver(sim.host, realtime=False, stale=STALE)
    yield driver
    driver.close()


def at_rest(driver: FrankaDriver, seconds: float) -> np.ndarray:
    """Where the arm stands, once it does."""
    end = time.monotonic() + seconds
    while True:
        state = driver.read()
        if state is not None and np.abs(state.dq).max() < 0.01:
            return state.q
        assert time.monotonic() < end, f"still moving at {state and state.dq}"
        time.sleep(0.01)


@pytest.mark.slow
def test_libfranka_follows_a_sine_and_rests_when_the_stream_ends(driver, record_property):
    q0 = driver.connect(SPEC).q
    target = sine(q0, 0.25, 0.35)
    seen = drive(driver, SPEC, q0, 4.0, target)
    error = np.abs(seen["q"] - target(seen["t"].clip(0))[0]).max(1)
    numbers = {"states": len(seen["t"]), "error p50 [rad]": np.median(error), "error max [rad]": error.max(), "age p50 [ms]": 1e3 * np.median(seen["age"]),
               "period late p50 [ms]": 1e3 * np.median(seen["late"]), "period late max [ms]": 1e3 * seen["late"].max()}
    for key, value in numbers.items():
        record_property(key, f"{value:.4g}")
    print({k: f"{v:.4g}" for k, v in numbers.items()})
    assert len(seen["t"]) > 100 and np.abs(seen["q"] - q0).max() > 0.4
    assert np.median(error) < 0.03 and error.max() < 0.1
    assert np.abs(at_rest(driver, 3.0) - seen["rest"]).max() < 0.03  # nothing was written since: the tail's end


@pytest.mark.slow
@pytest.mark.xfail(strict=False, reason="not understood: in 6 of 32 runs on two busy cores (3 of 16 with and 3 of 16 without feedforward) the simulated arm "
                                        "became unstable after the jump, up to 10 times its speed limit; the setpoints were inside theirs")
def test_a_jump_stays_inside_the_arms_own_limits(driver):
    """Told to be .8 rad away at once: the limiter keeps setpoints to half the arm's speed, the impedance controller overshoots them by 20 to 90 %."""
    q0 = driver.connect(SPEC).q
    seen = drive(driver, SPEC, q0, 2.0, lambda t: (np.tile(q0 + 0.8 * np.array([1, 1, 1, -1, 1, 1, 1]), (len(t), 1)), np.zeros((len(t), 7))))
    print({"top speed": np.abs(seen["dq"]).max(0).round(3).tolist()})
    assert (seen["q"] >= SPEC.lower).all() and (seen["q"] <= SPEC.upper).all()
    assert (np.abs(seen["dq"]).max(0) <= ARM_SPEED).all()
    assert np.abs(seen["dq"]).max() > 1.0 and np.abs(seen["q"][-1] - seen["rest"]).max() < 0.05


@pytest.mark.slow
def test_stop_brings_the_arm_to_rest_and_connect_takes_it_up_again(driver):
    q0 = driver.connect(SPEC).q
    drive(driver, SPEC, q0, 0.8, sine(q0, 0.25, 0.35))
    driver.stop()
    with pytest.raises(DriverError, match="connect"):
        driver.write(hold(q0))
    rest = at_rest(driver, 3.0)
    again = driver.connect(SPEC).q
    assert np.abs(again - rest).max() < 0.02
    drive(driver, SPEC, again, 0.5, sine(again, 0.25, 0.35))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_arm_that_vanishes_is_noticed(sim, driver, how):
    driver.connect(SPEC)
    sim.process.send_signal(how)
    fails(driver.read, "gone|cable", 0.5 + STALE)


CHILD = """
import sys
from tests.serve.test_franka import SPEC, FrankaDriver, drive, sine
driver = FrankaDriver(sys.argv[1], realtime=False)
q0 = driver.connect(SPEC).q
print("moving", flush=True)
drive(driver, SPEC, q0, 60.0, sine(q0, .25, .35))
"""


@pytest.mark.slow
def test_our_process_dies_and_the_arm_stands_still(sim, driver):
    child = subprocess.Popen([sys.executable, "-c", CHILD, sim.host], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None and child.stdout.readline() == "moving\n"
    time.sleep(0.8)  # it moves by now
    child.kill()
    child.wait()
    child.stdout.close()
    driver.connect(SPEC)
    before = at_rest(driver, 3.0)
    time.sleep(0.3)
    assert np.abs(at_rest(driver, 1.0) - before).max() < 0.005

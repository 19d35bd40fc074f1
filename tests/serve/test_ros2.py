"""The ROS 2 driver in front of robots in their own processes: our own controller over Cyclone DDS, and real rclpy nodes."""
import itertools
import json
import os
import re
import secrets
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policy.serve.robot import DriverError, RobotSpec, Setpoints

pytest.importorskip("cyclonedds", reason="pip install 'dipole[ros2]'")
pytest.importorskip("ruckig", reason="pip install 'dipole[deploy]'")

from tests.serve.ros2_parts import HOME, JOINTS, PERIOD, RATE, ROBOT, Commander, Far, at_rest, connected, far, until, wave

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place() -> dict[str, Any]:
    """A domain and a namespace for this test alone, whoever else tests on this computer."""
    return {"domain": 1 + secrets.randbelow(100), "namespace": f"test_{secrets.token_hex(4)}"}


def refusal(place: dict[str, Any], expected: str, robot: RobotSpec = ROBOT, **options: Any) -> None:
    """connect() fails with this, as soon as discovery is through."""
    seen = ""

    def fails() -> bool:
        nonlocal seen
        with pytest.raises(DriverError) as error, connected(place, robot, timeout=0.3, **options):
            pass
        seen = str(error.value)
        return re.search(expected, seen) is not None

    try:
        until(fails)
    except AssertionError:
        raise AssertionError(f"{seen!r} does not match {expected!r}") from None


def test_200_trajectories_arrive_and_states_come_back(place):
    with far(place) as robot, connected(place, splice=0.005, obs={"joints": "q", "both": ["q", "dq"]}, sense=lambda s: {"seen": s.q[:1]}) as (driver, first):
        np.testing.assert_allclose(first.q, HOME)
        assert first.obs["joints"].dtype == np.float32 and first.obs["both"].shape == (6,) and first.obs["seen"] == first.q[0]
        states = [first]
        for _ in range(200):
            driver.write(at_rest(HOME, time.monotonic(), n=64))
            if (new := driver.read()) is not None:
                states.append(new)
            time.sleep(0.003)
        report = until(lambda: (r := robot.ask()) and len(r["taken"]) == 200 and r)
    latency = 1e3 * (np.array(report["taken"])[:, 1] + 0.005)
    print(f"cyclonedds to cyclonedds: {len(latency)}/200, p50 {np.median(latency):.2f} ms, p99 {np.percentile(latency, 99):.2f} ms; {len(states)} states back")
    assert report["refused"] == [] and np.median(latency) < 20
    assert len(states) > 20 and all(a.t < b.t for a, b in itertools.pairwise(states))


def test_wrong_type_qos_topic_and_domain_are_told_apart(place):
    ns = place["namespace"]
    with far(place, topic=f"/{ns}/typed/joint_trajectory", controller="forward_command", latched=f"/{ns}/latched/joint_trajectory"):
        refusal(place, r"of type std_msgs/msg/Float64MultiArray instead of trajectory_msgs/msg/JointTrajectory", name="typed")
        refusal(place, r"QoS.*TransientLocal", name="latched")
        refusal(place, rf"nobody listens on /{ns}/other/joint_trajectory.*JointTrajectory are on .*/{ns}/latched", name="other")
        refusal({**place, "domain": place["domain"] + 1}, r"(?s)domain .* over localhost: compare ROS_DOMAIN_ID.*RMW_IMPLEMENTATION")


def test_missing_joints_are_named(place):
    with far(place, omit=["elbow"]):
        refusal(place, r"does not tell of elbow after")
        refusal(place, r"does not tell of a, b, c .*of other joints: extra, shoulder, wrist", replace(ROBOT, joints=["a", "b", "c"]))
        with connected(place, replace(ROBOT, joints=["a", "b", "c"]), rename={"a": "shoulder", "b": "wrist", "c": "extra"}) as (_, first):
            np.testing.assert_allclose(first.q, [0.0, -0.4, 9.0])


def test_without_joint_states_the_topic_is_named(place):
    with far(place, states=""):
        refusal(place, rf"no joint states on /{place['namespace']}/joint_states after")


def test_nan_states_are_ignored_and_counted(place):
    with far(place, nan=4) as robot, connected(place) as (driver, first):
        states = [first]
        until(lambda: ((s := driver.read()) and states.append(s)) or len(states) > 20)
        assert all(np.isfinite(s.q).all() for s in states) and states[-1].info["ignored"] > 3
        assert robot.ask()["refused"] == []


def test_bad_setpoints_never_leave(place):
    with far(place) as robot, connected(place) as (driver, _):
        good = at_rest(HOME, time.monotonic())
        moving = np.zeros_like(good.dq)
        moving[-1, 1] = 0.1
        for bad, why in (
                ({"q": good.q * np.nan}, "finite"), ({"dq": good.dq[:, :2]}, "one shape"),
                ({"dq": moving}, "still moves"), ({"t0": good.t0 - 9}, "ended")):
            with pytest.raises(DriverError, match=why):
                driver.write(replace(good, **bad))
        driver.write(replace(good, dq=1e-4 * moving))
        assert until(lambda: robot.ask()["taken"]) and len(robot.ask()["taken"]) == 1, "rounding is no reason to be dropped by the controller"
        assert robot.ask()["refused"] == []


def test_a_controller_that_listens_but_does_not_act_is_noticed(place):
    with far(place, inactive=True), connected(place) as (driver, first):
        commander, start = Commander(ROBOT, first.q), time.monotonic() + PERIOD

        def control() -> bool:
            driver.read()
            driver.write(commander.setpoints(max(time.monotonic(), commander.t[-1] + 1 / RATE if commander.t else 0), *wave(HOME, [0.1, 0.4, 0.1], 2.0, start)))
            return False

        with pytest.raises(DriverError, match=r"elbow is at 0\.300, far from all it was told.*list_controllers"):
            until(control, 5.0)


def test_stop_brakes_refuses_and_connect_starts_again(place, tmp_path):
    with far(place) as robot, connected(place) as (driver, _):
        t = np.arange(0, 2 * RATE + 1)[:, None] / RATE
        q, dq = HOME + 0.25 * (t - np.sin(np.pi * t) / np.pi), 0.5 * np.sin(np.pi * t / 2)**2 + np.zeros(3)
        driver.write(Setpoints(time.monotonic(), 1 / RATE, q, dq, 0 * dq))
        until(lambda: (s := driver.read()) and s.dq.min() > 0.45)
        driver.stop()
        with pytest.raises(DriverError, match="stopped"):
            driver.write(at_rest(HOME, time.monotonic()))
        rest = until(lambda: (s := driver.read()) and not s.dq.any() and s)
        motion = robot.motion(tmp_path / "motion.npy")
        assert rest.q[0] < q[-1, 0] - 0.1, "brakes, instead of going on to the end"
        assert robot.ask()["refused"] == []
        assert np.abs(motion[:, 7:]).max() < 5, "no jump"
        again = driver.connect(ROBOT, 10.0)
        np.testing.assert_allclose(again.q, rest.q, atol=1e-6)
        driver.write(at_rest(again.q, time.monotonic()))


@pytest.mark.slow
def test_a_forward_command_controller_is_streamed_to_and_left_at_rest(place, tmp_path):
    with far(place, controller="forward_command") as robot:
        commander = Commander(ROBOT, HOME)
        with connected(place, controller="forward_command") as (driver, _):
            start = time.monotonic() + PERIOD
            for k in range(30):
                first = start + k * PERIOD
                driver.write(commander.setpoints(first, *wave(HOME, [0.2] * 3, 4.0, start)))
                time.sleep(max(0.0, first - time.monotonic()))
            end = commander.limiter.tail().q[-1]
            assert np.abs(end - commander.q[-1]).max() > 0.02, "it still moves when close() comes"
        until(lambda: np.abs(robot.motion(tmp_path / "motion.npy")[-1, 1:4] - end).max() < 1e-9)
        motion, taken = robot.motion(tmp_path / "motion.npy"), robot.ask()["taken"]
    assert {n for _, _, n in taken} == {3}
    assert len(taken) > 60, "0.6 s and the tail at 200 Hz, less what a busy computer drops"
    step = np.abs(np.diff(motion[:, 1:4], axis=0)).max(0)
    gap = np.diff([t for t, _, _ in taken]).max()
    assert (step <= np.asarray(ROBOT.velocity) * (gap + 0.005)).all()


def test_two_controllers_share_a_robot(place):
    ns = place["namespace"]
    with far(place, joints=["shoulder", "wrist"], home=[0.1, 0.2], topic=f"/{ns}/arm/joint_trajectory") as arm, \
            far(place, joints=["elbow"], home=[0.3], topic=f"/{ns}/tool/joint_trajectory") as tool, \
            connected(place, name={"arm": ["wrist", "shoulder"], "tool": ["elbow"]}) as (driver, first):
        np.testing.assert_allclose(first.q, [0.1, 0.3, 0.2])
        driver.write(at_rest([0.11, 0.31, 0.21], time.monotonic()))
        until(lambda: (s := driver.read()) and np.allclose(s.q, [0.11, 0.31, 0.21]))
        assert arm.ask()["refused"] == tool.ask()["refused"] == []


def sine(place: dict[str, Any], folder: Path, seconds: float, **options: Any) -> tuple[np.ndarray, Commander, float, Far, float]:
    """Drive a far side along a sine, as the bridge would; what it played, what was commanded, and how soon its death was noticed [s]."""
    with far(place) as robot, connected(place, **options) as (driver, first):
        commander, start, missed = Commander(ROBOT, first.q), time.monotonic() + PERIOD, 0
        for k in range(round(seconds / PERIOD)):
            driver.read()
            due = start + k * PERIOD
            setpoints = commander.setpoints(due, *wave(HOME, [0.35, 0.4, 0.5], 2.5, start))
            if time.monotonic() < due:
                driver.write(setpoints)
            else:
                missed += 1
            time.sleep(max(0.0, due - time.monotonic()))
        motion, report = robot.motion(folder / "motion.npy"), robot.ask()
        assert report["refused"] == [] and len(report["taken"]) + missed >= round(seconds / PERIOD) - 1
        robot.process.kill()
        killed = time.monotonic()
        with pytest.raises(DriverError, match=r"no joint states|is gone"):
            until(lambda: driver.read() and False, 2.0)
        return motion, commander, time.monotonic() - killed, robot, missed


@pytest.mark.slow
def test_a_sine_through_the_limiter_keeps_its_limits_and_a_killed_robot_is_noticed(place, tmp_path):
    motion, commander, noticed, _, missed = sine(place, tmp_path, 2.0, splice=0.01, stale=0.25)
    t, q, v, a = motion[:, 0], motion[:, 1:4], np.abs(motion[:, 4:7]).max(0), np.abs(motion[:, 7:]).max(0)
    during = (t > commander.t[0] + 0.1) & (t < commander.t[-1] - 0.1)
    error = np.abs(commander.due(t[during]) - q[during]).max()
    print(f"velocity {v / ROBOT.velocity} and acceleration {a / ROBOT.acceleration} of the limits, {1e3 * error:.2f} mrad beside the command, "
          f"{missed} periods missed, death noticed after {noticed:.2f} s")
    assert noticed < 0.5
    assert np.ptp(q, 0).min() > 0.6, "it moved"
    if not missed:  # a busy computer that misses periods plays braking tails
        assert (v <= 1.02 * np.asarray(ROBOT.velocity)).all() and (a <= np.asarray(ROBOT.acceleration) + np.asarray(ROBOT.jerk) * PERIOD / 2).all()
        assert error < 0.005


# rclpy

DISTROS = {"kilted": ["ros-rclpy[fastrtps]", "ros-trajectory-msgs", "ros-sensor-msgs"],
           "jazzy": ["ros-jazzy-rclpy[fastrtps]", "ros-jazzy-trajectory-msgs", "ros-jazzy-sensor-msgs"]}


def rclpy_python(distro: str) -> Path:
    """The python of a venv with ROS 2 from pip, made on first use (260 MB in ~/.cache/dipole-tests, or DIPOLE_TEST_CACHE); skips where pip cannot."""
    folder = Path(os.environ.get("DIPOLE_TEST_CACHE", Path.home() / ".cache/dipole-tests")) / f"ros-{distro}"
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        made = subprocess.run(f"{sys.executable} -m venv --clear {folder} && {python} -m pip install -q " + " ".join(f"'{p}'" for p in DISTROS[distro]),
                              shell=True, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"pip has no ROS 2 {distro} here: {made.stderr.strip().splitlines()[-1]}")
        done.touch()
    return python


@pytest.mark.slow
@pytest.mark.ros
@pytest.mark.parametrize("reach", ["LOCALHOST", "SUBNET"])
@pytest.mark.parametrize("distro", DISTROS)
def test_a_real_ros_2_node_hears_and_is_heard(distro, reach, place):
    """Nothing here but the driver is ours: rclpy, its middleware and its messages are those that robots run."""
    ns, n = place["namespace"], 200
    options = {"joints": JOINTS, "controller": "joint_trajectory", "topic": f"/{ns}/joint_trajectory_controller/joint_trajectory",
               "states": f"/{ns}/joint_states", "seconds": 60}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    node = subprocess.Popen([str(rclpy_python(distro)), str(ROOT / "tests/serve/rclpy_node.py"), json.dumps(options)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env={**clean, "ROS_DOMAIN_ID": str(place["domain"]), "ROS_AUTOMATIC_DISCOVERY_RANGE": reach})
    try:
        assert node.stdout is not None and node.stdout.readline() == "ready\n"
        with connected(place, splice=0.005, timeout=20.0) as (driver, first):
            np.testing.assert_allclose(first.q, [0.0, 0.1, 0.2])
            assert first.dq.tolist() == [0.01] * 3
            heard = 0
            for _ in range(n):
                driver.write(at_rest(first.q, time.monotonic(), n=64))
                heard += driver.read() is not None
                time.sleep(PERIOD)
            time.sleep(0.2)
            out, _ = node.communicate("end\n", timeout=20)
            counts = driver.joints.counts
    finally:
        node.kill()
        node.wait()
    report = json.loads(out)
    latency = 1e3 * (np.array(report["latency"]) + 0.005)
    print(f"rclpy {distro} {reach}: {len(latency)}/{n} trajectories, p50 {np.median(latency):.2f} ms, p99 {np.percentile(latency, 99):.2f} ms; "
          f"{counts['used']} of {report['published']} joint states back, new ones in {heard} of {n} periods")
    assert report["rmw"].startswith("rmw_fastrtps") and report["bad"] == [] and report["senders"] == [["trajectory_msgs/msg/JointTrajectory", "RELIABLE"]]
    assert len(latency) >= 0.95 * n and counts["used"] >= 0.95 * report["published"] > n and heard >= 0.9 * n

"""Setpoints against every limit by finite differences, closed forms against ruckig and against dense sampling, interpolation against parabolas."""
import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.serve.interpolate import cubic, hold
from policy.serve.motion import Motion, brake, braked, braking_bound, braking_reach, join, speed_within
from policy.serve.robot import RobotSpec

ruckig = pytest.importorskip("ruckig", reason="the limiter needs ruckig: pip install 'dipole[deploy]'")
from policy.serve.limiter import Limiter  # noqa: E402

FILES = sorted((Path(__file__).parents[2] / "conf" / "robot").glob("*.yaml"))
ROBOTS = [RobotSpec(**{k: v for k, v in yaml.safe_load(file.read_text())["spec"].items() if k != "_target_"}) for file in FILES]
PANDA = next(robot for robot in ROBOTS if robot.name == "panda_pick")
BAD = (np.nan, np.inf, -np.inf, 1e9, -1e9, 1e300)


def shares(q: np.ndarray, dt: float, robot: RobotSpec) -> np.ndarray:
    """Largest velocity, acceleration and jerk of setpoints (n, dof) by finite differences, as shares of the limits."""
    limits = robot.velocity, robot.acceleration, robot.jerk
    return np.array([(np.abs(np.diff(q, order, axis=0)).max(0) / dt**order / limit).max() for order, limit in enumerate(limits, 1)])


def adversary(robot: RobotSpec, dt: float, steps: int, seed: int, periods: int) -> tuple[np.ndarray, Limiter]:
    """All setpoints of a limiter under jumps, sign flips, targets on and beyond the bounds, wild velocities, numbers that are none, brakes and late periods."""
    rng, low, high = np.random.default_rng(seed), np.array(robot.lower), np.array(robot.upper)
    limiter = Limiter(robot, dt, steps)
    limiter.reset(rng.uniform(low, high))
    out, flip = [np.repeat(limiter.q[None], 4, 0)], 1
    for k in range(periods):
        n, kind = steps + int(rng.integers(0, 9)), rng.integers(8)
        q = rng.uniform(low - 0.9 * (high - low), high + 0.9 * (high - low), (n, robot.dof))
        dq = rng.normal(0, 3, (n, robot.dof)) * robot.velocity
        if kind == 1:
            q = np.where(rng.random((n, robot.dof)) < 0.5, low, high)
        elif kind == 2:
            flip = -flip
            q, dq = np.broadcast_to(high if flip > 0 else low, q.shape), np.broadcast_to(np.array(robot.velocity) * flip, q.shape)
        elif kind in (3, 4):
            at, w = (k * steps + 1 + np.arange(n))[:, None] * dt, rng.uniform(1, 20)
            q, dq = (high + low) / 2 + 0.6 * (high - low) * np.sin(w * at), 0.6 * (high - low) * w * np.cos(w * at)
        elif kind == 5:
            (q if rng.random() < 0.5 else dq)[rng.integers(n), rng.integers(robot.dof)] = rng.choice(BAD)
        out.append(limiter.brake().q if kind == 6 else limiter.skip(int(rng.integers(0, 3 * steps))).q if kind == 7 else limiter.follow(q, dq).q)
    return np.concatenate([*out, limiter.tail().q, limiter.tail().q[-1:].repeat(3, 0)]), limiter


@pytest.mark.parametrize("robot", ROBOTS, ids=lambda robot: robot.name)
@pytest.mark.parametrize("dt, steps", [(0.005, 4), (0.002, 10), (0.01, 1)])
def test_no_target_moves_a_robot_beyond_its_limits(robot, dt, steps):
    q, limiter = adversary(robot, dt, steps, seed=steps, periods=150)
    assert (shares(q, dt, robot) <= 1 + 1e-6).all(), shares(q, dt, robot)
    span = np.array(robot.upper) - robot.lower
    assert (q >= robot.lower - 1e-9 * span).all() and (q <= robot.upper + 1e-9 * span).all()
    assert limiter.interventions and not limiter.errors
    assert (shares(q, dt, robot) > 0.5).all()  # it was put to the test


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(robot=st.sampled_from(ROBOTS), dt=st.sampled_from([0.001, 0.002, 0.004, 0.005, 0.008, 0.01, 0.02]), steps=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_no_target_at_any_rate_moves_a_robot_beyond_its_limits(robot, dt, steps, seed):
    q, _ = adversary(robot, dt, steps, seed, periods=120)
    span = np.array(robot.upper) - robot.lower
    assert (shares(q, dt, robot) <= 1 + 1e-6).all()
    assert (q >= robot.lower - 1e-9 * span).all() and (q <= robot.upper + 1e-9 * span).all()


def sine(limiter: Limiter, centre: np.ndarray, periods: int, ahead: int = 8):
    """0.3 rad (0.03 for a gripper) at 0.5 Hz, (steps + ahead, dof) targets of each period."""
    size, w = np.where(np.array(limiter.robot.upper) - limiter.robot.lower > 1, 0.3, 0.03), np.pi
    for k in range(periods):
        at = (k * limiter.steps + 1 + np.arange(limiter.steps + ahead))[:, None] * limiter.dt
        yield centre + size * np.sin(w * at), size * w * np.cos(w * at)


@pytest.mark.parametrize("dt, steps", [(0.005, 4), (0.001, 20)])
def test_a_motion_within_the_limits_is_followed_exactly_and_waypoints_at_rest_are_not(dt, steps):
    centre = np.array([0, 0, 0, -1.5, 0, 1.5, 0, 0.04])
    error = {}
    for moving in (1, 0):
        limiter = Limiter(PANDA, dt, steps)
        limiter.reset(centre)
        beside = [limiter.follow(q, moving * dq).q - q[:steps] for q, dq in sine(limiter, centre, 150)]
        error[moving] = 1e3 * np.sqrt((np.concatenate(beside[25:])[:, :7] ** 2).mean())
    assert error[1] < 1e-6  # mrad, once it has caught up from rest; 0.13 with ruckig alone
    assert error[0] > 3     # why velocities are given
    assert limiter.interventions > 149 * steps


def test_a_jump_of_the_plan_is_rejoined_smoothly_and_then_followed():
    """No chatter: behind the jump acceleration is what the plan's is."""
    centre, dt, steps = np.array([0, 0, 0, -1.5, 0, 1.5, 0, 0.04]), 0.005, 4
    limiter = Limiter(PANDA, dt, steps)
    limiter.reset(centre)
    out, want = [], []
    for k, (q, dq) in enumerate(sine(limiter, centre, 120, ahead=16)):
        q = q + (0.02 if k >= 60 else 0) * (np.arange(8) < 7)
        out.append(limiter.follow(q, dq).q)
        want.append(q[:steps])
    out, want = np.concatenate(out), np.concatenate(want)
    assert np.abs(out - want)[60 * steps + 40:].max() < 1e-9, "the plan is met again 0.2 s behind the jump"
    after = slice(60 * steps + 40, None)
    assert np.abs(np.diff(out[after], 2, axis=0)).max() <= 1.001 * np.abs(np.diff(want[after], 2, axis=0)).max()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["q", "dq"])
def test_a_target_that_is_none_brakes(bad, where):
    limiter = Limiter(PANDA, 0.005, 4)
    limiter.reset(np.array([0, 0, 0, -1.5, 0, 1.5, 0, 0.04]))
    for q, dq in list(sine(limiter, limiter.q, 20)):
        limiter.follow(q, dq)
    expected = limiter.tail().q[:4]
    if not (where == "dq" and np.isfinite(bad)):  # a wild velocity of a sensible position is cut, not refused
        (q if where == "q" else dq)[2, 3] = bad
        np.testing.assert_array_equal(limiter.follow(q, dq).q, expected)
    for _ in range(30):
        limiter.brake()
    assert (limiter.dq == 0).all() and (limiter.ddq == 0).all()


def test_setpoints_always_end_at_rest_and_a_late_period_goes_on_from_the_tail():
    q, dt, robot = np.array([0.1, 0, 0, -1.5, 0, 1.5, 0, 0.04]), 0.005, PANDA
    limiter = Limiter(robot, dt, 4)
    limiter.reset(q)
    assert (limiter.tail().q == q).all()
    for target, velocity in sine(limiter, q, 40):
        limiter.follow(target, velocity)
        tail = limiter.tail()
        assert (tail.q[-1] == tail.q[-2]).all() and not tail.dq[-1].any() and not tail.ddq[-1].any()
    played = limiter.skip(3).q
    np.testing.assert_array_equal(played, tail.q[:3])
    np.testing.assert_array_equal(limiter.tail().q[-1], tail.q[-1])
    np.testing.assert_array_equal(limiter.q, tail.q[2])


@pytest.mark.parametrize("given, words", [
    ({"step": [np.nan]}, "step=.nan. must be empty, or one finite number above 0"), ({"step": [-1]}, "step"), ({"step": [0]}, "step"),
    ({"step": ["x"]}, "step"), ({"step": [1, 1]}, "step"), ({"step": None}, "step"), ({"step": 1.0}, "step"),
    ({"latency_obs": np.nan}, "latency_obs=nan must be a finite number"), ({"latency_obs": -5}, "latency_obs"),
    ({"latency_action": "x"}, "latency_action='x'"), ({"latency_action": np.inf}, "latency_action")])
def test_a_robot_with_senseless_steps_or_latencies_is_refused(given, words):
    fine = RobotSpec("one", ["a"], ["rad"], [-1.0], [1.0], [1.0], [5.0], [100.0], step=np.array([0.1]), latency_obs=0, latency_action=np.float32(0.05))
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(fine, **given)


def test_who_starts_outside_may_only_come_in():
    robot = RobotSpec("one", ["a"], ["rad"], [-1.0], [1.0], [1.0], [5.0], [100.0])
    limiter = Limiter(robot, 0.01, 2)
    limiter.reset(np.array([1.2]))
    out = np.concatenate([limiter.follow(np.full((2, 1), 1.5), np.full((2, 1), 1.0)).q for _ in range(20)])
    assert out.max() <= 1.2 + 1e-9
    out = np.concatenate([limiter.follow(np.full((2, 1), 0.0), np.zeros((2, 1))).q for _ in range(200)])
    assert out.min() > -1e-9 and np.diff(out[:, 0]).max() < 1e-3 and abs(out[-1, 0]) < 1e-9


@pytest.mark.parametrize("room", [0.05, 0.2, 0.3, 0.35, 0.4, 0.45, 1.0])
def test_a_plan_that_is_within_the_limits_but_cannot_be_stopped_within_them_is_left_in_time(room):
    """Constant acceleration passes every check until the speed limit or the bound is there: too late to undo the acceleration."""
    robot = RobotSpec("one", ["a"], ["rad"], [-1.0], [1.0], [1.0], [5.0], [50.0])
    limiter, dt, steps = Limiter(robot, 0.005, 4), 0.005, 4
    limiter.reset(np.array([1 - room]))
    a, out = 4.0, [limiter.q[None].repeat(4, 0)]
    t0 = 0.2  # s, in which the plan's acceleration comes up, at less than the jerk limit
    for k in range(60):
        t = (k * steps + 1 + np.arange(steps + 8))[:, None] * dt
        q = np.where(t < t0, a * t**3 / (6 * t0), a * t0**2 / 6 + a * t0 / 2 * (t - t0) + a * (t - t0) ** 2 / 2)
        dq = np.where(t < t0, a * t**2 / (2 * t0), a * t0 / 2 + a * (t - t0))
        out.append(limiter.follow((1 - room + q).clip(0, 1), dq, np.where(t < t0, a * t / t0, a)).q)
        ended = np.concatenate([*out, limiter.tail().q])
        assert (shares(ended, dt, robot) <= 1 + 1e-6).all() and ended.max() <= 1 + 1e-9, k
    assert ended.max() > 1 - 1e-3


def test_what_it_refuses():
    limiter = Limiter(PANDA, 0.005, 4)
    with pytest.raises(ValueError, match="8 finite numbers"):
        limiter.reset(np.full(8, np.nan))
    limiter.reset(np.zeros(8))
    with pytest.raises(ValueError, match="4 or more"):
        limiter.follow(np.zeros((3, 8)), np.zeros((3, 8)))
    with pytest.raises(ValueError, match="at least 1"):
        Limiter(PANDA, 0.005, 0)


def test_it_counts_how_often_and_by_how_much_it_steps_in():
    limiter = Limiter(PANDA, 0.005, 4)
    limiter.reset(np.array([0, 0, 0, -1.5, 0, 1.5, 0, 0.04]))
    limiter.follow(np.repeat(limiter.q[None], 4, 0), np.zeros((4, 8)))
    assert limiter.interventions == 0 and not limiter.largest.any()
    limiter.follow(np.repeat(limiter.q[None] + 0.5 * (np.arange(8) == 2), 4, 0), np.zeros((4, 8)))
    assert limiter.interventions == 4 and limiter.largest[2] == pytest.approx(0.5, abs=0.05) and limiter.largest[0] < 1e-9


def test_a_period_costs_a_fraction_of_it():
    """0.2 ms where the plan passes, 0.4 to 0.7 where it must step in (8 joints, one thread); loose, for busy machines."""
    limiter = Limiter(PANDA, 0.002, 10)
    took: list[float] = []
    limiter.reset(np.array([0, 0, 0, -1.5, 0, 1.5, 0, 0.04]))
    for q, dq in sine(limiter, limiter.q, 200):
        start = time.process_time()
        limiter.follow(q + np.random.default_rng(len(took)).normal(0, 0.05, 8), dq)
        took.append(time.process_time() - start)
    assert np.median(took) < 5e-3


def states(n: int, seed: int = 0) -> tuple[Motion, np.ndarray, np.ndarray]:
    """States (n, 1) from which the acceleration can be undone within speed 2, with acceleration and jerk limits (n, 1) each."""
    rng = np.random.default_rng(seed)
    most, jerk = rng.uniform(1, 20, (n, 1)), 10 ** rng.uniform(1, 4, (n, 1))
    return Motion(rng.normal(size=(n, 1)), rng.uniform(-2, 2, (n, 1)), rng.uniform(-1, 1, (n, 1)) * most), most, jerk


def test_the_fastest_stop_is_ruckigs():
    start, most, jerk = states(300)
    ours = brake(start, most, jerk)
    for i in range(300):
        given, way = ruckig.InputParameter(1), ruckig.Trajectory(1)
        given.control_interface = ruckig.ControlInterface.Velocity
        given.current_position, given.current_velocity, given.current_acceleration = (x[i].tolist() for x in start)
        given.max_acceleration, given.max_jerk, given.max_velocity = most[i].tolist(), jerk[i].tolist(), [1e3]
        ruckig.Ruckig(1).calculate(given, way)
        assert ours.duration[i, 0] == pytest.approx(way.duration, rel=1e-9, abs=1e-12)
        one = brake(Motion(*(x[i] for x in start)), most[i], jerk[i])
        at = np.linspace(0, 1.2 * way.duration, 23)
        np.testing.assert_allclose(braked(one, at).q[:, 0], [way.at_time(min(t, way.duration))[0][0] for t in at], atol=1e-9)


def test_the_reach_of_a_stop_is_what_sampling_finds():
    start, most, jerk = states(200, seed=1)
    low, high = braking_reach(start, most, jerk)
    for i in range(200):
        one = brake(Motion(*(x[i] for x in start)), most[i], jerk[i])
        q = one.at(np.linspace(0, one.duration[0], 4001)).q
        assert low[i, 0] == pytest.approx(q.min(), abs=1e-6) and high[i, 0] == pytest.approx(q.max(), abs=1e-6)
    bound = braking_bound(start, most, jerk)
    assert (bound >= np.maximum(high - start.q, start.q - low)).all()


def test_the_speed_within_a_distance_stops_in_that_distance():
    _, most, jerk = states(200, seed=2)
    room = 10 ** np.random.default_rng(3).uniform(-4, 0, (200, 1))
    speed = speed_within(room, most, jerk)
    _, high = braking_reach(Motion(0 * room, speed, 0 * room), most, jerk)
    np.testing.assert_allclose(high, room, rtol=1e-9)


def test_a_join_arrives_exactly_and_knows_its_extremes():
    rng = np.random.default_rng(0)
    start, goal = (Motion(*rng.normal(size=(3, 50))) for _ in range(2))
    way = join(start, goal, 0.7)
    np.testing.assert_allclose(np.stack(way.at(np.array([0.7])))[:, 0], np.stack(goal), atol=1e-9)
    at = way.at(np.linspace(0, 0.7, 20001))
    speed, most, jerk = np.abs(at.dq).max(0), np.abs(at.ddq).max(0), np.abs(way.jerks).max(0)
    assert way.within(1.0001 * speed, 1.0001 * most, 1.0001 * jerk).all()
    for limits in ((0.9999, 1.0001, 1.0001), (1.0001, 0.9999, 1.0001), (1.0001, 1.0001, 0.9999)):
        limits = [share * limit for share, limit in zip(limits, (speed, most, jerk), strict=True)]
        assert not way.within(*limits).any()


def test_cubic_meets_its_knots_is_smooth_and_exact_on_parabolas():
    rng = np.random.default_rng(0)
    knots = rng.normal(size=(9, 3))
    q, _ = cubic(knots, np.arange(9.0))
    np.testing.assert_allclose(q, knots, atol=1e-12)
    for side in (-1e-9, 1e-9):  # C1 across knots
        q, dq = cubic(knots, np.arange(1, 8) + side)
        np.testing.assert_allclose(q, knots[1:8], atol=1e-7)
        np.testing.assert_allclose(dq, (knots[2:] - knots[:-2]) / 2, atol=1e-6)
    at = rng.uniform(0.01, 7.99, 200)
    slope = (cubic(knots, at + 1e-6)[0] - cubic(knots, at - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(cubic(knots, at)[1], slope, atol=1e-6)
    i, a, b, c = np.arange(9.0)[:, None], *rng.normal(size=(3, 1, 3))
    at = rng.uniform(1, 7, (100, 1))
    q, dq = cubic(a + b * i + c * i**2, at[:, 0])
    np.testing.assert_allclose(q, a + b * at + c * at**2, atol=1e-10)
    np.testing.assert_allclose(dq, b + 2 * c * at, atol=1e-10)
    at = rng.uniform(0, 8, (100, 1))
    np.testing.assert_allclose(cubic(a + b * i, at[:, 0])[0], a + b * at, atol=1e-12)  # lines to the ends


def test_outside_its_knots_a_plan_stands_still():
    knots = np.arange(4.0)[:, None]
    for outside in (np.array([-2.0, -1e-9]), np.array([3 + 1e-9, 9.0])):
        q, dq = cubic(knots, outside)
        assert (q == (0 if outside[0] < 0 else 3)).all() and not dq.any()
    q, dq = cubic(knots[:1] + 5, np.array([-1.0, 0.0, 1.0]))
    assert (q == 5).all() and not dq.any()
    q, dq = hold(knots, np.array([-1.0, 0.0, 0.999, 1.0, 2.5, 99.0]))
    assert q[:, 0].tolist() == [0, 0, 0, 1, 2, 3] and not dq.any()

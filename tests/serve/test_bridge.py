"""The control loop on a clock of its own: what reaches the joints, whatever the planner, the network and the scheduler do."""
import dataclasses
import math

import numpy as np
import pytest

from policy.serve.bridge import Bridge, Settings
from policy.serve.client import Chunk
from policy.serve.execution import Execution
from policy.serve.robot import DriverError
from policy.serve.supervisor import Mode
from tests.serve.fakes import DT, HORIZON, RATE, ROBOT, Clock, FakeClient, FakeDriver, differences


def wave(t: np.ndarray) -> np.ndarray:
    return np.stack([0.5 * np.sin(1.5 * t), 0.8 * np.sin(1.1 * t + 0.4) - 0.8 * np.sin(0.4)], -1)


def follow_wave(t_obs, obs, prefix, committed):
    return wave(t_obs + DT * np.arange(1, HORIZON + 1) - 100.0)


class Rig:
    def __init__(self, plan=follow_wave, *, delay=0.04, settings=None, merge="naive", execute=8, align=True, knot=1.0):
        self.clock = Clock()
        self.driver, self.client = FakeDriver(self.clock, np.zeros(2)), FakeClient(self.clock, plan, delay)
        execution = Execution(ROBOT, HORIZON, DT, merge=merge, execute=execute, align=align, knot=knot)  # 1: `wave` says where to be then
        self.bridge = Bridge(self.driver, self.client, ROBOT, execution, obs={"q": (2,)}, settings=settings, clock=self.clock)
        self.bridge.connect()
        self.modes: list[Mode] = []
        self.late = 0.0

    def run(self, seconds: float, each=lambda rig, t: None) -> "Rig":
        start = self.clock.now
        for i in range(round(seconds * ROBOT.rate)):
            self.clock.now = start + i / ROBOT.rate
            each(self, self.clock.now - 100.0)
            self.bridge.tick(self.clock.now, self.late)
            self.modes.append(self.bridge.supervisor.mode)
        self.clock.now = start + round(seconds * ROBOT.rate) / ROBOT.rate
        return self

    @property
    def q(self) -> np.ndarray:
        self.driver.play(self.clock.now)
        return np.array(self.driver.played)

    def within_limits(self) -> None:
        q = self.q
        for seen, limit in zip(differences(q), (ROBOT.velocity, ROBOT.acceleration, ROBOT.jerk), strict=True):
            assert (seen <= np.array(limit) * (1 + 1e-6)).all(), (seen, limit)
        assert (q >= np.array(ROBOT.lower) - 1e-9).all() and (q <= np.array(ROBOT.upper) + 1e-9).all()

    def standing(self) -> np.ndarray:
        """Share of a limit each sample moves at, (n,)."""
        return np.abs(np.diff(self.q, axis=0)).max(1) * RATE / max(ROBOT.velocity)


@pytest.mark.parametrize("delay", [0.0, 0.04, 0.12])
def test_a_plan_is_followed_to_a_millimetre_whatever_the_delay(delay):
    rig = Rig(delay=delay).run(6.0)
    t = (np.arange(len(rig.q)) + 1) / RATE
    error = np.abs(rig.q - wave(t))[t > 1.0]
    assert error.max() < 2e-3 and rig.bridge.execution.counts == {} and rig.modes[-1] is Mode.RUN
    rig.within_limits()
    apart = {round(a["t_obs"] - b["t_obs"], 6) for a, b in zip(rig.client.asked[3:], rig.client.asked[2:], strict=False)}
    assert apart <= {0.4, 0.42}  # every 8 steps of 50 ms


def test_unaligned_plans_run_late_so_alignment_is_what_the_test_above_sees():
    rig = Rig(delay=0.12, align=False).run(6.0)
    t = (np.arange(len(rig.q)) + 1) / RATE
    assert np.abs(rig.q - wave(t))[t > 1.0].max() > 0.05
    rig.within_limits()


@pytest.mark.parametrize("knot", [0.5, 1.0])
def test_a_robot_at_rest_enters_its_plan_at_the_beginning_and_the_next_one_on_time(knot):
    """Two steps late, it would have to jump by what it missed: here a plan that leads away at .8 rad/s from where the robot was seen."""
    away = np.array([0.8, 0.4])
    rig = Rig(lambda t_obs, obs, prefix, committed: obs["q"][-1] + away * DT * np.arange(1, HORIZON + 1)[:, None], delay=2 * DT, knot=knot, execute=4)
    execution, seen = rig.bridge.execution, []

    def look(rig, t):
        if execution.now is not None:
            seen.append((rig.clock.now, execution.now.t0, np.abs(execution.target(np.array([rig.clock.now + 1e-9]))[0][0] - rig.bridge.limiter.q).max()))
    rig.run(0.5, look)
    landed = seen[0][0]  # looked at a period after it came
    assert abs(seen[0][1] - (landed + (1 - knot) * DT)) < 1e-6  # its own time begins when it lands
    assert max(gap for now, _, gap in seen if now < landed + 2 * DT) < 0.8 * DT  # and nothing is to be caught up with
    later = [t0 for _, t0, _ in seen if t0 > seen[0][1] + DT]
    assert later and min(abs(later[0] - o["t_obs"]) for o in rig.client.asked) < 1e-9
    rig.within_limits()


def test_the_history_is_one_policy_step_apart():
    rig = Rig().run(3.0)
    for asked in rig.client.asked[2:]:
        older, newest = asked["obs"]["q"]
        at = round((asked["t_obs"] - 100.0) * RATE)
        assert np.allclose(newest, rig.q[at - 1], atol=1e-6) and np.allclose(older, rig.q[at - 1 - round(DT * RATE)], atol=0.02 * max(ROBOT.velocity))


def test_a_promised_prefix_is_what_is_then_executed():
    rig = Rig(merge="frozen", delay=0.12).run(4.0)
    asked = [a for a in rig.client.asked if a["prefix"] is not None]
    assert len(asked) >= 5 and {a["committed"] for a in asked} == {3}  # (0.12 + 0.02) / 0.05 - 1, rounded up, and one more for the interpolation
    for a in asked:
        due = a["t_obs"] + DT * (1 + np.arange(a["committed"] - 1)) - 100.0
        assert np.allclose(a["prefix"][: len(due)], rig.q[np.round(due * RATE).astype(int) - 1], atol=3e-3)


@pytest.mark.parametrize("spoil, code", [
    (lambda a: a * np.nan, "not_finite"), (lambda a: np.where(np.arange(HORIZON)[:, None] == 5, np.inf, a), "not_finite"),
    (lambda a: a + 1.5, "limits"), (lambda a: a[:, :1], "shape"), (lambda a: a[:9], "shape"),
    (lambda a: np.where(np.arange(HORIZON)[:, None] % 2, a + 0.5, a), "speed"), (lambda a: a * 0 + [0.95, -1.5], "jump"),
])
def test_what_must_not_move_a_robot_is_refused_whole_and_it_holds_then_resumes(spoil, code):
    def plan(t_obs, obs, prefix, committed):
        good = wave(DT * np.arange(1, HORIZON + 1) - 0.0) * 0 + obs["q"][-1]  # stay
        good = good + np.linspace(0, 0.1, HORIZON)[:, None] * (1 if t_obs < 103.0 else -1)
        return spoil(good) if 101.0 < t_obs < 102.5 else good

    rig = Rig(plan, settings=Settings(rejects=10**6)).run(2.4)
    assert rig.bridge.counts[f"refused_{code}"] > 3 and rig.modes[-1] is Mode.HOLD and np.ptp(rig.q[-40:], axis=0).max() == 0
    rig.run(2.0)
    assert rig.modes[-1] in (Mode.RUN, Mode.DEGRADED)
    rig.within_limits()


def test_a_step_as_wide_as_allowed_passes_whatever_float32_makes_of_it():
    execution = Execution(dataclasses.replace(ROBOT, step=[0.045, 0.1]), HORIZON, DT)
    chunk = Chunk(0, 0, 100.0, DT, np.zeros((HORIZON, 2)), 0, 0, 0, "toy")
    chunk.actions[8:, 0] = np.float32(0.045)
    assert chunk.actions[8, 0] > 0.045 and not execution.refuse(chunk, 100.0, np.zeros(2))
    chunk.actions[8:, 0] = 0.046
    assert execution.refuse(chunk, 100.0, np.zeros(2)).startswith("speed")


def test_too_many_refusals_stop_the_robot_until_somebody_rearms_it():
    rig = Rig(lambda t, obs, prefix, committed: follow_wave(t, obs, prefix, committed) * (np.nan if t > 101 else 1), settings=Settings(rejects=5)).run(5.0)
    assert rig.modes[-1] is Mode.STOP and rig.driver.stopped and "not_finite" in rig.bridge.supervisor.reason
    rig.run(0.5)
    assert rig.modes[-1] is Mode.STOP and np.ptp(rig.q[-100:], axis=0).max() == 0
    rig.client.plan = lambda t, obs, prefix, committed: np.repeat(obs["q"][-1:], HORIZON, 0)
    rig.bridge.rearm()
    rig.run(1.0)
    assert rig.modes[-1] is Mode.RUN
    rig.within_limits()


@pytest.mark.parametrize("patience, most", [(math.inf, 0.85), (0.1, 0.3), (0.0, 0.25)])
def test_a_planner_that_goes_leaves_the_robot_at_rest_and_one_that_comes_back_moves_it_again(patience, most):
    def connect(rig, t):
        rig.client.connected = not 2.0 <= t < 4.0
        if not rig.client.connected:
            rig.client.open = None

    def plan(t_obs, obs, prefix, committed):
        step = np.diff(wave(t_obs + DT * np.arange(HORIZON + 1) - 100.0), axis=0)
        return obs["q"][-1] + np.cumsum(step, 0)

    rig = Rig(plan, settings=Settings(patience=patience)).run(5.5, connect)
    moving = rig.standing() > 1e-9
    t = (np.arange(len(moving)) + 1) / RATE
    held = t[(t > 2.0) & ~moving][0] - 2.0
    assert held < most, held
    assert not moving[(t > 2.0 + most) & (t < 4.0)].any() and moving[t > 4.3].any()
    seen = [m for i, m in enumerate(rig.modes) if not i or m is not rig.modes[i - 1]]
    assert seen == ["HOLD", "RUN", *(["DEGRADED"] if patience else []), "BRAKE", "HOLD", "RUN"]
    rig.within_limits()


def test_at_rest_within_a_tenth_of_a_second_of_the_last_planned_point():
    rig = Rig(settings=Settings(hold=100.0)).run(2.0)
    rig.client.connected, rig.client.open = False, None
    end = rig.bridge.execution.end - 100.0
    rig.run(2.0)
    t = (np.arange(len(rig.q) - 1) + 1) / RATE
    last = t[rig.standing() > 1e-9][-1]
    assert last - end < 0.1, (last, end)


@pytest.mark.parametrize("harm, reason", [
    (lambda rig: setattr(rig.driver, "broken", "cable out"), "cable out"),
    (lambda rig: setattr(rig.driver, "silent", True), "state is"),
    (lambda rig: setattr(rig, "late", 0.05), "late"),
])
def test_a_robot_at_fault_is_braked_and_stopped(harm, reason):
    rig = Rig().run(1.0)
    rig.run(0.6, lambda rig, t: harm(rig))
    assert rig.modes[-1] is Mode.STOP and reason in rig.bridge.supervisor.reason and rig.driver.stopped
    rig.within_limits()


def test_chunks_of_an_earlier_epoch_die():
    rig = Rig(delay=0.1).run(1.0)
    rig.client.tamper = lambda chunk: dataclasses.replace(chunk, epoch=chunk.epoch - 1)
    rig.run(3.0)
    assert rig.bridge.counts["stale_epoch"] > 2 and rig.modes[-1] is Mode.HOLD


def test_a_loop_that_misses_periods_leaves_the_robot_to_its_braking_tail():
    """Late by more than a period, again and again: what the joints see stays inside every limit."""
    rng, rig = np.random.default_rng(0), Rig()
    for i in range(1500):
        rig.clock.now = 100.0 + i / ROBOT.rate
        if rng.random() < 0.2:
            continue  # a period in which nothing ran
        if rng.random() < 0.1:
            rig.clock.now += 0.0195
        rig.bridge.tick(100.0 + i / ROBOT.rate)
    rig.clock.now = 100.0 + 1500 / ROBOT.rate
    rig.within_limits()
    assert rig.bridge.counts["skipped"] > 50 and np.ptp(rig.q, axis=0).min() > 0.3


def test_a_loop_that_never_commands_in_time_stops_the_robot():
    """Each period's work ends just before the next one: nothing is late by a whole period, and nothing is sent."""
    rig = Rig().run(1.0)
    assert rig.modes[-1] is Mode.RUN
    for i in range(20):
        rig.clock.now = 101.0 + i / ROBOT.rate + 0.0195
        rig.bridge.tick(101.0 + i / ROBOT.rate, 0.0195)
    assert rig.bridge.supervisor.mode is Mode.STOP and "late 11 times in a row" in rig.bridge.supervisor.reason


@pytest.mark.parametrize("merge", ["naive", "ensemble", "frozen"])
def test_no_limit_is_exceeded_whatever_comes(merge):
    """A minute of plans that are sometimes good, sometimes jump inside what is allowed, sometimes are garbage, late or lost."""
    rng = np.random.default_rng(1)

    def plan(t_obs, obs, prefix, committed):
        kind, q = rng.integers(6), obs["q"][-1].astype(float)
        steps = {0: rng.normal(0, 0.02, (HORIZON, 2)), 1: rng.choice([-0.1, 0.1], (HORIZON, 2)), 2: np.zeros((HORIZON, 2)), 3: np.full((HORIZON, 2), 0.09)}
        a = q + np.cumsum(steps.get(kind, rng.normal(0, 1.0, (HORIZON, 2))), 0) + rng.normal(0, 0.05, 2)
        return np.clip(a, -2.5, 2.5) if rng.random() < 0.9 else a * np.nan

    rig = Rig(plan, merge=merge, settings=Settings(rejects=10**6, hold=1e6))

    def weather(rig, t):
        rig.client.delay = 0.3 if 20 < t % 40 < 22 else float(rng.uniform(0, 0.15))
        rig.client.connected = not 30 < t % 40 < 31

    rig.run(60.0, weather)
    rig.within_limits()
    assert set(rig.modes) >= {Mode.RUN, Mode.HOLD, Mode.BRAKE} and np.ptp(rig.q, axis=0).min() > 0.5 and rig.bridge.counts["chunks"] > 50
    assert not np.isnan(rig.q).any()


def test_a_plan_later_than_promised_waits_until_the_two_meet():
    """At 2 s delays jump from 60 to 260 ms, so that what was promised is over when the plan comes; it lies .1 rad beside the one that is followed."""
    def plan(t_obs, obs, prefix, committed):
        return follow_wave(t_obs, obs, prefix, committed) + (np.array([0.1, 0.14]) if 102.0 < t_obs < 102.6 else 0.0)

    waiting: list[float] = []

    def slow(rig, t):
        rig.client.delay = 0.26 if 2.0 < t < 2.6 else 0.04
        if rig.bridge.execution.next is not None:
            waiting.append(t)

    rig = Rig(plan, merge="frozen", execute=6).run(6.0, slow)
    assert rig.bridge.execution.counts["overruns"] == 1 and 5 <= len(waiting) < 20
    assert rig.modes[-1] is Mode.RUN and rig.bridge.execution.next is None
    rig.within_limits()


def test_a_planner_too_slow_for_its_plans_is_told():
    slow, quick = (Rig(delay=d, execute=8).run(4.0).bridge.journal.events for d in (0.22, 0.12))
    assert next(e["why"] for e in slow if e["event"] == "slow").startswith("plans of 0.80 s do not last") and not [e for e in quick if e["event"] == "slow"]


def test_what_the_policy_sees_must_be_there():
    clock = Clock()
    bridge = Bridge(FakeDriver(clock, np.zeros(2)), FakeClient(clock, follow_wave), ROBOT, Execution(ROBOT, HORIZON, DT), obs={"q": (2,), "image": (8, 8, 3)})
    with pytest.raises(DriverError, match="image"):
        bridge.connect()


def test_odd_rates_are_refused():
    with pytest.raises(ValueError, match="multiple"):
        Bridge(FakeDriver(Clock(), np.zeros(2)), FakeClient(Clock(), follow_wave), dataclasses.replace(ROBOT, rate=60.0),
               Execution(ROBOT, HORIZON, DT), obs={"q": (2,)})

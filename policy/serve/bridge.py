"""The control loop on the robot's computer: plans come in, setpoints go out at a fixed rate, and what must not happen does not.

Three processes: planner server | this bridge | the robot's own controller. The loop owns the driver, the plan that is followed, the limiter and the
supervisor; the network lives in the client's thread and hands over whole chunks. Nothing in the loop waits for the planner.
"""
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from policy.serve import realtime
from policy.serve.client import Chunk
from policy.serve.execution import Execution
from policy.serve.journal import Journal
from policy.serve.limiter import Limiter
from policy.serve.robot import Driver, DriverError, RobotSpec, RobotState, Setpoints
from policy.serve.supervisor import Mode, Supervisor

Observe = Callable[[RobotState], dict[str, np.ndarray]]
AHEAD = 16     # setpoints behind the period that the limiter sees, to rejoin a plan it had to leave
TIDY = 2.0     # s between two collections of garbage
GUARD = 0.002  # s before setpoints are due at which it is too late to send them
STILL = 0.02   # share of the velocity limit below which a joint stands
SETTLE = 1.0   # s at the end of a run in which the joints may follow what they were told


class Client(Protocol):
    """What the bridge needs of policy.serve.client.PlannerClient."""

    @property
    def connected(self) -> bool: ...

    def submit(self, obs: dict[str, np.ndarray], t_obs: float, *, epoch: int, prefix: np.ndarray | None = None, committed: int = 0,
               merge: str = "naive", deadline_s: float | None = None, seed: int | None = None) -> int: ...

    def latest(self) -> Chunk | None: ...


@dataclass(frozen=True)
class Settings:
    """stale: periods without a new state until the robot is stopped.   rejects: chunks in a row that may be refused.   missed: periods in a row that
    the loop may be late by.   deadline: s after which an unanswered observation is replaced.   patience, hold: policy.serve.supervisor.
    """
    stale: float = 3.0
    rejects: int = 20
    missed: int = 10
    deadline: float = 0.5
    patience: float = math.inf
    hold: float = 30.0


class Bridge:
    """Drives one robot. `run` blocks; everything else may be looked at from other threads.

    obs: {key: shape of one step} and history: steps that the policy sees.   observe: RobotState -> {key: (*shape)}; the driver's own observations when absent.
    """

    def __init__(self, driver: Driver, client: Client, robot: RobotSpec, execution: Execution, *, obs: Mapping[str, Sequence[int]],
                 history: int = 2, observe: Observe | None = None, settings: Settings | None = None, journal: Journal | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self.obs = {k: tuple(size) for k, size in obs.items()}
        self.driver, self.client, self.robot, self.execution = driver, client, robot, execution
        self.settings, self.journal, self.clock = settings or Settings(), journal or Journal(), clock
        self.observe = observe or (lambda state: state.obs)
        self.period, self.steps = 1 / robot.rate, max(1, round(driver.rate / robot.rate))
        if abs(self.steps * robot.rate - driver.rate) > 1e-6 * driver.rate:
            raise ValueError(f"the robot runs at {driver.rate:g} Hz, no multiple of the control rate {robot.rate:g} Hz: change rate in its conf/robot file")
        self.limiter = Limiter(robot, 1 / driver.rate, self.steps)
        self.supervisor = Supervisor(patience=self.settings.patience, hold=self.settings.hold)
        self.history, self.epoch, self.asked, self.rejected, self.behind, self.answered = history, 0, -math.inf, 0, 0, True
        self.sent, self.still, self.last_refusal, self.was_lost, self.warned, self.skipped = math.nan, -math.inf, "", False, False, False
        self.watchers: list[Callable[[Bridge, float], None]] = []  # told of every period and how late [s] it was: policy.serve.view, recording
        self.states: deque[tuple[RobotState, dict[str, np.ndarray]]] = deque(maxlen=int(robot.rate * (history * execution.dt + 1)) + 8)
        self.counts: Counter[str] = Counter()
        self.state: RobotState | None = None

    def connect(self, timeout: float = 5.0) -> RobotState:
        """Reach the robot; the limiter starts where it stands. DriverError."""
        self.begin(self.driver.connect(self.robot, timeout))
        assert self.state is not None
        return self.state

    def begin(self, state: RobotState) -> None:
        """An episode starts at `state`, the robot at rest there: nothing from before counts any more, chunks in flight included."""
        if state.q.shape != (self.robot.dof,) or not np.isfinite(state.q).all():
            raise DriverError(f"{self.robot.name} reports joints {state.q}, not {self.robot.dof} finite numbers")
        seen = self.observe(state)
        if wrong := [f"{k} {size}" for k, size in self.obs.items() if k not in seen or np.shape(seen[k]) != size]:
            raise DriverError(f"the policy sees {', '.join(wrong)}, but {self.robot.name} observes {', '.join(f'{k} {np.shape(v)}' for k, v in seen.items())}: "
                              "give what is missing by the driver's obs or the bridge's observe; where the robot is simulated, by the options of its task, "
                              "such as robot.driver.options.belt=0.2")
        self.state, self.epoch = state, self.epoch + 1
        self.states.clear()
        self.execution.forget()
        self.limiter.reset(np.asarray(state.info.get("commanded", state.q), float))
        self.rejected, self.behind, self.asked, self.answered, self.sent = 0, 0, -math.inf, True, math.nan
        self.still, self.skipped = -math.inf, False
        self.supervisor.restart()

    def rearm(self, timeout: float = 5.0) -> None:
        """Somebody has looked: STOP -> HOLD, from where the robot stands now. ValueError when it is not stopped, DriverError when it cannot be reached."""
        state = self.driver.connect(self.robot, timeout)
        self.supervisor.rearm(self.clock())
        self.begin(state)
        self._say("rearmed")

    def run(self, seconds: float = math.inf, until: Callable[[RobotState], bool] = lambda state: False, *, priority: int | None = 10,
            cpu: int | None = None) -> dict[str, Any]:
        """Control until `until` is true of a state, `seconds` have passed or the robot is stopped; then brake. What the journal measured.

        Returns once all that was sent has been played and the joints stand, at most SETTLE later than they should.
        priority: SCHED_FIFO priority to ask for, None for an ordinary thread.
        """
        self.journal.open(self.robot)
        partners = [t for t in (getattr(self.client, "thread", None), self.journal.thread) if t is not None]
        got = realtime.claim(priority, cpu, partners) if priority is not None else {"scheduler": "normal"}
        self.journal.start(self.robot, got)
        start, last, count, taken = self.clock(), math.inf, 0, realtime.Taken()
        try:
            for deadline, late in realtime.ticks(self.robot.rate):
                if last == math.inf and (deadline - start >= seconds or (self.state is not None and until(self.state))):
                    last = deadline + len(self.limiter.tail().q) / self.driver.rate + SETTLE
                self.tick(deadline, late, ending=last < math.inf)
                for watch in self.watchers:
                    watch(self, late)
                if late > self.period:
                    self._say("late", why=f"a period came {1e3 * late:.0f} ms late", late_ms=round(1e3 * late, 1), **taken.look())
                if (count := count + 1) % max(1, round(TIDY * self.robot.rate)) == 0:
                    realtime.tidy(deadline + self.period)
                    taken.look()
                if self.supervisor.mode is Mode.STOP or (last < math.inf and self._stands(deadline)):
                    break
                if deadline > last:
                    self._say("moving", why=f"the joints still move {SETTLE:g} s after the last setpoint: they lag, or their speed is not what is measured")
                    break
        except BaseException:
            self._stop()
            raise
        finally:
            if priority is not None:
                realtime.release(partners)
        return self.facts()

    def facts(self) -> dict[str, Any]:
        """What the journal measured since it was started, in numbers."""
        return self.journal.finish({**self.counts, **self.execution.counts}, self.limiter)

    def tick(self, now: float, late: float = 0.0, *, ending: bool = False) -> None:
        """One control period: read, take in a plan, ask for the next, decide, command the period that follows."""
        fault = self._read(now)
        self.behind = self.behind + 1 if late > self.period or self.skipped else 0
        if self.behind > self.settings.missed:
            fault = fault or f"the control loop was late {self.behind} times in a row: give the planner another core or lower the rate"
        first = now + self.period  # what is sent now is played from then on
        self._take(first)
        if self.rejected > self.settings.rejects:
            fault = fault or f"{self.rejected} plans in a row were refused, the last for {self.last_refusal}"
        if not ending and self.supervisor.mode is not Mode.BRAKE:  # what is planned from next is a robot at rest
            self._ask(now)
        self.execution.meet(first)
        before = self.supervisor.mode
        lost = self._lost()
        covered = not ending and not lost and self.execution.covers(first, first + self.period)
        overdue = "the run is over" if ending else lost or self._overdue(now)
        mode = self.supervisor.update(now, covered=covered, overdue=overdue, at_rest=now >= self.still and not lost, fault=fault)
        if mode is not before:
            self._switch(before, mode)
        if mode is Mode.STOP:
            if before is not Mode.STOP:
                self._stop()
        else:
            self._command(first)
        self.journal.tick(now, late, mode, self.state, self.limiter)

    def _read(self, now: float) -> str:
        """Take in the newest state; why the robot must stop, or ''."""
        try:
            state = self.driver.read()
        except DriverError as e:
            return f"driver: {e}"
        if state is not None and np.isfinite(state.q).all():
            self.state = state
            self.states.append((state, self.observe(state)))
        age = now - self.state.t if self.state is not None else math.inf
        if self.state is not None and self.state.info.get("watchdog"):
            return "the robot's own watchdog has tripped: it heard nothing from this loop for too long"
        return f"the robot's state is {1e3 * age:.0f} ms old" if age > (self.settings.stale + 1) * self.period else ""

    def _take(self, first: float) -> None:
        """Let in the newest chunk, or refuse it whole."""
        chunk = self.client.latest()
        if chunk is None:
            return
        if chunk.epoch != self.epoch:
            self.counts["stale_epoch"] += 1
            return
        self.answered = True
        if why := self.execution.refuse(chunk, first, self.limiter.q):
            self.rejected, self.last_refusal = self.rejected + 1, why
            self.counts[f"refused_{why.partition(':')[0]}"] += 1
            self._say("refused", why=why, seq=chunk.seq)
            return
        self.rejected = 0
        seam = self.execution.accept(chunk, first, self.limiter.q)
        self.counts["chunks"] += 1
        if not self.warned and (why := self.execution.too_slow):
            self.warned = True
            self._say("slow", why=why)
        self.journal.chunk(chunk, first, seam, self.execution)

    def _ask(self, now: float) -> None:
        """Submit the newest observations when the next plan is due and none is on its way."""
        lost = now - self.asked > self.settings.deadline
        if not self.states or not self.execution.due(now) or not (self.answered or lost) or (self.answered and now - self.asked < self.period / 2):
            return
        t_obs, obs = self._stacked()
        prefix, committed = self.execution.promised(t_obs, self.period) if self.supervisor.moves else (None, 0)
        self.client.submit(obs, t_obs, epoch=self.epoch, prefix=prefix, committed=committed, merge=self.execution.merge, deadline_s=self.settings.deadline)
        if lost and not self.answered:
            self.counts["unanswered"] += 1
        self.asked, self.answered = now, False
        self.counts["asked"] += 1

    def _stacked(self) -> tuple[float, dict[str, np.ndarray]]:
        """When the newest observation was made, and the last `history` ones, one policy step apart: {key: (history, *shape)}."""
        t, times = self.states[-1][0].t, np.array([state.t for state, _ in self.states])
        rows = [int(np.abs(times - (t - back * self.execution.dt)).argmin()) for back in range(self.history - 1, -1, -1)]
        seen = [self.states[i][1] for i in rows]
        return t - self.robot.latency_obs, {k: np.stack([np.asarray(one[k]) for one in seen]) for k in self.obs}

    def _lost(self) -> str:
        """Why the robot does not do what it was told, '' when it does; once it stands, the limiter goes on from there."""
        if self.state is None or not self.state.info.get("lost"):
            self.was_lost = False
            return ""
        if not self.was_lost:
            self.counts["lost"] += 1
            self._say("lost", why=self.state.info.get("why", ""))
            self._start_over()  # the robot is not where the plan believes it to be
        self.was_lost = True
        if not self.state.info.get("rest"):
            return f"the robot refused setpoints: {self.state.info.get('why', '')}"
        self.limiter.reset(np.asarray(self.state.info["commanded"], float))
        self.sent, self.still = math.nan, -math.inf
        return ""

    def _stands(self, now: float) -> bool:
        """Whether all that was sent has been played, and the robot, seen since then, stands."""
        if self.state is None or now < self.still or self.state.t < self.still or not self.state.info.get("rest", True):
            return False
        return not self.was_lost and bool((np.abs(self.state.dq) <= STILL * np.asarray(self.robot.velocity)).all())

    def _overdue(self, now: float) -> str:
        if self.execution.now is None:
            return ""
        if not self.client.connected:
            return "the planner is not connected"
        slack = max(self.execution.delays, default=0.0) + max(self.execution.dt, 2 * self.period)
        age = now - self.execution.now.t0 - self.execution.execute * self.execution.dt
        return f"the next plan is {age:.2f} s late" if age > slack else ""

    def _switch(self, before: Mode, mode: Mode) -> None:
        if mode in (Mode.BRAKE, Mode.STOP):
            self._start_over()
        self._say("mode", before=str(before), mode=str(mode), why=self.supervisor.reason)

    def _start_over(self) -> None:
        """Whatever is planned or in flight started from somewhere else."""
        self.epoch += 1
        self.execution.forget()
        self.answered = True

    def _command(self, first: float) -> None:
        """Setpoints of the period from `first` on and the braking tail behind it. A period that comes too late is left to the tail sent before."""
        self.skipped = self.clock() > first - GUARD
        if self.skipped:
            self.counts["skipped"] += 1
            return
        if (gap := round((first - self.sent) * self.driver.rate) if math.isfinite(self.sent) else 0) > 0:
            self.limiter.skip(gap)
        self.sent = first + self.period
        if self.supervisor.moves:
            at = first + (1 + np.arange(self.steps + AHEAD)) / self.driver.rate + self.robot.latency_action
            body = self.limiter.follow(*self.execution.target(np.minimum(at, self.execution.end)))
        else:
            body = self.limiter.brake()
        tail = self.limiter.tail()
        q, dq, ddq = (np.concatenate([a, b]) for a, b in zip(body, tail, strict=True))
        if len(moving := np.flatnonzero(dq.any(1))):
            self.still = first + (moving[-1] + 2) / self.driver.rate + self.robot.latency_action  # setpoint i is due i + 1 after `first`
        try:
            self.driver.write(Setpoints(first + 1 / self.driver.rate, 1 / self.driver.rate, q, dq, ddq))
        except DriverError as e:
            self.supervisor.fault = self.supervisor.fault or f"driver: {e}"

    def _stop(self) -> None:
        try:
            self.driver.stop()
        except DriverError as e:
            self._say("stop_failed", why=str(e))

    def _say(self, event: str, **facts: Any) -> None:
        self.journal.event(self.clock(), event, facts)

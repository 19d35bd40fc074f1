"""The plan a robot follows, in continuous time: which chunks are let in, how they take over, what is due when, what is promised to the planner."""
import math
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from policy.serve.client import Chunk
from policy.serve.interpolate import cubic
from policy.serve.robot import RobotSpec
from policy.timeline import CONTINUES, MERGES, Plan, committed_steps, shifted, take_over

MARGIN = 0.05  # of the range between lower and upper that an action may lie outside; the limiter keeps the robot inside
SPEED = 1.5    # times the velocity limit that an action may differ from the one before
ROUNDING = 1e-3  # of `step`: a gripper from open to closed is just its range
KEPT = 10      # delays that are remembered (Black 2025)


@dataclass(frozen=True)
class Following:
    """A plan with its place in time.   knots: (1 + t, dof), the first is where the robot was told to be when the chunk was observed."""
    plan: Plan
    t0: float
    knots: np.ndarray


class Execution:
    """What a robot does next according to the newest chunks.

    Action i of a chunk observed at t0 is reached at t0 + (i + knot) dt; cubic in between. Demonstrations hold action i from t0 + i dt to t0 + (i + 1) dt, so
    knot=0.5 has the robot on time in the mean, 1 half a step late.   execute: actions from one observation that is planned from
    to the next.   merge: policy.timeline.MERGES.   most: actions of a prefix that the planner takes.   align: False starts a chunk when it arrives
    instead of when it is due, as naive robots do. A robot at rest starts so in any case: it has missed nothing, and being where a plan says by now would
    be a jump. The next plan is on time.
    """

    def __init__(self, robot: RobotSpec, horizon: int, dt: float, *, merge: str = "naive", execute: int = 8, knot: float = 0.5, align: bool = True,
                 decay: float = 0.1, most: int | None = None):
        if merge not in MERGES:
            raise ValueError(f"merge {merge!r} is unknown; use one of {', '.join(MERGES)}")
        if not isinstance(align, bool):
            raise ValueError(f"control.align={align!r} must be true or false")
        if type(execute) is not int or isinstance(knot, bool) or not isinstance(knot, int | float):
            raise ValueError(f"control.execute={execute!r} must be a whole number, control.knot={knot!r} a number from 0 to 1")
        if not 1 <= execute < horizon:
            raise ValueError(f"execute={execute} must be between 1 and {horizon - 1}: a plan of {horizon} actions must outlast its successor's planning")
        if not 0 <= knot <= 1:
            raise ValueError(f"knot={knot} must be between 0 and 1")
        self.robot, self.horizon, self.dt, self.merge, self.execute = robot, horizon, dt, merge, execute
        self.knot, self.align, self.decay, self.most = knot, align, decay, horizon if most is None else most
        self.lower, self.upper = np.asarray(robot.lower, float), np.asarray(robot.upper, float)
        self.step = np.asarray(robot.step, float) if len(robot.step) else SPEED * np.asarray(robot.velocity, float) * dt
        self.delays: deque[float] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()
        self.forget()

    def forget(self) -> None:
        """Nothing is planned; what is known about delays stays."""
        self.now: Following | None = None
        self.next: Following | None = None  # accepted too late to join the plan it continues; takes over where the two meet
        self.promises: dict[float, float] = {}  # {s of an observation: s until which its plan was promised the old one}

    def refuse(self, chunk: Chunk, now: float, q: np.ndarray) -> str:
        """Why a chunk must not move the robot, '' when it may: the whole chunk, never a part of it.   q: (dof,) commanded at `now`."""
        a = chunk.actions
        if a.shape != (self.horizon, self.robot.dof):
            return f"shape: {a.shape} instead of {(self.horizon, self.robot.dof)}"
        if not np.isfinite(a).all():
            return "not_finite: NaN or infinity"
        if abs(chunk.dt - self.dt) > 1e-9:
            return f"rate: actions {chunk.dt} s apart instead of {self.dt}"
        newest = self.next or self.now
        if newest is not None and self.align and chunk.t0 <= newest.t0:
            return "order: not younger than the plan that is followed"
        if now + self.dt > chunk.t0 + (self.horizon - 1 + self.knot) * self.dt:
            return "late: all of it has passed"
        wide = MARGIN * (self.upper - self.lower)
        if (bad := (a < self.lower - wide) | (a > self.upper + wide)).any():
            i, j = np.argwhere(bad)[0]
            return f"limits: {self.robot.joints[j]} to {a[i, j]:.4g}, outside {self.lower[j]:g} … {self.upper[j]:g} {self.robot.units[j]}"
        if (bad := np.abs(np.diff(a, axis=0)) > (1 + ROUNDING) * self.step).any():
            i, j = np.argwhere(bad)[0]
            return f"speed: {self.robot.joints[j]} by {a[i + 1, j] - a[i, j]:.3g} {self.robot.units[j]} in one step, {self.step[j]:.3g} allowed"
        at = min(max(0.0, (now - chunk.t0) / self.dt), self.horizon - 1) if self.align and self.now is not None else 0.0
        jump = shifted(a[None], at, 1)[0][0, 0] - q
        if (bad := np.abs(jump) > 2 * self.step).any():
            j = int(np.argmax(bad))
            return f"jump: {self.robot.joints[j]} starts {jump[j]:.3g} {self.robot.units[j]} from where it is commanded to be, {2 * self.step[j]:.3g} allowed"
        return ""

    def accept(self, chunk: Chunk, now: float, q: np.ndarray) -> float:
        """Follow it from `now` (what is sent before is fixed); the seam: largest change of what is due then, in shares of `step`.

        From its observation to `now` is the delay that the planner is told to expect.
        """
        rest = self.align and self.now is None
        t0 = now + (1 - self.knot) * self.dt if rest else chunk.t0 if self.align else now
        self.delays.append(now - chunk.t0)
        before = self.target(np.array([now]))[0][0] if self.covers(now, now) else None
        anchor = self.target(np.array([t0]))[0][0] if self.align and self.covers(t0, t0) else q
        old = self.now
        plan = Plan.of(chunk.actions[None]) if old is None else take_over(old.plan, chunk.actions[None], (t0 - old.t0) / self.dt, self.merge, decay=self.decay)
        new = Following(plan, t0, np.concatenate([anchor[None], plan.actions[0]]))
        self.next = None
        late = now > self.promises.get(round(chunk.t0, 6), math.inf) + 1e-9
        self.promises = {t: until for t, until in self.promises.items() if t > chunk.t0}
        if late and before is not None:
            self.counts["overruns"] += 1
            self.next = new
            self.meet(now)
        else:
            self.now = new
        after = self.target(np.array([now]))[0][0]
        return 0.0 if before is None else float(np.abs((after - before) / self.step).max())

    def meet(self, now: float) -> None:
        """Let a plan that came too late take over as soon as it is near the one that is followed, at the latest when that one ends."""
        if self.next is None:
            return
        soon = np.array([now, now + self.dt / 2])  # at one place and going the same way
        gap = np.abs(self._at(self.next, soon)[0] - self.target(soon)[0]) / self.step
        if gap.max() < 0.1 or not self.covers(now, now + 2 * self.dt):
            self.now, self.next = self.next, None

    def covers(self, start: float, end: float) -> bool:
        """Whether there is a plan from start to end [s]."""
        return self.now is not None and start >= self.now.t0 - self.dt and end <= self.end

    @property
    def end(self) -> float:
        """s: when the plan ends, -inf without one."""
        return -math.inf if self.now is None else self.now.t0 + (self.horizon - 1 + self.knot) * self.dt

    def target(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities (n, dof) that are due at times (n,) [s]."""
        assert self.now is not None
        return self._at(self.now, times)

    def _at(self, one: Following, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q, dq = cubic(one.knots, (times - one.t0) / self.dt + 1 - self.knot)
        return q, dq / self.dt

    def promised(self, t_obs: float, period: float) -> tuple[np.ndarray | None, int]:
        """What is going to be executed from t_obs on, (p, dof) actions, and how many of them surely will, by the longest of the last delays.

        None where nothing is promised.   period: s of a control period, until delays have been measured.
        """
        if self.now is None or self.merge not in CONTINUES:
            return None, 0
        ahead, known = shifted(self.now.plan.actions, (t_obs - self.now.t0) / self.dt, self.horizon)
        p = int(known.sum())
        if not p or not known[0]:
            return None, 0
        delay = max(self.delays, default=self.dt + period)
        needed = committed_steps([delay + (1 - self.knot) * self.dt], self.dt, self.horizon)  # the curve to its next knot is fixed too
        committed = min(p, self.most, needed)
        if committed < needed:
            self.counts["under_committed"] += 1
        self.promises[round(t_obs, 6)] = t_obs + delay
        return ahead[0, :p], committed

    @property
    def too_slow(self) -> str:
        """Why plans end before the next ones come, '' where they last."""
        needed = self.execute * self.dt + 2 * max(self.delays, default=0.0)
        if len(self.delays) < 3 or needed <= (self.horizon - 1 + self.knot) * self.dt:
            return ""
        return (f"plans of {self.horizon * self.dt:.2f} s do not last for {self.execute} actions and twice the delay of {max(self.delays):.2f} s, "
                f"{needed:.2f} s in all: execute fewer, plan in fewer steps (sampler.steps), or train with a longer horizon")

    def due(self, now: float) -> bool:
        """Whether it is time to plan from a new observation."""
        newest = self.next or self.now
        return newest is None or now - newest.t0 >= self.execute * self.dt - 1e-9

"""When the robot moves, brakes, holds and stops: a state machine without clocks or robots of its own."""
import math
from enum import StrEnum


class Mode(StrEnum):
    RUN = "RUN"             # a plan covers what is due, and the next one is not overdue
    DEGRADED = "DEGRADED"   # a plan still covers what is due, but the next one is overdue or the planner is gone
    BRAKE = "BRAKE"         # coming to rest within the limits
    HOLD = "HOLD"           # at rest; a fresh plan that starts here resumes
    STOP = "STOP"           # the driver has been stopped; only rearm() leads out


class Supervisor:
    """RUN -> DEGRADED -> BRAKE -> HOLD -> STOP.

    patience: s that a plan may go on after the next one is overdue, inf: as long as it lasts.   hold: s at rest without a plan until STOP.
    Whatever brakes comes to rest before it goes on. `reason` says what caused the present mode.
    """

    since: float
    reason: str
    fault: str

    def __init__(self, *, patience: float = math.inf, hold: float = 30.0):
        if not patience >= 0 or not hold > 0:
            raise ValueError(f"patience={patience} must not be negative and hold={hold} be above 0 seconds")
        self.patience, self.hold = patience, hold
        self.mode = Mode.HOLD
        self.restart()

    def update(self, now: float, *, covered: bool, overdue: str = "", at_rest: bool = True, fault: str = "") -> Mode:
        """The mode for the coming period.

        covered: a plan says where to be throughout it.   overdue: why the next plan is missing, '' when it is not.   at_rest: what is
        commanded stands still.   fault: why the robot must stop until somebody has looked, '' when all is well.
        """
        self.fault = self.fault or fault
        match self.mode:
            case Mode.STOP:
                pass
            case Mode.BRAKE if at_rest:
                self._go(Mode.STOP if self.fault else Mode.HOLD, now, self.fault or self.reason)
            case Mode.BRAKE:
                pass
            case _ if self.fault:
                self._go(Mode.STOP if self.mode is Mode.HOLD and at_rest else Mode.BRAKE, now, self.fault)
            case Mode.HOLD if covered:
                self._go(Mode.RUN, now, "a fresh plan")
            case Mode.HOLD:
                if self.since == -math.inf:
                    self.since = now
                if now - self.since >= self.hold:
                    self._go(Mode.STOP, now, f"no plan for {self.hold:g} s ({self.reason})")
            case _ if not covered:
                self._go(Mode.BRAKE, now, f"the plan ran out ({overdue})" if overdue else "the plan ran out")
            case Mode.DEGRADED if overdue and now - self.since > self.patience:
                self._go(Mode.BRAKE, now, overdue)
            case Mode.DEGRADED if not overdue:
                self._go(Mode.RUN, now, "a fresh plan")
            case Mode.RUN if overdue:
                self._go(Mode.DEGRADED, now, overdue)
                if self.patience == 0:
                    self._go(Mode.BRAKE, now, overdue)
        return self.mode

    def restart(self) -> None:
        """HOLD and nothing wrong, as at first; a STOP stays one."""
        if self.mode is not Mode.STOP:
            self.mode, self.since, self.reason, self.fault = Mode.HOLD, -math.inf, "waiting for the first plan", ""

    def rearm(self, now: float) -> None:
        """STOP -> HOLD, by somebody who has looked. ValueError in any other mode."""
        if self.mode is not Mode.STOP:
            raise ValueError(f"there is nothing to re-arm: the robot is in {self.mode}")
        self.fault = ""
        self._go(Mode.HOLD, now, "re-armed")

    @property
    def moves(self) -> bool:
        return self.mode in (Mode.RUN, Mode.DEGRADED)

    def _go(self, mode: Mode, now: float, reason: str) -> None:
        self.mode, self.since, self.reason = mode, now, reason

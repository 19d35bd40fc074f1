"""What a robot asked of a planner and what came of it: one request that waits to be sent, those on their way, the newest chunk.

Shared by the robot's thread and the network's; no call waits for anything but the lock, except wait().
"""
import math
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from policy.serve.card import Card
from policy.serve.packing import CODES, Limits, WireError
from policy.serve.wire import Err, Observation, Planned, pack


class PlannerError(RuntimeError):
    """The answer to a request is that there is none.   code: of policy.serve.packing.CODES, or lost, stale, disbelieved."""

    def __init__(self, code: str, text: str):
        super().__init__(f"{text} ({code})")
        self.code, self.text = code, text


@dataclass(frozen=True)
class Chunk:
    """A plan as it arrived.   seq, epoch: of the request.   t0: s on this computer's monotonic clock when action 0 is due, dt: s between actions.

    actions: (t, d) float64, physical units.   plan_ms, queue_ms: time the server planned and waited.   rtt_ms: from the request's way out to now.
    """
    seq: int
    epoch: int
    t0: float
    dt: float
    actions: np.ndarray
    plan_ms: float
    queue_ms: float
    rtt_ms: float
    model_id: str


@dataclass
class Stats:
    """connects: connections made.   errors: by code of the server, or kind of failure.   rejected: messages not believed, by reason.   rtt_ms: the newest."""
    connects: int = 0
    sent: int = 0
    chunks: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    rtt_ms: deque[float] = field(default_factory=lambda: deque(maxlen=1024))


@dataclass(frozen=True)
class Asked:
    """A request.   t_obs, made, deadline, sent: s, monotonic; deadline infinite where there is none, sent 0 before."""
    request: Observation
    t_obs: float
    made: float
    deadline: float = math.inf
    sent: float = 0.0


class Ledger:
    """stale: s after which a request that could not be sent is dropped."""

    def __init__(self, stale: float):
        self.stale, self.stats, self.changed = stale, Stats(), threading.Condition()
        self.seq, self.epoch = 0, 0
        self.slot: Asked | None = None
        self.open: dict[int, Asked] = {}
        self.newest: Chunk | None = None
        self.ended: deque[tuple[int, Chunk | PlannerError]] = deque(maxlen=256)

    def put(self, make: Callable[[int], Asked]) -> int:
        """The next request is make(seq); it replaces one that was not sent yet."""
        with self.changed:
            self.seq += 1
            asked = make(self.seq)
            self.epoch = asked.request.epoch
            if self.slot is not None:
                self._end(self.slot, PlannerError("superseded", "a newer observation took its place before it was sent"))
            self.slot = asked
            return self.seq

    def waiting(self) -> int:
        with self.changed:
            return len(self.open) + (self.slot is not None)

    def latest(self) -> Chunk | None:
        """The newest chunk of the current epoch, once."""
        with self.changed:
            chunk, self.newest = self.newest, None
            return chunk if chunk is not None and chunk.epoch == self.epoch else None

    def wait(self, seq: int, timeout: float, give_up: Callable[[], object]) -> Chunk | PlannerError | None:
        """What came of request `seq`; None after timeout [s] or when give_up() is true."""
        def answer() -> Chunk | PlannerError | None:
            return next((answer for n, answer in self.ended if n == seq), None)

        with self.changed:
            self.changed.wait_for(lambda: answer() or give_up(), timeout)
            found = answer()
            if self.newest is found:
                self.newest = None
            return found

    def oldest(self) -> float | None:
        """When the request was sent that is on its way for longest [s, monotonic]."""
        with self.changed:
            return min((one.sent for one in self.open.values()), default=None)

    def send(self, now: float, limits: Limits) -> bytes:
        """The message to send now, b'' when there is none; its request is on its way from now on."""
        with self.changed:
            one, self.slot = self.slot, None
            if one is None:
                return b""
            try:
                if now >= one.deadline:
                    raise WireError("expired", "its deadline passed before it was sent")
                if now - one.made > self.stale:
                    raise WireError("stale", "there was no connection while it was fresh")
                left = None if one.deadline == math.inf else 1e3 * (one.deadline - now)
                data = pack(replace(one.request, deadline_ms=left), limits)
            except WireError as e:
                self._end(one, PlannerError(e.code, e.text))
                return b""
            self.open[one.request.seq] = replace(one, sent=now)
            self.stats.sent += 1
            return data

    def lost(self, kind: str, text: str) -> None:
        """The connection is gone, and with it all that was on its way: nothing of before is answered after a reconnection."""
        with self.changed:
            self.stats.errors[kind] += 1
            for one in list(self.open.values()):
                self._end(one, PlannerError("lost", f"the connection was lost: {text}"))

    def planned(self, m: Planned, card: Card, now: float) -> None:
        """Believe a chunk, or count why not."""
        with self.changed:
            one = self.open.get(m.seq)
            if one is None or (one.request.epoch, one.request.t_obs) != (m.epoch, m.t_obs):
                self.stats.rejected["unasked"] += 1
                return
            if why := disbelief(m, card):
                self.stats.rejected[why] += 1
                self._end(one, PlannerError("disbelieved", f"the server's chunk cannot be believed: {why}"))
                return
            chunk = Chunk(m.seq, m.epoch, one.t_obs, m.dt, m.actions.astype(np.float64), m.plan_ms, m.queue_ms, 1e3 * (now - one.sent), m.model_id)
            self.stats.chunks += 1
            self.stats.rtt_ms.append(chunk.rtt_ms)
            if m.epoch != self.epoch:
                self.stats.rejected["epoch"] += 1
            elif self.newest is None or self.newest.epoch != self.epoch or self.newest.seq < m.seq:
                self.newest = chunk
            self._end(one, chunk)

    def refusal(self, m: Err) -> None:
        """The server says no to a request, or to something that it could not read."""
        with self.changed:
            code = m.code if m.code in CODES else "other"
            if (one := self.open.get(-1 if m.seq is None else m.seq)) is not None:
                self._end(one, PlannerError(code, m.text))
            else:
                self.stats.errors[code] += 1

    def _end(self, one: Asked, answer: Chunk | PlannerError) -> None:
        self.open.pop(one.request.seq, None)
        if isinstance(answer, PlannerError):
            self.stats.errors[answer.code] += 1
        self.ended.append((one.request.seq, answer))
        self.changed.notify_all()


def disbelief(m: Planned, card: Card) -> str:
    """Why a chunk is none of this card's model; '' when it is."""
    if m.model_id != card.model_id:
        return "model"
    if abs(m.dt - card.dt) > 1e-9:
        return "dt"
    if m.actions.shape != (card.horizon, card.action_dim) or m.actions.dtype.kind != "f":
        return "shape"
    return "" if np.isfinite(m.actions).all() else "not_finite"

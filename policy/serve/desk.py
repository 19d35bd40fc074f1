"""One plan at a time, in a thread of its own, for every connection in its turn; each has one place, in which its newest request waits."""
import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from policy.serve.card import Backend
from policy.serve.packing import WireError
from policy.serve.wire import Observation
from policy.timeline import CONTINUES

WARM_UP = 3
log = logging.getLogger("dipole.serve")


@dataclass(frozen=True)
class Plan:
    """actions: (horizon, d), finite, <f4 or <f8."""
    actions: np.ndarray
    plan_ms: float
    queue_ms: float


Answer = Callable[[Observation, Plan | WireError], Awaitable[None]]


class Place:
    """A connection's place at the desk.   answer: hands over what came of a request; it waits for the connection, and only that connection for it."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.request: Observation | None = None
        self.came = 0.0  # s, monotonic
        self.busy = False


class Desk:
    """backend: what plans."""

    def __init__(self, backend: Backend):
        self.backend, self.card = backend, backend.card
        self.line: deque[Place] = deque()
        self.some = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "planner")
        self.tasks: set[asyncio.Task[None]] = set()

    async def warm_up(self) -> None:
        """The first plans, slow ones, before anybody waits for them. ValueError when they are none."""
        obs = {k: np.zeros((self.card.t_obs, *size), np.float32) for k, size in self.card.obs.items()}
        promised = np.zeros((self.card.horizon, self.card.action_dim), np.float32)
        trials = [Observation(0, 0, 0, obs, seed=seed) for seed in range(WARM_UP)]
        trials += [Observation(0, 0, 0, obs, prefix=promised, committed=min(1, self.card.committed), merge=merge, seed=0)
                   for merge in self.card.merges if merge in CONTINUES]
        for trial in trials:
            plan = await self._plan(trial, time.monotonic())
            if isinstance(plan, WireError):
                raise ValueError(f"the model cannot be served: {plan.text}. Its answer to an observation of zeros (merge={trial.merge}) shows it")

    def put(self, place: Place, request: Observation) -> Observation | None:
        """Let the request wait at its place; returns the one that it pushes out."""
        before, place.request, place.came = place.request, request, time.monotonic()
        if before is None and not place.busy:
            self._queue(place)
        return before

    def leave(self, place: Place) -> None:
        place.request = None

    async def run(self) -> None:
        """Plan for ever."""
        while True:
            while not self.line:
                self.some.clear()
                await self.some.wait()
            place = self.line.popleft()
            request, place.request = place.request, None
            if request is None:  # it left
                continue
            place.busy = True
            task = asyncio.create_task(self._hand_over(place, request, await self._plan(request, place.came)))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _plan(self, request: Observation, came: float) -> Plan | WireError:
        start = time.monotonic()
        waited = 1e3 * (start - came)
        if request.deadline_ms is not None and waited >= request.deadline_ms:
            return WireError("expired", f"the deadline of {request.deadline_ms:.0f} ms passed before planning began", request.seq)
        try:
            actions = await asyncio.get_running_loop().run_in_executor(self.thread, self._work, request)
        except WireError as e:
            return e
        except Exception:
            log.exception("a plan failed")
            return WireError("failed", "the planner failed; the server's log says why", request.seq)
        return Plan(actions, 1e3 * (time.monotonic() - start), waited)

    def _work(self, request: Observation) -> np.ndarray:
        """In the planner's thread."""
        card, noise = self.card, request.noise
        if noise is None and request.seed is not None:
            noise = np.random.default_rng(request.seed).standard_normal(card.noise_size, np.float32)
        actions = np.asarray(self.backend.plan(request.obs, noise=noise, prefix=request.prefix, committed=request.committed, merge=request.merge))
        if actions.shape != (card.horizon, card.action_dim):
            raise TypeError(f"the backend planned {actions.shape} instead of {(card.horizon, card.action_dim)}")
        if not np.isfinite(actions).all():
            raise WireError("not_finite", "the plan holds NaN or infinity, so it is not sent", request.seq)
        return actions.astype("<f8" if actions.dtype == np.float64 else "<f4")

    async def _hand_over(self, place: Place, request: Observation, plan: Plan | WireError) -> None:
        try:
            await place.answer(request, plan)
        finally:
            place.busy = False
            if place.request is not None:
                self._queue(place)

    def _queue(self, place: Place) -> None:
        self.line.append(place)
        self.some.set()

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

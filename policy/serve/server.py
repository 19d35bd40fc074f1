"""Plans for robots over a websocket: `/plan` speaks policy.serve.wire, `/` the openpi protocol; `/healthz` and `/metrics` are plain HTTP.

The event loop never plans (policy.serve.desk) and never waits for one client to serve another. A stranger gets as far as one HTTP request.
"""
import asyncio
import contextlib
import hmac
import logging
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from policy.serve import openpi
from policy.serve.card import Backend
from policy.serve.desk import Desk, Place, Plan
from policy.serve.entrance import Entrance
from policy.serve.metrics import Metrics
from policy.serve.packing import Limits, WireError
from policy.serve.receive import receive
from policy.serve.wire import Err, Hello, Message, Observation, Planned, fit, pack, unpack

SILENT = logging.Logger("dipole.websockets", logging.CRITICAL + 1)  # strangers must not fill the log


@dataclass(frozen=True)
class Service:
    """How much one client may take.   connections: at most.   errors: of a client in one second, before its connection ends.

    open, ping, pong, send: s; for the opening handshake, between pings, for their answer, for a client to take a message.
    """
    connections: int = 16
    errors: int = 10
    open: float = 2.0
    ping: float = 0.5
    pong: float = 2.0
    send: float = 2.0


class PlannerServer:
    """backend: what plans.   entrance: where it listens and who comes in.   openpi: whether `/` speaks it."""

    def __init__(self, backend: Backend, entrance: Entrance | None = None, *, openpi: bool = True, limits: Limits | None = None,
                 service: Service | None = None):
        self.backend, self.entrance, self.openpi = backend, entrance or Entrance(), openpi
        self.port, self.limits, self.service = self.entrance.port, limits or Limits(), service or Service()
        self.metrics = Metrics(backend.card.model_id)
        self.hello = pack(Hello(backend.card, self.limits.bytes))
        unpack(self.hello)  # a card that clients would refuse is refused here
        self.alive: dict[_Bounded, None] = {}  # oldest first, handshakes included
        self.talking = 0

    @property
    def url(self) -> str:
        host = f"[{self.entrance.host}]" if ":" in self.entrance.host else self.entrance.host
        return f"{'wss' if self.entrance.tls else 'ws'}://{host}:{self.port}"

    def run(self, ready: Callable[[str], None] = print) -> None:
        """Serve until SIGTERM or SIGINT; ready(line) once plans are quick. ValueError, OSError when it cannot be, KeyboardInterrupt on SIGINT before that."""
        asyncio.run(self._until_signal(ready))

    async def _until_signal(self, ready: Callable[[str], None]) -> None:
        ended = asyncio.Event()
        async with self.serving():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, ended.set)
            ready(f"ready {self.url} {describe(self.backend.card)}")
            await ended.wait()

    @contextlib.asynccontextmanager
    async def serving(self) -> Any:
        """Warm up, listen, plan; on leaving, close every connection (1001)."""
        self.desk = Desk(self.backend)
        s = self.service
        planner: asyncio.Task[None] | None = None
        try:
            await self.desk.warm_up()
            planner = asyncio.create_task(self.desk.run())
            options: dict[str, Any] = {
                "open_timeout": s.open, "ping_interval": s.ping, "ping_timeout": s.pong, "close_timeout": s.send, "max_size": self.limits.bytes,
                "max_queue": 2, "write_limit": 2**16, "compression": None, "origins": [None], "server_header": None, "logger": SILENT, "ssl": self.entrance.tls,
                "create_connection": self._connection}
            async with contextlib.AsyncExitStack() as stack:
                with self.entrance.told():
                    server = await stack.enter_async_context(serve(self._talk, self.entrance.host, self.port, process_request=self._gate, **options))
                self.port = next(iter(server.sockets)).getsockname()[1]
                yield self
        finally:
            if planner is not None:
                planner.cancel()
            self.desk.close()

    def _connection(self, *args: Any, **options: Any) -> ServerConnection:
        return _Bounded(*args, alive=self.alive, most=2 * self.service.connections, **options)

    def _gate(self, connection: ServerConnection, request: Request) -> Response | None:
        """Who comes in: HTTP answers, or None for a websocket."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "ok\n")
        if self.entrance.token is not None and not authorised(request.headers, self.entrance.token):
            self.metrics.refused.labels("token").inc()
            return connection.respond(HTTPStatus.UNAUTHORIZED, "this planner wants its token: Authorization: Bearer TOKEN\n")
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, self.metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if path != "/plan" and not (path == "/" and self.openpi):
            return connection.respond(HTTPStatus.NOT_FOUND, "there are /plan, /healthz and /metrics" + (", and / for openpi\n" if self.openpi else "\n"))
        if self.talking >= self.service.connections:
            self.metrics.refused.labels("full").inc()
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "all places are taken\n")
        return None

    async def _talk(self, ws: ServerConnection) -> None:
        assert ws.request is not None
        dialect = "openpi" if ws.request.path.partition("?")[0] == "/" else "dipole"
        gauge = self.metrics.connections.labels(dialect)
        gauge.inc()
        self.talking += 1
        try:
            await (openpi.talk(ws, self.desk, self) if dialect == "openpi" else self._dipole(ws))
        except ConnectionClosed as e:
            if e.sent is not None and e.sent.code == 1009:
                self.metrics.requests.labels("too_big").inc()
        finally:
            self.talking -= 1
            gauge.dec()

    async def _dipole(self, ws: ServerConnection) -> None:
        """hello; then observations in, chunks and errs out."""
        await self.send(ws, self.hello)

        async def answer(request: Observation, plan: Plan | WireError) -> None:
            with contextlib.suppress(ConnectionClosed):
                if isinstance(plan, WireError):
                    await self._refuse(ws, plan)
                else:
                    await self._say(ws, Planned(request.seq, request.epoch, request.t_obs, self.backend.card.dt, plan.actions, plan.plan_ms, plan.queue_ms,
                                                self.backend.card.model_id))
                    self.metrics.planned(plan.plan_ms, plan.queue_ms)

        place, budget = Place(answer), Budget(self.service.errors)
        try:
            while True:
                data = await receive(ws)
                try:
                    request = unpack(data, self.limits)  # type: ignore[arg-type]  # text is refused there
                    if not isinstance(request, Observation):
                        raise WireError("schema", "a client sends messages of type obs")
                    fit(request, self.backend.card)
                except WireError as e:
                    await self._refuse(ws, e)
                    if budget.spent():
                        self.metrics.requests.labels("too_many_errors").inc()
                        await ws.close(1008, f"more than {self.service.errors} errors in a second")
                    continue
                if (before := self.desk.put(place, request)) is not None:
                    await self._refuse(ws, WireError("superseded", "a newer observation took its place", before.seq))
        finally:
            self.desk.leave(place)

    async def _refuse(self, ws: ServerConnection, e: WireError) -> None:
        self.metrics.requests.labels(e.code).inc()
        await self._say(ws, Err(e.code, e.text, e.seq))

    async def _say(self, ws: ServerConnection, message: Message) -> None:
        await self.send(ws, pack(message))

    async def send(self, ws: ServerConnection, data: bytes | str) -> None:
        """Send, or end the connection of a client that does not read."""
        try:
            async with asyncio.timeout(self.service.send):
                await ws.send(data)
        except TimeoutError:
            self.metrics.refused.labels("slow_reader").inc()
            ws.transport.abort()


class _Bounded(ServerConnection):
    """Beyond `most` connections the oldest whose handshake is not over is let go, so that strangers who never finish theirs keep nobody out;
    the new one where there is none.   alive: all of them, oldest first.
    """

    def __init__(self, *args: Any, alive: "dict[_Bounded, None]", most: int, **options: Any):
        super().__init__(*args, **options)
        self.alive, self.most = alive, most

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if len(self.alive) >= self.most:
            next((c for c in self.alive if c.protocol.state is State.CONNECTING), self).transport.abort()
        self.alive[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive.pop(self, None)
        super().connection_lost(exc)


class Budget:
    """most: errors in one second that are forgiven."""

    def __init__(self, most: int):
        self.times: deque[float] = deque(maxlen=most + 1)

    def spent(self) -> bool:
        """Count an error; whether it was one too many."""
        self.times.append(time.monotonic())
        return len(self.times) == self.times.maxlen and self.times[-1] - self.times[0] < 1


def authorised(headers: Headers, token: str) -> bool:
    """Whether the request knows the token, in a time that says nothing about it. openpi's clients say Api-Key."""
    said = headers.get_all("Authorization")
    kind, _, secret = (said[0] if len(said) == 1 else "").partition(" ")
    return hmac.compare_digest(secret.encode("utf-8", "surrogateescape"), token.encode()) and kind in ("Bearer", "Api-Key")


def describe(card: Any) -> str:
    """One line for people: what robot the model is for."""
    seen = ", ".join(f"{k} {tuple(size)}" for k, size in card.obs.items())
    return (f"model {card.model_id} task {card.task or '?'}: {card.t_obs} x [{seen}] -> {card.horizon} x {card.action_dim} actions at {1 / card.dt:g} Hz, "
            f"merges {', '.join(card.merges)}")

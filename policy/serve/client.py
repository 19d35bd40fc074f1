"""Asks a planner server for chunks without ever waiting for it: for robots, so numpy, msgpack and websockets are all it needs.

A thread of its own holds the connection and takes it up again for ever. What comes from the server is believed only when it answers a request that is
still open, in the current epoch, from the model that was agreed on, and is finite (policy.serve.ledger).
"""
import asyncio
import contextlib
import logging
import math
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus, WebSocketException
from websockets.protocol import State

from policy.serve.card import Card
from policy.serve.expect import Expect, WrongRobot
from policy.serve.ledger import Asked, Chunk, Ledger, PlannerError, Stats
from policy.serve.packing import Limits, WireError, sendable
from policy.serve.receive import receive
from policy.serve.wire import WHOLE, Err, Hello, Observation, Planned, unpack

__all__ = ["Chunk", "Expect", "PlannerClient", "PlannerError", "Refused", "Stats", "Timeouts", "WrongRobot"]
PATH = "/plan"
FINAL = ("http_401", "http_403", "http_404", "certificate", "no_tls", "hello")  # kinds of failure that no waiting mends
SILENT = logging.Logger("dipole.websockets", logging.CRITICAL + 1)  # a server that is away is counted, not logged twenty times a second


@dataclass(frozen=True)
class Timeouts:
    """s.   open: for a connection and its hello.   ping: between two, pong: until an unanswered one ends the connection.   send: for the socket to take a
    message.   answer: for a request.   stale: age at which a request is no longer sent.   first, last: pause before the next try, doubling."""
    open: float = 2.0
    ping: float = 0.5
    pong: float = 2.0
    send: float = 2.0
    answer: float = 10.0
    stale: float = 1.0
    first: float = 0.05
    last: float = 1.0


class Refused(ConnectionError):
    """What is there lets nobody in who comes like this, and waiting changes nothing: the token, TLS or the address is wrong."""


class PlannerClient:
    """submit() observations, latest() chunks; both return at once.

    url: ws://HOST:PORT or wss://….   token: what the server was started with.   tls_ca: file of the certificate to trust instead of the system's.
    expect: what the robot needs; a model that does not offer it is refused: wait_ready() says why, and nothing is sent to it. ValueError, OSError when
    url, token or tls_ca cannot be.
    """

    def __init__(self, url: str, *, token: str | None = None, tls_ca: str | None = None, expect: Expect | None = None, limits: Limits | None = None,
                 timeouts: Timeouts | None = None):
        scheme, _, rest = url.partition("://")
        if scheme not in ("ws", "wss") or not rest.partition("/")[0]:
            raise ValueError(f"url={url!r} must look like ws://HOST:PORT, or wss://HOST:PORT with TLS")
        try:
            _ = urlsplit(url).port
        except ValueError as e:
            raise ValueError(f"url={url!r} must look like ws://HOST:PORT: {e}") from None
        self.url = url if rest.partition("/")[2] else url.rstrip("/") + PATH
        if token and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("a token is ASCII without spaces: give the one that the server was started with")
        if tls_ca and scheme == "ws":
            raise ValueError(f"tls_ca is for wss://…, and url={url} goes without TLS")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.tls = trusting(tls_ca) if scheme == "wss" else None
        self.expect, self.limits, self.timeouts = expect or Expect(), limits or Limits(), timeouts or Timeouts()
        self.card: Card | None = None  # of the model that is connected, or was last
        self.refused: WrongRobot | Refused | None  # why whoever waits need not; it is tried on all the same, for servers are started anew
        self.trouble, self.refused = "it has not been tried yet", None
        self.ledger = Ledger(self.timeouts.stale)
        self._connection: ClientConnection | None = None
        self._loop, self._wake = asyncio.new_event_loop(), asyncio.Event()
        self._task = self._loop.create_task(self._keep())
        self.thread = threading.Thread(target=self._run, name="planner-client", daemon=True)
        self.thread.start()

    @property
    def stats(self) -> Stats:
        return self.ledger.stats

    @property
    def connected(self) -> bool:
        """Whether a fitting model answers."""
        connection = self._connection
        return connection is not None and connection.state is State.OPEN

    @property
    def waiting(self) -> int:
        """Requests that have no answer yet."""
        return self.ledger.waiting()

    def submit(self, obs: Mapping[str, Any], t_obs: float, *, epoch: int = 0, prefix: np.ndarray | None = None, committed: int = 0, merge: str = "naive",
               deadline_s: float | None = None, seed: int | None = None, noise: np.ndarray | None = None) -> int:
        """Ask for a plan and return its seq. A request that is still here, unsent, is replaced.

        obs: {key: (history, *shape)}.   t_obs: s, monotonic, when the newest of them was taken.   epoch: chunks of any other one are dropped from now on.
        deadline_s: from now, after which nobody wants the plan.   The rest: policy.serve.card.Backend.   WireError for what cannot be sent.
        """
        def copy(x: Any) -> np.ndarray:  # the caller goes on writing into its own
            return np.array(sendable(x))

        for name, whole in {"epoch": epoch, "committed": committed, **({} if seed is None else {"seed": seed})}.items():
            if not isinstance(whole, int) or not 0 <= whole <= WHOLE:
                raise WireError("schema", f"{name}={whole!r} must be a whole number from 0 to 2^63 - 1")
        if not isinstance(t_obs, int | float | np.integer | np.floating) or not 0 <= t_obs < WHOLE // 10**9:
            raise WireError("schema", f"t_obs={t_obs!r} must be seconds of the monotonic clock, as time.monotonic() gives them, not nanoseconds")
        if other := [k for k in obs if not isinstance(k, str)]:
            raise WireError("schema", f"an observation's keys are text, and {other[0]!r} is none: give {{name: array}} with the names of the model's card")
        now = time.monotonic()
        deadline = math.inf if deadline_s is None else now + deadline_s
        request = Observation(0, epoch, int(t_obs * 1e9), {k: copy(v) for k, v in obs.items()}, None, None if prefix is None else copy(prefix), committed,
                              merge, None if noise is None else copy(noise), seed)
        seq = self.ledger.put(lambda seq: Asked(Observation(**{**request.__dict__, "seq": seq}), t_obs, now, deadline))
        self._call(self._wake.set)
        return seq

    def latest(self) -> Chunk | None:
        """The newest chunk of the current epoch that has not been taken yet."""
        return self.ledger.latest()

    def plan(self, obs: Mapping[str, Any], t_obs: float | None = None, *, timeout: float = 10.0, **request: Any) -> Chunk:
        """Wait for the connection, submit() and wait for this very chunk. PlannerError with the reason; else as wait_ready."""
        self.wait_ready(timeout)
        seq = self.submit(obs, time.monotonic() if t_obs is None else t_obs, **request)
        answer = self.ledger.wait(seq, timeout, lambda: self.refused)
        if isinstance(answer, Chunk):
            return answer
        if answer is not None:
            raise answer
        if self.refused:
            raise self.refused.with_traceback(None)
        raise TimeoutError(f"{self.url} did not answer within {timeout:g} s: {self.trouble or 'it is connected and silent'}")

    def wait_ready(self, timeout: float = 10.0) -> Card:
        """The model's card once it is connected. TimeoutError with what went wrong last, WrongRobot, Refused at once when waiting changes nothing.

        RuntimeError after close().
        """
        if not self.thread.is_alive():
            raise RuntimeError(f"this client of {self.url} was closed: make a new PlannerClient")
        with self.ledger.changed:
            self.ledger.changed.wait_for(lambda: self.connected or self.refused, timeout)
        if self.refused:
            raise self.refused.with_traceback(None)
        if self.card is None or not self.connected:
            raise TimeoutError(f"no planner at {self.url} within {timeout:g} s: {self.trouble}")
        return self.card

    def close(self) -> None:
        """End the connection and the thread."""
        self._call(self._task.cancel)
        self.thread.join(5)

    def __enter__(self) -> "PlannerClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _call(self, what: Any) -> None:
        with contextlib.suppress(RuntimeError):  # closed
            self._loop.call_soon_threadsafe(what)

    def _run(self) -> None:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._task)
        finally:
            self._loop.close()

    async def _keep(self) -> None:
        """Connect, talk, wait a little, for ever."""
        pause = self.timeouts.first
        while True:
            began, connects = time.monotonic(), self.stats.connects
            try:
                await self._once()
            except Exception as e:  # of any kind: nothing that a server or a network does may end this thread
                kind, text = reason(e, bool(self.headers))
                self.trouble = text
                self.refused = e if isinstance(e, WrongRobot) else Refused(f"{self.url}: {text}") if kind in FINAL else None
                self.ledger.lost(kind, text)
                with self.ledger.changed:
                    self.ledger.changed.notify_all()
            if self.stats.connects > connects and time.monotonic() - began > self.timeouts.last:
                pause = self.timeouts.first
            await asyncio.sleep(pause)
            pause = min(2 * pause, self.timeouts.last)

    async def _once(self) -> None:
        """One connection, from its opening to the exception that ends it."""
        t = self.timeouts
        ws = await connect(self.url, additional_headers=self.headers, ssl=self.tls, compression=None, proxy=None, open_timeout=t.open, ping_interval=t.ping,
                           ping_timeout=t.pong, close_timeout=0.2, max_size=self.limits.bytes, max_queue=8, logger=SILENT)
        try:
            async with asyncio.timeout(t.open):
                hello = unpack(await receive(ws), self.limits)  # type: ignore[arg-type]  # text is refused there
            if not isinstance(hello, Hello):
                raise WireError("schema", "the server's first message is no hello")
            if wrong := self.expect.differences(hello.card):
                raise WrongRobot(f"the model at {self.url} does not fit the robot: {wrong}. Serve the run that was trained for it")
            with self.ledger.changed:
                self.card, self.trouble, self.refused, self._connection = hello.card, "", None, ws
                self.stats.connects += 1
                self.ledger.changed.notify_all()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send(ws, Limits(bytes=min(hello.bytes, self.limits.bytes))))
                group.create_task(self._read(ws, hello.card))
        except BaseExceptionGroup as e:
            raise e.exceptions[0] from None
        except asyncio.CancelledError:
            await ws.close()
            raise
        finally:
            self._connection = None
            ws.transport.abort()  # no closing handshake with what may be a dead socket

    async def _send(self, ws: ClientConnection, limits: Limits) -> None:
        """Send what submit() leaves. TimeoutError when the socket takes nothing or an answer stays out too long."""
        while True:
            self._wake.clear()
            if data := self.ledger.send(time.monotonic(), limits):
                async with asyncio.timeout(self.timeouts.send):
                    await ws.send(data)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.timeouts.answer / 4):
                    await self._wake.wait()
            since = self.ledger.oldest()
            if since is not None and time.monotonic() - since > self.timeouts.answer:
                raise TimeoutError(f"a request has had no answer for {self.timeouts.answer:g} s")

    async def _read(self, ws: ClientConnection, card: Card) -> None:
        while True:
            data = await receive(ws)
            now = time.monotonic()
            try:
                message = unpack(data, self.limits)  # type: ignore[arg-type]  # text is refused there
            except WireError as e:
                self.stats.rejected[e.code] += 1
                continue
            if isinstance(message, Planned):
                self.ledger.planned(message, card, now)
            elif isinstance(message, Err):
                self.ledger.refusal(message)
            else:
                self.stats.rejected["schema"] += 1


def trusting(tls_ca: str | None) -> ssl.SSLContext:
    """A context that trusts one certificate, or those of the system. ValueError names a file that is none."""
    try:
        return ssl.create_default_context(cafile=tls_ca)
    except OSError as e:
        raise ValueError(f"tls_ca={tls_ca} is no PEM file of a certificate ({e.strerror or e}): give the server's tls.cert, or the one that signed it") from e


def reason(e: Exception, token: bool = False) -> tuple[str, str]:
    """Kind of a failed connection, for counting, and what to tell people.   token: whether one was given."""
    if isinstance(e, WrongRobot):
        return "wrong_robot", str(e)
    if isinstance(e, InvalidStatus):
        status = e.response.status_code
        text = {401: "the server has another token than DIPOLE_TOKEN or token_file=… here" if token else
                "the server wants a token: set DIPOLE_TOKEN, or token_file=…, to the one it was started with",
                403: "the server lets nobody in from here (HTTP 403)", 404: "there is a server, but no planner under this path (HTTP 404)",
                503: "the server has no place free"}
        return f"http_{status}", text.get(status, f"the server answers HTTP {status}; is it a planner?")
    if isinstance(e, WireError):
        return "hello", f"the server's hello cannot be used: {e.text}"
    if isinstance(e, ssl.SSLCertVerificationError):
        return "certificate", f"the server's certificate is not trusted ({e.verify_message}): give it, or the one that signed it, as tls_ca"
    if isinstance(e, ssl.SSLError) and e.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return "no_tls", "the server speaks no TLS: ws://… instead of wss://…"
    if isinstance(e, ConnectionResetError | BrokenPipeError | EOFError | ssl.SSLEOFError) or isinstance(e.__cause__, EOFError):
        return "unreachable", "it hangs up: is it a planner? With TLS it is wss://…, without ws://…"
    if isinstance(e, ssl.SSLError):
        return "tls", f"TLS failed: {e.reason or e}"
    if isinstance(e, TimeoutError):
        return "timeout", str(e) or "it does not answer"
    if isinstance(e, ConnectionClosed):
        return "closed", f"the connection was closed ({e.rcvd or e.sent or 'without a word'})"
    if isinstance(e, InvalidMessage):
        return "protocol", "what is there speaks no websocket: is it a planner?"
    if isinstance(e, OSError):
        return "unreachable", str(e.strerror or e) or type(e).__name__
    return ("protocol" if isinstance(e, WebSocketException) else type(e).__name__), f"{type(e).__name__}: {e}"

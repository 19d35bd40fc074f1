"""The openpi websocket protocol (Physical Intelligence, openpi 0.1), so that robots that speak it need no change.

The server begins with a map of metadata; each observation, a flat map of key to array, is answered by {"actions": (horizon, d), "server_timing": …}. Arrays
are msgpack-numpy maps with bytes keys. An observation is one step (*shape), and the history is that of the calls: ask every step, or send the history
(t_obs, *shape) itself. {"reset": true} forgets it, as a new connection does. Whatever is wrong is answered by a line of text and the end of the connection.
"""
import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection

from policy.serve.card import Card
from policy.serve.desk import Desk, Place, Plan
from policy.serve.metrics import Metrics
from policy.serve.packing import LIMITS, Limits, WireError, finite, parse, short, view
from policy.serve.receive import receive
from policy.serve.wire import Observation

DTYPES = {"<f2": "<f4", "<i2": "<i8", "<i4": "<i8", "|i1": "<i8", "<u2": "<i8", "<u4": "<i8"}  # other kinds of numbers that are taken
SCALARS = (bool, int, float)


class Server(Protocol):
    limits: Limits
    metrics: Metrics

    async def send(self, ws: ServerConnection, data: bytes | str) -> None: ...


async def talk(ws: ServerConnection, desk: Desk, server: Server) -> None:
    """One connection: metadata, then an answer to each observation until something is wrong."""
    answers: asyncio.Queue[Plan | WireError] = asyncio.Queue(1)

    async def answer(request: Observation, plan: Plan | WireError) -> None:
        await answers.put(plan)

    place, seen, before_ms = Place(answer), History(desk.card), 0.0
    await server.send(ws, packed(metadata(desk.card)))
    try:
        while True:
            data = await receive(ws)
            start = time.monotonic()
            desk.put(place, Observation(0, 0, 0, seen.add(observation(data, server.limits))))  # type: ignore[arg-type]  # text is refused there
            plan = await answers.get()
            if isinstance(plan, WireError):
                raise plan
            timing = {"infer_ms": plan.plan_ms, "queue_ms": plan.queue_ms} | ({"prev_total_ms": before_ms} if before_ms else {})
            await server.send(ws, packed({"actions": plan.actions, "server_timing": timing}))
            server.metrics.planned(plan.plan_ms, plan.queue_ms)
            before_ms = 1e3 * (time.monotonic() - start)
    except WireError as e:
        server.metrics.requests.labels(e.code).inc()
        await server.send(ws, f"{e.code}: {e.text}")
        await ws.close(1011 if e.code == "failed" else 1008, e.code)
    finally:
        desk.leave(place)


class History:
    """The last t_obs observations of one connection; the first fills it."""

    def __init__(self, card: Card):
        self.card = card
        self.steps: deque[dict[str, np.ndarray]] = deque(maxlen=card.t_obs)

    def add(self, obs: dict[str, Any]) -> dict[str, np.ndarray]:
        """{key: (t_obs, *shape)} after this observation. What the model does not know is left out. WireError."""
        if obs.pop("reset", False) is not False:
            self.steps.clear()
        if missing := [k for k in self.card.obs if k not in obs]:
            raise WireError("missing_key", f"the observation lacks {', '.join(missing)}; the model sees {', '.join(self.card.obs)}")
        arrays = {k: np.asarray(obs[k]) for k in self.card.obs}
        for key, size in self.card.obs.items():
            if arrays[key].dtype.kind not in "fiub":
                raise WireError("dtype", f"{key!r} must be numbers")
            if arrays[key].shape not in (tuple(size), (self.card.t_obs, *size)):
                raise WireError("shape", f"{key!r} must be {tuple(size)}, or with its history {(self.card.t_obs, *size)}; got {arrays[key].shape}")
            if not finite(arrays[key]):
                raise WireError("not_finite", f"{key!r} holds NaN or infinity")
        whole = [k for k, size in self.card.obs.items() if arrays[k].ndim > len(size)]
        if whole and len(whole) < len(arrays):
            raise WireError("shape", f"{', '.join(whole)} came with a history and the others without: send all of one kind")
        if whole:
            self.steps.extend({k: x[i] for k, x in arrays.items()} for i in range(self.card.t_obs))
        else:
            self.steps.append(arrays)
        steps = [self.steps[0]] * (self.card.t_obs - len(self.steps)) + list(self.steps)
        return {k: np.stack([step[k] for step in steps]) for k in self.card.obs}


def observation(data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
    """A flat map of str to array, number or text. WireError."""
    body = parse(data, limits, text_keys=False)
    found: dict[str, Any] = {}
    for key, value in body.items():
        if not isinstance(key, str):
            raise WireError("schema", "the keys of an observation are text")
        if not isinstance(value, dict):
            if not isinstance(value, (*SCALARS, str)):
                raise WireError("schema", f"{short(key)!r} must be an array, a number or text")
            found[key] = value
        elif b"__ndarray__" in value:
            found[key] = _array(key, value, limits)
        elif b"__npgeneric__" in value and isinstance(value.get(b"data"), SCALARS):
            found[key] = value[b"data"]
        else:
            raise WireError("schema", f"{short(key)!r} must be an array: observations are flat here")
    return found


def packed(message: Mapping[str, Any]) -> bytes:
    """As msgpack-numpy packs it."""
    data: bytes = msgpack.packb(message, default=_node)
    return data


def metadata(card: Card) -> dict[str, Any]:
    """Of json's types only; the card as it is, so that a client can check it."""
    return {"model": card.to_json(), "action_horizon": card.horizon, "action_dim": card.action_dim, "dt": card.dt}


def _node(x: Any) -> dict[bytes, Any]:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{type(x).__name__} has no place in a message")
    return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}


def _array(key: str, node: dict[Any, Any], limits: Limits) -> np.ndarray:
    if node.keys() != {b"__ndarray__", b"data", b"dtype", b"shape"}:
        raise WireError("schema", f"{short(key)!r} is not an array as msgpack-numpy packs it")
    kind, size, data = node[b"dtype"], node[b"shape"], node[b"data"]
    if isinstance(kind, str) and kind in DTYPES:
        width = np.dtype(kind).itemsize
        raw = view("|u1", [*size, width] if isinstance(size, list) else size, data, limits)
        return raw.reshape(-1).view(kind).reshape(size).astype(DTYPES[kind])
    return view(kind, size, data, limits)

"""A planner server gone bad, in a process of its own: python -m tests.serve.evil_server FAULT FROM TO CARD [PORT]

It dances (tests.serve.dance; plans zeros where the card names no joints), except from FROM to TO seconds after the first observation, when it does what
FAULT says, of several, a+b, one after the other; FAULT path: what the path of each connection says. Prints `ready URL`. Not a client of policy.serve.server:
that one would refuse to send most of this.
"""
import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import msgpack
import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from policy.serve.card import Card
from policy.serve.wire import Err, Hello, Observation, Planned, pack, unpack
from tests.serve.dance import goal, plan

FAULTS, FROM, TO = sys.argv[1].split("+"), float(sys.argv[2]), float(sys.argv[3])
CARD = Card.from_json(json.loads(sys.argv[4]))
RNG = np.random.default_rng(0)
HELLO = pack(Hello(CARD, 4 << 20))
HELLOS = {"no_hello": pack(Err("failed", "no")), "garbage_hello": b"\xc1", "old": HELLO.replace(b"\xa1v\x01", b"\xa1v\x09"), "text_hello": "hi",
          "old_card": pack(Hello(replace(CARD, version=1), 4 << 20))}
BEFORE = {"noise": b"\xc1\x00", "hello": HELLO, "words": "hello", "strange_code": pack(Err("x" * 100, "y"))}  # sent before a good answer
first: list[float] = []
turn = itertools.count()


def spoiled(a: np.ndarray, fault: str) -> np.ndarray:
    match fault:
        case "nan":
            a[5, 0] = np.nan
        case "inf":
            a[0] = np.inf
        case "jump":
            a += 1.5
        case "huge":
            a *= 1e9
        case "shape":
            a = a[:, :-1]
        case "wide":
            a = np.pad(a, ((0, 0), (0, 1)))
        case "short":
            a = a[:4]
        case "zigzag":
            a[::2] += 0.6
    return a.astype("<i8" if fault == "whole" else "<f4")


async def answer(ws: ServerConnection, data: bytes, faults: list[str]) -> None:
    got = unpack(data)
    assert isinstance(got, Observation)
    now = time.monotonic()
    if not first:
        first.append(now)
    fault = faults[next(turn) % len(faults)] if FROM <= now - first[0] < TO else ""
    a = plan(CARD, got.obs, now) if "q" in CARD.facts else np.zeros((CARD.horizon, CARD.action_dim))
    if faults == ["clock"]:  # no fault: where to be is a matter of time, and planning takes its own
        a = goal(CARD, got.t_obs / 1e9 + CARD.dt * np.arange(1, CARD.horizon + 1))
        await asyncio.sleep(0.12)
    good = pack(Planned(got.seq, got.epoch, got.t_obs, CARD.dt, a.astype("<f4"), 1.0, 0.0, CARD.model_id))
    body, x = msgpack.unpackb(good), spoiled(a, fault)
    body["actions"] = {"dtype": x.dtype.str, "shape": list(x.shape), "data": x.tobytes()}
    match fault:
        case "stall":
            await asyncio.sleep(max(0.0, TO - (now - first[0])))
        case "blocked":
            time.sleep(max(0.0, TO - (now - first[0])))  # the whole process: no pongs either
        case "garbage":
            for _ in range(200):
                size = int(RNG.integers(0, 400))
                await ws.send(RNG.bytes(size) if RNG.random() < 0.5 else mutated(good))
        case "noise" | "hello" | "words" | "strange_code":
            await ws.send(BEFORE[fault])
        case "echo":
            await ws.send(data)
        case "pieces":
            await ws.send(nothing())
        case "dtype":
            body["actions"]["dtype"] = "|O"
        case "model":
            body["model_id"] = "another"
        case "epoch" | "seq":
            body[fault] += 1
        case "future":
            body["t_obs"] += 3_600_000_000_000
        case "rate":
            body["dt"] = CARD.dt * 50
        case "drift":
            body["dt"] = CARD.dt * 1.001
        case "oversize":
            return await ws.send(bytes(6 << 20))
        case "silent":
            return
        case "close":
            return await ws.close()
        case "exit":
            os._exit(1)
        case "twice":
            for _ in range(200):
                await ws.send(good)
            body["actions"]["data"] = (x + 1).tobytes()
        case "text":
            return await ws.send("Traceback (most recent call last)")
    await ws.send(msgpack.packb(body))


def mutated(data: bytes) -> bytes:
    x = bytearray(data)
    for _ in range(int(RNG.integers(1, 8))):
        x[int(RNG.integers(len(x)))] = int(RNG.integers(256))
    return bytes(x[: int(RNG.integers(1, len(x) + 1))])


async def nothing() -> AsyncIterator[bytes]:
    """A message that never ends."""
    while True:
        yield b""
        await asyncio.sleep(0)


async def talk(ws: ServerConnection) -> None:
    assert ws.request is not None
    faults = [ws.request.path.strip("/")] if FAULTS == ["path"] else FAULTS
    with contextlib.suppress(ConnectionClosed):
        if faults == ["mute"]:
            await ws.wait_closed()
        await ws.send(HELLOS.get(faults[0], HELLO))
        async for data in ws:
            work = answer(ws, data, faults)  # type: ignore[arg-type]  # clients send bytes
            asyncio.get_running_loop().create_task(work) if faults == ["stall"] else await work


async def main() -> None:
    async with serve(talk, "127.0.0.1", int(sys.argv[5]) if len(sys.argv) > 5 else 0, compression=None) as server:
        print(f"ready ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", flush=True)
        await server.serve_forever()


asyncio.run(main())

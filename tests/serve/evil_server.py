"""A planner server gone bad, in a process of its own: python -m tests.serve.evil_server FAULT FROM TO CARD [PORT]

It dances (tests.serve.dance), except from FROM to TO seconds after the first observation, when it does what FAULT says, of
several, a+b, one after the other. Prints its port. Not a client of policy.serve.server: that one would refuse to send most of this.
"""
import asyncio
import itertools
import json
import os
import sys
import time

import msgpack
import numpy as np
from websockets.asyncio.server import serve

from policy.serve import wire
from policy.serve.card import Card
from tests.serve.dance import goal, plan

FAULTS, FROM, TO = sys.argv[1].split("+"), float(sys.argv[2]), float(sys.argv[3])
CARD = Card.from_json(json.loads(sys.argv[4]))
RNG = np.random.default_rng(0)
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
        case "short":
            a = a[:4]
        case "zigzag":
            a[::2] += 0.6
    return a


async def answer(ws, data: bytes) -> None:
    got = wire.unpack(data)
    assert isinstance(got, wire.Observation)
    now = time.monotonic()
    if not first:
        first.append(now)
    bad = FROM <= now - first[0] < TO
    a = plan(CARD, got.obs, now)
    if FAULTS == ["clock"]:  # no fault: where to be is a matter of time, and planning takes its own
        a = goal(CARD, got.t_obs / 1e9 + CARD.dt * np.arange(1, CARD.horizon + 1))
        await asyncio.sleep(0.12)
    good = wire.pack(wire.Planned(got.seq, got.epoch, got.t_obs, CARD.dt, a.astype("<f4"), 1.0, 0.0, CARD.model_id))
    if not bad:
        return await ws.send(good)
    body, fault = msgpack.unpackb(good), FAULTS[next(turn) % len(FAULTS)]
    x = spoiled(a, fault).astype("<f4")
    body["actions"] = {"dtype": "<f4", "shape": list(x.shape), "data": x.tobytes()}
    match fault:
        case "stall":
            await asyncio.sleep(max(0.0, TO - (now - first[0])))
        case "blocked":
            time.sleep(max(0.0, TO - (now - first[0])))  # the whole process: no pongs either
        case "garbage":
            for _ in range(200):
                size = int(RNG.integers(0, 400))
                await ws.send(RNG.bytes(size) if RNG.random() < 0.5 else mutated(good))
        case "dtype":
            body["actions"]["dtype"] = "|O"
        case "model":
            body["model_id"] = "another"
        case "epoch":
            body["epoch"] += 1
        case "future":
            body["t_obs"] += 3_600_000_000_000
        case "rate":
            body["dt"] = CARD.dt * 50
        case "oversize":
            return await ws.send(bytes(6 << 20))
        case "close":
            return await ws.close()
        case "exit":
            os._exit(1)
        case "twice":
            for _ in range(200):
                await ws.send(msgpack.packb(body))
        case "text":
            return await ws.send("Traceback (most recent call last)")
    await ws.send(msgpack.packb(body))


def mutated(data: bytes) -> bytes:
    x = bytearray(data)
    for _ in range(int(RNG.integers(1, 8))):
        x[int(RNG.integers(len(x)))] = int(RNG.integers(256))
    return bytes(x[: int(RNG.integers(1, len(x) + 1))])


async def talk(ws) -> None:
    await ws.send(wire.pack(wire.Hello(CARD, 4 << 20)))
    async for data in ws:
        asyncio.get_running_loop().create_task(answer(ws, data)) if FAULTS == ["stall"] else await answer(ws, data)


async def main() -> None:
    async with serve(talk, "127.0.0.1", int(sys.argv[5]) if len(sys.argv) > 5 else 0, compression=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await server.serve_forever()


asyncio.run(main())

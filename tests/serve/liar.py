"""A server that answers wrongly, in the way the path of the connection says."""
import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from policy.serve.wire import Err, Hello, Observation, Planned, pack, unpack
from tests.serve.far import CARD

LIES = {
    "honest": {}, "nan": {"actions": np.full((8, 2), np.nan)}, "inf": {"actions": np.full((8, 2), -np.inf)}, "shape": {"actions": np.zeros((8, 3))},
    "short": {"actions": np.zeros((7, 2))}, "whole": {"actions": np.zeros((8, 2), np.int64)}, "model": {"model_id": "other"}, "dt": {"dt": 0.021},
    "epoch": {"epoch": 99}, "t_obs": {"t_obs": 1}, "seq": {"seq": 10**6},
}
FIRST = {"no_hello": pack(Err("failed", "no")), "garbage_hello": b"\xc1", "old": pack(Hello(CARD, 1 << 20)).replace(b"\xa1v\x01", b"\xa1v\x09"), "text": "hi",
         "old_card": pack(Hello(replace(CARD, version=1), 1 << 20))}
AFTER = {"garbage": b"\xc1\x00", "words": "hello", "hello": pack(Hello(CARD, 1 << 20)), "huge": b"\x00" * (5 << 20), "echo": None}


async def nothing() -> AsyncIterator[bytes]:
    while True:
        yield b""
        await asyncio.sleep(0)


async def talk(ws: ServerConnection) -> None:
    assert ws.request is not None
    lie = ws.request.path.strip("/")
    if lie == "mute":
        await ws.wait_closed()
    await ws.send(FIRST.get(lie, pack(Hello(CARD, 1 << 20))))
    async for data in ws:
        request = unpack(data)
        assert isinstance(request, Observation)
        true = Planned(request.seq, request.epoch, request.t_obs, CARD.dt, np.zeros((8, 2)), 1.0, 1.0, CARD.model_id)
        if lie == "silent":
            continue
        if lie == "pieces":
            await ws.send(nothing())
        if lie == "close":
            return
        if lie in AFTER:
            await ws.send(data if AFTER[lie] is None else AFTER[lie])
        await ws.send(pack(replace(true, **LIES.get(lie, {}))))
        if lie == "twice":
            await ws.send(pack(replace(true, actions=np.ones((8, 2)))))
        if lie == "strange_code":
            await ws.send(pack(Err("x" * 100, "y")))


async def main() -> None:
    async def calm(ws: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            await talk(ws)

    async with serve(calm, "127.0.0.1", 0, compression=None) as server:
        print(f"ready ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main())

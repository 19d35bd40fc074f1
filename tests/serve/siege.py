"""Everything at once against a planner server, from a process of its own: python -m tests.serve.siege URL FRAMES SEED. Prints what came of it as json."""
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
from websockets.exceptions import ConnectionClosed

from policy.serve.packing import CODES
from policy.serve.wire import Err, Planned
from tests.serve.talk import ask, closed_after, dial, hear, raw, upgraded


def frames(n: int, seed: int) -> Iterator[bytes]:
    """Random bytes, cut and mutated observations, in about equal parts."""
    rng = np.random.default_rng(seed)
    good = [ask(1, seed=2), ask(2, prefix=np.zeros((3, 2)), committed=2, merge="frozen", deadline_ms=5.0), ask(3, noise=np.zeros((8, 2)))]
    for i in range(n):
        data = bytearray(good[rng.integers(3)])
        if i % 3 == 0:
            data = bytearray(rng.bytes(int(rng.integers(0, 300))))
        elif i % 3 == 1:
            del data[rng.integers(len(data)):]
        else:
            for at in rng.integers(len(data), size=rng.integers(1, 6)):
                data[at] = rng.integers(256)
        yield bytes(data)


def fuzz(url: str, n: int, seed: int) -> dict[str, int]:
    """Send n frames, on a new connection whenever one is closed; how many answers, chunks among them, connections."""
    answers = chunks = connections = 0
    todo = frames(n, seed)
    while (data := next(todo, None)) is not None:
        connections += 1
        with contextlib.suppress(ConnectionClosed), dial(url) as ws:
            hear(ws)
            while data is not None:
                try:
                    ws.send(data)
                    answer = hear(ws, 30)
                except ConnectionClosed as e:
                    assert e.rcvd is not None and e.rcvd.code == 1008
                    break
                answers += 1
                chunks += isinstance(answer, Planned)
                assert isinstance(answer, Planned) or (isinstance(answer, Err) and answer.code in CODES and "Traceback" not in answer.text)
                data = next(todo, None)
    return {"answers": answers, "chunks": chunks, "connections": connections}


def oversize(url: str) -> None:
    """6 MiB of an observation, and a header that announces a TiB: both end their connection."""
    with dial(url) as ws:
        hear(ws)
        with contextlib.suppress(ConnectionClosed):
            ws.send(bytes(6 << 20))
            ws.recv(timeout=20)
            raise AssertionError("an oversize message was answered")
    sock = upgraded(url)
    sock.sendall(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"abcd")
    assert closed_after(sock) < 20


def burst(url: str, n: int) -> dict[str, int]:
    """n observations without waiting: each has an answer, the newest a plan."""
    with dial(url) as ws:
        hear(ws)
        for seq in range(n):
            ws.send(ask(seq, seed=1))
        answers = [hear(ws, 60) for _ in range(n)]
    planned = [a.seq for a in answers if isinstance(a, Planned)]
    assert {a.seq for a in answers if isinstance(a, Planned | Err)} == set(range(n)) and planned[-1] == n - 1
    return {"planned": len(planned), "superseded": sum(isinstance(a, Err) and a.code == "superseded" for a in answers)}


def loris(url: str, until: threading.Event, count: int = 12) -> int:
    """Handshakes and messages that never end, a byte every 20 ms, begun again whenever the server lets go; how often it did."""
    gone, socks = 0, list[socket.socket]()
    while not until.is_set():
        while len(socks) < count:
            try:
                socks.append(upgraded(url) if len(socks) % 3 == 0 else raw(url))
                socks[-1].setblocking(False)
            except (OSError, AssertionError):  # no place free: tried again
                break
        for sock in list(socks):
            try:
                sock.send(b"\x82" if sock.recv(4096) else b"")
            except BlockingIOError:
                with contextlib.suppress(OSError):
                    sock.send(b"x")
                continue
            except OSError:
                pass
            gone += 1
            sock.close()
            socks.remove(sock)
        time.sleep(0.02)
    for sock in socks:
        sock.close()
    return gone


def siege(url: str, n: int, seed: int) -> dict[str, int]:
    over, gone = threading.Event(), [0]
    slow = threading.Thread(target=lambda: gone.__setitem__(0, loris(url, over)))
    slow.start()
    try:
        found = fuzz(url, n, seed)
        oversize(url)
        found |= burst(url, 200)
        time.sleep(max(0.0, 5 - n / 1000))  # that handshakes have the time to be let go
    finally:
        over.set()
        slow.join()
    return {**found, "let go": gone[0]}


if __name__ == "__main__":
    print(json.dumps(siege(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))

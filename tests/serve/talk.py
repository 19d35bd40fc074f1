"""Speaking to a server by hand: good requests, and sockets that nobody who knows the protocol is behind."""
import contextlib
import socket
import time
import urllib.error
import urllib.request

from websockets.sync.client import ClientConnection, connect

from policy.serve.client import PlannerClient
from policy.serve.wire import Message, Observation, pack, unpack
from tests.serve.far import Far, obs


def dial(url: str, path: str = "/plan", **options) -> ClientConnection:
    return connect(url + path, compression=None, proxy=None, **options)


def hear(ws: ClientConnection, timeout: float = 20) -> Message:
    return unpack(ws.recv(timeout=timeout))


def ask(seq: int, **fields) -> bytes:
    return pack(Observation(seq, fields.pop("epoch", 0), fields.pop("t_obs", 5), **{"obs": obs(1, 2), **fields}))


def http(url: str, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url.replace("ws", "http", 1) + path, headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def raw(url: str) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
    sock.settimeout(30)
    return sock


def upgraded(url: str) -> socket.socket:
    """A websocket with nobody behind it who speaks the protocol."""
    sock = raw(url)
    sock.sendall(b"GET /plan HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
                 b"Sec-WebSocket-Version: 13\r\n\r\n")
    assert b"101" in sock.recv(4096)
    return sock


def closed_after(sock: socket.socket) -> float:
    """Seconds until the server lets go; whatever it still says is read."""
    start = time.monotonic()
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sock.recv(65536):
            pass
    return time.monotonic() - start


def alive(far: Far, **options) -> None:
    """It answers a good request."""
    with PlannerClient(far.url, **options) as client:
        assert client.plan(obs(1, 2), timeout=30).actions[0].tolist() == [1, 2]

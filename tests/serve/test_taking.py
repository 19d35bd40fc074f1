"""What one client may take of a server: connections, time, memory, errors; docs/threats.md names each of these tests beside its threat."""
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("websockets", reason="pip install 'dipole[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'dipole[serve]'")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode

from policy.serve.client import PlannerClient
from tests.serve.far import toy_server
from tests.serve.talk import alive, ask, closed_after, dial, hear, http, raw, upgraded


@pytest.fixture(scope="module")
def server():
    with toy_server() as far:
        yield far
        assert far.process.poll() is None  # whatever was tried


def test_more_connections_than_places_are_turned_away_and_places_come_back():
    with toy_server(service={"connections": 3}) as far:
        with dial(far.url), dial(far.url):
            with dial(far.url):
                with pytest.raises(InvalidStatus, match="503"), dial(far.url):
                    pass
                assert http(far.url, "/healthz")[0] == 200
            alive(far)


def test_slow_loris_is_let_go_and_keeps_nobody_out():
    """Handshakes that never end, one byte at a time: each is over after open=1 s, and those beyond the bound at once."""
    with toy_server(service={"connections": 8, "open": 1.0}) as far:
        socks = [raw(far.url) for _ in range(12)]
        start = time.monotonic()
        gone: set[int] = set()
        for byte in b"GET /plan HTTP/1.1\r\nHost: " + b"x" * 1000:
            for i, sock in enumerate(socks):
                if i not in gone:
                    try:
                        sock.send(bytes([byte]))
                        sock.setblocking(False)
                        if sock.recv(100) == b"":
                            gone.add(i)
                    except BlockingIOError:
                        pass
                    except OSError:
                        gone.add(i)
            if len(gone) == len(socks):
                break
            if time.monotonic() - start < 0.5:
                assert http(far.url, "/healthz")[0] == 200
            time.sleep(0.02)
        assert len(gone) == len(socks) and time.monotonic() - start < 15
        alive(far)


def test_beyond_twice_the_places_the_oldest_unfinished_handshake_is_let_go():
    with toy_server(service={"connections": 2, "open": 30.0}) as far:
        held = [raw(far.url) for _ in range(4)]  # they say nothing
        time.sleep(0.1)
        extra = raw(far.url)
        assert closed_after(held[0]) < 10
        alive(far)  # and who does finish gets in
        for sock in (*held, extra):
            sock.close()


def test_strangers_who_come_back_whenever_they_are_let_go_keep_nobody_out():
    with toy_server(service={"connections": 4, "open": 1.0}) as far, ThreadPoolExecutor(24) as pool:
        over, began = threading.Event(), threading.Barrier(25)

        def loris() -> None:
            began.wait()
            while not over.is_set():
                with contextlib.suppress(OSError), contextlib.closing(raw(far.url)) as sock:
                    sock.settimeout(0.2)
                    sock.send(b"GET /plan HTTP/1.1\r\nHost")
                    while not over.is_set() and sock.recv(10):
                        pass
        strangers = [pool.submit(loris) for _ in range(24)]
        began.wait()
        try:
            time.sleep(0.3)
            for _ in range(5):
                start = time.monotonic()
                with PlannerClient(far.url) as client:
                    client.wait_ready(10)
                assert time.monotonic() - start < 5
        finally:
            over.set()
        assert all(s.exception() is None for s in strangers)


def test_an_oversize_message_closes_with_1009_before_it_is_read(server):
    with dial(server.url) as ws:
        hear(ws)
        with pytest.raises(ConnectionClosed) as e:
            ws.send(b"x" * (5 << 20))
            ws.recv(timeout=20)
        assert e.value.rcvd is None or e.value.rcvd.code == 1009
    sock = upgraded(server.url)
    sock.sendall(b"\x82\xff" + (1 << 40).to_bytes(8, "big") + b"abcd")  # a header that announces a TiB
    assert closed_after(sock) < 10
    alive(server)


@pytest.mark.parametrize("fragment", [b"", b"x"])
def test_a_message_of_countless_fragments_is_refused(fragment):
    """Empty ones never reach a limit of bytes."""
    with toy_server(service={"pong": 60.0}) as far:  # no ping ends it
        before, sock = far.rss_mb(), upgraded(far.url)
        first = Frame(Opcode.BINARY, fragment, False).serialize(mask=True)
        rest = Frame(Opcode.CONT, fragment, False).serialize(mask=True) * 1000
        with contextlib.suppress(OSError):
            sock.sendall(first)
            for _ in range(200):
                sock.sendall(rest)
        assert closed_after(sock) < 20
        assert far.rss_mb() - before < 20
        alive(far)


def test_a_message_that_stops_in_the_middle_ends_the_connection(server):
    sock = upgraded(server.url)
    sock.sendall(b"\x82\xfe\x10\x00abcd" + b"x" * 100)  # 100 of 4096 bytes
    assert closed_after(sock) < 15
    alive(server)


def test_a_client_that_does_not_read_is_let_go_and_costs_nothing():
    """It sends for ever and takes no answer: the server stops reading, then ends it."""
    with toy_server(service={"send": 0.5, "pong": 1.0}) as far:
        sock = upgraded(far.url)
        frame = Frame(Opcode.BINARY, ask(1, obs={}), True).serialize(mask=True)
        sock.settimeout(1)
        start, before = time.monotonic(), far.rss_mb()
        with pytest.raises(OSError):
            while time.monotonic() - start < 30:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(frame * 100)
        assert far.rss_mb() - before < 20
        alive(far)


def test_more_than_ten_errors_a_second_close_with_1008():
    with toy_server() as far, dial(far.url) as ws:
        hear(ws)
        for _ in range(12):
            with contextlib.suppress(ConnectionClosed):
                ws.send(b"\xc1")
        codes = []
        with pytest.raises(ConnectionClosed) as e:
            while True:
                codes.append(hear(ws).code)
        assert codes == ["undecodable"] * 11 and e.value.rcvd is not None and e.value.rcvd.code == 1008
        alive(far)


def test_replaced_and_late_requests_are_no_errors():
    """They are the network's fault, not the client's: 40 in a moment end nothing."""
    with toy_server(plan_ms=30.0) as far, dial(far.url) as ws:
        hear(ws)
        for seq in range(40):
            ws.send(ask(seq, deadline_ms=0.0))
        answers = [hear(ws) for _ in range(40)]
        assert {a.code for a in answers} == {"superseded", "expired"}
        ws.send(ask(99))
        assert hear(ws).seq == 99

"""The client against servers that die, hang, come back and are not the ones meant: it never waits and never repeats."""
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("websockets", reason="pip install 'dipole[client]'")

from policy.serve.client import Chunk, Expect, PlannerClient, PlannerError, Refused, Timeouts, WrongRobot
from policy.serve.ledger import Asked, Ledger
from policy.serve.packing import Limits, WireError
from policy.serve.wire import Observation, Planned
from tests.serve.far import CARD, ROOT, free_port, obs, toy_server

PATIENT = 20.0


def until(true: Callable[[], object], timeout: float = PATIENT) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def newest(client: PlannerClient, timeout: float = PATIENT) -> Chunk:
    found: list[Chunk] = []
    until(lambda: found.extend(filter(None, [client.latest()])) or found, timeout)
    return found[0]


@pytest.fixture(scope="module")
def server():
    with toy_server() as far:
        yield far


def test_it_needs_neither_torch_nor_the_rest():
    wanted = "{'torch', 'zarr', 'hydra', 'omegaconf', 'rich', 'diffusers', 'mujoco', 'gymnasium', 'safetensors', 'prometheus_client'}"
    code = (f"import sys, policy.serve.client; print(sorted(set(m.split('.')[0] for m in sys.modules) & {wanted}), "
            "sorted(m for m in sys.modules if m.startswith('policy')))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[] ")
    names = ("card", "client", "expect", "ledger", "packing", "receive", "robot", "wire")
    ours = {"policy", "policy.serve", "policy.timeline", *(f"policy.serve.{m}" for m in names)}
    assert set(done.stdout.split("] ")[1].strip("[]\n").replace("'", "").split(", ")) == ours


def test_a_chunk_comes_once_with_the_robots_own_time(server):
    with PlannerClient(server.url) as client:
        card = client.wait_ready(PATIENT)
        assert card == CARD and client.connected
        t = time.monotonic() - 0.25
        seq = client.submit(obs(1, 2), t, epoch=7)
        chunk = newest(client)
        assert client.latest() is None and client.waiting == 0
    assert (chunk.seq, chunk.epoch, chunk.t0, chunk.dt, chunk.model_id) == (seq, 7, t, CARD.dt, CARD.model_id)
    assert chunk.actions.dtype == np.float64 and np.array_equal(chunk.actions, np.add.outer(np.arange(8), [1, 2]))
    assert 0 < chunk.rtt_ms < 1e4
    assert not client.connected


def test_submit_returns_at_once_though_nobody_is_there():
    with PlannerClient(f"ws://127.0.0.1:{free_port()}") as client:
        start = time.monotonic()
        for i in range(1000):
            client.submit(obs(i), time.monotonic())
        assert time.monotonic() - start < 2
        assert client.latest() is None and client.waiting == 1  # the newest only
        with pytest.raises(TimeoutError, match="no planner at ws://127"):
            client.wait_ready(0.2)
        until(lambda: client.stats.errors["unreachable"] >= 3)


def test_the_caller_may_write_into_its_arrays_again(server):
    with PlannerClient(server.url) as client:
        client.wait_ready(PATIENT)
        mine = obs(1, 2)
        client.submit(mine, time.monotonic())
        mine["x"][:] = 1  # before the thread had a chance to send it
        assert newest(client).actions[0].tolist() == [1, 2]


def test_chunks_of_another_epoch_are_dropped():
    with toy_server(plan_ms=100.0) as far, PlannerClient(far.url) as client:
        client.wait_ready(PATIENT)
        client.submit(obs(1), time.monotonic(), epoch=1)
        until(lambda: client.stats.sent == 1)
        seq = client.submit(obs(2), time.monotonic(), epoch=2)
        chunk = newest(client)
    assert (chunk.seq, chunk.epoch, chunk.actions[0, 0]) == (seq, 2, 2)
    assert client.stats.rejected["epoch"] + client.stats.errors["superseded"] == 1


def test_what_passed_its_deadline_is_not_sent(server):
    with PlannerClient(server.url) as client:
        client.wait_ready(PATIENT)
        with pytest.raises(PlannerError) as e:
            client.plan(obs(), deadline_s=-1.0)
        assert e.value.code == "expired" and client.stats.sent == 0


def test_nothing_old_is_sent_after_a_reconnection():
    port = free_port()
    with PlannerClient(f"ws://127.0.0.1:{port}", timeouts=Timeouts(stale=0.3)) as client:
        client.submit(obs(1), time.monotonic())
        time.sleep(0.4)
        with toy_server(port=port):
            client.wait_ready(PATIENT)
            until(lambda: client.stats.errors["stale"] == 1)
            assert client.plan(obs(2), timeout=PATIENT).actions[0, 0] == 2
            assert client.stats.sent == 1


def test_it_reconnects_after_kill_9_and_asks_again():
    port = free_port()
    with PlannerClient(f"ws://127.0.0.1:{port}") as client:
        for round_ in range(3):
            with toy_server(port=port, plan_ms=50.0) as far:
                client.wait_ready(PATIENT)
                assert client.plan(obs(round_), timeout=PATIENT).actions[0, 0] == round_
                client.submit(obs(99), time.monotonic())
                until(lambda: client.waiting and client.stats.sent == 2 * round_ + 2)  # noqa: B023
                far.signal(signal.SIGKILL)
                until(lambda: not client.connected)
                until(lambda: not client.waiting)  # what was on its way is given up
        assert client.stats.connects == 3 and client.stats.errors["lost"] == 3


def test_a_stopped_server_is_noticed_by_its_silence_and_taken_up_again():
    """SIGSTOP: the kernel goes on accepting, nobody answers; half open for ever without pings."""
    with toy_server() as far, PlannerClient(far.url, timeouts=Timeouts(ping=0.1, pong=0.3, open=0.5)) as client:
        client.wait_ready(PATIENT)
        far.signal(signal.SIGSTOP)
        start = time.monotonic()
        client.submit(obs(1), start)
        until(lambda: not client.connected)
        assert time.monotonic() - start < 5
        until(lambda: client.stats.errors["timeout"] >= 1)  # the next handshakes run into it as well
        far.signal(signal.SIGCONT)
        client.wait_ready(PATIENT)
        assert client.plan(obs(3), timeout=PATIENT).actions[0, 0] == 3


@pytest.mark.parametrize("expect, names", [
    (Expect(dof=7), ["2 action dimensions (a, b)", "7 joints"]), (Expect(dt=0.05), ["0.02 s", "0.05 s"]), (Expect(task="panda"), ["toy", "panda"]),
    (Expect(obs={"x": (4,)}), ["'x'", "(3,)", "(4,)"]), (Expect(obs={"y": (3,)}), ["'x'", "none"]), (Expect(model_id="abc"), ["toy0", "abc"]),
    (Expect(merge="guided"), ["guided", "frozen"]), (Expect(dof=7, task="panda"), ["7 joints", "panda"]),
    (Expect(dof=2, joints=("b", "a")), ["(a, b), in another order", "(b, a)"]), (Expect(dof=2, units=("m", "deg")), ["in m, rad", "in m, deg"])])
def test_a_model_of_another_robot_is_refused_by_name(server, expect, names):
    with PlannerClient(server.url, expect=expect) as client:
        for call in (client.wait_ready, lambda t: client.plan(obs(), timeout=t)):
            with pytest.raises(WrongRobot) as e:
                call(PATIENT)
            assert all(name in str(e.value) for name in names)
        assert not client.connected and client.stats.sent == 0 and client.latest() is None


def test_a_model_that_fits_is_taken(server):
    fits = Expect(dof=2, dt=0.02, obs={"x": (3,), "more": (9,)}, task="Toy", model_id="toy0", merge="frozen", joints=("left", "b"), units=("m", "rad"))
    with PlannerClient(server.url, expect=fits) as client:
        assert client.wait_ready(PATIENT).task == "toy"


def test_the_right_model_may_come_after_the_wrong_one():
    port = free_port()
    with PlannerClient(f"ws://127.0.0.1:{port}", expect=Expect(task="toy")) as client:
        with toy_server(port=port, card={"task": "other"}), pytest.raises(WrongRobot):
            client.wait_ready(PATIENT)
        with toy_server(port=port):
            until(lambda: client.connected)
            assert client.plan(obs(5), timeout=PATIENT).actions[0, 0] == 5


TOKENS = "correct-horse-battery-staple", "incorrect-horse-battery-staple"


@pytest.mark.parametrize("mine, words", [(TOKENS[1], "has another token than DIPOLE_TOKEN"), (None, "wants a token: set DIPOLE_TOKEN")])
def test_a_wrong_token_is_told_at_once_and_a_server_that_comes_back_without_one_is_taken(mine, words):
    port = free_port()
    with PlannerClient(f"ws://127.0.0.1:{port}", token=mine) as client:
        with toy_server(port=port, token=TOKENS[0]):
            start = time.monotonic()
            for call in (client.wait_ready, lambda t: client.plan(obs(), timeout=t)):
                with pytest.raises(Refused, match=words):
                    call(60)
            assert time.monotonic() - start < 20 and client.stats.sent == 0
        with toy_server(port=port):
            until(lambda: client.connected)
            assert client.plan(obs(5), timeout=PATIENT).actions[0, 0] == 5


@pytest.mark.parametrize("answer, error, words", [
    ("HTTP/1.1 403 Forbidden", Refused, "HTTP 403"), ("HTTP/1.1 404 Not Found", Refused, "no planner under this path"),
    ("HTTP/1.1 503 Busy", TimeoutError, "no place free"), ("HTTP/1.1 500 Oh", TimeoutError, "is it a planner"),
    ("SSH-2.0-OpenSSH_9.6", TimeoutError, "speaks no websocket"), ("", TimeoutError, "hangs up")])
def test_what_waiting_may_mend_is_waited_for_and_nothing_else(answer, error, words):
    """A server that says one thing to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def speak() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as one:
                        one.recv(4096)
                        one.sendall(f"{answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode() if answer else b"")

        threading.Thread(target=speak, daemon=True).start()
        with PlannerClient(f"ws://127.0.0.1:{listener.getsockname()[1]}") as client:
            start = time.monotonic()
            with pytest.raises(error, match=words):
                client.wait_ready(1.0 if error is TimeoutError else 60)
            assert (time.monotonic() - start >= 1.0) == (error is TimeoutError)
        listener.shutdown(socket.SHUT_RDWR)


def test_tls_with_a_server_that_has_none_is_told(server):
    with PlannerClient(server.url.replace("ws", "wss")) as client, pytest.raises(TimeoutError, match=r"it hangs up.*without ws://"):
        client.wait_ready(1)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # one that answers
        threading.Thread(target=lambda: listener.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), daemon=True).start()
        with PlannerClient(f"wss://127.0.0.1:{listener.getsockname()[1]}") as client, pytest.raises(Refused, match="speaks no TLS: ws://"):
            client.wait_ready(60)


@pytest.mark.parametrize("options, words", [({"token": "two words"}, "ASCII without spaces"), ({"token": "naïve-token-of-good-length"}, "ASCII"),
                                            ({"tls_ca": "/nowhere.pem"}, "tls_ca=/nowhere.pem is no PEM file"), ({"tls_ca": __file__}, "is no PEM file")])
def test_what_a_client_is_given_is_checked(options, words):
    with pytest.raises(ValueError, match=words):
        PlannerClient("wss://127.0.0.1:1", **options)


def test_a_closed_client_says_so_and_a_seed_that_cannot_be_sent_is_told_at_once(server):
    client = PlannerClient(server.url)
    client.wait_ready(20)
    start = time.monotonic()
    for seed in (-1, 2**70):
        with pytest.raises(WireError, match="whole number from 0"):
            client.plan(obs(), seed=seed)
    client.close()
    with pytest.raises(RuntimeError, match="was closed: make a new PlannerClient"):
        client.plan(obs())
    assert time.monotonic() - start < 2 and client.stats.connects == 1 and not client.stats.errors


@pytest.mark.parametrize("url", ["ws://127.0.0.1:999999", "ws://x:port", "http://x", "127.0.0.1:80", "ws://", "ws:///plan"])
def test_urls_are_checked(url):
    with pytest.raises(ValueError, match="ws://HOST"):
        PlannerClient(url)


def test_what_cannot_be_sent_is_said_at_once(server):
    with PlannerClient(server.url) as client, pytest.raises(WireError, match="numbers"):
        client.submit({"x": np.array(["a"])}, 0.0)


@pytest.mark.parametrize("given, words", [
    ({"t_obs": time.monotonic_ns()}, "t_obs=.* seconds of the monotonic clock"), ({"t_obs": float("nan")}, "t_obs=nan"), ({"t_obs": -1.0}, "t_obs=-1.0"),
    ({"t_obs": "now"}, "t_obs='now'"), ({"obs": {7: np.zeros(2)}}, "keys are text, and 7 is none"), ({"obs": {("x", 1): np.zeros(2)}}, "keys are text"),
    ({"epoch": 2**70}, "epoch=.* whole number"), ({"committed": 1.5}, "committed=1.5 must be a whole number"), ({"seed": 0.5}, "seed=0.5")])
def test_a_request_that_no_wire_carries_is_refused_at_once_and_the_connection_stays(server, given, words):
    with PlannerClient(server.url) as client:
        client.wait_ready(PATIENT)
        with pytest.raises(WireError, match=words):
            client.plan(**{"obs": obs(1), "t_obs": time.monotonic(), **given})
        assert client.connected and not client.stats.errors
        assert client.plan(obs(1), timeout=PATIENT).actions[0, 0] == 1


def test_what_is_too_big_for_the_server_is_not_sent():
    with toy_server(limits={"bytes": 2000}) as far, PlannerClient(far.url) as client:
        client.wait_ready(PATIENT)
        with pytest.raises(PlannerError) as e:
            client.plan({"x": np.zeros((2, 300))}, timeout=PATIENT)
        assert e.value.code == "too_big" and client.connected
        assert client.plan(obs(1), timeout=PATIENT).actions[0, 0] == 1


def test_closing_ends_the_thread_whatever_it_does(server):
    for url in (server.url, f"ws://127.0.0.1:{free_port()}"):
        client = PlannerClient(url)
        time.sleep(0.05)
        client.close()
        client.close()
        assert not client.thread.is_alive()


def test_an_older_answer_never_replaces_a_newer_one():
    """Whatever order answers come in."""
    ledger = Ledger(stale=9)
    for seq in (1, 2):
        ledger.put(lambda seq: Asked(Observation(seq, 0, seq, obs(seq)), float(seq), 0.0))
        assert ledger.send(0.0, Limits())
    for seq in (2, 1):
        ledger.planned(Planned(seq, 0, seq, CARD.dt, np.full((8, 2), float(seq)), 1, 1, "toy0"), CARD, 1.0)
    chunk = ledger.latest()
    assert chunk is not None and chunk.seq == 2 and ledger.latest() is None and ledger.stats.chunks == 2


def test_a_chunk_of_an_epoch_that_just_ended_is_not_handed_out():
    ledger = Ledger(stale=9)
    ledger.put(lambda seq: Asked(Observation(seq, 1, 5, obs()), 0.0, 0.0))
    ledger.send(0.0, Limits())
    ledger.planned(Planned(1, 1, 5, CARD.dt, np.zeros((8, 2)), 1, 1, "toy0"), replace(CARD), 1.0)
    ledger.put(lambda seq: Asked(Observation(seq, 2, 6, obs()), 0.0, 0.0))
    assert ledger.latest() is None

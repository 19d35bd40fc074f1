"""The server in a process of its own, spoken to as anybody could: what is answered, in which order, and what it does not put up with."""
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("websockets", reason="pip install 'dipole[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'dipole[serve]'")
from websockets.exceptions import ConnectionClosed, InvalidStatus

from policy.serve.client import PlannerClient, PlannerError
from policy.serve.desk import WARM_UP
from policy.serve.entrance import check_exposure
from policy.serve.server import Budget
from policy.serve.wire import Err, Hello, Planned, pack
from tests.serve.far import CARD, obs, toy_server
from tests.serve.talk import ask, dial, hear, http, upgraded


@pytest.fixture(scope="module")
def quick():
    with toy_server() as far:
        yield far


@pytest.fixture(scope="module")
def slow():
    """Plans take 150 ms."""
    with toy_server(plan_ms=150.0) as far:
        yield far


def test_hello_then_a_chunk_that_echoes_the_request(quick):
    with dial(quick.url) as ws:
        assert hear(ws) == Hello(CARD, 4 << 20)
        ws.send(ask(3, epoch=4, t_obs=5, prefix=np.full((3, 2), 9.0), committed=2, merge="frozen"))
        chunk = hear(ws)
    assert isinstance(chunk, Planned) and (chunk.seq, chunk.epoch, chunk.t_obs, chunk.dt, chunk.model_id) == (3, 4, 5, CARD.dt, CARD.model_id)
    assert np.array_equal(chunk.actions, [[9, 9], [9, 9], *([1 + i, 2 + i] for i in range(2, 8))])
    assert 0 <= chunk.plan_ms < 1e4 and 0 <= chunk.queue_ms < 1e4


def test_the_same_seed_gives_the_same_plan_and_noise_is_taken_as_it_is(quick):
    plans = {}
    with dial(quick.url) as ws:
        hear(ws)
        for seq, fields in enumerate([{"seed": 1}, {"seed": 1}, {"seed": 2}, {"noise": np.ones((8, 2), np.float32)}, {}]):
            ws.send(ask(seq, **fields))
            plans[seq] = hear(ws).actions
    assert np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[0], plans[2])
    assert np.array_equal(plans[3], plans[4] + 1)
    noise = np.random.default_rng(1).standard_normal((8, 2), np.float32)
    assert np.allclose(plans[0] - plans[4], noise, atol=1e-6)


@pytest.mark.parametrize("bad, code, seq", [
    (b"\xc1\xff", "undecodable", None),
    ("text", "undecodable", None),
    (b"", "undecodable", None),
    (ask(1).replace(b"\xa1v\x01", b"\xa1v\x02"), "version", 1),
    (pack(Err("failed", "")), "schema", None),
    (ask(2, obs={}), "missing_key", 2),
    (ask(2, obs={**obs(), "y": np.zeros(2)}), "unknown_key", 2),
    (ask(3, obs={"x": np.zeros((2, 4))}), "shape", 3),
    (ask(4, obs=obs(float("nan"))), "not_finite", 4),
    (ask(5, merge="guided"), "merge", 5),
    (ask(6, deadline_ms=0.0), "expired", 6),
    (ask(6, deadline_ms=-5.0), "expired", 6),
    (ask(7, obs=obs(how=1)), "failed", 7),
    (ask(8, obs=obs(how=2)), "not_finite", 8),
    (ask(9, obs=obs(how=3)), "failed", 9),
])
def test_a_bad_request_has_an_err_with_its_code_and_the_connection_goes_on(quick, bad, code, seq):
    with dial(quick.url) as ws:
        hear(ws)
        ws.send(bad)
        err = hear(ws)
        assert isinstance(err, Err) and (err.code, err.seq) == (code, seq)
        assert "Traceback" not in err.text and "secret" not in err.text and len(err.text) < 500
        ws.send(ask(50))
        assert hear(ws).seq == 50


def test_of_a_burst_of_200_the_first_and_the_newest_are_planned(slow):
    with dial(slow.url) as ws:
        hear(ws)
        start = time.monotonic()
        for seq in range(200):
            ws.send(ask(seq))
        sent = time.monotonic() - start
        answers = [hear(ws) for _ in range(200)]
    planned = [a.seq for a in answers if isinstance(a, Planned)]
    assert Counter(a.code for a in answers if isinstance(a, Err)) == {"superseded": 200 - len(planned)}
    assert {a.seq for a in answers} == set(range(200))
    assert planned[-1] == 199 and 2 <= len(planned) <= 3 + sent / 0.15  # where sending takes longer than a plan, another one is made


def test_a_request_whose_deadline_passes_in_the_queue_is_not_planned(slow):
    with dial(slow.url) as ws, dial(slow.url) as other:
        hear(ws), hear(other)
        other.send(ask(0))
        http(slow.url, "/healthz")  # by then the plan is being made, for 150 ms
        ws.send(ask(1, deadline_ms=30.0))
        err = hear(ws)
        assert isinstance(err, Err) and (err.code, err.seq) == ("expired", 1)


def test_connections_take_turns(slow):
    """One that asks a hundred times a plan's time does not keep the planner from the other: each gets every second plan."""
    with dial(slow.url) as greedy, dial(slow.url) as modest:
        hear(greedy), hear(modest)
        stop = time.monotonic() + 3

        def flood() -> None:
            seq = 0
            while time.monotonic() < stop:
                seq += 1
                greedy.send(ask(seq))
                time.sleep(0.002)

        def drain() -> None:
            while time.monotonic() < stop:
                greedy.recv(timeout=20)

        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(flood), pool.submit(drain)]
            waits = []
            while time.monotonic() < stop - 0.8:
                modest.send(ask(0))
                waits.append(hear(modest).queue_ms)
            [job.result() for job in jobs]
    assert len(waits) >= 3 and np.median(waits) < 2 * 150


def test_health_answers_while_a_plan_is_made(slow):
    with dial(slow.url) as ws:
        hear(ws)
        ws.send(ask(0))
        assert http(slow.url, "/healthz") == (200, "ok\n")
        assert hear(ws).seq == 0


def test_metrics_count_by_code(quick):
    def counts() -> dict[str, float]:
        status, text = http(quick.url, "/metrics")
        assert status == 200
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}

    before = counts()
    with dial(quick.url) as ws:
        hear(ws)
        for seq, more in enumerate([{}, {}, {"obs": {}}, {"obs": obs(how=1)}]):
            ws.send(ask(seq, **more))
            hear(ws)
        now = counts()
        assert now['dipole_connections{dialect="dipole"}'] == 1
    grown = {k: now[k] - before.get(k, 0) for k in now if now[k] != before.get(k, 0) and "created" not in k}
    assert grown['dipole_requests_total{code="ok"}'] == grown["dipole_plan_ms_count"] == grown["dipole_queue_ms_count"] == 2
    assert grown['dipole_requests_total{code="missing_key"}'] == grown['dipole_requests_total{code="failed"}'] == 1
    assert now['dipole_model{model_id="toy0"}'] == 1


def test_paths(quick):
    assert http(quick.url, "/etc/passwd")[0] == 404
    with pytest.raises(InvalidStatus, match="404"), dial(quick.url, "/plan/../x"):
        pass


def test_sigterm_ends_it_politely():
    with toy_server() as far, dial(far.url) as ws:
        hear(ws)
        assert far.end() == 0
        with pytest.raises(ConnectionClosed) as e:
            ws.recv(timeout=20)
        assert e.value.rcvd is not None and e.value.rcvd.code == 1001


def test_it_warms_up_before_it_says_ready():
    """A planner whose first plans are slow: the ready line comes after them."""
    start = time.monotonic()
    with toy_server(plan_ms=400.0):
        assert time.monotonic() - start > WARM_UP * 0.4


def test_a_card_or_model_that_cannot_be_served_is_refused_at_once():
    with pytest.raises(RuntimeError, match="not a model card"), toy_server(card={"task": "\x1b[2J"}):
        pass


def test_two_clients_of_one_server_get_their_own_answers(quick):
    def play(k: int) -> None:
        with PlannerClient(quick.url) as client:
            client.wait_ready(20)
            for i in range(50):
                assert client.plan(obs(k, i), timeout=20).actions[0].tolist() == [k, i]

    with ThreadPoolExecutor() as pool:
        list(pool.map(play, range(4)))


def test_an_error_of_the_planner_reaches_the_caller(quick):
    with PlannerClient(quick.url) as client, pytest.raises(PlannerError, match="log") as e:
        client.plan(obs(how=1), timeout=20)
    assert e.value.code == "failed"


def test_budget_forgives_a_number_a_second(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("policy.serve.server.time.monotonic", lambda: now[0])
    budget = Budget(3)
    assert [budget.spent() for _ in range(4)] == [False, False, False, True]
    now[0] = 0.9
    assert budget.spent()
    now[0] = 2.0
    assert not budget.spent()


@pytest.mark.parametrize("host, token, tls, insecure, why", [
    ("0.0.0.0", None, True, False, "token"), ("192.168.0.7", None, False, True, "token"), ("planner.local", None, True, True, "token"),
    ("0.0.0.0", "x" * 16, False, False, "TLS"), ("::", "x" * 16, False, False, "TLS"), ("127.0.0.1", "short", False, False, "16"),
    ("127.0.0.1", "with a space in it", False, False, "16"), ("127.0.0.1", "", False, False, "16")])
def test_what_would_let_strangers_in_is_refused(host, token, tls, insecure, why):
    with pytest.raises(ValueError, match=why):
        check_exposure(host, token, tls, insecure)


@pytest.mark.parametrize("host, token, tls, insecure", [("127.0.0.1", None, False, False), ("::1", None, False, False), ("localhost", None, False, False),
                                                        ("0.0.0.0", "x" * 16, True, False), ("0.0.0.0", "x" * 16, False, True)])
def test_what_lets_nobody_in_is_allowed(host, token, tls, insecure):
    check_exposure(host, token, tls, insecure)


def test_a_port_that_is_taken_is_said(quick):
    with pytest.raises(RuntimeError, match="is taken: choose another"), toy_server(port=quick.port):
        pass


def test_a_closed_connection_frees_its_place_while_its_plan_is_made(slow):
    for _ in range(3):
        with dial(slow.url) as ws:
            hear(ws)
            ws.send(ask(0))
            ws.send(ask(1))
    with dial(slow.url) as ws:
        hear(ws)
        ws.send(ask(9))
        assert hear(ws).seq == 9


@pytest.mark.slow
def test_transport_costs_less_than_a_millisecond(quick):
    """Round trip without the plan itself, state-sized observations, p50 of 2000."""
    with PlannerClient(quick.url) as client:
        client.wait_ready(20)
        chunks = [client.plan(obs(1, 2), timeout=20) for _ in range(2000)]
    over = np.array([c.rtt_ms - c.plan_ms for c in chunks])
    p50, p99 = np.percentile(over, [50, 99])
    print(json.dumps({"transport_ms": {"p50": round(p50, 3), "p99": round(p99, 3)}}))
    assert p50 <= 1.0


@pytest.mark.slow
def test_memory_stays_flat_over_30000_requests(quick):
    with dial(quick.url) as ws:
        hear(ws)

        def load(n: int) -> float:
            for seq in range(n):
                ws.send(ask(seq) if seq % 5 else ask(seq, obs=obs(how=2)))
                ws.recv(timeout=20)
            return quick.rss_mb()

        before = load(5000)
        after = load(25000)
    print(f"rss {before:.1f} -> {after:.1f} MB")
    assert after - before < 4


def test_a_stopped_client_loses_its_connection_and_the_others_nothing(quick):
    """Half open: no FIN ever comes; the server's ping finds out."""
    sock = upgraded(quick.url)
    start = time.monotonic()
    while sock.recv(4096):  # reads, and never answers a ping
        pass
    assert time.monotonic() - start < 10
    sock.close()
    with PlannerClient(quick.url) as client:
        assert client.plan(obs(1, 2), timeout=20).actions[0].tolist() == [1, 2]



"""The openpi dialect: against msgpack-numpy as it is on their wire, and against their own client from PyPI, in an environment of its own."""
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("websockets", reason="pip install 'dipole[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'dipole[serve]'")
from websockets.exceptions import ConnectionClosed

from policy.serve.backend import PlannerBackend
from policy.serve.openpi import History, observation
from policy.serve.packing import CODES, WireError
from tests.serve.far import CARD, ROOT, Far, planner_of, toy_server
from tests.serve.talk import dial

TOKEN = "correct-horse-battery-staple"
VERSION = "openpi-client==0.1.2"


def node(x) -> dict:
    """openpi_client.msgpack_numpy.pack_array."""
    x = np.asarray(x)
    return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}


def their_unpack(data: bytes):
    """openpi_client.msgpack_numpy.unpackb."""
    def unpack_array(obj):
        if b"__ndarray__" in obj:
            return np.ndarray(buffer=obj[b"data"], dtype=np.dtype(obj[b"dtype"]), shape=obj[b"shape"])
        return obj
    return msgpack.unpackb(data, object_hook=unpack_array)


def infer(ws, **arrays):
    ws.send(msgpack.packb({k: node(v) if isinstance(v, np.ndarray) else v for k, v in arrays.items()}))
    answer = ws.recv(timeout=20)
    return answer if isinstance(answer, str) else their_unpack(answer)


def x(a: float, b: float = 0.0, how: float = 0.0, dtype: str = "<f4") -> np.ndarray:
    return np.array([a, b, how], dtype)


@pytest.fixture(scope="module")
def server() -> Iterator[Far]:
    with toy_server() as far:
        yield far


def test_metadata_first_then_actions_and_timing(server):
    with dial(server.url, "/") as ws:
        metadata = their_unpack(ws.recv(timeout=20))
        assert metadata["model"]["model_id"] == CARD.model_id and (metadata["action_horizon"], metadata["action_dim"], metadata["dt"]) == (8, 2, 0.02)
        for i in range(3):
            answer = infer(ws, x=x(i, 5))
            assert np.array_equal(answer["actions"], np.add.outer(np.arange(8), [i, 5]))
            assert answer["server_timing"]["infer_ms"] >= 0 and ("prev_total_ms" in answer["server_timing"]) == (i > 0)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i2", "<i4", "<i8", "|i1", "|u1", "<u2", "<u4"])
def test_numbers_of_every_kind_are_taken(server, dtype):
    with dial(server.url, "/") as ws:
        ws.recv(timeout=20)
        assert infer(ws, x=x(3, 5, dtype=dtype))["actions"][0].tolist() == [3, 5]


def test_what_the_model_does_not_know_is_left_out(server):
    """Robots send prompts and cameras for other policies too."""
    with dial(server.url, "/") as ws:
        ws.recv(timeout=20)
        assert infer(ws, x=x(3), prompt="pick up the fork", other=np.zeros((4, 4, 3), np.uint8), flag=True, n=3)["actions"][0, 0] == 3


def test_history_is_that_of_the_calls():
    seen = History(CARD)
    assert [seen.add({"x": x(i)})["x"][:, 0].tolist() for i in range(1, 4)] == [[1, 1], [1, 2], [2, 3]]
    assert seen.add({"x": x(9), "reset": True})["x"][:, 0].tolist() == [9, 9]
    assert seen.add({"x": np.stack([x(4), x(5)])})["x"][:, 0].tolist() == [4, 5]
    assert seen.add({"x": x(6), "reset": False})["x"][:, 0].tolist() == [5, 6]


def test_a_new_connection_has_no_history():
    with toy_server(card={"obs": {"x": (3,)}}) as far:
        for i in range(2):
            with dial(far.url, "/") as ws:
                ws.recv(timeout=20)
                assert infer(ws, x=x(i))["actions"][0, 0] == i


@pytest.mark.parametrize("message, says", [
    (b"\xc1", "undecodable"),
    ("text", "undecodable"),
    (msgpack.packb({"y": node(x(1))}), "missing_key: the observation lacks x"),
    (msgpack.packb({"x": node(x(np.nan))}), "not_finite"),
    (msgpack.packb({"x": node(np.zeros(4))}), "shape"),
    (msgpack.packb({"x": node(np.zeros((3, 3)))}), "shape"),
    (msgpack.packb({"x": {b"__ndarray__": True, b"data": b"\x80\x04K\x01.", b"dtype": "|O", b"shape": [1]}}), "dtype"),
    (msgpack.packb({"x": node(np.zeros(3, complex))}), "dtype"),
    (msgpack.packb({"x": node(np.array(["a", "b", "c"]))}), "dtype"),
    (msgpack.packb({"x": {**node(x(1)), b"shape": [4]}}), "shape"),
    (msgpack.packb({"x": {**node(np.zeros(3, "<f2")), b"shape": "abc"}}), "schema"),
    (msgpack.packb({"x": {**node(x(1)), b"more": 1}}), "schema"),
    (msgpack.packb({"x": {"y": node(x(1))}}), "flat"),
    (msgpack.packb({"x": [1, 2, 3]}), "schema"),
    (msgpack.packb({"x": "abc"}), "dtype"),
    (msgpack.packb({b"x": node(x(1))}), "keys"),
    (msgpack.packb({"x": node(x(0, 0, 1))}), "failed: the planner failed"),
    (msgpack.packb({"x": node(x(0, 0, 2))}), "not_finite"),
])
def test_what_is_wrong_is_answered_by_a_line_and_the_end(server, message, says):
    with dial(server.url, "/") as ws:
        ws.recv(timeout=20)
        ws.send(message)
        text = ws.recv(timeout=20)
        assert isinstance(text, str) and says in text and "Traceback" not in text and "secret" not in text and len(text) < 500
        with pytest.raises(ConnectionClosed) as e:
            ws.recv(timeout=20)
        assert e.value.rcvd is not None and e.value.rcvd.code in (1008, 1011)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_are_refused_by_a_wire_error(data):
    with pytest.raises(WireError) as e:
        History(CARD).add(observation(data))
    assert e.value.code in CODES


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_mutated_observation_is_taken_or_refused(data):
    raw = bytearray(msgpack.packb({"x": node(x(1, 2)), "prompt": "a", "n": {b"__npgeneric__": True, b"data": 1, b"dtype": "<i8"}}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert History(CARD).add(observation(bytes(raw)))["x"].shape == (2, 3)
    except WireError as e:
        assert e.code in CODES


def test_it_can_be_switched_off():
    from websockets.exceptions import InvalidStatus
    with toy_server(openpi=False) as far, pytest.raises(InvalidStatus, match="404"), dial(far.url, "/"):
        pass


def environment() -> Path:
    """A virtual environment with the real openpi-client, made at first use; it wants numpy 1. Skips with the reason where pip cannot."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dipole-tests" / VERSION.replace("==", "-")
    python = folder / "bin/python"
    if not (folder / "done").exists():
        for command in ([sys.executable, "-m", "venv", "--clear", folder], [python, "-m", "pip", "install", "-q", VERSION, "typing_extensions"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no environment with {VERSION}: {done.stderr.strip().splitlines()[-1]}")
        (folder / "done").touch()
    return python


@pytest.mark.slow
def test_the_real_openpi_client_gets_the_plans_of_the_planner(tmp_path):
    python, store = environment(), str(tmp_path / "data")
    backend = PlannerBackend(planner_of(store))
    rng = np.random.default_rng(0)
    steps = (5 + rng.uniform(-1, 1, (40, 3))).astype(np.float32)
    with toy_server(planner=store, token=TOKEN) as far:
        done = subprocess.run([python, ROOT / "tests/serve/openpi_far.py", str(far.port), TOKEN], input=json.dumps([{"x": s.tolist()} for s in steps]),
                              capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["numpy"].startswith("1.") and said["metadata"]["model"]["model_id"] == backend.card.model_id
    worst = max(np.abs(np.array(got) - backend.plan({"x": steps[[max(i - 1, 0), i]]})).max() for i, got in enumerate(said["actions"]))
    print(f"{len(steps)} plans, largest difference {worst:.1e}")
    assert len(said["actions"]) == 40 and worst < 1e-6
    first, second = (backend.plan({"x": steps[[0, 0]]}) for _ in range(2))
    assert np.allclose(said["stepped"], [*first[:3], second[0]], atol=1e-6)
    assert said["error"].splitlines()[1] == "missing_key: the observation lacks x; the model sees x"

"""The wire against bytes of every kind: what was packed comes back, and nothing else does anything but raise WireError."""
import tracemalloc
from dataclasses import replace

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.serve.packing import CODES, DTYPES, Limits, WireError, array, parse, sendable
from policy.serve.wire import VERSION, Err, Hello, Observation, Planned, fit, pack, unpack
from tests.serve.far import CARD, obs

WHOLE = st.integers(0, 2**63 - 1)
ARRAYS = st.builds(lambda dtype, size, seed: np.random.default_rng(seed).integers(0, 2, size).astype(dtype), st.sampled_from(DTYPES),
                   st.lists(st.integers(0, 4), max_size=4), st.integers(0, 9))
OBSERVATIONS = st.builds(Observation, WHOLE, WHOLE, WHOLE, st.dictionaries(st.text("abcé/_.", min_size=1), ARRAYS, max_size=4),
                         st.none() | st.floats(-1e6, 1e6), st.none() | ARRAYS, WHOLE, st.sampled_from(["naive", "frozen", "guided"]), seed=st.none() | WHOLE)
PLANNED = st.builds(Planned, WHOLE, WHOLE, WHOLE, st.floats(1e-3, 10), ARRAYS, st.floats(0, 1e6), st.floats(0, 1e6), st.text("0123abc"))
ERRS = st.builds(Err, st.sampled_from(CODES), st.text("abc é,"), st.none() | WHOLE)
FULL = replace(CARD, units={"x": "m"}, joints=("a", "b"), joint_units=("m", "rad"), seen_low=(-1.0, 0.0), seen_high=(1.0, 2.0),
               facts={"step": 3, "of": ["a", {"b": None}]})
MESSAGES = OBSERVATIONS | PLANNED | ERRS | st.just(Hello(FULL, 1000))
GOOD = Observation(7, 1, 5, obs(1, 2), 40.0, np.zeros((3, 2)), 2, "frozen", seed=3)


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@settings(max_examples=300, deadline=None)
@given(MESSAGES)
def test_unpack_inverts_pack(message):
    back = unpack(pack(message))
    assert type(back) is type(message)
    assert all(same(getattr(message, k), getattr(back, k)) for k in message.__dataclass_fields__)


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_a_wire_error(data):
    with pytest.raises(WireError) as e:
        unpack(data)
    assert e.value.code in CODES


NODES = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(max_size=20),
                     lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["dtype", "shape", "data", "v", "seq"]), inner, max_size=5),
                     max_leaves=12)


@settings(max_examples=600, deadline=None)
@given(MESSAGES, st.data())
def test_a_message_with_any_field_replaced_is_taken_or_refused(message, data):
    body = msgpack.unpackb(pack(message))
    body[data.draw(st.sampled_from(sorted(body)))] = data.draw(NODES)
    try:
        unpack(msgpack.packb(body))
    except WireError as e:
        assert e.code in CODES and len(e.text) < 500 and e.text.isprintable()


@settings(max_examples=1000, deadline=None)
@given(MESSAGES, st.data())
def test_a_message_with_bytes_changed_cut_or_added_is_taken_or_refused(message, data):
    raw = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change" and raw:
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at:]
        else:
            raw[at:at] = data.draw(st.binary(max_size=8))
    try:
        unpack(bytes(raw))
    except WireError as e:
        assert e.code in CODES


def changed(**fields) -> bytes:
    return msgpack.packb({**msgpack.unpackb(pack(GOOD)), **fields})


@pytest.mark.parametrize("data, code", [
    (b"\xc1\xff\x00", "undecodable"),
    (msgpack.packb([1, 2]), "undecodable"),
    (pack(GOOD)[:-1], "undecodable"),
    (pack(GOOD) + b"\x00", "undecodable"),
    (b"\x82\xa1v\x01\xa1v\x01", "undecodable"),  # a key twice
    (msgpack.packb({1: 2}), "undecodable"),
    (msgpack.packb({"v": VERSION, "type": "obs", "x": msgpack.Timestamp(1)}), "undecodable"),
    (changed(v=VERSION + 1), "version"),
    (changed(v=True), "version"),
    (changed(type="exec"), "schema"),
    (changed(extra=1), "schema"),
    (changed(seq=-1), "schema"),
    (changed(seq=True), "schema"),
    (changed(epoch=1.5), "schema"),
    (changed(deadline_ms=float("nan")), "schema"),
    (changed(merge="magic"), "schema"),
    (changed(obs=[]), "schema"),
    (changed(noise=msgpack.unpackb(pack(GOOD))["obs"]["x"]), "schema"),  # beside a seed
    (changed(obs={"x": {"dtype": "|O", "shape": [1], "data": b"12345678"}}), "dtype"),
    (changed(obs={"x": {"dtype": "<c8", "shape": [1], "data": b"12345678"}}), "dtype"),
    (changed(obs={"x": {"dtype": ">f4", "shape": [1], "data": b"1234"}}), "dtype"),
    (changed(obs={"x": {"dtype": "<f4", "shape": [2], "data": b"1234"}}), "shape"),
    (changed(obs={"x": {"dtype": "<f4", "shape": [2**40, 2**40], "data": b""}}), "schema"),
    (changed(obs={"x": {"dtype": "<f4", "shape": [4000, 4000, 4000], "data": b""}}), "shape"),
    (changed(obs={"x": {"dtype": "<f4", "shape": [-1], "data": b"1234"}}), "schema"),
    (changed(obs={"x": {"dtype": "<f4", "shape": [1] * 9, "data": b"1234"}}), "schema"),
    (changed(obs={"x": {"dtype": "|b1", "shape": [1], "data": b"\x02"}}), "schema"),
    (changed(obs={"\x1b[2J": {"dtype": "|u1", "shape": [1], "data": b"\x02"}}), "schema"),  # would be printed
    ("text", "undecodable"),
])
def test_what_is_wrong_is_named(data, code):
    with pytest.raises(WireError) as e:
        unpack(data)
    assert e.value.code == code
    assert e.value.text.isprintable()


def test_the_request_that_cannot_be_read_is_named_where_it_can_be():
    with pytest.raises(WireError) as e:
        unpack(changed(committed="two"))
    assert e.value.seq == GOOD.seq and "committed" in e.value.text
    with pytest.raises(WireError) as e:
        unpack(changed(seq="x"))
    assert e.value.seq is None


@pytest.mark.parametrize("change, code", [
    ({"obs": {}}, "missing_key"),
    ({"obs": {**obs(), "y": np.zeros(3)}}, "unknown_key"),
    ({"obs": {"x": np.zeros((2, 4))}}, "shape"),
    ({"obs": {"x": np.zeros((1, 3))}}, "shape"),
    ({"obs": obs(float("nan"))}, "not_finite"),
    ({"obs": obs(float("inf"))}, "not_finite"),
    ({"merge": "guided"}, "merge"),
    ({"prefix": np.zeros((9, 2))}, "shape"),
    ({"prefix": np.zeros((3, 1))}, "shape"),
    ({"prefix": np.zeros(())}, "shape"),
    ({"prefix": np.full((3, 2), np.nan)}, "not_finite"),
    ({"committed": 4}, "merge"),
    ({"prefix": None}, "merge"),
    ({"prefix": np.zeros((8, 2)), "committed": 5}, "merge"),
    ({"seed": None, "noise": np.zeros((8, 1))}, "shape"),
    ({"seed": None, "noise": np.full((8, 2), np.inf)}, "not_finite"),
])
def test_a_request_is_held_to_the_card(change, code):
    fit(GOOD, CARD)
    with pytest.raises(WireError) as e:
        fit(replace(GOOD, **change), CARD)
    assert e.value.code == code and e.value.seq == GOOD.seq


@pytest.mark.parametrize("change", [
    {"dt": float("nan")}, {"dt": float("inf")}, {"horizon": "8"}, {"horizon": True}, {"obs": {"x": ["a"]}}, {"obs": 3}, {"seen_low": [1]}, {"facts": 1},
    {"seen_low": [1, "2"]}, {"joints": ["a"]}, {"joints": "ab"}, {"joint_units": [1, 2]}, {"version": None}, {"version": True}, {"task": "\x1b"},
    {"merges": [1]}, {"model_id": None}, {"units": {"x": 1}}, {"t_obs": 0}])
def test_what_is_no_card_is_refused(change):
    assert unpack(pack(Hello(FULL, 1000))) == Hello(FULL, 1000)
    body = msgpack.unpackb(pack(Hello(FULL, 1000)))
    body["card"] |= change
    with pytest.raises(WireError, match="not a model card"):
        unpack(msgpack.packb(body))


@pytest.mark.parametrize("version, words", [(1, "version 1, this dipole reads 2: export again, or serve the run by this dipole"),
                                            (9, "pip install --upgrade dipole")])
def test_a_card_of_another_version_says_which_side_is_behind(version, words):
    body = msgpack.unpackb(pack(Hello(FULL, 1000)))
    for change in ({"version": version}, {"version": version, "lower": [1.0, 2.0], "seen_low": None}):
        body["card"] |= change
        with pytest.raises(WireError, match=words):
            unpack(msgpack.packb(body))
    del body["card"]["version"]  # as the first one was
    with pytest.raises(WireError, match="version 1"):
        unpack(msgpack.packb(body))


@pytest.mark.parametrize("data", [
    msgpack.packb({"a": [[]] * 100000}),
    b"\x81\xa1a" + b"\xdd\x00\x10\x00\x00" + b"\x80" * (1 << 20),  # a million empty maps in 1 MiB
    b"\x81\xa1a" + b"\xdc\x03\xe8" + (b"\xdc\x03\xe8" + b"\x80" * 1000) * 1000,  # a thousand lists of a thousand of them
    b"\x81\xa1a" + b"\x91" * 3_000_000 + b"\x90",
    b"\x81\xa1a" + b"\xdc\x03\xff" * 500 + b"\xc0",
    b"\xdf\xff\xff\xff\xff",
    b"\x81\xa1a\xc6\xff\xff\xff\xff",
    b"\x81\xa1a\xdd\xff\xff\xff\xff",
    b"\x81\xa1a\xdb\x00\x20\x00\x00" + b"a" * (2 << 20),
])
def test_a_message_costs_little_more_than_its_bytes(data):
    """No bomb: what is refused was not built first."""
    tracemalloc.start()
    with pytest.raises(WireError):
        parse(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(data) + (5 << 20)


def test_what_is_too_big_is_refused_on_both_sides():
    big = replace(GOOD, obs={"image": np.zeros((600, 600, 3), np.uint8)})
    assert len(pack(big)) > 1_000_000
    with pytest.raises(WireError, match="smaller"):
        pack(big, Limits(bytes=1_000_000))
    with pytest.raises(WireError) as e:
        unpack(pack(big), Limits(bytes=1_000_000))
    assert e.value.code == "too_big"


@pytest.mark.parametrize("x, dtype", [(1.0, "<f8"), (np.float16(1), "<f4"), (np.zeros(2, ">f4"), "<f4"), (np.zeros(2, ">f8"), "<f8"), (np.int32(3), "<i8"),
                                      ([1, 2], "<i8"), (True, "|b1"), (np.zeros((2, 3), np.uint8)[:, ::2], "|u1")])
def test_numbers_of_other_kinds_are_sent_as_one_of_the_five(x, dtype):
    node = {"dtype": (y := sendable(x)).dtype.str, "shape": list(y.shape), "data": y.tobytes()}
    assert node["dtype"] == dtype and np.array_equal(array(node), np.asarray(x))


@pytest.mark.parametrize("x", ["text", object(), np.zeros(2, complex), np.array(["a"]), {"a": 1}, np.datetime64("2020-01-01")])
def test_what_is_no_number_is_not_sent(x):
    with pytest.raises(WireError) as e:
        sendable(x)
    assert e.value.code == "dtype"

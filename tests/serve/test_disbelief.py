"""The client against a server that lies: it believes only what it asked for, and what it cannot believe is counted."""
import json
import sys
import time

import pytest

pytest.importorskip("websockets", reason="pip install 'dipole[client]'")

from policy.serve.client import PlannerClient, PlannerError, Refused, Timeouts
from tests.serve.far import CARD, Far, obs
from tests.serve.test_client import PATIENT, newest, until


@pytest.fixture(scope="module")
def liar():
    far = Far([sys.executable, "-m", "tests.serve.evil_server", "path", "0", "inf", json.dumps(CARD.to_json())])
    yield far
    far.process.kill()
    far.process.wait(10)
    far.process.stdout.close()


@pytest.mark.parametrize("lie, reason", [("nan", "not_finite"), ("inf", "not_finite"), ("shape", "shape"), ("wide", "shape"), ("short", "shape"),
                                         ("whole", "shape"), ("dtype", "dtype"), ("model", "model"), ("rate", "dt"), ("drift", "dt"), ("epoch", "unasked"),
                                         ("future", "unasked"), ("seq", "unasked")])
def test_a_chunk_that_was_not_asked_for_or_cannot_be_is_not_believed(liar, lie, reason):
    with PlannerClient(f"{liar.url}/{lie}") as client:
        client.wait_ready(PATIENT)
        client.submit(obs(), time.monotonic())
        until(lambda: client.stats.rejected[reason] == 1)
        assert client.latest() is None and client.stats.chunks == 0 and client.connected


def test_the_liar_is_believed_when_it_says_the_truth(liar):
    with PlannerClient(f"{liar.url}/honest") as client:
        assert client.plan(obs(), timeout=PATIENT).actions.shape == (8, 2)


@pytest.mark.parametrize("noise, reason", [("noise", "undecodable"), ("words", "undecodable"), ("hello", "schema"), ("echo", "schema")])
def test_noise_between_is_counted_and_skipped(liar, noise, reason):
    with PlannerClient(f"{liar.url}/{noise}") as client:
        for _ in range(3):
            assert client.plan(obs(), timeout=PATIENT).actions.shape == (8, 2)
        assert client.stats.rejected == {reason: 3} and client.stats.connects == 1


def test_a_second_answer_is_not_believed(liar):
    with PlannerClient(f"{liar.url}/twice") as client:
        client.wait_ready(PATIENT)
        client.submit(obs(), time.monotonic())
        until(lambda: client.stats.rejected["unasked"] == 200)
        assert not newest(client).actions.any() and client.latest() is None


@pytest.mark.parametrize("lie, text", [("no_hello", "no hello"), ("garbage_hello", "msgpack"), ("old", "version 9"),
                                       ("old_card", "version 1, this dipole reads 2"), ("text_hello", "binary"), ("mute", "answer")])
def test_a_server_without_a_proper_hello_is_none(liar, lie, text):
    with PlannerClient(f"{liar.url}/{lie}", timeouts=Timeouts(open=0.5)) as client:
        until(lambda: text in client.trouble)
        with pytest.raises(TimeoutError if lie == "mute" else Refused, match=text):
            client.wait_ready(0.01)
        assert not client.connected and client.stats.connects == 0


def test_too_much_at_once_ends_the_connection_and_nothing_else(liar):
    with PlannerClient(f"{liar.url}/oversize") as client:
        for _ in range(2):
            client.wait_ready(PATIENT)
            with pytest.raises((PlannerError, TimeoutError)):
                client.plan(obs(), timeout=5)
        until(lambda: client.stats.connects >= 2)


def test_countless_empty_pieces_end_the_connection(liar):
    with PlannerClient(f"{liar.url}/pieces") as client:
        client.wait_ready(PATIENT)
        with pytest.raises(PlannerError, match="lost"):
            client.plan(obs(), timeout=PATIENT)
        until(lambda: client.stats.connects >= 2)


def test_a_server_that_closes_at_every_request_is_tried_again_less_and_less_often(liar):
    with PlannerClient(f"{liar.url}/close", timeouts=Timeouts(last=0.4)) as client:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            client.submit(obs(), time.monotonic())
            time.sleep(0.01)
        assert 2 <= client.stats.connects <= 10


def test_a_server_that_never_answers_is_given_up_on(liar):
    with PlannerClient(f"{liar.url}/silent", timeouts=Timeouts(answer=0.4)) as client:
        client.wait_ready(PATIENT)
        with pytest.raises(PlannerError, match="no answer"):
            client.plan(obs(), timeout=PATIENT)
        until(lambda: client.stats.connects >= 2)


def test_codes_of_a_stranger_do_not_fill_the_counters(liar):
    with PlannerClient(f"{liar.url}/strange_code") as client:
        for _ in range(3):
            client.plan(obs(), timeout=PATIENT)
        until(lambda: client.stats.errors == {"other": 3})

"""A recorder that dies at any moment leaves every completed episode intact."""
import os
import random
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
import zarr.storage._local as local
from data_cases import SCHEMA, assert_equal, assert_same, make_episode

from policy.data import DataError, Recorder, Store, record


def episode(i: int):
    return make_episode(i, 1 + 37 * i % 61)


class Death(BaseException):
    """Not an Exception, so that nothing on the way can handle it."""


@pytest.fixture
def die_at(monkeypatch):
    """die_at(n, after): the n-th file write from now on stops halfway, or just after its rename; n=0 disarms."""
    real, count = local._put, [0]

    def arm(n: int, after: bool) -> None:
        count[0] = 0

        def put(path, value, exclusive=False):
            count[0] += 1
            if count[0] == n:
                if after:
                    with suppress(FileExistsError):  # zarr writes a parent group again and again, exclusively
                        real(path, value, exclusive)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.with_suffix(".dead.partial").write_bytes(bytes(value.as_buffer_like())[:-1])
                raise Death
            return real(path, value, exclusive)
        monkeypatch.setattr(local, "_put", put)
    return arm


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("ends_chunk", [8192, 2])
def test_death_at_every_single_write(tmp_path, monkeypatch, die_at, after, ends_chunk):
    monkeypatch.setattr("policy.data.making.ENDS_CHUNK", ends_chunk)
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 8)
    monkeypatch.setattr("policy.data.making.CHUNKS_PER_SHARD", 2)
    schema = {key: SCHEMA[key] for key in ("image", "action")}
    episodes = [make_episode(i, n, schema) for i, n in enumerate((9, 20, 1, 12, 5))]
    path, done, deaths = tmp_path / "d.zarr", [], 0
    Store.create(path, schema, fps=10)
    for batch in (episodes[:1], episodes[1:4], episodes[4:]):
        n = 1
        while batch:
            store = Store.open(path, mode="a")
            assert_same(store, done)
            die_at(n, after)
            try:
                store.extend(batch)
            except Death:
                deaths += 1
            die_at(0, after)
            # A batch appears in order, and a recorder goes on with the rest of it.
            kept = Store.open(path, mode="a").episodes - len(done)
            done, batch, n = done + batch[:kept], batch[kept:], 1 if kept else n + 1
    assert_same(Store.open(path), episodes)
    assert deaths > 20


def test_death_while_creating_leaves_nothing_in_the_way(tmp_path, die_at):
    path = tmp_path / "d.zarr"
    for n in (1, 6, 12):
        die_at(n, after=True)
        with pytest.raises(Death):
            Store.create(path, SCHEMA, fps=10)
        assert not path.exists()
    die_at(0, after=True)
    Store.create(path, SCHEMA, fps=10).append(episode(0))
    assert_same(Store.open(path), [episode(0)])


def record_forever(path: Path, acknowledged: Path) -> None:
    store = Store.open(path, mode="a")
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        i = store.episodes
        store.append(episode(i))
        os.write(log, b"%d\n" % i)


def record_step_by_step(path: Path, acknowledged: Path) -> None:
    """The same through a Recorder, whose thread puts down pieces of the running episode."""
    record.BLOCK_BYTES = 2000
    log = os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    recorder = Recorder(path, fps=10)
    while True:
        i = recorder.episodes
        frames = episode(i)
        for k in range(len(frames["action"])):
            recorder.add({key: x[k] for key, x in frames.items()})
        if i % 5 == 4 and not recorder.frames % 2:
            recorder.cancel()
            recorder.extend([frames])
        else:
            recorder.end()
        os.write(log, b"%d\n" % i)


def kill_repeatedly(path: Path, kills: int, seed: int, write=record_forever) -> int:
    rng, context = random.Random(seed), get_context("forkserver")
    context.set_forkserver_preload(["policy.data.record", "data_cases"])
    Store.create(path, SCHEMA, fps=10)
    acknowledged = path.with_suffix(".log")
    for kill in range(kills):
        recorder = context.Process(target=write, args=(path, acknowledged), daemon=True)
        before = acknowledged.stat().st_size if acknowledged.exists() else 0
        recorder.start()
        for _ in range(2000):  # until it records
            if acknowledged.exists() and acknowledged.stat().st_size > before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))  # a few appends: somewhere within one
        recorder.kill()
        recorder.join()
        assert recorder.exitcode == -9
        last = int(acknowledged.read_text().split()[-1])
        store = Store.open(path)
        assert last + 1 <= store.episodes <= last + 2  # the one after may be complete and not yet acknowledged
        for i in range(0 if kill % 25 == 0 or kill == kills - 1 else max(0, store.episodes - 12), store.episodes):  # all of them now and then
            assert_equal(store.episode(i), episode(i))
    return store.episodes


@pytest.mark.parametrize("write", [record_forever, record_step_by_step])
def test_sigkill(tmp_path, write):
    assert kill_repeatedly(tmp_path / "d.zarr", 10, 0, write) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("write", [record_forever, record_step_by_step])
def test_sigkill_many(tmp_path, write):
    assert kill_repeatedly(tmp_path / "d.zarr", 200, 1, write) >= 200


def test_a_full_disk_is_an_error_and_the_recorder_may_go_on(dataset, monkeypatch):
    store, real = Store.open(dataset, mode="a"), local._put

    def full(path, value, exclusive=False):
        if "reward" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, value, exclusive)
    monkeypatch.setattr(local, "_put", full)
    with pytest.raises(OSError, match="No space left"):
        store.append(make_episode(4, 70))
    monkeypatch.setattr(local, "_put", real)
    before = store.episodes
    store.append(make_episode(4, 5))
    assert before == 4 and len(Store.open(dataset).episode(4)["pose"]) == 5
    with pytest.raises(DataError):
        store.append({})

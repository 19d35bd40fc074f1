"""Recording step by step: the same dataset as writing whole episodes, in little memory, whatever goes wrong on the way."""
import time

import numpy as np
import pytest
import zarr.storage._local as local
from data_cases import EPISODES, SCHEMA, assert_same, make_episode

from policy.data import DataError, Recorder, Store
from policy.data import record as module
from policy.data.semantics import Semantics
from policy.data.validate import validate


def add_all(recorder, episode):
    for k in range(len(episode["action"])):
        recorder.add({key: x[k] for key, x in episode.items()})


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 500)  # about six frames
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 8)
    monkeypatch.setattr("policy.data.making.CHUNKS_PER_SHARD", 2)


def test_what_is_recorded_is_what_was_added(tmp_path, small_blocks):
    path = tmp_path / "d.zarr"
    with Recorder(path, fps=10, schema=SCHEMA, units={"pose": "m"}, action_semantics="velocity", attrs={"task": "t"}) as recorder:
        for i, episode in enumerate(EPISODES[:2]):
            add_all(recorder, episode)
            recorder.end()
            assert recorder.episodes == i + 1
        add_all(recorder, make_episode(9, 40))
        recorder.cancel()
        recorder.extend([EPISODES[2]])
        add_all(recorder, EPISODES[3])
        recorder.end()
        add_all(recorder, make_episode(8, 40))  # never ended
    store = Store.open(path)
    assert_same(store, EPISODES)
    assert (store.fps, store.units, store.action_semantics, store.attrs["task"]) == (10, {"pose": "m"}, "velocity", "t")
    with Recorder(path, fps=10) as recorder:
        assert recorder.episodes == 4
        add_all(recorder, make_episode(4, 11))
        recorder.end(wait=False)
        add_all(recorder, make_episode(5, 11))
        recorder.end(wait=False)
    assert_same(Store.open(path), [*EPISODES, make_episode(4, 11), make_episode(5, 11)])


def test_the_schema_is_that_of_the_first_frame_and_frames_are_copied(tmp_path):
    q = np.zeros(3)
    with Recorder(tmp_path / "d.zarr", fps=50) as recorder:
        for k in range(4):
            q[:] = k
            recorder.add({"q": q, "flag": k % 2 == 0, "count": k, "grip": 0.5 * k})
        recorder.end()
    store = Store.open(tmp_path / "d.zarr")
    assert {k: (s, str(d)) for k, (s, d) in store.schema.items()} == {
        "q": ((3,), "float32"), "flag": ((), "bool"), "count": ((), "int64"), "grip": ((), "float32")}
    episode = store.episode(0)
    assert episode["q"][:, 0].tolist() == [0, 1, 2, 3] and episode["flag"].tolist() == [True, False, True, False]


def test_a_long_episode_is_on_disk_before_it_ends_and_invisible_until_then(tmp_path, small_blocks):
    with Recorder(tmp_path / "d.zarr", fps=10, schema=SCHEMA) as recorder:
        add_all(recorder, long := make_episode(0, 300))
        until = time.monotonic() + 20
        while (n := Store.open(tmp_path / "d.zarr", mode="a")._arrays["action"].shape[0]) < 250 and time.monotonic() < until:
            time.sleep(0.01)
        assert n >= 250
        with pytest.raises(DataError, match="no complete episode"):
            Store.open(tmp_path / "d.zarr")
        recorder.end()
    assert_same(Store.open(tmp_path / "d.zarr"), [long])


@pytest.mark.parametrize("frame, words", [
    ({"pose": np.zeros(2), "action": np.zeros(2)}, r"'pose' has shape \(2,\), the first frame had \(3,\)"),
    ({"pose": np.zeros(3)}, r"lacks \['action'\]"),
    ({"pose": np.zeros(3), "action": np.zeros(2), "extra": 1}, "'extra' is none of its keys"),
    ({"pose": np.zeros(3), "action": np.zeros(2, complex)}, "'action' is complex128"),
])
def test_a_frame_that_does_not_fit_is_refused_and_the_episode_goes_on(tmp_path, frame, words):
    good = {"pose": np.ones(3, "float32"), "action": np.ones(2, "float32")}
    with Recorder(tmp_path / "d.zarr", fps=10) as recorder:
        recorder.add(good)
        with pytest.raises(DataError, match=words):
            recorder.add(frame)
        recorder.add(good)
        recorder.end()
        with pytest.raises(DataError, match="none was added"):
            recorder.end()
    assert_same(Store.open(tmp_path / "d.zarr"), [{k: np.stack([v, v]) for k, v in good.items()}])


def test_two_recorders_do_not_share_a_dataset(tmp_path):
    one = Recorder(tmp_path / "d.zarr", fps=10)
    one.extend([EPISODES[0]])
    with pytest.raises(DataError, match="another recorder writes to it"):
        Recorder(tmp_path / "d.zarr", fps=10)
    one.close()
    Recorder(tmp_path / "d.zarr", fps=10).close()
    with pytest.raises(ValueError, match="recorded at 10 Hz and this is 20 Hz"):
        Recorder(tmp_path / "d.zarr", fps=20)
    with pytest.raises(ValueError, match=r"holds action .* and this records"):
        Recorder(tmp_path / "d.zarr", fps=10, schema={"q": ((1,), "float32")})


def test_a_closed_recorder_takes_nothing_more(tmp_path):
    recorder = Recorder(tmp_path / "d.zarr", fps=10, schema=SCHEMA)
    add_all(recorder, EPISODES[0])
    recorder.close()
    recorder.close()
    with Recorder(tmp_path / "d.zarr", fps=10) as other:
        add_all(other, EPISODES[1])
        frame = {key: x[0] for key, x in EPISODES[0].items()}
        for late in (lambda: recorder.add(frame), recorder.end, lambda: recorder.extend([EPISODES[0]])):
            with pytest.raises(RuntimeError, match="this recorder is closed"):
                late()
        other.end()
    assert_same(Store.open(tmp_path / "d.zarr"), [EPISODES[1]])


def test_a_full_disk_loses_the_episode_and_says_so_and_the_next_one_is_kept(tmp_path, small_blocks, monkeypatch):
    real = local._put

    def full(path, value, exclusive=False):
        if "pose" in str(path):
            raise OSError(28, "No space left on device")
        return real(path, value, exclusive)
    with Recorder(tmp_path / "d.zarr", fps=10, schema=SCHEMA) as recorder:
        recorder.extend([EPISODES[0]])
        monkeypatch.setattr(local, "_put", full)
        with pytest.raises(DataError, match="No space left"):
            add_all(recorder, make_episode(1, 30))
            recorder.end()
        with pytest.raises(DataError, match=r"No space left.*ones before are kept"):
            add_all(recorder, make_episode(1, 3))
            recorder.end()
        add_all(recorder, make_episode(1, 3))
        recorder.end(wait=False)
        time.sleep(0.3)
        with pytest.raises(DataError, match="No space left"):
            recorder.add({key: x[0] for key, x in make_episode(1, 3).items()})
        monkeypatch.setattr(local, "_put", real)
        add_all(recorder, make_episode(2, 30))
        recorder.end()
        assert recorder.episodes == 2
    assert_same(Store.open(tmp_path / "d.zarr"), [EPISODES[0], make_episode(2, 30)])
    recorder = Recorder(tmp_path / "d.zarr", fps=10)
    monkeypatch.setattr(local, "_put", full)
    add_all(recorder, make_episode(1, 3))
    recorder.end(wait=False)
    with pytest.raises(DataError, match="No space left"):
        recorder.close()


def test_a_disk_that_is_too_slow_is_an_error_not_an_empty_memory(tmp_path, small_blocks, monkeypatch):
    real = local._put

    def slow(path, value, exclusive=False):
        time.sleep(0.02)
        return real(path, value, exclusive)
    with Recorder(tmp_path / "d.zarr", fps=10, schema=SCHEMA, memory=3000) as recorder:
        recorder.extend([EPISODES[0]])
        monkeypatch.setattr(local, "_put", slow)
        with pytest.raises(DataError, match=r"the disk is slower.*memory="):
            add_all(recorder, make_episode(1, 300))
        monkeypatch.setattr(local, "_put", real)
        until = time.monotonic() + 20
        while recorder._waiting and time.monotonic() < until:
            time.sleep(0.01)
        add_all(recorder, make_episode(2, 5))
        recorder.end()
    assert_same(Store.open(tmp_path / "d.zarr"), [EPISODES[0], make_episode(2, 5)])


def test_the_loop_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    """A write takes 50 ms here; no add of a small image waits for one."""
    real = local._put

    def slow(path, value, exclusive=False):
        time.sleep(0.05)
        return real(path, value, exclusive)
    monkeypatch.setattr(module, "BLOCK_BYTES", 100_000)
    image, took = np.zeros((64, 64, 3), np.uint8), []
    with Recorder(tmp_path / "d.zarr", fps=100) as recorder:
        recorder.add({"image": image, "q": 0.0})
        monkeypatch.setattr(local, "_put", slow)
        for _ in range(200):
            tick = time.perf_counter()
            recorder.add({"image": image, "q": 0.0})
            took.append(time.perf_counter() - tick)
        recorder.end()
    assert len(Store.open(tmp_path / "d.zarr").episode(0)["q"]) == 201
    assert np.quantile(took, 0.9) < 0.005


@pytest.mark.parametrize("said", [{"kind": "delta", "space": "joint", "of": "q", "text": "steps"}, Semantics("delta", "joint", of="q", text="steps")])
def test_what_the_action_means_is_said_so_that_it_is_read(tmp_path, said):
    rng, path = np.random.default_rng(0), tmp_path / "d.zarr"
    with Recorder(path, fps=20, action_semantics=said) as recorder:
        for _ in range(6):
            q = np.zeros(2)
            for _ in range(80):
                target = q + 0.1 * rng.normal(size=2)
                recorder.add({"q": q, "action": target})  # absolute targets
                q = 0.2 * q + 0.8 * target
            recorder.end()
    store = Store.open(path)
    assert store.action_semantics == "steps" and Semantics.from_json(store.attrs["action"]) == Semantics("delta", "joint", of="q", text="steps")
    assert "action_kind" in [f.code for f in validate(path).findings]


@pytest.mark.parametrize("facts, words", [
    ({"action_semantics": {"kind": "absolut"}}, "kind='absolut' of an action is unknown"),
    ({"action_semantics": {"of": "p"}}, "action_semantics: of: 'p' is not a stored key"),
    ({"attrs": {"action": {"parts": {"gripper": [2]}}}}, "attribute action: parts names channel 2, and the action has 2"),
    ({"action_semantics": {"kind": "delta"}, "attrs": {"action": {"kind": "delta"}}}, "is said twice")])
def test_a_meaning_that_cannot_be_is_refused(tmp_path, facts, words):
    with pytest.raises(ValueError, match=words), Recorder(tmp_path / "d.zarr", fps=20, **facts) as recorder:
        recorder.add({"q": np.zeros(2), "action": np.zeros(2)})
    assert not (tmp_path / "d.zarr").exists()


def test_time_stamps_are_kept_apart(tmp_path):
    now = 1_790_000_000.123
    with Recorder(tmp_path / "d.zarr", fps=1000) as recorder:
        for k in range(5):
            recorder.add({"time": now + 0.001 * k, "clocks": np.array([0.001 * k, now + 0.001 * k]), "up": 0.001 * k, "q": np.zeros(2)})
        recorder.end()
    store = Store.open(tmp_path / "d.zarr")
    assert {k: str(d) for k, (_, d) in store.schema.items()} == {"time": "float64", "clocks": "float64", "up": "float32", "q": "float32"}
    np.testing.assert_allclose(np.diff(store.read("time")), 0.001, atol=1e-6)

"""The core of convert: the mapping, the action, the rate, the way back, refusals. Formats have tests of their own."""
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_cases import EPISODES, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.data import DataError, Store
from policy.data.convert import FORMATS, Rules, convert, detect, open_source
from policy.data.convert.keep import dump, load, read_keep, write_keep
from policy.data.convert.mapping import kept, legal, stored_names
from policy.data.convert.resample import resampled
from policy.data.semantics import Semantics

RNG = np.random.default_rng(3)


@pytest.fixture
def arrays(tmp_path):
    """An .npz with two episodes of 6 and 4 steps at 10 Hz, as its time stamps say."""
    t = np.concatenate([np.arange(6), np.arange(4)]) / 10 + 3
    path = tmp_path / "a.npz"
    np.savez(path, t=t, q=np.stack([t, 2 * t], 1), right=RNG.normal(size=(10, 3)), left=RNG.normal(size=(10, 1)).astype(np.float32),
             grip=np.arange(10), rewards=np.zeros(10), episode_ends=[6, 10])
    return path


# ---------------------------------------------------------------- names
NAMES = st.lists(st.text("ab/._", min_size=1, max_size=6).filter(lambda s: s.strip("/")), min_size=1, max_size=8, unique=True)


@given(names=NAMES, data=st.data())
@settings(max_examples=150)
def test_stored_names_are_legal_unique_and_lose_no_key(names, data):
    action = data.draw(st.sampled_from([None, *names]))
    reserved = [] if action else data.draw(st.sampled_from([[], ["action"]]))
    try:
        found = stored_names(names, {}, action, reserved)
    except DataError as e:
        assert "Name one with keys" in str(e)
        return
    assert list(found) == names and all(map(legal, found.values()))
    assert len({*found.values(), *reserved}) == len(names) + len(reserved)
    assert action is None or found[action] == "action"


def test_the_rule_of_names():
    names = ["obs/q", "next_obs/q", "actions", "infos/qpos", "observation.state", "obs/img", "img"]
    assert stored_names(names, {}, "actions") == {"obs/q": "q", "next_obs/q": "next_obs_q", "actions": "action", "infos/qpos": "infos_qpos",
                                                  "observation.state": "observation.state", "obs/img": "obs_img", "img": "img"}
    assert stored_names(["action", "x"], {}, None, ["action"]) == {"action": "recorded_action", "x": "x"}
    with pytest.raises(DataError, match=r"a/b and a_b would be stored under the name 'a_b'. Name one with keys: \{a/b: …\}"):
        stored_names(["a/b", "a_b"], {}, None)
    assert stored_names(["a/b", "a_b"], {"a/b": "c"}, None) == {"a/b": "c", "a_b": "a_b"}
    with pytest.raises(ValueError, match=r"'obs/k' is not in the source. Did you mean 'obs/q'\?"):
        stored_names(["obs/q"], {"obs/k": "q"}, None)
    assert kept(["next_obs/q", "obs/q"], ["next_*"]) == ["obs/q"]
    with pytest.raises(ValueError, match=r"'nxt_\*' matches none"):
        kept(["next_obs/q"], ["nxt_*"])


# ---------------------------------------------------------------- the mapping
@pytest.mark.parametrize("said, message", [
    ({"fsp": 20}, r"'fsp' is no entry of a mapping. Did you mean fps\?"), ({"fps": -1}, "rate in Hz above 0"), ({"fps": "fast"}, "rate in Hz"),
    ({"keys": {"q": "a/b"}}, "cannot be a stored key"), ({"keys": ["q"]}, "is written {source name: …}"), ({"skip": 3}, "skip of a mapping is a list"),
    ({"action": {"kind": "deltas"}}, "kind='deltas' of an action is unknown"), ({"action": {"knd": "delta"}}, "knd says nothing about an action"),
    ({"action_from": {"kye": "q"}}, "is not understood"), ({"action_from": {"key": "q", "shift": -1}}, "counts steps into the future"),
    ({"action_from": "p"}, r"action_from: 'p' is not in .*known: t, q"), ({"action_from": {"key": "q", "take": [2]}}, r"has shape \(2,\) per step"),
    ({"obs": ["p"]}, "obs: 'p' is not a stored key"), ({"units": {"p": "m"}}, "units: 'p' is not a stored key"),
    ({"clock": "q"}, "name one channel of it, such as q"), ({"clock": "p"}, "clock: 'p' is not in the source"), ({"format": "hdf"}, "format='hdf' is unknown"),
])
def test_mappings_that_cannot_be(arrays, tmp_path, said, message):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"fps": 20, "action_from": "right", **said}))
    with pytest.raises((ValueError, DataError), match=message):
        convert(arrays, tmp_path / "a.zarr", mapping=tmp_path / "m.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "m.yaml"]


def test_mapping_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no mapping"):
        Rules.of(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("keys: {a")
    with pytest.raises(ValueError, match="is not yaml"):
        Rules.of(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("- keys")
    with pytest.raises(ValueError, match="is a list; a mapping is written name: value"):
        Rules.of(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("")
    assert Rules.of(tmp_path / "m.yaml") == Rules()


def test_what_is_said_wins_over_the_file(arrays, tmp_path):
    mapping = {"fps": 5, "keys": {"q": "joints"}, "skip": ["t"], "units": {"q": "rad"}, "task": "reach", "obs": {"arm": {"key": "joints", "take": [1]}},
               "action_from": ["right", "left"],
               "action": {"kind": "velocity", "space": "joint", "parts": {"joints": [0, 1, 2], "gripper": [3]}, "text": "rad/s"}}
    done = convert(arrays, tmp_path / "a.zarr", mapping=mapping, fps=20, keys={"grip": "hand"}, skip=["rewards"])
    store = Store.open(done.path)
    assert sorted(store.keys) == ["action", "hand", "joints", "left", "right"] and store.fps == 20 and store.units == {"joints": "rad"}
    assert store.attrs["obs"] == {"arm": {"key": "joints", "take": [1]}} and store.attrs["task"] == "reach"
    assert Semantics.from_json(store.attrs["action"]).kind == "velocity" and store.action_semantics == "rad/s"
    np.testing.assert_array_equal(store.read("action"), np.concatenate([store.read("right"), store.read("left")], 1))
    assert done.notes == ("left out as asked: t, rewards",)


def test_a_bare_word_is_a_list_of_one(arrays, tmp_path):
    (tmp_path / "m.yaml").write_text("{fps: 20, action_from: right, skip: grip, obs: left}")
    store = Store.open(convert(arrays, tmp_path / "a.zarr", mapping=tmp_path / "m.yaml", skip="rewards").path)
    assert store.keys == ["action", "left", "q", "t"] and store.attrs["obs"] == {"left": "left"}
    assert Rules.of({"video": "front"}) == Rules(video=["front"])
    with pytest.raises(ValueError, match="skip: 'fo' matches none"):
        convert(arrays, tmp_path / "b.zarr", fps=20, action_from="right", skip="fo")


# ---------------------------------------------------------------- actions
def test_a_dataset_without_actions_wants_to_know_what_they_are(arrays, tmp_path):
    with pytest.raises(DataError, match=r"has no actions \(keys: t, q, right, left, grip, rewards\)\. Say what they are.*shift: 1"):
        convert(arrays, tmp_path / "a.zarr", fps=10)
    done = convert(arrays, tmp_path / "a.zarr", fps=10, action_from="none")
    assert "action" not in Store.open(done.path).keys
    done = convert(arrays, tmp_path / "b.zarr", fps=10, action_from={"key": "q", "take": [1], "shift": 1})
    store = Store.open(done.path)
    for i in range(2):
        episode = store.episode(i)
        np.testing.assert_array_equal(episode["action"][:-1, 0], episode["q"][1:, 1])
        assert episode["action"][-1] == episode["q"][-1, 1]
    assert Semantics.from_json(store.attrs["action"]) == Semantics("absolute", of="q", of_take=(1,), text="q[1:2] 1 step later")
    assert "q" in store.attrs["obs"]  # seen now, commanded one step later


def test_what_a_policy_must_not_see_is_no_observation(tmp_path):
    n, names = 8, ["observation", "next_observation", "reward", "terminal", "timestamp", "joint_torques", "infos", "image", "note", "action"]
    x = {k: np.zeros((n, 2)) for k in names} | {"terminal": np.arange(n) == n - 1, "image": np.zeros((n, 8, 8, 3), np.uint8), "note": np.array(["a"] * n)}
    np.savez(tmp_path / "a.npz", **{k: v for k, v in x.items() if k != "note"})
    assert Store.open(convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=1).path).attrs["obs"] == {"observation": "observation"}
    np.savez(tmp_path / "b.npz", q=np.zeros((n, 2)), next_q=np.zeros((n, 2)), action=np.zeros((n, 2)))
    assert Store.open(convert(tmp_path / "b.npz", tmp_path / "b.zarr", fps=1).path).attrs["obs"] == {"q": "q"}


# ---------------------------------------------------------------- rate
def test_time_stamps_lay_episodes_on_another_rate(arrays, tmp_path):
    """q is linear in time, so its interpolation is exact; whole numbers and actions keep the latest value."""
    done = convert(arrays, tmp_path / "a.zarr", fps=25, clock="t", action_from="right")
    store = Store.open(done.path)
    assert store.episode_ends.tolist() == [13, 13 + 8]
    with np.load(arrays) as x:
        for i, lo in enumerate([0, 6]):
            new = 3 + np.arange(len(store.episode(i)["t"])) / 25
            latest = lo + np.floor((new - 3) * 10 + 1e-6).astype(int)
            np.testing.assert_allclose(store.episode(i)["t"], new, atol=1e-12)
            np.testing.assert_allclose(store.episode(i)["q"][:, 1], 2 * new, atol=1e-12)
            np.testing.assert_array_equal(store.episode(i)["grip"], x["grip"][latest])
            np.testing.assert_array_equal(store.episode(i)["action"], x["right"][latest])
    assert store.attrs["source"]["resampled"] == {"clock": "t", "fps": 25}


@given(n=st.integers(2, 60), ratio=st.integers(1, 7), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_summed_changes_reach_the_same_place(n, ratio, seed):
    """Delta actions of 100 Hz at 100/ratio Hz: what they add up to at each new step is the same; a gripper keeps its latest value."""
    rng = np.random.default_rng(seed)
    action = np.c_[rng.normal(size=(n, 2)), rng.choice([-1.0, 1.0], n)]
    meant = Semantics("delta", "ee", parts={"position": (0, 1), "gripper": (2,)})
    out = resampled({"action": action, "x": np.r_[np.zeros((1, 2)), np.cumsum(action[:-1, :2], 0)]}, np.arange(n) / 100, 100 / ratio, {"action"}, meant)
    np.testing.assert_allclose(out["x"], np.r_[np.zeros((1, 2)), np.cumsum(out["action"][:-1, :2], 0)], atol=1e-9)
    np.testing.assert_allclose(out["action"][:, :2].sum(0), action[:, :2].sum(0), atol=1e-9)
    np.testing.assert_array_equal(out["action"][:, 2], action[::ratio, 2])


def test_rates_that_cannot_be(arrays, tmp_path):
    with pytest.raises(DataError, match=r"does not say how many steps there are in a second: add fps="):
        convert(arrays, tmp_path / "a.zarr", action_from="right")
    first = convert(arrays, tmp_path / "a.zarr", fps=10, action_from="right").path
    with pytest.raises(DataError, match=r"says 10 Hz, so fps=5 means other steps: say by which time stamps with clock="):
        convert(first, tmp_path / "b.zarr", format="store", fps=5)
    done = convert(first, tmp_path / "b.zarr", format="store", fps=5, clock="frames", keys={"q": "joints"})
    assert done.steps == 3 + 2 and Store.open(done.path).fps == 5
    turning = {"kind": "delta", "rotation": "axis_angle", "parts": {"rotation": [0, 1, 2]}}
    with pytest.raises(DataError, match="turns do not add up"):
        convert(first, tmp_path / "c.zarr", format="store", fps=5, clock="frames", action=turning)
    with np.load(arrays) as x:
        np.savez(tmp_path / "b.npz", **{**x, "t": x["t"][::-1]})
    with pytest.raises(DataError, match="clock: t goes backwards or is not finite after step 0 of episode 0"):
        convert(tmp_path / "b.npz", tmp_path / "c.zarr", fps=5, clock="t", action_from="right")


# ---------------------------------------------------------------- there and back
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
@settings(max_examples=25)
def test_what_is_kept_comes_back(x):
    kept = {"x": x, "a": np.arange(6, dtype=">f4").reshape(2, 3), "s": np.array(["ab", "ü"]), "one": np.float32(1.5), "none": np.zeros((0, 3), np.int8),
            "rec": np.zeros(2, [("a", "<f4"), ("b", "S3", (2,))])}
    back = load(dump(kept))
    assert back["x"] == json.loads(json.dumps(x)) and back["one"] == np.float32(1.5) and type(back["one"]) is np.float32
    for k in ("a", "s", "none", "rec"):
        assert back[k].dtype == kept[k].dtype and back[k].shape == kept[k].shape and back[k].tobytes() == kept[k].tobytes()


def test_a_damaged_way_back_does_not_hide_the_episodes(arrays, tmp_path):
    path = convert(arrays, tmp_path / "a.zarr", fps=10, action_from="right").path
    blob = path / "meta/source/c/0"
    blob.write_bytes(blob.read_bytes()[:-5])
    assert Store.open(path).episode(1)["q"].shape == (4, 2)
    with pytest.raises(DataError, match="meta/source, what its source looked like, is damaged"):
        read_keep(Store.open(path))


def test_a_store_knows_where_it_came_from(dataset, arrays, tmp_path):
    path = convert(arrays, tmp_path / "a.zarr", fps=10, action_from="right").path
    assert detect(path) == "store" and convert(path, tmp_path / "b.npz").format == "npz"
    with pytest.raises(DataError, match=r"is a store of dipole already\. To write it in another format name that: format=… \(robomimic, "):
        convert(dataset, tmp_path / "b.zarr")
    assert_same(Store.open(convert(dataset, tmp_path / "c.zarr", format="store").path), EPISODES)


@pytest.mark.parametrize("name, content, message", [
    ("a.pkl", b"\x80\x04K\x01.", "is pickled.*unpickling a file runs whatever program it holds.*numpy.savez"),
    ("a.txt", b"hello", "Looked for:\n  robomimic: "), ("a.hdf5", b"hello", r"a\.hdf5 ends in \.hdf5 but is no HDF5 file"),
    ("a.npz", b"hello", r"not a readable \.npz")])
def test_what_is_no_dataset_says_what_was_looked_for(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "b.zarr")


def test_what_appears_meanwhile_is_not_overwritten(arrays, tmp_path):
    def meanwhile(i, n, steps):
        (tmp_path / "a.zarr").write_text("mine")
    with pytest.raises(DataError, match=r"a\.zarr exists and is not overwritten"):
        convert(arrays, tmp_path / "a.zarr", fps=10, action_from="right", progress=meanwhile)
    assert (tmp_path / "a.zarr").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_nothing_is_overwritten_and_no_half_dataset_is_left(arrays, dataset, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="exists and is not overwritten"):
        convert(arrays, dataset, fps=10)
    monkeypatch.setattr("policy.data.building.BATCH_BYTES", 100)
    with np.load(arrays) as x:
        np.savez(tmp_path / "b.npz", **{**x, "t": np.r_[x["t"][:9], -1]})  # the second episode cannot be resampled
    with pytest.raises(DataError, match="after step 2 of episode 1"):
        convert(tmp_path / "b.npz", tmp_path / "c.zarr", fps=5, clock="t", action_from="right")
    with pytest.raises(DataError, match="rosbag is read but not written"):
        convert(dataset, tmp_path / "c.zarr", format="rosbag")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "demo.zarr"]


@pytest.mark.slow
def test_killed_while_converting_there_is_no_dataset(tmp_path):
    """Killed at six moments: dst is not there, or whole."""
    np.savez(tmp_path / "a.npz", action=RNG.normal(size=(300_000, 20)), episode_ends=np.arange(1, 301) * 1000)
    code = "import sys; from policy.data import building; building.BATCH_BYTES = 2**20; from policy.data.convert import convert; print('go', flush=True); " \
           "convert(sys.argv[1], sys.argv[2], fps=10)"
    whole = 0
    for i in range(6):
        dst = tmp_path / f"{i}.zarr"
        job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.npz"), str(dst)], stdout=subprocess.PIPE)
        assert job.stdout.readline() == b"go\n"
        time.sleep(0.15 * i)
        job.kill()
        job.wait()
        if dst.exists():
            whole += 1
            assert Store.open(dst).episodes == 300
    assert whole < 6


@pytest.mark.slow
def test_memory_stays_bounded_by_an_episode(tmp_path):
    """A file of 240 MB, in episodes of 2.4 MB, is converted, and converted back, with less than 120 MB more than at the start."""
    n = 100_000
    np.savez(tmp_path / "a.npz", action=np.zeros((n, 300)), episode_ends=np.arange(1, 101) * 1000)
    code = """
import resource, sys
from policy.data import building; building.BATCH_BYTES = 2**23
from policy.data.convert import convert
import policy.data.convert.npz
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
convert(sys.argv[1], sys.argv[3], fps=10, skip=[])
one = peak()
convert(sys.argv[2], sys.argv[4], fps=10)
convert(sys.argv[4], sys.argv[5])
print(peak() - one)
"""
    np.savez(tmp_path / "small.npz", action=np.zeros((10, 300)), episode_ends=[10])
    paths = [str(tmp_path / p) for p in ("small.npz", "a.npz", "s.zarr", "a.zarr", "b.npz")]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120


def test_a_store_behind_a_url_converts(dataset, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(dataset), "/bucket/demo.zarr", recursive=True)
    done = convert("memory://bucket/demo.zarr", tmp_path / "a.npz", format="npz")
    assert (done.episodes, done.steps) == (4, 50)
    assert_same(Store.open(convert("memory://bucket/demo.zarr", tmp_path / "a.zarr", format="store").path), EPISODES)
    with pytest.raises(DataError, match=r"memory://bucket/demo.hdf5 is not a store of dipole.*Download it first"):
        convert("memory://bucket/demo.hdf5", tmp_path / "b.zarr", fps=1)


@pytest.mark.parametrize("name", ["../out.npz", "/tmp/out.npz", ".hidden", "a/b.npz"])
def test_a_strangers_store_writes_no_file_elsewhere(tmp_path, name):
    (tmp_path / "demos").mkdir()
    np.savez(tmp_path / "demos/a.npz", action=np.zeros((3, 2)))
    store = convert(tmp_path / "demos", tmp_path / "a.zarr", fps=1).path
    keep = read_keep(Store.open(store))
    shutil.rmtree(store / "meta/source")
    write_keep(store, {**keep, "episodes": [{"__file__": name}]})
    with pytest.raises(DataError, match="is no plain name: it is not written"):
        convert(store, tmp_path / "inner" / "back")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "demos", "inner"] and not list((tmp_path / "inner").iterdir())


def test_actions_of_several_axes_are_flattened(tmp_path):
    x = RNG.normal(size=(6, 2, 7))
    np.savez(tmp_path / "a.npz", action=x, q=np.zeros((6, 3)))
    store = Store.open(convert(tmp_path / "a.npz", tmp_path / "a.zarr", fps=1).path)
    np.testing.assert_array_equal(store.read("action"), x.reshape(6, 14))
    assert store.attrs["obs"] == {"q": "q"}
    with np.load(convert(store.path, tmp_path / "b.npz").path) as back:
        np.testing.assert_array_equal(back["action"], x)


def test_every_format_is_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) and set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(FORMATS)

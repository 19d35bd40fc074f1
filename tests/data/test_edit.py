"""Merging, splitting and trimming move every frame and nothing else; statistics equal numpy's of the whole arrays."""
import h5py
import numpy as np
import pytest
from data_cases import EPISODES, SCHEMA, assert_same, make_episode
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from policy.data import DataError, Store
from policy.data.convert import convert
from policy.data.convert.keep import read_keep
from policy.data.edit import Idle, deal, merge, split, trim
from policy.data.summary import stats, table


def made(path, episodes=EPISODES, schema=SCHEMA, fps=10, units=None, action_semantics="target position, absolute", **attrs):
    store = Store.create(path, schema, fps=fps, units={"pose": "m"} if units is None else units, action_semantics=action_semantics, attrs=attrs)
    store.extend(episodes)
    return store.path


def test_merged_is_one_after_the_other(dataset, tmp_path):
    other = made(tmp_path / "b.zarr", EPISODES[2:], units={"action": "m"}, task="lift", operator="b")
    store = merge([dataset, other], tmp_path / "c.zarr")
    assert_same(store, [*EPISODES, *EPISODES[2:]])
    assert (store.fps, store.units, store.action_semantics) == (10, {"pose": "m", "action": "m"}, "target position, absolute")
    assert [p["episodes"] for p in store.attrs["provenance"]] == [4, 2] and store.attrs["provenance"][1]["attrs"] == {"task": "lift", "operator": "b"}
    assert "task" not in store.attrs


@pytest.mark.parametrize("other, message", [
    (dict(fps=20), r"has 10 Hz and .*b\.zarr 20 Hz"),
    (dict(units={"pose": "mm"}), r"'pose' is in m in .* and in mm in"),
    (dict(action_semantics="delta"), r"action_semantics is target position, absolute in"),
    (dict(schema={**SCHEMA, "pose": ((4,), "float32")}), r"'pose' is \(3,\) float32 in .* and \(4,\) float32 in"),
    (dict(schema={**SCHEMA, "pose": ((3,), "float64")}), r"'pose' is \(3,\) float32 in .* and \(3,\) float64 in"),
    (dict(schema={k: v for k, v in SCHEMA.items() if k != "reward"}), r"'reward' is only in .*demo\.zarr"),
])
def test_what_does_not_fit_is_told_and_nothing_is_made(dataset, tmp_path, other, message):
    schema = other.get("schema", SCHEMA)
    b = made(tmp_path / "b.zarr", [make_episode(0, 5, schema)], **other)
    with pytest.raises(DataError, match=message):
        merge([dataset, b], tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_split_deals_out_whole_episodes_once(dataset, tmp_path):
    a, b = split(dataset, [tmp_path / "a.zarr", tmp_path / "b.zarr"], ratio=0.75, seed=1)
    kept = [s.attrs["provenance"][-1]["kept"] for s in (a, b)]
    assert sorted(i for k in kept for i in k) == [0, 1, 2, 3] and [len(k) for k in kept] == [3, 1]
    for store, numbers in zip((a, b), kept, strict=True):
        assert_same(store, [EPISODES[i] for i in numbers])
        assert store.fps == 10 and store.units == {"pose": "m"}
    c, d = split(dataset, [tmp_path / "c.zarr", tmp_path / "d.zarr"], episodes=[[3, 0], [1]])
    assert_same(c, [EPISODES[3], EPISODES[0]])
    assert_same(d, [EPISODES[1]])


@example(n=3, shares=[0.9, 0.05, 0.05], seed=0)
@given(n=st.integers(2, 300), shares=st.lists(st.floats(0.01, 1), min_size=2, max_size=5), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_shares_are_kept_to_one_episode(n, shares, seed):
    shares = [s / sum(shares) for s in shares]
    if n < len(shares):
        return
    parts = deal(n, shares, len(shares), seed)
    assert sorted(i for p in parts for i in p) == list(range(n)) and all(parts)
    small = sum(s * n < 1 for s in shares)
    assert all(abs(len(p) - s * n) <= 1 + small for p, s in zip(parts, shares, strict=True))
    assert parts == deal(n, shares, len(shares), seed)


@pytest.mark.parametrize("how, message", [
    (dict(ratio=1.5), "ratio is a share"), (dict(ratio=[0.5, 0.4]), "one in all"), (dict(), "either a ratio or the episodes"),
    (dict(episodes=[[0], [0, 1]]), r"none that another has: \[0\]"), (dict(episodes=[[0], []]), r"at least one episode.*b\.zarr"),
    (dict(episodes=[[0]]), "2 datasets are to be made"), (dict(episodes=[[0], [4]]), "has 4 episodes")])
def test_splits_that_cannot_be(dataset, tmp_path, how, message):
    with pytest.raises((ValueError, IndexError), match=message):
        split(dataset, [tmp_path / "a.zarr", tmp_path / "b.zarr"], **how)
    assert not (tmp_path / "a.zarr").exists()


def test_trim_leaves_out_episodes_steps_and_keys(dataset, tmp_path):
    store, said = trim(dataset, tmp_path / "b.zarr", drop=[0], steps=[2, -1], drop_keys=["image"])
    want = [{k: x[2:-1] for k, x in EPISODES[i].items() if k != "image"} for i in (2, 3)]
    assert_same(store, want)
    assert said == ["episode 1 has 0 of 1 steps left and is left out", "14 of 50 steps and 2 of 4 episodes cut"]
    assert store.attrs["provenance"][-1]["kept"] == [[2, 2, 29], [3, 2, 11]]
    only, _ = trim(dataset, tmp_path / "c.zarr", keep=[3, 1])
    assert_same(only, [EPISODES[3], EPISODES[1]])


def test_nothing_is_overwritten(dataset, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    for make in (lambda: merge([dataset, dataset], dataset), lambda: trim(dataset, dataset, drop=[0]),
                 lambda: split(dataset, [tmp_path / "new.zarr", dataset], ratio=0.5)):
        with pytest.raises(DataError, match="exists and is not overwritten"):
            make()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(KeyError, match="drop_keys: 'poses' is not in"):
        trim(dataset, tmp_path / "b.zarr", drop_keys=["poses"])
    with pytest.raises(DataError, match=r"nothing of .* would be left"):
        trim(dataset, tmp_path / "b.zarr", steps=[40, None])
    with pytest.raises(ValueError, match="names an episode twice"):
        trim(dataset, tmp_path / "b.zarr", keep=[1, 1])


def moving(at: list[int], n: int = 20) -> np.ndarray:
    """An absolute action (n, 2) that jumps after each of the steps `at`."""
    x = np.zeros((n, 2), np.float32)
    for i in at:
        x[i + 1:, 0] += 1
    return x


@pytest.mark.parametrize("where, margin, span", [("both", 0, (4, 11)), ("both", 2, (2, 13)), ("head", 0, (4, 20)), ("tail", 0, (0, 11)), ("both", 99, (0, 20))])
def test_idle_heads_and_tails_of_targets(tmp_path, where, margin, span):
    x = moving([4, 9])
    path = made(tmp_path / "a.zarr", [{"action": x}], {"action": ((2,), "float32")}, units={})
    store, said = trim(path, tmp_path / "b.zarr", idle=Idle(where, margin=margin))
    np.testing.assert_array_equal(store.read("action"), x[slice(*span)])
    assert said[-1].startswith(f"{20 - span[1] + span[0]} of 20 steps")


@pytest.mark.parametrize("gripper, span", [([], (5, 9)), ([1], (3, 13))])
def test_idle_heads_and_tails_of_changes(tmp_path, gripper, span):
    """Pushing in steps 5 to 8; a gripper that is told something new at steps 4 and 12, one step after the change is seen."""
    x = np.zeros((20, 2), np.float32)
    x[5:9, 0] = 0.3
    x[4:12, 1] = 1 if gripper else 0
    action = {"kind": "delta", "parts": {"gripper": gripper, "joints": [i for i in (0, 1) if i not in gripper]}}
    path = made(tmp_path / "a.zarr", [{"action": x}, {"action": x * 0}], {"action": ((2,), "float32")}, units={}, action=action)
    store, said = trim(path, tmp_path / "b.zarr", idle=Idle())
    np.testing.assert_array_equal(store.read("action"), x[slice(*span)])
    assert "episode 1 has 0 of 20 steps left" in said[0]


def test_the_way_back_follows_episodes_through_split_trim_and_merge(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as f:
        for i in range(4):
            demo = f.create_group(f"data/demo_{i}")
            demo["actions"] = np.full((6 + i, 2), float(i))
            demo["states"] = np.arange((6 + i) * 3.0).reshape(-1, 3)
            demo.attrs["num_samples"], demo.attrs["model_file"] = 6 + i, f"<{i}>"
    a = convert(tmp_path / "a.hdf5", tmp_path / "a.zarr", fps=20).path
    left, right = split(a, [tmp_path / "l.zarr", tmp_path / "r.zarr"], episodes=[[3, 1], [0, 2]])
    again = merge([right.path, left.path], tmp_path / "again.zarr")
    short, _ = trim(again.path, tmp_path / "short.zarr", steps=[0, 6])
    assert [e and e["name"] for e in read_keep(short)["episodes"]] == ["demo_0", None, None, None]  # only the first had six steps
    with h5py.File(convert(again.path, tmp_path / "b.hdf5").path) as b, h5py.File(tmp_path / "a.hdf5") as f:
        assert list(b["data"]) == list(f["data"])
        for name in f["data"]:
            assert dict(b["data"][name].attrs) == dict(f["data"][name].attrs)
            np.testing.assert_array_equal(b["data"][name]["states"], f["data"][name]["states"])
    with h5py.File(convert(short.path, tmp_path / "c.hdf5").path) as c:
        assert len(c["data"]) == 4 and all(d.attrs["num_samples"] == 6 for d in c["data"].values())


def test_long_episodes_are_copied_in_pieces(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("policy.data.building.BATCH_BYTES", 700)  # about eight frames
    assert_same(merge([dataset, dataset], tmp_path / "b.zarr"), [*EPISODES, *EPISODES])


# ---------------------------------------------------------------- statistics
@pytest.mark.parametrize("block", [2**26, 300])
def test_statistics_equal_numpys(dataset, monkeypatch, block):
    monkeypatch.setattr("policy.data.summary.BLOCK_BYTES", block)
    store = Store.open(dataset)
    found = stats(store, quantiles=[0, 0.25, 0.5, 1])
    for key, s in found.items():
        x = store.read(key).astype(np.float64)
        x = x.reshape(-1, 3) if key == "image" else x.reshape(50, -1)
        for name, want in (("min", x.min(0)), ("max", x.max(0)), ("mean", x.mean(0)), ("std", x.std(0))):
            np.testing.assert_allclose(s[name], want, rtol=1e-12, atol=1e-12, err_msg=f"{key} {name}")
        for q, values in s["quantiles"].items():
            np.testing.assert_array_equal(values, np.quantile(x, float(q), axis=0, method="inverted_cdf"), err_msg=f"{key} {q}")
    assert found["pose"]["unit"] == "m" and found["image"]["channels"] == [3] and found["reward"]["channels"] == []
    text = table(found)
    assert "pose[2]" in text and "image[0]" in text and f"{found['reward']['mean'][0]:.4g}" in text


def test_large_keys_are_sampled_and_what_is_not_finite_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("policy.data.summary.SAMPLE_BYTES", 800)
    monkeypatch.setattr("policy.data.summary.BLOCK_BYTES", 8 * 37)
    x = np.arange(1000, dtype=np.float32)[:, None]
    x[[5, 7], 0] = np.nan, np.inf
    s = stats(Store.open(made(tmp_path / "a.zarr", [{"action": x}], {"action": ((1,), "float32")}, units={})))["action"]
    assert s["of"] == 100 and s["not finite"] == 2 and s["max"] == [999] and abs(s["quantiles"]["0.5"][0] - 500) <= 10
    assert s["mean"] == [pytest.approx((999 * 500 - 12) / 998)]


@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_merged_again_holds_the_same_episodes(tmp_path_factory, parts, seed):
    folder = tmp_path_factory.mktemp("deal")
    schema = {"action": ((1,), "float32")}
    episodes = [make_episode(i, n, schema) for i, n in enumerate([*parts, 3])]
    path = made(folder / "a.zarr", episodes, schema, units={})
    pieces = split(path, [folder / "b.zarr", folder / "c.zarr"], ratio=0.5, seed=seed)
    order = [i for p in pieces for i in p.attrs["provenance"][-1]["kept"]]
    assert_same(merge([p.path for p in pieces], folder / "d.zarr"), [episodes[i] for i in order])

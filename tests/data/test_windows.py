"""Windows equal a slow reference that walks frame by frame; splits keep episodes whole and apart."""
import time

import numpy as np
import pytest
import torch
from data_cases import make_episode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from policy.data import DataError, Field, Store, TrajectoryDataset
from policy.data.windows import split_episodes

SCHEMA = {"state": ((5,), "float64"), "point": ((4, 2), "float32"), "image": ((3, 2, 3), "uint8"), "reward": ((), "float32"),
          "action": ((2,), "float32")}
OBS = {"image": "image", "agent": {"key": "state", "take": [2, 0]}, "point": Field("point", take=[1]), "reward": "reward"}


class Memory:
    """A Store in memory, so that hypothesis can try hundreds of episode layouts."""
    path = "memory"

    def __init__(self, lengths):
        self.made = [make_episode(i, n, SCHEMA) for i, n in enumerate(lengths)]
        self.data = {k: np.concatenate([e[k] for e in self.made]) for k in SCHEMA}
        self.ends = np.cumsum(lengths)
        self.schema = {k: (s, np.dtype(d)) for k, (s, d) in SCHEMA.items()}
        self.episodes, self.keys, self.episode_ends = len(lengths), list(SCHEMA), self.ends

    def span(self, i):
        return int(self.ends[i] - len(self.made[i]["action"])), int(self.ends[i])

    def read(self, key, lo, hi):
        return self.data[key][lo:hi]


def reference(store, episodes, t_obs, horizon):
    """Each window written out with Python lists: what the definition says, one frame at a time."""
    views = {"image": lambda f: f["image"], "agent": lambda f: np.float32([f["state"][2], f["state"][0]]),
             "point": lambda f: f["point"][:, 1:2], "reward": lambda f: np.float32([f["reward"]])}
    for e in episodes:
        frames = [{k: v[i] for k, v in store.made[e].items()} for i in range(len(store.made[e]["action"]))]
        for i in range(len(frames)):
            history = [frames[max(0, i - t_obs + 1 + j)] for j in range(t_obs)]
            ahead = [frames[min(len(frames) - 1, i + j)]["action"] for j in range(horizon)]
            yield ({name: np.stack([view(f) for f in history]) for name, view in views.items()}, np.stack(ahead),
                   np.array([i + j < len(frames) for j in range(horizon)]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 9), st.sampled_from(["train", "val", "all"]),
       st.integers(0, 5))
def test_windows_equal_the_reference(lengths, t_obs, horizon, split, seed):
    if split == "val" and len(lengths) == 1:
        return
    store = Memory(lengths)
    data = TrajectoryDataset(store, OBS, "action", t_obs=t_obs, horizon=horizon, split=split, seed=seed, val_ratio=0.4)
    want = list(reference(store, data.episodes, t_obs, horizon))
    assert len(data) == len(want) == sum(lengths[e] for e in data.episodes)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    batch = data.batch(order)
    for row, i in enumerate(order.tolist()):
        obs, action, valid = want[i]
        for name in obs:
            assert batch.obs[name].dtype == (torch.uint8 if name == "image" else torch.float32)
            np.testing.assert_array_equal(batch.obs[name][row], obs[name])
        np.testing.assert_array_equal(batch.action[row], action)
        np.testing.assert_array_equal(batch.valid[row], valid)


def test_one_row_and_a_loader_give_the_same_as_a_batch():
    data = TrajectoryDataset(Memory([5, 9]), OBS, "action", split="all")
    whole = data.batch(torch.arange(14))
    one = data[3]
    assert torch.equal(one.action, whole.action[3]) and torch.equal(one.obs["image"], whole.obs["image"][3]) and one.valid.shape == (16,)
    assert torch.equal(data[-1].action, whole.action[13])
    with pytest.raises(IndexError, match="window 14 of 14"):
        data[14]
    for workers in (0, 1):
        got = list(DataLoader(data, batch_size=5, collate_fn=TrajectoryDataset.collate, num_workers=workers))
        assert torch.equal(torch.cat([b.action for b in got]), whole.action)
        assert torch.equal(torch.cat([b.obs["point"] for b in got]), whole.obs["point"])


def test_arrays_and_shapes():
    store = Memory([5, 9, 4])
    data = TrajectoryDataset(store, OBS, "action", val_ratio=0.3)
    assert data.shapes == {"image": (3, 2, 3), "agent": (2,), "point": (4, 1), "reward": (1,), "action": (2,)}
    np.testing.assert_array_equal(data.arrays["action"], np.concatenate([store.made[e]["action"] for e in data.episodes]))
    assert all(x.is_contiguous() for x in data.arrays.values())


@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 99), st.none() | st.integers(1, 70))
def test_splits(n, val_ratio, seed, most):
    def ids(split):
        return split_episodes(n, split, val_ratio=val_ratio, seed=seed, max_episodes=most)

    held_out = n >= 2 and val_ratio > 0
    train, val = ids("train"), ids("val") if held_out else []
    assert train and not set(train) & set(val) and bool(val) == held_out
    assert sorted(train + val) == ids("all") and len(set(train + val)) == len(train + val)
    assert len(train) <= (most or n) and (most or len(train) + len(val) == n)
    assert val == (split_episodes(n, "val", val_ratio=val_ratio, seed=seed, max_episodes=None) if held_out else [])
    assert ids("train") == train


def test_splits_that_cannot_be():
    for how, message in [(dict(split="test"), "use one of train, val, all"), (dict(split="val", val_ratio=0), "split 'val' is empty"),
                         (dict(val_ratio=1), r"\[0, 1\)"), (dict(max_episodes=0), "at least 1 or None")]:
        with pytest.raises(ValueError, match=message):
            TrajectoryDataset(Memory([5, 9]), OBS, "action", **how)


def test_bad_fields_say_so():
    store = Memory([5, 9])
    with pytest.raises(KeyError, match=r"'speed' is not in memory \(known: state, point, image, reward, action\)"):
        TrajectoryDataset(store, {"v": "speed"}, "action")
    with pytest.raises(IndexError, match=r"'state' in memory has channels 0 to 4 on its last axis, take=\[5\]"):
        TrajectoryDataset(store, {"v": Field("state", take=[5])}, "action")
    with pytest.raises(DataError, match=r"action 'point' has shape \(4, 2\) per frame, expected \(d,\)"):
        TrajectoryDataset(store, {}, "point")
    with pytest.raises(ValueError, match="cannot be named 'action'"):
        TrajectoryDataset(store, {"action": "action"}, "action")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        TrajectoryDataset(store, {}, "action", t_obs=0)
    with pytest.raises(DataError, match="not an image in 0 … 255"):
        TrajectoryDataset(store, {"v": Field("state", dtype="uint8")}, "action")


def test_nan_is_refused_with_its_place(tmp_path):
    store = Store.create(tmp_path / "d.zarr", SCHEMA, fps=10)
    store.extend(make_episode(i, 6, SCHEMA) for i in range(3))
    bad = make_episode(3, 6, SCHEMA)
    bad["action"][4, 1] = np.nan
    store.append(bad)
    with pytest.raises(DataError, match="'action' is not finite at step 4 of episode 3"):
        TrajectoryDataset(store, {"state": "state"}, "action", split="all")


def test_float_images_pack_into_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("policy.data.windows.BLOCK_BYTES", 500)  # several reads
    store = Store.create(tmp_path / "d.zarr", {"img": ((4, 4, 3), "float32"), "action": ((1,), "float32")}, fps=10)
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3))
    store.append({"img": images.astype("float32"), "action": np.zeros((20, 1), "float32")})
    data = TrajectoryDataset(store, {"img": Field("img", dtype="uint8")}, "action")
    assert data.arrays["img"].dtype == torch.uint8
    np.testing.assert_array_equal(data.arrays["img"], images)


@pytest.mark.data
def test_pusht_windows(pusht):
    store = Store.open(pusht)
    data = TrajectoryDataset(store, {"keypoint": "keypoint", "agent_pos": {"key": "state", "take": [0, 1]}}, "action", max_episodes=90)
    assert len(data.episodes) == 90 and data.shapes == {"keypoint": (9, 2), "agent_pos": (2,), "action": (2,)}
    lo, _ = store.span(data.episodes[0])
    first = data[0]
    np.testing.assert_array_equal(first.action, store.read("action", lo, lo + 16))
    np.testing.assert_array_equal(first.obs["agent_pos"], store.read("state", lo, lo + 1)[[0, 0], :2])
    assert len(TrajectoryDataset(store, {}, "action", split="val").episodes) == 4


def test_faster_than_a_loader_by_twenty():
    data = TrajectoryDataset(Memory([120] * 40), {"point": "point", "state": "state"}, "action", split="all")

    class OneByOne(Dataset):
        def __len__(self):
            return 512

        def __getitem__(self, i):
            one = data[i]
            return {**one.obs, "action": one.action, "valid": one.valid}

    def rate(batches, n):
        start = time.process_time()
        for _ in batches():
            pass
        return n / (time.process_time() - start)

    slow = rate(lambda: DataLoader(OneByOne(), batch_size=256), 512)
    index = torch.randint(len(data), (400, 256), generator=torch.Generator().manual_seed(0))
    fast = max(rate(lambda: map(data.batch, index), index.numel()) for _ in range(3))
    assert fast > 20 * slow and fast > 300_000, f"{fast:.0f} against {slow:.0f} windows/s"

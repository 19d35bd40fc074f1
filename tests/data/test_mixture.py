"""Several datasets as one: shares are exact and random in order, every window has its turn, and what cannot be mixed says why."""
import numpy as np
import pytest
import torch
from data_cases import make_episode

from policy.data import Normalizer, Store, TrajectoryDataset
from policy.data.mixture import Mixture, shares
from policy.data.sources import entries, free_memory, memory_of, windows
from policy.data.stream import Streamed
from policy.train.log import Log
from policy.train.loop import Settings, Trainer
from tests.helpers import CONFIG, make_data, make_planner, make_store

SCHEMA = {"state": ((3,), "float32"), "image": ((6, 5, 3), "uint8"), "action": ((2,), "float32")}
OBS = {"state": "state", "image": "image"}


def make(path, lengths, tag, schema=SCHEMA, **attrs):
    """action[:, 0] tells the dataset, action[:, 1] the frame."""
    store, at = Store.create(path, schema, **{"fps": 10, **attrs}), 0
    made = []
    for i, n in enumerate(lengths):
        e = make_episode(i + 100 * tag, n, schema)
        e["action"] = np.stack([np.full(n, tag), np.arange(at, at + n)], 1).astype("float32")
        at += n
        made.append(e)
    store.extend(made)
    return Store.open(path)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 4)
    return [make(tmp_path / f"{name}.zarr", lengths, tag) for tag, (name, lengths) in enumerate({"a": [20, 30, 7], "b": [40], "c": [11, 12]}.items())]


def mixed(stores, weights=None, streamed=(), **how):
    made = {name: Streamed(s, OBS, "action", split="all", memory=7000, stream=["image"], **how) if name in streamed
            else TrajectoryDataset(s, OBS, "action", split="all", **how) for name, s in zip("abc", stores, strict=True)}
    return Mixture(made, weights, named=True)


def drawn(batch):
    return batch.action[:, 0, 0].long().tolist()


@pytest.mark.parametrize("streamed", [(), ("a",), ("a", "b", "c")])
def test_windows_are_those_of_the_parts(stores, streamed):
    data, plain = mixed(stores, streamed=streamed), [TrajectoryDataset(s, OBS, "action", split="all") for s in stores]
    assert len(data) == 57 + 40 + 23 == len(data.epoch(0)) and data.shapes == plain[0].shapes
    index = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    batch = data.batch(index)
    for row, i in enumerate(index.tolist()):
        part = 0 if i < 57 else 1 if i < 97 else 2
        want = plain[part][i - (0, 57, 97)[part]]
        assert torch.equal(batch.obs["image"][row], want.obs["image"]) and torch.equal(batch.action[row], want.action) and batch.source[row] == part
        assert torch.equal(batch.obs["state"][row], want.obs["state"]) and torch.equal(batch.valid[row], want.valid)
    assert [len(x) for x in data.whole()] == [5, 15, 0, 25, 0, 0] and data.whole()[3][0] == 57
    epoch = data.epoch(5)
    for lo in range(0, 120, 17):
        batch = epoch.batch(lo, min(120, lo + 17))
        for row in range(len(batch.action)):
            tag, frame = batch.action[row, 0, :].long().tolist()
            want = plain[tag][frame]
            assert batch.source[row] == tag and torch.equal(batch.obs["image"][row], want.obs["image"])
    epoch.close()


@pytest.mark.parametrize("weights", [None, [1, 3, 2], [5, 0.01, 1]])
@pytest.mark.parametrize("streamed", [(), ("a", "b")])
def test_shares_are_exact_and_every_window_has_its_turn(stores, weights, streamed):
    data = mixed(stores, weights, streamed)
    want = [57, 40, 23] if weights is None else shares(np.divide(weights, sum(weights)), 120)
    seen = []
    for seed in (0, 1):
        epoch = data.epoch(seed)
        rows = [epoch.batch(lo, lo + 8) for lo in range(0, 120, 8)]
        tags, frames = (torch.cat([b.action[:, 0, i] for b in rows]).long().numpy() for i in (0, 1))
        assert np.bincount(tags, minlength=3).tolist() == want
        for tag, size in enumerate((57, 40, 23)):
            times = np.bincount(frames[tags == tag], minlength=size)
            assert times.max() - times.min() <= 1  # all of a part's windows before any again
            mine = frames[tags == tag].tolist()
            assert len(mine) < size + 10 or mine[size:size + 10] != mine[:10]  # in another order
        seen.append((tags.tolist(), frames.tolist()))
        epoch.close()
        again = data.epoch(seed)  # any stretch of it, as after a resume
        batch = again.batch(88, 104)
        assert (drawn(batch), batch.action[:, 0, 1].long().tolist()) == (tags[88:104].tolist(), frames[88:104].tolist())
        again.close()
    assert seen[0] != seen[1]


@pytest.mark.parametrize("weights, n, counts", [([1, 1, 1], 100, [34, 33, 33]), ([1, 3], 120, [30, 90]), ([1, 2, 4], 10, [1, 3, 6]), ([1e-9, 1], 7, [0, 7])])
def test_shares_add_up(weights, n, counts):
    assert shares([w / sum(weights) for w in weights], n) == counts


def test_weights_hold_in_every_batch_as_chance_has_it(stores):
    """Counts of part b among batches of 12 from 120 draws are hypergeometric: mean and variance over 300 epochs."""
    data = mixed(stores, [1, 2, 1])
    counts = np.array([[drawn(epoch.batch(lo, lo + 12)).count(1) for lo in range(0, 120, 12)] for epoch in map(data.epoch, range(300))])
    assert counts.sum(1).tolist() == [60] * 300
    mean, variance = 12 / 2, 12 / 4 * (120 - 12) / (120 - 1)
    assert abs(counts.mean() - mean) < 1e-9 and counts.var() == pytest.approx(variance, rel=0.1)
    by_place = counts.mean(0)
    assert np.abs(by_place - mean).max() < 4 * np.sqrt(variance / 300)  # early and late in an epoch alike


def test_a_normaliser_of_the_mixture_is_that_of_all_frames(stores):
    for streamed in ((), ("b",)):
        data = mixed(stores, streamed=streamed)
        got = Normalizer.fit(data.arrays, "gaussian")
        frames = torch.from_numpy(np.concatenate([s.read("state") for s in stores])).double()
        torch.testing.assert_close(got.shift_state.double(), frames.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(got.scale_state.double(), frames.std(0, unbiased=False), rtol=1e-6, atol=0)


def test_training_on_a_mixture_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 4)
    a, b = make_store(tmp_path / "a.zarr"), make_store(tmp_path / "b.zarr", episodes=3)

    def trainer(folder, weights=(1, 2)):
        parts = {"a": make_data(a), "b": Streamed(b, {"x": "x"}, "action", t_obs=2, horizon=8, val_ratio=0.2, memory=3000, stream=["x"])}
        data = Mixture(parts, weights)
        return Trainer(make_planner(data), data, folder, Settings(steps=30, batch=16, warmup=3, log=50, save=0, precision="fp32"), config=CONFIG)

    def run(t, until=30):
        t.folder.mkdir(exist_ok=True)
        step = t.one_step
        t.one_step = lambda meter: (step(meter), setattr(t, "_stop", t.step >= until))[0]
        with Log(t.folder, wandb="disabled", resume_at=t.step) as log:
            t.run(log)
    whole, half = trainer(tmp_path / "r"), trainer(tmp_path / "s")
    run(whole)
    run(half, until=13)
    rest = trainer(tmp_path / "s")
    rest.resume()
    assert rest.step == 13
    run(rest)
    for (k, x), y in zip(whole.planner.state_dict().items(), rest.planner.state_dict().values(), strict=True):
        assert torch.equal(x, y), k


def test_entries_say_what_is_wrong(tmp_path, stores):
    a, b, c = (str(s.path) for s in stores)
    found = entries([{"path": a, "weight": 1}, {"path": b, "weight": 3, "name": "arm"}])
    assert [(e.name, e.weight, list(e.obs)) for e in found] == [("a", 1, ["image", "state"]), ("arm", 3, ["image", "state"])]
    assert [e.name for e in entries([a, a, b])] == ["a", "a_2", "b"] and [e.weight for e in entries([a, b], weights=[2, 1])] == [2, 1]
    for bad, message in [(dict(path=[a, b], weights=[1]), "one number for each of the 2 datasets"), (dict(path=[]), "names no dataset"),
                         (dict(path=[{"path": a, "weight": 1}, b]), "1 of the datasets in data.path have no weight"),
                         (dict(path=[{"pth": a}]), "each dataset has path.*not pth"), (dict(path=[{"weight": 1}]), "each dataset has path")]:
        with pytest.raises(ValueError, match=message):
            entries(**bad)
    with pytest.raises(ValueError, match="numbers above 0"):
        windows(entries([a, b], weights=[1, 0]), "train", t_obs=2, horizon=8)
    data = windows(entries([a, b, c], {"state": "state"}, weights=[1, 1, 2]), "train", t_obs=2, horizon=8, memory=10**6)
    assert isinstance(data, Mixture) and data.weights == [0.25, 0.25, 0.5] and list(data.shapes) == ["state", "action"]
    other = make(tmp_path / "other.zarr", [9, 9], 7, {**SCHEMA, "state": ((4,), "float32")})
    with pytest.raises(ValueError, match=r"'state' is \(3,\) a step in a and \(4,\) a step in other: name what all"):
        windows(entries([a, other.path], {"state": "state"}), "train", t_obs=2, horizon=8)
    with pytest.raises(KeyError, match="'force' is not in"):
        windows(entries([a, b], {"force": "force"}), "train", t_obs=2, horizon=8)
    less = make(tmp_path / "less.zarr", [9, 9], 7, {k: v for k, v in SCHEMA.items() if k != "image"})
    with pytest.raises(ValueError, match=r"'image' is \(6, 5, 3\) a step in a and missing in less"):
        windows(entries([a, less.path]), "train", t_obs=2, horizon=8)
    slow = make(tmp_path / "slow.zarr", [9, 9], 7, fps=5)
    with pytest.raises(ValueError, match=r"cannot be mixed: fps is 10.0 in a and 5.0 in slow"):
        entries([a, slow.path])
    delta = [make(tmp_path / f"{k}.zarr", [9, 9], 7, attrs={"action": {"kind": k}}) for k in ("delta", "absolute")]
    with pytest.raises(ValueError, match="actions' kind is 'delta' in delta and 'absolute' in absolute"):
        entries([s.path for s in delta])


def test_memory_is_what_was_said_or_a_share_of_what_is_free(stores, monkeypatch):
    found = entries([s.path for s in stores])
    assert memory_of(None, found) is None and memory_of(2e9, found) == 2_000_000_000
    assert memory_of("auto", found) is None and free_memory() > 10**7
    monkeypatch.setattr("policy.data.sources.free_memory", lambda: 20_000)
    assert memory_of("auto", found) == 5_000  # 120 frames of 126 bytes are more than half of it
    for bad in (0, "2 GB"):
        with pytest.raises(ValueError, match=r"data\.memory"):
            memory_of(bad, found)

"""Streamed windows are those of a dataset in memory, bit for bit, from however little memory, whatever the threads do."""
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import foreign, make_episode

from policy.data import DataError, Normalizer, Store, TrajectoryDataset
from policy.data.stream import Streamed
from policy.train.log import Log
from policy.train.loop import Settings, Trainer
from tests.helpers import CONFIG, make_planner, make_store

SCHEMA = {"state": ((5,), "float64"), "image": ((6, 5, 3), "uint8"), "wide": ((4, 4), "float32"), "grey": ((3, 3), "float32"), "action": ((2,), "float32")}
OBS = {"image": "image", "agent": {"key": "state", "take": [2, 0]}, "wide": {"key": "wide", "take": [1, 3]}, "grey": {"key": "grey", "dtype": "uint8"}}
LENGTHS = [9, 1, 40, 17, 3, 64, 25, 8, 33, 50]


def episodes(lengths=LENGTHS):
    for i, n in enumerate(lengths):
        e = make_episode(i, n, SCHEMA)
        e["grey"] = np.random.default_rng(i).integers(0, 256, e["grey"].shape).astype("float32")
        yield e


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 8)
    store = Store.create(tmp_path / "d.zarr", SCHEMA, fps=10)
    store.extend(episodes())
    return Store.open(store.path)


def stream(store, memory, **how):
    return Streamed(store, OBS, "action", memory=memory, stream=("image", "wide", "grey"), **{"val_ratio": 0.2, **how})


def both(store, memory, **how):
    return TrajectoryDataset(store, OBS, "action", **{"val_ratio": 0.2, **how}), stream(store, memory, **how)


def same(a, b):
    assert list(a.obs) == list(b.obs)
    for x, y in [*((a.obs[k], b.obs[k]) for k in a.obs), (a.action, b.action), (a.valid, b.valid)]:
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("how", [{}, {"t_obs": 1}, {"t_obs": 5, "horizon": 3}, {"split": "val"}, {"max_episodes": 4}, {"split": "all"}])
@pytest.mark.parametrize("memory", [30_000, 80_000, 10**8])
def test_the_same_windows(store, how, memory):
    resident, streamed = both(store, memory, **how)
    assert len(resident) == len(streamed) and resident.shapes == streamed.shapes and list(streamed.arrays) == list(resident.arrays)
    index = torch.randint(len(resident), (37,), generator=torch.Generator().manual_seed(1))
    same(resident.batch(index), streamed.batch(index))
    same(resident.batch(index, only=["image"]), streamed.batch(index, only=["image"]))
    one, two = resident[3], streamed[3]
    assert torch.equal(one.obs["image"], two.obs["image"])
    for seed in (0, 1):
        epoch = streamed.epoch(seed)
        assert sorted(epoch.order.tolist()) == list(range(len(resident)))
        for lo in range(0, len(epoch), 23):
            same(resident.batch(epoch.order[lo:lo + 23]), epoch.batch(lo, min(lo + 23, len(epoch))))
        same(resident.batch(epoch.order[3:8]), epoch.batch(3, 8))  # again, behind us
        middle = streamed.epoch(seed)
        same(resident.batch(epoch.order[20:40]), middle.batch(20, 40))  # from the middle, as resume does
        same(resident.batch(epoch.order[43:50]), middle.batch(43, 50))
        same(resident.batch(epoch.order[50:60]), epoch.batch(50, 60))  # while the other one is not done
        same(resident.batch(epoch.order[50:60]), middle.batch(50, 60))
        middle.close()


@pytest.mark.parametrize("how", [dict(zarr_format=2), dict(zarr_format=3)])
def test_stores_of_others(tmp_path, how):
    path = foreign(tmp_path / "theirs.zarr", episodes=list(episodes([50, 33, 75])), chunk=7, **how)
    resident, streamed = both(Store.open(path), 19_000)
    epoch = streamed.epoch(0)
    same(resident.batch(epoch.order), epoch.batch(0, len(epoch)))
    assert streamed.block % 7 == 0 and streamed.live < len(streamed._base)
    epoch.close()


def test_what_is_read(store):
    little, much = stream(store, 30_000), stream(store, 10**8)
    for data in (little, much):
        for seed in range(3):
            epoch = data.epoch(seed)
            for lo in range(0, len(epoch), 16):
                epoch.batch(lo, min(lo + 16, len(epoch)))
        epoch.close()
    blocks = len(much._base)
    assert much._pool.reads == blocks == much.live
    assert 2 * len(little._base) < little._pool.reads <= 3 * (len(little._base) + little.live)
    assert little.slots["image"].nbytes + little.slots["wide"].nbytes + little.slots["grey"].nbytes < 30_000


def test_too_little_memory_says_how_much_is_enough(store):
    with pytest.raises(ValueError, match=r"too few to stream image, wide, grey of .*d.zarr.*Give it (\d+) or more") as told:
        stream(store, 5_000)
    stream(store, int(str(told.value).split()[-3]))


@pytest.mark.parametrize("mode", ["limits", "gaussian", "quantile", "identity"])
def test_normalisers_are_the_same(store, mode):
    resident, streamed = both(store, 30_000)
    one, two = Normalizer.fit(resident.arrays, mode), Normalizer.fit(streamed.arrays, mode)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[key], rtol=1e-6, atol=0)


def test_damage_and_nan_are_told_by_training(tmp_path, store):
    lost = store.path / "data/image/c/0/0/0/0"
    data = stream(Store.open(store.path), 30_000)
    content = lost.read_bytes()
    lost.write_bytes(content[: len(content) // 2])
    epoch = data.epoch(0)
    with pytest.raises(DataError, match="data/image cannot be decoded"):
        for lo in range(0, len(epoch), 16):
            epoch.batch(lo, lo + 16)
    epoch.close()
    bad = Store.create(tmp_path / "bad.zarr", SCHEMA, fps=10)
    made = list(episodes())
    made[5]["wide"][13, 2, 3] = np.nan
    bad.extend(made)
    epoch = stream(Store.open(bad.path), 30_000, split="all").epoch(0)
    with pytest.raises(DataError, match="'wide' is not finite at step 13 of episode 5"):
        for lo in range(0, len(epoch), 16):
            epoch.batch(lo, lo + 16)
    epoch.close()


def trainer(folder: Path, store: Store, memory: int, **settings) -> Trainer:
    data = Streamed(store, {"x": "x"}, "action", t_obs=2, horizon=8, val_ratio=0.2, memory=memory, stream=["x"])
    return Trainer(make_planner(data), data, folder, Settings(**{"steps": 40, "batch": 16, "warmup": 3, "log": 50, "save": 0, "precision": "fp32", **settings}),
                   config=CONFIG)


def test_resume_is_exact(tmp_path, monkeypatch, capsys):
    """40 steps over five epochs, interrupted at 17 = every weight, bit for bit."""
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 4)
    store = make_store(tmp_path / "d.zarr", episodes=8)

    def run(t):
        t.folder.mkdir(exist_ok=True)
        with Log(t.folder, wandb="disabled", resume_at=t.step) as log:
            t.run(log)
    whole = trainer(tmp_path / "a", store, 4000)
    assert 3 < whole.data.live < len(whole.data._base)
    run(whole)
    assert not [t for t in threading.enumerate() if t.name == "dipole reader"]  # nobody reads any more
    at = 39 % (len(whole.data) // 16) * 16
    same(whole.batch(39), whole.data.batch(whole._epoch[1].order[at:at + 16]))  # but a batch may still be looked at
    whole._epoch[1].close()
    half = trainer(tmp_path / "b", store, 4000)
    step = half.one_step
    monkeypatch.setattr(half, "one_step", lambda meter: (step(meter), setattr(half, "_stop", half.step >= 17))[0])
    run(half)
    assert half.step == 17
    rest = trainer(tmp_path / "b", store, 4000)
    rest.resume()
    assert "not bit for bit" not in capsys.readouterr().out
    run(rest)
    for (k, a), b in zip(whole.planner.state_dict().items(), rest.planner.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    trainer(tmp_path / "b", store, 10**6).resume()
    assert "order of the data" in " ".join(capsys.readouterr().out.split())


BOUND = textwrap.dedent("""
    import sys, numpy as np, torch
    from policy.data.store import Store
    from policy.data.stream import Streamed
    from policy.data.windows import TrajectoryDataset
    def kb(what): return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what))
    memory, path = int(sys.argv[1]), sys.argv[2]
    Store.open(path).read("image", 0, 8)
    before = kb("VmRSS")
    data = (Streamed if memory else TrajectoryDataset)(Store.open(path), {"image": "image"}, "action", **({"memory": memory} if memory else {}))
    epoch = data.epoch(0)
    total = sum(int(epoch.batch(lo, lo + 50).obs["image"].numpy()[:, -1].sum(dtype=np.int64)) for lo in range(0, len(epoch), 50))
    epoch.close()
    print(kb("VmHWM") - before, total, len(epoch))
""")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_within_its_bound(tmp_path):
    """300 MB of images are drawn once from 40 MB: the process grows by no more than that and 25 MB of code, threads and batches."""
    store = Store.create(tmp_path / "d.zarr", {"image": ((96, 96, 3), "uint8"), "action": ((2,), "float32")}, fps=10)
    ramp = (np.arange(96 * 96 * 3) // 64).reshape(96, 96, 3).astype("uint8")
    for i in range(11):
        store.append({"image": ramp[None] + (7 * i + np.arange(1000, dtype="uint8"))[:, None, None, None], "action": np.zeros((1000, 2), "float32")})

    def grown(memory):
        done = subprocess.run([sys.executable, "-c", BOUND, str(memory), str(store.path)], capture_output=True, text=True, cwd=Path(__file__).parents[2],
                              env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        return [int(x) for x in done.stdout.split()]
    streamed, resident = grown(40_000_000), grown(0)
    assert streamed[1:] == resident[1:]
    assert streamed[0] < 65_000 and resident[0] > 250_000, (streamed, resident)

"""dipole bench data: both sides of a ratio give the same windows, and what is reported is what was measured."""
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.progress import Progress

from policy.data.store import Store
from policy.data.windows import TrajectoryDataset
from scripts import bench_codecs, bench_data, bench_images


def test_single_samples_are_the_samplers_windows(tmp_path):
    store = bench_images.synthetic(tmp_path / "d.zarr", episodes=6, steps=9)
    data = TrajectoryDataset(store, {"state": "state"}, "action", t_obs=3, horizon=5, val_ratio=0.3)
    single = bench_data.PerSample(data)
    assert len(single) == len(data)
    batch = torch.utils.data.default_collate([single[i] for i in range(len(data))])
    want = data.batch(torch.arange(len(data)))
    assert torch.equal(batch["state"], want.obs["state"]) and torch.equal(batch["action"], want.action) and torch.equal(batch["valid"], want.valid)
    rates = bench_data.lowdim(None, 64, 1.0, tmp_path)
    assert rates["ratio"] > 5 and rates["ratio"] == rates["samples_per_s"]["sampler"] / max(list(rates["samples_per_s"].values())[1:])


def test_rates_are_samples_by_time():
    def loop(seconds, n):
        while True:
            time.sleep(seconds)
            yield n
    rates = bench_data.side_by_side({"a": loop(0.01, 5), "b": loop(0.02, 1)}, seconds=0.5)
    assert 200 < rates["a"] <= 500 and 20 < rates["b"] <= 50


def test_images_move_and_compress_a_little(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_images, "STEPS", 40)
    with Progress(disable=True) as progress:
        size = 5 * 40 * 96 * 96 * 3
        found = bench_images.generate(tmp_path / "i.zarr", size, progress)
        assert (found["bytes"], found["episodes"]) == (size, 5) and 1.5 < found["ratio"] < 4
        assert bench_images.generate(tmp_path / "i.zarr", size, progress)["episodes"] == 5  # used again
    store = Store.open(tmp_path / "i.zarr")
    x, at = store.read("image"), store.read("state")[:, :2]
    assert len(np.unique(x.reshape(len(x), -1), axis=0)) == len(x)
    moved = (at[5:6] - at[4:5]).round().astype(int)[0]
    if (np.abs(moved) < 90).all():  # the next image is the last one moved, but for the noise
        y, d = moved
        a, b = (x[4, max(0, y):96 + min(0, y), max(0, d):96 + min(0, d)], x[5, max(0, -y):96 + min(0, -y), max(0, -d):96 + min(0, -d)])
        assert np.abs(a.astype(int) - b).mean() < 12


def test_what_codecs_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_codecs, "FRAMES", 64)
    monkeypatch.setattr(bench_codecs, "CODECS", {k: bench_codecs.CODECS[k] for k in ("zstd 1", "blosc lz4 5")})
    rows = bench_codecs.codecs(None, tmp_path)["synthetic"]
    assert set(rows) == {"zstd 1", "blosc lz4 5", "mp4, crf 18", "mp4, crf 23"} and np.isinf(rows["zstd 1"]["psnr"])
    assert 28 < rows["mp4, crf 23"]["psnr"] <= rows["mp4, crf 18"]["psnr"] < 60 and rows["mp4, crf 23"]["ratio"] > rows["zstd 1"]["ratio"]
    bench_codecs.show_codecs({"synthetic": rows})


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_largest_resident_size_is_the_processs():
    code = "x = bytearray(60_000_000); x[::4096] = b'1' * len(x[::4096]); del x; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 60e6 < bench_data.high_water(child.pid) < 120e6  # although it is gone by now
        child.communicate(b"\n")
    assert bench_data.high_water(2**22 + 1) == 0


@pytest.mark.slow
def test_bench_data_measures_a_real_training(shell):
    done = shell("bench", "data", "data.images=3e7", "data.memory=1.2e7", "data.resident=1.5e7", "data.seconds=1", "data.steps=60", "data.rounds=1",
                 "data.batch=16", "data.do=[lowdim,access,train]", "run=elsewhere")
    assert done.code == 0, done.err
    rows = json.loads((shell.folder / "elsewhere/bench/data.json").read_text())["rows"]
    assert rows["access"]["live"] < rows["access"]["blocks"] and rows["access"]["samples_per_s"]["streamed"] > 0
    assert 2e8 < rows["train"]["streamed"]["peak_rss"] < 2e9 and rows["train"]["ratio"] > 0.3
    assert "of the rate in memory within" in " ".join(done.out.split()) and not (shell.folder / "elsewhere/bench/data").exists()

"""How fast windows come: from memory, one by one as a plain DataLoader has them, and from more images than fit into memory, alone and in `dipole train`."""
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from omegaconf import DictConfig
from rich.table import Table as TextTable
from torch.utils.data import DataLoader, Dataset

from policy.data.shuffle import expected_distinct
from policy.data.store import Store
from policy.data.stream import Streamed
from policy.data.windows import TrajectoryDataset
from policy.train.log import bar, console
from scripts.bench_codecs import codecs, show_codecs
from scripts.bench_images import generate, synthetic

T_OBS, HORIZON = 2, 16
LOG, START = 10, 2  # steps of a row of the training's log; rows of the beginning that are not counted


class PerSample(Dataset):
    """One window at a time, in numpy, with default collate: what a plain DataLoader is given."""

    def __init__(self, data: TrajectoryDataset):
        self.arrays = {k: v.numpy() for k, v in data.arrays.items()}
        ends = np.cumsum([hi - lo for lo, hi in data.spans])
        lengths = np.diff(ends, prepend=0)
        self.first, self.last = np.repeat(ends - lengths, lengths), np.repeat(ends - 1, lengths)
        self.past, self.ahead = np.arange(1 - data.t_obs, 1), np.arange(data.horizon)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        past, ahead = np.maximum(i + self.past, self.first[i]), i + self.ahead
        return {**{k: x[past] for k, x in self.arrays.items() if k != "action"}, "action": self.arrays["action"][np.minimum(ahead, self.last[i])],
                "valid": ahead <= self.last[i]}


def forever(make: Callable[[int], Iterator[int]]) -> Iterator[int]:
    """Samples of every batch of one epoch after the other."""
    epoch = 0
    while True:
        yield from make(epoch)
        epoch += 1


def side_by_side(loops: dict[str, Iterator[int]], seconds: float, blocks: int = 5) -> dict[str, float]:
    """samples/s of each: the median of blocks of seconds / blocks that alternate."""
    rates: dict[str, list[float]] = {k: [] for k in loops}
    for loop in loops.values():
        next(loop)  # workers start, caches fill
    for _ in range(blocks):
        for name, loop in loops.items():
            start, n = time.perf_counter(), 0
            while (took := time.perf_counter() - start) < seconds / blocks:
                n += next(loop)
            rates[name].append(n / took)
    return {k: statistics.median(v) for k, v in rates.items()}


def batches(data: TrajectoryDataset, batch: int) -> Iterator[int]:
    def one(seed: int) -> Iterator[int]:
        epoch = data.epoch(seed)
        for lo in range(0, len(data) - batch + 1, batch):
            yield len(epoch.batch(lo, lo + batch).action)
        epoch.close()
    return forever(one)


def lowdim(path: str | None, batch: int, seconds: float, folder: Path) -> dict[str, Any]:
    """The window sampler beside a DataLoader over single samples, without and with two workers."""
    if path:
        store = Store.open(path)
        obs: dict[str, Any] = {"keypoint": "keypoint", "agent_pos": {"key": "state", "take": [0, 1]}}
    else:
        store, obs = synthetic(folder / "lowdim.zarr"), {"state": "state"}
    data = TrajectoryDataset(store, obs, "action", t_obs=T_OBS, horizon=HORIZON)
    single = PerSample(data)

    def loader(workers: int) -> Iterator[int]:
        made = DataLoader(single, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
        return forever(lambda _: (len(b["action"]) for b in made))
    rates = side_by_side({"sampler": batches(data, batch), "DataLoader": loader(0), "DataLoader, 2 workers": loader(2)}, seconds)
    best = max(rates["DataLoader"], rates["DataLoader, 2 workers"])
    return {"dataset": store.path.name, "batch": batch, "windows": len(data), "samples_per_s": rates, "ratio": rates["sampler"] / best}


def access(path: Path, about: DictConfig, seconds: float) -> dict[str, Any]:
    """Windows of images: from memory; streamed from a bounded pool; read where they lie, in a random order, by us and by zarr."""
    store, how = Store.open(path), dict(t_obs=T_OBS, horizon=HORIZON)
    obs, many = {"image": "image", "state": "state"}, resident_episodes(store, about.resident)
    here = TrajectoryDataset(store, obs, "action", max_episodes=many, **how)  # type: ignore[arg-type]
    there = Streamed(store, obs, "action", memory=int(about.memory), **how)  # type: ignore[arg-type]
    array = zarr.open_array(f"{path}/data/image", mode="r")
    generator = torch.Generator().manual_seed(0)
    small = min(about.batch, 16)

    def scattered(_: int) -> Iterator[int]:
        for _ in range(64):
            yield len(there.batch(torch.randint(len(there), (small,), generator=generator)).action)

    def by_zarr(_: int) -> Iterator[int]:
        for i in torch.randint(store.steps - T_OBS, (64,), generator=generator).tolist():
            yield len(np.asarray(array[i:i + T_OBS])) // T_OBS
    rates = side_by_side({"in memory": batches(here, about.batch), "streamed": batches(there, about.batch), "random access": forever(scattered),
                          "random access through zarr": forever(by_zarr)}, seconds)
    assert there._pool is not None
    there._pool.close()
    return {"samples_per_s": rates, "ratio": rates["streamed"] / rates["in memory"], "resident_windows": len(here), "windows": len(there),
            "live": there.live, "blocks": there.blocks, "block": there.block, "batch": about.batch,
            "distinct_blocks_a_batch": expected_distinct(there.live, about.batch), "perfect_shuffle": expected_distinct(there.blocks, about.batch)}


def resident_episodes(store: Store, size: float) -> int:
    """How many training episodes take about `size` bytes in memory."""
    frame = int(np.prod(store.schema["image"][0]))
    return max(1, min(store.episodes - 1, int(size / frame / (store.steps / store.episodes))))


def trained(path: Path, about: DictConfig, folder: Path) -> dict[str, Any]:
    """`dipole train` on everything, streamed, and on the part that fits into memory, in turn: samples/s and the largest resident size of each process."""
    some = resident_episodes(Store.open(path), about.resident)
    sides = {"in memory": ["data.memory=null", f"data.max_episodes={some}"], "streamed": [f"data.memory={int(about.memory)}"]}
    same = [f"data.path={path}", *about.train, f"train.steps={about.steps}", f"train.batch={about.batch}"]
    runs: dict[str, list[dict[str, float]]] = {k: [] for k in sides}
    for turn in range(about.rounds):
        for name, words in sides.items():
            run = folder / f"{name.replace(' ', '_')}-{turn}"
            runs[name].append(one_training([*same, *words, f"run={run}"], about.batch, run))
    found: dict[str, dict[str, Any]] = {
        name: {**{k: statistics.median(r[k] for r in rows) for k in ("samples_per_s", "samples_per_cpu_s", "data_wait", "first_s")},
               "peak_rss": max(r["peak_rss"] for r in rows), "each": rows} for name, rows in runs.items()}
    pairs = list(zip(runs["streamed"], runs["in memory"], strict=True))  # neighbours in time, which other work on the machine hits alike
    return {**found, **{name: statistics.median(a[k] / b[k] for a, b in pairs) for name, k in (("ratio", "samples_per_s"), ("cpu_ratio", "samples_per_cpu_s"))},
            "batch": about.batch, "steps": about.steps, "train": list(about.train)}


def one_training(words: list[str], batch: int, run: Path) -> dict[str, float]:
    """What one process did after its first START + 1 rows of LOG steps; first_s: seconds that those took."""
    shutil.rmtree(run, ignore_errors=True)
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "scripts.cli", "train", "recipe=own", "encoder=image", "log.wandb=disabled", "train.save=0",
                                    f"train.log={LOG}", *words], stdout=out, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, high_water(process.pid))
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"the training broke off: {log.read_text().strip().splitlines()[-1:]}; see {log}")
    rows = [r for r in map(json.loads, (run / "train.jsonl").read_text().splitlines()) if "samples_per_s" in r]
    begin, end = rows[START], rows[-1]  # the pool fills before
    samples = (end["step"] - begin["step"]) * batch
    return {"samples_per_s": samples / (end["wall_s"] - begin["wall_s"]), "samples_per_cpu_s": samples / (end["cpu_s"] - begin["cpu_s"]),
            "data_wait": statistics.mean(r["data_wait"] for r in rows[START + 1:]), "first_s": begin["wall_s"], "peak_rss": peak}


def high_water(pid: int) -> int:
    """Largest resident size of a process so far [bytes], 0 where the system does not say."""
    try:
        return next((int(line.split()[1]) * 1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")), 0)
    except OSError:
        return 0


def measure(cfg: DictConfig) -> dict[str, Any]:
    about, folder = cfg.data, Path(cfg.run) / "bench" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    try:
        if "lowdim" in about.do:
            rows["lowdim"] = lowdim(about.path, cfg.batch, about.seconds, folder)
        if "codecs" in about.do:
            rows["codecs"] = codecs(about.path, folder)
        images = folder / "images.zarr"
        if {"access", "train"} & set(about.do):
            with bar() as progress:
                rows["images"] = generate(images, int(about.images), progress)
        if "access" in about.do:
            rows["access"] = access(images, about, about.seconds)
        if "train" in about.do:
            rows["train"] = trained(images, about, folder)
    finally:
        if not about.keep:
            shutil.rmtree(folder)
    return rows


def show(rows: dict[str, Any]) -> None:
    if "codecs" in rows:
        show_codecs(rows["codecs"])
    table = TextTable("", "samples/s", "of the first", "largest resident size", title="windows")
    for part in ("lowdim", "access"):
        for name, rate in rows.get(part, {}).get("samples_per_s", {}).items():
            first = next(iter(rows[part]["samples_per_s"].values()))
            table.add_row(f"{part}: {name}", f"{rate:,.0f}", f"{rate / first:.3g}", "")
    for name in ("in memory", "streamed") if "train" in rows else ():
        r = rows["train"][name]
        table.add_row(f"dipole train: {name}", f"{r['samples_per_s']:,.0f}", f"{rows['train']['ratio']:.3g}" if name == "streamed" else "1",
                      f"{r['peak_rss'] / 1e9:.2f} GB")
    console.print(table)
    if t := rows.get("train"):
        console.print(f"samples per second of CPU: {t['cpu_ratio']:.0%} of those in memory; waiting for data {t['streamed']['data_wait']:.1%} of the time; "
                      f"the first {(START + 1) * LOG} steps, which fill the pool, {t['streamed']['first_s']:.1f} s beside {t['in memory']['first_s']:.1f} s",
                      highlight=False, soft_wrap=True)
    if a := rows.get("access"):
        console.print(f"{a['live']} of {a['blocks']} blocks of {a['block']} frames live: {a['distinct_blocks_a_batch']:.1f} distinct ones in a batch of "
                      f"{a['batch']}, {a['perfect_shuffle']:.1f} in a perfect shuffle", highlight=False, soft_wrap=True)


def headline(rows: dict[str, Any]) -> str:
    words = []
    if "lowdim" in rows:
        words.append(f"sampler {rows['lowdim']['ratio']:.0f}x a DataLoader")
    if "access" in rows:
        words.append(f"streamed windows {rows['access']['ratio']:.0%} of those in memory")
    if "train" in rows:
        made = rows["images"]
        words.append(f"{made['bytes'] / 1e9:.3g} GB of images ({made['ratio']:.1f} times smaller on disk) train at {rows['train']['ratio']:.0%} of the rate "
                     f"in memory within {rows['train']['streamed']['peak_rss'] / 1e9:.2f} GB")
    return "; ".join(words)

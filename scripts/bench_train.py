"""Training throughput beside the loop everybody writes: same network, data, optimiser settings and loss."""
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from omegaconf import DictConfig
from rich.table import Table as TextTable
from torch.utils.data import DataLoader, Dataset

from policy.data.normalize import Normalizer
from policy.data.store import Store
from policy.data.windows import TrajectoryDataset
from policy.diffusion.path import Table
from policy.nets import blocks
from policy.train import checkpoint
from policy.train.log import console
from policy.train.loop import Settings, Trainer, lr_scale
from policy.types import Cond, Spec

SIZES = {"64-128-256": [64, 128, 256], "256-512-1024": [256, 512, 1024]}


def synthetic(path: Path, episodes: int = 200, steps: int = 120) -> Store:
    """Smooth trajectories of Push-T's shape: 20 observed numbers, 2 actions that follow two of them."""
    rng = np.random.default_rng(0)
    store = Store.create(path, {"state": ((20,), "float32"), "action": ((2,), "float32")}, fps=10)
    phase = rng.uniform(0, 6, (episodes, 1, 20)) + np.arange(steps)[None, :, None] * rng.uniform(0.02, 0.2, (episodes, 1, 20))
    store.extend({"state": np.sin(p).astype(np.float32), "action": np.sin(p[:, :2] + 0.3).astype(np.float32)} for p in phase)
    return store


class PerSample(Dataset):
    """One window at a time, in numpy: what a plain DataLoader is given."""

    def __init__(self, data: TrajectoryDataset, normalizer: Normalizer):
        arrays = {k: v.numpy() for k, v in normalizer.encode(data.arrays).items()}
        self.state, self.action, self.data = arrays["state"], arrays["action"], data
        ends = np.flatnonzero(np.diff(data._last.numpy(), append=-1)) + 1
        self.last, self.first = np.repeat(ends - 1, np.diff(ends, prepend=0)), np.repeat(np.r_[0, ends[:-1]], np.diff(ends, prepend=0))

    def __len__(self) -> int:
        return len(self.action)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        past = np.clip(np.arange(i - self.data.t_obs + 1, i + 1), self.first[i], None)
        ahead = np.clip(np.arange(i, i + self.data.horizon), None, self.last[i])
        return {"state": self.state[past], "action": self.action[ahead]}


def plain_steps(trainer: Trainer, batch: int) -> Iterator[float]:
    """The loop everybody writes: DataLoader, fp32, AdamW, diffusers' scheduler and EMA. Same network, data, optimiser settings and loss."""
    s, planner = trainer.settings, trainer.planner
    net, path = planner.denoiser.net, planner.denoiser.path
    for module in net.modules():
        if isinstance(module, blocks.Conv1d):
            module.__class__ = torch.nn.Conv1d  # type: ignore[assignment]  # torch's own backward
    assert isinstance(path, Table)
    optimizer = torch.optim.AdamW(planner.parameters(), lr=s.lr, betas=s.betas, weight_decay=s.weight_decay)
    scheduler: Any = DDPMScheduler(len(path.alphas_cumprod), beta_schedule="squaredcos_cap_v2")
    ema = EMAModel(planner.parameters(), power=s.ema_power)
    loader = DataLoader(PerSample(trainer.data, planner.normalizer), batch, shuffle=True, drop_last=True)
    step = 0
    while True:
        for rows in loader:
            for group in optimizer.param_groups:
                group["lr"] = s.lr * lr_scale(step, s)
            noise = torch.randn_like(rows["action"])
            t = torch.randint(0, len(path.alphas_cumprod), (batch,))
            x = scheduler.add_noise(rows["action"], noise, t)
            loss = torch.nn.functional.mse_loss(net(x, (t + 1) / len(path.alphas_cumprod), Cond(rows["state"])), noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(planner.parameters(), s.grad_clip)
            optimizer.step()
            ema.step(planner.parameters())
            step += 1
            yield loss.item()


def our_steps(trainer: Trainer) -> Iterator[float]:
    while True:
        yield trainer.one_step().item()


def side_by_side(loops: dict[str, Iterator[float]], steps: int, block: int, batch: int) -> dict[str, Any]:
    """Alternate blocks of steps, so that both see the same machine; samples/s is the median block, per second of CPU too."""
    wall: dict[str, list[float]] = {k: [] for k in loops}
    cpu: dict[str, list[float]] = {k: [] for k in loops}
    loss: dict[str, list[float]] = {k: [] for k in loops}
    for loop in loops.values():
        next(loop)  # warm-up
    for _ in range(max(1, steps // block)):
        for k, loop in loops.items():
            a, c = time.perf_counter(), time.process_time()
            loss[k] += [next(loop) for _ in range(block)]
            wall[k].append((time.perf_counter() - a) / block)
            cpu[k].append((time.process_time() - c) / block)
    return {k: {"samples_per_s": batch / statistics.median(wall[k]), "samples_per_cpu_s": batch / statistics.median(cpu[k]), "loss": loss[k],
                "loss_last_half": statistics.fmean(loss[k][len(loss[k]) // 2:])} for k in loops}


def measure(cfg: DictConfig) -> dict[str, Any]:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic(Path(folder) / "synthetic.zarr")
        data = TrajectoryDataset(store, {"state": "state"}, "action", horizon=16)
        for name, widths in SIZES.items():
            config = {"encoder": {"_target_": "policy.nets.lowdim.LowDim"}, "net": {"_target_": "policy.nets.unet1d.UNet1d", "widths": widths},
                      "schedule": {"_target_": "policy.diffusion.path.Table.named"}, "denoiser": {"target": "eps"}, "padding_loss": True,
                      "sampler": {"fn": {"_target_": "policy.diffusion.samplers.first_order", "_partial_": True}, "steps": 10}}
            steps = cfg.steps if name == "64-128-256" else cfg.large_steps
            settings = Settings(steps=10 * steps, batch=cfg.batch, lr=1e-3, warmup=10, precision=cfg.precision, compile=cfg.compile)

            def trainer(config: dict[str, Any] = config, settings: Settings = settings) -> Trainer:
                torch.manual_seed(0)
                spec = Spec({"state": (20,)}, 2, fps=10)
                planner = checkpoint.build(config, spec, Normalizer.fit(data.arrays))
                return Trainer(planner, data, Path(folder), settings, config=config)

            rows[name] = side_by_side({"plain": plain_steps(trainer(), cfg.batch), "dipole": our_steps(trainer())}, steps, max(1, steps // 10), cfg.batch)
            rows[name]["ratio"] = rows[name]["dipole"]["samples_per_cpu_s"] / rows[name]["plain"]["samples_per_cpu_s"]
    return rows


def show(rows: dict[str, Any]) -> None:
    table = TextTable("U-Net", "loop", "samples/s", "samples/CPU-s", "ratio", "mean loss, last half", title="training, same network, data and loss")
    for name, row in rows.items():
        for k in ("plain", "dipole"):
            r = row[k]
            table.add_row(name, k, f"{r['samples_per_s']:.0f}", f"{r['samples_per_cpu_s']:.0f}", f"{row['ratio']:.2f}" if k == "dipole" else "1",
                          f"{r['loss_last_half']:.4f}")
    console.print(table)


def headline(rows: dict[str, Any]) -> str:
    return "; ".join(f"{k} {v['ratio']:.2f}x" for k, v in rows.items())

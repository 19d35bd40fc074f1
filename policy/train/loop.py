"""The training loop. Everything random in step n is a function of (seed, n), so a run can stop anywhere and go on bit for bit."""
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from policy.data.windows import Epoch, TrajectoryDataset
from policy.planner import Planner
from policy.train import checkpoint
from policy.train.ema import Ema
from policy.train.log import Log, bar, console
from policy.types import Batch


class NotFinite(RuntimeError):
    """The loss became NaN or infinite; the batch lies in the run folder."""


@dataclass(frozen=True)
class Settings:
    """steps, batch: optimiser steps and windows per step.   lr: peak; linear warm-up over `warmup` steps, cosine to 0 at `steps`.

    ema_limit, ema_power: see policy.train.ema.   grad_clip: largest gradient norm, 0 for none.   precision: fp32, bf16, or auto (bf16
    where the hardware multiplies it natively).   log, save, eval: steps between rows, checkpoints and rollouts (0: never).
    """
    steps: int = 10_000
    batch: int = 64
    lr: float = 7e-4
    warmup: int = 200
    weight_decay: float = 1e-6
    betas: tuple[float, float] = (0.95, 0.999)
    grad_clip: float = 1.0
    ema_limit: float = 0.998
    ema_power: float = 0.75
    precision: str = "auto"
    compile: bool = False
    seed: int = 0
    log: int = 100
    save: int = 1000
    eval: int = 0

    def __post_init__(self) -> None:
        low = {"steps": 1, "batch": 1, "log": 1, "warmup": 0, "save": 0, "eval": 0}
        wrong = [f"train.{k}={getattr(self, k)!r} must be a whole number from {least}" for k, least in low.items()
                 if not isinstance(getattr(self, k), int) or getattr(self, k) < least]
        wrong += [f"train.{k}={getattr(self, k)!r} must be a number" for k in ("lr", "weight_decay", "grad_clip", "ema_limit", "ema_power")
                  if not isinstance(getattr(self, k), int | float)]
        if wrong:
            raise ValueError("; ".join(wrong))


def lr_scale(step: int, settings: Settings) -> float:
    """Factor on the peak learning rate at 0-based `step`. Oracle: diffusers.get_scheduler("cosine")."""
    if step < settings.warmup:
        return step / max(1, settings.warmup)
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def use_bf16(precision: str, device: torch.device) -> bool:
    """auto: bf16 on GPUs of compute capability 8 and on CPUs with AVX512-BF16 or AMX, fp32 elsewhere (emulated bf16 is slower)."""
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"precision {precision!r} is unknown; use auto, bf16 or fp32")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Trainer:
    """Trains a planner on a dataset and leaves checkpoints/last (everything, to resume) and checkpoints/policy (averaged weights, to use).

    config: the planner's own configuration, stored with the weights so that `checkpoint.load` can rebuild it.   rollout: called every
    settings.eval steps as rollout(planner, step) -> metrics, with averaged weights; each such checkpoint is kept as policy_<step>.
    """

    def __init__(self, planner: Planner, data: TrajectoryDataset, folder: Path, settings: Settings, *, config: dict[str, Any],
                 val: TrajectoryDataset | None = None, rollout: Callable[[Planner, int], dict[str, Any]] | None = None):
        self.planner, self.data, self.val, self.folder, self.settings = planner, data, val, Path(folder), settings
        self.config, self.rollout = config, rollout
        self.device = next(planner.parameters()).device
        self.optimizer = torch.optim.AdamW(planner.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
        self.ema = Ema(planner, limit=settings.ema_limit, power=settings.ema_power)
        self.bf16 = use_bf16(settings.precision, self.device)
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        self.loss_fn = planner.loss
        if settings.compile:
            planner.denoiser.net.compile()  # in place: the weights keep their names
        self.step, self.cpu_s, self.wall_s = 0, 0.0, 0.0
        self._epoch: tuple[int, Epoch] | None = None
        self._stop = False

    def run(self, log: Log) -> None:
        """Train to settings.steps. Ctrl-C or SIGTERM saves and returns; a loss that is not finite raises NotFinite."""
        previous = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)} if _main_thread() else {}
        try:
            with bar() as progress:
                task = progress.add_task("train", total=self.settings.steps, completed=self.step, note="")
                self._run(log, lambda note: progress.update(task, completed=self.step, note=note))
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)
            if self._epoch is not None:
                self._epoch[1].close()  # no more reading ahead
        if self._stop and self.step < self.settings.steps:
            console.print(f"stopped at step {self.step}; resume with: dipole train run={self.folder} resume=true")

    def _run(self, log: Log, show: Callable[[str], None]) -> None:
        s = self.settings
        self.planner.train()
        losses: list[Tensor] = []
        meter = _Meter()
        while self.step < s.steps and not self._stop:
            losses.append(self.one_step(meter))
            if self.device.type == "cpu" or self.step % s.log == 0:  # reading a loss from a GPU waits for it
                self._refuse_not_finite(losses[-1:] if self.device.type == "cpu" else losses)
            done = self.step == s.steps
            if self.step % s.log == 0 or done:
                self.cpu_s, self.wall_s = self.cpu_s + meter.cpu_s, self.wall_s + meter.wall_s
                row = {"loss": torch.stack(losses).mean().item(), "lr": s.lr * lr_scale(self.step - 1, s),
                       "samples_per_s": meter.steps * s.batch / meter.wall_s,
                       "data_wait": meter.data_s / meter.wall_s, "cpu_s": self.cpu_s, "wall_s": self.wall_s}
                log.row(self.step, **row)
                show(f"loss {row['loss']:.4f}  {row['samples_per_s']:.0f} samples/s  data wait {row['data_wait']:.0%}")
                losses, meter = [], _Meter()
            if (s.save and self.step % s.save == 0) or done or self._stop:
                if losses:
                    self._refuse_not_finite(losses)
                    self.cpu_s, self.wall_s = self.cpu_s + meter.cpu_s, self.wall_s + meter.wall_s
                    losses, meter = [], _Meter()
                self.save()
            if s.eval and (self.step % s.eval == 0 or done) and not self._stop:
                self._evaluate(log)
        if self.step == 0:
            self.save()

    def one_step(self, meter: "_Meter | None" = None) -> Tensor:
        """One optimiser step; its mean loss, a scalar on the device."""
        s, meter = self.settings, meter or _Meter()
        meter.start()
        batch = self.batch(self.step)
        meter.data()
        torch.manual_seed(_mix(s.seed, self.step, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * lr_scale(self.step, s)
        with self.autocast():
            loss = self.loss_fn(batch, self.step / s.steps).mean()
        loss.backward()
        if s.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.planner.parameters(), s.grad_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        self.step += 1
        meter.stop()
        return loss.detach()

    def batch(self, step: int) -> Batch:
        """The batch of 0-based `step`: every window once per epoch, in an order drawn from (seed, epoch)."""
        b = min(self.settings.batch, len(self.data))
        epoch, at = divmod(step, len(self.data) // b)
        if self._epoch is None or self._epoch[0] != epoch:
            if self._epoch is not None:
                self._epoch[1].close()
            self._epoch = (epoch, self.data.epoch(_mix(self.settings.seed, epoch, 0)))
        return self._epoch[1].batch(at * b, (at + 1) * b).to(self.device)

    @torch.no_grad()
    def validation_loss(self, windows: int = 2048) -> float | None:
        """Loss of the current weights on held-out episodes, always the same windows and noise."""
        if self.val is None:
            return None
        torch.manual_seed(_mix(self.settings.seed, 0, 2))
        index = torch.randperm(len(self.val))[:windows]
        return torch.cat([self.planner.loss(self.val.batch(i).to(self.device)) for i in index.split(256)]).mean().item()

    def facts(self) -> dict[str, Any]:
        return {"step": self.step, "cpu_s": self.cpu_s, "wall_s": self.wall_s, "spec": self.planner.spec.to_json(), "planner": self.config,
                "settings": self.settings.__dict__, "windows": len(self.data), "order": self.data.order_facts, "versions": checkpoint.versions()}

    def save(self) -> None:
        adam = {f"adam/{name}/{k}": torch.as_tensor(v) for name, p in self.planner.named_parameters() for k, v in self.optimizer.state[p].items()}
        model = {f"model/{k}": v for k, v in self.planner.state_dict().items()}
        folder = self.folder / "checkpoints"
        checkpoint.write(folder / "last.safetensors", {**model, **adam, **{f"ema/{k}": v for k, v in self.ema.average.items()}}, self.facts())
        self._save_policy("policy")

    def _save_policy(self, name: str) -> None:
        with self.ema.applied():
            checkpoint.write(self.folder / "checkpoints" / f"{name}.safetensors", {f"model/{k}": v for k, v in self.planner.state_dict().items()},
                             self.facts())

    def resume(self) -> None:
        """Continue from checkpoints/last. ValueError when the data or the optimiser's settings are not those of the checkpoint."""
        tensors, facts = checkpoint.read(self.folder / "checkpoints" / "last.safetensors")
        if facts["windows"] != len(self.data):
            raise ValueError(f"the run was trained on {facts['windows']} windows, this dataset has {len(self.data)}: resuming would not continue it. "
                             "Point data.path at the same dataset, or start a new run")
        kept = ("encoder", "net", "schedule", "denoiser", "objective", "padding_loss", "obs_noise", "cond_drop", "rtc", "transform", "per_step")
        learned = [k for k in kept if facts["planner"].get(k) != self.config.get(k)]
        if learned:
            raise ValueError(f"the run was trained with another {', '.join(learned)}: {({k: facts['planner'].get(k) for k in learned})}. "
                             "A resumed run keeps what is learned; start a new run for another one")
        fixed = ("batch", "seed", "steps", "lr", "warmup", "betas", "weight_decay")
        changed = [f"{k}: {facts['settings'][k]} -> {getattr(self.settings, k)}" for k in fixed
                   if k in facts["settings"] and _plain(facts["settings"][k]) != _plain(getattr(self.settings, k))]
        if facts.get("order", {}) != self.data.order_facts:
            changed.append(f"order of the data: {facts.get('order', {})} -> {self.data.order_facts}")
        if changed:
            console.print(f"[yellow]resuming with changed settings ({'; '.join(changed)}): the run goes on, but not bit for bit[/]")
        self.planner.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
        for name, p in self.planner.named_parameters():
            self.ema.average[name].copy_(tensors[f"ema/{name}"])
            state = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.startswith(f"adam/{name}/")}
            if state:
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p) for k, v in state.items()}
        self.step, self.cpu_s, self.wall_s = facts["step"], facts["cpu_s"], facts["wall_s"]

    def _evaluate(self, log: Log) -> None:
        self.planner.eval()
        with self.ema.applied():
            row: dict[str, Any] = {"val_loss": self.validation_loss(), "cpu_s": self.cpu_s, "wall_s": self.wall_s}
            if self.rollout is not None:
                row["eval"] = self.rollout(self.planner, self.step)
        self._save_policy(f"policy_{self.step}")
        log.row(self.step, **{k: v for k, v in row.items() if v is not None})
        self.planner.train()

    def _refuse_not_finite(self, losses: list[Tensor]) -> None:
        bad = (~torch.stack(losses).isfinite()).nonzero()
        if not len(bad):
            return
        step = self.step - len(losses) + int(bad[0])
        batch = self.batch(step)
        path = self.folder / f"not_finite_step_{step}.safetensors"
        save_file({**{f"obs/{k}": v.cpu().contiguous() for k, v in batch.obs.items()}, "action": batch.action.cpu().contiguous(),
                   "valid": batch.valid.cpu().contiguous()}, path)
        kept = "checkpoints/last is from before it" if (self.folder / "checkpoints" / "last.safetensors").exists() else "nothing was saved yet"
        raise NotFinite(f"the loss is not finite at step {step}; its batch is in {path}, and {kept}. "
                        "Look at the batch; if the data is sound, lower train.lr or set train.precision=fp32")

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True


class _Meter:
    """Seconds spent in steps, and in making batches, without what lies between."""

    def __init__(self) -> None:
        self.steps, self.wall_s, self.cpu_s, self.data_s = 0, 0.0, 0.0, 0.0

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def data(self) -> None:
        self.data_s += time.perf_counter() - self._wall

    def stop(self) -> None:
        self.steps += 1
        self.wall_s += time.perf_counter() - self._wall
        self.cpu_s += time.process_time() - self._cpu


def _mix(seed: int, n: int, stream: int) -> int:
    """A 63-bit seed per (seed, n, stream) (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + n * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1


def _plain(x: Any) -> Any:
    return list(x) if isinstance(x, tuple) else x


def _main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

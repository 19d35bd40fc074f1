"""One plan for one robot on one thread: sampling as diffusers' users write it, the planner, FastPlan, and the exports, in turns."""
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Column
from rich.table import Table as TextTable
from torch import Tensor

from policy.data.normalize import Normalizer
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import clip
from policy.diffusion.path import Table
from policy.nets.lowdim import LowDim
from policy.nets.unet1d import UNet1d
from policy.planner import Planner
from policy.serve.artifact import load
from policy.serve.backend import PlannerBackend
from policy.serve.export import export
from policy.serve.fastplan import FastPlan
from policy.serve.measure import race
from policy.train.log import bar, console
from policy.types import Spec

K, OBS, T_OBS, ACTIONS, HORIZON = 100, 20, 2, 7, 16
WANTED = {"FastPlan": 2.3, "ONNX Runtime": 3.0, "OpenVINO": 7.0}  # times faster than the first row
SCHEDULE, GUIDED = "squaredcos_cap_v2", ", guided"


def measure(cfg: DictConfig) -> dict[str, Any]:
    """{row: race's times, times faster than the first (guided: than the planner's guided one), largest difference to the planner, what it needs}."""
    if K % cfg.deploy.steps:
        raise ValueError(f"deploy.steps={cfg.deploy.steps} must divide {K}: DDIMScheduler walks other times than it says elsewhere")
    torch.manual_seed(cfg.seed)
    planner = network(list(cfg.deploy.widths), cfg.deploy.steps)
    policy, rng = PlannerBackend(planner), np.random.default_rng(cfg.seed)
    seen = [({"state": rng.standard_normal((T_OBS, OBS), np.float32)}, rng.standard_normal((HORIZON, ACTIONS), np.float32)) for _ in range(64)]
    promised: dict[str, Any] = {"prefix": rng.uniform(-1, 1, (HORIZON // 2, ACTIONS)).astype(np.float32), "committed": 2, "merge": "guided"}
    ways: dict[str, Callable[..., np.ndarray]] = {"diffusers loop": by_hand(planner, cfg.deploy.steps), "Planner.plan": policy.plan}
    guided: dict[str, Callable[..., np.ndarray]] = {f"Planner.plan{GUIDED}": partial(policy.plan, **promised)}
    made: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, bar() as progress:
        making = builders(policy, Path(folder), cfg.threads)
        task = progress.add_task("build", total=len(making), note="")
        for name, build in making.items():
            progress.update(task, note=name)
            start = time.perf_counter()
            try:
                ways[name] = build()
            except ImportError as e:
                console.print(f"{name} is left out: {e}", highlight=False, soft_wrap=True, markup=False)
                continue
            finally:
                progress.advance(task)
            made[name] = {"built_s": time.perf_counter() - start}
            if name in ("ONNX Runtime", "OpenVINO"):
                guided[f"{name}{GUIDED}"] = partial(ways[name], **promised)
        progress.update(task, note="")
        task = progress.add_task("compare", total=len(ways) + len(guided), note="")
        apart = {}
        for right, others in ((policy.plan, ways), (next(iter(guided.values())), guided)):
            for name, plan in others.items():
                apart[name] = max(float(np.abs(plan(obs, noise=noise) - right(obs, noise=noise)).max()) for obs, noise in seen)
                progress.advance(task)
        obs, noise = seen[0]
        plans = {name: partial(plan, obs, noise=noise) for name, plan in (ways | guided).items()}
        task = progress.add_task("time", total=cfg.rounds + 1, note="")
        rows: dict[str, dict[str, Any]] = {**race(plans, rounds=cfg.rounds, turned=lambda: progress.advance(task))}
    for name, row in rows.items():
        first = rows[next(iter(guided if name in guided else ways))]["cpu_ms"]
        row |= {"faster": first / row["cpu_ms"], "difference": apart[name], "wanted": WANTED.get(name), **made.get(name, {})}
    return rows


def network(widths: Sequence[int], steps: int) -> Planner:
    spec = Spec({"state": (OBS,)}, ACTIONS, T_OBS, HORIZON, 10.0, task="bench")
    net = UNet1d(ACTIONS, (T_OBS, OBS), HORIZON, widths=widths)
    denoiser, normalizer = Denoiser(net, Table.named(SCHEDULE, K), "v"), Normalizer({"state": (OBS,), "action": (ACTIONS,)})
    planner = Planner(spec, normalizer, LowDim(spec.obs, T_OBS), denoiser, steps=steps, guides=[partial(clip, limit=1.0)])
    return planner.eval().requires_grad_(False)


def by_hand(planner: Planner, steps: int) -> Callable[..., np.ndarray]:
    """The sampling loop of Diffusion Policy and its kind: the network, then scheduler.step, which follows the clipped estimate as our samplers do."""
    net: Any = planner.denoiser.net
    scheduler: Any = diffusers.DDIMScheduler(K, beta_schedule=SCHEDULE, clip_sample=True, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(steps)

    @torch.inference_mode()
    def plan(obs: dict[str, np.ndarray], *, noise: np.ndarray) -> np.ndarray:
        cond = planner.encode({k: torch.from_numpy(v)[None] for k, v in obs.items()})
        x: Tensor = torch.from_numpy(noise)[None]
        for t in scheduler.timesteps:
            v = net(x, (t[None].float() + 1) / K, cond)
            x = scheduler.step(v, t, x, use_clipped_model_output=True).prev_sample
        actions: np.ndarray = planner.normalizer.decode({"action": x})["action"][0].numpy()
        return actions
    return plan


def builders(policy: PlannerBackend, folder: Path, threads: int) -> dict[str, Callable[[], Callable[..., np.ndarray]]]:
    def exported(format: str, precision: str = "fp32") -> Callable[..., np.ndarray]:
        export(policy, {}, out := folder / f"{format}-{precision}", format=format, precision=precision)
        return load(out, threads=threads).plan

    return {"FastPlan": lambda: FastPlan(policy).plan, "ONNX Runtime": partial(exported, "onnx"), "OpenVINO": partial(exported, "openvino"),
            "OpenVINO, bf16": partial(exported, "openvino", "bf16")}


def show(rows: dict[str, Any]) -> None:
    table = TextTable(Column("one plan", no_wrap=True), "CPU ms", "p50", "p99", "faster", "wanted", "differs", "built, s", box=SIMPLE_HEAD, pad_edge=False)
    for name, r in rows.items():
        table.add_row(name, *(f"{r[k]:.1f}" for k in ("cpu_ms", "wall_p50_ms", "wall_p99_ms", "faster")), str(r["wanted"] or ""), f"{r['difference']:.0e}",
                      f"{r['built_s']:.1f}" if "built_s" in r else "")
    console.print(table)


def headline(rows: dict[str, Any]) -> str:
    return "; ".join(f"{name} {r['faster']:.1f} times faster" + ("" if r["faster"] >= r["wanted"] else f", {r['wanted']} wanted")
                     for name, r in rows.items() if r["wanted"])

"""A whole evaluation of one trained run, made in several ways over the same seeds: seconds, where they go, and whether the score is the same."""
import importlib.util
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from envs.simulator import Simulator
from envs.task import Task
from policy.control import Controller
from policy.lanes import evaluate_in_lanes
from policy.nets.fast import quick
from policy.planner import Planner
from policy.stats import bootstrap
from policy.train import checkpoint
from policy.train.log import bar, console
from scripts import common


def measure(cfg: DictConfig) -> dict[str, Any]:
    """{way: wall_s, cpu_s, shares, score, difference to the first way with its interval}. A way is "precision lanes x copies of each"."""
    trained, rows = OmegaConf.load(Path(cfg.run) / "config.yaml"), {}
    with bar() as progress:
        task = progress.add_task("evaluate", total=len(cfg.evaluations), note="")
        for way in cfg.evaluations:
            progress.update(task, note=way)
            rows[way] = one(cfg, trained, way)
            progress.advance(task)
    first = np.array(next(iter(rows.values()))["scores"])
    for row in rows.values():
        differences = np.array(row["scores"]) - first
        row |= {"difference": float(differences.mean()), "difference_ci": list(bootstrap(differences)), "equal": int((differences == 0).sum())}
    if importlib.util.find_spec("mujoco_warp") and torch.cuda.is_available():
        rows["closed loop on cuda"] = on_device(cfg, trained)
    return rows


def one(cfg: DictConfig, trained: Any, way: str) -> dict[str, Any]:
    said = re.fullmatch(r"(fp32|bf16) (\d+)x(\d+)(?: (\d+) threads)?", way)
    if not said:
        raise ValueError(f"{way!r} is no way to evaluate: write it like 'bf16 2x100', two lanes of 100 copies, or 'fp32 1x200 2 threads'")
    precision, (lanes, copies), threads = said[1], map(int, said.group(2, 3)), int(said[4] or 1)
    planner, _ = checkpoint.load(Path(cfg.run), cfg.checkpoint)
    if precision == "bf16":
        planner.denoiser.net = quick(planner.denoiser.net)
    made = [common.make_envs(trained.env, copies, lanes=lanes) for _ in range(lanes)]
    before, task = torch.get_num_threads(), made[0][0]
    torch.set_num_threads(threads)
    try:
        with timed() as physics:
            report = evaluate_in_lanes([(Controller(planner, **trained.control), envs) for _, _, envs in made], cfg.episodes, cfg.seed, task=task)
    finally:
        torch.set_num_threads(before)
        for _, _, envs in made:
            envs.close()
    whole, plan, found = lanes * report.wall_s, sum(report.plan_s), report.metrics()
    shares = {"physics": sum(physics) / whole, "observations, rewards": (report.env_s - sum(physics)) / whole, "planning": plan / whole}
    return {"wall_s": report.wall_s, "cpu_s": report.cpu_s, "shares": {**shares, "other Python, waiting": 1 - sum(shares.values())}, "steps": found["steps"],
            "score": found["score"], "score_ci": found["score_ci"], "success": found["success"], "scores": [e.score for e in report.episodes]}


@contextmanager
def timed() -> Iterator[list[float]]:
    """Seconds of every call of Simulator.run meanwhile."""
    seconds: list[float] = []
    run = Simulator.run

    def clocked(self: Simulator, *args: Any) -> Any:
        tick = time.perf_counter()
        try:
            return run(self, *args)
        finally:
            seconds.append(time.perf_counter() - tick)

    Simulator.run = clocked  # type: ignore[method-assign,assignment]
    try:
        yield seconds
    finally:
        Simulator.run = run  # type: ignore[method-assign]


def on_device(cfg: DictConfig, trained: Any, device: str = "cuda", worlds: int = 4096, chunks: int = 20) -> dict[str, Any]:
    """Control steps/s of a loop that never leaves the device: physics by mujoco_warp, observations and coverage in torch, plans in bf16."""
    from envs.warp import WarpEnv, closed_loop
    task = common.instantiate(trained.env)
    assert isinstance(task, Task)
    planner, _ = checkpoint.load(Path(cfg.run), cfg.checkpoint, device=device)
    planner.denoiser.net = quick(planner.denoiser.net)
    env = WarpEnv(task, worlds, device)
    loop = {"t_obs": planner.spec.t_obs, "execute": trained.control.execute}

    def play(n: int) -> tuple[int, float]:
        tick = time.perf_counter()
        with torch.inference_mode():
            steps = closed_loop(env, lambda obs: _planned(planner, obs), **loop, chunks=n)
        return steps, time.perf_counter() - tick

    play(2)  # warm-up
    steps, seconds = play(chunks)
    env.close()
    return {"wall_s": seconds, "steps": steps, "steps_per_s": steps / seconds, "worlds": worlds, "device": device}


def _planned(planner: Planner, obs: dict[str, torch.Tensor]) -> torch.Tensor:
    return planner.plan({k: obs[k] for k in planner.spec.obs})


def show(rows: dict[str, Any]) -> None:
    if not rows:
        return
    table = Table("lanes x copies", "s", "CPU-s", "physics", "obs", "plans", "score", "paired difference", "equal", box=SIMPLE_HEAD, pad_edge=False)
    for way, r in rows.items():
        if "shares" in r:
            lo, hi = r["difference_ci"]
            table.add_row(way, f"{r['wall_s']:.1f}", f"{r['cpu_s']:.1f}", *(f"{x:.0%}" for x in list(r["shares"].values())[:3]), f"{r['score']:.3f}",
                          f"{r['difference']:+.3f} [{lo:+.3f}, {hi:+.3f}]", str(r["equal"]))
        else:
            console.print(f"{way}: {r['steps_per_s']:,.0f} control steps/s with the planner in the loop, {r['worlds']} worlds", highlight=False)
    console.print(table)


def headline(rows: dict[str, Any]) -> str:
    timed_rows = {k: r for k, r in rows.items() if "shares" in r}
    if not timed_rows:
        return ""
    best = min(timed_rows, key=lambda k: timed_rows[k]["wall_s"])
    return f"; {len(timed_rows[best]['scores'])} episodes in {timed_rows[best]['wall_s']:.1f} s ({best})"

"""`dipole bench rollout`: control steps per second of every way to step Push-T, coverage included, and a whole evaluation taken apart.

Blocks of all rows alternate, so that each sees the same machine; a figure is the median block's. Actions are random targets held for five steps.
"""
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from envs.batch import BatchEnv
from envs.copies import Copies
from envs.gym_pusht import GymPushT
from envs.pusht import PushT
from envs.simulator import Simulator
from envs.task import Task, TaskEnv
from policy.control import Controller
from policy.rollout import evaluate
from policy.train import checkpoint
from policy.train.log import bar, console
from scripts import common

CHUNK, BLOCK, FEW = 8, 40, 8  # steps of a chunk; control steps of a block; copies of what is stepped one by one
TASK = partial(PushT, obs="state", success_coverage=2.0, max_steps=10**9)  # no episode ends, so every row steps as often
Block = Callable[[], float]  # resets, steps a block, and says in how many seconds


def held(low: np.ndarray, high: np.ndarray, n: int, t: int, seed: int = 0) -> np.ndarray:
    """Random actions (n, t, d), each held for five steps."""
    return np.random.default_rng(seed).uniform(low, high, (n, -(-t // 5), len(low))).repeat(5, axis=1)[:, :t]


def chunked(envs: Any, actions: np.ndarray, chunk: int = CHUNK) -> Block:
    def block() -> float:
        envs.reset(seed=0)
        tick = time.perf_counter()
        for k in range(0, actions.shape[1], chunk):
            envs.step_chunk(actions[:, k: k + chunk])
        return time.perf_counter() - tick
    return block


def stepped(envs: Any, actions: np.ndarray) -> Block:
    """A VectorEnv with actions (n, t, d), or a single environment with (1, t, d)."""
    single = not isinstance(envs, gymnasium.vector.VectorEnv)
    actions = (actions[0] if single else actions.swapaxes(0, 1)).astype(np.float32)

    def block() -> float:
        envs.reset(seed=0)
        tick = time.perf_counter()
        for action in actions:
            envs.step(action)
        return time.perf_counter() - tick
    return block


def single() -> TaskEnv:
    return TaskEnv(TASK())


def pymunk() -> GymPushT:
    return GymPushT(obs="state", success_coverage=2.0, max_steps=10**9)


def ways(n: int) -> dict[str, tuple[int, Any, Callable[[Any, np.ndarray], Block]]]:
    """name: copies, environment, what steps it."""
    spawned: dict[str, Any] = {"context": "spawn", "autoreset_mode": AutoresetMode.NEXT_STEP}
    rows: dict[str, tuple[int, Any, Any]] = {
        "BatchEnv, chunks of 8, 2 threads": (n, BatchEnv(TASK(), n, threads=2), chunked),
        "BatchEnv, chunks of 8, 1 thread": (n, BatchEnv(TASK(), n, threads=1), chunked),
        "BatchEnv, step by step, 2 threads": (n, BatchEnv(TASK(), n, threads=2), stepped),
        "TaskEnv": (1, single(), stepped),
        "gymnasium SyncVectorEnv of TaskEnv": (FEW, SyncVectorEnv([single] * FEW), stepped),
        "gymnasium AsyncVectorEnv of TaskEnv": (FEW, AsyncVectorEnv([single] * FEW, **spawned), stepped),
        "Copies of TaskEnv, chunks of 8": (FEW, Copies(single, FEW), chunked),
    }
    if importlib.util.find_spec("gym_pusht"):
        rows |= {"gym-pusht (pymunk)": (1, pymunk(), stepped),
                 "gymnasium AsyncVectorEnv of gym-pusht": (FEW, AsyncVectorEnv([pymunk] * FEW, **spawned), stepped),
                 "Copies of gym-pusht, chunks of 8": (FEW, Copies(pymunk, FEW), chunked)}
    else:
        console.print("gym-pusht is left out: pip install 'dipole[pymunk]'", highlight=False)
    if importlib.util.find_spec("mujoco_warp"):
        from envs.warp import WarpEnv
        rows["WarpEnv (mujoco_warp) on " + ("cuda" if torch.cuda.is_available() else "cpu")] = (n, WarpEnv(TASK(), n, arrays="numpy"), chunked)
    return rows


def measure(cfg: DictConfig) -> dict[str, Any]:
    warnings.filterwarnings("ignore", module="gymnasium")
    rows = {f"Push-T: {k}": v for k, v in throughput(ways(cfg.copies), cfg.blocks).items()}
    base = rows["Push-T: BatchEnv, chunks of 8, 2 threads"]["steps_per_s"]
    for row in rows.values():
        row["ratio"] = base / row["steps_per_s"]  # how many times faster the first row is
    others = {node.stem: instantiate(OmegaConf.load(node)) for node in sorted(Path(str(importlib.util.find_spec("conf").submodule_search_locations[0]),  # type: ignore[union-attr,index]
                                                                                  "env").glob("*.yaml")) if node.stem in cfg.tasks}
    batches: dict[str, tuple[int, Any, Any]] = {k: (cfg.copies, BatchEnv(task, cfg.copies), chunked) for k, task in others.items() if isinstance(task, Task)}
    rows |= {f"{k}: BatchEnv": v for k, v in throughput(batches, max(1, cfg.blocks // 3)).items()}
    if (Path(cfg.run) / "config.yaml").exists():
        rows |= whole(cfg)
    else:
        console.print(f"{cfg.run} holds no trained run, so no evaluation is measured: dipole bench rollout run=outputs/pusht", highlight=False)
    return rows


def throughput(ways: dict[str, tuple[int, Any, Callable[[Any, np.ndarray], Block]]], blocks: int) -> dict[str, Any]:
    """{name: copies, steps_per_s (median block), each block's}."""
    made: dict[str, Block] = {}
    for name, (n, envs, how) in ways.items():
        space = getattr(envs, "single_action_space", envs.action_space)
        made[name] = how(envs, held(space.low, space.high, n, BLOCK))
    found: dict[str, list[float]] = {name: [] for name in made}
    with bar() as progress:
        task = progress.add_task("rollout", total=len(made) * (blocks + 1), note="")
        for k in range(blocks + 1):
            for name, block in made.items():
                seconds = block()
                if k:  # the first warms up
                    found[name].append(ways[name][0] * BLOCK / seconds)
                progress.update(task, advance=1, note=name)
    for _, envs, _ in ways.values():
        envs.close()
    return {name: {"copies": ways[name][0], "steps_per_s": statistics.median(rates), "blocks": rates} for name, rates in found.items()}


def whole(cfg: DictConfig) -> dict[str, Any]:
    """evaluate() of a trained run over cfg.episodes seeds: seconds, and the shares of physics, planning and what Python does between."""
    trained = OmegaConf.load(Path(cfg.run) / "config.yaml")
    planner, _ = checkpoint.load(Path(cfg.run), cfg.checkpoint)
    name, _, envs = common.make_envs(trained.env, min(cfg.copies, cfg.episodes))
    physics, run = [0.0], Simulator.run

    def timed(self: Simulator, *args: Any) -> Any:
        tick = time.perf_counter()
        try:
            return run(self, *args)
        finally:
            physics[0] += time.perf_counter() - tick

    Simulator.run = timed  # type: ignore[method-assign,assignment]
    try:
        cpu = time.process_time()
        report = evaluate(Controller(planner, **trained.control), envs, cfg.episodes, cfg.seed, task=name)
        cpu = time.process_time() - cpu
    finally:
        Simulator.run = run  # type: ignore[method-assign]
        envs.close()
    metrics, wall = report.metrics(), report.wall_s
    planning = sum(report.plan_s)
    shares = {"physics": physics[0] / wall, "observations and rewards": (report.env_s - physics[0]) / wall, "planning": planning / wall}
    shares["other Python"] = 1 - sum(shares.values())
    return {f"{name}: {cfg.episodes} episodes evaluated": {"wall_s": wall, "cpu_s": cpu, "shares": shares, "steps": metrics["steps"], "copies": envs.num_envs,
                                                          "steps_per_s": metrics["steps"] / wall, "score": metrics["score"], "success": metrics["success"]}}


def show(rows: dict[str, Any]) -> None:
    table = Table("", "copies", "control steps/s", "the first is … times faster", title="rollouts, coverage included")
    for name, r in rows.items():
        table.add_row(name, str(r["copies"]), f"{r['steps_per_s']:,.0f}", f"{r['ratio']:.1f}" if "ratio" in r else "")
    console.print(table)
    for name, r in rows.items():
        if "shares" in r:
            shares = ", ".join(f"{k} {v:.0%}" for k, v in r["shares"].items())
            console.print(f"{name} in {r['wall_s']:.1f} s ({r['cpu_s']:.1f} CPU-s): {shares}", highlight=False)


def headline(rows: dict[str, Any]) -> str:
    first = rows["Push-T: BatchEnv, chunks of 8, 2 threads"]
    against = {"AsyncVectorEnv": "Push-T: gymnasium AsyncVectorEnv of TaskEnv", "gym-pusht": "Push-T: gym-pusht (pymunk)"}
    said = [f"{rows[row]['ratio']:.1f}x {name}" for name, row in against.items() if row in rows]
    return f"Push-T {first['steps_per_s']:,.0f} control steps/s, {', '.join(said)}"

"""Control steps per second of every way to step Push-T, coverage included; and where the seconds of a whole evaluation go (bench_evaluate).

Blocks of all rows alternate, so that each sees the same machine; a figure is the median block's. Per CPU-second counts every process, and
holds on a busy machine too. Actions are random targets held for five steps.
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
import mujoco
import mujoco.rollout
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table

from envs.batch import BatchEnv
from envs.copies import Copies
from envs.pusht import PushT
from envs.task import Task, TaskEnv
from policy.train.log import bar, console
from scripts import bench_evaluate

CHUNK, BLOCK, FEW = 8, 40, 8  # steps of a chunk; control steps of a block; copies of what is stepped one by one
TASK = partial(PushT, obs="state", success_coverage=2.0, max_steps=10**9)  # no episode ends, so every row steps as often
OURS, ASYNC, PYMUNK = "BatchEnv, chunks of 8, 2 threads", "gymnasium AsyncVectorEnv of TaskEnv", "gym-pusht (pymunk)"
Block = Callable[[], float]  # resets, steps a block, and says in how many seconds
Way = tuple[int, Any, Callable[[Any, np.ndarray], Block]]  # copies, environment, what steps it


def held(low: np.ndarray, high: np.ndarray, n: int, t: int, seed: int = 0) -> np.ndarray:
    """Random actions (n, t, d), each held for five steps."""
    return np.random.default_rng(seed).uniform(low, high, (n, -(-t // 5), len(low))).repeat(5, axis=1)[:, :t]


def chunked(envs: Any, actions: np.ndarray) -> Block:
    def block() -> float:
        envs.reset(seed=0)
        tick = time.perf_counter()
        for k in range(0, actions.shape[1], CHUNK):
            envs.step_chunk(actions[:, k: k + CHUNK])
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


class Bare:
    """mujoco.rollout: the same physics, no observation, no coverage."""

    def __init__(self, task: Task, n: int, threads: int):
        self.task, self.n, self.action_space = task, n, task.action_space
        self.pool, self.data = mujoco.rollout.Rollout(nthread=threads), [mujoco.MjData(task.model) for _ in range(threads)]

    def reset(self, *, seed: int) -> None:
        data, full = self.data[0], mujoco.mjtState.mjSTATE_FULLPHYSICS
        self.state = np.empty((self.n, mujoco.mj_stateSize(self.task.model, full)))
        for i in range(self.n):
            start = self.task.reset(seed + i)
            mujoco.mj_resetData(self.task.model, data)
            data.qpos[:], data.qvel[:] = start.qpos, start.qvel
            mujoco.mj_getState(self.task.model, data, self.state[i], full)

    def step_chunk(self, actions: np.ndarray) -> None:
        ctrl = self.task.control(actions).repeat(self.task.substeps, axis=1)
        self.state = self.pool.rollout(self.task.model, self.data, self.state, ctrl)[0][:, -1].copy()

    def close(self) -> None:
        self.pool.close()


def single() -> TaskEnv:
    return TaskEnv(TASK())


def pymunk() -> gymnasium.Env:
    """gym-pusht's own environment, which measures coverage in every step."""
    from gym_pusht.envs import PushTEnv
    return PushTEnv(obs_type="state")


def ways(n: int) -> dict[str, Way]:
    spawned: dict[str, Any] = {"context": "spawn", "autoreset_mode": AutoresetMode.NEXT_STEP}
    rows: dict[str, Way] = {
        OURS: (n, BatchEnv(TASK(), n, threads=2), chunked),
        "BatchEnv, chunks of 8, 1 thread": (n, BatchEnv(TASK(), n, threads=1), chunked),
        "BatchEnv, step by step, 2 threads": (n, BatchEnv(TASK(), n, threads=2), stepped),
        "mujoco.rollout, chunks of 8, 2 threads, physics alone": (n, Bare(TASK(), n, 2), chunked),
        "TaskEnv": (1, single(), stepped),
        "gymnasium SyncVectorEnv of TaskEnv": (FEW, SyncVectorEnv([single] * FEW), stepped),
        ASYNC: (FEW, AsyncVectorEnv([single] * FEW, **spawned), stepped),
        "Copies of TaskEnv, chunks of 8": (FEW, Copies(single, FEW), chunked),
    }
    if importlib.util.find_spec("gym_pusht"):
        rows |= {PYMUNK: (1, pymunk(), stepped),
                 "gymnasium AsyncVectorEnv of gym-pusht": (FEW, AsyncVectorEnv([pymunk] * FEW, **spawned), stepped),
                 "Copies of gym-pusht, chunks of 8": (FEW, Copies(pymunk, FEW), chunked)}
    else:
        console.print("gym-pusht is left out: pip install 'dipole[pymunk]'", highlight=False)
    if importlib.util.find_spec("mujoco_warp"):
        from envs.warp import WarpEnv
        rows["WarpEnv (mujoco_warp) on " + ("cuda" if torch.cuda.is_available() else "cpu")] = (n, WarpEnv(TASK(), n, arrays="numpy"), chunked)
    return rows


def measure(cfg: DictConfig) -> dict[str, Any]:
    """Rows of "push-t", of "tasks" and of "evaluations"; the last is empty when cfg.run holds no trained run."""
    warnings.filterwarnings("ignore", module="gymnasium")
    found: dict[str, Any] = {"push-t": throughput(ways(cfg.copies), cfg.blocks)}
    first = found["push-t"][OURS]
    for row in found["push-t"].values():  # how many times faster the first row is
        row["ratio"], row["cpu_ratio"] = (first[k] / row[k] for k in ("steps_per_s", "steps_per_cpu_s"))
    tasks = {name: instantiate(compose("collect", [f"env={name.split()[0]}", *name.split()[1:]]).env) for name in cfg.tasks}
    batches: dict[str, Way] = {k: (cfg.copies, BatchEnv(task, cfg.copies), chunked) for k, task in tasks.items()}
    found["tasks"] = throughput(batches, max(1, cfg.blocks // 3))
    if (Path(cfg.run) / "config.yaml").exists():
        found["evaluations"] = bench_evaluate.measure(cfg)
    else:
        console.print(f"{cfg.run} holds no trained run, so no evaluation is measured: dipole bench rollout run=outputs/pusht", highlight=False)
        found["evaluations"] = {}
    return found


def throughput(ways: dict[str, Way], blocks: int) -> dict[str, Any]:
    """{name: copies, steps_per_s (median block), steps_per_cpu_s (over all blocks), each block's}."""
    made: dict[str, Block] = {}
    for name, (n, envs, how) in ways.items():
        space = getattr(envs, "single_action_space", envs.action_space)
        made[name] = how(envs, held(space.low, space.high, n, BLOCK))
    rates: dict[str, list[float]] = {name: [] for name in made}
    spent = dict.fromkeys(made, 0.0)
    try:
        with bar() as progress:
            task = progress.add_task("rollout", total=len(made) * (blocks + 1), note="")
            for k in range(blocks + 1):
                for name, block in made.items():
                    cpu, tick = cpu_seconds(), time.perf_counter()
                    seconds = block()
                    if k:  # the first warms up
                        rates[name].append(ways[name][0] * BLOCK / seconds)
                        spent[name] += (cpu_seconds() - cpu) * seconds / (time.perf_counter() - tick)  # without the reset
                    progress.update(task, advance=1, note=name)
    finally:
        for _, envs, _ in ways.values():
            envs.close()
    return {name: {"copies": ways[name][0], "steps_per_s": statistics.median(rates[name]), "steps_per_cpu_s": ways[name][0] * BLOCK * blocks / spent[name],
                   "blocks": rates[name]} for name in made}


def cpu_seconds() -> float:
    """CPU-seconds of this process and of its living children, as far as the system tells (Linux does)."""
    total = time.process_time()
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text().split():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) / 100
            except OSError:
                continue
    return total


def show(rows: dict[str, Any]) -> None:
    table = Table("Push-T, coverage included", "copies", "steps/s", "the first is", "steps/CPU-s", "the first is", box=SIMPLE_HEAD, pad_edge=False)
    for name, r in rows["push-t"].items():
        table.add_row(name, str(r["copies"]), f"{r['steps_per_s']:,.0f}", f"{r['ratio']:.1f}x", f"{r['steps_per_cpu_s']:,.0f}", f"{r['cpu_ratio']:.1f}x")
    others = Table("other tasks, BatchEnv", "copies", "steps/s", "steps/CPU-s", box=SIMPLE_HEAD, pad_edge=False)
    for name, r in rows["tasks"].items():
        others.add_row(name, str(r["copies"]), f"{r['steps_per_s']:,.0f}", f"{r['steps_per_cpu_s']:,.0f}")
    console.print(table, others)
    bench_evaluate.show(rows["evaluations"])


def headline(rows: dict[str, Any]) -> str:
    found = rows["push-t"]
    said = [f"{found[row]['ratio']:.1f}x {name}" for name, row in {"AsyncVectorEnv": ASYNC, "gym-pusht": PYMUNK}.items() if row in found]
    return f"Push-T {found[OURS]['steps_per_s']:,.0f} control steps/s, {', '.join(said)}" + bench_evaluate.headline(rows["evaluations"])

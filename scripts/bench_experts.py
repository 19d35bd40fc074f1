"""`dipole bench experts`: how often each task's scripted expert succeeds, over distinct seeds and without noise, in one table."""
import importlib.util
import time
from typing import Any

from hydra import compose
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from envs.collect import attempts
from policy.stats import wilson
from policy.train.log import bar, console
from scripts.cli import missing

PACKAGES = {"metaworld": "metaworld", "fetch": "gymnasium_robotics", "pointmaze": "gymnasium_robotics", "aloha_transfer": "gym_aloha"}  # by env


def measure(cfg: DictConfig) -> dict[str, Any]:
    """{task: successes, episodes, interval, mean steps, CPU-seconds}; a task whose package is not here is told and left out."""
    rows: dict[str, Any] = {}
    with bar() as progress:
        bar_task = progress.add_task("experts", total=len(cfg.experts) * cfg.episodes, note="")
        for said in cfg.experts:
            name = said.split()[0]
            if (package := PACKAGES.get(name)) and not importlib.util.find_spec(package):
                console.print(f"{said}: left out, {package} is not installed: {missing(package) or f'pip install {package}'}", highlight=False)
                continue
            tick, lengths, failed = time.perf_counter(), [], []
            for seed, steps in attempts(instantiate(compose("collect", f"env={said}".split()).env), cfg.episodes, seed=cfg.seed):
                failed += [seed] * (steps is None)
                lengths += [steps] if steps is not None else []
                progress.advance(bar_task)
            won, n = len(lengths), len(lengths) + len(failed)
            rows[said] = {"success": won / n, "success_ci": list(wilson(won, n)), "episodes": n, "first_seed": cfg.seed, "failed": failed,
                          "steps": sum(lengths) / max(won, 1), "wall_s": time.perf_counter() - tick}
    return rows


def show(rows: dict[str, Any]) -> None:
    table = Table("task", "success", "95 % interval", "seeds", "steps to success", "wall, s", title="scripted experts, without noise")
    for said, r in rows.items():
        low, high = r["success_ci"]
        table.add_row(said, f"{r['success']:.1%}", f"[{low:.1%}, {high:.1%}]", str(r["episodes"]), f"{r['steps']:.0f}", f"{r['wall_s']:.0f}")
    console.print(table)


def headline(rows: dict[str, Any]) -> str:
    return "; ".join(f"{said.replace('env=', '', 1)} {r['success']:.1%}" for said, r in rows.items())

"""One checkpoint under many samplers, on the same seeds."""
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose
from omegaconf import DictConfig
from rich.table import Table as TextTable

from policy.control import Controller
from policy.rollout import evaluate
from policy.stats import bootstrap
from policy.train import checkpoint
from policy.train.log import console
from scripts import common


def measure(cfg: DictConfig) -> dict[str, Any]:
    """One checkpoint, many samplers, the same seeds: score with its interval, and the latency of a plan."""
    folder, rows = Path(cfg.run), {}
    trained = common.OmegaConf.load(folder / "config.yaml")
    planner, _ = checkpoint.load(folder, cfg.checkpoint)
    name, _, envs = common.make_envs(trained.env, cfg.episodes)
    for sampler in cfg.samplers:
        label, _, scheduler = sampler.partition(":")
        overrides = [f"sampler={label.split('-')[0]}"] + ([f"sampler.steps={label.split('-')[1]}"] if "-" in label else [])
        overrides += [f"sampler.fn.name={scheduler}"] if scheduler else []
        planner.set_sampler(**checkpoint.sampling(common.plain(compose("eval", [*overrides, "run=x"]).sampler)))
        torch.manual_seed(0)
        report = evaluate(Controller(planner, **trained.control), envs, cfg.episodes, cfg.seed, task=name).metrics()
        rows[sampler] = {k: v for k, v in report.items() if k not in ("per_episode", "seeds")} | {"scores": [e["score"] for e in report["per_episode"]]}
        console.print(f"{sampler}: {common.result_line(report)}", highlight=False)
    envs.close()
    first = np.array(rows[cfg.samplers[0]]["scores"])
    for row in rows.values():  # paired on seeds, so that the seeds' own spread falls out
        row["difference"], row["difference_ci"] = float((row["scores"] - first).mean()), list(bootstrap(row["scores"] - first))
    return rows


def show(rows: dict[str, Any]) -> None:
    table = TextTable("sampler-steps", "score", "95 % interval", "paired difference to the first", "success", "plan, ms",
                      title="one checkpoint, the same seeds")
    for k, r in rows.items():
        table.add_row(k, f"{r['score']:.3f}", interval(r["score_ci"]), f"{r['difference']:+.3f} {interval(r['difference_ci'])}", f"{r['success']:.0%}",
                      f"{r['plan_ms']['p50']:.0f}")
    console.print(table)


def interval(ci: list[float]) -> str:
    return f"[{ci[0]:.3f}, {ci[1]:.3f}]"


def headline(rows: dict[str, Any]) -> str:
    return "; ".join(f"{k} {v['score']:.3f}" for k, v in rows.items())

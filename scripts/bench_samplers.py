"""One checkpoint under many samplers, on the same seeds."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose
from omegaconf import DictConfig
from rich.table import Table as TextTable

from policy.control import Controller
from policy.planner import Planner
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
    settings = possible(planner, cfg.samplers)
    name, _, envs = common.make_envs(trained.env, cfg.episodes)
    for sampler, setting in settings.items():
        planner.set_sampler(**setting)
        torch.manual_seed(0)
        report = evaluate(Controller(planner, **trained.control), envs, cfg.episodes, cfg.seed, task=name).metrics()
        rows[sampler] = {k: v for k, v in report.items() if k not in ("per_episode", "seeds")} | {"scores": [e["score"] for e in report["per_episode"]]}
        console.print(f"{sampler}: {common.result_line(report)}", highlight=False)
    envs.close()
    first = np.array(next(iter(rows.values()))["scores"])
    for row in rows.values():  # paired on seeds, so that the seeds' own spread falls out
        row["difference"], row["difference_ci"] = float((row["scores"] - first).mean()), list(bootstrap(row["scores"] - first))
    return rows


def possible(planner: Planner, samplers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What set_sampler takes for each of samplers that planner's path allows, known before the first rollout; the others are named with the reason."""
    found = {}
    for sampler in samplers:
        label, _, scheduler = sampler.partition(":")
        overrides = [f"sampler={label.split('-')[0]}"] + ([f"sampler.steps={label.split('-')[1]}"] if "-" in label else [])
        overrides += [f"sampler.fn.name={scheduler}"] if scheduler else []
        setting = checkpoint.sampling(common.plain(compose("eval", [*overrides, "run=x"]).sampler))
        try:
            planner.set_sampler(**setting)
        except ValueError as e:
            console.print(f"{sampler} is left out: {e}", highlight=False, soft_wrap=True, markup=False)
        else:
            found[sampler] = setting
    if not found:
        raise ValueError("none of the samplers fits this policy")
    return found


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

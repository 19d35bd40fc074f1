"""`dipole bench family`: every formalism and backbone on one data set at one budget: score, network calls, latency of a plan, likelihood.

The rows are the suite's (scripts/suite.py), so the same command goes on where it stopped. Latencies are measured at the end, all rows in turn.
"""
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from policy.planner import Planner
from policy.stats import bootstrap
from policy.train import checkpoint
from policy.train.log import bar
from scripts import common, family_page, suite

Facts = dict[str, Any]
show, headline = family_page.show, family_page.headline


def measure(cfg: DictConfig) -> Facts:
    """Fill the table as far as it is not filled yet, and return it."""
    family, folder = cfg.family, Path(cfg.run) / "family"
    rows = {name: {"cpu_s": family.cpu_s, "data": family.data, **filled(row, family)} for name, row in common.plain(family.rows).items()}
    told = OmegaConf.merge(cfg, {"rows": None})
    told.rows = rows
    assert isinstance(told, DictConfig)

    def write(folder: Path, found: Facts) -> None:
        family_page.write(folder, known(found, folder, cfg))

    found = suite.measure(told, "family", write)
    try:
        latency(found, folder, cfg)
    finally:
        family_page.write(folder, known(found, folder, cfg))
    return known(found, folder, cfg)


def filled(row: Facts, family: DictConfig) -> Facts:
    """A row of conf/family.yaml as one of the suite."""
    row = {**row, "eval": [*family.eval, *row.get("eval", [])]}
    if row.pop("likelihood", False):
        row["after"] = [list(family.likelihood)]
    if "of" not in row and "teacher" not in row:
        row["train"] = [*family.train, *row.get("train", [])]
    return row


def known(found: Facts, folder: Path, cfg: DictConfig) -> Facts:
    """The suite's rows with what this table says besides: calls, paired difference to the first, nats, latency, backbone."""
    times = suite.read(folder / "latency.json") or {}
    first = {c["seed"]: c for c in found.get(cfg.family.first, {}).get("cells", []) if c["status"] == "done"}
    for name, row in found.items():
        done = [c for c in row["cells"] if c["status"] == "done"]
        row["plan_ms"], row["net"] = times.get(name), next((w.removeprefix("net=") for w in row["recipe"].split() if w.startswith("net=")), "unet1d")
        if not done:
            continue
        metrics = {c["seed"]: suite.read(folder / name / f"seed{c['seed']}" / "eval" / "suite" / "metrics.json") or {} for c in done}
        row["calls"] = next(iter(metrics.values())).get("calls")
        nats = [n for c in done if (n := suite.read(folder / name / f"seed{c['seed']}" / "eval" / "likelihood" / "likelihood.json"))]
        row["nats"] = nats[0] if nats else None
        both = [(metrics[s], suite.read(folder / cfg.family.first / f"seed{s}" / "eval" / "suite" / "metrics.json") or {}) for s in metrics if s in first]
        pairs = [scores(a) - scores(b) for a, b in both if scores(a).shape == scores(b).shape]
        if pairs and name != cfg.family.first:
            row["difference"], row["difference_ci"] = float(np.concatenate(pairs).mean()), list(bootstrap(np.concatenate(pairs)))
    return found


def scores(metrics: Facts) -> np.ndarray:
    return np.array([e["score"] for e in metrics.get("per_episode", [])], float)


def latency(found: Facts, folder: Path, cfg: DictConfig) -> None:
    """Median milliseconds of one plan for one robot on one thread, every row in turn, `rounds` times, in <folder>/latency.json."""
    planners = {}
    for name, row in found.items():
        done = [c for c in row["cells"] if c["status"] == "done"]
        if done:
            planners[name] = evaluated(folder / name / f"seed{done[0]['seed']}" / "eval" / "suite")
    times: dict[str, list[float]] = {name: [] for name in planners}
    with bar() as progress, torch.inference_mode():
        task = progress.add_task("latency", total=cfg.rounds, note="one plan of every row in turn")
        for _ in range(cfg.rounds):
            for name, planner in planners.items():
                obs = {k: torch.zeros(1, planner.spec.t_obs, *s) for k, s in planner.spec.obs.items()}
                tick = time.perf_counter()
                planner.plan(obs)
                times[name].append(1e3 * (time.perf_counter() - tick))
            progress.advance(task)
    suite.note(folder / "latency.json", {name: statistics.median(t) for name, t in times.items()})


def evaluated(folder: Path) -> Planner:
    """The planner of an evaluation, with the sampler it was evaluated with."""
    about, cfg = suite.read(folder / "metrics.json") or {}, OmegaConf.load(folder / "config.yaml")
    planner, _ = checkpoint.load(about["run"], about["checkpoint"])
    planner.set_sampler(**checkpoint.sampling(common.plain(cfg.sampler)))
    return planner

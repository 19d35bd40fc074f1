"""Measure beside a baseline in one run, or fill a table: dipole bench train, samplers, rollout, suite, family, modes, seams, deploy, data, experts."""
import importlib
import json
import os
import platform
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

from policy.train import checkpoint
from policy.train.log import console
from scripts.cli import words_to_overrides
from scripts.verb import verb

# Each has measure(cfg) -> rows, show(rows) and headline(rows), page(cfg) where it writes one, and is imported when it is asked for.
BENCHES = {"train": "scripts.bench_train", "samplers": "scripts.bench_samplers", "rollout": "scripts.bench_rollout", "suite": "scripts.suite",
           "family": "scripts.bench_family", "modes": "scripts.bench_modes",
           "seams": "scripts.bench_seams", "deploy": "scripts.bench_deploy",
           "experts": "scripts.bench_experts", "data": "scripts.bench_data"}


@verb("bench")
def main(cfg: DictConfig) -> None:
    if cfg.do not in BENCHES:
        raise ValueError(f"dipole bench {cfg.do} is unknown; use one of: {', '.join(f'dipole bench {b}' for b in BENCHES)}")
    torch.set_num_threads(cfg.threads)
    bench = importlib.import_module(BENCHES[cfg.do])
    rows = bench.measure(cfg)
    bench.show(rows)
    out = Path(cfg.run) / "bench" / f"{cfg.do}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg(), "threads": cfg.threads, "versions": checkpoint.versions()}
    out.write_text(json.dumps({"rows": rows, "machine": machine, "command": " ".join(sys.argv)}, indent=1))
    where = bench.page(cfg) if hasattr(bench, "page") else out  # what is worth opening
    console.print(f"[bold]{bench.headline(rows)}[/]: {where}", highlight=False, soft_wrap=True)


def cpu_name() -> str:
    try:
        return next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

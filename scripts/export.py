"""Export a trained planner for robot computers, compared and timed: dipole export run=outputs/gantry format=onnx."""
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from policy.serve.artifact import load
from policy.serve.backend import PlannerBackend
from policy.serve.card import Backend
from policy.serve.export import export, write_card
from policy.serve.fastplan import FastPlan
from policy.serve.measure import PARITY, SENSITIVE, parity, race
from policy.train.log import console
from scripts import common, datasets
from scripts.cli import words_to_overrides
from scripts.export_page import show, write_page
from scripts.policies import policy_of
from scripts.verb import verb

FREE = {"run", "format", "checkpoint", "precision", "out", "observations", "rounds", "sampler", "guide", "control", "trust", "threads", "data", "robot"}
Rows = dict[str, dict[str, Any]]


def observations(cfg: DictConfig, policy: PlannerBackend) -> tuple[list[dict[str, np.ndarray]], str]:
    """cfg.observations histories {key: (t_obs, *shape)} and where they come from."""
    n, rng = cfg.observations, np.random.default_rng(0)
    planner, spec = policy.planner, policy.planner.spec
    with suppress(FileNotFoundError, MissingMandatoryValue):  # the data may lie on another computer
        data = datasets.dataset(cfg, "val", torch.device("cpu"))
        batch = data.batch(torch.from_numpy(np.linspace(0, len(data) - 1, n).round().astype(np.int64)))
        return [{k: v[i].numpy() for k, v in batch.obs.items()} for i in range(n)], f"held-out observations of {cfg.data.path}"
    made = []
    for _ in range(n):
        unit = {k: torch.from_numpy(rng.uniform(-1, 1, (1, spec.t_obs, *size)).astype(np.float32)) for k, size in planner.transform.sizes(spec.obs).items()}
        made.append({k: v[0].numpy() for k, v in planner.decode_obs(unit).items()})
    return made, "random observations within the range of the training data"


def compared(policy: PlannerBackend, backend: Backend, seen: Sequence[dict[str, np.ndarray]], source: str, *, refuse: bool) -> dict[str, Any]:
    """The parity report. ValueError where the export plans otherwise than the planner and that is to be refused."""
    merges = parity(policy, backend, seen, draws=backend.card.facts["solver"]["draws"])
    worst = max(max(one.normalised) for one in merges.values())
    if refuse and any(one.excess > 1 for one in merges.values()):
        each = ", ".join(f"{merge} {max(one.normalised):.1e}" for merge, one in merges.items())
        raise ValueError(f"the export does not plan as the planner does: actions differ by up to {worst:.1e} of half their range ({each}), more than "
                         f"{PARITY:.0e} and than {SENSITIVE} times the planner's own rounding, so nothing was written. Please report this, with the run's "
                         "config.yaml")
    return {"observations": f"{len(seen)} {source}", "worst": worst, "merges": {merge: one.to_json() for merge, one in merges.items()}}


def latency(policy: PlannerBackend, backend: Backend, seen: Sequence[dict[str, np.ndarray]], rounds: int) -> Rows:
    """One plan of the planner itself, of FastPlan and of the export, in turns."""
    kind, fast = str(backend.card.facts["format"]), FastPlan(policy)
    ways: dict[str, Backend] = {"eager": policy}
    if kind != "torch" and not fast.lacks:
        ways["FastPlan"] = fast
    ways[kind] = backend
    noise = np.random.default_rng(1).standard_normal(policy.card.noise_size, np.float32)
    return race({name: lambda way=way: way.plan(seen[0], noise=noise) for name, way in ways.items()}, rounds=rounds)  # type: ignore[misc]


@verb("export", of_run=("sampler", "guide", "control"))
def main(cfg: DictConfig) -> dict[str, Any]:
    if cfg.do or not cfg.run:
        raise ValueError(f"dipole export {cfg.do} is unknown; settings are written key=value" if cfg.do else
                         "which run? Name its folder: dipole export run=FOLDER format=onnx")
    if wrong := sorted({common.key_of(o) for o in common.overrides()} - FREE):
        raise ValueError(f"{', '.join(wrong)} cannot change in an export. What can: {', '.join(sorted(FREE))}")
    common.whole(1, observations=cfg.observations, rounds=cfg.rounds, threads=cfg.threads)
    folder = Path(cfg.run)
    cfg = common.of_run(cfg, folder)
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out) if cfg.out else folder / "export" / cfg.format
    policy, config = policy_of(cfg, folder, command=common.command())
    with replaced(out) as part:
        card = export(policy, config, part, format=cfg.format, precision=cfg.precision)
        backend = load(part, threads=cfg.threads, trust=list(cfg.trust))
        seen, source = observations(cfg, policy)
        found = compared(policy, backend, seen, source, refuse=cfg.precision == "fp32")
        card = replace(card, facts={**card.facts, "parity": found, "threads": cfg.threads, "latency": latency(policy, backend, seen, cfg.rounds)})
        write_card(part, card)
        write_page(part, card)
    show(card)
    first, *_, last = card.facts["latency"].values()
    console.print(f"[bold]{cfg.format}, {cfg.precision}: one plan {last['cpu_ms']:.1f} ms, {first['cpu_ms'] / last['cpu_ms']:.1f} times faster than eager; "
                  f"differences up to {found['worst']:.1e}[/]: {out}\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return {"folder": str(out), "worst": found["worst"], "plan_ms": last["cpu_ms"]}


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well; on any failure what was there stays. FileExistsError when that is no export."""
    if out.exists() and not (out.is_dir() and ((out / "card.json").exists() or not any(out.iterdir()))):
        raise FileExistsError(f"{out} holds something that is no export: name another folder, out=…")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        shutil.rmtree(out, ignore_errors=True)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

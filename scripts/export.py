"""Export a trained planner for robot computers, compared and timed: dipole export run=outputs/gantry format=onnx."""
import math
import shlex
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
from rich.markup import escape

from policy.serve.artifact import load, write_card
from policy.serve.backend import PlannerBackend
from policy.serve.card import Backend
from policy.serve.export import export
from policy.serve.fastplan import FastPlan
from policy.serve.measure import PARITY, SENSITIVE, parity, race, random_observations
from policy.train.log import console
from scripts import common, datasets, settings
from scripts.cli import words_to_overrides
from scripts.export_page import show, write_page
from scripts.policies import policy_of
from scripts.verb import verb

FREE = {"run", "format", "checkpoint", "precision", "accept", "out", "overwrite", "observations", "rounds", "sampler", "guide", "control", "trust", "threads",
        "data", "robot"}
Rows = dict[str, dict[str, Any]]


def observations(cfg: DictConfig, policy: PlannerBackend) -> tuple[list[dict[str, np.ndarray]], str]:
    """cfg.observations histories {key: (t_obs, *shape)} and where they come from."""
    n = cfg.observations
    with suppress(FileNotFoundError, MissingMandatoryValue):  # the data may lie on another computer
        data = datasets.dataset(cfg, "val", torch.device("cpu"))
        batch = data.batch(torch.from_numpy(np.linspace(0, len(data) - 1, n).round().astype(np.int64)))
        return [{k: v[i].numpy() for k, v in batch.obs.items()} for i in range(n)], f"held-out observations of {cfg.data.path}"
    return random_observations(policy.planner, n), "random observations within the range of the training data"


def compared(policy: PlannerBackend, backend: Backend, seen: Sequence[dict[str, np.ndarray]], source: str, accept: float | None) -> dict[str, Any]:
    """The parity report. ValueError where the export plans otherwise than the planner by more than is accepted, rounding where that is None."""
    merges = parity(policy, backend, seen, draws=backend.card.facts["solver"]["draws"])
    worst, precision = max(max(one.normalised) for one in merges.values()), backend.card.facts["precision"]
    if worst > accept if accept else any(one.excess > 1 for one in merges.values()):
        each = ", ".join(f"{merge} {max(one.normalised):.1e}" for merge, one in merges.items())
        said = f"actions differ from the planner's by up to {worst:.1e} of half their range ({each})"
        if precision != "fp32" or accept:
            raise ValueError(f"precision={precision}: {said}, more than {f'accept={accept}' if accept else f'{PARITY:.0e}'}, so nothing was written. "
                             f"Where a robot may differ so much, say it: accept={above(worst):g}; else precision=fp32")
        raise ValueError(f"the export does not plan as the planner does: {said}, more than {PARITY:.0e} and than {SENSITIVE} times the planner's own rounding, "
                         "so nothing was written. Please report this, with the run's config.yaml")
    return {"observations": f"{len(seen)} {source}", "worst": worst, "accept": accept, "merges": {merge: one.to_json() for merge, one in merges.items()}}


def above(x: float) -> float:
    """The next number of one digit: .12 -> .2."""
    digit = 10.0 ** math.floor(math.log10(x))
    return math.ceil(x / digit) * digit


def latency(policy: PlannerBackend, backend: Backend, exact: Backend | None, seen: Sequence[dict[str, np.ndarray]], rounds: int) -> Rows:
    """One plan of the planner itself, of FastPlan and of the export in turns, and of the export in fp32 (exact) where it is not."""
    kind, fast, advised = str(backend.card.facts["format"]), FastPlan(policy), (policy.card.facts.get("control") or {}).get("merge")
    noise = np.random.default_rng(1).standard_normal(policy.card.noise_size, np.float32)
    ways: dict[str, Backend] = {"eager": policy}
    if kind != "torch" and not fast.lacks:
        ways["FastPlan"] = fast
    if exact is not None:
        ways[f"{kind}, fp32"] = exact
    ways[kind] = backend
    plans: dict[str, Any] = {name: lambda way=way: way.plan(seen[0], noise=noise) for name, way in ways.items()}
    if advised == "guided":  # two or three times the work
        told = {"prefix": policy.plan(seen[0], noise=noise), "committed": 1, "merge": advised}
        plans |= {f"{name}, {advised}": lambda way=way: way.plan(seen[0], noise=noise, **told) for name, way in ways.items() if name in ("eager", kind)}
    return race(plans, rounds=rounds)


def check(cfg: DictConfig) -> None:
    """ValueError when cfg is no export's."""
    if cfg.do or not cfg.run:
        raise ValueError(f"dipole export {cfg.do} is unknown; settings are written key=value" if cfg.do else
                         "which run? Name its folder: dipole export run=FOLDER format=onnx")
    if wrong := sorted({settings.key_of(o) for o in settings.overrides()} - FREE):
        raise ValueError(f"{', '.join(wrong)} cannot change in an export. What can: {', '.join(sorted(FREE))}")
    settings.whole(1, observations=cfg.observations, rounds=cfg.rounds, threads=cfg.threads)
    settings.truth(overwrite=cfg.overwrite)
    settings.number(0, accept=cfg.accept or 0)


@verb("export", of_run=("sampler", "guide", "control"))
def main(cfg: DictConfig) -> dict[str, Any]:
    check(cfg)
    folder = Path(cfg.run)
    cfg = common.of_run(cfg, folder)
    torch.set_num_threads(cfg.threads)
    out = Path(cfg.out) if cfg.out else folder / "export" / (cfg.format if cfg.precision == "fp32" else f"{cfg.format}-{cfg.precision}")
    with replaced(out, cfg.overwrite) as part:
        policy, config = policy_of(cfg, folder, command=settings.command())
        card = export(policy, config, part, format=cfg.format, precision=cfg.precision)
        opened = {"threads": cfg.threads, "trust": list(cfg.trust)}
        backend, exact = load(part, **opened), None if cfg.precision == "fp32" else load(part, precision="fp32", **opened)
        seen, source = observations(cfg, policy)
        found = compared(policy, backend, seen, source, cfg.accept)
        rows = latency(policy, backend, exact, seen, cfg.rounds)
        card = replace(card, facts={**card.facts, "parity": found, "threads": cfg.threads, "latency": rows})
        write_card(part, card)
        write_page(part, card)
    show(card)
    first, own = rows["eager"]["cpu_ms"], rows[cfg.format]["cpu_ms"]
    for merge, why in card.facts["without"].items():
        console.print(f"[yellow]merge={merge} is left out[/]: {escape(why)}; format=torch has it", highlight=False, soft_wrap=True)
    if exact is not None and own >= rows[f"{cfg.format}, fp32"]["cpu_ms"]:
        console.print(f"[yellow]{cfg.precision} is no quicker than fp32 on this computer[/]: {own:.1f} and {rows[f'{cfg.format}, fp32']['cpu_ms']:.1f} ms",
                      highlight=False, soft_wrap=True)
    console.print(f"[bold]{cfg.format}, {cfg.precision}: one plan {own:.1f} ms, {first / own:.1f} times faster than eager; differences up to "
                  f"{found['worst']:.1e}[/]: {out}\nserve it: dipole serve {shlex.quote(f'artifact={out}')}\nreport: {out / 'report.html'}",
                  highlight=False, soft_wrap=True)
    return {"folder": str(out), "worst": found["worst"], "plan_ms": own}


@contextmanager
def replaced(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well; on any failure what was there stays. FileExistsError when that is not to be replaced."""
    part, old = (out.with_name(f".{out.name}.{name}") for name in ("part", "old"))
    if old.exists() and not out.exists():  # killed between the two renames below
        old.replace(out)
    if out.exists() and not (out.is_dir() and ((out / "card.json").exists() or not any(out.iterdir()))):
        raise FileExistsError(f"{out} holds something that is no export: name another folder, out=…")
    if (out / "card.json").exists() and not overwrite:
        raise FileExistsError(f"{out} already holds an export: replace it with overwrite=true, or name another folder, out=…")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.replace(old)
        try:
            part.replace(out)
        except OSError:
            old.replace(out)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

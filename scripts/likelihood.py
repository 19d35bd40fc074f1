"""`dipole eval likelihood run=…`: held-out demonstrations in nats, and how well strange observations are told apart."""
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from policy import ood, stats
from policy.data.windows import TrajectoryDataset
from policy.diffusion.likelihood import levels, log_likelihood, variational_bound
from policy.planner import Planner
from policy.train import checkpoint
from policy.train.log import bar, console
from policy.types import Batch, Obs
from scripts import common, datasets
from scripts.likelihood_page import write_page

AT_ONCE = 64  # windows
GOLDEN = (math.sqrt(5) - 1) / 2


def likelihood(cfg: DictConfig, folder: Path, out: Path) -> dict[str, Any]:
    """Write likelihood.json and report.html into out: exact and bounded likelihood of both splits, AUROCs of both out-of-distribution scores."""
    torch.set_num_threads(cfg.threads)
    device, wanted = checkpoint.pick_device(cfg.device), cfg.likelihood
    for key in ("windows", "scored"):
        if not isinstance(wanted[key], int) or wanted[key] < 1:
            raise ValueError(f"likelihood.{key}={wanted[key]!r} must be a whole number from 1")
    planner, facts = checkpoint.load(folder, cfg.checkpoint, device=str(device), trust=list(cfg.trust))
    planner.set_sampler(**checkpoint.sampling(common.plain(cfg.sampler), list(cfg.trust)))
    planner.set_guides(checkpoint.guides(common.plain(cfg.guide), list(cfg.trust)))
    ood.refuse(planner)
    floor = levels(planner.denoiser.path, wanted.floor, wanted.steps)[0]
    torch.manual_seed(cfg.seed)
    splits: dict[str, Any] = {}
    with bar() as progress, torch.no_grad():
        for split, name in (("val", "held out"), ("train", "training")):
            data = datasets.dataset(cfg, split, device)
            index, episodes = spread(data.whole(), wanted.windows, name, data.horizon)
            task = progress.add_task(f"likelihood, {name}", total=len(index), note="")
            splits[name] = nats(planner, data, index, episodes, wanted, functools.partial(progress.advance, task))
            if split == "val":
                rows = spread(data.whole(), wanted.scored, name, data.horizon)
                task = progress.add_task("strange observations", total=len(wanted.noise) + 3, note="")
                scored = scores(planner, data, *rows, wanted, functools.partial(progress.advance, task, 1))
    ones = torch.ones(1, *planner.size, device=device)
    scale = planner.normalizer.decode({"action": ones})["action"] - planner.normalizer.decode({"action": 0 * ones})["action"]
    physical = scale.double().log().mean().item() if planner.transform.volume else None  # a rotation in six numbers has no density of three
    found = {"task": planner.spec.task, "run": str(folder), "checkpoint": cfg.checkpoint, "step": facts["step"], "command": common.command(), "floor": floor,
             "dims": math.prod(planner.size), "steps": wanted.steps, "trace": wanted.trace, "draws": wanted.draws,
             "path": type(planner.denoiser.path).__name__, "splits": splits,
             **{kind: splits["held out"][kind]["mean"] for kind in ("exact", "bound")},
             "physical": {"unit": planner.spec.units.get("action", ""), "add_nats_per_dim": physical}, "ood": scored}
    common.save_json(out / "likelihood.json", found)
    page = write_page(out, found)
    console.print(f"[bold]{line(found)}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(out), **{f"{name} {kind}": s[kind]["mean"] for name, s in splits.items() for kind in ("exact", "bound")}}


def spread(whole: list[Tensor], n: int, name: str, horizon: int) -> tuple[Tensor, list[int]]:
    """About n windows, equally many of each episode and evenly spaced in it, and their episodes; of n episodes when there are more."""
    usable = [i for i, windows in enumerate(whole) if len(windows)]
    if not usable:
        raise ValueError(f"no episode of those {name} is as long as a plan, {horizon} steps: hold out more (data.val_ratio) or longer ones")
    usable = [usable[i * len(usable) // min(n, len(usable))] for i in range(min(n, len(usable)))]
    parts, episodes = [], []
    for j, i in enumerate(usable):
        k = min(len(whole[i]), math.ceil(n / len(usable)))
        offset = (j * GOLDEN + 0.5) % 1  # or one window each would be its episode's beginning
        parts.append(whole[i][((torch.arange(k) + offset) * len(whole[i]) / k).long()])
        episodes += [i] * k
    return torch.cat(parts), episodes


def nats(planner: Planner, data: TrajectoryDataset, index: Tensor, episodes: list[int], wanted: DictConfig, advance: Callable[[int], object]) -> dict[str, Any]:
    """{exact, bound: mean, 95 % interval over episodes, every window}: -log p(actions | observation) in nats per dimension."""
    path, n = planner.denoiser.path, math.prod(planner.size)
    every: dict[str, list[Tensor]] = {"exact": [], "bound": []}
    for rows in index.split(AT_ONCE):
        batch: Batch = data.batch(rows)
        cond, x0 = planner.encode(batch.obs), planner.encode_actions(batch.action, batch.obs, batch.valid)
        every["exact"].append(-log_likelihood(planner.denoiser, path, x0, cond, floor=wanted.floor, steps=wanted.steps, trace=wanted.trace) / n)
        every["bound"].append(variational_bound(planner.denoiser, path, x0, cond, floor=wanted.floor, draws=wanted.draws) / n)
        advance(len(rows))
    out: dict[str, Any] = {"windows": len(index), "episodes": len(set(episodes))}
    for kind, parts in every.items():
        values = torch.cat(parts).double().cpu().numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"the {kind} likelihood is not finite: this network's answers leave its training range. Try a larger likelihood.floor")
        out[kind] = {"mean": float(values.mean()), "ci": over_episodes(values, episodes), "per_window": values.tolist()}
    return out


def over_episodes(values: np.ndarray, episodes: list[int]) -> list[float] | None:
    """95 % interval of the mean, resampling episodes: windows of one are alike. None for a single episode."""
    means = [values[np.asarray(episodes) == e].mean() for e in dict.fromkeys(episodes)]
    return list(stats.bootstrap(means)) if len(means) > 1 else None


def scores(planner: Planner, data: TrajectoryDataset, index: Tensor, episodes: list[int], wanted: DictConfig, advance: Callable[[], object]) -> dict[str, Any]:
    """AUROC of held-out observations against the same ones perturbed, by both scores."""
    obs = data.batch(index).obs
    changes: dict[str, ood.Perturb] = {f"noise {std:g}": ood.noisy(planner, std) for std in wanted.noise}
    changes[f"shift {wanted.shift:g}"] = ood.shifted(planner, wanted.shift)
    if len(set(episodes)) > 1 and len(obs) > 1:
        changes["keys of two episodes"] = ood.mixed(episodes)

    def judge(seen: Obs) -> dict[str, np.ndarray]:
        rows = [{k: x[i:i + AT_ONCE] for k, x in seen.items()} for i in range(0, len(index), AT_ONCE)]
        advance()
        return {kind: torch.cat([ood.ood_score(planner, part, kind) for part in rows]).double().cpu().numpy() for kind in ood.KINDS}

    clean = judge(obs)
    found: list[dict[str, Any]] = []
    for name, change in changes.items():
        strange = judge(change(obs))
        found.append({"change": name, **{kind: {"auroc": ood.auroc(clean[kind], strange[kind]),
                                                "ci": ood.auroc_interval(clean[kind], strange[kind], episodes)} for kind in ood.KINDS}})
    means = {kind: float(np.mean([row[kind]["auroc"] for row in found])) for kind in ood.KINDS}
    return {"windows": len(index), "episodes": len(set(episodes)), "changes": found, "mean": means}


def line(found: dict[str, Any]) -> str:
    said = []
    for name, split in found["splits"].items():
        exact = split["exact"]
        said.append(f"{exact['mean']:.3f}" + ("" if exact["ci"] is None else " [{:.3f}, {:.3f}]".format(*exact["ci"])) + f" {name}")
    aurocs = ", ".join(f"{kind} {found['ood']['mean'][kind]:.2f}" for kind in ood.KINDS)
    return f"{found['task'] or 'policy'}: -log p in nats/dim {', '.join(said)}; AUROC of strange observations {aurocs}"

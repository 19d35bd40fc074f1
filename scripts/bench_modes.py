"""`dipole bench modes`: two equally good ways round a pillar. Does a policy keep both, or take their mean into the pillar?

Every row is trained on the same demonstrations, of which half pass left; then plans are drawn where the cube has just been lifted and nothing yet
says which way. The picture shows them being denoised.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from envs.gantry import PILLAR, Gantry, GantryExpert
from envs.task import TaskEnv
from policy.planner import Planner
from policy.stats import wilson
from policy.train.log import console
from policy.types import Cond
from scripts import common, suite
from scripts.bench_family import evaluated

Facts = dict[str, Any]


def measure(cfg: DictConfig) -> Facts:
    """Train what is not trained yet, draw plans, count sides: {row: left, right, through, success}, in <run>/modes."""
    modes, folder = cfg.modes, Path(cfg.run) / "modes"
    with suite.locked(folder, lambda: None) as lock:
        demos = folder / "demos.zarr"
        suite.stage(folder / "collect", ["collect", *modes.collect, f"path='{demos}'"], lock, unfinished=demos, watch=lambda: None, label="demonstrations")
    rows = {}
    for name, row in common.plain(modes.rows).items():
        own = [] if row.get("of") or row.get("teacher") else [*modes.train, f"data.path='{demos}'"]
        rows[name] = {"cpu_s": modes.cpu_s, **row, "train": [*own, *row.get("train", [])]}
    told = OmegaConf.merge(cfg, {"rows": None})
    told.rows = rows
    assert isinstance(told, DictConfig)
    found = suite.measure(told, "modes")
    scenes = [decision(modes.seed + i) for i in range(modes.scenes)]
    drawn: dict[str, list[tuple[float, np.ndarray]]] = {}
    for name, row in found.items():
        done = [c for c in row["cells"] if c["status"] == "done"]
        if not done:
            continue
        planner = evaluated(folder / name / f"seed{done[0]['seed']}" / "eval" / "suite")
        torch.manual_seed(0)
        each = [sides(plans_at(planner, obs, modes.plans // modes.scenes), obs) for obs in scenes]
        left, right, through = (int(sum(s[i] for s in each)) for i in range(3))
        row |= {"left": left, "right": right, "through": through, "scenes": [list(s) for s in each]}
        if name in modes.drawn:
            drawn[name] = chain(planner, scenes[0], 60)
    suite.note(folder / "modes.json", found)
    picture(folder / "denoising.png", drawn, scenes[0])
    return found


def decision(seed: int, t_obs: int = 2) -> dict[str, torch.Tensor]:
    """The observations {key: (1, t_obs, *shape)} at which the expert has lifted the cube straight up and is about to carry it."""
    env = TaskEnv(Gantry(pillar=True))
    obs, _ = env.reset(seed=seed)
    expert = GantryExpert(env.task, 1, seed)  # type: ignore[arg-type]
    seen = [obs]
    while not (obs["opening"][0] < 0.052 and obs["hand"][2] > 0.075):
        if len(seen) > 90:
            raise RuntimeError(f"the expert has not lifted the cube of seed {seed}")
        obs = env.step(expert.act({k: v[None] for k, v in obs.items()})[0])[0]
        seen.append(obs)
    return {k: torch.from_numpy(np.stack([o[k] for o in seen[-t_obs:]]))[None] for k in obs}


@torch.inference_mode()
def plans_at(planner: Planner, obs: dict[str, torch.Tensor], n: int) -> np.ndarray:
    """n plans (n,t,4) [m] for one observation."""
    return planner.plan({k: v.expand(n, *v.shape[1:]) for k, v in obs.items()}).numpy()


def sides(plans: np.ndarray, obs: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    """How many plans pass the pillar left, right, and through it: nearer to its middle than its radius and the cube's half edge, or never past it."""
    pillar, goal = obs["pillar"][0, -1].numpy(), obs["goal"][0, -1].numpy()
    ahead = (goal - pillar) / np.linalg.norm(goal - pillar)
    xy = plans[..., :2] - pillar
    offset = xy @ np.array([-ahead[1], ahead[0]])
    at = np.abs(xy @ ahead).argmin(1)[:, None]  # the step nearest to the line across
    near = np.linalg.norm(xy, axis=-1).min(1) < PILLAR + 0.02
    side = np.take_along_axis(offset, at, 1)[:, 0]
    return int((~near & (side > 0)).sum()), int((~near & (side < 0)).sum()), int(near.sum())


@torch.inference_mode()
def chain(planner: Planner, obs: dict[str, torch.Tensor], n: int) -> list[tuple[float, np.ndarray]]:
    """(sigma / alpha, plans (n,t,2) [m]) at every network call and at the end; noisy ones scaled to unit variance."""
    seen: list[tuple[float, torch.Tensor]] = []
    torch.manual_seed(1)
    inner, path = planner.denoiser, planner.denoiser.path

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = path

        def forward(self, x: torch.Tensor, tau: torch.Tensor, cond: Cond | None) -> torch.Tensor:
            a, s = path.at(tau, x)
            seen.append(((s / a.clamp_min(1e-3)).flatten()[0].item(), x / (a**2 + s**2).sqrt()))
            return inner(x, tau, cond)

    planner.denoiser = Spy()  # type: ignore[assignment]
    try:
        final = plans_at(planner, obs, n)
    finally:
        planner.denoiser = inner
    seen_from = {k: v.expand(n, *v.shape[1:]) for k, v in obs.items()}
    decoded = [(ratio, planner.decode_actions(x, seen_from).numpy()[..., :2]) for ratio, x in seen]
    return [*decoded, (0.0, final[..., :2])]


def picture(path: Path, drawn: dict[str, list[tuple[float, np.ndarray]]], obs: dict[str, torch.Tensor],
            levels: Sequence[float] = (10, 0.8, 0.3, 0.1, 0)) -> None:
    """One row for each policy, noise on the left, plans on the right: the calls nearest to these ratios of sigma to alpha."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    pillar, goal, cube = (obs[k][0, -1].numpy()[:2] for k in ("pillar", "goal", "cube"))
    figure, axes = plt.subplots(len(drawn), len(levels), figsize=(2 * len(levels), 2.1 * len(drawn)), squeeze=False)
    for row, (name, steps) in zip(axes, drawn.items(), strict=True):
        for ax, level in zip(row, levels, strict=True):
            ratio, plans = min(steps, key=lambda step: abs(np.log(step[0] + 1e-3) - np.log(level + 1e-3)))
            ax.plot(*plans.transpose(2, 1, 0), color="tab:blue", alpha=0.25, lw=0.7)
            ax.add_patch(plt.Circle(pillar, PILLAR, color="0.4", zorder=3))  # type: ignore[arg-type]
            ax.plot(*cube, "s", color="tab:orange", ms=5)
            ax.plot(*goal, "o", color="tab:green", ms=6)
            ax.set(xlim=(-0.25, 0.25), ylim=(-0.25, 0.25), xticks=[], yticks=[], aspect="equal")
            ax.set_title("plan" if ratio == 0 else "noise" if ratio > 50 else f"σ/α = {ratio:.2g}", fontsize=8, color="0.4")
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(rows: Facts) -> None:
    head = ("row", "left", "right", "through the pillar", "share left of those that pass, 95 %", "success of episodes", "training, CPU-s")
    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for r in rows.values():
        if "left" in r:
            passed = r["left"] + r["right"]
            lo, hi = wilson(r["left"], passed) if passed else (0.0, 1.0)
            table.add_row(r["name"], str(r["left"]), str(r["right"]), str(r["through"]), f"{r['left'] / max(passed, 1):.0%} [{lo:.0%}, {hi:.0%}]",
                          f"{r['success']:.0%}", "/".join(f"{c['train_cpu_s']:.0f}" for c in r["cells"]))
    console.print(table)


def headline(rows: Facts) -> str:
    return ", ".join(f"{r['name']} {r['left']}:{r['right']}:{r['through']}" for r in rows.values() if "left" in r) + " plans left : right : through"

"""`dipole eval compare A B …`: the same seeds for all, by evaluations that are there or that are made now."""
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from policy import compare as paired
from policy.page import read_json, seed_range
from policy.train.log import console, read_rows
from scripts import common, films

Evaluate = Callable[[DictConfig, Path], dict[str, Any]]
SETTINGS = ("env", "checkpoint", "sampler", "control", "guide", "simulator")  # what makes two evaluations of a run one and the same
AS_BEFORE: dict[str, Any] = {"control": {"delay": 0, "align": True, "merge": "naive", "warm": None, "limit": 5, "prior": 1},
                             "simulator": "threads"}  # of evaluations from before there was a choice
NOT_PHYSICS = ("workers", "timeout")
LONG = 24  # characters of a name, beyond which a shorter one is looked for


@dataclass
class Side:
    """One of those compared: an evaluation, or a run of which one is to be found or made."""
    name: str
    folder: Path  # as the user named it
    cfg: DictConfig | None  # of a run: how it is evaluated; None for a folder that is an evaluation
    at: Path | None = None  # where the evaluation lies
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> set[int]:
        return set(self.metrics.get("seeds") or ())

    def env(self) -> dict[str, Any]:
        """What it is, or is to be, evaluated in."""
        cfg: Any = self.cfg
        if cfg is None:
            assert self.at
            cfg = OmegaConf.load(self.at / "config.yaml")
        return {k: v for k, v in settings(cfg)["env"].items() if k not in NOT_PHYSICS}


def compare(cfg: DictConfig, evaluate: Evaluate) -> dict[str, Any]:
    """Compare cfg.runs, write compare.json, report.html and videos, print the differences. evaluate(cfg, run folder) makes what is missing."""
    folders = [Path(f) for f in cfg.runs]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ValueError("compare what with what? Name two folders or more, of runs or evaluations: dipole eval compare outputs/a outputs/b")
    if cfg.until is not None:
        raise ValueError("until=… stops each at another seed; to compare, name how many for all: episodes=…")
    sides = [side(name, folder, cfg) for name, folder in zip(names(folders), folders, strict=True)]
    refuse_other_envs(sides)
    seeds = common_seeds(sides, cfg)
    for each in sides:
        if not set(seeds) <= each.seeds:
            run_missing(each, seeds, evaluate)
    out = Path(cfg.out) if cfg.out else Path("outputs") / "compare" / re.sub(r"[^\w.=+-]+", "_", "-vs-".join(s.name for s in sides))
    found = paired.compare({s.name: s.metrics for s in sides}, seeds)
    for run, each in zip(found["runs"], sides, strict=True):
        assert each.at
        run |= {"folder": str(each.at), "curve": [{"cpu_s": r.get("cpu_s"), **r["eval"]} for r in read_rows(each.at / "train.jsonl") if "eval" in r]}
    others = [o for o in common.overrides() if o.split("=")[0] not in ("do", "runs")]
    found |= {"command": shlex.join(["dipole", "eval", "compare", *map(str, cfg.runs), *others]), "videos": []}
    common.save_json(out / "compare.json", found)
    try:
        found["videos"] = film_differences(sides, found, out, cfg)
        common.save_json(out / "compare.json", found)
    except Exception as e:  # as in common.rollout: the numbers are worth more
        console.print(f"[yellow]no videos: {escape(str(e))}[/]", highlight=False, soft_wrap=True)
    for pair in found["differences"]:
        console.print(f"[bold]{escape(paired.sentence(pair))}[/]", highlight=False, soft_wrap=True)
    console.print(f"report: {paired.write_page(out, found)}", highlight=False, soft_wrap=True)
    return {"folder": str(out), "differences": found["differences"]}


def names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: outputs/a/eval/policy, outputs/b/eval/policy -> a, b."""
    parts = [Path(os.path.abspath(f)).parts for f in folders]
    shortest = min(map(len, parts))
    head = next((k for k in range(shortest) if len({p[k] for p in parts}) > 1), shortest - 1)
    tail = next((k for k in range(shortest - head) if len({p[-1 - k] for p in parts}) > 1), 0)
    found = [p[head: len(p) - tail] or p[-1:] for p in parts]
    if max(len("/".join(p)) for p in found) > LONG:  # they share no root: the fewest last words that differ, eval/<name> not among them if it need not be
        bare = [p[:-2] if len(p) > 2 and p[-2] == "eval" else p for p in parts]
        for tried in (bare, parts):
            for k in range(1, shortest):
                if len({p[-k:] for p in tried}) == len(parts):
                    return ["/".join(p[-k:]) for p in tried]
    return ["/".join(p) for p in found]


def side(name: str, folder: Path, cfg: DictConfig) -> Side:
    if (folder / "checkpoints").is_dir():
        one = cfg.copy()
        one.run = str(folder)
        made = Side(name, folder, common.of_run(one, folder))
        made.at, made.metrics = best_held(made)
        return made
    metrics = read_json(folder / "metrics.json")
    if "per_episode" not in metrics or not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} is neither a run (it has no checkpoints) nor an evaluation of one (metrics.json, config.yaml)")
    return Side(name, folder, None, folder, metrics)


def best_held(one: Side) -> tuple[Path | None, dict[str, Any]]:
    """The run's evaluation with the most episodes, of those made with these very settings and weights."""
    assert one.cfg
    want, facts = settings(one.cfg), read_json(one.folder / "checkpoints" / f"{one.cfg.checkpoint.partition('@')[0]}.json")
    held: list[tuple[Path | None, dict[str, Any]]] = []
    for path in [*one.folder.glob("eval/metrics.json"), *one.folder.glob("eval/*/metrics.json")]:
        metrics = read_json(path)
        if "per_episode" in metrics and metrics.get("step") == facts.get("step") and (path.parent / "config.yaml").exists() \
                and settings(OmegaConf.load(path.parent / "config.yaml")) == want:
            held.append((path.parent, metrics))
    return max(held, key=lambda h: len(h[1]["seeds"]), default=(None, {}))


def settings(cfg: Any) -> dict[str, Any]:
    found = {key: common.plain(cfg[key]) if OmegaConf.is_config(cfg.get(key)) else cfg.get(key) for key in SETTINGS}
    for key, before in AS_BEFORE.items():
        found[key] = {**before, **(found[key] or {})} if isinstance(before, dict) else found[key] or before
    return found


def common_seeds(sides: Sequence[Side], cfg: DictConfig) -> list[int]:
    """The seeds asked for (episodes=, seed=), else those that all evaluations hold, else the usual ones."""
    said = {o.split("=")[0] for o in common.overrides()}
    usual = list(range(cfg.seed, cfg.seed + (cfg.episodes or 100)))
    held = [s for s in sides if s.seeds]
    seeds = usual if said & {"episodes", "seed"} or not held else sorted(set.intersection(*(s.seeds for s in held)))
    for one in sides:
        if not seeds or (one.cfg is None and not set(seeds) <= one.seeds):
            told = ", ".join(f"{s.name} holds {seed_range(sorted(s.seeds)) or 'none'}" for s in sides)
            raise ValueError(f"no seeds to compare on: {told}. Name run folders, which can be evaluated on any: "
                             f"dipole eval compare … seed={cfg.seed} episodes=100")
    return seeds


def run_missing(one: Side, seeds: Sequence[int], evaluate: Evaluate) -> None:
    assert one.cfg is not None
    cfg, few = one.cfg.copy(), (seeds[0], seeds[-1] - seeds[0] + 1)
    said = {o.split("=")[0] for o in common.overrides()}
    cfg.out = None  # the comparison's; an evaluation belongs to its run
    if few != (cfg.seed, 100) and not said & {"episodes", "seed"}:  # beside the usual one, not in its place
        cfg.out = str(one.folder / "eval" / f"{cfg.checkpoint}-seed={few[0]}-episodes={few[1]}")
    cfg.seed, cfg.episodes = few
    console.print(f"[bold]{escape(one.name)}[/]", highlight=False, soft_wrap=True)
    one.metrics = evaluate(cfg, one.folder)
    one.at = Path(one.metrics["folder"])


def refuse_other_envs(sides: Sequence[Side]) -> None:
    first = sides[0].env()
    for other in sides[1:]:
        if keys := [k for k in first | other.env() if first.get(k) != other.env().get(k)]:
            told = "; ".join(f"{s.name}: {', '.join(f'{k}={s.env().get(k)}' for k in keys)}" for s in (sides[0], other))
            one = "env=… (env=gantry)" if "_target_" in keys else f"env.{keys[0]}={first.get(keys[0])}"
            raise ValueError(f"evaluated in different environments ({told}). Compare runs of one task, or name one environment for all run folders: {one}")


def film_differences(sides: Sequence[Side], found: dict[str, Any], out: Path, cfg: DictConfig) -> list[dict[str, Any]]:
    """One video for each of up to cfg.videos seeds on which not all agree, everyone side by side, played again from the actions that were sent."""
    won = np.array([run["per_seed"]["success"] for run in found["runs"]])
    differ = [j for j in range(won.shape[1]) if won[:, j].any() and not won[:, j].all()]
    mine, theirs = [j for j in differ if won[0, j]], [j for j in differ if not won[0, j]]
    few = theirs[: max(cfg.videos // 2, cfg.videos - len(mine))]
    chosen = [found["seeds"][j] for j in few + mine[: cfg.videos - len(few)]]
    for old in (out / "videos").glob("seed_*.mp4"):
        old.unlink()
    paths = [s.at / "actions.npz" for s in sides if s.at]
    if lost := [str(p) for p in paths if not p.exists()]:
        raise FileNotFoundError(f"{lost[0]} is missing, from which episodes are played again; evaluate that run once more")
    acted = [common.load_actions(p) for p in paths]
    _, fps, envs = common.make_envs(OmegaConf.create(settings(OmegaConf.load(paths[0].parent / "config.yaml"))["env"]), 1, list(cfg.trust))
    made = []
    try:
        for seed in chosen if films.drawable(envs) else []:
            ok = [bool(w) for w in won[:, found["seeds"].index(seed)]]
            row = [films.Film(films.replay(envs, seed, actions[seed]), f"{s.name} {seed} {'success' if w else 'failure'}", w)
                   for s, actions, w in zip(sides, acted, ok, strict=True) if len(actions[seed])]
            file = f"videos/seed_{seed}.mp4"
            films.write(out / file, films.grid(row, columns=len(row)), fps)
            winners = ", ".join(s.name for s, w in zip(sides, ok, strict=True) if w)
            made.append({"file": file, "seed": seed, "caption": f"{winners} wins", "wide": True})
    finally:
        envs.close()
    return made

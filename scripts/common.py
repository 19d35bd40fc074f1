"""What the verbs share: the run folder, the configuration a run was trained with, environments, videos, the result's files."""
import json
import os
import shlex
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from policy.control import Controller
from policy.episodes import Report, reason
from policy.lanes import evaluate_in_lanes
from policy.page import counted, save_json
from policy.planner import Planner
from policy.report import write_report
from policy.train import checkpoint
from policy.train.log import bar, console
from policy.types import Spec
from scripts import datasets, films, sweep
from scripts.recording import keeping, recorder
from scripts.settings import command, key_of, overrides, plain, whole

LEARNED = ("padding_loss", "obs_noise", "cond_drop", "normalize", "per_step", "transform", "t_obs", "horizon", "data", "train", "density", "formalism",
           "teacher")
PLANNER = ("encoder", "net", "schedule", "denoiser", "objective", "sampler")  # nodes that a checkpoint stores, with guide and padding_loss


def new_run(cfg: DictConfig) -> Path:
    """The folder of a new run; refused when a run is already there."""
    recipe = HydraConfig.get().runtime.choices.get("recipe") or "run"
    if cfg.run:
        folder = sweep.own(Path(cfg.run))
    elif job := sweep.here():
        folder = job[0] / str(job[1])
    else:
        folder = Path("outputs") / recipe / time.strftime("%Y-%m-%d_%H-%M-%S")
    if (folder / "checkpoints").exists():
        raise FileExistsError(f"{folder} already holds a run. Go on with it: dipole train run={folder} resume=true; or choose another run=…")
    return folder


def of_run(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration the run was trained with, with this command's overrides applied on top."""
    path = folder / "config.yaml"
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a training run: it has no config.yaml")
    saved = OmegaConf.load(path)
    now = overrides()
    words = whole_sampler([*remembered(_trained_with(folder), now), *now])  # sampler.steps=4 keeps the trained sampler
    both = compose(name := HydraConfig.get().job.config_name, words)
    touched = {key_of(o) for o in now} - {"run", "resume"}
    if name in ("eval", "serve", "export") and (learned := sorted(touched & {*PLANNER, *LEARNED} - {"sampler"})):
        raise ValueError(f"{', '.join(learned)} cannot change after training; train a new run with it. What can: env, sampler, guide, control")
    if "recipe" in touched:
        raise ValueError("a run keeps its recipe; start a new run for another one")
    result = OmegaConf.create({**cfg, **saved})
    for key in touched | (set(cfg) - set(saved)) | {"trust"}:  # never trusted on a file's word
        result[key] = both[key]
    return result


def whole_sampler(words: list[str]) -> list[str]:
    """Overrides without the formalism where sampler=NAME is among them: hydra lets what a formalism says of its own sampler win over conf/sampler."""
    return [o for o in words if not o.startswith("formalism=")] if any(o.startswith("sampler=") for o in words) else words


def remembered(before: Sequence[str], now: Sequence[str], groups: Collection[str] | None = None) -> list[str]:
    """The overrides `before` that those of `now` leave standing: not what is said anew, and nothing below one of the groups that is chosen anew."""
    said = {o.split("=")[0] for o in now}
    said |= {key[1:] for key in said if key.startswith("+")}
    chosen = tuple(f"{key}." for key in said & set(HydraConfig.get().runtime.choices if groups is None else groups))
    return [o for o in before if (key := o.split("=")[0]) not in said and not key.lstrip("+~").startswith(chosen)]


def _trained_with(folder: Path) -> list[str]:
    path = folder / "overrides.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_start(folder: Path, cfg: DictConfig, said: Sequence[str] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    now = overrides() if said is None else list(said)
    kept = [*remembered(_trained_with(folder), now), *now]
    (folder / "overrides.json").write_text(json.dumps([o for o in kept if o.split("=")[0] not in ("run", "resume")]))
    (folder / "versions.json").write_text(json.dumps(checkpoint.versions(), indent=1))


def planner_config(cfg: DictConfig) -> dict[str, Any]:
    return {**{k: plain(cfg[k]) for k in PLANNER}, "guides": guide_config(cfg), **{k: cfg[k] for k in ("padding_loss", "obs_noise", "cond_drop")}}


def guide_config(cfg: DictConfig) -> dict[str, Any]:
    """conf/guide/*.yaml. ValueError when a clip would cut what the policy learned."""
    node, mode = plain(cfg.guide) or {}, cfg.normalize if isinstance(cfg.normalize, str) else cfg.normalize.get("action", "limits")
    for name, guide in node.items():
        if str(guide.get("_target_", "")).endswith("guides.clip") and mode == "gaussian" and guide.get("limit", 1.0) < 3:
            raise ValueError(f"guide.{name} cuts actions at {guide.get('limit', 1.0)} standard deviations (normalize=gaussian): use guide.{name}.limit=4, "
                             "guide=none, or train with normalize=limits")
    return node


def check_task(cfg: DictConfig, spec: Spec) -> None:
    """ValueError before training when the data does not show what the environment shows; nothing where there is none to ask."""
    if "_target_" not in cfg.env:
        return
    datasets.check_settings(cfg)
    try:
        from envs.task import Task
    except ImportError:
        return
    checkpoint.check_targets(plain(cfg.env), ("envs", *cfg.trust))
    from envs.copies import makes_one
    made = instantiate({k: v for k, v in plain(cfg.env).items() if k not in ("workers", "timeout")})
    if isinstance(made, Task):
        fps = made.fps
    elif makes_one(made):
        try:
            made = made()
        except ImportError:  # its package is needed for rolling out, not for training
            return
        fps = float(made.metadata.get("render_fps") or 0)
        made.close()
    else:
        return
    name, space, acts = getattr(made, "name", cfg.env["_target_"]), made.observation_space, made.action_space
    if not hasattr(space, "spaces"):
        return
    if wrong := spec.differences({k: v.shape or () for k, v in space.spaces.items()}, acts.shape[0], fps):
        raise ValueError(f"{cfg.data.path} is not a recording of {name}: {wrong}. Name the task it comes from with env=…, or none with env=none")


def make_envs(env: DictConfig, copies: int, trust: Sequence[str] = (), simulator: str = "threads", lanes: int = 1):
    """conf/env/*.yaml -> (name, control rate [Hz], vector environment). lanes: how many of these will share the cores.

    A node yields a task; or what makes one gymnasium.Env (envs.copies.makes_one), with `workers` and `timeout` for envs.copies.Copies if it
    names them; or a function of the number of copies that makes a VectorEnv.
    """
    if "_target_" not in env:
        raise ValueError("env=none has nothing to roll out in; name a task: env=gantry, env=pusht, or one of your own")
    node = plain(env)
    checkpoint.check_targets(node, ("envs", *trust))
    if missing := [key for key, value in node.items() if value == "???"]:
        raise ValueError(f"{env['_target_']} needs env.{missing[0]}=…")
    from envs.batch import BatchEnv
    from envs.copies import Copies, makes_one
    from envs.task import Task
    spread = {key: node.pop(key) for key in ("workers", "timeout") if key in node}
    made = instantiate(node, _convert_="all")
    if simulator not in ("threads", "warp") or (simulator == "warp" and not isinstance(made, Task)):
        raise ValueError(f"simulator={simulator} does not run {env['_target_']}: use simulator=threads; warp is for a task of our own (env=gantry, …)")
    if spread and (isinstance(made, Task) or not makes_one(made)):
        raise ValueError(f"env.{next(iter(spread))} is for environments of other packages; {env['_target_']} has no worker processes")
    cores = max(1, (os.cpu_count() or 1) // lanes)
    if isinstance(made, Task):
        return made.name, made.fps, BatchEnv(made, copies, threads=cores) if simulator == "threads" else _warp_env(made, copies)
    envs = Copies(made, copies, **{"workers": cores, **spread}) if makes_one(made) else made(copies)
    return getattr(envs, "name", env["_target_"]), float(envs.metadata.get("render_fps", 0)), envs


def _warp_env(task: Any, copies: int):
    from envs.warp import WarpEnv  # the extra warp
    return WarpEnv(task, copies, arrays="numpy")


def rollout(planner: Planner, cfg: DictConfig, folder: Path, *, episodes: int, seed: int, copies: int, videos: int,
            until: float | None = None, video_seeds: Sequence[int] | None = None, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Evaluate, write metrics.json, actions.npz and videos into folder, return the metrics. until: see policy.rollout.evaluate."""
    lanes = cfg.get("lanes", 1)
    whole(1, episodes=episodes, copies=copies, lanes=lanes)
    whole(0, seed=seed, videos=videos)
    if lost := sorted(set(video_seeds or ()) - set(range(seed, seed + episodes))):
        raise ValueError(f"video_seeds={lost} are not among the seeds to be evaluated, {seed} to {seed + episodes - 1}")
    share = -(-min(copies, episodes) // lanes)
    made = [make_envs(cfg.env, share, list(cfg.trust), cfg.get("simulator", "threads"), lanes) for _ in range(min(lanes, episodes))]
    name, fps, envs = made[0]
    try:
        space = envs.single_observation_space
        if not hasattr(space, "spaces"):
            raise ValueError(f"{name} observes {space}; a policy needs named observations (a gymnasium Dict space)")
        planner.spec.check({k: v.shape for k, v in space.spaces.items()}, envs.single_action_space.shape[0], fps, name)
        by = f"{(extra or {}).get('run', folder)}, {cfg.get('checkpoint', 'policy')}"
        with recorder(cfg.get("record"), planner.spec, fps, task=name, env=plain(cfg.env), data=plain(cfg.get("data") or {}), by=by) as to, bar() as progress:
            task = progress.add_task("roll out", total=episodes, note="")
            report = evaluate_in_lanes([(Controller(planner, **cfg.control), each) for _, _, each in made], episodes, seed, task=name, until=until,
                                       on_progress=lambda n: progress.update(task, completed=n), keep=keeping(to, cfg.get("record_only", "all")))
        metrics = {**report.metrics(), **(extra or {}), "videos": [], "command": command(), "sampler": plain(cfg.sampler), "control": plain(cfg.control)}
        tell_faults(metrics, folder)
        save_json(folder / "metrics.json", metrics)
        save_actions(folder / "actions.npz", report)
        if (videos or video_seeds) and films.drawable(envs):
            try:
                metrics |= films.write_videos(films.choose(report.episodes, videos, video_seeds), envs, folder, fps)
            except Exception as e:  # of whatever kind: foreign environments draw in their own ways, and the numbers are worth more than the pictures
                console.print(f"[yellow]no videos: {escape(str(e))}. The results are saved; `dipole doctor` says how to get a GL backend[/]")
            save_json(folder / "metrics.json", metrics)
    finally:
        for _, _, each in made:
            each.close()
    return metrics


def tell_faults(metrics: dict[str, Any], folder: Path) -> None:
    """Print which seeds broke off and the command that replays the first; each fault in the metrics gets its own."""
    said = overrides() if HydraConfig.get().job.config_name == "eval" else []
    kept = [o for o in said if o.split("=")[0] not in ("do", "run", "seed", "episodes", "until", "out", "video_seeds", "delays", "runs")]
    for fault in metrics["faults"]:
        fault["replay"] = shlex.join(["dipole", "eval", f"run={metrics.get('run', folder)}", f"seed={fault['seed']}", "episodes=1", *kept])
    for fault in metrics["faults"][:5]:
        why = escape(reason(fault["error"]))
        console.print(f"[yellow]seed {fault['seed']} broke off after {fault['step']} steps[/]: {why}", highlight=False, soft_wrap=True)
    if metrics["faults"]:
        console.print(f"{len(metrics['faults'])} of {metrics['episodes']} episodes broke off and count as failures. Look at one again: "
                      f"{escape(metrics['faults'][0]['replay'])}", highlight=False, soft_wrap=True)


def save_actions(path: Path, report: Report) -> None:
    """What was sent in every episode, so that any of them can be played again without the policy: seeds (n,), steps (n,), actions (sum, d)."""
    acted = [e.actions for e in report.episodes if len(e.actions)]
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, seeds=[e.seed for e in report.episodes], steps=[len(e.actions) for e in report.episodes],
                        actions=np.concatenate(acted) if acted else np.zeros((0, len(report.action_range)), np.float32))
    part.replace(path)


def load_actions(path: Path) -> dict[int, np.ndarray]:
    """{seed: actions (t, d)} of an evaluation."""
    with np.load(path) as saved:
        parts = np.split(saved["actions"], np.cumsum(saved["steps"])[:-1])
        return dict(zip(saved["seeds"].tolist(), parts, strict=True))


def result_line(metrics: dict[str, Any]) -> str:
    lo, hi = metrics["success_ci"]
    low, high = metrics["score_ci"] or (float("nan"),) * 2
    until, score, plan = metrics.get("until"), metrics["score"], metrics["plan_ms"]["p50"]
    return (f"{metrics['task']}: success {metrics['success']:.1%} [{lo:.1%}, {hi:.1%}], "
            + ("" if score is None else f"score {score:.3f} [{low:.3f}, {high:.3f}] ") + f"over {counted(metrics['episodes'], 'distinct seed')}"
            + (f", {len(metrics['faults'])} of them broke off" if metrics["faults"] else "")
            + (f", {'enough for' if until['reached'] else 'not yet'} ± {until['half_width']:.1%}" if until else "")
            + ("" if plan is None else f"; one plan {plan:.1f} ms"))


def finish(folder: Path, line: str) -> None:
    """The last line of every command: the result and where it lies."""
    page = write_report(folder)
    console.print(f"[bold]{line}[/]\nreport: {page}", highlight=False, soft_wrap=True)

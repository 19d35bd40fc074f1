"""Train a planner on demonstrations: dipole train recipe=gantry data.path=demos/gantry.zarr."""
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from policy.data import statistics
from policy.data.sources import Entry
from policy.diffusion.objective import distillation, ignorance, inside
from policy.planner import Planner
from policy.train import checkpoint
from policy.train.log import Log, console, read_rows
from policy.train.loop import NotFinite, Settings, Trainer
from policy.types import Spec
from scripts import common, datasets, sweep, transforms
from scripts.verb import verb


def train(cfg: DictConfig, folder: Path, said: Sequence[str] | None = None) -> dict[str, Any]:
    """Train into folder; what it cost, the last loss, and the metrics of the last rollout when there was one.

    said: overrides that a later eval of this run starts from; those of the command line.
    """
    torch.set_num_threads(cfg.threads)
    device = checkpoint.pick_device(cfg.device)
    found = datasets.named(cfg)
    datasets.settle_memory(cfg, found, device, folder)
    data, val = datasets.dataset(cfg, "train", device, found), datasets.held_out(cfg, device, found)
    spec = spec_of(cfg, found[0], data.shapes)
    common.check_task(cfg, spec)
    modes = cfg.normalize if isinstance(cfg.normalize, str) else common.plain(cfg.normalize)
    torch.manual_seed(cfg.train.seed)  # initial weights
    told = common.plain(cfg.train)
    rtc = delays_of(told.pop("rtc", False), cfg.horizon)
    nodes = transforms.completed(cfg, data, found[0])
    config = {**common.planner_config(cfg), **({"rtc": rtc} if rtc else {}), **({"transform": nodes} if nodes else {}),
              **({"per_step": True} if cfg.per_step else {}), **({"datasets": [e.name for e in found]} if datasets.apart(cfg, found) else {})}
    normalizer = statistics.fit(data, checkpoint.transform_of(config, list(cfg.trust)), modes, per_step=cfg.per_step)
    planner = checkpoint.build(config, spec, normalizer, trust=list(cfg.trust)).to(device)
    if bool(cfg.teacher) != (inside(planner.objective)[0] is distillation):
        raise ValueError("a teacher and objective=distillation belong together: dipole distill sets both")
    if cfg.teacher:
        taught_by(planner, cfg)
    settings = Settings(**{**told, "betas": tuple(cfg.train.betas)})
    last: dict[str, Any] = {}

    def rollout(planner: Planner, step: int) -> dict[str, Any]:
        metrics = common.rollout(planner, cfg, folder, copies=cfg.rollout.episodes, **cfg.rollout)
        log.videos(step, [folder / v["file"] for v in metrics["videos"]])
        last.update(metrics)
        return {k: v for k, v in metrics.items() if k not in ("per_episode", "seeds", "videos", "command")}

    trainer = Trainer(planner, data, folder, settings, config=config, val=val, rollout=rollout)
    if cfg.resume:
        trainer.resume()
    # only now: a refused configuration leaves no folder behind
    common.write_start(folder, OmegaConf.create({**cfg, "transform": nodes, "resume": False}), said)
    console.print(f"{folder}: {len(data.episodes)} episodes, {len(data)} windows, {sum(p.numel() for p in planner.parameters()) / 1e6:.2f} M parameters, "
                  f"{device}, {'bf16' if trainer.bf16 else 'fp32'}", highlight=False, soft_wrap=True)
    if words := datasets.told(found, data):
        console.print(f"data: {words}", highlight=False, soft_wrap=True)
    with Log(folder, config={**config, "train": common.plain(cfg.train), "versions": checkpoint.versions()}, resume_at=trainer.step, **cfg.log) as log:
        trainer.run(log)
    common.finish(folder, common.result_line(last) if last else f"trained {trainer.step} steps in {trainer.cpu_s:.0f} CPU-seconds")
    if trainer.step < settings.steps:
        sweep.interrupted()
    losses = [row["loss"] for row in read_rows(folder / "train.jsonl") if "loss" in row]
    return {"folder": str(folder), "step": trainer.step, "cpu_s": trainer.cpu_s, "loss": losses[-1] if losses else None, **last}


def delays_of(rtc: bool | int | None, horizon: int) -> int:
    """Most steps of a plan that training shows as known: train.rtc in figures."""
    if not isinstance(rtc, bool | int | None) or not 0 <= (rtc or 0) < horizon:
        raise ValueError(f"train.rtc={rtc!r} must be true (half the horizon), false, or a whole number of steps below the horizon {horizon}")
    return horizon // 2 if rtc is True else int(rtc or 0)


def taught_by(planner: Planner, cfg: DictConfig) -> None:
    """Start from the teacher's weights and let the objective compare with it. The encoder stays as it is, so both see the same condition."""
    name = cfg.teacher_checkpoint if "@" in cfg.teacher_checkpoint else f"{cfg.teacher_checkpoint}@*"  # of all its datasets, as the student
    teacher, _ = checkpoint.load(cfg.teacher, name, device=str(checkpoint.pick_device(cfg.device)), trust=list(cfg.trust))
    if why := ignorance(teacher.objective):
        raise ValueError(f"{cfg.teacher} cannot teach: {why}")
    planner.load_state_dict(teacher.state_dict())
    planner.encoder.requires_grad_(False)
    planner.objective = partial(planner.objective, teacher=teacher.denoiser)


def spec_of(cfg: DictConfig, first: Entry, shapes: dict[str, tuple[int, ...]]) -> Spec:
    """first: what says the rate and the units, where there are several datasets."""
    store = first.store
    task = cfg.env["_target_"].rsplit(".", 1)[-1] if "_target_" in cfg.env else str(store.attrs.get("task") or store.path.stem)
    return Spec(obs={k: s for k, s in shapes.items() if k != "action"}, action_dim=shapes["action"][0], t_obs=cfg.t_obs, horizon=cfg.horizon,
                fps=float(store.fps or cfg.data.get("fps") or 0), task=task, units=store.units or {}, action_semantics=store.action_semantics or "")


@verb("train")
def main(cfg: DictConfig) -> dict[str, Any]:
    if cfg.resume and not cfg.run:
        raise ValueError("resume=true needs run=FOLDER")
    folder = sweep.own(Path(cfg.run)) if cfg.run else None
    if folder and cfg.resume and ((folder / "checkpoints").exists() or not sweep.here()):  # a sweep starts the jobs it had not come to
        cfg = common.of_run(cfg, folder)
        cfg.resume = True
    else:
        if (words := common.whole_sampler(now := common.overrides())) != now:
            cfg.sampler = compose(HydraConfig.get().job.config_name, words).sampler
        folder, cfg.resume = common.new_run(cfg), False
    common.whole(0, **{"train.seed": cfg.train.seed})
    try:
        return train(cfg, folder)
    except NotFinite as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()

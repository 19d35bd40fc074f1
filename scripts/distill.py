"""Teach a copy of a trained planner to plan in one call: dipole distill run=outputs/pusht."""
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scripts import common, sweep
from scripts.cli import words_to_overrides
from scripts.train import train
from scripts.verb import verb

OWN = ("run", "out", "checkpoint", "teacher", "resume", "objective", "density", "sampler", "train", "device", "threads", "trust", "log", "rollout")


@verb("distill")
def main(cfg: DictConfig) -> dict[str, Any]:
    if not cfg.run:
        raise ValueError("which teacher? Name the folder of its run: dipole distill run=FOLDER")
    teacher = Path(cfg.run)
    if not (teacher / "config.yaml").exists():
        raise FileNotFoundError(f"{teacher} is not a training run: it has no config.yaml")
    folder = sweep.own(Path(cfg.out) if cfg.out else teacher.with_name(f"{teacher.name}-distilled"))
    if (folder / "checkpoints").exists():
        raise FileExistsError(f"{folder} already holds a run. Go on with it: dipole train run={folder} resume=true; or choose another out=…")
    said = {common.key_of(o) for o in common.overrides()}
    taught: dict[str, Any] = {str(k): v for k, v in OmegaConf.load(teacher / "config.yaml").items() if k not in OWN}
    if wrong := sorted(said - {*OWN, "data", "env", "control"}):
        raise ValueError(f"{', '.join(wrong)} cannot differ from the teacher's; what can: {', '.join(k for k in OWN if k != 'teacher')}, data, env, control")
    asked: dict[str, Any] = {k: cfg[k] for k in said & {"env", "control"}}
    merged = OmegaConf.create({**{str(k): v for k, v in cfg.items()}, **taught, **asked})
    if "data" in said:
        merged.data = OmegaConf.merge(merged.data, OmegaConf.from_dotlist([o for o in common.overrides() if o.startswith("data.")]).data)
    merged.teacher, merged.teacher_checkpoint, merged.run, merged.resume = str(teacher), cfg.checkpoint, str(folder), False
    for key in ("out", "checkpoint"):
        merged.pop(key)
    own = [o for o in common.overrides() if common.key_of(o) not in ("out", "checkpoint", "data", "train")]
    return train(merged, folder, ["objective=distillation", "density=uniform", "sampler=consistency", f"sampler.steps={cfg.sampler.steps}", *own])


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

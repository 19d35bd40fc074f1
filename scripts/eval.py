"""Roll a trained planner out on distinct seeds: dipole eval run=outputs/gantry episodes=100 sampler=heun."""
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from policy.nets.fast import quick
from policy.train import checkpoint
from scripts import common, sweep
from scripts.cli import words_to_overrides
from scripts.compare import compare
from scripts.delay import delay
from scripts.likelihood import likelihood
from scripts.verb import verb

NOT_IN_NAME = ("do", "run", "runs", "checkpoint", "videos", "video_seeds", "copies", "out", "threads", "lanes", "device", "resume", "delays", "naive",
               "merges", "adopt", "dims", "gate", "record", "record_only")


def evaluate(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Evaluate the run's checkpoint as cfg says; metrics, videos and report lie in the folder that the last line names."""
    torch.set_num_threads(cfg.threads)
    planner, facts = checkpoint.load(folder, cfg.checkpoint, device=str(checkpoint.pick_device(cfg.device)), trust=list(cfg.trust))
    planner.set_sampler(**checkpoint.sampling(common.plain(cfg.sampler), list(cfg.trust)))
    if cfg.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={cfg.precision} is unknown; use fp32 or bf16")
    if cfg.precision == "bf16":
        planner.denoiser.net = quick(planner.denoiser.net)
    planner.set_guides(checkpoint.guides(common.guide_config(cfg), list(cfg.trust)))
    torch.manual_seed(cfg.seed)  # a stochastic sampler's draws
    out = sweep.own(Path(cfg.out)) if cfg.out else folder / "eval" / result_name(cfg.checkpoint)
    episodes = cfg.episodes if cfg.episodes is not None else 100 if cfg.until is None else 2000
    metrics = common.rollout(planner, cfg, out, episodes=episodes, seed=cfg.seed, copies=cfg.copies, videos=cfg.videos, until=cfg.until,
                             video_seeds=cfg.video_seeds,
                             extra={"run": str(folder), "checkpoint": cfg.checkpoint, "step": facts["step"], "cpu_s": facts["cpu_s"], "calls": planner.calls})
    common.write_start(out, cfg)
    if (folder / "train.jsonl").exists():
        shutil.copyfile(folder / "train.jsonl", out / "train.jsonl")  # the page shows how the policy came about
    common.finish(out, common.result_line(metrics))
    return {"folder": str(out), **metrics}


def result_name(checkpoint: str) -> str:
    """policy, or policy-sampler=heun-episodes=20: another evaluation of a run goes to another folder, the same one replaces its result."""
    said = [o for o in common.overrides() if o.split("=")[0] not in NOT_IN_NAME]
    return re.sub(r"[^\w.=+-]+", "_", "-".join([checkpoint, *sorted(said)]))


@verb("eval", of_run=("sampler", "env", "guide"))
def main(cfg: DictConfig) -> dict[str, Any]:
    if cfg.do not in (None, "compare", "delay", "likelihood"):
        raise ValueError(f"dipole eval {cfg.do} is unknown; use dipole eval run=FOLDER, dipole eval compare FOLDER FOLDER, dipole eval delay run=FOLDER "
                         "or dipole eval likelihood run=FOLDER. Settings are written key=value")
    common.whole(0, seed=cfg.seed, videos=cfg.videos)
    if cfg.do == "compare":
        return compare(cfg, evaluate)
    if not cfg.run:
        raise ValueError("which run? Name its folder: dipole eval run=FOLDER")
    folder = Path(cfg.run)
    cfg = common.of_run(cfg, folder)
    if cfg.do == "delay":
        return delay(cfg, folder, Path(cfg.out) if cfg.out else folder / "eval" / result_name(f"delay-{cfg.checkpoint}"), evaluate)
    if cfg.do == "likelihood":
        return likelihood(cfg, folder, sweep.own(Path(cfg.out)) if cfg.out else folder / "eval" / result_name(f"likelihood-{cfg.checkpoint}"))
    return evaluate(cfg, folder)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

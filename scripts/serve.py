"""Serve a trained planner to robots over a websocket: dipole serve run=outputs/gantry port=8765."""
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from policy.nets.fast import quick
from policy.serve.backend import Delayed, PlannerBackend
from policy.serve.card import Backend
from policy.serve.fastplan import FastPlan
from policy.serve.packing import Limits
from policy.serve.server import PlannerServer, Service
from policy.train import checkpoint
from policy.train.log import console
from scripts import common, serving
from scripts.cli import words_to_overrides
from scripts.verb import verb

log = logging.getLogger("dipole.serve")
PLANS = ("warm", "limit", "prior")  # of control: how the planner goes on from what is promised
ADVICE = ("execute", "merge")       # of control: for bridges, in the card


def policy_of(cfg: DictConfig, folder: Path, device: str = "cpu", **origin: Any) -> tuple[PlannerBackend, dict[str, Any]]:
    """The checkpoint of a run drawing plans as cfg says, and what checkpoint.build makes it of.   origin: what else its card says of where it comes from."""
    planner, facts = checkpoint.load(folder, cfg.checkpoint, device=device, trust=list(cfg.trust))
    sampler, guides, control = common.plain(cfg.sampler), common.guide_config(cfg), common.plain(cfg.control)
    planner.set_sampler(**checkpoint.sampling(sampler, list(cfg.trust)))
    planner.set_guides(checkpoint.guides(guides, list(cfg.trust)))
    config = {**facts["planner"], "sampler": sampler, "guides": guides}
    origin = {"run": folder.resolve().name, "checkpoint": cfg.checkpoint, "step": facts["step"], "dipole": checkpoint.versions()["dipole"],
              "control": {k: control[k] for k in ADVICE if k in control}, "sampler": sampler, "calls": planner.calls, "precision": cfg.precision, **origin}
    return PlannerBackend(planner, {**config, "precision": cfg.precision}, facts=origin, **{k: control[k] for k in PLANS if k in control}), config


def trained(cfg: DictConfig, folder: Path) -> Backend:
    """policy_of, as quick as asked."""
    if cfg.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={cfg.precision} is unknown; use fp32 or bf16")
    backend, _ = policy_of(cfg, folder, str(checkpoint.pick_device(cfg.device)))
    if cfg.precision == "bf16":
        backend.planner.denoiser.net = quick(backend.planner.denoiser.net)
    if not cfg.fast or cfg.precision == "bf16":
        return backend
    fast = FastPlan(backend)
    if fast.lacks:
        log.info("plans are made the ordinary way: %s", fast.lacks)
    return fast


def backend_of(cfg: DictConfig) -> Backend:
    if bool(cfg.run) == bool(cfg.artifact):
        raise ValueError("what is to be served? Name the folder of a run, dipole serve run=FOLDER, or of an export, dipole serve artifact=FOLDER")
    if cfg.artifact:
        if fixed := [o for o in common.overrides() if common.key_of(o) in ("sampler", "guide", "control", "precision", "fast", "device", "checkpoint")]:
            raise ValueError(f"{fixed[0]} cannot be changed in an export: export the run with it, or serve the run")
        from policy.serve.artifact import load
        return load(cfg.artifact, threads=cfg.threads, trust=list(cfg.trust))
    return trained(common.of_run(cfg, Path(cfg.run)), Path(cfg.run))


@verb("serve", of_run=("sampler", "guide", "control"))
def main(cfg: DictConfig) -> dict[str, Any]:
    if cfg.do:
        raise ValueError(f"dipole serve {cfg.do} is unknown; settings are written key=value")
    common.whole(0, port=cfg.port)
    common.whole(1, threads=cfg.threads, **{"limits.bytes": cfg.limits.bytes, "limits.connections": cfg.limits.connections})
    if not cfg.delay >= 0 or bool(cfg.tls.cert) != bool(cfg.tls.key):
        raise ValueError(f"delay={cfg.delay} must not be negative, and tls.cert and tls.key belong together")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    torch.set_num_threads(cfg.threads)
    backend = backend_of(cfg)
    if cfg.delay:
        backend = Delayed(backend, cfg.delay)
    server = PlannerServer(backend, host=cfg.host, port=cfg.port, token=serving.token(cfg.token_file),
                           tls=(cfg.tls.cert, cfg.tls.key) if cfg.tls.cert else None,
                           insecure=cfg.insecure, openpi=cfg.openpi, limits=Limits(bytes=cfg.limits.bytes), service=Service(connections=cfg.limits.connections))
    server.run(lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
    return {}


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

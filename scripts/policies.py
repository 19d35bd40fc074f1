"""The policy of a run behind the one call that plans: what serve and export begin with."""
import logging
from collections.abc import Mapping
from importlib.resources import files as files_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

import conf
from policy.nets.fast import quick
from policy.serve.backend import PlannerBackend
from policy.serve.card import Backend
from policy.serve.expect import plain
from policy.serve.fastplan import FastPlan
from policy.serve.measure import random_observations
from policy.timeline import MERGES
from policy.train import checkpoint
from policy.types import Spec
from scripts import common, settings

log = logging.getLogger("dipole.serve")
PLANS = ("warm", "limit", "prior")  # of control: how the planner goes on from what is promised
ADVICE = ("execute", "merge")       # of control: for bridges, in the card
LIMITS = ("lower", "upper", "velocity", "acceleration", "jerk", "step", "rate")  # of a robot, in its units and s: what the policy is meant for


def policy_of(cfg: DictConfig, folder: Path, device: str = "cpu", **origin: Any) -> tuple[PlannerBackend, dict[str, Any]]:
    """The checkpoint of a run drawing plans as cfg says, and what checkpoint.build makes it of.   origin: what else its card says of where it comes from."""
    planner, facts = checkpoint.load(folder, cfg.checkpoint, device=device, trust=list(cfg.trust))
    sampler, guides, control = common.plain(cfg.sampler), common.guide_config(cfg), common.plain(cfg.control)
    check_control(control, planner.spec.horizon, planner.rtc)
    planner.set_sampler(**checkpoint.sampling(sampler, list(cfg.trust)))
    planner.set_guides(checkpoint.guides(guides, list(cfg.trust)))
    config = {**facts["planner"], "sampler": sampler, "guides": guides}
    origin = {"run": folder.resolve().name, "checkpoint": cfg.checkpoint, "step": facts["step"], "dipole": checkpoint.versions()["dipole"],
              "control": {k: control[k] for k in ADVICE if k in control}, "sampler": sampler, "calls": planner.calls, "precision": cfg.precision, **origin}
    robot = robot_of(cfg, planner.spec)
    if robot:
        origin["limits"] = {"robot": robot["name"], **{k: robot[k] for k in LIMITS if k in robot}}
    return PlannerBackend(planner, {**config, "precision": cfg.precision}, facts=origin, joints=robot.get("joints", ()), joint_units=robot.get("units", ()),
                          **{k: control[k] for k in PLANS if k in control}), config


def check_control(control: Mapping[str, Any], horizon: int, rtc: int) -> None:
    """ValueError when no planner of this horizon can go on like that, or no bridge follow the advice.   rtc: actions it was trained to be promised."""
    settings.whole(1, **{"control.execute": control.get("execute", 1)})
    settings.whole(0, **{"control.delay": control.get("delay", 0)})
    settings.number(0, **{f"control.{k}": control.get(k, 0) for k in ("limit", "prior")})
    if (execute := control.get("execute", 1)) > horizon:
        raise ValueError(f"control.execute={execute} must be between 1 and the planner's horizon {horizon}")
    if (merge := control.get("merge", "naive")) not in MERGES:
        raise ValueError(f"control.merge={merge} is unknown; use one of {', '.join(MERGES)}")
    if merge == "prefix" and not rtc:
        raise ValueError("control.merge=prefix: this policy was not trained for it (train.rtc=true); use control.merge=frozen or identity, or guided")
    warm = control.get("warm")
    if warm is not None and not (type(warm) in (int, float) and 0 < warm <= 1):
        raise ValueError(f"control.warm={warm} must be a noise time above 0 and not above 1, or null: from noise")


def robot_of(cfg: DictConfig, spec: Spec) -> dict[str, Any]:
    """What moves by the actions, names, units and limits: robot=NAME, else the robot in conf/robot whose task this is; {} where there is none."""
    if "robot" in cfg:
        robot: dict[str, Any] = common.plain(cfg.robot)["spec"]
        if len(robot["joints"]) != spec.action_dim:
            raise ValueError(f"robot={robot['name']} has {len(robot['joints'])} joints ({', '.join(robot['joints'])}), this policy plans {spec.action_dim} "
                             "action dimensions: name the robot it was trained for, or none")
        return robot
    for path in sorted((files_of(conf) / "robot").iterdir(), key=str) if spec.task else ():
        robot = common.plain(OmegaConf.create(path.read_text(encoding="utf-8")))["spec"]
        if plain(robot.get("task", "")) == plain(spec.task) and len(robot["joints"]) == spec.action_dim:
            return robot
    return {}


def trained(cfg: DictConfig) -> Backend:
    """The policy of cfg.run, as quick as asked."""
    if cfg.precision not in ("fp32", "bf16"):
        raise ValueError(f"precision={cfg.precision} is unknown; use fp32 or bf16")
    torch.set_num_threads(cfg.threads)
    folder = Path(cfg.run)
    cfg = common.of_run(cfg, folder)
    backend, _ = policy_of(cfg, folder, str(checkpoint.pick_device(cfg.device)))
    if cfg.precision == "bf16":
        log.warning("precision=bf16: plans differ by up to %.1e of half the actions' range from those of fp32, over 8 random observations", hastened(backend))
        return backend
    if not cfg.fast:
        return backend
    fast = FastPlan(backend)
    if fast.lacks:
        log.info("plans are made the ordinary way: %s", fast.lacks)
    return fast


def hastened(backend: PlannerBackend) -> float:
    """Let it plan in bf16 from now on; the largest difference that makes, in half ranges of the demonstrations' actions."""
    planner, rng = backend.planner, np.random.default_rng(0)
    asked = [(obs, rng.standard_normal(backend.card.noise_size, np.float32)) for obs in random_observations(planner, 8)]
    before = [backend.plan(obs, noise=noise) for obs, noise in asked]
    planner.denoiser.net = quick(planner.denoiser.net)
    half = (np.array(backend.card.seen_high) - np.array(backend.card.seen_low)) / 2
    return max(float((np.abs(backend.plan(obs, noise=noise) - plan) / half).max()) for (obs, noise), plan in zip(asked, before, strict=True))

"""Checkpoints: one safetensors file each (weights and, for resuming, optimiser), its facts as json inside and beside it. Nothing is unpickled.

The json inside the file is the one that is read: tensors and facts are replaced together or not at all.
"""
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from policy.data.normalize import Normalizer, PerDataset
from policy.data.statistics import shapes
from policy.data.transform import NOTHING, Chain, Transform
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import BestOf
from policy.nets.prefix import Prefix
from policy.planner import Guide, Planner
from policy.types import Spec

OURS = ("policy.nets", "policy.diffusion", "policy.data.transform", "policy.data.relative")  # where a checkpoint's classes and functions may be defined
PACKAGES = ("dipole", "torch", "numpy", "zarr", "mujoco", "gymnasium", "diffusers", "safetensors", "hydra-core", "wandb")


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replace `path` atomically. On any failure (a full disk) the file that was there stays; OSError says what to do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps(facts, indent=1)
    try:
        save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part, metadata={"dipole": text})
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
        part.write_text(text)
        os.replace(part, path.with_suffix(".json"))
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        kept = f"the previous {path.name} is intact" if path.exists() else "no checkpoint was written"
        raise OSError(f"could not save {path}: {e}; {kept}. Free some disk space, then resume with: dipole train run={path.parent.parent} resume=true") from e


def read(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint. FileNotFoundError lists what lies there; ValueError when the file is damaged or foreign."""
    if not path.exists():
        there = sorted(p.stem for p in path.parent.glob("*.safetensors")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"no checkpoint {path}" + (f"; there are {', '.join(there)}" if there else ". Is this the folder of a `dipole train` run?"))
    try:
        with safe_open(path, "pt", device=device) as f:
            facts = json.loads((f.metadata() or {}).get("dipole", "null"))
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} is damaged ({e}); use another checkpoint of the run, or train again") from e
    if not isinstance(facts, dict):
        raise ValueError(f"{path} was not written by dipole: it has weights but no facts about them")
    return tensors, facts


def build(config: dict[str, Any], spec: Spec, normalizer: Normalizer, *, trust: Sequence[str] = ()) -> Planner:
    """A planner from its configuration: nodes encoder, net, schedule, denoiser, objective, transform, sampler, guides, padding_loss …

    Only what policy.nets, policy.diffusion and transforms define is built, and what the packages named in `trust` do: a checkpoint is data, it cannot
    name arbitrary code.
    """
    check_targets(config, (*OURS, *trust))
    transform = transform_of(config, trust)
    encoder = instantiate(config["encoder"], obs=transform.sizes(spec.obs), t_obs=spec.t_obs)
    rtc = config.get("rtc", 0)
    width = transform.width(spec.action_dim, spec.obs) + bool(rtc)
    net = instantiate(config["net"], action_dim=width, cond_shape=(encoder.tokens, encoder.dim), horizon=spec.horizon)
    if rtc:
        net = Prefix(net)
    denoiser = Denoiser(net, instantiate(config["schedule"]), **config["denoiser"])
    learned = {k: config[k] for k in ("padding_loss", "obs_noise", "cond_drop", "rtc") if k in config}
    objective = {"objective": instantiate(config["objective"])} if "objective" in config else {}
    return Planner(spec, normalizer, encoder, denoiser, guides=guides(config.get("guides"), trust), **objective, **learned, transform=transform,
                   **sampling(config["sampler"], trust))


def transform_of(config: dict[str, Any], trust: Sequence[str] = ()) -> Transform:
    """Node transform, {name: transform} in their order (conf/transform/*.yaml); absent where there is none."""
    node = config.get("transform") or {}
    check_targets(node, (*OURS, *trust))
    return Chain(tuple(instantiate(each, _convert_="all") for each in node.values())) if node else NOTHING


def guides(config: dict[str, Any] | None, trust: Sequence[str] = ()) -> list[Guide | BestOf]:
    """conf/guide/*.yaml -> guides in their order."""
    check_targets(config, (*OURS, *trust))
    return [instantiate(g, _convert_="all") for g in (config or {}).values()]


def sampling(config: dict[str, Any], trust: Sequence[str] = ()) -> dict[str, Any]:
    """conf/sampler/*.yaml -> the keyword arguments sampler, steps, spacing, temperature of a Planner."""
    check_targets(config, (*OURS, *trust))
    return {"sampler": instantiate(config["fn"]), "steps": config["steps"], "spacing": config.get("spacing", "trailing"),
            "temperature": config.get("temperature", 1.0)}


def load(run: str | Path, checkpoint: str = "policy", *, device: str = "cpu", trust: Sequence[str] = ()) -> tuple[Planner, dict[str, Any]]:
    """The planner of a run folder (`run/checkpoints/<checkpoint>.safetensors`, averaged weights), ready to plan, and its facts.

    checkpoint: policy, policy_<step>, …; of a policy that normalises each of its datasets for itself policy@<dataset>, whose units it then speaks, or
    policy@* for all of them, to go on training. ValueError when it has several and none is named.
    """
    name, _, dataset = checkpoint.partition("@")
    tensors, facts = read(Path(run) / "checkpoints" / f"{name}.safetensors", device)
    spec = Spec.from_json(facts["spec"])
    config = facts["planner"]
    sizes = shapes(transform_of(config, trust), spec.obs, spec.action_dim, spec.horizon, per_step=config.get("per_step", False))
    known = config.get("datasets") or []
    if (known or dataset not in ("", "*")) and dataset not in (*known, "*"):
        raise ValueError(f"{run} has {f'no statistics of a dataset {dataset!r}' if dataset else 'statistics of several datasets'}: say whose robot it is for, "
                         + (" or ".join(f"checkpoint={name}@{k}" for k in known) if known else f"checkpoint={name}, it has one for all"))
    planner = build(config, spec, PerDataset({k: Normalizer(sizes) for k in known}) if known else Normalizer(sizes), trust=trust)
    planner.load_state_dict({k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")})
    if isinstance(planner.normalizer, PerDataset) and dataset != "*":
        planner.normalizer = planner.normalizer.chosen(dataset)
        facts["planner"] = {k: v for k, v in config.items() if k != "datasets"}
    return planner.to(device).eval().requires_grad_(False), facts


def check_targets(node: Any, allowed: Sequence[str]) -> None:
    """ValueError when a `_target_` anywhere in node is not defined in one of the allowed packages; nothing is called to find out."""
    if isinstance(node, dict):
        if "_target_" in node:
            _check_target(str(node["_target_"]), allowed)
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            check_targets(child, allowed)


def _check_target(target: str, allowed: Sequence[str]) -> None:
    inside = tuple(f"{package}." for package in allowed)
    home = ""
    if target.startswith(inside):  # only then is anything imported
        try:
            # a name can lead out again (policy.nets.blocks.torch.load): what counts is where the thing was defined
            home = f"{getattr(get_object(target), '__module__', '')}."
        except Exception as e:
            raise ValueError(f"the configuration names {target!r}, which does not import: {e}") from e
    if not home.startswith(inside):
        raise ValueError(f"the configuration wants to run {target!r}; only what {', '.join(allowed)} define is trusted. "
                         f"If that code is yours: trust=[{target.split('.')[0]}]")


def pick_device(device: str) -> torch.device:
    """"auto" is the GPU where there is one. ValueError when the device is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch raises either
        raise ValueError(f"device={device} cannot be used here: {str(e).splitlines()[0]}. Use device=auto or device=cpu") from e
    return torch.device(device)

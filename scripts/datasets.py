"""The data that a configuration names: data.path, one dataset or several, here or behind URLs, resident or streamed."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from policy.data.sources import Entry, entries, memory_of, windows
from policy.data.store import Store
from policy.data.windows import TrajectoryDataset
from scripts.settings import plain

NOT_RECORDED = ("max_steps", "workers", "timeout", "meshes")  # settings that change nothing in what an expert shows
ABOUT = ("path", "obs", "action", "weights", "missing", "fps", "semantics", "normalize_per", "memory", "readers")  # the rest of node data cuts windows


def named(cfg: DictConfig) -> list[Entry]:
    """Node data, opened. With checkpoint=policy@NAME the dataset of that name alone, whose normaliser the policy then has."""
    cfg.data.path  # noqa: B018  named by omegaconf where it is missing
    d = plain(cfg.data)
    for path in [p.get("path", "") if isinstance(p, dict) else p for p in (d["path"] if isinstance(d["path"], list) else [d["path"]])]:
        if "://" not in str(path) and not Path(path).exists():
            raise FileNotFoundError(f"there is no dataset {path}. Name one with data.path=…, or record one: dipole collect path={path}")
    if (per := d.get("normalize_per") or "all") not in ("all", "dataset"):
        raise ValueError(f"data.normalize_per={per!r} must be all (one normaliser) or dataset (each has its own)")
    found = entries(d["path"], d.get("obs"), d["action"], weights=d.get("weights"), missing=d.get("missing", "error"))
    only = str(cfg.get("checkpoint") or "").partition("@")[2]
    return [e for e in found if e.name == only] or found


def apart(cfg: DictConfig, found: Sequence[Entry]) -> bool:
    """Whether each dataset is normalised for itself."""
    return cfg.data.get("normalize_per") == "dataset" and len(found) > 1


def dataset(cfg: DictConfig, split: str, device: torch.device, found: Sequence[Entry] | None = None) -> TrajectoryDataset:
    found = named(cfg) if found is None else found
    cut = {k: v for k, v in plain(cfg.data).items() if k not in ABOUT}
    memory = memory_of(cfg.data.get("memory"), found, device)
    return windows(found, split, t_obs=cfg.t_obs, horizon=cfg.horizon, memory=memory, readers=cfg.data.get("readers"), named=apart(cfg, found), device=device,
                   **cut)


def held_out(cfg: DictConfig, device: torch.device, found: Sequence[Entry]) -> TrajectoryDataset | None:
    """The episodes that training does not see; None where there is a single episode or val_ratio is 0."""
    if not cfg.data.val_ratio or not all(e.store.episodes > 1 for e in found):
        return None
    return dataset(cfg, "val", device, found)


def settle_memory(cfg: DictConfig, found: Sequence[Entry], device: torch.device, folder: Path) -> None:
    """Put a number, or null for resident, where data.memory says auto: a resumed run must find the memory, and so the order, of before."""
    said, before = cfg.data.get("memory"), folder / "config.yaml"
    if said == "auto" and cfg.resume and before.exists():
        said = OmegaConf.select(OmegaConf.load(before), "data.memory")
    OmegaConf.update(cfg, "data.memory", memory_of(said, found, device), force_add=True)


def check_settings(cfg: DictConfig) -> None:
    """ValueError when the data is known to be of the same task in other settings: mazes of all sizes look alike."""
    now = plain(cfg.env)
    for store in (e.store for e in named(cfg)):
        then: dict[str, Any] = store.attrs.get("env") or {}
        other = [k for k in then.keys() & now.keys() if then[k] != now[k] and k not in NOT_RECORDED]
        if then.get("_target_") == now.get("_target_") and other:
            of, here = (", ".join(f"env.{k}={node[k]}".replace("=True", "=true").replace("=False", "=false") for k in sorted(other)) for node in (then, now))
            raise ValueError(f"{store.path} was recorded with {of}, and this is training for {here}: say {of}, or record others with dipole collect {here}")


def told(found: Sequence[Entry], data: TrajectoryDataset) -> str:
    """How the data is held, in words; '' for one dataset in memory."""
    words = []
    if len(found) > 1:
        drawn = getattr(data, "draws", [])
        words.append(", ".join(f"{e.name} {n / sum(drawn):.0%}" for e, n in zip(found, drawn, strict=True)))
    parts = getattr(data, "parts", {found[0].name: data})
    if live := {name: p for name, p in parts.items() if getattr(p, "live", 0)}:
        words.append("streamed: " + ", ".join(f"{', '.join(p.streamed)} of {name}, {p.live} of {p.blocks} blocks of {p.block} frames at a time"
                                              for name, p in live.items()))
    return "; ".join(words)


def main_store(cfg: DictConfig) -> Store:
    """That of the first dataset: what a run says about its task."""
    return named(cfg)[0].store

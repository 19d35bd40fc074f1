"""From what a configuration says of its data to windows: one dataset or several, resident or streamed."""
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policy.data.mixture import Mixture
from policy.data.semantics import Semantics
from policy.data.store import Store
from policy.data.stream import Streamed
from policy.data.windows import Field, TrajectoryDataset

Obs = Mapping[str, str | Field | Mapping[str, Any]] | Sequence[str] | None
RESIDENT_SHARE, STREAMED_SHARE = 0.5, 0.25  # memory=auto: of what is free, the most that a resident dataset takes, and what a streamed one is given


@dataclass(frozen=True)
class Entry:
    """One dataset of a configuration: its store, its name (of the checkpoint's normalisers, too), its share of the samples and its keys."""
    store: Store
    name: str
    weight: float | None
    obs: Mapping[str, Any]
    action: Any


def entries(path: str | Path | Sequence[str | Mapping[str, Any]], obs: Obs = None, action: str | Mapping = "action", *,
            weights: Sequence[float] | None = None, missing: str = "error") -> list[Entry]:
    """path: a store; or several, each a path or {path, weight, name, obs, action}.   ValueError when weights are said twice or for some only."""
    nodes: list[Mapping[str, Any]] = [n if isinstance(n, Mapping) else {"path": n} for n in ([path] if isinstance(path, str | Path) else path)]
    if not nodes:
        raise ValueError("data.path=[] names no dataset")
    for node in nodes:
        if wrong := sorted(set(node) - {"path", "weight", "name", "obs", "action"}) or "path" not in node:
            raise ValueError(f"data.path holds {dict(node)}: each dataset has path, and if need be weight, name, obs and action"
                             + (f", not {', '.join(wrong)}" if isinstance(wrong, list) else ""))
    said = [n.get("weight") for n in nodes]
    if weights is not None and (len(weights) != len(nodes) or any(w is not None for w in said)):
        raise ValueError(f"data.weights={list(weights)} must be one number for each of the {len(nodes)} datasets of data.path, which then have no weight of "
                         "their own")
    if any(w is None for w in said) and any(w is not None for w in said):
        raise ValueError(f"{sum(w is None for w in said)} of the datasets in data.path have no weight: give one to each, or to none")
    names = _names([str(n.get("name") or _stem(str(n["path"]))) for n in nodes])
    given = said if weights is None else weights
    found = []
    for node, name, weight in zip(nodes, names, given, strict=True):
        store, act = Store.open(node["path"], missing=missing), node.get("action") or action
        found.append(Entry(store, name, weight, _observed(store, node.get("obs") or obs, act), act))
    _same_meaning(found)
    return found


def windows(found: Sequence[Entry], split: str, *, t_obs: int, horizon: int, val_ratio: float = 0.02, max_episodes: int | None = None,
            memory: int | None = None, readers: int | None = None, named: bool = False, device: torch.device | str = "cpu") -> TrajectoryDataset:
    """What a Trainer draws from.   memory: bytes for all of them, None: resident.   named: batches say which dataset a row is of."""
    how: dict[str, Any] = dict(t_obs=t_obs, horizon=horizon, split=split, val_ratio=val_ratio, max_episodes=max_episodes, device=device)
    drawn = [e.store.steps if e.weight is None else e.weight for e in found]
    parts = {}
    for e, share in zip(found, drawn, strict=True):
        parts[e.name] = TrajectoryDataset(e.store, e.obs, e.action, **how) if memory is None else \
            Streamed(e.store, e.obs, e.action, memory=int(memory * share / sum(drawn)), readers=readers, **how)
    if len(found) == 1:
        return next(iter(parts.values()))
    weights = None if found[0].weight is None else [float(e.weight or 0) for e in found]
    return Mixture(parts, weights, named=named)


def memory_of(said: str | float | None, found: Sequence[Entry], device: torch.device | str = "cpu") -> int | None:
    """data.memory -> bytes, None for resident.   auto: resident when that takes at most half of the free memory, of the GPU's where it lies there."""
    if said is None or isinstance(said, int | float):
        if said is not None and not said > 0:
            raise ValueError(f"data.memory={said} must be bytes above 0, auto, or null to keep everything resident")
        return None if said is None else int(said)
    if said != "auto":
        raise ValueError(f"data.memory={said!r} must be a number of bytes (2e9), auto, or null to keep everything resident")
    device, here = torch.device(device), free_memory()
    room = min(here, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else here
    return None if sum(resident_bytes(e) for e in found) <= RESIDENT_SHARE * room else int(STREAMED_SHARE * here)


def resident_bytes(e: Entry) -> int:
    """What the dataset takes in memory."""
    frame = 16
    for field in (Field.of(f) for f in [*e.obs.values(), e.action]):
        shape, dtype = e.store.schema.get(field.key, ((), None))
        shape = shape if field.take is None or not shape else (*shape[:-1], len(field.take))
        frame += math.prod(shape) * (1 if field.dtype == "uint8" or (field.dtype is None and dtype == "uint8") else 4)
    return frame * e.store.steps


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that is less."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            most, now = (Path("/sys/fs/cgroup", name).read_text().strip() for name in (limit, used))
        except OSError:
            continue
        if most != "max":
            free = min(free, max(0, int(most) - int(now)))
    return free


def _observed(store: Store, obs: Obs, action: Any) -> dict[str, Any]:
    """{name: key or Field's arguments}; where nothing is said the store's attribute `obs`, else every key but the action."""
    obs = obs or store.attrs.get("obs") or [k for k in store.keys if k != Field.of(action).key]
    return dict(obs) if isinstance(obs, Mapping) else {k: k for k in obs}


def _stem(path: str) -> str:
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return name.removesuffix(".zip").removesuffix(".zarr") or "data"


def _names(names: Sequence[str]) -> list[str]:
    """Each of them once: the second a is a_2."""
    made: list[str] = []
    for name in names:
        n, each = 1, name
        while each in made:
            n += 1
            each = f"{name}_{n}"
        made.append(each)
    return made


def _same_meaning(found: Sequence[Entry]) -> None:
    """ValueError when the datasets are known to differ in what their numbers mean."""
    first = found[0]
    a = Semantics.from_json(first.store.attrs.get("action"))
    for e in found[1:]:
        b = Semantics.from_json(e.store.attrs.get("action"))
        wrong = [f"{what} {x!r} in {first.name} and {y!r} in {e.name}" for what, x, y in
                 [("fps is", first.store.fps, e.store.fps), *((f"actions' {k} is", getattr(a, k), getattr(b, k)) for k in ("kind", "space", "rotation")),
                  *((f"the unit of {k} is", first.store.units.get(_key(first, k)), e.store.units.get(_key(e, k))) for k in [*first.obs, "action"])]
                 if x and y and x != y and "unknown" not in (x, y)]
        if wrong:
            raise ValueError(f"these datasets cannot be mixed: {'; '.join(wrong)}. Convert one to the other's (dipole data convert), or train on one")


def _key(e: Entry, name: str) -> str:
    return Field.of(e.action if name == "action" else e.obs.get(name, name)).key

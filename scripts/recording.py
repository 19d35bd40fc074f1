"""`dipole eval record=FOLDER.zarr`: what a policy does, as demonstrations."""
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.record import Recorder
from policy.data.semantics import Semantics
from policy.episodes import Episode
from policy.rollout import Keep
from policy.types import Spec

WHICH = ("all", "success")


def recorder(path: str | None, spec: Spec, fps: float, *, task: str, env: dict[str, Any], data: dict[str, Any],
             by: str) -> AbstractContextManager[Recorder | None]:
    """Of a policy's own dataset, made or appended to; nothing without a path.   data: node data of what the policy was trained on."""
    if path is None:
        return nullcontext()
    meant = meaning(data)
    return Recorder(Path(path), fps=fps or spec.fps, units=spec.units, action_semantics=spec.action_semantics or None,
                    attrs={"task": task, "env": env, "policy": by, "obs": list(spec.obs), **({"action": meant.to_json()} if meant else {})})


def meaning(data: dict[str, Any]) -> Semantics | None:
    """What node data says of its actions, about observations by the names that the environment gives them; None where it says nothing."""
    if not data.get("semantics"):
        return None
    said = Semantics.from_json(data["semantics"])
    for name, told in (data.get("obs") or {}).items():
        field: dict[str, Any] = {"key": told} if isinstance(told, str) else told
        take = field.get("take")
        if field["key"] == said.of and (take is None or set(said.of_take or take) <= set(take)):
            channels = said.of_take if take is None or said.of_take is None else tuple(list(take).index(i) for i in said.of_take)
            return replace(said, of=name, of_take=channels)
    return replace(said, of=None, of_take=None)


def keeping(to: Recorder | None, which: str) -> Keep | None:
    """What policy.rollout.evaluate tells of every episode; those that broke off are left out."""
    if which not in WHICH:
        raise ValueError(f"record_only={which!r} is unknown; use all or success")
    if to is None:
        return None

    def keep(episode: Episode) -> None:
        if len(episode.actions) and not episode.error and (episode.success or which == "all"):
            to.extend([{**episode.observed, "action": episode.actions, "reward": episode.reward.astype(np.float32)}])
    return keep

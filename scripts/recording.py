"""`dipole eval record=FOLDER.zarr`: what a policy does, as demonstrations."""
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.record import Recorder
from policy.episodes import Episode
from policy.rollout import Keep
from policy.types import Spec

WHICH = ("all", "success")


def recorder(path: str | None, spec: Spec, fps: float, *, task: str, env: dict[str, Any], by: str) -> AbstractContextManager[Recorder | None]:
    """Of a policy's own dataset, made or appended to; nothing without a path."""
    if path is None:
        return nullcontext()
    return Recorder(Path(path), fps=fps or spec.fps, units=spec.units, action_semantics=spec.action_semantics or None,
                    attrs={"task": task, "env": env, "policy": by, "obs": list(spec.obs)})


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

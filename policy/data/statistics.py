"""What a Normalizer is fitted on: frames as they are stored, or what transforms make of every chunk, measured block by block."""
from collections.abc import Mapping
from typing import Any

import torch

from policy.data.mixture import Mixture
from policy.data.moments import BLOCK, Moments
from policy.data.normalize import MEASURED, Normalizer, PerDataset, measured
from policy.data.transform import NOTHING, Sizes, Transform
from policy.data.windows import TrajectoryDataset

PHYSICAL = "action.physical"  # statistics of the actions before transforms: their range, for whom it is told


def fit(data: TrajectoryDataset, transform: Transform = NOTHING, modes: Mapping[str, str] | str = "limits", *, per_step: bool = False) -> Normalizer:
    """Measure the training data as the network will see it, in bounded memory; modes as Normalizer.fit has them, those of "action" after transforms.

    Every step of every window counts, what is repeated behind an episode's end too.   per_step: each step of a chunk has its own shift and scale, for
    relative actions grow along it.   A Mixture whose batches say which dataset a row is of has a Normalizer for each.
    """
    if isinstance(data, Mixture) and data.named:
        return PerDataset({name: fit(part, transform, modes, per_step=per_step) for name, part in data.parts.items()})
    if transform == NOTHING and not per_step:
        return Normalizer.fit(data.arrays, modes)
    frames: dict[str, Any] = dict(data.arrays)
    action = frames.pop("action")
    given = dict(modes) if isinstance(modes, Mapping) else dict.fromkeys(data.arrays, modes)
    mode = given.pop("action", "limits")
    if mode not in MEASURED and mode != "identity":
        raise ValueError(f"mode {mode!r} of 'action' is unknown; use one of {', '.join([*MEASURED, 'identity'])}")
    seen = {k: x for k, x in frames.items() if isinstance(x, torch.Tensor)}  # the others lie on disk, and nothing turns those
    parts = [Normalizer.fit({**frames, **transform.encode_obs(seen)}, given), Normalizer.fit({PHYSICAL: action})]
    sizes = {k: tuple(x.shape[1:]) for k, x in frames.items()}
    whole = Normalizer(shapes(transform, sizes, action.shape[1], data.horizon, per_step=per_step)).to(action.device)
    for part in parts:
        whole.load_state_dict(part.state_dict(), strict=False)
    if mode != "identity":
        moments = _chunks(data, transform, per_step, Moments(quantiles=mode == "quantile"))
        whole.place("action", moments.lo, moments.hi, *measured(mode, moments))
    return whole


def shapes(transform: Transform, obs: Sizes, d: int, horizon: int, *, per_step: bool = False) -> dict[str, tuple[int, ...]]:
    """Of the Normalizer that fit gives, for load_state_dict.   obs, d: observations and action channels of the robot."""
    if transform == NOTHING and not per_step:
        return {**obs, "action": (d,)}
    width = transform.width(d, obs)
    return {**transform.sizes(obs), "action": (horizon, width) if per_step else (width,), PHYSICAL: (d,)}


@torch.no_grad()
def _chunks(data: TrajectoryDataset, transform: Transform, per_step: bool, seen: Moments) -> Moments:
    at_once = max(1, BLOCK // (data.horizon * data.arrays["action"].shape[1]))
    for index in torch.arange(len(data)).split(at_once):
        batch = data.batch(index, only=transform.reads)
        chunks = transform.encode(batch.action, batch.obs, batch.valid)
        seen.add(chunks.flatten(1) if per_step else chunks)
    return seen

"""Windows over episodes, all frames resident in memory: a batch is one gather per key, with no per-sample Python and no worker processes.

A window belongs to a frame i. Its observation history is frames i-t_obs+1 … i; its action chunk starts *now*: action[0] answers frame i.
Both stay inside the episode: before its start the first frame is repeated (as a controller does at reset), behind its end the last action
is repeated and marked invalid.
"""
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from policy.data.files import DataError
from policy.data.split import split_episodes
from policy.data.store import BLOCK_BYTES, Store, refuse_not_finite
from policy.types import Batch


@dataclass(frozen=True)
class Field:
    """A stored key as the policy sees it.

    take:  channels of the last axis to keep, in this order; None keeps all.
    dtype: None keeps uint8 and makes anything else float32; "uint8" packs images that were stored as floats 0 … 255 (4x less memory).
    """
    key: str
    take: Sequence[int] | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, spec: "str | Field | Mapping[str, Any]") -> "Field":
        if isinstance(spec, Field):
            return spec
        return cls(**spec) if isinstance(spec, Mapping) else cls(spec)


class TrajectoryDataset(Dataset):
    """One window per frame of the split's episodes.   dataset[i] -> Batch without the b axis;   batch(index) -> Batch.

    obs, action: {name: stored key or Field}, stored key or Field.   device: where every frame lives and where batches are made.
    split: whole episodes are held out, val_ratio of them (at least one, when there are two) by a permutation from seed; max_episodes
    keeps that many training episodes and leaves "val" as it is. "all" is both.
    arrays {name: (n, *shape)} holds the split's frames, "action" included: what a Normalizer is fitted on.
    Under a DataLoader pass collate_fn=TrajectoryDataset.collate. KeyError lists the stored keys; DataError names a NaN or a damaged file.
    """

    def __init__(self, store: Store, obs: Mapping[str, str | Field | Mapping], action: str | Field | Mapping, *, t_obs: int = 2,
                 horizon: int = 16, split: str = "train", val_ratio: float = 0.02, seed: int = 42, max_episodes: int | None = None,
                 device: torch.device | str = "cpu"):
        if t_obs < 1 or horizon < 1:
            raise ValueError(f"t_obs and horizon count frames and are at least 1, got {t_obs} and {horizon}")
        if "action" in obs:
            raise ValueError("an observation cannot be named 'action', batches and normalisers use that name. Call it, say, last_action")
        self.t_obs, self.horizon, self.split = t_obs, horizon, split
        self.episodes = split_episodes(store.episodes, split, val_ratio=val_ratio, seed=seed, max_episodes=max_episodes)
        self.spans = spans = [store.span(i) for i in self.episodes]  # frames of the store
        fields = {**{name: Field.of(f) for name, f in obs.items()}, "action": Field.of(action)}
        self.arrays = {name: load(store, f, spans).to(device) for name, f in fields.items()}  # {name: (n, *shape)}
        if self.arrays["action"].ndim != 2:
            raise DataError(f"{store.path}: action {fields['action'].key!r} has shape {tuple(self.arrays['action'].shape[1:])} per frame, "
                            "expected (d,). Flatten it when recording")
        lengths = torch.tensor([hi - lo for lo, hi in spans])
        ends = lengths.cumsum(0)
        self._first = (ends - lengths).repeat_interleave(lengths).to(device)  # (n,) first and last frame of the episode frame i is in
        self._last = (ends - 1).repeat_interleave(lengths).to(device)
        self._past = torch.arange(1 - t_obs, 1, device=device)
        self._ahead = torch.arange(horizon, device=device)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape of one frame}, "action" included: what a Normalizer is built from."""
        return {name: tuple(x.shape[1:]) for name, x in self.arrays.items()}

    def __len__(self) -> int:
        return len(self._first)

    def whole(self) -> list[Tensor]:
        """For each episode the windows whose actions all lie within it: index (m,), empty for an episode shorter than the horizon."""
        starts = self._first.unique().tolist()
        return [torch.arange(i, max(i, int(self._last[i]) + 2 - self.horizon)) for i in starts]

    def batch(self, index: Tensor, only: Collection[str] | None = None) -> Batch:
        """index (b,) int64 in [0, len) -> Batch(obs {name: (b, t_obs, *shape)}, action (b, horizon, d), valid (b, horizon)) on `device`.

        only: the observations that are wanted, all when None.
        """
        index = index.to(self._first.device)
        frame, last, past = index[:, None], self._last[index][:, None], self._past_of(index)
        ahead = frame + self._ahead
        obs = {name: self._frames(name, past) for name in self.arrays if name != "action" and (only is None or name in only)}
        return Batch(obs, _gather(self.arrays["action"], torch.minimum(ahead, last)), ahead <= last)

    def _past_of(self, index: Tensor) -> Tensor:
        """Observed frames (b, t_obs) of windows (b,)."""
        return torch.maximum(index[:, None] + self._past, self._first[index][:, None])

    def _frames(self, name: str, frames: Tensor) -> Tensor:
        """frames (b, t) of an observation -> (b, t, *shape)"""
        return _gather(self.arrays[name], frames)

    @property
    def order_facts(self) -> dict[str, Any]:
        """What the order of an epoch depends on beside the seed; JSON."""
        return {}

    def epoch(self, seed: int) -> "Epoch":
        """Every window once, in an order drawn from seed."""
        return Epoch(self, torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self._first.device))

    def __getitem__(self, i: int) -> Batch:
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        return self.batch(torch.tensor([i % len(self)])).map(lambda x: x[0])

    def __getitems__(self, index: list[int]) -> Batch:
        return self.batch(torch.as_tensor(index))

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """For DataLoader(collate_fn=…): __getitems__ has made the batch already."""
        return batch


class Epoch:
    """One pass over the windows of a dataset in the order (n,) of training."""

    def __init__(self, data: "TrajectoryDataset", order: Tensor):
        self.data, self.order = data, order

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, lo: int, hi: int) -> Batch:
        """The lo-th to the (hi - 1)-th window; fastest where the last batch ended, and the same bits anywhere."""
        return self.data.batch(self.order[lo:hi])

    def close(self) -> None:
        """No batch is wanted any more."""


def load(store: Store, field: Field, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The frames of field in spans, one after the other -> (n, *shape), float32 or uint8; a scalar per frame becomes (1,)."""
    shape, dtype = _known(store, field)
    n, at = sum(hi - lo for lo, hi in spans), 0
    out: Tensor = torch.empty(0)
    for lo, hi in _blocks(spans, max(1, BLOCK_BYTES // max(1, math.prod(shape) * dtype.itemsize))):
        part = read_frames(store, field, lo, hi)
        if not at:
            out = part.new_empty(n, *part.shape[1:])
        out[at:at + len(part)] = part
        at += len(part)
    return out


def read_frames(store: Store, field: Field, lo: int, hi: int) -> Tensor:
    """Frames [lo, hi) of field -> (hi - lo, *shape), float32 or uint8.   DataError names a NaN."""
    shape, dtype = _known(store, field)
    values = store.read(field.key, lo, hi).reshape(hi - lo, *(shape or (1,)))
    if dtype.kind == "f":
        refuse_not_finite(store, field.key, values, lo)
    return torch.from_numpy(_cast(store, field, _take(store, field, values)))


def _known(store: Store, field: Field) -> tuple[tuple[int, ...], np.dtype]:
    if field.key not in store.schema:
        raise KeyError(f"{field.key!r} is not in {store.path} (known: {', '.join(store.keys)})")
    return store.schema[field.key]


def _gather(x: Tensor, frames: Tensor) -> Tensor:
    """x (n, *shape), frames (b, t) -> (b, t, *shape)"""
    return x.index_select(0, frames.flatten()).unflatten(0, frames.shape)


def _blocks(spans: Sequence[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring spans joined, then cut into pieces of at most `most` frames: few reads, each of bounded size."""
    runs: list[list[int]] = []
    for lo, hi in spans:
        if runs and runs[-1][1] == lo:
            runs[-1][1] = hi
        else:
            runs.append([lo, hi])
    for lo, hi in runs:
        for a in range(lo, hi, most):
            yield a, min(a + most, hi)


def _take(store: Store, field: Field, values: np.ndarray) -> np.ndarray:
    if field.take is None:
        return values
    take, width = [int(i) for i in field.take], values.shape[-1]
    if not take or min(take) < 0 or max(take) >= width:
        raise IndexError(f"{field.key!r} in {store.path} has channels 0 to {width - 1} on its last axis, take={take} does not fit")
    return values[..., take]


def _cast(store: Store, field: Field, values: np.ndarray) -> np.ndarray:
    if field.dtype not in (None, "uint8", "float32"):
        raise ValueError(f"dtype of {field.key!r} is None, uint8 or float32, got {field.dtype!r}")
    if field.dtype != "uint8" or values.dtype == np.uint8:
        keep = field.dtype is None and values.dtype == np.uint8
        return np.ascontiguousarray(values, np.uint8 if keep else np.float32)
    if values.min() < 0 or values.max() > 255 or (values.max() <= 1 and (values % 1).any()):
        raise DataError(f"{store.path}: {field.key!r} spans {values.min()} to {values.max()}, so it is not an image in 0 … 255. "
                        "Leave out dtype: uint8")
    return np.rint(values).astype(np.uint8)

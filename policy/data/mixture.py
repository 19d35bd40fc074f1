"""Several datasets trained on as one, each with its share of the samples."""
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.data.windows import Epoch, TrajectoryDataset
from policy.types import Batch

Part = TrajectoryDataset


class Mixture(TrajectoryDataset):
    """parts {name: dataset} with the same observations and actions; windows are counted through all of them, in their order.

    weights: share of the samples that each part gives, of any sum; None: each window once an epoch. An epoch is as many draws as there are windows, the
    shares are exact in each (to one sample), the order is random, and a part that is drawn from more often than it has windows gives all of them before any
    again; one that gives fewer gives other ones in every epoch.   named: batches say which part each window is of (Batch.source).
    ValueError: a weight that is no positive number, parts that do not look alike.
    """

    def __init__(self, parts: Mapping[str, Part], weights: Sequence[float] | None = None, *, named: bool = False):
        if not parts or (weights is not None and len(weights) != len(parts)):
            raise ValueError(f"data.weights={list(weights or ())} must be one number for each of the datasets {', '.join(parts)}")
        if weights is not None and not all(isinstance(w, int | float) and 0 < w < float("inf") for w in weights):
            raise ValueError(f"data.weights={list(weights)} must be numbers above 0: leave out a dataset that should not be drawn from")
        self.parts, self.named = dict(parts), named
        self._all = list(self.parts.values())
        _alike(self.parts)
        first = self._all[0]
        self.t_obs, self.horizon, self.split = first.t_obs, first.horizon, first.split
        self._ends = torch.tensor([len(p) for p in self._all]).cumsum(0)
        sizes = [len(p) for p in self._all]
        self.weights = None if weights is None else [w / sum(weights) for w in weights]
        self.draws = sizes if self.weights is None else shares(self.weights, len(self))  # of each part in an epoch
        self.episodes = [i for p in self._all for i in p.episodes]

    @property
    def arrays(self) -> dict[str, Any]:  # type: ignore[override]
        """{name: all parts' frames, one after the other}: what a Normalizer is fitted on."""
        return {name: _joined([p.arrays[name] for p in self._all]) for name in self._all[0].arrays}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._all[0].shapes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def whole(self) -> list[Tensor]:
        return [index + self._start(i) for i, p in enumerate(self._all) for index in p.whole()]

    def batch(self, index: Tensor, only: Collection[str] | None = None) -> Batch:
        index = index.cpu()
        part = torch.searchsorted(self._ends, index, right=True)
        rows = [(part == i).nonzero().flatten() for i in range(len(self._all))]
        made = [(i, at, p.batch(index[at] - self._start(i), only)) for i, (p, at) in enumerate(zip(self._all, rows, strict=True)) if len(at)]
        return self._placed(made)

    @property
    def order_facts(self) -> dict[str, Any]:
        return {"parts": [{"windows": len(p), **p.order_facts} for p in self._all], "weights": self.weights}

    def epoch(self, seed: int) -> "MixedEpoch":
        return MixedEpoch(self, seed)

    def _start(self, i: int) -> int:
        return int(self._ends[i - 1]) if i else 0

    def _placed(self, made: Sequence[tuple[int, Tensor, Batch]]) -> Batch:
        """(part, rows of the batch, their windows), … as one batch."""
        order = torch.cat([rows for _, rows, _ in made]).argsort()
        batches = [batch for *_, batch in made]

        def join(each: Sequence[Tensor]) -> Tensor:
            return each[0] if len(each) == 1 else torch.cat(list(each)).index_select(0, order.to(each[0].device))
        source = torch.cat([torch.full((len(rows),), i) for i, rows, _ in made])[order] if self.named else None
        return Batch({k: join([b.obs[k] for b in batches]) for k in batches[0].obs}, join([b.action for b in batches]), join([b.valid for b in batches]),
                     None if source is None else source.to(batches[0].action.device))


class MixedEpoch(Epoch):
    """Which part each draw is from is random; from a part come its own epochs, one after the other."""

    def __init__(self, data: Mixture, seed: int):
        self._mixture, self._seed = data, seed
        generator = torch.Generator().manual_seed(seed)
        turns = torch.arange(len(data.draws)).repeat_interleave(torch.tensor(data.draws))
        turns = turns[torch.randperm(len(turns), generator=generator)]
        self._draws = [(turns == i).nonzero().flatten() for i in range(len(data.draws))]  # where each part has its turn
        self._n = len(turns)
        self._seeds = [torch.Generator().manual_seed(int(s)) for s in torch.randint(2**62, (len(data.draws),), generator=generator)]
        self._passes: list[list[int]] = [[] for _ in data.draws]  # seeds of a part's own epochs
        self._open: dict[int, tuple[int, Epoch]] = {}  # {part: (which of its epochs, that)}

    def __len__(self) -> int:
        return self._n

    def batch(self, lo: int, hi: int) -> Batch:
        made = []
        for i, draws in enumerate(self._draws):
            a, b = (int(torch.searchsorted(draws, at)) for at in (lo, hi))
            while a < b:
                size = len(self._mixture._all[i])
                end = min(b, (a // size + 1) * size)
                made.append((i, draws[a:end] - lo, self._pass(i, a // size).batch(a % size, a % size + end - a)))
                a = end
        return self._mixture._placed(made)

    def close(self) -> None:
        for _, epoch in self._open.values():
            epoch.close()
        self._open.clear()

    def _pass(self, i: int, which: int) -> Epoch:
        """The which-th epoch of part i."""
        if self._open.get(i, (-1,))[0] != which:
            if i in self._open:
                self._open[i][1].close()
            while len(self._passes[i]) <= which:
                self._passes[i].append(int(torch.randint(2**62, (), generator=self._seeds[i])))
            self._open[i] = which, self._mixture._all[i].epoch(self._passes[i][which])
        return self._open[i][1]


class _Joined:
    """Frames of several parts, one after the other (policy.data.normalize.Frames)."""

    def __init__(self, each: Sequence[Any]):
        self._each, self.dtype, self.device = each, each[0].dtype, each[0].device
        self.shape = torch.Size([sum(len(x) for x in each), *each[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, size: int, /):
        for x in self._each:
            yield from x.split(size)


def _joined(each: Sequence[Any]) -> Any:
    return torch.cat(list(each)) if all(isinstance(x, Tensor) for x in each) else _Joined(each)


def shares(weights: Sequence[float], n: int) -> list[int]:
    """n as whole numbers in the proportion of weights (their sum is 1), by largest remainders."""
    exact = [w * n for w in weights]
    counts = [int(x) for x in exact]
    for i in sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])[:n - sum(counts)]:
        counts[i] += 1
    return counts


def _alike(parts: Mapping[str, Part]) -> None:
    (name, first), *rest = parts.items()
    for other, part in rest:
        for key in dict.fromkeys([*first.shapes, *part.shapes]):
            here, there = first.shapes.get(key), part.shapes.get(key)
            if here != there:
                words = [f"{f'{x} a step' if x is not None else 'missing'} in {n}" for x, n in ((here, name), (there, other))]
                raise ValueError(f"datasets that are mixed must look alike, and {key!r} is {' and '.join(words)}: name what all of them have, data.obs={{name: "
                                 "key}, for each its own where keys differ, data.path=[{path: …, obs: {…}}, …]")
            if first.arrays[key].dtype != part.arrays[key].dtype:
                raise ValueError(f"{key!r} is {first.arrays[key].dtype} in {name} and {part.arrays[key].dtype} in {other}: say dtype: uint8 of the images that "
                                 "are stored as floats, data.obs={name: {key: …, dtype: uint8}}")
        if (first.t_obs, first.horizon) != (part.t_obs, part.horizon):
            raise ValueError(f"windows of {name} and {other} differ in length")

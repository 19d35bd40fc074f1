"""Per-channel affine normalisation, stored as buffers: it travels with the weights, the EMA and the exported graph.

encode is (x - shift) / scale. A channel that does not move would be divided by nothing, or its sensor noise blown up to full range; it is
only centred (scale 1), so it encodes to 0 and decodes to the constant.
"""
from collections.abc import Iterable, Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from policy.data.moments import BLOCK, Moments

Shapes = Mapping[str, tuple[int, ...]]


class Frames(Protocol):
    """Frames (n, *shape) that can be looked at piece by piece: a Tensor, or what lies on disk."""
    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def split(self, split_size: int, /) -> Iterable[Tensor]: ...


class Normalizer(nn.Module):
    """encode: stored units -> about [-1, 1]; decode: back.   shapes: {key: shape of one frame}.

    Built from shapes it is the identity, ready for load_state_dict; Normalizer.fit measures. A key whose frames have up to two axes has a
    shift and a scale per element, one with more (an image) has a single pair.
    """

    def __init__(self, shapes: Shapes):
        super().__init__()
        self.shapes = {key: tuple(shape) for key, shape in shapes.items()}
        for key, shape in self.shapes.items():
            small = shape if len(shape) <= 2 else (1,) * len(shape)
            self.register_buffer(_name("shift", key), torch.zeros(small))
            self.register_buffer(_name("scale", key), torch.ones(small))

    @classmethod
    @torch.no_grad()
    def fit(cls, arrays: Mapping[str, Frames], modes: Mapping[str, str] | str = "limits", *, min_range: float = 1e-4) -> "Normalizer":
        """Measure arrays {key: (n, *shape)}, the training episodes only, in one pass and bounded memory.

        modes, one for all or {key: mode}: limits (min, max -> -1, 1), quantile (1 %, 99 % -> -1, 1), gaussian (mean 0, std 1), identity
        (quaternions, 6-D rotations), image (0 … 255 -> -1, 1). Where no mode is given it is limits; uint8 is always image or identity.
        min_range: a channel that spans less, in its own unit, is constant; so is one that spans less than 1e-6 of its magnitude (rounding).
        """
        given = modes if isinstance(modes, Mapping) else dict.fromkeys(arrays, modes)
        if unknown := set(given) - set(arrays):
            raise KeyError(f"modes are given for {sorted(unknown)}, which are not in the data (known: {', '.join(arrays)})")
        self = cls({key: tuple(x.shape[1:]) for key, x in arrays.items()})
        for key, x in arrays.items():
            mode = given.get(key, "limits")
            if mode not in MEASURED and mode not in FIXED:
                raise ValueError(f"mode {mode!r} of {key!r} is unknown; use one of {', '.join([*MEASURED, *FIXED])}")
            if x.dtype == torch.uint8 and mode != "identity":
                mode = "image"
            self._set(key, x, mode, min_range)
        return self.to(next(iter(arrays.values())).device) if arrays else self

    def encode(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{key: (…, *shape)} in stored units -> the same keys and shapes, normalised; uint8 becomes float32."""
        return {key: (v - shift) / scale for key, v in x.items() for shift, scale in [self._affine(key)]}

    def decode(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of encode."""
        return {key: v * scale + shift for key, v in x.items() for shift, scale in [self._affine(key)]}

    def of(self, source: Tensor | None) -> "Normalizer | Rows":
        """What encodes rows of these datasets (b,), see Batch.source; itself but in PerDataset."""
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{key} {shape}" for key, shape in self.shapes.items())

    def _affine(self, key: str) -> tuple[Tensor, Tensor]:
        if key not in self.shapes:
            raise KeyError(f"{key!r} has no statistics (known: {', '.join(self.shapes)}). Fit the normaliser on data that has it")
        return getattr(self, _name("shift", key)), getattr(self, _name("scale", key))

    def _set(self, key: str, x: Frames, mode: str, min_range: float) -> None:
        shift, scale = self._affine(key)
        if mode in FIXED:
            shift.fill_(FIXED[mode][0])
            scale.fill_(FIXED[mode][1])
            return
        if not len(x):
            raise ValueError(f"{key!r} has no frames to fit on")
        seen = Moments(quantiles=mode == "quantile")
        for part in x.split(max(1, BLOCK // max(1, prod(x.shape[1:])))):
            seen.add(part.reshape(-1, scale.numel()))
        self.place(key, seen.lo, seen.hi, *measured(mode, seen), min_range=min_range)

    @torch.no_grad()
    def place(self, key: str, lo: Tensor, hi: Tensor, middle: Tensor, half: Tensor, *, min_range: float = 1e-4) -> None:
        """Encode key as (x - middle) / half, a channel that does not move between lo and hi as x - (lo + hi) / 2.   All (m,), elements of a frame."""
        shift, scale = self._affine(key)
        if not (lo.isfinite() & hi.isfinite()).all():
            raise ValueError(f"{key!r} has NaN or infinite values; check_finite(store) names the episode and step")
        moves = hi - lo >= torch.maximum(lo.abs(), hi.abs()).mul(1e-6).clamp_min(min_range)
        shift.copy_(torch.where(moves, middle, (lo + hi) / 2).view_as(shift))
        scale.copy_(torch.where(moves, half, torch.ones_like(half)).view_as(scale))


class PerDataset(Normalizer):
    """A Normalizer for each of several datasets {name: …}, of the same shapes. In training each row has its own; a plan has the one that was `chosen`."""

    def __init__(self, each: Mapping[str, Normalizer]):
        first = next(iter(each.values()))
        super().__init__(first.shapes)
        self.to(next(first.buffers()).device)
        self.load_state_dict(first.state_dict())
        self.names, self.each = list(each), nn.ModuleList(each.values())

    def of(self, source: Tensor | None) -> "Normalizer | Rows":
        return self if source is None else Rows(self, source)

    def chosen(self, name: str) -> Normalizer:
        """The one of a dataset. ValueError lists the names."""
        if name not in self.names:
            raise ValueError(f"this policy was not trained on a dataset {name!r}; it knows {', '.join(self.names)}")
        return self.each[self.names.index(name)]  # type: ignore[return-value]


class Rows:
    """Encodes each row of a batch with the Normalizer of its dataset.   source: (b,)"""

    def __init__(self, every: PerDataset, source: Tensor):
        self._every, self._source = every, source

    def encode(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{key: (b, …, *shape)}"""
        return {key: (v - shift) / scale for key, v in x.items() for shift, scale in [self._affine(key, v.ndim)]}

    def _affine(self, key: str, axes: int) -> tuple[Tensor, ...]:
        each = [n._affine(key) for n in self._every.each]  # type: ignore[operator]
        rows = (torch.stack(part)[self._source] for part in zip(*each, strict=True))  # (b, *small)
        return tuple(r.view(len(r), *[1] * (axes - r.ndim), *r.shape[1:]) for r in rows)


def _name(part: str, key: str) -> str:
    """Buffer names cannot hold a dot, and keys such as observation.state do."""
    return f"{part}_{key.replace('%', '%25').replace('.', '%2E')}"


def measured(mode: str, seen: Moments) -> tuple[Tensor, Tensor]:
    """shift (m,), scale (m,) of what was seen: limits, quantile (1 % and 99 %, nearest rank) or gaussian."""
    if mode == "gaussian":
        return seen.mean, seen.std
    lo, hi = seen.lo, seen.hi
    if mode == "quantile":
        x = seen.sample()
        a, b = (x.kthvalue(round(q * (len(x) - 1)) + 1, dim=0).values for q in (0.01, 0.99))
        rests = b - a < 1e-3 * (hi - lo)  # a channel that rests almost always (a contact flag) has no quantiles, so its limits serve
        lo, hi = torch.where(rests, lo, a), torch.where(rests, hi, b)
    return (lo + hi) / 2, (hi - lo) / 2


MEASURED = ("limits", "quantile", "gaussian")
FIXED = {"image": (127.5, 127.5), "identity": (0.0, 1.0)}

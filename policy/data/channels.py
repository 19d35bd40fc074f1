"""Channels of the last axis, picked, replaced and put back, for numpy and torch alike; torch's gradients pass."""
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray or torch.Tensor; the two share no type


def library(x: Array) -> Any:
    """numpy or torch, whichever made x; torch is not imported for it."""
    return np if isinstance(x, np.ndarray | np.generic) else sys.modules["torch"]


def pick(x: Array, channels: Sequence[int] | None) -> Array:
    """x[..., channels] in that order; all when None."""
    return x if channels is None else x[..., _index(channels)]


def put(x: Array, channels: Sequence[int] | None, values: Array) -> Array:
    """A copy of x with these channels replaced; all when None."""
    if channels is None:
        return values
    out = x.copy() if isinstance(x, np.ndarray) else x.clone()
    out[..., _index(channels)] = values
    return out


def join(parts: Sequence[Array], axis: int = 1) -> Array:
    return library(parts[0]).concatenate(parts, axis=axis)


def like(x: Array, other: Array) -> Array:
    """x, of any type of number or truth, as numbers of other's type."""
    return x.astype(other.dtype) if isinstance(x, np.ndarray) else x.to(other.dtype)


def replaced(x: Array, channels: Sequence[int], by: Array) -> Array:
    """x without these channels, and `by` where the first of them was."""
    lo = min(channels)
    rest = [i for i in range(lo, x.shape[-1]) if i not in channels]
    return join([x[..., :lo], by, pick(x, rest)], -1)


def restored(x: Array, channels: Sequence[int], width: int, values: Array) -> Array:
    """The inverse of replaced: `width` channels of x, where the first of `channels` is now, become `values` in their old places."""
    lo, d = min(channels), x.shape[-1] - width + len(channels)
    order = [*range(lo), *channels, *(i for i in range(lo, d) if i not in channels)]
    whole = join([x[..., :lo], values, x[..., lo + width:]], -1)
    return pick(whole, [order.index(i) for i in range(d)])


def inside(n: int, what: str, channels: Sequence[int]) -> None:
    """ValueError when one of channels is none of n, or named twice."""
    if wrong := [i for i in channels if not 0 <= i < n]:
        raise ValueError(f"channel {wrong[0]} is named, and {what} channels 0 to {n - 1}")
    if len(set(channels)) != len(channels):
        raise ValueError(f"channels {list(channels)} name one twice")


def _index(channels: Sequence[int]) -> Any:
    """A slice where they follow one another, for then nothing is copied, nor an index sent to a GPU."""
    lo, n = (channels[0], len(channels)) if channels else (0, 0)
    return slice(lo, lo + n) if list(channels) == list(range(lo, lo + n)) else list(channels)

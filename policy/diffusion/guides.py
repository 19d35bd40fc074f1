"""Guides wrap a Denoise into a Denoise, so they nest in any order and work with every sampler."""
import torch
from torch import Tensor

from policy.types import Cond, Denoise


def clip(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """Keep x0_hat inside [-limit, limit] (normalised units): only for min-max normalised actions, mean/std data would be cut off."""
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return denoise(x, tau, cond).clamp(-limit, limit)
    return guided


def pin(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Inpainting of a start, a goal or a prefix (Janner 2022): known entries enter clean and leave clean.

    known: (b,t,d) normalised.   mask: bool, broadcastable to (b,t,d), True where `known` holds.
    """
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return torch.where(mask, known, denoise(torch.where(mask, known, x), tau, cond))
    return guided

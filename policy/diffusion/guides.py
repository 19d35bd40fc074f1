"""Guides wrap a Denoise into a Denoise, so they nest in any order and work with every sampler.

A guide is (denoise, frame) -> denoise. Whoever writes one thinks in physical units: frame.decode turns a normalised x0_hat into actions, frame.encode
turns them back, frame.obs is what the robot sees. Five lines are a whole guide:

    def slow(denoise, frame):
        def guided(x, tau, cond):
            actions = frame.decode(denoise(x, tau, cond))           # (b,t,d) in the units of the data
            return frame.encode(actions.clamp(-0.2, 0.2))           # m/s
        return guided
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.diffusion.path import Path
from policy.types import Cond, Denoise, Obs

Value = Callable[[Tensor, Obs], Tensor]  # (actions (b,t,d) in physical units, obs) -> (b,), more is better


@dataclass(frozen=True)
class Frame:
    """Where a guide stands: the path, the observation {key: (b, t_obs, *shape)}, and the way from normalised to physical actions and back."""
    path: Path
    obs: Obs
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]


def clip(denoise: Denoise, frame: Frame | None = None, *, limit: float = 1.0) -> Denoise:
    """Keep x0_hat inside [-limit, limit] (normalised units): only for min-max normalised actions, mean/std data would be cut off."""
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return denoise(x, tau, cond).clamp(-limit, limit)
    return guided


def pin(denoise: Denoise, frame: Frame | None = None, *, known: Tensor, mask: Tensor) -> Denoise:
    """Inpainting of a start, a goal or a prefix (Janner 2022): known entries enter clean and leave clean.

    known: (b,t,d), normalised; physical when the guide is given a frame.   mask: bool, broadcastable to (b,t,d), True where `known` holds.
    """
    clean = known if frame is None else frame.encode(known)

    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return torch.where(mask, clean, denoise(torch.where(mask, clean, x), tau, cond))
    return guided


def cfg(denoise: Denoise, frame: Frame | None = None, *, scale: float = 1.5) -> Denoise:
    """Classifier-free guidance (Ho 2022): scale 0 ignores the condition, 1 is plain conditioning, above 1 sharpens. Train with cond_drop=0.1.

    Innermost: what it wraps is called twice, with the condition and without.
    """
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        if cond is None:
            raise ValueError("classifier-free guidance needs a condition; this planner has none")
        return torch.lerp(denoise(x, tau, cond.null()), denoise(x, tau, cond), scale)
    return guided


def tilt(denoise: Denoise, frame: Frame, *, value: Value, scale: float = 1.0) -> Denoise:
    """Sample from p(actions | obs) exp(scale value(actions)): Diffuser's value guidance, the gradient taken through the denoiser.

    value: (actions (b,t,d) in physical units, obs) -> (b,), differentiable; a cost is a negative value. One step per denoising step:
    x0_hat + scale sigma^2 / alpha grad_x value(x0_hat), exact where value is linear.   Source: Chung 2023 (DPS), Janner 2022.
    """
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            x0 = denoise(x, tau, cond)
            grad, = torch.autograd.grad(value(frame.decode(x0), frame.obs).sum(), x)
        a, s = frame.path.at(tau, x)
        return (x0 + scale * s**2 / a.clamp_min(1e-3) * grad).detach()
    return guided


def project(denoise: Denoise, frame: Frame, *, onto: Callable[[Tensor, Obs], Tensor]) -> Denoise:
    """Hard constraints at every step: x0_hat is replaced by onto(actions (b,t,d) in physical units, obs), the nearest allowed actions.

    The last denoising step ends on x0_hat, so what leaves a deterministic sampler is allowed exactly (to float rounding).
    """
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return frame.encode(onto(frame.decode(denoise(x, tau, cond)), frame.obs))
    return guided


@dataclass(frozen=True)
class BestOf:
    """Draw n plans and keep the one of highest value. It stands among the guides but acts on whole plans: the others guide each of the n.

    value: as for tilt, but need not be differentiable.   The first candidate uses the caller's noise, so n = 1 changes nothing.
    """
    n: int
    value: Value


def smooth(actions: Tensor, obs: Obs) -> Tensor:
    """A value for BestOf or tilt: minus the mean squared second difference of the actions, in their unit squared."""
    return -actions.diff(n=2, dim=1).square().mean((1, 2))


def near(actions: Tensor, obs: Obs, *, goal: Any, dims: slice | None = None) -> Tensor:
    """A value: minus the squared distance of the last action to `goal`, in the actions' unit squared."""
    last = actions[:, -1] if dims is None else actions[:, -1, dims]
    return -(last - torch.as_tensor(goal, dtype=actions.dtype, device=actions.device)).square().sum(-1)

"""Planning on from what is promised already: real-time chunking, and steps told to a network that was trained to be told.

All are wrapped around the denoiser itself, inside every other guide. Known actions are normalised; noise time falls from 1 to 0.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from policy.diffusion.guides import pin
from policy.diffusion.path import Path
from policy.types import Cond, Denoise


@dataclass(frozen=True)
class Past:
    """The checked arguments of plan that say what is promised: prefix (b,p,d) in physical units."""
    prefix: Tensor
    committed: int
    merge: str
    warm: float | None
    limit: float
    prior: float

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Past":
        return replace(self, prefix=fn(self.prefix))


@dataclass(frozen=True)
class Promise:
    """What a plan goes on from. known: (b,t,d) normalised, zero where nothing is promised.   committed: steps that are going to be executed
    whatever the plan says.   weight: (t,1) in [0, 1], how much each step matters to guided and identity.   merge: of policy.timeline.MERGES.

    limit: most that guidance adds per unit of sigma / alpha (paper: 5).   prior: standard deviation of normalised actions; below 1 it holds on tighter.
    """
    known: Tensor
    committed: int
    weight: Tensor
    merge: str
    limit: float = 5.0
    prior: float = 1.0

    @property
    def mask(self) -> Tensor:
        """(t,1) bool, True where the plan is committed."""
        return torch.arange(self.known.shape[1], device=self.known.device)[:, None] < self.committed

    def inside(self, denoise: Denoise, path: Path) -> Denoise:
        """The denoiser that knows of the promise, before any guide."""
        if self.merge == "prefix":
            return told(denoise, self.known, self.mask)
        if self.merge in ("guided", "identity") and self.weight.any():
            guide = partial(guided if self.merge == "guided" else identity, limit=self.limit, prior=self.prior)
            return guide(denoise, path, self.known, self.weight)
        return denoise

    def outside(self, denoise: Denoise) -> Denoise:
        """The denoiser around all guides."""
        return pin(denoise, known=self.known, mask=self.mask) if self.merge in ("frozen", "prefix") else denoise


def gain(path: Path, tau: Tensor, x: Tensor, limit: float, prior: float) -> tuple[Tensor, Tensor, Tensor]:
    """kappa = min(limit sigma, (alpha^2 prior^2 + sigma^2) / (alpha prior^2)), with alpha and sigma, broadcastable over x.

    kappa / alpha depends on sigma / alpha alone: the guidance of a denoiser is the same on every path.
    """
    a, s = path.at(tau, x)
    least = a.clamp_min(1e-4)
    return (limit * s).minimum((a**2 * prior**2 + s**2) / (least * prior**2)), a, s


def guided(denoise: Denoise, path: Path, known: Tensor, weight: Tensor, *, limit: float = 5.0, prior: float = 1.0) -> Denoise:
    """Real-time chunking: x0_hat moves by kappa (d x0_hat / d x)^T W (known - x0_hat), towards the chunk being executed.

    known (b,t,d), zero where unknown;   weight (t,1), 1 while the robot is committed.   One network call forward and one backward.
    Source: Black et al. 2025 (arXiv 2506.07339) eq. 2-4, written for any alpha, sigma; with kappa at the time x has, not the next.
    """
    _positive(limit=limit, prior=prior)

    def pulled(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        through = torch.is_grad_enabled() and x.requires_grad  # a guide outside takes a gradient too
        with torch.inference_mode(False), torch.enable_grad():
            if not through:
                x, tau = x.detach().clone().requires_grad_(), tau.clone()
            x0 = denoise(x, tau, cond)
            pull, = torch.autograd.grad(x0, x, weight * (known - x0.detach()), retain_graph=through)
        return (x0 if through else x0.detach()) + gain(path, tau, x.detach(), limit, prior)[0] * pull
    return pulled


def identity(denoise: Denoise, path: Path, known: Tensor, weight: Tensor, *, limit: float = 5.0, prior: float = 1.0) -> Denoise:
    """Real-time chunking with 1 / (alpha + sigma) for the Jacobian: no gradient, and it holds on to the promise where the true one is small."""
    _positive(limit=limit, prior=prior)

    def pulled(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        x0 = denoise(x, tau, cond)
        kappa, a, s = gain(path, tau, x, limit, prior)
        return x0 + kappa / (a + s) * weight * (known - x0)
    return pulled


def told(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Training-time real-time chunking: the steps of mask (t,1) enter clean and at noise time 0 of their own (arXiv 2512.05964).

    Needs a network trained so (policy.nets.prefix, train.rtc=true).
    """
    def knowing(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        times = torch.where(mask[:, 0], 0, tau[:, None])
        return torch.where(mask, known, denoise(torch.where(mask, known, x), times, cond))
    return knowing


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name}={value!r} of real-time chunking must be a number above 0")

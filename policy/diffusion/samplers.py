"""Samplers: (denoise, path, x (b,t,d), taus tau_max...0 (k+1 floats), cond) -> x0 (b,t,d). No state, no no_grad, loops unroll on export."""
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from policy.diffusion.path import Path
from policy.types import Cond, Denoise

Sampler = Callable[..., Tensor]


def _times(x: Tensor, here: float, there: float) -> tuple[Tensor, Tensor]:
    return x.new_full((len(x),), here), x.new_full((len(x),), there)


def transition(path: Path, x: Tensor, x0: Tensor, tau: Tensor, nxt: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_nxt | x_tau, x0_hat): the step under every first-order sampler.

    eta 0: DDIM = flow-matching Euler = EDM Euler (the probability-flow ODE).   eta 1: DDPM ancestral (VP), k-diffusion ancestral (VE).
    Source: Song 2020 (DDIM) eq. 12, written for any alpha, sigma.
    """
    (a, s), (a2, s2) = path.at(tau, x), path.at(nxt, x)
    std = eta * s2 / s * (s**2 - (a / a2 * s2) ** 2).clamp_min(0).sqrt()
    return a2 * x0 + (s2**2 - std**2).clamp_min(0).sqrt() * (x - a * x0) / s, std


def first_order(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None, *, eta: float = 0.0) -> Tensor:
    """DDIM (eta 0) to DDPM / reverse SDE (eta 1), one network call a step."""
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        mean, std = transition(path, x, denoise(x, tau, cond), tau, nxt, eta)
        x = mean + std * torch.randn_like(x) if eta and there > 0 else mean
    return x


def heun(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None) -> Tensor:
    """Second order, two calls a step (Karras 2022, algorithm 1), in x / alpha against sigma / alpha so that it serves every path."""
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        (a, s), (a2, s2) = path.at(tau, x), path.at(nxt, x)
        x0 = denoise(x, tau, cond)
        if there == 0:
            x = x0
            continue
        eps = (x - a * x0) / s
        euler = a2 * x0 + s2 * eps
        back = denoise(euler, nxt, cond)
        # d(x/alpha)/d(sigma/alpha) = eps; the trapezoid averages both ends
        eps = (eps + (euler - a2 * back) / s2) / 2
        x = a2 * (x / a + (s2 / a2 - s / a) * eps)
    return x


def dpmpp_2m(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None) -> Tensor:
    """DPM-Solver++(2M), second order, one call a step: multistep in log(alpha / sigma) (Lu 2022, algorithm 2)."""
    old = h_old = None
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        x0 = denoise(x, tau, cond)
        if there == 0:
            return x0
        (a, s), (a2, s2) = path.at(tau, x), path.at(nxt, x)
        h = (a2 / s2).log() - (a / s).log()
        goal = x0 if old is None or h_old is None else x0 + h / h_old / 2 * (x0 - old)
        x = s2 / s * x - a2 * torch.expm1(-h) * goal
        old, h_old = x0, h
    return x

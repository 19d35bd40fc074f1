"""Samplers: (denoise, path, x (b,t,d), taus tau_max...0 (k+1 floats), cond) -> x0 (b,t,d). No state, no no_grad, loops unroll on export.

Those that add noise on the way also take draw: x -> standard normal noise like x.
"""
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from policy.diffusion.path import Path
from policy.types import Cond, Denoise

Sampler = Callable[..., Tensor]
Draw = Callable[[Tensor], Tensor]


def _times(x: Tensor, here: float, there: float) -> tuple[Tensor, Tensor]:
    return x.new_full((len(x),), here), x.new_full((len(x),), there)


def _within(*, most: float = 2.0, **values: float) -> None:
    for name, value in values.items():
        least, upper = (1, math.inf) if name == "repeats" else (0, most)
        if not isinstance(value, int | float) or not least <= value <= upper:
            raise ValueError(f"{name}={value!r} must be a number from {least} to {upper}")


def transition(path: Path, x: Tensor, x0: Tensor, tau: Tensor, nxt: Tensor, eta: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_nxt | x_tau, x0_hat): the step under every first-order sampler.

    eta 0: DDIM = flow-matching Euler = EDM Euler (the probability-flow ODE).   eta 1: DDPM ancestral (VP), k-diffusion ancestral (VE).
    Source: Song 2020 (DDIM) eq. 12, written for any alpha, sigma.
    """
    (a, s), (a2, s2) = path.at(tau, x), path.at(nxt, x)
    std = eta * s2 / s * (s**2 - (a / a2 * s2) ** 2).clamp_min(0).sqrt()
    return a2 * x0 + (s2**2 - std**2).clamp_min(0).sqrt() * (x - a * x0) / s, std


def trapezoid(denoise: Denoise, path: Path, x: Tensor, x0: Tensor, tau: Tensor, nxt: Tensor, cond: Cond | None) -> Tensor:
    """One second-order step of the probability-flow ODE from x at tau, where x0 is denoised already, to nxt > 0 (Karras 2022, algorithm 1).

    In u = x / alpha against r = sigma / alpha the ODE is du/dr = eps_hat on every path; the trapezoid averages both ends.
    """
    (a, s), (a2, s2) = path.at(tau, x), path.at(nxt, x)
    eps = (x - a * x0) / s
    euler = a2 * x0 + s2 * eps
    eps = (eps + (euler - a2 * denoise(euler, nxt, cond)) / s2) / 2
    return a2 * (x / a + (s2 / a2 - s / a) * eps)


def first_order(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None, *, eta: float = 0.0,
                draw: Draw = torch.randn_like) -> Tensor:
    """DDIM (eta 0) to DDPM / reverse SDE (eta 1), one network call a step."""
    _within(eta=eta, most=1.0)
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        mean, std = transition(path, x, denoise(x, tau, cond), tau, nxt, eta)
        x = mean + std * draw(x) if eta and there > 0 else mean
    return x


def heun(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None) -> Tensor:
    """The probability-flow ODE in second order, two calls a step (Karras 2022, algorithm 1)."""
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        x0 = denoise(x, tau, cond)
        x = trapezoid(denoise, path, x, x0, tau, nxt, cond) if there > 0 else x0
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


def langevin(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None, *, repeats: int = 5, rate: float = 0.5,
             draw: Draw = torch.randn_like) -> Tensor:
    """Annealed Langevin dynamics: at every noise level `repeats` steps along the score, then the next level; the last answer is denoised.

    rate: step size over sigma^2, half of NCSN's epsilon / sigma_L^2; above 2 it diverges.   repeats * levels + 1 network calls.
    Away from VE it walks in x / alpha.
    Source: Song 2019 (NCSN) algorithm 1; the final denoising is Jolicoeur-Martineau's (2021).
    """
    _within(rate=rate, repeats=repeats)
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        for _ in range(repeats):
            x = _along_the_score(denoise, path, x, tau, cond, rate, draw)
        x = denoise(x, tau, cond) if there == 0 else path.at(nxt, x)[0] / path.at(tau, x)[0] * x
    return x


def predictor_corrector(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None, *, repeats: int = 1,
                        rate: float = 0.05, eta: float = 1.0, draw: Draw = torch.randn_like) -> Tensor:
    """Each step of the reverse SDE (the predictor, eta as in first_order) is followed by `repeats` Langevin steps at the level it reached.

    rate: step size over sigma^2; 2 snr^2 in the paper's terms, whose snr = .16 is .05.   Source: Song 2021 (score SDE) algorithms 2 and 3.
    """
    _within(rate=rate, repeats=repeats)
    _within(eta=eta, most=1.0)
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        mean, std = transition(path, x, denoise(x, tau, cond), tau, nxt, eta)
        if there == 0:
            return mean
        x = mean + std * draw(x)
        for _ in range(repeats):
            x = _along_the_score(denoise, path, x, nxt, cond, rate, draw)
    return x


def _along_the_score(denoise: Denoise, path: Path, x: Tensor, tau: Tensor, cond: Cond | None, rate: float, draw: Draw) -> Tensor:
    """x + h score + sqrt(2 h) noise with h = rate sigma^2, where the score is (alpha x0_hat - x) / sigma^2."""
    a, s = path.at(tau, x)
    return x + rate * (a * denoise(x, tau, cond) - x) + math.sqrt(2 * rate) * s * draw(x)


def consistency(denoise: Denoise, path: Path, x: Tensor, taus: Sequence[float], cond: Cond | None = None, *, draw: Draw = torch.randn_like) -> Tensor:
    """Jump to data, noise again, jump again: k network calls, for a denoiser that jumps well (Song 2023, algorithm 1)."""
    for here, there in pairwise(taus):
        tau, nxt = _times(x, here, there)
        x0 = denoise(x, tau, cond)
        x = path.noise(x0, draw(x), nxt) if there > 0 else x0
    return x

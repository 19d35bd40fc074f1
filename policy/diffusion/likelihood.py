"""log p(actions | observation) of a trained denoiser: exact through the probability-flow ODE, and the variational bound.

Both speak of the same quantity on every path. With u = x / alpha and r = sigma / alpha a denoiser defines densities p_r(u) of noised data; at the
noise floor r = f, y = x0 + f eps, and with the decoder N(x0; y, f^2) the entropies cancel: log p(x0) >= E log p_f(y), in nats of normalised
actions. The prior is what samplers start from, u ~ N(0, r_max^2). A Table is only ever asked at its own entries, the floor is then its first one
from f on (levels(...)[0]); compare formalisms at a floor that all of them reach.
"""
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from policy.diffusion.path import Path, Table
from policy.diffusion.samplers import Draw
from policy.types import Cond, Denoise

NODES, SHARES = np.polynomial.legendre.leggauss(16)


def levels(path: Path, floor: float, steps: int) -> list[float]:
    """Noise levels r from the floor to the path's end: steps + 1, even in log r; of a Table all its entries from the floor on."""
    end = path.ends()[1]
    if not 0 < floor < end:
        raise ValueError(f"floor={floor!r} must be a noise level sigma / alpha above 0 and below the path's last, {end:.4g}; 0.01 is 1 % of the actions' range")
    if not isinstance(steps, int) or steps < 3:
        raise ValueError(f"steps={steps!r} must be a whole number from 3")
    if isinstance(path, Table):
        rows = [ratio for ratio in _entries(path) if ratio >= floor * (1 - 1e-6)]
        if len(rows) < 4:
            raise ValueError(f"only {len(rows)} entries of the table lie above floor={floor}; use a lower floor")
        return rows
    return np.geomspace(floor, end, steps + 1).tolist()


def log_density(denoise: Denoise, path: Path, u: Tensor, cond: Cond | None = None, *, floor: float = 0.01, steps: int = 64, trace: str | int = "exact",
                draw: Draw = torch.randn_like) -> Tensor:
    """log p_f(u) in nats, for points u (b,t,d) at the floor -> (p,b): one estimate per probe, each unbiased in the trace; exact: p = 1.

    trace: exact costs t * d backward passes a step; a number is that of Hutchinson's probes, random signs which `draw` (x -> normal noise like x)
    gives; the estimates' spread over sqrt(p) is the standard error.   steps: on a continuous path; errors fall with their cube.
    denoise: differentiable in x, unclipped; its weights need no gradient and the caller may be in no_grad or inference_mode.
    Source: Chen 2018 (instantaneous change of variables), Song 2021 (score SDE) section 4.3; Adams-Bashforth-Moulton of third order on uneven
    steps for the ODE du/dr = eps_hat, quadrature for the integral of its divergence, (t d - trace of d x0_hat / du) / r.
    """
    if trace != "exact" and (isinstance(trace, bool) or not isinstance(trace, int) or trace < 1):
        raise ValueError(f"trace={trace!r} is unknown; use exact, or a number of random probes from 1")
    with torch.inference_mode(False), torch.no_grad():
        u = u.detach().clone()  # out of inference mode, for autograd
        cond = None if cond is None else cond.map(lambda x: x.detach().clone())
        probes = None if trace == "exact" else torch.stack([torch.where(draw(u) < 0, -1.0, 1.0).to(u.dtype) for _ in range(int(trace))])
        rs = levels(path, floor, steps)
        log_r = [math.log(r) for r in rs]
        eps: list[Tensor] = []
        traces: list[Tensor] = []
        for i, r in enumerate(rs):
            x0, found = _traced(denoise, path, u, r, cond, probes)
            eps.append((u - x0) / r)
            traces.append(found)
            if i + 1 < len(rs):
                ahead = (log_r[i], log_r[i + 1], 1.0)
                guess = _advance(u, eps[-2:], _weights(log_r[max(0, i - 1):i + 1], *ahead))
                nxt = (guess - _denoised(denoise, path, guess, rs[i + 1], cond)) / rs[i + 1]
                u = _advance(u, [*eps[-2:], nxt], _weights(log_r[max(0, i - 1):i + 2], *ahead))
        n = u[0].numel()
        prior = -0.5 * (u / rs[-1]).square().flatten(1).sum(1) - n * (math.log(rs[-1]) + 0.5 * math.log(2 * math.pi))
        return prior + n * (log_r[-1] - log_r[0]) - _integral(log_r, traces)


def log_likelihood(denoise: Denoise, path: Path, x0: Tensor, cond: Cond | None = None, *, floor: float = 0.01, steps: int = 64,
                   trace: str | int = "exact", noise: Tensor | None = None, draw: Draw = torch.randn_like) -> Tensor:
    """log p_f(x0 + f noise) in nats, (b,): in the mean over the noise a lower bound of log p(x0), and exact for p_f. Options as in log_density.

    x0: (b,t,d) normalised actions.   noise: (b,t,d) standard normal, drawn when absent.   Divide by t * d for nats per dimension.
    """
    noise = draw(x0) if noise is None else noise
    return log_density(denoise, path, x0 + levels(path, floor, steps)[0] * noise, cond, floor=floor, steps=steps, trace=trace, draw=draw).mean(0)


@torch.no_grad()
def variational_bound(denoise: Denoise, path: Path, x0: Tensor, cond: Cond | None = None, *, floor: float = 0.01, draws: int = 64) -> Tensor:
    """An unbiased estimate of an upper bound of -log p(x0) in nats, (b,): what the prior, the diffusion and the decoder at the floor cost.

    x0: (b,t,d) normalised actions.   draws: noise levels per row, one network call each, in equal strata of log r; a Table with no more entries
    is summed. The diffusion costs half the squared error of x0_hat integrated over the SNR r^-2 (Kingma 2021 eq. 11), on a Table summed over its
    entries (Ho 2020 eq. 12). A perfect denoiser in continuous time makes it the mean of -log p_f(x0 + f noise) over the noise.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws={draws!r} must be a whole number from 1")
    rs = levels(path, floor, 3)
    bound = 0.5 * x0.square().flatten(1).sum(1) / rs[-1] ** 2 + 0.5 * x0[0].numel() * math.log(2 * math.pi * math.e * rs[0] ** 2)
    for r, weight in _strata(path, rs, draws, x0):
        tau = path.tau_at(r)
        error = denoise(path.noise(x0, torch.randn_like(x0), tau), tau, cond) - x0
        bound = bound + weight * error.square().flatten(1).sum(1)
    return bound


def _strata(path: Path, rs: Sequence[float], draws: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise levels and what their squared errors weigh, (b,) both."""
    r = like.new_tensor(rs)
    half = (r[:-1] ** -2 - r[1:] ** -2) / 2
    span, k = math.log(rs[-1] / rs[0]), len(half)
    n = min(draws, k) if isinstance(path, Table) else draws
    for j in range(n):
        u = (j + torch.rand(len(like), dtype=like.dtype, device=like.device)) / n
        if isinstance(path, Table):
            i = (k * u).long().clamp_max(k - 1)
            yield r[i + 1], half[i] * (k / n)
        else:
            level = rs[0] * (span * u).exp()
            yield level, level**-2 * (span / n)


def _entries(path: Table) -> list[float]:
    k = len(path.alphas_cumprod)
    return path.ratio(torch.arange(1, k + 1, dtype=torch.float64) / k).tolist()


def _denoised(denoise: Denoise, path: Path, u: Tensor, r: float, cond: Cond | None) -> Tensor:
    tau = path.tau_at(torch.full((len(u),), r, dtype=u.dtype, device=u.device))
    return denoise(path.at(tau, u)[0] * u, tau, cond)


def _traced(denoise: Denoise, path: Path, u: Tensor, r: float, cond: Cond | None, probes: Tensor | None) -> tuple[Tensor, Tensor]:
    """x0_hat (b,t,d) and the trace of its derivative by u, (p,b)."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        x0 = _denoised(denoise, path, u, r, cond)
        if not x0.requires_grad:
            raise ValueError("the denoiser is not differentiable in x: a likelihood needs the network itself, not an inference-only copy of it")
        if probes is not None:
            found = [(v * torch.autograd.grad(x0, u, v, retain_graph=True)[0]).flatten(1).sum(1) for v in probes]
        else:
            each = x0.flatten(1).sum(0)
            found = [sum((torch.autograd.grad(out, u, retain_graph=True)[0].flatten(1)[:, i] for i, out in enumerate(each)), start=u.new_zeros(len(u)))]
    return x0.detach(), torch.stack(found)


def _weights(at: Sequence[float], lo: float, hi: float, grow: float) -> list[float]:
    """Of a function's values at log noise levels `at`, for its integral times e^(grow l) over l from lo to hi.

    The function counts as a polynomial in log(r / (1 + r)): log r near the data, and -1 / r near pure noise, where a table may leap.
    """
    l = (lo + hi) / 2 + (hi - lo) / 2 * NODES
    share = (hi - lo) / 2 * SHARES * np.exp(grow * l)
    z, zs = -np.log1p(np.exp(-l)), -np.log1p(np.exp(-np.asarray(at)))
    return [float((share * np.prod([(z - other) / (one - other) for j, other in enumerate(zs) if j != i], axis=0)).sum()) for i, one in enumerate(zs)]


def _advance(u: Tensor, slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return u + sum(w * slope for w, slope in zip(weights, slopes, strict=True))


def _integral(log_r: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Of values over log r, cubic between its nodes."""
    total = torch.zeros_like(values[0])
    for i, (lo, hi) in enumerate(pairwise(log_r)):
        first = min(max(0, i - 1), len(log_r) - 4)
        total = _advance(total, values[first:first + 4], _weights(log_r[first:first + 4], lo, hi, 0.0))
    return total

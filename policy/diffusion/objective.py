"""What is minimised. One line serves the eps, x0, v, score, flow-matching and EDM losses: the denoiser's scaling decides.

An objective is (denoiser, x0 (b,t,d), cond, progress) -> (b,t,d), reduced by the caller; progress in [0, 1] is how much of training is done.
"""
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from policy.diffusion.denoiser import Denoiser
from policy.diffusion.path import Path
from policy.diffusion.samplers import transition
from policy.types import Cond, Denoise

Objective = Callable[..., Tensor]
Density = Callable[[int, Path, Tensor], Tensor]  # (n, path, like) -> tau (n,)
WEIGHTS = ("simple", "x0", "snr", "min_snr", "flow", "elbo")
KNOWN = 0.01  # sigma / alpha below which no weight grows further: data are not known better than to 1 % of their range


def stratified(n: int, like: Tensor) -> Tensor:
    """n uniform draws, one in each of n equal strata, in random order: the same expectation as rand(n), less variance (Kingma 2021)."""
    u = (torch.arange(n, device=like.device) + torch.rand(n, device=like.device)) / n
    return u[torch.randperm(n, device=like.device)].to(like.dtype)


def uniform(n: int, path: Path, like: Tensor) -> Tensor:
    """tau uniform on [0, tau_max]."""
    return path.snap(stratified(n, like) * path.tau_max)


def lognormal(n: int, path: Path, like: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log(sigma / alpha) normal (Karras 2022: mean -1.2, std 1.2), cut at the path's ends."""
    _positive(std=std)
    lo, hi = path.ends()
    z = torch.special.ndtri(stratified(n, like).double().clamp(1e-6, 1 - 1e-6))
    return path.tau_at((mean + std * z).exp().clamp(lo, hi)).to(like.dtype)


def beta(n: int, path: Path, like: Tensor, *, a: float = 1.5, b: float = 1.0) -> Tensor:
    """tau / tau_max ~ Beta(a, b). a > b looks more at the noisy end, as pi0 does (Black 2024: Beta(1.5, 1) on the noise time)."""
    _positive(a=a, b=b)
    tau = torch.distributions.Beta(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)).sample((n,))
    return path.snap(tau.to(like) * path.tau_max)


def discrete(n: int, path: Path, like: Tensor, *, taus: Sequence[float]) -> Tensor:
    """One of the given times, equally often: [1] is regression, [1, 0.1] the two calls of MIP."""
    if not len(taus) or not all(0 <= t <= 1 for t in taus):
        raise ValueError(f"density.taus={list(taus)} must be noise times from 0 to 1, at least one")
    return like.new_tensor(list(taus))[(stratified(n, like) * len(taus)).long().clamp_max(len(taus) - 1)]


def weight_of(name: str, denoiser: Denoiser, tau: Tensor, like: Tensor, *, gamma: float = 5.0) -> Tensor:
    """What the squared error of the network's own answer is multiplied by, broadcastable over `like`.

    simple: 1.   x0, flow: as if x0, eps - x0 had been predicted.   snr: as if eps had been.   min_snr: min(SNR, gamma) on x0 (Hang 2023).
    elbo: the variational bound's weight, in nats when tau is uniform (Kingma 2021 eq. 11; on a Table Ho 2020 eq. 12).
    """
    if name == "simple":
        return torch.ones((), dtype=like.dtype, device=like.device)
    path, wide = denoiser.path, tau.float()  # SNRs leave bf16's accuracy
    c_out = denoiser.scales(like.float(), wide)[2].abs()
    ratio = path.ratio(wide.clamp_max(path.tau_max)).clamp_min(KNOWN).reshape(c_out.shape)
    match name:
        case "x0":
            return c_out**2
        case "flow":
            return (c_out * (1 + 1 / ratio)) ** 2
        case "snr":
            return (c_out / ratio) ** 2
        case "min_snr":
            return c_out**2 * (ratio**-2).clamp_max(gamma)
        case "elbo":
            slope = path.log_slope(wide.clamp(path.tau_max * 1e-4, path.tau_max)).reshape(c_out.shape)
            return (c_out / ratio) ** 2 * slope * path.tau_max
        case _:
            raise ValueError(f"weight {name!r} is unknown; use one of {', '.join(WEIGHTS)}")


def denoising(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, progress: float = 0.0, *, density: Density = uniform, weight: str = "simple",
              gamma: float = 5.0, known: Tensor | None = None) -> Tensor:
    """denoising_loss at times drawn from `density`, weighted.   known: (b,t) bool, steps that enter clean and at noise time 0 of their own."""
    _positive(gamma=gamma)
    if weight == "elbo" and getattr(density, "func", density) is not uniform:
        raise ValueError("objective.weight=elbo is the variational bound for uniform times: use density=uniform")
    tau = density(len(x0), denoiser.path, x0)
    if known is not None:
        tau = torch.where(known, 0, tau[:, None])
    return weight_of(weight, denoiser, tau, x0, gamma=gamma) * denoising_loss(denoiser, x0, cond, tau)


def denoising_loss(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, tau: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
    """Squared error of the network on its own target, (b,t,d). tau (b,) or (b,t); without it, each sample gets a uniform one up to path.tau_max."""
    tau = uniform(len(x0), denoiser.path, x0) if tau is None else tau
    eps = torch.randn_like(x0) if eps is None else eps
    x = denoiser.path.noise(x0, eps, tau)
    c_in, _, _ = denoiser.scales(x, tau)
    goal = denoiser.goal(x0, eps, tau)
    return (denoiser.net(c_in * x, tau, cond).to(goal.dtype) - goal) ** 2


def consistency(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, progress: float = 0.0, *, density: Density = uniform, levels: int = 10,
                most: int = 160, huber: float = 0.03) -> Tensor:
    """Consistency training: two neighbouring times with the same noise must jump to the same data (Song 2023, improved techniques).

    tau is drawn from `density`, its neighbour is tau_max / levels before it; levels double to `most` over training.   huber: as in distillation.
    """
    path = denoiser.path
    _refuse_unbounded(denoiser)
    _positive(levels=levels, huber=huber)
    if most < levels:
        raise ValueError(f"objective.most={most} must be at least levels={levels}")
    k = min(levels * 2 ** int(progress * (math.log2(most / levels) + 1)), most)
    tau = density(len(x0), path, x0)
    eps, near = torch.randn_like(x0), _before(path, tau, 1 / k)
    with torch.no_grad():
        goal = _jump(denoiser, path.noise(x0, eps, near), near, cond)
    return _distance(denoiser, path.noise(x0, eps, tau), tau, cond, goal, huber)


def distillation(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, progress: float = 0.0, *, teacher: Denoise, density: Density = uniform,
                 steps: int = 10, hops: int = 3, huber: float = 0.03) -> Tensor:
    """Consistency distillation: from x the student jumps where it jumps from after `hops` of the teacher's DDIM steps, `steps` of which span the path.

    The later jump is a constant of the optimisation. Answers are compared as the network gives them, at all times alike: in data the noisy end
    would count for nothing or for all.   huber: errors below it count squared, above it linearly.   Source: Song 2023 (consistency models).
    """
    path = denoiser.path
    _refuse_unbounded(denoiser)
    _positive(steps=steps, hops=hops, huber=huber)
    tau = density(len(x0), path, x0)
    x = path.noise(x0, torch.randn_like(x0), tau)
    with torch.no_grad():
        y, t = x, tau
        for _ in range(hops):
            nxt = _before(path, t, 1 / steps)
            there = (t > 0).reshape(-1, 1, 1)
            y = torch.where(there, transition(path, y, teacher(y, _away(path, t), cond), _away(path, t), nxt)[0], y)
            t = nxt
        goal = _jump(denoiser, y, t, cond)
    return _distance(denoiser, x, tau, cond, goal, huber)


JUMPS = (consistency, distillation)  # they teach a network to jump to data, which is not their mean


def inside(fn: Any) -> tuple[Any, dict[str, Any]]:
    """What a partial (of a partial …) calls, and the keywords it fixes."""
    options: dict[str, Any] = {}
    while isinstance(fn, functools.partial):
        fn, options = fn.func, {**fn.keywords, **options}
    return fn, options


def ignorance(objective: Objective) -> str:
    """Why a network trained by it does not estimate the mean of the data at every noise level; empty when it does."""
    fn, options = inside(objective)
    if fn in JUMPS:
        return "a consistency model jumps to data and does not estimate their mean"
    if inside(options.get("density"))[0] is discrete:
        return "it was trained at a few noise times only (regression, MIP) and says nothing about the noise levels between them"
    return ""


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name}={value!r} must be a number above 0")


def _refuse_unbounded(denoiser: Denoiser) -> None:
    if denoiser.target in ("eps", "score"):
        raise ValueError(f"one call cannot plan with denoiser.target={denoiser.target}: at the noisy end its answer is divided by alpha, nearly 0. "
                         "A consistency model, and the teacher of one, needs denoiser.target=v, flow, edm or x0")


def _last(path: Path) -> float:
    """The time at which solvers go over to the data."""
    return float(path.tau_at(torch.tensor(path.ends()[0], dtype=torch.float64)))


def _away(path: Path, tau: Tensor) -> Tensor:
    return tau.clamp_min(_last(path))


def _before(path: Path, tau: Tensor, share: float) -> Tensor:
    """The time that share of the path before tau; 0 where solvers would stop."""
    near = tau - share * path.tau_max
    return torch.where(near > _last(path), near, 0.0)


def _jump(denoiser: Denoiser, x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
    """The denoiser's answer; x itself at tau = 0."""
    return torch.where((tau > 0).reshape(-1, 1, 1), denoiser(x, _away(denoiser.path, tau), cond), x)


def _distance(denoiser: Denoiser, x: Tensor, tau: Tensor, cond: Cond | None, goal: Tensor, huber: float) -> Tensor:
    """Pseudo-Huber distance of the network's own answer from the one that would give goal."""
    tau = _away(denoiser.path, tau)
    error = (denoiser(x, tau, cond) - goal) / denoiser.scales(x, tau)[2]
    return torch.sqrt(error**2 + huber**2) - huber

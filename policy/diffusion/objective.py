"""What is minimised. One line serves the eps, x0, v, score, flow-matching and EDM losses: the denoiser's scaling decides.

An objective is (denoiser, x0 (b,t,d), cond, progress) -> (b,t,d), reduced by the caller; progress in [0, 1] is how much of training is done.
"""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from policy.diffusion.denoiser import Denoiser
from policy.diffusion.path import Path
from policy.diffusion.samplers import trapezoid
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
    lo, hi = path.ends()
    z = torch.special.ndtri(stratified(n, like).double().clamp(1e-6, 1 - 1e-6))
    return path.tau_at((mean + std * z).exp().clamp(lo, hi)).to(like.dtype)


def beta(n: int, path: Path, like: Tensor, *, a: float = 1.5, b: float = 1.0) -> Tensor:
    """tau / tau_max ~ Beta(a, b). a > b looks more at the noisy end, as pi0 does (Black 2024: Beta(1.5, 1) on the noise time)."""
    tau = torch.distributions.Beta(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)).sample((n,))
    return path.snap(tau.to(like) * path.tau_max)


def discrete(n: int, path: Path, like: Tensor, *, taus: Sequence[float]) -> Tensor:
    """One of the given times, equally often: [1] is regression, [1, 0.1] the two calls of MIP."""
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
              gamma: float = 5.0) -> Tensor:
    """denoising_loss at times drawn from `density`, weighted."""
    tau = density(len(x0), denoiser.path, x0)
    return weight_of(weight, denoiser, tau, x0, gamma=gamma) * denoising_loss(denoiser, x0, cond, tau)


def denoising_loss(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, tau: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
    """Squared error of the network on its own target, (b,t,d). Without tau, each sample gets a uniform one up to path.tau_max."""
    tau = uniform(len(x0), denoiser.path, x0) if tau is None else tau
    eps = torch.randn_like(x0) if eps is None else eps
    x = denoiser.path.noise(x0, eps, tau)
    c_in, _, _ = denoiser.scales(x, tau)
    goal = denoiser.goal(x0, eps, tau)
    return (denoiser.net(c_in * x, tau, cond).to(goal.dtype) - goal) ** 2


def consistency(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, progress: float = 0.0, *, teacher: Denoise | None = None, density: Density = uniform,
                levels: int = 10, most: int = 160, huber: float = 0.03) -> Tensor:
    """Neighbouring times must jump to the same data: pseudo-Huber distance of the denoiser's answers at two of them.

    Without a teacher the less noisy neighbour shares the noise (consistency training), with one it is the end of a Heun step of the teacher
    (consistency distillation). The less noisy answer is a constant of the optimisation. The distance is divided by that of the noise levels: with
    all alike a distilled Push-T policy fell from .76 to .68. Levels are Karras-spaced between path.ends(); their number doubles from `levels` to
    `most` over training; which are drawn follows `density` (paper: lognormal, mean -1.1, std 2).
    huber: errors below it count squared, above it linearly (normalised units).   Source: Song 2023 (consistency models, improved techniques).
    """
    path = denoiser.path
    if denoiser.target not in ("v", "flow", "edm"):
        raise ValueError(f"a consistency model needs denoiser.target=v, flow or edm, which give the data back where there is no noise; {denoiser.target} "
                         "does not, or divides by alpha at the noisy end")
    k = min(levels * 2 ** int(progress * (math.log2(most / levels) + 1)), most)
    lo, hi = path.ends()
    ratios = torch.linspace(lo ** (1 / 7), hi ** (1 / 7), k + 1, dtype=torch.float64, device=x0.device) ** 7
    i = torch.searchsorted(ratios, path.ratio(density(len(x0), path, x0.double()))).clamp(1, k)
    near, far = ratios[i - 1], ratios[i]
    tau, nxt = (path.tau_at(r).to(x0.dtype) for r in (far, near))
    eps = torch.randn_like(x0)
    x = path.noise(x0, eps, tau)
    with torch.no_grad():
        y = path.noise(x0, eps, nxt) if teacher is None else trapezoid(teacher, path, x, teacher(x, tau, cond), tau, nxt, cond)
        goal = denoiser(y, nxt, cond)
    error = denoiser(x, tau, cond) - goal
    weight = (1 / (far - near)).to(x0.dtype)[:, None, None]
    return weight * (torch.sqrt(error**2 + huber**2) - huber)

"""What is minimised. One line serves the eps, x0, v, score, flow-matching and EDM losses: the denoiser's scaling decides."""
import torch
from torch import Tensor

from policy.diffusion.denoiser import Denoiser
from policy.types import Cond


def stratified(n: int, like: Tensor) -> Tensor:
    """n uniform draws, one in each of n equal strata, in random order: the same expectation as rand(n), less variance (Kingma 2021)."""
    u = (torch.arange(n, device=like.device) + torch.rand(n, device=like.device)) / n
    return u[torch.randperm(n, device=like.device)].to(like.dtype)


def denoising_loss(denoiser: Denoiser, x0: Tensor, cond: Cond | None = None, tau: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
    """Squared error of the network on its own target, (b,t,d). Without tau, each sample gets a uniform one up to path.tau_max."""
    tau = denoiser.path.snap(stratified(len(x0), x0) * denoiser.path.tau_max) if tau is None else tau
    eps = torch.randn_like(x0) if eps is None else eps
    x = denoiser.path.noise(x0, eps, tau)
    c_in, _, _ = denoiser.scales(x, tau)
    goal = denoiser.goal(x0, eps, tau)
    return (denoiser.net(c_in * x, tau, cond).to(goal.dtype) - goal) ** 2

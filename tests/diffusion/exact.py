"""Targets whose best denoiser is known in closed form, and networks that know it, whatever they are asked to predict."""
import torch
from torch import Tensor, nn

from policy.diffusion.denoiser import Denoiser
from policy.diffusion.path import VE, VP, Cosine, Linear, Path, Table

MEAN, STD = 0.4, 0.2
PATHS = {"linear": Linear(), "cosine": Cosine(), "vp": VP(), "ve": VE(), "table": Table.named("squaredcos_cap_v2", 100)}


def gaussian(path: Path, mean: float = MEAN, std: float = STD):
    """E[x0 | x] for x0 ~ N(mean, std^2)."""
    def denoise(x, tau, cond=None):
        a, s = path.at(tau, x)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
    return denoise


def mixture(path: Path, means: tuple[float, ...] = (-0.6, 0.5), stds: tuple[float, ...] = (0.1, 0.15), shares: tuple[float, ...] = (0.3, 0.7)):
    """E[x0 | x] for a mixture of Gaussians."""
    def denoise(x, tau, cond=None):
        a, s = path.at(tau, x)
        m, v, w = (torch.tensor(p, dtype=x.dtype) for p in (means, [q**2 for q in stds], shares))
        var = a[..., None] ** 2 * v + s[..., None] ** 2
        far = x[..., None] - a[..., None] * m
        share = (w.log() - var.log() / 2 - far**2 / (2 * var)).softmax(-1)
        return (share * (m + a[..., None] * v / var * far)).sum(-1)
    return denoise


class Answers(nn.Module):
    """The network that makes Denoiser(net, path, target) equal `denoise`."""

    def __init__(self, denoise, path: Path, target: str):
        super().__init__()
        self.denoise, self.scales = denoise, Denoiser(nn.Identity(), path, target).scales

    def forward(self, x: Tensor, tau: Tensor, cond=None) -> Tensor:
        c_in, c_skip, c_out = self.scales(x, tau)
        x = x / c_in
        return (self.denoise(x, tau, cond) - c_skip * x) / c_out


def perfect(denoise, path: Path, target: str) -> Denoiser:
    return Denoiser(Answers(denoise, path, target), path, target)


def start(path: Path, n: int, x0: Tensor | None = None) -> Tensor:
    """Samples (n,1,1) of the path's exact marginal at tau_max, of the Gaussian or of the data x0 (n,1,1)."""
    a, s = path.at(torch.full((n,), path.tau_max, dtype=torch.float64), torch.zeros(n, 1, 1))
    x0 = MEAN + STD * torch.randn(n, 1, 1, dtype=torch.float64) if x0 is None else x0
    return a * x0 + s * torch.randn(n, 1, 1, dtype=torch.float64)

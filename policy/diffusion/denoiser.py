"""A network becomes an estimator of E[x0 | x] by scaling: x0_hat = c_skip x + c_out net(c_in x, tau, cond)."""
import torch
from torch import Tensor, nn

from policy.diffusion.path import Path
from policy.types import Cond

TARGETS = ("eps", "x0", "v", "flow", "score", "edm")


class Denoiser(nn.Module):
    """What the network predicts is a choice of scaling, not a subclass.

    target: eps (Ho 2020);  x0 (Diffuser);  v = alpha eps - sigma x0 (Salimans 2022);  flow = eps - x0 (Liu 2022; Linear path);
    score = -eps / sigma times sigma (Song 2019, its weighting);  edm (Karras 2022: unit variance in and out).
    sigma_data: standard deviation of normalised data; min-max normalised actions have about .5.
    """

    def __init__(self, net: nn.Module, path: Path, target: str = "eps", *, sigma_data: float = 0.5):
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target {target!r} is unknown; use one of {', '.join(TARGETS)}")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data={sigma_data!r} must be above 0: the standard deviation of the normalised data")
        path.check()
        self.net, self.path, self.target, self.sigma_data = net, path, target, sigma_data

    def scales(self, x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_skip, c_out at tau, each broadcastable over x."""
        a, s = self.path.at(tau, x)
        var = a**2 + s**2
        c_in = var.rsqrt()  # 1 where variance is preserved; on VE the network would see 80
        match self.target:
            case "eps":  # alpha = 0 only at the very end of a path, where eps says nothing about x0
                a = a.clamp_min(1e-4)
                return c_in, 1 / a, -s / a
            case "score":
                a = a.clamp_min(1e-4)
                return c_in, 1 / a, s / a
            case "x0":
                return c_in, torch.zeros_like(a), torch.ones_like(a)
            case "v":
                return c_in, a / var, -s / var
            case "flow":
                return c_in, 1 / (a + s), -s / (a + s)
            case _:
                var = (a * self.sigma_data) ** 2 + s**2
                return var.rsqrt(), a * self.sigma_data**2 / var, -s * self.sigma_data * var.rsqrt()

    def goal(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """What the network should answer for x = alpha x0 + sigma eps: (x0 - c_skip x) / c_out, without its 0 / 0 at tau = 0."""
        a, s = self.path.at(tau, x0)
        match self.target:
            case "eps":
                return eps
            case "score":
                return -eps
            case "x0":
                return x0
            case "v":
                return a * eps - s * x0
            case "flow":
                return eps - x0
            case _:
                d = self.sigma_data
                return (a * d * eps - s * x0 / d) * ((a * d) ** 2 + s**2).rsqrt()

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        """x (b,t,d), tau (b,) or (b,t) -> x0_hat (b,t,d)."""
        c_in, c_skip, c_out = self.scales(x, tau)
        return c_skip * x + c_out * self.net(c_in * x, tau, cond).to(x.dtype)

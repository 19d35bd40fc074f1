"""One denoising step as a function of tensors alone, which exports and captures: the planner's denoiser with its clip and what is promised inside."""
from typing import Any

import torch
from torch import Tensor, nn

from policy.diffusion.guides import base, clip
from policy.diffusion.objective import inside
from policy.nets.prefix import Prefix
from policy.nets.steered import Films, SteeredUNet1d
from policy.nets.unet1d import UNet1d
from policy.planner import Planner
from policy.types import Cond


def limits(planner: Planner) -> list[float]:
    """Those of the planner's clips. ValueError names a guide that is anything else."""
    others = [str(getattr(base(g), "__name__", g)) for g in planner.guides if base(g) is not clip]
    if others:
        raise ValueError(f"guide {', '.join(others)} cannot leave torch: an export knows clip alone. Export with guide=clip (or guide=none), or serve the run: "
                         "dipole serve run=…")
    return [float(inside(g)[1].get("limit", 1.0)) for g in planner.guides]


class Step(nn.Module):
    """x (1,t,d), tau (1,), cond (1,n,m) tokens, known (1,t,d), mask (1,t,1) bool, pull (1,t,1) -> x0_hat (1,t,d); see policy.serve.solver.Promised.

    With planner.rtc, tau is (1,t), 0 where the network is told that a step is known.
    """

    def __init__(self, planner: Planner):
        super().__init__()
        self.denoiser, self.limits = planner.denoiser, limits(planner)

    def forward(self, x: Tensor, tau: Tensor, cond: Tensor, known: Tensor, mask: Tensor, pull: Tensor, *time: Tensor) -> Tensor:
        return self.around(self.estimate(torch.where(mask, known, x), tau, cond, *time), known, mask, pull)

    def estimate(self, x: Tensor, tau: Tensor, cond: Tensor) -> Tensor:
        """The denoiser alone."""
        x0: Tensor = self.denoiser(x, tau, Cond(cond))
        return x0

    def around(self, x0: Tensor, known: Tensor, mask: Tensor, pull: Tensor) -> Tensor:
        return torch.where(mask, known, self.clipped(x0 + pull * (known - x0)))

    def guided(self, x: Tensor, tau: Tensor, cond: Tensor, known: Tensor, pull: Tensor, *time: Tensor) -> Tensor:
        """forward, where the pull goes through the denoiser's Jacobian, transposed (policy.diffusion.rtc.guided)."""
        x0, back = torch.func.vjp(lambda x: self.estimate(x, tau, cond, *time), x)  # type: ignore[misc]
        return self.clipped(x0 + back(pull * (known - x0))[0])

    def clipped(self, x0: Tensor) -> Tensor:
        for limit in self.limits:
            x0 = x0.clamp(-limit, limit)
        return x0


class SteeredStep(Step):
    """Step for the U-Net, given what the condition and the noise time say to its blocks, (1,f) each (policy.nets.steered.Films).

    A plan needs the first once, a sampler the second once for all plans: together a fifth of a step of [64,128,256] in OpenVINO.
    """

    def __init__(self, planner: Planner):
        super().__init__(planner)
        net = unet_of(planner)
        assert net is not None
        self.unet, self.told = SteeredUNet1d(net), isinstance(self.denoiser.net, Prefix)

    def estimate(self, x: Tensor, tau: Tensor, cond: Tensor, time: Tensor | None = None) -> Tensor:
        assert time is not None
        c_in, c_skip, c_out = self.denoiser.scales(x, tau)
        h = c_in * x
        if self.told:
            h = torch.cat([h, (tau == 0).to(h.dtype)[..., None]], -1)
        return c_skip * x + c_out * self.unet(h, time + cond)[..., : x.shape[-1]]


class Encode(nn.Module):
    """Observations (1, t_obs, *shape) in physical units, in the order of the spec -> what steps are conditioned on: tokens, or Films.cond of them."""

    def __init__(self, planner: Planner, films: Films | None):
        super().__init__()
        self.transform, self.normalizer, self.encoder = planner.transform, planner.normalizer, planner.encoder
        self.keys, self.films = list(planner.spec.obs), films

    def forward(self, *obs: Tensor) -> Tensor:
        cond: Cond = self.encoder(self.normalizer.encode(self.transform.encode_obs(dict(zip(self.keys, obs, strict=True)))))
        return self.films.cond(cond) if self.films is not None else cond.tokens


class Time(nn.Module):
    """tau (1,) -> Films.time of it, (1,f)."""

    def __init__(self, films: Films):
        super().__init__()
        self.films = films

    def forward(self, tau: Tensor) -> Tensor:
        return self.films.time(tau)


def unet_of(planner: Planner) -> UNet1d | None:
    """The planner's U-Net, also where it is told of known steps; None when it plans with another network."""
    net: Any = planner.denoiser.net
    net = net.net if isinstance(net, Prefix) else net
    return net if isinstance(net, UNet1d) else None

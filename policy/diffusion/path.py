"""Gaussian paths x = alpha(tau) x0 + sigma(tau) eps, tau from 0 (data) to 1 (noise). A formalism is a pair (alpha, sigma).

Paths are plain values: no parameters, any device, any float dtype; tau may be (b,) or per token (b, t).
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LEAST = 4.3  # sigma / alpha at the noisy end: diffusers' own worst at 1000 steps is 140


class Path:
    """tau_max, ratio_min: what solvers use of the pair (alpha, sigma): alpha > 0 at tau_max; ratio_min is the least sigma / alpha they stop at."""
    tau_max: float = 1.0
    ratio_min: float = 0.002  # Karras 2022

    def alpha(self, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def sigma(self, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def at(self, tau: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma shaped to broadcast over `like` (b,t,d)."""
        tau = tau.reshape(*tau.shape, *(1,) * (like.ndim - tau.ndim))
        return self.alpha(tau), self.sigma(tau)

    def noise(self, x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
        """A sample of p(x_tau | x0)."""
        a, s = self.at(tau, x0)
        return a * x0 + s * eps

    def snap(self, tau: Tensor) -> Tensor:
        """The times this path is trained at: any, or the entries of a table."""
        return tau

    def ratio(self, tau: Tensor) -> Tensor:
        """sigma / alpha: what all formalisms share. log SNR is -2 log of it, EDM's sigma is it."""
        return self.sigma(tau) / self.alpha(tau)

    def tau_at(self, ratio: Tensor) -> Tensor:
        """The inverse of `ratio`."""
        raise NotImplementedError

    def log_slope(self, tau: Tensor) -> Tensor:
        """d log ratio / d tau, at least 0."""
        with torch.enable_grad():
            t = tau.detach().double().requires_grad_()
            slope, = torch.autograd.grad(self.ratio(t).log().sum(), t)
        return slope.to(tau.dtype)

    def ends(self) -> tuple[float, float]:
        """ratio_min and the ratio at tau_max."""
        return self.ratio_min, float(self.ratio(torch.tensor(self.tau_max, dtype=torch.float64)))

    def check(self) -> None:
        """ValueError when noise does not grow with tau, or data still show at tau_max although plans start from pure noise."""
        if not 0 < self.tau_max <= 1:
            raise ValueError(f"{self}: tau_max must lie above 0 and not above 1")
        ratio = self.ratio(torch.linspace(0.02, 1, 50, dtype=torch.float64) * self.tau_max)
        if not (ratio.diff() >= 0).all() or not 0 <= ratio[0] < ratio[-1]:
            raise ValueError(f"{self}: sigma / alpha must grow from data to noise, and goes {ratio[0]:.3g} … {ratio[25]:.3g} … {ratio[-1]:.3g}")
        if not ratio[-1] > LEAST:
            raise ValueError(f"{self} ends at sigma / alpha = {ratio[-1]:.2g}, where the data still show, but plans start from pure noise: it must end above "
                             f"{LEAST}{self._remedy()}")

    def _remedy(self) -> str:
        return ""

    def start_std(self, tau: float | None = None) -> float:
        """Standard deviation of the noise at tau (default tau_max); sampling from there starts with start_std(tau) * N(0, 1)."""
        return float(self.sigma(torch.tensor(self.tau_max if tau is None else tau, dtype=torch.float64)))


@dataclass(frozen=True)
class Linear(Path):
    """Flow matching / rectified flow (Lipman 2022, Liu 2022)."""
    tau_max: float = 0.999  # alpha = 0 at 1: first-order steps from there are exact, multistep ones divide by alpha

    def alpha(self, tau: Tensor) -> Tensor:
        return 1 - tau

    def sigma(self, tau: Tensor) -> Tensor:
        return tau

    def tau_at(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)


@dataclass(frozen=True)
class Cosine(Path):
    """Variance preserving cosine, alpha = cos(pi/2 tau) (Nichol 2021 without the offset; the trigonometric interpolant)."""
    tau_max: float = 0.995  # alpha = .008 there; the reference's 100-step table ends at alpha = .0005

    def alpha(self, tau: Tensor) -> Tensor:
        return torch.cos(tau * (math.pi / 2))

    def sigma(self, tau: Tensor) -> Tensor:
        return torch.sin(tau * (math.pi / 2))

    def tau_at(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio) * (2 / math.pi)


@dataclass(frozen=True)
class VP(Path):
    """Variance-preserving score SDE (Song 2021): beta grows linearly from lo to hi."""
    lo: float = 0.1
    hi: float = 20.0

    def _log_alpha(self, tau: Tensor) -> Tensor:
        return -0.5 * (self.lo * tau + 0.5 * (self.hi - self.lo) * tau**2)

    def alpha(self, tau: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(tau))

    def sigma(self, tau: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(tau)))

    def tau_at(self, ratio: Tensor) -> Tensor:
        whole = 2 * torch.log1p(ratio**2)  # twice the integral of beta up to tau
        return whole / (self.lo + torch.sqrt(self.lo**2 + (self.hi - self.lo) * whole))


@dataclass(frozen=True)
class VE(Path):
    """Variance-exploding score SDE / EDM (Song 2021, Karras 2022): alpha = 1, sigma^(1/rho) linear in tau, sigma(0) = 0."""
    hi: float = 80.0
    rho: float = 7.0

    def alpha(self, tau: Tensor) -> Tensor:
        return torch.ones_like(tau)

    def sigma(self, tau: Tensor) -> Tensor:
        return self.hi * tau**self.rho

    def tau_at(self, ratio: Tensor) -> Tensor:
        return (ratio / self.hi) ** (1 / self.rho)


@dataclass(frozen=True)
class Table(Path):
    """A discrete DDPM schedule: alphas_cumprod of k training steps; tau = (i + 1) / k, nearest entry. Source: Ho 2020.

    `Table.named("squaredcos_cap_v2", 100)` takes diffusers' schedule of that name.
    """
    alphas_cumprod: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        bar = (1.0, *self.alphas_cumprod)
        if len(bar) < 2 or any(b <= a for b, a in pairwise(bar)) or bar[-1] <= 0:
            raise ValueError("alphas_cumprod must fall strictly from below 1 to above 0, one entry per training step")

    @classmethod
    def named(cls, schedule: str = "squaredcos_cap_v2", steps: int = 100) -> "Table":
        from diffusers import DDPMScheduler
        scheduler: Any = DDPMScheduler(num_train_timesteps=steps, beta_schedule=schedule)
        path = cls(tuple(scheduler.alphas_cumprod.tolist()))
        path.check()
        return path

    def _remedy(self) -> str:
        return ". Use schedule.steps=1000, or schedule.schedule=squaredcos_cap_v2, which fits any number"

    def __repr__(self) -> str:
        return f"Table of {len(self.alphas_cumprod)} steps"

    def _bar(self, tau: Tensor) -> Tensor:
        bar = torch.tensor((1.0, *self.alphas_cumprod), dtype=tau.dtype, device=tau.device)
        return bar[(tau * (len(bar) - 1)).round().long()]

    def snap(self, tau: Tensor) -> Tensor:
        k = len(self.alphas_cumprod)
        return ((tau * k).floor() + 1).clamp_max(k) / k

    def tau_at(self, ratio: Tensor) -> Tensor:
        """The nearest entry, in log ratio."""
        bar = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=ratio.device)
        log = ((1 - bar) / bar).log() / 2
        i = torch.searchsorted((log[1:] + log[:-1]) / 2, ratio.double().log().contiguous())
        return ((i + 1) / len(bar)).to(ratio.dtype)

    def log_slope(self, tau: Tensor) -> Tensor:
        """Of the table's steps: such that ratio^-2 log_slope is half the fall of the SNR, as DDPM's variational bound sums it."""
        k = len(self.alphas_cumprod)
        bar = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=tau.device)
        snr = bar / (1 - bar)
        fall = torch.cat([snr[:1], snr[:-1] - snr[1:]])  # the first is the decoder's: an error of x0 over 2 sigma^2
        return (k / 2 * fall / snr)[(tau * k).round().long().clamp_min(1) - 1].to(tau.dtype)

    def ends(self) -> tuple[float, float]:
        first, last = (self.ratio(torch.tensor(t, dtype=torch.float64)).item() for t in (1 / len(self.alphas_cumprod), 1.0))
        return first, last

    def alpha(self, tau: Tensor) -> Tensor:
        return self._bar(tau).sqrt()

    def sigma(self, tau: Tensor) -> Tensor:
        return (1 - self._bar(tau)).sqrt()


def grid(path: Path, steps: int, spacing: str | Sequence[float] = "trailing") -> list[float]:
    """The taus a sampler walks through, tau_max ... 0 (steps + 1 floats).

    trailing: evenly spaced, starting at the noisiest time.   leading: skips the noisiest times, as published DDIM numbers do
    ("leading" starts at tau = .91 for 10 of 100 steps although x is pure noise).   karras: even in ratio^(1/7) (Karras 2022 eq. 5).
    logsnr: even in log ratio.   Or the times themselves, falling, without the final 0.   On a Table the times are its own entries.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"sampling steps must be a whole number from 1, got {steps!r}")
    k = len(path.alphas_cumprod) if isinstance(path, Table) else None
    if k and steps > k:
        raise ValueError(f"{steps} sampling steps on a table of {k} training steps; use at most {k}")
    if not isinstance(spacing, str):
        taus: Sequence[float] = [float(t) for t in spacing]
        if len(taus) != steps or any(b >= a for a, b in pairwise([1.0 + 1e-9, *taus, 0.0])):
            raise ValueError(f"spacing={list(spacing)} must be {steps} times (steps), falling, between 1 and 0")
    elif spacing == "trailing":
        taus = [path.tau_max * (1 - i / steps) for i in range(steps)]
    elif spacing == "leading":
        total = k or 1000
        if (steps - 1) * (total // steps) < 0.7 * total:
            raise ValueError(f"spacing=leading with {steps} of {total} steps would start at tau = {((steps - 1) * (total // steps) + 1) / total:.2g}, "
                             "where x is no pure noise: use trailing")
        taus = [(i * (total // steps) + 1) / total * path.tau_max for i in reversed(range(steps))]
    elif spacing in ("karras", "logsnr"):
        lo, hi = path.ends()
        power = 1 / 7 if spacing == "karras" else 1e-6
        done = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
        taus = path.tau_at((hi**power + done * (lo**power - hi**power)) ** (1 / power)).tolist()
        taus[0] = path.tau_max
    else:
        raise ValueError(f"spacing {spacing!r} is unknown; use trailing, leading, karras, logsnr or the times themselves, [1.0, 0.5]")
    return [*(_entries(taus, k) if k else taus), 0.0]


def _entries(taus: Sequence[float], k: int) -> list[float]:
    """Times on a table of k, each once: where two fall on one entry, the later moves down, and there is room below for the rest."""
    rows: list[int] = []
    for i, tau in enumerate(taus):
        rows.append(max(min(round(tau * k), rows[-1] - 1 if rows else k), len(taus) - i))
    return [row / k for row in rows]

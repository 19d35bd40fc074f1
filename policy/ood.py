"""How far an observation lies from the training data, as the policy itself sees it, without a demonstration; and how well that tells apart."""
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from policy.diffusion.likelihood import levels, log_density
from policy.diffusion.objective import denoising_loss, ignorance
from policy.planner import Planner
from policy.types import Obs

KINDS = ("loss", "likelihood")


def refuse(planner: Planner) -> None:
    """ValueError when the planner's network was not trained to denoise at every noise level: it then defines no density."""
    if why := ignorance(planner.objective):
        raise ValueError(f"this policy has no likelihood: {why}. Evaluate a formalism that denoises at every level (ddpm, flow, edm, …), "
                         "or a student's teacher")


@torch.no_grad()
def ood_score(planner: Planner, obs: Obs, kind: str = "loss", *, seed: int = 0, draws: int = 16, floor: float = 0.03, steps: int = 16,
              trace: str | int = 1) -> Tensor:
    """How strange each observation is, (b,): higher is stranger. It judges the plan that the policy itself makes under it.

    loss: the denoising loss of that plan, over `draws` even times (Diff-DAgger, Lee 2024).   likelihood: -log p(plan | obs) in nats per dimension
    (options as in policy.diffusion.likelihood.log_density).   obs: {key: (b, t_obs, *shape)} in physical units.
    Every noise comes from `seed` and is the same for each row: the same observation always has the same score, whatever stands beside it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    refuse(planner)
    source = torch.Generator().manual_seed(seed)

    def same(x: Tensor) -> Tensor:
        return torch.randn(x.shape[1:], generator=source).to(x).expand_as(x)

    cond, path = planner.encode(obs), planner.denoiser.path
    like = cond.tokens.new_empty(len(cond.tokens), *planner.size)
    x0 = planner.encode_actions(planner.sample(obs, cond, noise=same(like), draw=same), obs)
    if kind == "likelihood":
        u = x0 + levels(path, floor, steps)[0] * same(x0)
        return -log_density(planner.denoiser, path, u, cond, floor=floor, steps=steps, trace=trace, draw=same).mean(0) / x0[0].numel()
    taus = path.snap((torch.arange(draws, device=x0.device) + 0.5).to(x0.dtype) / draws * path.tau_max)
    losses = [denoising_loss(planner.denoiser, x0, cond, tau.expand(len(x0)), same(x0)).mean((1, 2)) for tau in taus]
    return torch.stack(losses).mean(0)


Perturb = Callable[[Obs], Obs]  # of observations in physical units


def noisy(planner: Planner, std: float, seed: int = 0) -> Perturb:
    """White noise of this standard deviation on the normalised observations."""
    def perturb(obs: Obs) -> Obs:
        source = torch.Generator().manual_seed(seed)
        return planner.decode_obs({k: x + std * torch.randn(x.shape, generator=source).to(x) for k, x in planner.encode_obs(obs).items()})
    return perturb


def shifted(planner: Planner, by: float, seed: int = 0) -> Perturb:
    """Every channel off by +by or -by (normalised units), the same in all steps of a history: a sensor that moved."""
    def perturb(obs: Obs) -> Obs:
        source, out = torch.Generator().manual_seed(seed), {}
        for k, x in planner.encode_obs(obs).items():
            signs = torch.randn((len(x), 1, *x.shape[2:]), generator=source).sign().to(x)
            out[k] = x + by * signs
        return planner.decode_obs(out)
    return perturb


def mixed(groups: Sequence[int], seed: int = 0) -> Perturb:
    """Each row keeps its first key and has the others of a row of another group (episode): every number is real, the scene is not.

    groups: (n,) of the rows.   ValueError where there is only one group or one key.
    """
    def perturb(obs: Obs) -> Obs:
        if len(set(groups)) < 2 or len(obs) < 2:
            raise ValueError("mixing needs two episodes and two observed keys")
        rng, g = np.random.default_rng(seed), np.asarray(groups)
        other = torch.tensor([rng.choice(np.flatnonzero(g != one)) for one in g])
        first = next(iter(obs))
        return {k: x if k == first else x[other.to(x.device)] for k, x in obs.items()}
    return perturb


def auroc(inside: Sequence[float] | np.ndarray, outside: Sequence[float] | np.ndarray) -> float:
    """Probability that one of `outside` scores higher than one of `inside`, ties half (Mann-Whitney): 0.5 knows nothing, 1 always tells."""
    return float(_wins(np.asarray(inside, float), np.asarray(outside, float)).mean())


def auroc_interval(inside: Sequence[float] | np.ndarray, outside: Sequence[float] | np.ndarray, groups: Sequence[int], *, draws: int = 4000,
                   seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of auroc by resampling groups (episodes) whole; row i of both belongs to groups[i]. None for a single group."""
    names, g = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        return None
    member = np.eye(len(names))[g]  # (n, groups)
    sums, sizes = member.T @ _wins(np.asarray(inside, float), np.asarray(outside, float)) @ member, member.sum(0)
    picked = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws).astype(float)
    lo, hi = np.quantile(np.einsum("dg,gh,dh->d", picked, sums, picked) / (picked @ sizes) ** 2, (0.025, 0.975))
    return float(lo), float(hi)


def _wins(inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """(n, m): 1 where outside is higher, 1/2 where equal."""
    if not len(inside) or not len(outside) or not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise ValueError("an AUROC needs finite scores on both sides")
    return (outside[None] > inside[:, None]) + (outside[None] == inside[:, None]) / 2

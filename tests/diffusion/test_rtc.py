"""Plans that go on from what is promised: real-time chunking in closed form, what the network is told, warm starts."""
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from policy.data.normalize import Normalizer
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.path import VE, VP, Cosine, Linear
from policy.diffusion.rtc import gain, guided, identity
from policy.diffusion.samplers import first_order, heun
from policy.nets.lowdim import LowDim
from policy.planner import Planner
from policy.timeline import soft_mask
from policy.types import Spec
from tests.diffusion.exact import MEAN, PATHS, STD, Answers, gaussian

CONTINUOUS = {name: PATHS[name] for name in ("linear", "cosine", "vp", "ve")}


def mixing(path, t: int = 6):
    """x -> E[x0 | x] of a Gaussian whose steps are correlated: linear, with a Jacobian that is neither diagonal nor symmetric in this basis."""
    matrix = 0.3 * torch.randn(t, t, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.eye(t, dtype=torch.float64)

    def denoise(x, tau, cond=None):
        a, s = path.at(tau, x)
        return 0.1 + matrix @ x / (a + s)
    return denoise, matrix


def pieces(t: int = 6, b: int = 3):
    g = torch.Generator().manual_seed(1)
    x, known = (torch.randn(b, t, 2, generator=g, dtype=torch.float64) for _ in range(2))
    return x, known, torch.from_numpy(soft_mask(t, 2, 5))[:, None]


@pytest.mark.parametrize("path", CONTINUOUS.values(), ids=CONTINUOUS)
def test_the_jacobian_is_the_true_one(path):
    """Against the matrix itself. The answer of a Jacobian left out, LeRobot's, is another."""
    denoise, matrix = mixing(path)
    x, known, weight = pieces()
    tau = torch.full((3,), 0.4, dtype=torch.float64)
    kappa, a, s = gain(path, tau, x, 5.0, 1.0)
    x0 = denoise(x, tau)
    pull = weight * (known - x0)
    torch.testing.assert_close(guided(denoise, path, known, weight)(x, tau, None), x0 + kappa * (matrix.T @ pull) / (a + s))
    torch.testing.assert_close(identity(denoise, path, known, weight)(x, tau, None), x0 + kappa * pull / (a + s))
    assert ((matrix.T @ pull - pull).abs() > 1e-3).all(2).all(0).sum() >= 4


def test_it_is_the_papers_flow_update():
    """v <- v + min(beta, (1-t)/(t r2)) g with t from noise to data, eq. 2-4 as in its authors' code."""
    path, beta = Linear(), 5.0
    denoise, matrix = mixing(path)
    x, known, weight = pieces()
    for t in (0.05, 0.2, 0.5, 0.8, 0.95):
        for prior in (1.0, 0.3):
            tau = torch.full((3,), 1 - t, dtype=torch.float64)
            x1 = denoise(x, tau)
            r2 = prior**2 * (1 - t) ** 2 / (t**2 * prior**2 + (1 - t) ** 2)
            v = (x1 - x) / (1 - t) + min(beta, (1 - t) / (t * r2)) * (matrix.T @ (weight * (known - x1)))
            torch.testing.assert_close(guided(denoise, path, known, weight, limit=beta, prior=prior)(x, tau, None), x + (1 - t) * v)


def test_it_is_the_derived_ddim_update():
    """eps <- eps - (alpha kappa / sigma) g with kappa = min(beta sigma, 1 / alpha) where variance is preserved."""
    for path in (Cosine(), VP()):
        denoise, matrix = mixing(path)
        x, known, weight = pieces()
        for at in (0.1, 0.5, 0.9):
            tau = torch.full((3,), at, dtype=torch.float64)
            a, s = path.at(tau, x)
            x0 = denoise(x, tau)
            g = matrix.T @ (weight * (known - x0)) / (a + s)
            eps = (x - a * x0) / s - a / s * (5 * s).minimum(1 / a) * g
            torch.testing.assert_close(guided(denoise, path, known, weight)(x, tau, None), (x - s * eps) / a)


@pytest.mark.parametrize("guide", [guided, identity])
@pytest.mark.parametrize("prior", [1.0, 0.2])
def test_equivalent_parametrisations_are_guided_alike(guide, prior):
    """The same denoiser of u = x / alpha at the same sigma / alpha gives the same guided x0 on every path."""
    u, known, weight = pieces()
    matrix = mixing(Linear())[1]
    for ratio in (0.05, 0.3, 1.0, 4.0):
        found = []
        for path in CONTINUOUS.values():
            tau = path.tau_at(torch.full((3,), ratio, dtype=torch.float64))

            def denoise(x, tau, cond=None, path=path):
                return 0.1 + matrix @ x / path.at(tau, x)[0]
            found.append(guide(denoise, path, known, weight, prior=prior)(path.at(tau, u)[0] * u, tau, None))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- a planner whose denoiser is known
def exact(path, *, target: str = "x0", sampler=first_order, steps: int = 20, std: float = STD, horizon: int = 6, spacing: str = "trailing") -> Planner:
    """A planner that draws every action from N(MEAN, std^2), in units in which normalising does nothing."""
    spec = Spec(obs={"x": (1,)}, action_dim=2, t_obs=1, horizon=horizon)
    arrays = {"x": torch.tensor([[-1.0], [1.0]]), "action": torch.tensor([[-1.0, -1], [1, 1]])}
    net = Answers(gaussian(path, MEAN, std), path, target)
    net.register_parameter("one", nn.Parameter(torch.zeros(1)))
    planner = Planner(spec, Normalizer.fit(arrays), LowDim(dict(spec.obs), 1), Denoiser(net, path, target), sampler=sampler, steps=steps, spacing=spacing)
    return planner.double().eval().requires_grad_(False)


def obs_of(b: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(b, 1, 1, dtype=torch.float64)}


def noise_of(b: int, horizon: int = 6) -> torch.Tensor:
    return torch.randn(b, horizon, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("path", CONTINUOUS.values(), ids=CONTINUOUS)
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_with_the_datas_own_spread_guidance_lands_on_the_promise(path, target):
    """prior = std and no limit: kappa J = 1, so x0' = (1 - W) x0 + W y. Where W is 1 the plan is y before anything is written, where 0 untouched."""
    planner = exact(path, target=target)
    noise, weight = noise_of(4), torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64)[:, None]
    y = torch.rand(4, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) - 0.5
    start = path.start_std() * noise
    pulled = guided(planner.denoiser, path, y, weight, limit=1e9, prior=STD)
    plan = first_order(pulled, path, start, planner.taus)
    free = first_order(planner.denoiser, path, start, planner.taus)
    torch.testing.assert_close(plan[:, :2], y[:, :2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plan[:, 2:], free[:, 2:])


@pytest.mark.parametrize("w", [0.3, 0.6])
def test_the_guided_mean_is_that_of_the_linear_ode(w):
    """z = x / alpha - mean obeys dz/dr = (z - (1-w) std^2 / (std^2 + r^2) z - w c) / r with c = y - mean: solved by quadrature, sampled by Heun."""
    path, y, lo, hi = VE(), 0.9, 0.05, 80.0
    c = y - MEAN

    def free(r):
        return r**w * (STD**2 + r**2) ** ((1 - w) / 2)

    z0 = 40.0
    want = free(lo) * (z0 / free(hi) + quad(lambda log: w * c / free(math.exp(log)), math.log(lo), math.log(hi), limit=200)[0])
    taus = [float(path.tau_at(torch.tensor(r, dtype=torch.float64))) for r in np.geomspace(hi, lo, 400)]
    weight, known = torch.full((1, 1), w, dtype=torch.float64), torch.full((1, 1, 1), y, dtype=torch.float64)
    pulled, last = guided(gaussian(path), path, known, weight, limit=1e9, prior=STD), []

    def spy(x, tau, cond=None):
        last.append(x)
        return pulled(x, tau, cond)
    heun(spy, path, torch.full((1, 1, 1), z0 + MEAN, dtype=torch.float64), [*taus, 0.0])
    assert last[-1].item() - MEAN == pytest.approx(want, abs=2e-3) and abs(want) > 0.05


@pytest.mark.parametrize("path", CONTINUOUS.values(), ids=CONTINUOUS)
@pytest.mark.parametrize("start", [0.3, 0.6, 1.0])
def test_a_warm_start_has_the_gaussians_mean_and_spread(path, start):
    """From the guess g noised at tau, the ODE ends at m + std (a (g - m) + s eps) / sqrt(a^2 std^2 + s^2); behind the prefix, g is its last action."""
    planner, noise = exact(path, sampler=heun, steps=150, spacing="logsnr"), noise_of(3)
    prefix = torch.tensor([0.1, -0.3, 0.7], dtype=torch.float64)[None, :, None].expand(3, -1, 2)
    plan = planner.plan(obs_of(3), noise=noise, prefix=prefix, committed=0, merge="naive", warm=start * planner.taus[0])
    tau = max(t for t in planner.taus if t <= start * planner.taus[0] + 1e-6)
    a, s = (float(v) for v in path.at(torch.tensor([tau], dtype=torch.float64), torch.zeros(1)))
    guess = torch.cat([prefix, prefix[:, -1:].expand(-1, 3, -1)], 1)
    torch.testing.assert_close(plan, MEAN + STD / math.hypot(a * STD, s) * (a * (guess - MEAN) + s * noise), rtol=2e-3, atol=2e-3)


def test_a_warm_start_saves_steps_and_needs_a_prefix():
    planner, calls = exact(Linear(), steps=10), []
    planner.denoiser.register_forward_hook(lambda *_: calls.append(1))
    prefix = torch.zeros(2, 3, 2, dtype=torch.float64)
    for warm, want in ((1.0, 10), (0.5, 5), (0.1, 1), (None, 10)):
        for merge in ("naive", "ensemble", "frozen", "identity", "guided"):
            calls.clear()
            planner.plan(obs_of(2), noise=noise_of(2), prefix=prefix, committed=1, merge=merge, warm=warm)
            assert len(calls) == want, (warm, merge)
    assert torch.equal(planner.plan(obs_of(2), noise=noise_of(2), warm=0.3), planner.plan(obs_of(2), noise=noise_of(2)))
    with pytest.raises(ValueError, match=r"warm=0.05 lies below the sampler's last noise time 0.0999.*more sampler.steps"):
        planner.plan(obs_of(2), prefix=prefix, warm=0.05)
    for warm in (0, -1, 1.5):
        with pytest.raises(ValueError, match="must be a noise time above 0"):
            planner.plan(obs_of(2), prefix=prefix, warm=warm)

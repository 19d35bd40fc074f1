"""Likelihoods against closed forms: Gaussians and mixtures whose perfect denoiser is known, and densities of wrong denoisers that must sum to 1."""
import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import clip
from policy.diffusion.likelihood import levels, log_density, log_likelihood, variational_bound
from policy.diffusion.path import VE, VP, Cosine, Linear, Path, Table
from policy.types import Cond
from tests.helpers import make_data, make_planner, make_store

PATHS: dict[str, Path] = {"linear": Linear(), "cosine": Cosine(), "vp": VP(), "ve": VE(), "table": Table.named("squaredcos_cap_v2", 100),
                          "fine_table": Table(tuple(1 / (1 + r**2) for r in torch.logspace(-2, 2, 200, dtype=torch.float64).tolist()))}
CONTINUOUS = ("linear", "cosine", "vp", "ve")
MEAN, STD, FLOOR = 0.4, 0.3, 0.02
POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None]  # in standard deviations


def gaussian(path: Path, mean: float = MEAN, std: float = STD):
    def denoise(x, tau, cond=None):
        a, s = path.at(tau, x)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
    return denoise


def correlated(path: Path, mean, cov):
    """E[x0 | x] for x0.flatten() ~ N(mean, cov)."""
    values, vectors = torch.linalg.eigh(cov)

    def denoise(x, tau, cond=None):
        a, s = (c.reshape(len(x), 1) for c in path.at(tau, x))
        gain = a * values / (a**2 * values + s**2)
        return (mean + (gain * ((x.flatten(1) - a * mean) @ vectors)) @ vectors.T).view_as(x)
    return denoise


def mixture(path: Path, target: MixtureSameFamily):
    def denoise(x, tau, cond=None):
        a, s = (c[..., None] for c in path.at(tau, x))
        m, v, p = target.component_distribution.mean, target.component_distribution.variance, target.mixture_distribution.probs
        var, away = a**2 * v + s**2, x[..., None] - a * m
        share = (p.log() - var.log() / 2 - away**2 / var / 2).softmax(-1)
        return (share * (m + a * v / var * away)).sum(-1)
    return denoise


def noised(target: MixtureSameFamily, floor: float) -> MixtureSameFamily:
    parts = target.component_distribution
    return MixtureSameFamily(target.mixture_distribution, Normal(parts.mean, (parts.variance + floor**2).sqrt()))


def at_floor(path: Path, floor: float = FLOOR) -> Normal:
    """What the perfect denoiser's ODE makes of the prior: N(m, s0^2 + f^2), but for the mean that is still in the noise at the path's end."""
    f, end = levels(path, floor, 64)[0], path.ends()[1]
    c = math.sqrt((STD**2 + f**2) / (STD**2 + end**2))
    return Normal(torch.tensor(MEAN - c * MEAN, dtype=torch.float64), c * end)


@pytest.mark.parametrize("name", PATHS)
def test_the_gaussian_is_exact_on_every_path(name):
    path, want = PATHS[name], at_floor(PATHS[name])
    u = want.mean + want.stddev * POINTS
    found = log_density(gaussian(path), path, u, floor=FLOOR, steps=96)[0]
    torch.testing.assert_close(found, want.log_prob(u).flatten(), rtol=0, atol=2e-3 if name == "table" else 1e-3)  # 99 steps, few of them near the floor
    data = Normal(MEAN, math.hypot(STD, levels(path, FLOOR, 64)[0]))
    assert abs(found.mean() - data.log_prob(u).mean()) < 1e-3
    torch.testing.assert_close(found, log_likelihood(gaussian(path), path, u, noise=torch.zeros_like(u), floor=FLOOR, steps=96))


def test_likelihood_is_that_of_actions_with_the_floor_s_noise():
    """The mean over the noise is the cross-entropy that the lower bound of log p(x0) consists of."""
    torch.manual_seed(0)
    path, x0 = Linear(), torch.full((4000, 1, 1), 0.5, dtype=torch.float64)
    found = log_likelihood(gaussian(path), path, x0, floor=0.1, steps=32)
    var = STD**2 + 0.1**2
    want = -0.5 * math.log(2 * math.pi * var) - (0.1**2 + 0.1**2) / (2 * var)
    assert abs(found.mean() - want) < 4 * found.std() / math.sqrt(4000)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_correlated_gaussian_in_six_dimensions(name):
    torch.manual_seed(0)
    path = PATHS[name]
    root = 0.2 * torch.randn(6, 6, dtype=torch.float64)
    mean, cov = torch.zeros(6, dtype=torch.float64), root @ root.T + 1e-3 * torch.eye(6)
    target = MultivariateNormal(mean, cov + FLOOR**2 * torch.eye(6))
    u = target.sample((300,))
    denoise = correlated(path, mean, cov)
    exact = log_density(denoise, path, u.view(-1, 3, 2), floor=FLOOR, steps=96)
    assert exact.shape == (1, 300)
    torch.testing.assert_close(exact[0], target.log_prob(u), rtol=0, atol=3e-3)
    assert abs(exact[0] - target.log_prob(u)).mean() < 1e-3
    if name == "linear":
        probes = log_density(denoise, path, u.view(-1, 3, 2), floor=FLOOR, steps=96, trace=8)
        error, off = probes.std(0) / math.sqrt(8), probes.mean(0) - exact[0]
        assert probes.shape == (8, 300) and (error > 0.01).all()
        assert abs(off.mean()) < 4 * off.std() / math.sqrt(300)  # unbiased
        assert 0.8 < (off / error).square().mean().sqrt() < 1.6  # and as far off as its standard error says (Student's t of 7: 1.18)
        assert abs((log_likelihood(denoise, path, u.view(-1, 3, 2), noise=torch.zeros(300, 3, 2), floor=FLOOR, steps=96, trace=8) - exact[0]).mean()) < 0.3


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_a_mixture_of_gaussians(name):
    path = PATHS[name]
    target = MixtureSameFamily(Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
                               Normal(torch.tensor([-0.6, 0.5], dtype=torch.float64), torch.tensor([0.1, 0.15], dtype=torch.float64)))
    u = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64)[:, None, None]
    found = log_density(mixture(path, target), path, u, floor=FLOOR, steps=192)[0]
    want = noised(target, FLOOR).log_prob(u.flatten())
    assert (found - want).abs().max() < 1e-2 and ((found - want) * want.exp()).sum().abs() / want.exp().sum() < 1e-3, found - want


@pytest.mark.parametrize("name", ["cosine", "table"])
def test_a_wrong_denoiser_still_has_a_density(name):
    """Whatever the field, the probabilities sum to 1: no closed form is needed."""
    path = PATHS[name]
    u = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None, None]

    def denoise(x, tau, cond=None):
        a, s = path.at(tau, x)
        return 0.7 * torch.tanh(2 * a * x / (a**2 + s**2)) + 0.1 * torch.sin(3 * x / (a**2 + s**2).sqrt())

    density = log_density(denoise, path, u, floor=0.2, steps=128)[0].exp()
    assert abs(torch.trapezoid(density, u.flatten()) - 1) < 1e-3


def test_error_falls_with_the_cube_of_the_steps():
    path, want = VE(), at_floor(VE())
    u = want.mean + want.stddev * POINTS

    def error(steps):
        return (log_density(gaussian(path), path, u, floor=FLOOR, steps=steps)[0] - want.log_prob(u).flatten()).abs().max().item()

    slopes = [math.log2(error(k) / error(2 * k)) for k in (64, 128)]
    assert all(abs(slope - 3) < 0.35 for slope in slopes), slopes


@pytest.mark.parametrize("name", PATHS)
def test_the_bound_of_a_perfect_denoiser_is_its_closed_form(name):
    """In continuous time it is the mean of -log p_f(x0 + f noise), pointwise; on a table a sum above it, and above by as much as it should be."""
    torch.manual_seed(0)
    path, x0 = PATHS[name], torch.tensor([-0.1, 0.4, 0.9], dtype=torch.float64).repeat_interleave(4000)[:, None, None]
    rs = torch.tensor(levels(path, FLOOR, 64), dtype=torch.float64)
    f, end, miss = rs[0], rs[-1], (torch.tensor([-0.1, 0.4, 0.9], dtype=torch.float64) - MEAN) ** 2
    found = variational_bound(gaussian(path), path, x0, floor=FLOOR, draws=100).view(3, 4000)
    var = STD**2 + f**2
    tight = 0.5 * (2 * math.pi * var).log() + (miss + f**2) / (2 * var)
    want = tight
    if isinstance(path, Table):
        r2 = rs[1:, None] ** 2
        squared = (r2 * miss.sqrt() / (STD**2 + r2)) ** 2 + (STD**2 / (STD**2 + r2)) ** 2 * r2
        fall = (rs[:-1] ** -2 - rs[1:] ** -2)[:, None] / 2
        want = (fall * squared).sum(0) + 0.5 * (2 * math.pi * math.e * f**2).log()
    want = want + torch.tensor([-0.1, 0.4, 0.9]) ** 2 / end**2 / 2
    error = found.std(1) / math.sqrt(4000)
    assert ((found.mean(1) - want).abs() < 4 * error + 5e-4).all(), (found.mean(1), want, error)
    if isinstance(path, Table):
        assert (found.mean(1).mean() > tight.mean()), "a sum over few entries costs something"


def test_a_fine_table_is_sampled_without_bias():
    torch.manual_seed(0)
    path, x0 = PATHS["table"], torch.full((20_000, 1, 1), 0.1, dtype=torch.float64)
    few, all_of_them = (variational_bound(gaussian(path), path, x0, floor=FLOOR, draws=n) for n in (7, 1000))
    assert abs(few.mean() - all_of_them.mean()) < 4 * few.std() / math.sqrt(20_000)
    assert few.std() > all_of_them.std()


@pytest.mark.parametrize("name", ["linear", "ve", "fine_table"])
def test_a_wrong_denoiser_costs_nats(name):
    torch.manual_seed(0)
    path, x0 = PATHS[name], MEAN + STD * torch.randn(500, 1, 1, dtype=torch.float64)
    right, narrow, off = gaussian(path), gaussian(path, std=0.6 * STD), gaussian(path, mean=MEAN + 0.2)

    def cost(denoise):
        torch.manual_seed(1)  # the same noise for all
        return variational_bound(denoise, path, x0, floor=FLOOR, draws=32).mean().item()

    bound = [cost(d) for d in (right, narrow, off)]
    exact = [-log_likelihood(d, path, x0, floor=FLOOR, steps=32).mean().item() for d in (right, narrow, off)]
    assert min(bound[1:]) > bound[0] + 0.05 and min(exact[1:]) > exact[0] + 0.05


class Knows(torch.nn.Module):
    """The network inside a Denoiser of this target that makes it the Gaussian's."""

    def __init__(self, path: Path, target: str):
        super().__init__()
        self.path, self.scales = path, Denoiser(torch.nn.Identity(), path, target).scales

    def forward(self, x, tau, cond=None):
        c_in, c_skip, c_out = self.scales(x, tau)
        return (gaussian(self.path)(x / c_in, tau) - c_skip * x / c_in) / c_out


@pytest.mark.parametrize("name, target", [("linear", "flow"), ("cosine", "v"), ("vp", "score"), ("ve", "edm"), ("table", "eps")])
def test_a_denoiser_in_float32_is_as_good(name, target):
    path, want = PATHS[name], at_floor(PATHS[name])
    u = (want.mean + want.stddev * POINTS)
    denoiser = Denoiser(Knows(path, target), path, target)
    wide, narrow = (log_density(denoiser, path, u.to(dtype), floor=FLOOR, steps=64)[0] for dtype in (torch.float64, torch.float32))
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-3)
    torch.manual_seed(0)
    rows = torch.full((500, 1, 1), 0.5)
    sums = [variational_bound(denoiser, path, rows.to(dtype), floor=FLOOR, draws=64) for dtype in (torch.float32, torch.float64)]
    assert sums[0].dtype == torch.float32 and abs(sums[0].mean() - sums[1].mean()) < 4 * sums[1].std() / math.sqrt(250)


def test_a_planner_s_network_in_inference_mode(tmp_path):
    """Frozen weights, no gradients wanted: the trace is that of the jacobian torch makes, and nothing is left behind."""
    data = make_data(make_store(tmp_path / "d.zarr"))
    planner = make_planner(data).eval().requires_grad_(False)
    batch = data.batch(torch.arange(3))
    with torch.inference_mode():
        cond = planner.encode(batch.obs)
        x0 = planner.normalizer.encode({"action": batch.action})["action"]
        torch.manual_seed(0)
        found = log_density(planner.denoiser, planner.denoiser.path, x0, cond, floor=0.05, steps=4)
        alone = log_density(planner.denoiser, planner.denoiser.path, x0[1:2], cond.map(lambda x: x[1:2]), floor=0.05, steps=4)
        bound = variational_bound(planner.denoiser, planner.denoiser.path, x0, cond, floor=0.05, draws=4)
    assert found.shape == (1, 3) and bound.shape == (3,) and not found.requires_grad and found.isfinite().all()
    torch.testing.assert_close(found[:, 1:2], alone, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        signs = log_density(planner.denoiser, planner.denoiser.path, x0.clone(), Cond(cond.tokens.clone()), floor=0.05, steps=4, trace=32)
    assert (abs(signs.mean(0) - found[0]) < 4 * signs.std(0) / math.sqrt(32)).all()
    assert all(p.grad is None for p in planner.parameters())


def test_what_cannot_be_is_refused():
    path, u = Linear(), torch.zeros(2, 1, 1)
    for wrong in ({"floor": 0.0}, {"floor": 2000.0}, {"steps": 2}, {"steps": 4.5}, {"trace": 0}, {"trace": "some"}, {"trace": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            log_density(gaussian(path), path, u, **wrong)
    with pytest.raises(ValueError, match="draws"):
        variational_bound(gaussian(path), path, u, draws=0)
    with pytest.raises(ValueError, match="entries"):
        log_density(gaussian(PATHS["table"]), PATHS["table"], u, floor=60.0)

    @torch.no_grad()
    def sealed(x, tau, cond):
        return gaussian(path)(x, tau)

    with pytest.raises(ValueError, match="differentiable"):
        log_density(sealed, path, u)


def test_clipping_is_not_a_density():
    """Why the guides stay outside: where clipping has cut, the density no longer sums to what it should."""
    u = torch.tensor([0.2, 0.9], dtype=torch.float64)[:, None, None]
    path = Linear()
    plain, cut = (log_density(d, path, u, floor=FLOOR)[0] for d in (gaussian(path), clip(gaussian(path), limit=0.5)))
    assert abs(plain - cut).max() > 0.05

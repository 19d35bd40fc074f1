"""Densities, weights and the consistency loss, each with its closed form; the ends of every path in every precision."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from policy.diffusion.denoiser import TARGETS, Denoiser
from policy.diffusion.objective import (
    KNOWN,
    WEIGHTS,
    beta,
    consistency,
    denoising,
    denoising_loss,
    discrete,
    distillation,
    lognormal,
    stratified,
    uniform,
    weight_of,
)
from policy.diffusion.path import Table
from tests.diffusion.exact import PATHS, gaussian, perfect


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, tau, cond=None):
        return torch.tanh(self.scale * x) + tau[:, None, None]


@pytest.mark.parametrize(("density", "cdf"), [
    (uniform, lambda tau, path: tau / path.tau_max),
    (lognormal, lambda tau, path: stats.norm.cdf((path.ratio(torch.tensor(tau)).log().item() + 1.2) / 1.2)),
    (beta, lambda tau, path: stats.beta.cdf(tau / path.tau_max, 1.5, 1.0)),
])
@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "ve"])
def test_a_density_is_what_it_says(density, cdf, name):
    """Kolmogorov-Smirnov against scipy's distribution functions."""
    torch.manual_seed(0)
    tau = density(4000, PATHS[name], torch.zeros(1, dtype=torch.float64))
    at = torch.linspace(0.05, 0.95, 19) * PATHS[name].tau_max
    gaps = [abs((tau <= t).double().mean().item() - cdf(t.item(), PATHS[name])) for t in at]
    assert max(gaps) < (0.03 if density is beta else 0.002), gaps
    assert tau.min() >= 0 and tau.max() <= PATHS[name].tau_max


@pytest.mark.parametrize("density", [uniform, lognormal, beta])
def test_on_a_table_the_times_are_its_entries(density):
    tau = density(500, PATHS["table"], torch.zeros(1))
    assert (tau * 100 - (tau * 100).round()).abs().max() < 1e-4 and tau.min() >= 0.0099 and tau.max() <= 1


def test_discrete_times_come_equally_often():
    tau = discrete(100, PATHS["linear"], torch.zeros(1), taus=[1.0, 0.1])
    assert (tau == 1).sum() == 50 and (tau == torch.tensor(0.1)).sum() == 50


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_is_the_published_one(path, target):
    """Times the squared error of the target, every weight is the same function of the error of x0, whatever is predicted."""
    torch.manual_seed(0)
    along = PATHS[path]
    tau = along.snap(torch.linspace(0.2, 0.8, 6, dtype=torch.float64) * along.tau_max)
    x0, eps = (torch.randn(6, 4, 2, dtype=torch.float64) for _ in range(2))
    denoiser = Denoiser(Net().double(), along, target)
    error = (denoiser(along.noise(x0, eps, tau), tau) - x0) ** 2
    loss = denoising_loss(denoiser, x0, None, tau, eps)
    snr = (along.ratio(tau).clamp_min(KNOWN) ** -2)[:, None, None]
    _a, _s = along.at(tau, x0)
    want = {"simple": loss / error.clamp_min(1e-12), "x0": torch.ones_like(snr), "snr": snr, "min_snr": snr.clamp_max(5), "flow": (1 + snr.sqrt()) ** 2}
    for name in want:
        if name != "simple":
            torch.testing.assert_close(weight_of(name, denoiser, tau, x0) * loss, want[name] * error, rtol=2e-3, atol=1e-9)
    with pytest.raises(ValueError, match="simple, x0, snr"):
        weight_of("heavy", denoiser, tau, x0)


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve"])
def test_the_elbo_weight_is_minus_half_the_slope_of_the_snr(path):
    along, h = PATHS[path], 1e-5
    tau = torch.linspace(0.3, 0.8, 6, dtype=torch.float64) * along.tau_max
    denoiser = Denoiser(Net().double(), along, "x0")
    slope = (along.ratio(tau + h) ** -2 - along.ratio(tau - h) ** -2) / (2 * h)
    want = torch.where(along.ratio(tau) > KNOWN, -slope / 2 * along.tau_max, torch.nan)
    got = weight_of("elbo", denoiser, tau, torch.zeros(6, 1, 1, dtype=torch.float64)).flatten().double()
    torch.testing.assert_close(got[~want.isnan()], want[~want.isnan()], rtol=1e-3, atol=0)
    assert (~want.isnan()).sum() >= 3


def test_the_elbo_of_a_table_is_ddpms():
    """Ho 2020 eq. 8: the KL between the posterior and the model's step of equal variance, (mean difference)^2 / 2 variance, for an error of 1 in x0."""
    table: Table = PATHS["table"]  # type: ignore[assignment]
    bar = torch.tensor((1.0, *table.alphas_cumprod), dtype=torch.float64)
    i = torch.tensor([20, 50, 90])
    alpha, before = bar[i] / bar[i - 1], bar[i - 1]
    coefficient, variance = before.sqrt() * (1 - alpha) / (1 - bar[i]), (1 - before) / (1 - bar[i]) * (1 - alpha)
    got = weight_of("elbo", Denoiser(Net(), table, "x0"), i / 100, torch.zeros(3, 1, 1)).flatten().double() / 100  # one of 100 terms
    torch.testing.assert_close(got, coefficient**2 / (2 * variance), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("density", "weight"), [(d, w) for d in (uniform, lognormal, beta) for w in WEIGHTS if d is uniform or w != "elbo"])
@pytest.mark.parametrize("path", PATHS)
def test_every_objective_has_finite_gradients(path, density, weight):
    torch.manual_seed(0)
    for target in TARGETS:
        denoiser = Denoiser(Net(), PATHS[path], target)
        denoising(denoiser, torch.randn(64, 4, 2), density=density, weight=weight).mean().backward()
        assert denoiser.net.scale.grad.isfinite()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PATHS)), st.sampled_from(TARGETS), st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(WEIGHTS),
       st.sampled_from(["zero", "one", "tiny", "near"]), st.floats(-1, 1), st.floats(0, 4))
def test_no_end_gives_a_nan(path, target, dtype, weight, end, x0, eps):
    """tau -> 0, tau -> 1 and eps -> 0, in float32 and bf16: losses, weights and answers are finite."""
    along = PATHS[path]
    tau = {"zero": 0.0, "tiny": 1e-6, "near": along.tau_max * (1 - 1e-4), "one": along.tau_max}[end]
    denoiser = Denoiser(Net().to(dtype), along, target)
    clean, noise, at = torch.full((2, 3, 1), x0, dtype=dtype), torch.full((2, 3, 1), eps, dtype=dtype), torch.full((2,), tau, dtype=dtype)
    loss = denoising_loss(denoiser, clean, None, at, noise)
    assert loss.isfinite().all() and (weight_of(weight, denoiser, at, clean) * loss).isfinite().all()
    x = along.noise(clean, noise, at)
    assert x.isfinite().all() and denoiser(x, at).isfinite().all()


# ---------------------------------------------------------------- consistency
class Jump(nn.Module):
    """The consistency function of a Gaussian, as a network that Denoiser turns into it."""

    def __init__(self, path, target, mean=0.4, std=0.2, wrong=0.0):
        super().__init__()
        self.path, self.target, self.mean, self.std = path, target, mean, std
        self.wrong = nn.Parameter(torch.tensor(wrong, dtype=torch.float64))

    def forward(self, x, tau, cond=None):
        c_in, c_skip, c_out = Denoiser(nn.Identity(), self.path, self.target).scales(x, tau)
        x = x / c_in
        a, s = self.path.at(tau, x)
        return (self.mean + self.std * (x - a * self.mean) / (a**2 * self.std**2 + s**2).sqrt() - c_skip * x) / c_out.abs().clamp_min(1e-9) / c_out.sign() \
            + self.wrong


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve", "table"])
@pytest.mark.parametrize("target", ["v", "edm", "flow"])
def test_the_exact_jump_minimises_distillation(path, target):
    """With the exact teacher its loss falls with the teacher's step, and any error makes it larger."""
    torch.manual_seed(0)
    along = PATHS[path]
    x0 = 0.4 + 0.2 * torch.randn(512, 1, 1, dtype=torch.float64)

    def loss(steps: int, wrong: float) -> float:
        torch.manual_seed(1)
        student = Denoiser(Jump(along, target, wrong=wrong), along, target)
        return distillation(student, x0, teacher=gaussian(along), steps=steps, hops=3, huber=1e-9).median().item()

    fine = 50 if path == "table" else 400
    assert loss(fine, 0.0) < 0.02 * loss(fine, 0.3)
    assert loss(fine, 0.0) < 0.2 * loss(fine // 5, 0.0)


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve"])
def test_an_x0_network_can_be_a_student(path):
    """It does not give the data back at tau = 0 by itself: there the teacher's end is the goal, and an error of .3 costs .3."""
    torch.manual_seed(0)
    x0 = 0.4 + 0.2 * torch.randn(512, 1, 1, dtype=torch.float64)

    def loss(wrong: float) -> float:
        student = Denoiser(Jump(PATHS[path], "x0", wrong=wrong), PATHS[path], "x0")
        return distillation(student, x0, teacher=gaussian(PATHS[path]), steps=100, hops=100, huber=1e-9).mean().item()

    assert loss(0.0) < 0.02 and loss(0.3) == pytest.approx(0.3, abs=0.01)


def test_a_student_that_jumps_right_near_the_data_is_taught_the_teachers_own_plan():
    """With one step for the whole path the goal is the teacher's DDIM plan in one step, and the student's own jump plays no part."""
    torch.manual_seed(0)
    along, x0 = PATHS["linear"], torch.randn(64, 3, 2)
    teacher, student = gaussian(along), Denoiser(Net(), along, "flow")
    torch.manual_seed(1)
    loss = distillation(student, x0, teacher=teacher, steps=1, hops=2, huber=1e-9)
    torch.manual_seed(1)
    tau = uniform(64, along, x0)
    x = along.noise(x0, torch.randn_like(x0), tau)
    tau = tau.clamp_min(along.tau_at(torch.tensor(along.ratio_min)).item())
    torch.testing.assert_close(loss, (student(x, tau) - teacher(x, tau)).abs() / tau[:, None, None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("progress", "levels"), [(0.0, 10), (0.25, 20), (0.5, 40), (0.999, 80), (1.0, 80)])
def test_levels_double_with_progress(progress, levels):
    seen = []

    class Spy(nn.Module):
        def forward(self, x, tau, cond=None):
            seen.append(tau)
            return torch.zeros_like(x)

    consistency(Denoiser(Spy(), PATHS["linear"], "flow"), torch.zeros(2000, 1, 1), progress=progress, levels=10, most=80)
    near, far = seen
    inside = far > 1.5 / levels
    torch.testing.assert_close((far - near)[inside], torch.full((int(inside.sum()),), PATHS["linear"].tau_max / levels))


def test_training_without_a_teacher_shares_the_noise():
    """A denoiser that gives x back unchanged is apart by eps times the distance of the noise levels; its network by that over c_out."""
    torch.manual_seed(0)
    path = PATHS["ve"]

    class Same(nn.Module):
        def forward(self, x, tau, cond=None):
            c_in, c_skip, c_out = Denoiser(nn.Identity(), path, "edm").scales(x, tau)
            return x / c_in * (1 - c_skip) / c_out

    denoiser = Denoiser(Same(), path, "edm")
    loss = consistency(denoiser, torch.zeros(20_000, 1, 1, dtype=torch.float64), levels=20, most=20, huber=1e-12)
    tau = torch.linspace(0.25, 1, 20_000, dtype=torch.float64)  # below .22 solvers have stopped; up to .27 the neighbour is the data themselves
    near = torch.where(tau - 0.05 > path.tau_at(torch.tensor(path.ratio_min)), tau - 0.05, 0.0)
    c_out = denoiser.scales(torch.zeros(1, 1, 1), tau)[2].flatten().abs()
    expected = ((path.sigma(tau) - path.sigma(near)) / c_out).mean() * math.sqrt(2 / math.pi)
    torch.manual_seed(0)
    drawn = uniform(20_000, path, torch.zeros(1, dtype=torch.float64))
    assert loss[drawn >= 0.25].mean().item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("target", ["eps", "score"])
def test_a_target_that_cannot_be_consistent_is_refused(target):
    with pytest.raises(ValueError, match=r"denoiser\.target=v, flow, edm or x0"):
        consistency(perfect(gaussian(PATHS["cosine"]), PATHS["cosine"], target), torch.zeros(4, 2, 1))
    with pytest.raises(ValueError, match=r"denoiser\.target=v, flow, edm or x0"):
        distillation(perfect(gaussian(PATHS["cosine"]), PATHS["cosine"], target), torch.zeros(4, 2, 1), teacher=gaussian(PATHS["cosine"]))


def test_stratified_is_still_uniform():
    assert stratified(10_000, torch.zeros(1, dtype=torch.float64)).mean().item() == pytest.approx(0.5, abs=1e-3)

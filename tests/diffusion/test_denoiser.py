"""Denoiser and objective: identities, each with its closed form."""
import pytest
import torch

from policy.diffusion.denoiser import TARGETS, Denoiser
from policy.diffusion.objective import denoising_loss, stratified
from policy.diffusion.path import VE, VP, Cosine, Linear, Table

PATHS = [Linear(), Cosine(), VP(), VE(), Table.named()]


class Net(torch.nn.Module):
    def forward(self, x, tau, cond=None):
        return torch.tanh(x) + tau[:, None, None]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_network_gives_back_the_data(target, path):
    """Whatever the target: the network that answers it exactly makes x0_hat = x0."""
    torch.manual_seed(0)
    x0, eps = torch.randn(6, 8, 3, dtype=torch.float64), torch.randn(6, 8, 3, dtype=torch.float64)
    tau = path.snap(torch.linspace(0.1, 0.9, 6, dtype=torch.float64))
    denoiser = Denoiser(Net(), path, target)
    denoiser.net.forward = lambda *_: denoiser.goal(x0, eps, tau)
    x = path.noise(x0, eps, tau)
    torch.testing.assert_close(denoiser(x, tau), x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("target", "path", "goal"), [
    ("eps", Cosine(), lambda a, s, x0, e: e), ("x0", VP(), lambda a, s, x0, e: x0), ("flow", Linear(), lambda a, s, x0, e: e - x0),
    ("v", Cosine(), lambda a, s, x0, e: a * e - s * x0), ("score", VE(), lambda a, s, x0, e: -e)])
def test_one_loss_is_every_published_loss(target, path, goal):
    torch.manual_seed(0)
    x0, eps, tau = (torch.randn(4, 8, 3, dtype=torch.float64), torch.randn(4, 8, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64) * 0.8 + 0.1)
    denoiser = Denoiser(Net(), path, target)
    x = path.noise(x0, eps, tau)
    want = (Net()(denoiser.scales(x, tau)[0] * x, tau) - goal(*path.at(tau, x), x0, eps)) ** 2
    torch.testing.assert_close(denoising_loss(denoiser, x0, None, tau, eps), want)


def test_edm_scaling_is_of_unit_variance():
    torch.manual_seed(0)
    x0, eps = 0.5 * torch.randn(20_000, 1, 1), torch.randn(20_000, 1, 1)
    denoiser = Denoiser(Net(), VE(), "edm", sigma_data=0.5)
    for t in (0.2, 0.5, 0.9):
        tau = torch.full((20_000,), t)
        x = VE().noise(x0, eps, tau)
        c_in, c_skip, c_out = denoiser.scales(x, tau)
        assert abs((c_in * x).std() - 1) < 0.02 and abs(((x0 - c_skip * x) / c_out).std() - 1) < 0.02


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_the_path_are_finite(path, target, dtype):
    x0 = torch.randn(4, 8, 3)
    for end in (0.0, path.tau_max):
        denoiser = Denoiser(Net(), path, target)
        tau = torch.full((4,), end)
        assert denoising_loss(denoiser, x0.to(dtype), None, tau.to(dtype)).isfinite().all()
        assert denoiser(x0.to(dtype), tau.to(dtype)).isfinite().all()


def test_stratified_draws_cover_every_stratum():
    torch.manual_seed(0)
    u = stratified(1000, torch.zeros(1))
    assert sorted((u * 1000).long().tolist()) == list(range(1000))
    assert abs(torch.corrcoef(torch.stack([u, torch.arange(1000.0)]))[0, 1]) < 0.1  # order is random


def test_an_unknown_target_lists_the_known():
    with pytest.raises(ValueError, match="eps, x0, v, flow, score, edm"):
        Denoiser(Net(), Cosine(), "noise")

"""Every path x target x sampler against exact answers: a Gaussian and a mixture of two, with networks that know them."""
import functools
import itertools
import math

import pytest
import torch

from policy.diffusion.denoiser import TARGETS
from policy.diffusion.from_diffusers import scheduler
from policy.diffusion.path import Table, grid
from policy.diffusion.samplers import consistency, dpmpp_2m, first_order, heun, langevin, predictor_corrector, transition
from tests.diffusion.exact import MEAN, PATHS, STD, gaussian, mixture, perfect, start

SAMPLERS = {"ddim": first_order, "half": functools.partial(first_order, eta=0.5), "ddpm": functools.partial(first_order, eta=1.0), "heun": heun,
            "dpmpp_2m": dpmpp_2m, "predictor_corrector": predictor_corrector, "langevin": functools.partial(langevin, repeats=20, rate=0.2)}
STEPS = {"ddim": 200, "ddpm": 400, "half": 200, "predictor_corrector": 400, "langevin": 60}
NAMES = {"linear": "FlowMatchHeunDiscrete", "ve": "EDMDPMSolverMultistep", "cosine": "DPMSolverMultistep", "vp": "UniPCMultistep", "table": "DDIM"}


def run(sampler: str, path: str, denoise, x):
    walk = SAMPLERS[sampler] if sampler in SAMPLERS else scheduler(NAMES[path])
    steps = min(STEPS.get(sampler, 100), 100 if path == "table" else 1000)
    return walk(denoise, PATHS[path], x, grid(PATHS[path], steps, "logsnr" if sampler == "langevin" else "trailing"))


@pytest.mark.parametrize("sampler", [*SAMPLERS, "diffusers"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", [t if t == "v" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_every_combination_recovers_the_gaussian(target, path, sampler):
    torch.manual_seed(0)
    x = run(sampler, path, perfect(gaussian(PATHS[path]), PATHS[path], target), start(PATHS[path], 4000))
    tolerance = 0.025 if path == "table" else 0.012
    assert abs(x.mean() - MEAN) < tolerance and abs(x.std() - STD) < tolerance, (x.mean().item(), x.std().item())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_perfect_network_is_the_same_denoiser_whatever_it_predicts(target, path):
    """So what holds for one target here holds for six; make all tries them."""
    tau = torch.linspace(0.02, 1, 50, dtype=torch.float64).mul(PATHS[path].tau_max)
    tau, x = PATHS[path].snap(tau), torch.randn(50, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(perfect(mixture(PATHS[path]), PATHS[path], target)(x, tau), mixture(PATHS[path])(x, tau), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [*SAMPLERS, "diffusers"])
@pytest.mark.parametrize("path", PATHS)
def test_every_sampler_keeps_both_modes_of_a_mixture(path, sampler):
    """Shares, means and spreads of both."""
    torch.manual_seed(0)
    n = 5000
    first = torch.rand(n, 1, 1) < 0.3
    x0 = torch.where(first, -0.6 + 0.1 * torch.randn(n, 1, 1), 0.5 + 0.15 * torch.randn(n, 1, 1)).double()
    x = run(sampler, path, perfect(mixture(PATHS[path]), PATHS[path], "v"), start(PATHS[path], n, x0))
    left, right = x[x < -0.05], x[x >= -0.05]
    coarse = path == "table" or sampler in ("langevin", "predictor_corrector")
    assert abs(len(left) / n - 0.3) < 0.03
    for part, mean, std in ((left, -0.6, 0.1), (right, 0.5, 0.15)):
        assert abs(part.mean() - mean) < 0.02 and abs(part.std() - std) < (0.02 if coarse else 0.012), (part.mean().item(), part.std().item())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_an_answer_would_be_seen(sampler):
    torch.manual_seed(0)
    x = run(sampler, "cosine", lambda x, tau, cond: gaussian(PATHS["cosine"])(x, tau) * 0.9, start(PATHS["cosine"], 4000))
    assert abs(x.mean() - MEAN) > 0.02


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve"])
@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_perfect_consistency_model_needs_one_call(path, calls):
    """The ODE map of a Gaussian in closed form is such a model; more calls noise it again and change nothing of the distribution."""
    torch.manual_seed(0)
    along = PATHS[path]

    def jump(x, tau, cond):
        a, s = along.at(tau, x)
        return MEAN + STD * (x - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()

    x = consistency(jump, along, start(along, 20_000), grid(along, calls))
    assert abs(x.mean() - MEAN) < 0.005 and abs(x.std() - STD) < 0.005
    if calls == 1:  # and it is the end of the ODE from the same noise
        torch.manual_seed(0)
        noise = start(along, 500)
        fine = heun(gaussian(along), along, noise, grid(along, 400, "logsnr"))
        assert (jump(noise, torch.full((500,), along.tau_max, dtype=torch.float64), None) - fine).abs().max() < 3e-3


@pytest.mark.parametrize("path", ["cosine", "ve", "linear", "vp"])
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_errors_fall_with_the_order_of_the_solver(path, sampler, order):
    """Slope of log error against log steps, on steps even in log-SNR between two inner times of a mixture; the reference is 1024 Heun steps."""
    torch.manual_seed(0)
    along = PATHS[path]
    denoise = mixture(along)
    far, _near = (along.tau_at(torch.tensor(r, dtype=torch.float64)) for r in (3.0, 0.1))
    x = start(along, 100)
    x = along.at(far.expand(100), x)[0] * 0.1 + along.at(far.expand(100), x)[1] * x / x.std()

    def taus(k: int) -> list[float]:
        return along.tau_at(torch.linspace(math.log(3.0), math.log(0.1), k + 1, dtype=torch.float64).exp()).tolist()

    want = heun(denoise, along, x, taus(1024))
    error = [(SAMPLERS[sampler](denoise, along, x, taus(k)) - want).abs().mean().item() for k in (128, 256)]
    assert abs(math.log2(error[0] / error[1]) - order) < 0.15, error


def test_half_the_noise_is_between_ddim_and_ddpm():
    torch.manual_seed(0)
    x, x0 = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    tau, nxt = torch.full((4,), 0.6), torch.full((4,), 0.5)
    stds = [transition(PATHS["cosine"], x, x0, tau, nxt, eta)[1].mean().item() for eta in (0.0, 0.5, 1.0)]
    assert stds[0] == 0 and stds[1] == pytest.approx(stds[2] / 2)
    spread = [(transition(PATHS["cosine"], x, x0, tau, nxt, eta)) for eta in (0.0, 1.0)]
    a, s = PATHS["cosine"].at(nxt, x)
    for mean, std in spread:  # whatever eta, p(x_nxt | x0) has the spread sigma: the mean's part of it and the noise's
        assert torch.allclose(((mean - a * x0) / (x - PATHS["cosine"].at(tau, x)[0] * x0) * PATHS["cosine"].at(tau, x)[1]) ** 2 + std**2, s**2, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_tau_at_inverts_the_ratio(path):
    along = PATHS[path]
    tau = along.snap(torch.linspace(0.01, 0.999, 50, dtype=torch.float64) * along.tau_max)
    torch.testing.assert_close(along.tau_at(along.ratio(tau)), tau, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve"])
def test_the_slope_is_the_derivative(path):
    along, h = PATHS[path], 1e-5
    tau = torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    want = (along.ratio(tau + h).log() - along.ratio(tau - h).log()) / (2 * h)
    torch.testing.assert_close(along.log_slope(tau), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50, 100])
def test_times_fall_and_are_the_spacing_s(path, spacing, steps):
    along = PATHS[path]
    if spacing == "leading" and steps < 4:
        with pytest.raises(ValueError, match="use trailing"):
            grid(along, steps, spacing)
        return
    taus = grid(along, steps, spacing)
    assert len(taus) == steps + 1 and all(a > b for a, b in itertools.pairwise(taus)) and taus[-1] == 0
    if isinstance(along, Table):
        assert all(abs(t * 100 - round(t * 100)) < 1e-9 for t in taus)
    elif spacing in ("karras", "logsnr") and steps >= 10:
        ratio = along.ratio(torch.tensor(taus[:-1], dtype=torch.float64))
        even = (ratio ** (1 / 7) if spacing == "karras" else ratio.log()).diff()
        assert (even / even.mean() - 1).abs().max() < 1e-4
        assert ratio[0].item() == pytest.approx(along.ends()[1]) and ratio[-1].item() == pytest.approx(0.002, rel=1e-5)


def test_karras_times_are_diffusers():
    from diffusers import EDMEulerScheduler
    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    theirs.set_timesteps(18)
    ours = PATHS["ve"].sigma(torch.tensor(grid(PATHS["ve"], 18, "karras"), dtype=torch.float64))
    torch.testing.assert_close(ours, theirs.sigmas.double(), rtol=1e-4, atol=1e-6)


def test_times_of_your_own():
    assert grid(PATHS["linear"], 2, [1.0, 0.1]) == [1.0, 0.1, 0.0]
    for wrong in ([0.1, 1.0], [1.0], [1.5, 0.5], [0.5, 0.0]):
        with pytest.raises(ValueError, match="falling"):
            grid(PATHS["linear"], 2, wrong)


@pytest.mark.parametrize("sampler", ["ddpm", "predictor_corrector", "langevin"])
def test_colder_plans_are_narrower(sampler):
    """With noise scaled by 1/2 the spread falls, the mean stays; draws come from `draw` alone."""
    torch.manual_seed(0)
    along = PATHS["cosine"]
    x = start(along, 4000)
    state = torch.random.get_rng_state()
    own = torch.Generator().manual_seed(1)
    cold = SAMPLERS[sampler](gaussian(along), along, 0.5 * x, grid(along, 100, "logsnr"),
                             draw=lambda x: 0.5 * torch.randn(x.shape, generator=own, dtype=x.dtype))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert abs(cold.mean() - MEAN) < 0.02 and cold.std() < 0.75 * STD

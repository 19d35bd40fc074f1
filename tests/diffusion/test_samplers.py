"""Every sampler on every path against exact answers: a Gaussian target with the perfect denoiser, closed forms, diffusers."""
import math

import pytest
import torch

from policy.diffusion.from_diffusers import compile_scheduler, scheduler
from policy.diffusion.path import VE, VP, Cosine, Linear, Path, Table, grid
from policy.diffusion.samplers import dpmpp_2m, first_order, heun, transition

MEAN, STD = 0.4, 0.2
PATHS = {"linear": Linear(), "cosine": Cosine(), "vp": VP(), "ve": VE(), "table": Table.named("squaredcos_cap_v2", 100)}
SAMPLERS = {"ddim": first_order, "ddpm": lambda *a: first_order(*a, eta=1.0), "heun": heun, "dpmpp_2m": dpmpp_2m}


def exact(path: Path, mean=MEAN, std=STD):
    """E[x0 | x] for x0 ~ N(mean, std^2): the perfect network."""
    def denoise(x, tau, cond=None):
        a, s = path.at(tau, x)
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
    return denoise


def start(path: Path, n=20_000):
    """Samples of the path's exact marginal at tau_max."""
    a, s = path.at(torch.full((n,), path.tau_max, dtype=torch.float64), torch.zeros(n, 1, 1))
    return a * (MEAN + STD * torch.randn(n, 1, 1, dtype=torch.float64)) + s * torch.randn(n, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("path", PATHS)
def test_every_sampler_recovers_the_gaussian_on_every_path(path, sampler):
    torch.manual_seed(0)
    steps = 100 if path == "table" else 400 if sampler == "ddpm" else 200
    x = SAMPLERS[sampler](exact(PATHS[path]), PATHS[path], start(PATHS[path]), grid(PATHS[path], steps))
    tolerance = 0.02 if path == "table" else 0.01
    assert abs(x.mean() - MEAN) < tolerance and abs(x.std() - STD) < tolerance, (x.mean().item(), x.std().item())


@pytest.mark.parametrize("path", ["linear", "cosine", "vp", "ve"])
def test_a_wrong_sampler_would_be_seen(path):
    """The test above can fail: half the noise gives the wrong spread on every path."""
    torch.manual_seed(0)
    x = first_order(lambda x, tau, cond: exact(PATHS[path])(x, tau) * 0.9, PATHS[path], start(PATHS[path]), grid(PATHS[path], 200))
    assert abs(x.mean() - MEAN) > 0.01


@pytest.mark.parametrize("name", ["cosine", "ve"])
def test_error_falls_with_the_order_of_the_solver(name):
    """Against the closed-form ODE map of a Gaussian, on steps even in log-SNR away from the ends: slope 1 and 2."""
    path = PATHS[name]
    torch.manual_seed(0)
    hi, lo = {"cosine": (0.9, 0.1), "ve": (0.6, 0.2)}[name]
    x = torch.randn(200, 1, 1, dtype=torch.float64)
    (a, s), (a2, s2) = (path.at(torch.full((200,), t, dtype=torch.float64), x) for t in (hi, lo))
    x = a * MEAN + (a**2 * STD**2 + s**2).sqrt() * x
    want = a2 * MEAN + ((a2**2 * STD**2 + s2**2) / (a**2 * STD**2 + s**2)).sqrt() * (x - a * MEAN)

    def slope(sampler):
        error = [(sampler(exact(path), path, x, torch.linspace(hi, lo, k + 1).tolist()) - want).abs().max().item() for k in (64, 128)]
        return math.log2(error[0] / error[1])

    assert abs(slope(first_order) - 1) < 0.1
    assert abs(slope(heun) - 2) < 0.1
    assert slope(dpmpp_2m) > 1.7  # on the cosine path its errors on a Gaussian nearly cancel


@pytest.mark.parametrize("i", [99, 57, 1])
def test_one_step_is_diffusers_ddpm_and_ddim(i):
    from diffusers import DDIMScheduler, DDPMScheduler
    torch.manual_seed(0)
    options = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
    x, eps = torch.randn(4, 8, 3, dtype=torch.float64), torch.randn(4, 8, 3, dtype=torch.float64)
    path, tau, nxt = PATHS["table"], torch.full((4,), (i + 1) / 100, dtype=torch.float64), torch.full((4,), i / 100, dtype=torch.float64)
    a, s = path.at(tau, x)
    x0 = (x - s * eps) / a
    ddim, ddpm = DDIMScheduler(**options, set_alpha_to_one=True), DDPMScheduler(**options)
    ddim.set_timesteps(100)
    ddpm.set_timesteps(100)
    torch.testing.assert_close(transition(path, x, x0, tau, nxt)[0], ddim.step(eps, i, x).prev_sample, rtol=1e-5, atol=1e-5)
    mean, std = transition(path, x, x0, tau, nxt, eta=1.0)
    theirs = ddpm.step(eps, i, x, generator=torch.Generator().manual_seed(0)).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-5, atol=1e-5)


def test_one_step_is_edm_euler_and_its_ancestral_form():
    torch.manual_seed(0)
    x, x0, path = torch.randn(4, 8, 3), torch.randn(4, 8, 3), VE()
    tau, nxt = torch.full((4,), 0.8), torch.full((4,), 0.7)
    (_, s), (_, s2) = path.at(tau, x), path.at(nxt, x)
    torch.testing.assert_close(transition(path, x, x0, tau, nxt)[0], x + (s2 - s) * (x - x0) / s)
    up = (s2**2 * (s**2 - s2**2) / s**2) ** 0.5
    down = (s2**2 - up**2) ** 0.5
    mean, std = transition(path, x, x0, tau, nxt, eta=1.0)
    torch.testing.assert_close(std, up)
    torch.testing.assert_close(mean, x + (down - s) * (x - x0) / s)


def test_dpmpp_2m_is_diffusers_on_the_same_times():
    """Oracle: DPMSolverMultistep, first order at both ends as ours."""
    torch.manual_seed(0)
    path = PATHS["table"]
    x = torch.randn(50, 1, 1, dtype=torch.float64)
    theirs = scheduler("DPMSolverMultistep", lower_order_final=True, euler_at_final=True)(exact(path), path, x * path.start_std(), grid(path, 20))
    ours = dpmpp_2m(exact(path), path, x * path.start_std(), grid(path, 20))
    assert (ours - theirs).abs().max() < 2e-3


DETERMINISTIC = {"DDIM": 1e-5, "DEISMultistep": 1e-5, "HeunDiscrete": 1e-5, "PNDM": 1e-5, "EulerDiscrete": 1e-4, "LMSDiscrete": 1e-4,
                 "DPMSolverMultistep": 1e-3, "UniPCMultistep": 2e-3}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_compiled_scheduler_is_diffusers_own_loop(name):
    """The table against the scheduler's own stateful loop, with a network that is not linear."""
    import diffusers
    torch.manual_seed(0)
    path, steps = Cosine(), 12
    x = torch.randn(3, 4, 2, dtype=torch.float64)

    def denoise(x, tau, cond=None):
        return torch.tanh(x + tau[:, None, None]) * 0.7

    ours = scheduler(name)(denoise, path, x * path.start_std(), grid(path, steps))
    bar = path.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000 * path.tau_max) ** 2
    betas = (1 - bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])).tolist()
    kw = {"timestep_spacing": "trailing"} | ({"clip_sample": False} if name == "DDIM" else {})
    kw |= {"set_alpha_to_one": True} if name in ("DDIM", "PNDM") else {}
    sch = getattr(diffusers, f"{name}Scheduler")(trained_betas=betas, **kw)
    sch.set_timesteps(steps)
    y = x * float(sch.init_noise_sigma)
    for t in sch.timesteps:
        seen = sch.scale_model_input(y, t)
        tau = ((t.double() + 1) / 1000 * path.tau_max).expand(3)
        a, s = path.at(tau, x)
        y = sch.step((seen - a * denoise(seen, tau)) / s, t, y).prev_sample
    assert (ours - y).abs().max() < DETERMINISTIC[name], (ours - y).abs().max()


@pytest.mark.parametrize(("name", "path"), [("FlowMatchEulerDiscrete", "linear"), ("FlowMatchHeunDiscrete", "linear"), ("EDMEuler", "ve"),
                                            ("EDMDPMSolverMultistep", "ve"), ("UniPCMultistep", "vp"), ("HeunDiscrete", "cosine")])
def test_a_compiled_scheduler_recovers_the_gaussian(name, path):
    torch.manual_seed(0)
    x = scheduler(name)(exact(PATHS[path]), PATHS[path], start(PATHS[path]), grid(PATHS[path], 100))
    assert abs(x.mean() - MEAN) < 0.01 and abs(x.std() - STD) < 0.02, (x.mean().item(), x.std().item())


@pytest.mark.parametrize(("name", "path", "says"), [
    ("DDPM", "cosine", "stochastic"), ("EulerAncestralDiscrete", "vp", "stochastic"), ("DDIM", "linear", "schedule=cosine"),
    ("FlowMatchEulerDiscrete", "cosine", "schedule=linear"), ("EDMEuler", "cosine", "schedule=ve"), ("Nonsense", "cosine", "it has .*DDIM"),
    ("PNDM", "table", "does not follow Table"), ("IPNDM", "cosine", "does not follow|own noise schedule")])
def test_a_misfit_is_refused_with_what_to_do(name, path, says):
    with pytest.raises(ValueError, match=says):
        compile_scheduler(name, PATHS[path], 20)


def test_grids():
    assert grid(PATHS["table"], 10)[0] == 1.0 and grid(PATHS["table"], 10)[-1] == 0.0
    assert [round(t * 100) - 1 for t in grid(PATHS["table"], 10, "leading")[:-1]] == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]  # RECIPES section 2
    with pytest.raises(ValueError, match="at most 100"):
        grid(PATHS["table"], 101)
    with pytest.raises(ValueError, match="trailing, leading, karras, logsnr"):
        grid(Cosine(), 10, "sideways")


def test_our_cosine_is_close_to_the_reference_schedule_and_the_table_is_it():
    from diffusers import DDPMScheduler
    want = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    tau = torch.arange(1, 101, dtype=torch.float64) / 100
    torch.testing.assert_close(PATHS["table"].alpha(tau) ** 2, want, rtol=1e-6, atol=0)
    assert (Cosine().alpha(tau) ** 2 - want).abs().max() < 0.03


def test_noise_is_diffusers_add_noise():
    from diffusers import DDPMScheduler
    torch.manual_seed(0)
    x0, eps, i = torch.randn(4, 8, 3), torch.randn(4, 8, 3), torch.tensor([0, 20, 60, 99])
    theirs = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2").add_noise(x0, eps, i)
    torch.testing.assert_close(PATHS["table"].noise(x0, eps, (i + 1) / 100), theirs)

"""Samplers and compiled schedulers against diffusers, step by step and as whole loops; grids; the reference's schedule."""
import pytest
import torch

from policy.diffusion.from_diffusers import compile_scheduler, scheduler
from policy.diffusion.path import VE, Cosine, Table, grid
from policy.diffusion.samplers import dpmpp_2m, first_order, heun, transition
from tests.diffusion.exact import MEAN, PATHS, STD, gaussian, mixture, start


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
    theirs = scheduler("DPMSolverMultistep", lower_order_final=True, euler_at_final=True)(gaussian(path), path, x * path.start_std(), grid(path, 20))
    ours = dpmpp_2m(gaussian(path), path, x * path.start_std(), grid(path, 20))
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
    x = scheduler(name)(gaussian(PATHS[path]), PATHS[path], start(PATHS[path], 20_000), grid(PATHS[path], 100))
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


@pytest.mark.parametrize(("name", "path", "ours"), [
    ("DDIM", "cosine", first_order), ("EulerDiscrete", "cosine", first_order), ("EulerDiscrete", "vp", first_order), ("EDMEuler", "ve", first_order),
    ("FlowMatchEulerDiscrete", "linear", first_order), ("HeunDiscrete", "cosine", heun), ("HeunDiscrete", "vp", heun)])
def test_our_samplers_are_diffusers_on_the_same_times(name, path, ours):
    """With a network that is not linear: DDIM, Euler, EDM's Euler and flow matching are one function, Heun another, on every path."""
    torch.manual_seed(0)
    along = PATHS[path]
    denoise = mixture(along)
    x = along.start_std() * torch.randn(200, 1, 1, dtype=torch.float64)
    theirs = scheduler(name)(denoise, along, x, grid(along, 20))
    taus = sorted(set(compile_scheduler(name, along, 20).taus), reverse=True)
    x = x / along.start_std() if name.startswith("Flow") else x  # it starts at tau = 1
    ours_x = ours(denoise, along, x, [*taus, 0.0])
    assert (ours_x - theirs).abs().max() < 2e-3, (ours_x - theirs).abs().max()
    wrong = heun if ours is first_order else first_order
    assert not (wrong(denoise, along, x, [*taus, 0.0]) - theirs).abs().max() < 1e-2  # and not the other order


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_a_table_is_any_schedule_of_diffusers(name):
    from diffusers import DDPMScheduler
    path = Table.named(name, 1000)
    want = DDPMScheduler(num_train_timesteps=1000, beta_schedule=name).alphas_cumprod.double()
    torch.testing.assert_close(path.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000) ** 2, want, rtol=1e-6, atol=0)
    torch.manual_seed(0)
    x = first_order(gaussian(path), path, start(path, 20_000), grid(path, 200))
    assert abs(x.mean() - MEAN) < 0.01 and abs(x.std() - STD) < 0.01


def test_a_schedule_that_does_not_reach_noise_is_refused():
    """Plans start from pure noise, which 100 steps of the linear schedule never see: alpha is .6 there."""
    with pytest.raises(ValueError, match="steps=1000"):
        Table.named("linear", 100)

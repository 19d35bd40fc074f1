"""Guides against closed forms: what a guide draws from is known exactly where the policy is a Gaussian."""
import functools

import pytest
import torch

from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import Frame, cfg, clip, pin, smooth, tilt, within
from policy.diffusion.path import Cosine, grid
from policy.diffusion.samplers import dpmpp_2m, first_order, heun
from policy.types import Cond
from tests.diffusion.exact import MEAN, PATHS, STD, gaussian

SCALE, SHIFT = torch.tensor([100.0, 0.03]), torch.tensor([500.0, 0.01])  # of the data's units, say px and m
MIDDLE, VAR = MEAN * SCALE + SHIFT, (STD * SCALE) ** 2
SAMPLERS = {"ddim": first_order, "ddpm": functools.partial(first_order, eta=1.0), "heun": heun, "dpmpp_2m": dpmpp_2m}
SOME = {("ddim", "table"), ("ddpm", "linear"), ("heun", "ve"), ("dpmpp_2m", "cosine")}  # the other pairs are slow tests
PAIRS = [pytest.param(path, sampler, id=f"{path}-{sampler}", marks=() if (sampler, path) in SOME else pytest.mark.slow)
         for path in PATHS for sampler in SAMPLERS]


def frame(path, obs=None):
    return Frame(path, obs or {}, lambda x: x * SCALE + SHIFT, lambda actions: (actions - SHIFT) / SCALE)


def draw(sampler, path, denoise, n=3000, t=1, steps=100, cond=None):
    """Physical actions (n,t,2) from pure noise, as a planner starts."""
    torch.manual_seed(0)
    return frame(path).decode(sampler(denoise, path, path.start_std() * torch.randn(n, t, 2), grid(path, steps), cond))


def is_normal(x, mean, var, spread=0.05, off=0.08):
    far = (x.mean((0, 1)) - mean) / var.sqrt()
    wide = x.std((0, 1)) / var.sqrt()
    assert (far.abs() < off).all() and ((wide - 1).abs() < spread).all(), (far, wide)


# ---------------------------------------------------------------- tilt
@pytest.mark.parametrize(("path", "sampler"), PAIRS)
def test_a_linear_value_moves_the_mean_by_scale_covariance_gradient(path, sampler):
    """In the data's own units: p(actions) exp(scale value(actions)) is N(mean + scale var gradient, var)."""
    slope = torch.tensor([0.03, -80.0])  # 1 / px, 1 / m
    guide = tilt(gaussian(PATHS[path]), frame(PATHS[path]), value=lambda actions, obs: (actions * slope).sum((1, 2)), scale=0.5)
    x, free = draw(SAMPLERS[sampler], PATHS[path], guide), draw(SAMPLERS[sampler], PATHS[path], gaussian(PATHS[path]))
    is_normal(x, MIDDLE + 0.5 * VAR * slope, VAR, spread=0.15)  # 100 steps of ddpm are up to 13 % too narrow, guided or not
    torch.testing.assert_close(x.std((0, 1)) / free.std((0, 1)), torch.ones(2), rtol=0, atol=0.01)


@pytest.mark.parametrize(("path", "sampler"), PAIRS)
def test_a_quadratic_value_gives_the_posterior_of_a_measurement(path, sampler):
    """exp(-2 k (a - c)^2 / 2) with c up to 8 standard deviations away; the first-order formula alone would land 3 times too far."""
    k, c = 1.5 / VAR, torch.tensor([560.0, -0.01])
    guide = tilt(gaussian(PATHS[path]), frame(PATHS[path]), value=lambda actions, obs: -(k * (actions - c) ** 2 / 2).sum((1, 2)), scale=2.0)
    want = 1 / (1 / VAR + 2 * k)
    is_normal(draw(SAMPLERS[sampler], PATHS[path], guide), want * (MIDDLE / VAR + 2 * k * c), want, spread=0.15 if path != "vp" else 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", ["eps", "x0", "v", "edm", "score", "flow"])
@pytest.mark.parametrize("path", PATHS)
def test_a_tilt_is_bounded_from_end_to_end_whatever_the_network(path, target, dtype):
    """An untrained network divides by alpha^2: the shift stays below twice the data's range, at any scale."""
    torch.manual_seed(0)
    p = PATHS[path]
    net = torch.nn.Conv1d(8, 8, 3, padding=1).to(dtype)
    denoiser = Denoiser(net, p, target)
    denoiser.net.forward = lambda x, tau, cond, f=net.forward: torch.tanh(f(x))
    for end in (0.0, 1e-3, 0.5, p.tau_max, 1.0):
        x, tau = torch.randn(3, 8, 2).to(dtype), torch.full((3,), end, dtype=dtype)
        for scale in (1e-6, 1.0, 1e6):
            guided = tilt(denoiser, Frame(p, {}, lambda x: x, lambda x: x), value=lambda a, o: a.sum((1, 2)), scale=scale)(x, tau, None)
            assert guided.dtype == dtype and guided.isfinite().all()
            with torch.no_grad():
                plain = denoiser(x, tau)
            assert (guided - plain).float().abs().amax() <= 2 + 0.02 * plain.float().abs().amax()


def test_a_tilt_at_scale_0_changes_nothing_and_never_leads_downhill():
    x, tau = torch.randn(4, 5, 2), torch.full((4,), 0.5)
    assert torch.equal(tilt(gaussian(Cosine()), frame(Cosine()), value=smooth, scale=0.0)(x, tau, None), gaussian(Cosine())(x, tau))
    wrong = lambda x, tau, cond: -x  # noqa: E731  a denoiser that no data has: its covariance is negative
    assert torch.equal(tilt(wrong, frame(Cosine()), value=smooth)(x, tau, None), -x)


# ---------------------------------------------------------------- cfg
def two(path, cond=(0.7, 0.2), free=(0.1, 0.2)):
    """p(x | obs) and p(x): N(mean, std^2) each."""
    def denoise(x, tau, c):
        mean, std = cond if c.mask is None else free
        return gaussian(path, mean, std)(x, tau)
    return denoise


@pytest.mark.parametrize(("path", "sampler"), PAIRS)
def test_cfg_draws_from_the_tilted_conditional_where_covariances_are_equal(path, sampler):
    for scale in (0.0, 0.5, 1.0, 1.5):
        x = draw(SAMPLERS[sampler], PATHS[path], cfg(two(PATHS[path]), scale=scale), n=1000, cond=Cond(torch.zeros(1000, 1, 1)))
        is_normal(x, (0.1 + 0.6 * scale) * SCALE + SHIFT, VAR, spread=0.17, off=0.1)


@pytest.mark.parametrize(("path", "sampler"), [("ve", "heun"), ("cosine", "dpmpp_2m"), ("linear", "heun")])
def test_cfg_interpolates_standard_deviations_geometrically(path, sampler):
    """Not the tilted distribution's, which would be .1 at scale 2: p^-1 p_c^2 has precision 2 / .04 - 1 / .16 …; the ODE's closed form is."""
    denoise = two(PATHS[path], cond=(0.1, 0.2), free=(0.1, 0.4))
    for scale in (0.5, 2.0):
        x = draw(SAMPLERS[sampler], PATHS[path], cfg(denoise, scale=scale), cond=Cond(torch.zeros(3000, 1, 1)))
        is_normal(x, 0.1 * SCALE + SHIFT, (0.4 ** (1 - scale) * 0.2**scale * SCALE) ** 2, spread=0.08)


# ---------------------------------------------------------------- constraints
def test_within_follows_as_fast_as_allowed():
    actions, obs = torch.tensor([[[0.0], [1.0], [-3.0], [9.0]]]), {"hand": torch.tensor([[[7.0, 1.0], [2.0, 1.0]]])}
    assert within(actions, obs, step=2).flatten().tolist() == [0, 1, -1, 1]
    assert within(actions, obs, step=2, lower=0, upper=[1.5], start="hand").flatten().tolist() == [1.5 - 1.5, 1, 0, 1.5]
    assert within(actions, obs, step=0.5, start="hand").flatten().tolist() == [1.5, 1.0, 0.5, 1.0]
    assert torch.equal(within(within(actions, obs, step=2), obs, step=2), within(actions, obs, step=2))
    for wrong, says in (({}, "set lower, upper or step"), ({"step": 1, "start": "foot"}, "there are hand"), ({"lower": [1, 2]}, "each of 1 action")):
        with pytest.raises(ValueError, match=says):
            within(actions, obs, **wrong)


@pytest.mark.parametrize("sampler", [first_order, heun, dpmpp_2m])
def test_pin_keeps_what_is_known_and_clip_what_is_allowed(sampler):
    torch.manual_seed(0)
    path, known = Cosine(), torch.full((5, 4, 2), 0.7)
    mask = torch.zeros(5, 4, 2, dtype=torch.bool)
    mask[:, 0] = True
    x = sampler(pin(clip(lambda x, tau, cond: 3 * torch.ones_like(x)), known=known, mask=mask), path, torch.randn(5, 4, 2), grid(path, 10))
    torch.testing.assert_close(x[:, 0], known[:, 0])
    torch.testing.assert_close(x[:, 1:], torch.ones(5, 3, 2), rtol=0, atol=1e-5)


def test_guides_nest_in_either_order():
    inner = lambda x, tau, cond: 5 * torch.ones_like(x)  # noqa: E731
    known, mask = torch.full((1, 2, 1), 2.0), torch.tensor([[[True], [False]]])
    tau, x = torch.ones(1), torch.zeros(1, 2, 1)
    assert pin(clip(inner), known=known, mask=mask)(x, tau, None).flatten().tolist() == [2.0, 1.0]
    assert clip(pin(inner, known=known, mask=mask))(x, tau, None).flatten().tolist() == [1.0, 1.0]

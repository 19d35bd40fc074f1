"""The planner: a pure function in physical units that refuses what it was not trained on."""
import functools
from functools import partial

import pytest
import torch
from torch import nn

from policy.data.normalize import Normalizer
from policy.diffusion.denoiser import TARGETS, Denoiser
from policy.diffusion.from_diffusers import scheduler
from policy.diffusion.guides import clip
from policy.diffusion.path import VE, VP, Cosine, Linear, Table
from policy.diffusion.samplers import consistency, dpmpp_2m, first_order, heun, langevin, predictor_corrector
from policy.nets.lowdim import LowDim
from policy.planner import Planner
from policy.types import Batch, Spec
from tests.helpers import make_data, make_planner, make_store

SPEC = Spec(obs={"x": (3,)}, action_dim=2, t_obs=2, horizon=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(make_store(tmp_path_factory.mktemp("data") / "d.zarr"))


@pytest.fixture(scope="module")
def planner(data):
    return make_planner(data).eval().requires_grad_(False)


class Fixed(nn.Module):
    """A network whose answer is known: `value` (t, d), wherever it is asked."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x, tau, cond):
        return self.value.expand_as(x)


class Pointwise(nn.Module):
    """A network that sees one step at a time, so that padding cannot reach the others through it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.5, 0.1]]))

    def forward(self, x, tau, cond):
        return x @ self.weight + tau[:, None, None]


def around(net: nn.Module, path=None, **options) -> Planner:
    """A planner of toy units: observations about 100, actions in [400, 600] x [-0.02, 0.04]."""
    arrays = {"x": 100 + torch.arange(12.0).reshape(4, 3), "action": torch.tensor([[400.0, -0.02], [600.0, 0.04]])}
    return Planner(SPEC, Normalizer.fit(arrays), LowDim(dict(SPEC.obs), 2), Denoiser(net, path or Cosine(), "x0"), **options).eval().requires_grad_(False)


def inputs(b: int = 5, seed: int = 1) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"x": 5 + torch.randn(b, 2, 3, generator=g)}, torch.randn(b, 8, 2, generator=g)


def test_a_plan_is_a_function_of_observation_and_noise(planner):
    """Bit for bit, with the global generator left alone and the weights too."""
    obs, noise = inputs()
    kept, state = {k: v.clone() for k, v in obs.items()}, torch.random.get_rng_state()
    weights = {k: v.clone() for k, v in planner.state_dict().items()}
    first = planner.plan(obs, noise=noise)
    planner.plan(*inputs(seed=2)[:1], noise=inputs(seed=2)[1])  # somebody else's plan in between
    assert torch.equal(planner.plan(obs, noise=noise), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(obs["x"], kept["x"]) and all(torch.equal(v, weights[k]) for k, v in planner.state_dict().items())
    assert not torch.allclose(planner.plan(obs), first, atol=1e-3) and not torch.equal(torch.random.get_rng_state(), state)


def test_a_batch_plans_what_each_alone_would(planner):
    obs, noise = inputs()
    whole = planner.plan(obs, noise=noise)
    for i in range(5):
        torch.testing.assert_close(planner.plan({"x": obs["x"][i:i + 1]}, noise=noise[i:i + 1])[0], whole[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0, 1, 3, 8])
def test_a_plan_starts_with_exactly_what_was_promised(planner, p):
    obs, noise = inputs()
    free, promised = planner.plan(obs, noise=noise), 5 + 37 * inputs(seed=3)[1][:, :p]  # far outside the data, where rounding and clips bite
    plan = planner.plan(obs, noise=noise, prefix=promised)
    assert plan.shape == free.shape and torch.equal(plan[:, :p], promised)
    if 0 < p < 8:
        assert not torch.allclose(plan[:, p:], free[:, p:], atol=1e-4)  # what follows answers the promise
    if p == 0:
        torch.testing.assert_close(plan, free, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [Cosine(), Linear(), VP(), VE()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("sampler", [first_order, functools.partial(first_order, eta=1.0), heun, dpmpp_2m], ids=["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_a_known_answer_comes_out_in_physical_units(path, sampler):
    """The exact denoiser of a single action sequence: every sampler on every path ends there, in the data's own units."""
    want = torch.stack([torch.linspace(420, 580, 8), torch.linspace(-0.015, 0.03, 8)], -1)
    answer = torch.stack([(want[:, 0] - 500) / 100, (want[:, 1] - 0.01) / 0.03], -1)  # limits: [400, 600] and [-.02, .04] to [-1, 1]
    plan = around(Fixed(answer), path, sampler=sampler, steps=6).plan({"x": torch.full((3, 2, 3), 104.0)})
    torch.testing.assert_close(plan, want.expand(3, -1, -1), rtol=1e-4, atol=1e-5)


def test_a_clip_keeps_plans_inside_the_data():
    wild = around(Fixed(torch.tensor([3.0, -7.0]).expand(8, 2).contiguous()))
    obs = {"x": torch.full((1, 2, 3), 104.0)}
    torch.testing.assert_close(wild.plan(obs)[0, 0], torch.tensor([800.0, -0.2]))
    wild.set_guides([clip])
    torch.testing.assert_close(wild.plan(obs)[0, 0], torch.tensor([600.0, -0.02]))
    wild.set_guides([functools.partial(clip, limit=0.5), lambda denoise, frame: lambda x, tau, cond: denoise(x, tau, cond) + 1])  # the last is outermost
    torch.testing.assert_close(wild.plan(obs)[0, 0], torch.tensor([650.0, 0.025]))


def test_what_the_encoder_sees_is_normalised_and_ordered():
    planner = around(Fixed(torch.zeros(8, 2)))
    seen = []
    planner.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    planner.plan({"x": torch.tensor([[[100.0, 101, 102], [109, 110, 111]]]), "unused": torch.zeros(1)})
    assert seen[0].keys() == {"x"} and torch.equal(seen[0]["x"], torch.tensor([[[-1.0] * 3, [1.0] * 3]]))


@pytest.mark.parametrize("padding_loss", [False, True])
def test_padded_actions_are_learned_only_when_asked(padding_loss):
    """Row 0 ends after 3 steps, row 1 after 8, row 2 is nothing but padding."""
    planner = around(Pointwise(), padding_loss=padding_loss)
    valid = torch.arange(8) < torch.tensor([3, 8, 0])[:, None]
    action = torch.stack([450 + 20 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.full((3, 8), 0.01)], -1)

    def loss(action: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return planner.loss(Batch({"x": torch.full((3, 2, 3), 104.0)}, action, valid))

    before, after = loss(action), loss(torch.where(valid[..., None], action, action + 90))
    assert before.shape == (3,) and torch.equal(before[1], after[1])
    assert torch.equal(before[0], after[0]) != padding_loss
    assert not torch.equal(loss(torch.where(valid[..., None], action + 90, action))[0], before[0])
    if padding_loss:
        assert not torch.equal(before[2], after[2])
    else:
        assert before[2] == 0
        alone = Batch({"x": torch.full((3, 2, 3), 104.0)}, action, torch.ones(3, 8, dtype=torch.bool))
        torch.manual_seed(5)
        assert torch.equal(planner.loss(alone)[1], before[1])  # a full row is its plain mean


def test_a_sampler_that_cannot_follow_the_path_is_refused_at_once(planner):
    flow = scheduler("FlowMatchEulerDiscrete")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscrete integrates schedule=linear, not Cosine"):
        around(Fixed(torch.zeros(8, 2)), sampler=flow)
    around(Fixed(torch.zeros(8, 2)), Linear(), sampler=flow)
    obs, noise = inputs()
    before = planner.plan(obs, noise=noise)
    for sampler, steps, spacing in ((flow, 10, "trailing"), (heun, 0, "trailing"), (heun, 10, "backwards")):
        with pytest.raises(ValueError):
            planner.set_sampler(sampler, steps, spacing)
        assert torch.equal(planner.plan(obs, noise=noise), before)  # a refused sampler changes nothing


def test_misfits_are_told(planner):
    obs, noise = inputs()
    with pytest.raises(KeyError, match=r"lacks x \(got y, z\)"):
        planner.plan({"y": obs["x"], "z": obs["x"]})
    with pytest.raises(KeyError, match=r"lacks x \(got nothing"):
        planner.plan({})
    with pytest.raises(ValueError, match=r"'x' must be \(b, 2, 3\), got \(5, 3, 3\)"):
        planner.plan({"x": torch.zeros(5, 3, 3)})
    with pytest.raises(ValueError, match=r"'x' must be \(b, 2, 3\), got \(5, 3\)"):
        planner.plan({"x": obs["x"][:, 0]})
    with pytest.raises(ValueError, match=r"expected shape \(b=5, t=8, d=2\), got \(4, 8, 2\)"):
        planner.plan(obs, noise=noise[:4])
    with pytest.raises(ValueError, match=r"expected shape \(b=5, t=8, d=2\), got \(5, 16, 2\)"):
        planner.plan(obs, noise=noise.repeat(1, 2, 1))
    with pytest.raises(ValueError, match=r"expected shape \(b=5, p, d=2\), got \(5, 1, 3\)"):
        planner.plan(obs, noise=noise, prefix=torch.zeros(5, 1, 3))
    with pytest.raises(ValueError, match="promises 9 actions, more than the horizon 8"):
        planner.plan(obs, noise=noise, prefix=torch.zeros(5, 9, 2))


def test_observation_noise_is_for_training_only(data):
    noisy, batch = make_planner(data), data.batch(torch.arange(16))

    def loss(noise: float) -> torch.Tensor:
        noisy.obs_noise = noise
        torch.manual_seed(0)
        return noisy.loss(batch)

    assert not torch.equal(loss(0.5), loss(0.0))
    noisy.eval()
    assert torch.equal(loss(0.5), loss(0.0))


def test_a_plan_that_starts_below_the_noisiest_time_starts_with_the_noise_of_that_time(data):
    planner = make_planner(data).eval().requires_grad_(False)
    starts = []

    def spy(denoise, path, x, taus, cond=None):
        starts.append(x)
        return denoise(x, x.new_full((len(x),), taus[0]), cond)

    planner.denoiser.path, planner.denoiser.target = VE(), "edm"
    obs, noise = inputs()
    for spacing in ("trailing", [0.8]):
        planner.set_sampler(spy, 1, spacing)
        starts.clear()
        planner.plan(obs, noise=noise)
        torch.testing.assert_close(starts[0], noise * (80 if spacing == "trailing" else 80 * 0.8**7))


def test_temperature_scales_every_noise(data):
    """Start and draws alike."""
    planner = make_planner(data).eval().requires_grad_(False)
    seen = []

    def spy(denoise, path, x, taus, cond=None, *, draw=torch.randn_like):
        seen.append((x, draw(x)))
        return denoise(x, x.new_full((len(x),), taus[0]), cond)

    obs, noise = inputs()
    for temperature in (1.0, 0.25):
        planner.set_sampler(spy, 1, temperature=temperature)
        seen.clear()
        planner.plan(obs, noise=noise, draw=torch.ones_like)
        start = planner.denoiser.path.start_std(planner.taus[0])
        torch.testing.assert_close(seen[0][0], temperature * start * noise)
        torch.testing.assert_close(seen[0][1], torch.full_like(noise, temperature))


@pytest.mark.parametrize(("path", "fn", "steps", "spacing", "says"), [
    (Linear(), heun, 2, [1.0, 0.5], "gives NaN"),
    (Linear(), partial(langevin, rate=5), 10, "trailing", "rate=5"),
    (Linear(), partial(langevin, repeats=0), 10, "trailing", "repeats=0"),
    (VP(), partial(first_order, eta=3), 10, "trailing", "eta=3"),
    (VP(), partial(first_order, eta="foo"), 10, "trailing", "eta='foo'"),
    (VP(), first_order, 600, "leading", "use trailing"),
    (VP(), scheduler("UniPCMultistep"), 10, "karras", "times of its own"),
])
def test_a_sampler_that_cannot_work_is_refused_when_it_is_chosen(data, path, fn, steps, spacing, says):
    planner = make_planner(data)
    planner.denoiser.path = path
    with pytest.raises(ValueError, match=says):
        planner.set_sampler(fn, steps, spacing)


ODD = [VE(hi=-5), VE(hi=0.001), VE(rho=0), VE(rho=-1), VP(hi=0), VP(hi=0.2), VP(lo=-1), Cosine(tau_max=0.1), Cosine(tau_max=1.5)]


@pytest.mark.parametrize("path", ODD, ids=repr)
def test_a_path_that_does_not_lead_from_data_to_noise_is_refused(path):
    with pytest.raises(ValueError, match=r"sigma / alpha|tau_max"):
        path.check()


@pytest.mark.parametrize("path", [Cosine(), Linear(), VP(), VE(), Table.named("squaredcos_cap_v2", 100)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_plans_are_finite_in_bf16_with_every_sampler(data, path, target):
    """A network in bf16, its sampler in float32, as precision=bf16 plans; from each path's noisiest time to its end."""
    planner = make_planner(data).eval().requires_grad_(False)
    planner.denoiser.path, planner.denoiser.target = path, target
    obs, noise = inputs()
    for fn in (first_order, partial(first_order, eta=1.0), heun, dpmpp_2m, langevin, predictor_corrector, consistency):
        for spacing in ("trailing", "karras", "logsnr"):
            planner.set_sampler(fn, 2, spacing)
            with torch.autocast("cpu", torch.bfloat16):
                assert planner.plan(obs, noise=noise).isfinite().all(), (fn, spacing)

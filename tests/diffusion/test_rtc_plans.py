"""Plans of a network that go on from what is promised: with every sampler, inside every guide, and what the network is told."""
import functools

import pytest
import torch

from policy.control import Controller
from policy.diffusion.guides import BestOf, clip, project, tilt, within
from policy.diffusion.rtc import told
from policy.diffusion.samplers import consistency, dpmpp_2m, first_order, heun, langevin, predictor_corrector
from policy.nets.fast import FastUNet1d
from policy.nets.prefix import Prefix
from policy.nets.unet1d import UNet1d
from policy.planner import Planner
from policy.timeline import MERGES
from tests.helpers import CONFIG, make_data, make_planner, make_store

SAMPLERS = {"ddim": first_order, "ddpm": functools.partial(first_order, eta=1.0), "heun": heun, "dpmpp_2m": dpmpp_2m, "langevin": langevin,
            "predictor_corrector": predictor_corrector, "consistency": consistency}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(make_store(tmp_path_factory.mktemp("data") / "d.zarr"))


@pytest.fixture(scope="module")
def planner(data):
    return shaken(make_planner(data, {**CONFIG, "rtc": 4}))


def shaken(planner: Planner) -> Planner:
    torch.manual_seed(7)
    for p in planner.denoiser.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return planner.eval().requires_grad_(False)


def inputs(b: int = 3) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"x": 5 + torch.randn(b, 2, 3, generator=g)}, torch.randn(b, 8, 2, generator=g), 5 + 0.5 * torch.randn(b, 5, 2, generator=g)


@pytest.mark.parametrize("merge", [m for m in MERGES if m not in ("naive", "ensemble")])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("committed", [1, 4])
def test_the_committed_steps_come_out_exactly(planner, merge, sampler, committed):
    """Also far outside the data, where clips bite and guidance cannot reach; the steps behind answer them."""
    planner.set_sampler(SAMPLERS[sampler], 6)
    obs, noise, prefix = inputs()

    def draws():
        source = torch.Generator().manual_seed(2)
        return lambda x: torch.randn(x.shape, generator=source)
    for promised in (prefix, 5 + 37 * prefix):
        plan = planner.plan(obs, noise=noise, prefix=promised, committed=committed, merge=merge, draw=draws())
        free = planner.plan(obs, noise=noise, draw=draws())
        assert torch.equal(plan[:, :committed], promised[:, :committed]) and plan.isfinite().all()
        assert (plan[:, committed:] - free[:, committed:]).abs().max() > 1e-4
    planner.set_sampler(first_order, 5)


@pytest.mark.parametrize("merge", MERGES)
def test_nothing_promised_changes_nothing(planner, merge):
    obs, noise, prefix = inputs()
    free = planner.plan(obs, noise=noise)
    torch.testing.assert_close(planner.plan(obs, noise=noise, prefix=prefix[:, :0], committed=0, merge=merge), free, rtol=1e-6, atol=1e-6)
    if merge in ("naive", "ensemble"):
        assert torch.equal(planner.plan(obs, noise=noise, prefix=prefix, merge=merge), free)
    if merge in ("guided", "identity"):  # nothing committed is still a plan to keep to
        pulled = planner.plan(obs, noise=noise, prefix=prefix, committed=0, merge=merge)
        assert (pulled - prefix.mean()).abs().isfinite().all() and not torch.allclose(pulled, free, atol=1e-4)


@pytest.mark.parametrize("merge, options", [("identity", {}), ("guided", {"limit": 20.0, "prior": 0.2})])
def test_guidance_pulls_towards_the_promise(planner, merge, options):
    """Nothing is written here: the first step comes at least 10 % nearer, the steps behind the prefix have no weight of their own."""
    obs, noise, prefix = inputs(64)
    free = planner.plan(obs, noise=noise)
    plan = planner.plan(obs, noise=noise, prefix=prefix, committed=0, merge=merge, **options)
    before, after = ((x[:, :5] - prefix).abs().mean((0, 2)) for x in (free, plan))
    assert after[0] < 0.9 * before[0]


def test_a_controllers_inference_mode_takes_the_same_gradient(planner):
    obs, noise, prefix = inputs()
    want = planner.plan(obs, noise=noise, prefix=prefix, committed=2, merge="guided")
    with torch.inference_mode():
        got = planner.plan({k: v.clone() for k, v in obs.items()}, noise=noise.clone(), prefix=prefix.clone(), committed=2, merge="guided")
    torch.testing.assert_close(got.clone(), want, rtol=1e-6, atol=1e-6)
    other = planner.plan(obs, noise=noise, prefix=prefix, committed=2, merge="identity")
    assert (want - other).abs().max() > 1e-3


def test_the_quick_unet_is_guided_like_the_real_one(data):
    plain = shaken(make_planner(data))
    obs, noise, prefix = inputs()
    want = plain.plan(obs, noise=noise, prefix=prefix, committed=2, merge="guided")
    assert isinstance(plain.denoiser.net, UNet1d)
    plain.denoiser.net = FastUNet1d(plain.denoiser.net, torch.float32)
    with torch.inference_mode():
        got = plain.plan(obs, noise=noise, prefix=prefix, committed=2, merge="guided")
    torch.testing.assert_close(got.clone(), want, rtol=1e-4, atol=1e-4)


def test_other_guides_go_around(planner):
    """A tilt takes its gradient through real-time chunking; constraints and best_of keep their word on what is not committed."""
    obs, noise, prefix = inputs()
    plain = planner.plan(obs, noise=noise, prefix=prefix, committed=2, merge="guided")
    push = functools.partial(tilt, value=lambda actions, obs: actions.sum((1, 2)), scale=3.0)
    try:
        for guides, check in (([push, clip], lambda a: a[:, 2:].sum() > plain[:, 2:].sum()),
                              ([functools.partial(project, onto=functools.partial(within, upper=4.8))], lambda a: (a[:, 2:] <= 4.8 + 1e-5).all()),
                              ([BestOf(3, lambda actions, obs: actions.sum((1, 2)))], lambda a: a.sum() >= plain.sum() - 1e-4)):
            planner.set_guides(guides if not isinstance(guides[0], BestOf) else [clip, *guides])
            for merge in ("guided", "identity", "prefix", "frozen"):
                with torch.inference_mode():
                    plan = planner.plan(obs, noise=noise, prefix=prefix, committed=2, merge=merge)
                assert torch.equal(plan[:, :2], prefix[:, :2])
                assert merge != "guided" or check(plan)
    finally:
        planner.set_guides([clip])


def test_what_the_network_is_told():
    """Known steps clean and at time 0, the others as they were; the answer is the promise there."""
    asked = []

    def denoise(x, tau, cond):
        asked.append((x, tau))
        return x + 1
    x, known, mask = torch.randn(2, 4, 1), torch.randn(2, 4, 1), torch.tensor([True, True, False, False])[:, None]
    answer = told(denoise, known, mask)(x, torch.tensor([0.5, 0.5]), None)
    assert torch.equal(asked[0][0], torch.where(mask, known, x)) and asked[0][1].tolist() == [[0, 0, 0.5, 0.5]] * 2
    assert torch.equal(answer, torch.where(mask, known, x + 1))


def test_the_prefix_merge_tells_the_network(planner):
    net, seen = planner.denoiser.net, []
    assert isinstance(net, Prefix)
    hook = net.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    obs, noise, prefix = inputs()
    planner.plan(obs, noise=noise, prefix=prefix, committed=3, merge="prefix")
    hook.remove()
    normal = planner.normalizer.encode({"action": prefix})["action"]
    assert len(seen) == planner.calls
    for x in seen:
        assert x[..., 2].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 3
        torch.testing.assert_close(x[:, :3, :2], normal[:, :3])


def test_misuse_is_told(planner, data):
    obs, noise, prefix = inputs()
    for options, says in (({"merge": "mean"}, "merge 'mean' is unknown; use one of naive"), ({"committed": 6}, "committed=6 steps must be among the 5"),
                          ({"committed": -1}, "committed=-1"), ({"merge": "prefix", "committed": 5}, r"from 5 known steps.*from 4: train with train.rtc=5"),
                          ({"merge": "guided", "limit": 0}, "limit=0 of real-time chunking"), ({"merge": "identity", "prior": -1}, "prior=-1"),
                          ({"prefix": prefix[:2]}, r"expected shape \(b=3")):
        with pytest.raises(ValueError, match=says):
            planner.plan(obs, **{"noise": noise, "prefix": prefix, **options})
    plain = make_planner(data).eval()
    with pytest.raises(ValueError, match=r"learned to from none.*train.rtc=2 or more, or use merge=frozen or guided"):
        plain.plan(obs, noise=noise, prefix=prefix, committed=2, merge="prefix")
    with pytest.raises(ValueError, match=r"control.merge=prefix with delay=2 needs a policy trained with train.rtc=2"):
        Controller(plain, execute=4, delay=2, merge="prefix")

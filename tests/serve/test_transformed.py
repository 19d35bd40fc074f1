"""Policies with transforms behind the wire and planned fast: the same physical plans, promises measured from where the robot is now."""
from functools import partial

import numpy as np
import pytest
import torch

from policy.data import Normalizer, statistics
from policy.data.transform import Transform
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import clip
from policy.diffusion.path import Cosine
from policy.nets.lowdim import LowDim
from policy.nets.prefix import Prefix
from policy.planner import Planner
from policy.serve.backend import PlannerBackend
from policy.serve.fastplan import FastPlan
from policy.serve.packing import WireError
from policy.serve.wire import Observation, fit
from tests.serve.small import NETS
from tests.test_transformed_plans import CHAINS, SPEC, actions, observation, same

T = SPEC.horizon
EACH = [(name, per_step) for name in CHAINS for per_step in (False, True) if name != "none" or per_step]


def small(transform: Transform, *, per_step: bool = False, net: str = "unet1d", rtc: int = 0, **options) -> Planner:
    torch.manual_seed(0)
    encoder, width = LowDim(transform.sizes(SPEC.obs), SPEC.t_obs), transform.width(SPEC.action_dim, SPEC.obs)
    made = NETS[net](width + bool(rtc), (encoder.tokens, encoder.dim), T)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)
    normalizer = Normalizer(statistics.shapes(transform, SPEC.obs, SPEC.action_dim, T, per_step=per_step))
    for b in normalizer.buffers():
        b.copy_(torch.rand_like(b) + 0.5)
    planner = Planner(SPEC, normalizer, encoder, Denoiser(Prefix(made) if rtc else made, Cosine(), "v"), transform=transform, rtc=rtc, guides=[partial(clip)],
                      **{"steps": 4, **options})
    return planner.eval().requires_grad_(False)


def asked(planner: Planner, seed: int = 0) -> tuple[dict[str, np.ndarray], dict]:
    obs = {k: v[0].numpy() for k, v in observation(1, seed).items()}
    return obs, {"noise": np.random.default_rng(seed).standard_normal(planner.size, np.float32), "prefix": actions(1, seed + 1)[0, :5].numpy(), "committed": 2}


def agree(a: np.ndarray, b: np.ndarray, tolerance: float = 2e-5) -> None:
    same(torch.from_numpy(a), torch.from_numpy(b), tolerance)


@pytest.mark.parametrize("name, per_step", EACH)
def test_the_fast_way_plans_what_the_planner_plans(name, per_step):
    planner = small(CHAINS[name], per_step=per_step, rtc=3)
    ordinary = PlannerBackend(planner)
    fast = FastPlan(ordinary)
    assert not fast.lacks
    for seed, merge in enumerate([*ordinary.card.merges, "naive"]):
        obs, told = asked(planner, seed)
        with torch.no_grad():
            want = planner.plan({k: torch.from_numpy(v)[None] for k, v in obs.items()}, noise=torch.from_numpy(told["noise"])[None],
                                prefix=torch.from_numpy(told["prefix"])[None], committed=2, merge=merge)[0].numpy()
        for backend in (ordinary, fast):
            got = backend.plan(obs, **told, merge=merge)
            agree(got, want)
            assert got.shape == (T, 7) and (merge in ("naive", "ensemble") or np.array_equal(got[:2], told["prefix"][:2]))
    warm = PlannerBackend(planner, warm=0.6)
    obs, told = asked(planner)
    agree(FastPlan(warm).plan(obs, **told, merge="frozen"), warm.plan(obs, **told, merge="frozen"))


def test_the_card_speaks_of_the_robots_actions_and_of_the_networks_noise():
    planner = small(CHAINS["umi"])
    card = PlannerBackend(planner).card
    assert card.action_dim == 7 and card.noise_size == planner.size == (T, 10) and dict(card.obs) == dict(SPEC.obs)
    shift, scale = (getattr(planner.normalizer, f"{part}_action%2Ephysical") for part in ("shift", "scale"))
    np.testing.assert_allclose([card.seen_low, card.seen_high], torch.stack([shift - scale, shift + scale]), rtol=1e-6)
    assert type(card).from_json(card.to_json()) == card
    obs, told = asked(planner)
    fit(Observation(1, 0, 0, obs, noise=told["noise"], prefix=told["prefix"], committed=2), card)
    with pytest.raises(WireError):
        fit(Observation(1, 0, 0, obs, noise=told["noise"][:, :7]), card)
    plain = PlannerBackend(small(CHAINS["none"])).card
    assert plain.noise_dim == 0 and plain.noise_size == (T, 7)
    old = {k: v for k, v in plain.to_json().items() if k != "noise_dim"}
    assert type(plain).from_json(old) == plain  # of a server that knows no transforms


def test_a_transform_of_ones_own_cannot_leave_torch():
    class Mine(Transform):
        pass
    planner = small(CHAINS["none"])
    planner.transform = Mine()
    pytest.importorskip("onnxruntime")
    from policy.serve.export import host_of
    with pytest.raises(ValueError, match=r"transform Mine cannot leave torch.*format=torch, or serve the run"):
        host_of(PlannerBackend(planner)).to_json()

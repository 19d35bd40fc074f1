"""Policies with transforms behind the wire and planned fast: the same physical plans, promises measured from where the robot is now."""
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from policy.data import Normalizer, statistics
from policy.data.meaning import described
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
from policy.train import checkpoint
from scripts import common
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
    same(torch.from_numpy(a).float(), torch.from_numpy(b).float(), tolerance)


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


@pytest.mark.slow
def test_a_run_is_served_as_it_plans(tmp_path):
    """`dipole serve`, its wire and client: noise of the seed has the network's channels, promises and plans the robot's."""
    pytest.importorskip("websockets", reason="pip install 'dipole[serve]'")
    from policy.serve.client import PlannerClient
    from tests.serve.far import Far
    with initialize_config_module("conf", version_base=None):
        cfg = compose("train", ["recipe=own", "data.path=poses.zarr", "net.widths=[8,16]", "net.groups=4", "net.time_dim=16"])
    config = {**common.planner_config(cfg), "transform": described(CHAINS["umi"]), "per_step": True}
    torch.manual_seed(0)
    normalizer = Normalizer(statistics.shapes(CHAINS["umi"], SPEC.obs, SPEC.action_dim, T, per_step=True))
    planner = checkpoint.build(config, SPEC, normalizer)
    weights = {f"model/{k}": v + 0.05 * torch.randn_like(v) for k, v in planner.state_dict().items()}
    checkpoint.write(tmp_path / "checkpoints/policy.safetensors", weights, {"spec": SPEC.to_json(), "planner": config, "step": 3, "cpu_s": 1.0})
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({**cfg, "transform": config["transform"]}), resolve=True))
    policy = PlannerBackend(checkpoint.load(tmp_path)[0])
    far = Far([sys.executable, "-m", "scripts.cli", "serve", "port=0", f"run={tmp_path}"], timeout=120)
    try:
        with PlannerClient(far.url) as client:
            card = client.wait_ready(30)
            assert card.noise_size == (T, 10) and card.action_dim == 7
            for seed in range(3):
                obs, told = asked(policy.planner, seed)
                noise = np.random.default_rng(seed).standard_normal(card.noise_size, np.float32)
                chunk = client.plan(obs, seed=seed, prefix=told["prefix"], committed=2, merge="guided", timeout=30)
                agree(chunk.actions, policy.plan(obs, noise=noise, prefix=told["prefix"], committed=2, merge="guided"), 1e-4)
                assert np.array_equal(np.float32(chunk.actions[:2]), told["prefix"][:2])
        assert far.end() == 0
    finally:
        far.process.kill()

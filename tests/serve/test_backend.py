"""A planner behind the wire plans what it plans without it."""
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy.diffusion.samplers import first_order
from policy.nets.fast import quick
from policy.serve.backend import PlannerBackend, model_id
from policy.serve.card import Delayed
from policy.serve.packing import WireError
from policy.serve.wire import Observation, fit
from tests.helpers import CONFIG, make_data, make_planner, make_store

RNG = np.random.default_rng(0)
OBS = {"x": (5 + RNG.uniform(-1, 1, (2, 3))).astype(np.float32)}
NOISE = RNG.standard_normal((8, 2)).astype(np.float32)
PREFIX = (5 + RNG.uniform(-1, 1, (6, 2))).astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(make_store(tmp_path_factory.mktemp("data") / "store"))


@pytest.fixture
def planner(data):
    return make_planner(data).eval()


@pytest.mark.parametrize("merge", ["naive", "ensemble", "frozen", "guided", "identity"])
def test_it_plans_what_the_planner_plans(planner, merge):
    with torch.no_grad():
        want = planner.plan({"x": torch.from_numpy(OBS["x"])[None]}, noise=torch.from_numpy(NOISE)[None], prefix=torch.from_numpy(PREFIX)[None], committed=3,
                            merge=merge)[0].numpy()
    got = PlannerBackend(planner).plan(OBS, noise=NOISE, prefix=PREFIX, committed=3, merge=merge)
    assert got.dtype == np.float32 and got.shape == (8, 2) and np.allclose(got, want, atol=1e-6)
    held = np.array_equal(got[:3], PREFIX[:3])
    assert held == (merge not in ("naive", "ensemble"))


def test_noise_fixes_the_plan_of_a_sampler_that_draws(planner):
    planner.set_sampler(ancestral, 5)
    backend = PlannerBackend(planner)
    a, b, other, free, again = (backend.plan(OBS, noise=n) for n in (NOISE, NOISE, NOISE + 1, None, None))
    assert np.array_equal(a, b) and not np.allclose(a, other, atol=1e-3) and not np.allclose(free, again, atol=1e-3)
    torch.manual_seed(0)
    assert np.array_equal(backend.plan(OBS, noise=NOISE), a)


def ancestral(denoise, path, x, taus, cond, *, draw=torch.randn_like):
    return first_order(denoise, path, x, taus, cond, eta=1.0, draw=draw)


def test_the_card_says_what_robot_it_is_for(planner, data):
    backend = PlannerBackend(planner, CONFIG, facts={"run": "toy"})
    card = backend.card
    assert (card.task, dict(card.obs), card.t_obs, card.horizon, card.action_dim, card.dt) == ("toy", {"x": (3,)}, 2, 8, 2, 0.1)
    assert card.committed == 7 and "prefix" not in card.merges and {"naive", "guided"} <= set(card.merges) and card.facts == {"run": "toy"}
    actions = data.arrays["action"].numpy()
    assert np.allclose(card.seen_low, actions.min(0), atol=1e-5) and np.allclose(card.seen_high, actions.max(0), atol=1e-5)
    fit(Observation(1, 0, 0, OBS, prefix=PREFIX, committed=6), card)
    with pytest.raises(WireError):
        fit(Observation(1, 0, 0, OBS, prefix=PREFIX, committed=6, merge="prefix"), card)


def test_the_name_of_a_model_stands_for_its_weights_and_configuration(data):
    names = {PlannerBackend(make_planner(data), CONFIG).card.model_id for _ in range(2)}
    name = names.pop()
    assert not names and len(name) == 16 and int(name, 16) >= 0
    others = {PlannerBackend(make_planner(data, seed=1), CONFIG).card.model_id}
    others.add(PlannerBackend(make_planner(data), {**CONFIG, "padding_loss": True}).card.model_id)
    planner = make_planner(data)
    planner.spec = replace(planner.spec, fps=20)
    others.add(PlannerBackend(planner, CONFIG).card.model_id)
    assert len(others | {name}) == 4


def test_every_single_weight_counts():
    net = torch.nn.Linear(3, 2)
    before = {model_id(net, {})}
    for parameter in net.parameters():
        for i in range(parameter.numel()):
            with torch.no_grad():
                parameter.view(-1)[i] += 1e-6
            before.add(model_id(net, {}))
    assert len(before) == 1 + 8


def test_a_network_laid_out_anew_is_the_same_model(planner):
    backend = PlannerBackend(planner, CONFIG)
    slow = backend.plan(OBS, noise=NOISE, prefix=PREFIX, committed=2, merge="guided")
    planner.denoiser.net = quick(planner.denoiser.net, torch.float32)
    assert np.allclose(backend.plan(OBS, noise=NOISE, prefix=PREFIX, committed=2, merge="guided"), slow, atol=1e-4)


def test_a_delayed_one_is_the_same_later(planner):
    backend = PlannerBackend(planner)
    late = Delayed(backend, 0.2)
    start = time.monotonic()
    assert np.array_equal(late.plan(OBS, noise=NOISE), backend.plan(OBS, noise=NOISE)) and late.card == backend.card
    assert time.monotonic() - start >= 0.2

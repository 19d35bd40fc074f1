"""Out-of-distribution scores: what they answer, and the AUROC that judges them against scipy's rank test."""
import functools

import numpy as np
import pytest
import torch
from scipy import stats

from policy.diffusion.likelihood import log_density
from policy.diffusion.objective import consistency, denoising, denoising_loss, discrete, uniform
from policy.ood import KINDS, auroc, auroc_interval, mixed, noisy, ood_score, refuse, shifted
from tests.helpers import CONFIG, make_data, make_planner, make_store


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(make_store(tmp_path_factory.mktemp("ood") / "d.zarr"))


@pytest.fixture(scope="module")
def planner(data):
    return make_planner(data).eval().requires_grad_(False)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scipy_s_mann_whitney(ties):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(0.5, size=60)
    if ties:
        a, b = a.round(), b.round()
    assert auroc(a, b) == pytest.approx(stats.mannwhitneyu(b, a).statistic / (40 * 60))
    assert auroc([0, 1], [2, 3]) == 1 and auroc([1, 1], [1, 1]) == 0.5 and auroc([2], [1]) == 0
    with pytest.raises(ValueError, match="finite"):
        auroc([float("nan")], [1.0])


def test_its_interval_covers_the_truth():
    """20 groups whose scores share an offset: of 100 such samples 95 % intervals miss the true AUROC about 5 times."""
    rng, truth = np.random.default_rng(0), stats.norm.cdf(0.5 / np.sqrt(2))
    groups = np.repeat(np.arange(20), 5)
    missed = 0
    for i in range(100):
        offset = rng.normal(size=20)[groups] * 0.9
        a, b = (offset + np.sqrt(1 - 0.81) * rng.normal(size=100) for _ in range(2))
        b += 0.5
        lo, hi = auroc_interval(a, b, groups, draws=400, seed=i)
        missed += not lo <= truth <= hi
    assert missed <= 14, missed
    assert auroc_interval([0.0, 1.0], [1.0, 2.0], [3, 3]) is None
    assert auroc_interval([0.0, 1.0], [5.0, 5.0], [0, 1]) == (1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_belongs_to_its_observation_alone(data, planner, kind):
    obs = data.batch(torch.tensor([3, 30, 60])).obs
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        every = ood_score(planner, obs, kind)
    assert every.shape == (3,) and every.isfinite().all() and len(every.unique()) == 3
    torch.testing.assert_close(ood_score(planner, {k: x[1:2] for k, x in obs.items()}, kind), every[1:2], rtol=1e-3, atol=1e-4)
    assert torch.equal(ood_score(planner, obs, kind), every) and not torch.equal(ood_score(planner, obs, kind, seed=1), every)
    assert torch.equal(torch.random.get_rng_state(), before)


class Lost(torch.nn.Module):
    """A network that trembles under conditions beyond what it knows."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, tau, cond):
        strange = (cond.flat.abs().amax(1) > 1.2).to(x.dtype)[:, None, None]
        return self.net(x, tau, cond) + 2 * strange * torch.sin(20 * x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_that_is_lost_outside_its_data_is_found_out(data, kind):
    planner = make_planner(data).eval().requires_grad_(False)
    planner.denoiser.net = Lost(planner.denoiser.net)
    obs = data.batch(torch.arange(0, len(data), 3)).obs
    clean, strange = (ood_score(planner, o, kind).numpy() for o in (obs, shifted(planner, 2.5)(obs)))
    assert auroc(clean, strange) > 0.95, auroc(clean, strange)
    same = shifted(planner, 0.0)(obs)
    assert abs(auroc(clean, ood_score(planner, same, kind).numpy()) - 0.5) < 0.05


def test_the_scores_are_the_loss_and_the_likelihood_of_the_plan(data, planner):
    """By hand, in the same order of draws."""
    obs = data.batch(torch.tensor([5, 50])).obs
    source = torch.Generator().manual_seed(3)
    cond, path = planner.encode(obs), planner.denoiser.path
    plan = planner.plan(obs, noise=torch.randn(8, 2, generator=source).expand(2, 8, 2))
    x0 = planner.normalizer.encode({"action": plan})["action"]
    want = torch.zeros(2)
    for j in range(4):
        eps = torch.randn(8, 2, generator=source).expand(2, 8, 2)
        tau = torch.full((2,), (j + 0.5) / 4 * path.tau_max)
        want += denoising_loss(planner.denoiser, x0, cond, tau, eps).mean((1, 2)) / 4
    torch.testing.assert_close(ood_score(planner, obs, seed=3, draws=4), want)
    source.manual_seed(3)
    u = x0 + 0.05 * [torch.randn(8, 2, generator=source) for _ in range(2)][1]
    want = -log_density(planner.denoiser, path, u, cond, floor=0.05, steps=6)[0] / 16
    torch.testing.assert_close(ood_score(planner, obs, "likelihood", seed=3, floor=0.05, steps=6, trace="exact"), want)


def test_perturbations_are_what_they_say(data, planner):
    obs = data.batch(torch.arange(40)).obs | {"other": torch.arange(40.0)[:, None, None].expand(40, 2, 1)}

    def normal(o):
        return planner.normalizer.encode({"x": o["x"]})["x"]

    one = {"x": obs["x"]}
    off = normal(noisy(planner, 0.3)(one)) - normal(one)
    assert abs(off.std() - 0.3) < 0.03 and abs(off.mean()) < 0.05 and torch.equal(noisy(planner, 0.3)(one)["x"], noisy(planner, 0.3)(one)["x"])
    off = normal(shifted(planner, 0.3)(one)) - normal(one)
    torch.testing.assert_close(off.abs(), torch.full_like(off, 0.3), rtol=0, atol=1e-4)
    torch.testing.assert_close(off[:, 0], off[:, 1], rtol=0, atol=1e-4)
    groups = [0] * 15 + [1] * 25
    both = mixed(groups)(obs)
    assert torch.equal(both["x"], obs["x"])
    source = both["other"][:, 0, 0].long().tolist()
    assert all(groups[i] != groups[j] for i, j in enumerate(source))
    with pytest.raises(ValueError, match="two episodes"):
        mixed([0] * 40)(obs)


def test_policies_without_a_likelihood_are_refused(data):
    for objective, why in ((functools.partial(consistency, huber=0.1), "consistency"), (consistency, "consistency"),
                           (functools.partial(denoising, density=functools.partial(discrete, taus=[1.0])), "noise times")):
        planner = make_planner(data)
        planner.objective = objective
        with pytest.raises(ValueError, match=why):
            refuse(planner)
        with pytest.raises(ValueError, match="no likelihood"):
            ood_score(planner, data.batch(torch.arange(2)).obs)
    planner = make_planner(data, CONFIG)
    planner.objective = functools.partial(denoising, density=uniform)
    refuse(planner)
    with pytest.raises(ValueError, match="kind"):
        ood_score(planner, data.batch(torch.arange(2)).obs, "both")

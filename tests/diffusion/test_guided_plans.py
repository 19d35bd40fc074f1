"""Guides inside a planner: every sampler, every order, a controller that plans without gradients, and what is refused."""
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from policy.control import Controller
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.from_diffusers import scheduler
from policy.diffusion.guides import BestOf, cfg, clip, pin, project, smooth, tilt, within
from policy.diffusion.objective import denoising
from policy.diffusion.path import Cosine, Linear, grid
from policy.diffusion.samplers import consistency, dpmpp_2m, first_order, heun, langevin, predictor_corrector
from policy.nets.mlp import MLP
from policy.train import checkpoint
from policy.types import Cond
from tests.diffusion.exact import gaussian
from tests.helpers import CONFIG, make_data, make_planner, make_store
from tests.shell import SHORT, refused

CONF = Path(__file__).parents[2] / "conf"
DRAWN = {"ddim": first_order, "ddpm": functools.partial(first_order, eta=1.0)}
EVERY = {**DRAWN, "heun": heun, "dpmpp_2m": dpmpp_2m, "langevin": langevin, "predictor_corrector": predictor_corrector, "consistency": consistency,
         "DEIS": scheduler("DEISMultistep"), "PNDM": scheduler("PNDM"), "LMS": scheduler("LMSDiscrete"), "UniPC": scheduler("UniPCMultistep")}
MOST = [name if name in ("ddpm", "dpmpp_2m", "LMS") else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]


@pytest.mark.parametrize("name", ["dit", "mlp", "unet1d"])
def test_every_network_takes_the_absent_condition(name):
    """Its answer is finite, differs from the conditional one and does not depend on what the absent tokens hold."""
    torch.manual_seed(0)
    net = instantiate(OmegaConf.load(CONF / "net" / f"{name}.yaml"), action_dim=2, cond_shape=(2, 3), horizon=8)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)  # an output layer that starts at 0 would answer nothing
    x, tau, a, b = torch.randn(4, 8, 2), torch.rand(4), Cond(torch.randn(4, 2, 3)), Cond(torch.randn(4, 2, 3))
    with torch.no_grad():
        assert net(x, tau, a.null()).isfinite().all() and not torch.allclose(net(x, tau, a.null()), net(x, tau, a), atol=1e-4)
        torch.testing.assert_close(net(x, tau, a.null()), net(x, tau, b.null()))
        torch.testing.assert_close(net(x, tau, a.drop(1.0)), net(x, tau, b.null()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(make_store(tmp_path_factory.mktemp("data") / "d.zarr"))


@pytest.fixture(scope="module")
def planner(data):
    return make_planner(data, {**CONFIG, "guides": {}, "cond_drop": 0.2}).eval().requires_grad_(False)


@pytest.mark.slow
def test_condition_dropout_learns_the_marginal_beside_the_conditional():
    """Actions are the state +- .1, states are spread by .5. The state 0 is a condition as any other: absent tokens filled with 0 would hide it."""
    torch.manual_seed(0)
    denoiser, steps = Denoiser(MLP(2, (2, 3), 4, width=128, layers=2, time_dim=32), Cosine(), "v"), 2500
    optimiser = torch.optim.Adam(denoiser.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        x = 0.5 * torch.randn(128, 1, 3)
        actions = x[..., :2] + 0.1 * torch.randn(128, 1, 2)
        loss = denoising(denoiser, actions.expand(-1, 4, -1), Cond(x.expand(-1, 2, -1)).drop(0.2)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    for state in ([0.6, -0.4, 0.0], [0.0, 0.0, 0.0]):
        x, noise = torch.tensor(state), denoiser.path.start_std() * torch.randn(1000, 4, 2)
        for scale, mean, std in ((0.0, torch.zeros(2), 0.51), (1.0, x[:2], 0.1), (1.5, x[:2], 0.044)):
            with torch.no_grad():
                y = first_order(cfg(denoiser, scale=scale), denoiser.path, noise, grid(denoiser.path, 20), Cond(x.expand(1000, 2, 3))).mean(1)
            assert ((y.mean(0) - mean).abs() < 0.08).all() and ((y.std(0) - std).abs() < 0.06).all(), (state, scale, y.mean(0), y.std(0))


# ---------------------------------------------------------------- constraints
def box(actions, obs):
    return within(actions, obs, lower=[-0.02, None], upper=0.03, step=[None, 0.004])


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("sampler", MOST)
def test_a_projected_plan_obeys_with_every_sampler_and_inside_other_guides(planner, sampler, inner):
    push = functools.partial(tilt, value=lambda actions, obs: actions.sum((1, 2)), scale=300.0)
    guides = [functools.partial(project, onto=lambda a, o: 5 + box(a - 5, o)), push]
    planner.set_sampler(EVERY[sampler], 12)
    planner.set_guides(guides if inner else guides[::-1])
    with torch.no_grad():
        plan = planner.plan({"x": 5 + torch.randn(3, 2, 3)}) - 5
    rounding = 2e-6
    assert (plan[..., 0] >= -0.02 - rounding).all() and (plan <= 0.03 + rounding).all() and plan[..., 1].diff(dim=1).abs().max() <= 0.004 + rounding


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "PNDM", "consistency"])
def test_a_prefix_is_kept_and_limits_what_follows(planner, sampler):
    planner.set_sampler(EVERY[sampler], 12)
    planner.set_guides([functools.partial(project, onto=functools.partial(within, step=0.01)), functools.partial(clip, limit=1.0)])
    prefix = 5 + 0.2 * torch.randn(3, 1, 2) + 0.005 * torch.arange(3.0)[:, None]
    plan = planner.plan({"x": 5 + torch.randn(3, 2, 3)}, prefix=prefix)
    assert torch.equal(plan[:, :3], prefix) and plan.diff(dim=1).abs().max() <= 0.01 + 2e-6


def test_pin_takes_physical_actions_when_given_a_frame(planner):
    known, mask = torch.full((3, 8, 2), 5.3), (torch.arange(8) == 7)[:, None]
    for sampler in ("ddim", "ddpm", "LMS"):
        planner.set_sampler(EVERY[sampler], 12)
        planner.set_guides([lambda denoise, f: pin(denoise, f, known=known[: len(f.obs["x"])], mask=mask)])
        plan = planner.plan({"x": 5 + torch.randn(3, 2, 3)})
        torch.testing.assert_close(plan[:, 7], known[:, 7], rtol=0, atol=1e-5 if sampler != "LMS" else 1)
    planner.set_guides([functools.partial(pin, known=torch.full((8, 2), 5.3), mask=mask)])
    torch.testing.assert_close(planner.plan({"x": 5 + torch.randn(3, 2, 3)})[:, 7], known[:, 7], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- together
@pytest.mark.parametrize("sampler", MOST)
def test_any_order_plans_in_a_controller_with_gradients(planner, sampler):
    """A controller plans in inference mode; the values here multiply what it observed, and one differentiates on its own."""
    def toward(actions, obs):
        return -((actions - obs["x"][:, -1:, :2]) * obs["x"][:, :1, :2]).square().sum((1, 2))

    def own(denoise, f):
        def guided(x, tau, cond):
            x0 = denoise(x, tau, cond)
            with torch.enable_grad():
                actions = f.decode(x0).detach().requires_grad_()
                grad, = torch.autograd.grad((actions * f.obs["x"][:, :1, :2]).square().sum(), actions)
            return x0 - 1e-3 * grad
        return guided

    kinds = {"cfg": cfg, "tilt": functools.partial(tilt, value=toward), "clip": clip, "own": own, "best": BestOf(2, toward),
             "project": functools.partial(project, onto=functools.partial(within, lower=4.2, upper=5.8))}
    planner.set_sampler(EVERY[sampler], 12 if sampler == "PNDM" else 3)
    for order in ("cfg tilt project clip best", "best clip project own tilt cfg"):
        planner.set_guides([kinds[k] for k in order.split()])
        control = Controller(planner, execute=4)
        control.reset([0, 1, 2])
        control.observe({"x": 5 + torch.randn(3, 1, 3).numpy()})
        chunk = torch.from_numpy(control.plan())
        assert chunk.shape == (3, 4, 2) and chunk.isfinite().all()
        alone = torch.from_numpy(_again(planner, control, 1))
        torch.testing.assert_close(alone, chunk[1:2], rtol=1e-4, atol=2e-4)  # a row is its own, best_of's too


def _again(planner, control, row):
    other = Controller(planner, execute=4)
    other.reset([row])
    other.history = {k: h[row:row + 1] for k, h in control.history.items()}
    other.fresh[:] = False
    return other.plan()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("p", [0, 3])
def test_best_of_keeps_the_best_of_the_plans_drawn_one_by_one(planner, sampler, p):
    obs, noise = {"x": 5 + torch.randn(4, 2, 3)}, torch.randn(6, 4, 8, 2)
    steps = torch.randn(20, 6, 4, 8, 2)
    prefix = obs["x"][:, -1:, :2].expand(-1, p, -1) if p else None
    planner.set_sampler(DRAWN[sampler], 5)

    def value(actions, obs):
        return (actions * obs["x"][:, :1, :2]).sum((1, 2))

    def one_by_one(i):
        draws = iter(steps[:, i])
        return planner.plan(obs, noise=noise[i], prefix=prefix, draw=lambda x: next(draws))

    planner.set_guides([])
    plans = torch.stack([one_by_one(i) for i in range(6)])
    values = torch.stack([value(plan, obs) for plan in plans])
    planner.set_guides([BestOf(6, value)])
    draws = iter([*noise[1:], *steps.flatten(0, 1)])
    best = planner.plan(obs, noise=noise[0], prefix=prefix, draw=lambda x: next(draws))
    torch.testing.assert_close(best, plans[values.argmax(0), torch.arange(4)], rtol=1e-5, atol=1e-5)
    planner.set_guides([BestOf(1, value)])
    torch.testing.assert_close(one_by_one(0), plans[0], rtol=0, atol=0)


# ---------------------------------------------------------------- refusals
def broken(actions, obs):
    return torch.log(actions - 1e3).sum((1, 2))


def corner(actions, obs):
    return -(actions * 0).square().sum((1, 2)).sqrt()


@pytest.mark.parametrize("guide, says", [
    (functools.partial(tilt, value=lambda a, o: a.sum(2)), "one number for each of the 2 plans"), (BestOf(2, lambda a, o: a.sum(2)), r"got \(2, 8\)"),
    (functools.partial(tilt, value=lambda a, o: 1.0), "got float"), (functools.partial(tilt, value=lambda a, o: a.detach().sum((1, 2))), "use best_of"),
    (functools.partial(project, onto=lambda a, o: a[:, 0]), r"onto must return actions \(2, 8, 2\)"),
    (functools.partial(project, onto=within), "limits nothing")])
def test_a_guide_that_cannot_work_is_refused_when_it_is_set(planner, guide, says):
    planner.set_guides([])
    with pytest.raises(ValueError, match=says):
        planner.set_guides([guide])
    assert planner.guides == []


def test_a_value_that_is_nan_is_named_and_a_lost_plan_is_not(planner):
    obs = {"x": 5 + torch.randn(2, 2, 3)}
    planner.set_sampler(first_order, 3)
    for guide, says in ((BestOf(2, broken), "value 'broken' is NaN"), (functools.partial(tilt, value=corner), "gradient of the value 'corner'")):
        planner.set_guides([guide])
        with pytest.raises(ValueError, match=says):
            planner.plan(obs)
    obs["x"][1] = torch.nan
    for guide in (BestOf(2, smooth), functools.partial(tilt, value=smooth)):
        planner.set_guides([guide])
        assert planner.plan(obs).isfinite().flatten(1).all(1).tolist() == [True, False]
    planner.set_guides([BestOf(3, smooth)])
    lost = iter([torch.full((2, 8, 2), torch.nan), torch.randn(2, 8, 2)])  # one candidate's noise
    assert planner.plan({"x": torch.full((2, 2, 3), 5.0)}, draw=lambda x: next(lost)).isfinite().all()


def test_impossible_combinations_are_refused(data):
    plain = make_planner(data)
    with pytest.raises(ValueError, match="cond_drop=0: train with cond_drop"):
        plain.set_guides([functools.partial(cfg, scale=2.0)])
    with pytest.raises(ValueError, match="cond_drop=0"):
        make_planner(data, {**CONFIG, "guides": {"cfg": {"_target_": "policy.diffusion.guides.cfg", "_partial_": True}}})
    with pytest.raises(ValueError, match="one BestOf"):
        plain.set_guides([BestOf(2, smooth), BestOf(2, smooth)])
    with pytest.raises(ValueError, match="n=0"):
        BestOf(0, smooth)
    with pytest.raises(ValueError, match="needs a condition"):
        cfg(gaussian(Linear()))(torch.zeros(1, 1, 1), torch.ones(1), None)


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "guide").glob("*.yaml")))
def test_every_leaf_guides(planner, name):
    config = OmegaConf.to_container(OmegaConf.load(CONF / "guide" / f"{name}.yaml"))
    if name == "project":
        config["project"]["onto"] |= {"lower": [4.9, None], "step": 0.01}
    planner.set_sampler(first_order, 3)
    planner.set_guides(checkpoint.guides(config))
    assert planner.plan({"x": 5 + torch.randn(2, 2, 3)}).isfinite().all()


# ---------------------------------------------------------------- as a user types it
MINE = '''
def low(actions, obs):
    above = actions[..., 2] - obs["hand"][:, -1:, 2]   # m
    return -above.sum(1)

def wrong(actions, obs):
    return actions.sum(2)
'''


@pytest.mark.slow
def test_a_value_of_ones_own_guides_an_evaluation(shell, run):
    (shell.folder / "my_values.py").write_text(MINE)
    mine = ["eval", "run=run", "guide=tilt", "guide.tilt.value._target_=my_values.low", "guide.tilt.scale=1e4", *SHORT]
    done = shell(*mine, "trust=[my_values]", "out=mine")
    assert done.code == 0, done.err
    assert shell("eval", "run=run", "out=plain", *SHORT).code == 0
    with_, without = (np.load(shell.folder / out / "actions.npz")["actions"] for out in ("mine", "plain"))
    assert with_.shape != without.shape or abs(with_ - without).max() > 1e-3  # m; a network of four steps knows no down
    refused(shell(*mine), "my_values.low", "trust=[my_values]")
    refused(shell(*mine, "trust=[my_values]", "guide.tilt.value._target_=my_values.wrong"), "'wrong' must return one number for each of the 2 plans")
    assert "error: the configuration names 'my_values.absent', which does not import" in shell(*mine, "trust=[my_values]",
                                                                                             "guide.tilt.value._target_=my_values.absent").err
    refused(shell("eval", "run=run", "guide=cfg", *SHORT), "cond_drop=0.1")
    refused(shell("eval", "run=run", "guide=project", *SHORT), "set lower, upper or step")
    refused(shell("train", "recipe=gantry", "data.path=demos.zarr", "run=other", "normalize=gaussian"), "normalize=gaussian", "guide=none")
    limited = shell("eval", "run=run", "guide=project", "guide.project.onto.upper=[null,null,0.05,null]", "out=limited", *SHORT)
    assert limited.code == 0 and np.load(shell.folder / "limited" / "actions.npz")["actions"][:, 2].max() < 0.05 + 1e-6

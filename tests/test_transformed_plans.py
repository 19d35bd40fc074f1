"""Planners with transforms: known answers in physical units, promises re-expressed under the new observation, checkpoints, guides, controllers."""
import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from policy.control import Controller
from policy.data import Normalizer, Store, TrajectoryDataset, statistics
from policy.data.meaning import described
from policy.data.relative import AbsoluteToDelta, DeltaToAbsolute, RelativeToChunk
from policy.data.rotation import convert
from policy.data.transform import NOTHING, Binarise, Chain, Rotation, Transform
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import BestOf, clip, project, within
from policy.diffusion.path import Cosine, Linear
from policy.diffusion.samplers import dpmpp_2m, first_order, heun
from policy.nets.lowdim import LowDim
from policy.nets.prefix import Prefix
from policy.ood import noisy, ood_score
from policy.planner import Planner
from policy.train import checkpoint
from policy.train.log import Log
from policy.train.loop import Settings, Trainer
from policy.types import Batch, Spec
from tests.diffusion.exact import gaussian, perfect
from tests.helpers import CONFIG

T, POSE = 8, {"rotation": "axis_angle", "turns": [3, 4, 5], "turns_take": [3, 4, 5]}
SPEC = Spec({"hand": (6,), "goal": (3,)}, 7, t_obs=2, horizon=T, fps=10, task="poses")
HAND = {"state": "hand", "channels": [0, 1, 2], "take": [0, 1, 2], **POSE}
CHAINS: dict[str, Transform] = {
    "none": NOTHING, "relative": RelativeToChunk(**HAND), "delta": AbsoluteToDelta(**HAND), "summed": DeltaToAbsolute(**HAND),
    "umi": Chain((RelativeToChunk(**HAND, frame="tool", position=[0, 1, 2]), Rotation("axis_angle", "rotation_6d", [3, 4, 5], {"hand": [3, 4, 5]}),
                  Binarise([9], 0.04, 0.0, 0.08)))}


def actions(b: int = 3, seed: int = 0) -> torch.Tensor:
    """Poses with a gripper, (b,T,7)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, T, 7, generator=g)
    return torch.cat([0.5 + 0.1 * x[..., :3], 0.4 * x[..., 3:6], 0.08 * (x[..., 6:] > 0)], -1)


def observation(b: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"hand": 0.4 * torch.randn(b, 2, 6, generator=g), "goal": torch.randn(b, 2, 3, generator=g)}


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Places and gripper as numbers, axis-angles as rotations."""
    torch.testing.assert_close(a[..., [0, 1, 2, 6]], b[..., [0, 1, 2, 6]], rtol=0, atol=tolerance)
    torch.testing.assert_close(convert(a[..., 3:6], "axis_angle", "matrix"), convert(b[..., 3:6], "axis_angle", "matrix"), rtol=0, atol=tolerance)


class Fixed(nn.Module):
    """A network that knows the normalised answer (b,t,d')."""

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x, tau, cond):
        return self.value[: len(x)] if len(self.value) > 1 else self.value.expand_as(x)


def around(transform: Transform, net: nn.Module, spec: Spec = SPEC, *, per_step: bool = False, path=None, target: str = "x0", **options) -> Planner:
    """Random scalings, so that a forgotten one would show."""
    torch.manual_seed(3)
    normalizer = Normalizer(statistics.shapes(transform, spec.obs, spec.action_dim, spec.horizon, per_step=per_step))
    for b in normalizer.buffers():
        b.copy_(torch.rand_like(b) + 0.5)
    planner = Planner(spec, normalizer, LowDim(transform.sizes(spec.obs), spec.t_obs), Denoiser(net, path or Cosine(), target), transform=transform, **options)
    return planner.eval().requires_grad_(False)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("sampler", [first_order, heun, dpmpp_2m], ids=["ddim", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_known_answer_comes_out_in_physical_units(name, sampler, per_step):
    want, obs, size = actions(), observation(), (T, CHAINS[name].width(7, SPEC.obs))
    planner = around(CHAINS[name], Fixed(torch.zeros(1, *size)), per_step=per_step, sampler=sampler, steps=5)
    planner.denoiser.net.value = nn.Parameter(planner.encode_actions(want, obs), requires_grad=False)
    assert planner.size == size
    same(planner.plan(obs), want)
    with pytest.raises(ValueError, match=rf"expected shape \(b=3, t=8, d={size[1]}\)"):
        planner.plan(obs, noise=torch.zeros(3, T, size[1] + 1))


@pytest.mark.parametrize("name", ["relative", "delta"])
def test_gaussian_plans_have_the_moments_that_are_written_down(name):
    """Independent normal numbers of the network: of steps, the target at k has k times the mean and sqrt(k) times the spread of one; relative ones do not."""
    spec, mean, std = Spec({"q": (1,)}, 1, t_obs=1, horizon=5), 0.4, 0.2
    transform = {"delta": AbsoluteToDelta("q"), "relative": RelativeToChunk("q")}[name]
    planner = around(transform, nn.Identity(), spec, path=Linear())
    planner.denoiser = perfect(gaussian(Linear(), mean, std), Linear(), "flow")
    planner.set_sampler(first_order, 60)
    torch.manual_seed(0)
    plan = planner.plan({"q": torch.full((6000, 1, 1), 7.0)})[..., 0]
    shift, scale = planner.normalizer.shift_action.item(), planner.normalizer.scale_action.item()
    k = torch.arange(1.0, 6) if name == "delta" else torch.ones(5)
    torch.testing.assert_close(plan.mean(0), 7 + k * (mean * scale + shift), rtol=0, atol=0.02)
    torch.testing.assert_close(plan.std(0), k.sqrt() * std * scale, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", CHAINS)
def test_a_promise_is_told_to_the_network_as_seen_from_now(name):
    """Promised under one observation and told under the next: the same physical actions, measured from where the robot is now."""
    transform, width = CHAINS[name], CHAINS[name].width(7, SPEC.obs)

    class Spy(nn.Module):
        def forward(self, x, tau, cond):
            seen.append(x)
            return torch.zeros_like(x)
    seen: list[torch.Tensor] = []
    planner = around(transform, Prefix(Spy()), rtc=4, steps=3)
    promised, obs = actions(seed=5)[:, :5], observation(seed=6)
    seen.clear()
    plan = planner.plan(obs, prefix=promised, committed=3, merge="prefix", noise=torch.randn(3, T, width))
    code = transform.encode(promised, obs)
    want = (code - planner.normalizer.shift_action) / planner.normalizer.scale_action
    for x in seen:
        torch.testing.assert_close(x[:, :3, :width], want[:, :3], rtol=1e-6, atol=1e-6)
    assert torch.equal(plan[:, :3], promised[:, :3])  # to the bit, whatever the way there and back costs
    for merge in ("frozen", "guided", "identity", "prefix"):
        assert torch.equal(planner.plan(obs, prefix=promised, committed=2, merge=merge)[:, :2], promised[:, :2])


@pytest.mark.parametrize("name", ["relative", "delta", "umi"])
def test_a_plan_goes_on_from_its_promise(name):
    """A planner that always wants the same physical path, asked again three steps later from where the robot then is: it goes on along it, exactly."""
    whole = torch.cat([actions(1), actions(1, seed=9)], 1)
    planner = around(CHAINS[name], Fixed(torch.zeros(1, T, CHAINS[name].width(7, SPEC.obs))), steps=3)
    obs = observation(1)
    later = {**obs, "hand": whole[:, 1:3, :6]}  # it followed
    planner.denoiser.net.value = nn.Parameter(planner.encode_actions(whole[:, 3:3 + T], later))
    plan = planner.plan(later, prefix=whole[:, 3:T], committed=2, merge="frozen")
    assert torch.equal(plan[:, :2], whole[:, 3:5])
    same(plan, whole[:, 3:3 + T])


def test_a_warm_start_begins_at_the_promise_and_stays_there():
    """Behind the promise targets are repeated, deltas are none: with a network that changes nothing the plan is what was promised."""
    class Keeps(nn.Module):
        def forward(self, x, tau, cond):
            return x / Cosine().at(tau, x)[0]
    for name, transform in (("relative", RelativeToChunk("q")), ("delta", AbsoluteToDelta("q")), ("summed", DeltaToAbsolute("q"))):
        planner = around(transform, Keeps(), Spec({"q": (2,)}, 2, t_obs=1, horizon=T), steps=10)
        obs, promised = {"q": torch.tensor([[[1.0, -2.0]]])}, torch.tensor([[[1.5, -1], [2, 0], [2.5, 0.5]]])
        plan = planner.plan(obs, prefix=promised, committed=0, merge="naive", warm=0.3, noise=torch.zeros(1, T, 2))
        rest = torch.zeros(1, 5, 2) if name == "summed" else promised[:, -1:].expand(-1, 5, -1)
        torch.testing.assert_close(plan, torch.cat([promised, rest], 1), rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_transformed_actions():
    """A robot at zero: relative actions are the absolute ones, and so is every loss, to the bit; elsewhere it is another."""
    spec, net = Spec({"q": (2,)}, 2, t_obs=1, horizon=T), nn.Linear(2, 2)

    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, tau, cond):
            return self.net(x)
    plain, moved = around(NOTHING, Points(), spec), around(RelativeToChunk("q"), Points(), spec)
    for key in ("shift_action", "scale_action"):
        getattr(moved.normalizer, key).copy_(getattr(plain.normalizer, key))

    def losses(at: float) -> list[torch.Tensor]:
        batch = Batch({"q": torch.full((4, 1, 2), at)}, torch.randn(4, T, 2, generator=torch.Generator().manual_seed(0)), torch.ones(4, T, dtype=torch.bool))
        out = []
        for planner in (plain, moved):
            torch.manual_seed(1)
            out.append(planner.loss(batch))
        return out
    assert torch.equal(*losses(0.0)) and not torch.allclose(*losses(1.0))


def test_padding_is_a_robot_that_stays_where_it_is():
    """Of steps that a dataset repeats behind the end none is learned or seen as motion."""
    planner = around(DeltaToAbsolute("q"), nn.Identity(), Spec({"q": (1,)}, 1, t_obs=1, horizon=4))
    batch = Batch({"q": torch.zeros(1, 1, 1)}, torch.tensor([[[1.0], [2], [2], [2]]]), torch.tensor([[True, True, False, False]]))
    x0 = planner.encode_actions(batch.action, batch.obs, batch.valid)
    torch.testing.assert_close(planner.normalizer.decode({"action": x0})["action"].flatten(), torch.tensor([1.0, 3, 3, 3]))
    seen = []
    planner.objective = lambda denoiser, x, cond, progress: seen.append(x) or x
    planner.loss(batch)
    assert torch.equal(seen[0], x0)


@pytest.mark.parametrize("name", CHAINS)
def test_guides_think_in_physical_units(name):
    """A limit on height holds for the plan, whatever the network predicts; of many plans the one is kept whose physical value is best."""
    torch.manual_seed(0)
    width = CHAINS[name].width(7, SPEC.obs)
    obs = observation()
    low = functools.partial(within, upper=[None, None, 0.3, None, None, None, None])
    if name == "summed":
        low = functools.partial(within, upper=[None, None, 0.05, None, None, None, None])
    planner = around(CHAINS[name], Fixed(torch.randn(3, T, width)), steps=4, guides=[functools.partial(project, onto=low)])
    plan = planner.plan(obs)
    free = around(CHAINS[name], planner.denoiser.net, steps=4).plan(obs)
    most = low.keywords["upper"][2]
    assert (plan[..., 2] <= most + 1e-5).all() and (free[..., 2] > most + 0.01).any()

    class Noisy(nn.Module):
        def forward(self, x, tau, cond):
            return x
    best = around(CHAINS[name], Noisy(), steps=2, guides=[BestOf(8, lambda actions, obs: -actions[..., 2].square().mean(1))])
    noise = torch.randn(3, T, width)
    one = around(CHAINS[name], Noisy(), steps=2).plan(obs, noise=noise)
    assert (best.plan(obs, noise=noise)[..., 2].square().mean(1) <= one[..., 2].square().mean(1) + 1e-6).all()


# ---------------------------------------------------------------- trained, saved, loaded
@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrajectoryDataset:
    rng = np.random.default_rng(0)
    store = Store.create(tmp_path_factory.mktemp("d") / "d.zarr", {"hand": ((6,), "float32"), "goal": ((3,), "float32"), "action": ((7,), "float32")}, fps=10)
    for _ in range(5):
        hand = np.concatenate([0.5 + 0.02 * rng.standard_normal((25, 3)).cumsum(0), 0.1 * rng.standard_normal((25, 3)).cumsum(0)], 1)
        target = hand + 0.01 * rng.standard_normal((25, 6))
        store.append({"hand": hand, "goal": rng.standard_normal((25, 3)), "action": np.concatenate([target, 0.08 * (rng.random((25, 1)) < 0.5)], 1)})
    return TrajectoryDataset(Store.open(store.path), {"hand": "hand", "goal": "goal"}, "action", horizon=T)


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_a_checkpoint_is_the_planner_that_was_trained(data, tmp_path, name, per_step):
    """To the bit: transform, statistics of every kind, and plans, with and without a promise."""
    config = {**CONFIG, "transform": described(CHAINS[name]), "per_step": per_step}
    made = checkpoint.transform_of(config)
    assert made == (CHAINS[name] if isinstance(CHAINS[name], Chain) else Chain((CHAINS[name],)))
    torch.manual_seed(0)
    planner = checkpoint.build(config, SPEC, statistics.fit(data, made, per_step=per_step))
    trainer = Trainer(planner, data, tmp_path, Settings(steps=6, batch=16, warmup=1, log=3, precision="fp32"), config=config)
    with Log(tmp_path, wandb="disabled") as log:
        trainer.run(log)
    loaded, _ = checkpoint.load(tmp_path)
    assert loaded.transform == made and loaded.size == planner.size
    for key, value in planner.normalizer.state_dict().items():
        assert torch.equal(loaded.normalizer.state_dict()[key], value)
    obs, noise = observation(), torch.randn(3, *planner.size)
    with trainer.ema.applied():
        for told in ({}, {"prefix": actions()[:, :4], "committed": 2, "merge": "guided"}):
            assert torch.equal(loaded.plan(obs, noise=noise, **told), planner.eval().plan(obs, noise=noise, **told))
    other = copy.deepcopy(config)
    other["transform"] = described(AbsoluteToDelta(**HAND, frame="base"))
    again = Trainer(checkpoint.build(other, SPEC, statistics.fit(data, checkpoint.transform_of(other), per_step=per_step)), data, tmp_path, trainer.settings,
                    config=other)
    with pytest.raises(ValueError, match="trained with another transform"):
        again.resume()


def test_a_checkpoint_names_no_foreign_transform():
    for target in ("os.system", "policy.data.store.Store", "policy.data.transform.Sequence"):
        with pytest.raises(ValueError, match=r"is trusted|does not import"):
            checkpoint.transform_of({"transform": {"evil": {"_target_": target}}})


@pytest.mark.parametrize("name", CHAINS)
def test_controllers_and_scores_plan_with_it(data, name):
    """Noise has the network's channels; each row plans what it would alone; strange observations can be scored."""
    config = {**CONFIG, "transform": described(CHAINS[name])}
    planner = checkpoint.build(config, SPEC, statistics.fit(data, checkpoint.transform_of(config)))
    for p in planner.denoiser.parameters():
        p.data += 0.05 * torch.randn_like(p)
    acted = []
    for rows in ([0, 1, 2], [1]):
        controller = Controller(planner, execute=3, delay=1, merge="frozen")
        controller.reset(rows)
        seen = [{k: v[rows, 1].numpy() for k, v in observation(seed=s).items()} for s in range(7)]
        acted.append(np.stack([controller.act(obs) for obs in seen]))
    assert acted[0].shape == (7, 3, 7) and np.isfinite(acted[0]).all()
    np.testing.assert_allclose(acted[0][:, 1], acted[1][:, 0], atol=2e-5)
    obs = observation()
    for kind in ("loss", "likelihood"):
        assert torch.equal(ood_score(planner, obs, kind), ood_score(planner, obs, kind)) and ood_score(planner, obs, kind).isfinite().all()
    same_obs = noisy(planner, 0.0)(obs)
    torch.testing.assert_close(same_obs["goal"], obs["goal"])
    torch.testing.assert_close(*(convert(o["hand"][..., 3:], "axis_angle", "matrix") for o in (same_obs, obs)), rtol=0, atol=1e-5)


def test_clips_cut_what_the_network_sees():
    """clip=1 of relative actions keeps plans within the reach of the demonstrations, from wherever the robot is."""
    planner = around(RelativeToChunk("q"), Fixed(torch.full((1, 4, 1), 5.0)), Spec({"q": (1,)}, 1, t_obs=1, horizon=4), guides=[clip])
    reach = (planner.normalizer.scale_action + planner.normalizer.shift_action).item()
    for at in (0.0, 30.0):
        torch.testing.assert_close(planner.plan({"q": torch.full((1, 1, 1), at)}), torch.full((1, 4, 1), at + reach))


def test_misfits_are_told_when_a_planner_is_made():
    with pytest.raises(ValueError, match=r"observation 'arm', which the policy does not have \(it sees hand, goal\)"):
        around(RelativeToChunk("arm"), nn.Identity())
    with pytest.raises(ValueError, match="takes 7 action channels from 6 of 'hand'"):
        around(RelativeToChunk("hand"), nn.Identity())

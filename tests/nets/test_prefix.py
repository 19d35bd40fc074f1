"""Training-time real-time chunking: a network that is told which first steps are known."""
from functools import partial

import pytest
import torch
from torch import nn

from policy.diffusion.denoiser import TARGETS, Denoiser
from policy.diffusion.objective import consistency, denoising, inside
from policy.diffusion.path import VE, VP, Cosine, Linear, Table
from policy.nets.dit import DiT
from policy.nets.mlp import MLP
from policy.nets.prefix import Prefix
from policy.nets.unet1d import UNet1d
from policy.train import checkpoint
from policy.train.log import Log
from policy.train.loop import Settings, Trainer
from policy.types import Batch, Cond
from tests.helpers import CONFIG, make_data, make_planner, make_store

RTC = {**CONFIG, "rtc": 4}
NETS = {"unet1d": partial(UNet1d, widths=(8, 16), groups=4, time_dim=16), "dit": partial(DiT, width=16, layers=1, heads=2),
        "mlp": partial(MLP, width=16, layers=1, time_dim=16)}


class Seen(nn.Module):
    """Answers what it was asked, one channel more than asked for."""

    def forward(self, x, tau, cond=None):
        self.x, self.tau = x, tau
        return 3 * x


def test_the_inner_network_sees_the_flag_and_the_time_of_the_unknown_steps():
    inner, x, tau = Seen(), torch.randn(2, 5, 3), torch.tensor([[0, 0, 0.7, 0.7, 0.7], [0.4] * 5])
    answer = Prefix(inner)(x, tau)
    assert torch.equal(answer, 3 * x) and torch.equal(inner.x[..., :3], x)
    assert inner.x[..., 3].tolist() == [[1, 1, 0, 0, 0], [0] * 5] and torch.equal(inner.tau, torch.tensor([0.7, 0.4]))
    assert torch.equal(Prefix(inner)(x, torch.tensor([0.7, 0.4])), 3 * x) and not inner.x[..., 3].any() and torch.equal(inner.tau, torch.tensor([0.7, 0.4]))
    with pytest.raises(ValueError, match="t=5"):
        Prefix(inner)(x, torch.ones(2, 4))


@pytest.mark.parametrize("name", NETS)
def test_every_backbone_can_be_told(name):
    """Its answer has the chunk's shape, depends on the flag, and one shared time is the same however it is written."""
    torch.manual_seed(0)
    net, x, cond = Prefix(NETS[name](3, (2, 4), 8)), torch.randn(2, 8, 2), Cond(torch.randn(2, 2, 4))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)  # outputs start at 0
    tau = torch.tensor([0.3, 0.8])
    plain, told = net(x, tau, cond), net(x, torch.where(torch.arange(8) < 3, 0, tau[:, None]), cond)
    assert plain.shape == x.shape and (plain - told).abs().max() > 1e-3
    torch.testing.assert_close(net(x, tau[:, None].expand(-1, 8), cond), plain, rtol=0, atol=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(make_store(tmp_path_factory.mktemp("data") / "d.zarr"))


def known_of(planner, batch: Batch) -> torch.Tensor:
    """Which steps the loss showed as known, (b, t)."""
    seen = {}

    def spy(denoiser, x0, cond, progress, *, known):
        seen["known"] = known
        return torch.zeros_like(x0)
    kept, planner.objective = planner.objective, spy
    planner.loss(batch)
    planner.objective = kept
    return seen["known"]


def test_delays_are_uniform_and_first_steps(data):
    planner, many = make_planner(data, RTC), data.batch(torch.arange(len(data)).repeat(60))
    torch.manual_seed(0)
    known = known_of(planner, many)
    lengths = known.sum(1)
    share = torch.bincount(lengths, minlength=5) / len(lengths)
    assert lengths.max() == 4 and (share - 0.2).abs().max() < 0.03 and (known.int().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("padding_loss", [False, True])
def test_the_loss_is_the_mean_over_what_was_not_shown(data, padding_loss):
    planner = make_planner(data, {**RTC, "padding_loss": padding_loss})
    valid = torch.arange(8) < torch.tensor([8, 6, 3, 0])[:, None]
    batch = Batch({"x": 5 + torch.randn(4, 2, 3)}, 5 + torch.randn(4, 8, 2), valid)
    error, known = torch.rand(4, 8, 2), torch.arange(8) < torch.tensor([0, 2, 4, 1])[:, None]
    planner.objective = lambda denoiser, x0, cond, progress, *, known: error
    draw, torch.randint = torch.randint, lambda *args, **more: known.sum(1, keepdim=True)  # type: ignore[assignment]
    try:
        loss = planner.loss(batch)
    finally:
        torch.randint = draw
    for row in range(4):
        kept = ~known[row] if padding_loss else ~known[row] & valid[row]
        want = error[row][kept].mean() if kept.any() else torch.tensor(0.0)
        torch.testing.assert_close(loss[row], want)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VP(), VE(), Table.named("squaredcos_cap_v2", 100)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("target", TARGETS)
def test_known_steps_enter_clean_on_every_path(path, target):
    """The network sees c_in x0 there and noise elsewhere; the loss is finite."""
    inner, x0 = Seen(), torch.randn(6, 8, 2)
    known = torch.arange(8) < torch.tensor([0, 1, 2, 3, 4, 4])[:, None]
    denoiser = Denoiser(Prefix(inner), path, target)
    torch.manual_seed(1)
    loss = denoising(denoiser, x0, known=known, density=lambda n, path, like: path.snap(like.new_full((n,), 0.7 * path.tau_max)))
    scale = denoiser.scales(x0, torch.zeros(6))[0]
    assert loss.isfinite().all()
    torch.testing.assert_close(inner.x[..., :2][known], (scale * x0)[known])
    assert ((inner.x[..., :2] - scale * x0)[~known].abs() > 1e-6).all() and torch.equal(inner.x[..., 2], known.float())


def trainer(store, folder, **settings) -> Trainer:
    data = make_data(store)
    planner = make_planner(data, RTC)
    return Trainer(planner, data, folder, Settings(**{"steps": 12, "batch": 8, "warmup": 2, "log": 4, "save": 6, "precision": "fp32", **settings}), config=RTC)


def run(t: Trainer, **options) -> None:
    t.folder.mkdir(parents=True, exist_ok=True)
    with Log(t.folder, wandb="disabled", **options) as log:
        t.run(log)


def test_resuming_is_bit_for_bit(tmp_path):
    store = make_store(tmp_path / "d.zarr")
    whole, half = trainer(store, tmp_path / "a"), trainer(store, tmp_path / "b")
    run(whole)
    half._run(Log(tmp_path, wandb="disabled"), lambda note: setattr(half, "_stop", half.step >= 6))
    assert half.step == 8  # the first row of the log from there on
    torch.manual_seed(123)
    again = trainer(store, tmp_path / "b")
    again.resume()
    run(again, resume_at=again.step)
    a, b = (checkpoint.read(tmp_path / one / "checkpoints" / "last.safetensors")[0] for one in "ab")
    assert a.keys() == b.keys() and len(a) > 100 and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match="trained with another rtc"):
        other = make_planner(make_data(store), {**RTC, "rtc": 3})
        Trainer(other, make_data(store), tmp_path / "b", Settings(steps=12, batch=8, precision="fp32"), config={**RTC, "rtc": 3}).resume()
    loaded, facts = checkpoint.load(tmp_path / "a")
    assert loaded.rtc == facts["planner"]["rtc"] == 4 and isinstance(loaded.denoiser.net, Prefix)


def test_without_it_nothing_changes(data):
    """No wrapper, no key of its own, the same random numbers."""
    plain = make_planner(data)
    assert plain.rtc == 0 and not isinstance(plain.denoiser.net, Prefix) and not any("net.net" in k for k in plain.state_dict())
    torch.manual_seed(0)
    plain.loss(data.batch(torch.arange(4)))
    after = torch.random.get_rng_state()
    torch.manual_seed(0)
    plain.denoiser.zero_grad()
    denoising(plain.denoiser, plain.normalizer.encode({"action": data.batch(torch.arange(4)).action})["action"],
              plain.encode(data.batch(torch.arange(4)).obs))
    assert torch.equal(torch.random.get_rng_state(), after)


def test_other_objectives_are_refused(data):
    jumps = {**RTC, "denoiser": {"target": "v"}, "objective": {"_target_": "policy.diffusion.objective.consistency", "_partial_": True},
             "sampler": {"fn": {"_target_": "policy.diffusion.samplers.consistency", "_partial_": True}, "steps": 2}}
    with pytest.raises(ValueError, match=r"needs objective=denoising.*train without rtc"):
        make_planner(data, jumps)
    assert inside(make_planner(data, {**jumps, "rtc": 0}).objective)[0] is consistency
    with pytest.raises(ValueError, match="rtc=8 known steps must be fewer than the horizon 8"):
        make_planner(data, {**RTC, "rtc": 8})

"""The planning-only networks answer as the originals do: fp32 to rounding, bf16 to 1 %, whatever the batch."""
import pytest
import torch

from policy.nets.fast import Autocast, FastUNet1d, quick
from policy.nets.prefix import Prefix
from policy.nets.single import CAN_PACK, PACK_FROM, SingleUNet1d
from policy.nets.steered import Films, SteeredUNet1d
from policy.nets.unet1d import UNet1d
from policy.types import Cond


def net_of(action_dim: int = 3, cond_dim: int = 10, **options) -> UNet1d:
    torch.manual_seed(0)
    net = UNet1d(action_dim, (1, cond_dim), **{"widths": (16, 32, 64), "groups": 4, "time_dim": 32, **options}).eval()
    for p in net.parameters():  # norms and biases that a swapped or forgotten one would show
        p.data += 0.1 * torch.randn_like(p)
    return net


def inputs(b: int, t: int, net: UNet1d) -> tuple:
    generator = torch.Generator().manual_seed(1)
    cond = Cond(torch.randn(b, 2, net.cond_dim // 2, generator=generator)) if net.cond_dim else None
    return torch.randn(b, t, net.action_dim, generator=generator), torch.full((b,), 0.3), cond


@pytest.mark.parametrize("options, t", [({}, 16), ({}, 4), ({}, 13), ({}, 1), ({"widths": (16,)}, 8), ({"kernel": 3, "activation": "mish"}, 12),
                                        ({"cond_dim": 0, "activation": "gelu"}, 16), ({"action_dim": 1, "widths": (8, 16, 32, 64)}, 40)])
@torch.inference_mode()
def test_the_layout_changes_nothing(options, t):
    net = net_of(**options)
    x, tau, cond = inputs(5, t, net)
    with torch.inference_mode(False):
        fast = FastUNet1d(net, torch.float32)
    want = net(x, tau, cond)
    torch.testing.assert_close(fast(x, tau, cond), want, atol=2e-6 * float(want.abs().max()), rtol=1e-5)
    mixed = torch.linspace(0.1, 0.9, 5)  # noise times that differ by row
    torch.testing.assert_close(fast(x, mixed, cond), net(x, mixed, cond), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_bf16_is_within_a_percent_and_each_row_stands_alone():
    net = net_of(widths=(64, 128, 256), groups=8)
    fast = quick(net)
    x, tau, cond = inputs(64, 16, net)
    want, got = net(x, tau, cond), fast(x, tau, cond)
    assert isinstance(fast, FastUNet1d) and got.dtype == torch.float32
    assert float((got - want).abs().max() / want.abs().max()) < 0.015 and float((got - want).norm() / want.norm()) < 0.015
    some = fast(x[3:20], tau[3:20], Cond(cond.tokens[3:20]))
    torch.testing.assert_close(some, got[3:20], atol=2e-3, rtol=2e-2)


@torch.inference_mode()
def test_any_other_net_is_autocast():
    class Line(torch.nn.Linear):
        def forward(self, x, tau, cond=None):
            return super().forward(x)

    net = Line(3, 3)
    fast = quick(net)
    x = torch.randn(4, 8, 3)
    assert isinstance(fast, Autocast) and fast(x, torch.ones(4)).dtype == torch.float32
    assert not torch.equal(fast(x, torch.ones(4)), net(x, torch.ones(4)))
    torch.testing.assert_close(fast(x, torch.ones(4)), net(x, torch.ones(4)), atol=0.03, rtol=0.03)


def test_a_missing_condition_is_told():
    fast = FastUNet1d(net_of(), torch.float32)
    with pytest.raises(ValueError, match="conditioned on 10 features, got 0"):
        fast(torch.randn(2, 16, 3), torch.ones(2))


@pytest.mark.parametrize("options, t", [({}, 16), ({}, 5), ({}, 13), ({}, 1), ({"widths": (16,)}, 8), ({"kernel": 3, "activation": "mish"}, 12),
                                        ({"kernel": 1}, 8), ({"cond_dim": 0, "activation": "gelu"}, 16), ({"action_dim": 1, "widths": (8, 16, 32, 64)}, 40)])
@torch.no_grad()
def test_one_chunk_at_a_time_and_nothing_stays_behind(options, t):
    net = net_of(**options)
    taus = [0.9, 0.3]
    single = SingleUNet1d(net, t, taus)
    for seed, i in ((0, 1), (1, 0), (0, 1)):
        x = torch.randn(1, t, net.action_dim, generator=torch.Generator().manual_seed(seed))
        cond = Cond(torch.full((1, 1, net.cond_dim), 0.3 - seed)) if net.cond_dim else None
        single.condition(cond)
        single.x.copy_(x[0])
        want = net(x, torch.tensor([taus[i]]), cond)[0]
        torch.testing.assert_close(single(i), want, atol=3e-6 * float(want.abs().max()), rtol=1e-5)


@pytest.mark.skipif(not CAN_PACK, reason="this torch has no packed products")
@torch.no_grad()
def test_packed_weights_answer_as_plain_ones():
    net = net_of(widths=(32, 128), groups=8)
    assert net.middle[0].first.conv.weight.numel() >= PACK_FROM
    x, _, cond = inputs(1, 10, net)
    answers = []
    for pack in (True, False):
        single = SingleUNet1d(net, 10, [0.3], pack=pack)
        single.condition(cond)
        single.x.copy_(x[0])
        answers.append(single(0).clone())
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
    assert not torch.equal(*answers)  # or it was not packed


@pytest.mark.parametrize("t", [7, 8])
@torch.no_grad()
def test_noise_time_and_condition_steer_separately(t):
    net = net_of()
    x, tau, cond = inputs(3, t, net)
    films = Films(net)
    torch.testing.assert_close(SteeredUNet1d(net)(x, films.time(tau) + films.cond(cond)), net(x, tau, cond), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_net_that_is_told_its_prefix_is_laid_out_anew_inside():
    net = Prefix(net_of(action_dim=4))
    x, tau, cond = torch.randn(2, 8, 3), torch.tensor([[0.0] * 3 + [0.4] * 5] * 2), inputs(2, 8, net.net)[2]
    fast = quick(net, torch.float32)
    assert isinstance(fast, Prefix) and isinstance(fast.net, FastUNet1d)
    torch.testing.assert_close(fast(x, tau, cond), net(x, tau, cond), atol=1e-5, rtol=1e-5)

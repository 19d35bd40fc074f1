"""The planning-only networks answer as the originals do: fp32 to rounding, bf16 to 1 %, whatever the batch."""
import pytest
import torch

from policy.nets.fast import Autocast, FastUNet1d, quick
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

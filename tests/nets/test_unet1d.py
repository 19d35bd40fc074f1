"""The U-Net: any length, rows of their own, gradients everywhere, the same numbers when exported."""
import pytest
import torch
import torch.nn.functional as F

from policy.nets.unet1d import UNet1d
from policy.types import Cond

WIDTHS = (8, 16, 32)  # time is halved twice: lengths are padded to multiples of 4


@pytest.fixture(scope="module")
def net() -> UNet1d:
    torch.manual_seed(0)
    return UNet1d(3, (2, 5), widths=WIDTHS, groups=4, time_dim=16).eval()


def inputs(t: int, b: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(b, t, 3, generator=g), torch.rand(b, generator=g), Cond(torch.randn(b, 2, 5, generator=g))


@pytest.mark.parametrize("t", range(1, 21))
def test_any_length_is_the_padded_length_cut(net, t):
    """What stands behind the end is the last step repeated up to a multiple of 4, by hand here, and is cut off again."""
    x, tau, cond = inputs(t)
    whole = -(-t // 4) * 4
    with torch.no_grad():
        y = net(x, tau, cond)
        want = net(torch.cat([x, x[:, -1:].expand(-1, whole - t, -1)], 1), tau, cond)[:, :t]
    assert y.shape == x.shape
    torch.testing.assert_close(y, want, rtol=0, atol=0)


def test_a_fitting_length_is_not_padded(net, monkeypatch):
    monkeypatch.setattr(F, "pad", lambda *a, **k: pytest.fail("padded"))
    x, tau, cond = inputs(16)
    assert net(x, tau, cond).shape == x.shape


def test_the_number_of_parameters():
    count = sum(p.numel() for p in UNet1d(2, (2, 20), widths=(64, 128, 256)).parameters())
    assert count == 4_559_554


def test_a_row_depends_on_itself_alone(net):
    x, tau, cond = inputs(13)
    x.requires_grad_(), tau.requires_grad_(), cond.tokens.requires_grad_()
    y = net(x, tau, cond)
    for g in torch.autograd.grad(y[1].sum(), (x, tau, cond.tokens)):
        others = torch.arange(4) != 1
        assert g[others].abs().max() == 0 and g[1].abs().max() > 0
    for i in range(4):
        torch.testing.assert_close(net(x[i:i + 1], tau[i:i + 1], Cond(cond.tokens[i:i + 1])), y[i:i + 1], rtol=1e-5, atol=1e-6)


def test_every_step_sees_every_other(net):
    """Three levels and kernel 5 reach across 16 steps: the first action can answer the last."""
    x, tau, cond = inputs(16, b=1)
    x.requires_grad_()
    y = net(x, tau, cond)
    assert torch.autograd.grad(y[0, 0].sum(), x)[0][0, 15].abs().max() > 0


def test_a_gradient_reaches_every_parameter(net):
    x, tau, cond = inputs(16)
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = torch.autograd.grad(net(x, tau, cond).square().mean(), parameters)
    assert not [n for n, g in zip(names, gradients, strict=True) if not g.abs().max() > 0]


def test_the_condition_and_the_noise_time_matter(net):
    x, tau, cond = inputs(16)
    with torch.no_grad():
        y = net(x, tau, cond)
        assert not torch.allclose(net(x, tau, Cond(cond.tokens + 1)), y, atol=1e-3)
        assert not torch.allclose(net(x, 1 - tau, cond), y, atol=1e-3)
        masked = torch.tensor([[True, False]]).expand(4, -1)  # an absent token is a token of twos
        twos = torch.cat([cond.tokens[:, :1], torch.full_like(cond.tokens[:, 1:], 2)], 1)
        torch.testing.assert_close(net(x, tau, Cond(cond.tokens, masked)), net(x, tau, Cond(twos)))


def test_an_unconditional_net_needs_no_condition():
    net = UNet1d(2, (0, 0), widths=(8, 16), groups=4, time_dim=16)
    assert net(torch.randn(2, 6, 2), torch.rand(2)).shape == (2, 6, 2)


def test_misfits_are_told(net):
    x, tau, cond = inputs(16)
    with pytest.raises(ValueError, match=r"widths \[8, 12\] must be multiples of groups=8"):
        UNet1d(2, (1, 4), widths=[8, 12])
    with pytest.raises(ValueError, match="conditioned on 10 features; pass cond"):
        net(x, tau)
    with pytest.raises(ValueError, match=r"expected shape \(b, t, d=3\), got \(4, 16, 2\)"):
        net(x[..., :2], tau, cond)
    with pytest.raises(ValueError, match=r"expected shape \(b, t, d=3\), got \(16, 3\)"):
        net(x[0], tau, cond)
    with pytest.raises(ValueError, match="conditioned on 10 features, got 15"):
        net(x, tau, Cond(torch.zeros(4, 3, 5)))


@pytest.mark.parametrize("t", [16, 13])
def test_the_exported_graph_is_the_net(net, t):
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, tau, tokens):
            return self.net(x, tau, Cond(tokens))

    x, tau, cond = inputs(t)
    graph = torch.export.export(Flat().eval(), (x, tau, cond.tokens)).module()
    other = inputs(t, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(graph(other[0], other[1], other[2].tokens), net(*other), rtol=0, atol=1e-6)

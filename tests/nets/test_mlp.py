"""The MLP: a chunk of its horizon and no other, every step seen by every other."""
import pytest
import torch

from policy.nets.mlp import MLP
from policy.types import Cond
from tests.nets.test_backbones import stirred


def make(**options) -> MLP:
    torch.manual_seed(0)
    return stirred(MLP(3, (2, 5), 6, **{"width": 32, "layers": 2, "time_dim": 16, **options}))  # type: ignore[return-value]


def inputs(t: int = 6, b: int = 2) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, t, 3, generator=g), torch.rand(b, generator=g), Cond(torch.randn(b, 2, 5, generator=g))


def test_every_step_sees_every_other():
    x, tau, cond = inputs()
    x.requires_grad_()
    y = make()(x, tau, cond)
    assert all(torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].abs().amax((0, 2)).min() > 0 for i in range(6))


def test_numbers_are_written_step_by_step():
    net = make()
    x, tau, cond = inputs()
    with torch.no_grad():
        y = net(x, tau, cond)
        net.write.bias += torch.arange(18.0) * 100
        torch.testing.assert_close(net(x, tau, cond) - y, (torch.arange(18.0) * 100).reshape(6, 3).expand(2, 6, 3), rtol=1e-4, atol=1e-3)


def test_it_is_the_formula_written_out():
    """read, then a skip around two layers whose normalised input is scaled and shifted by noise time and condition, then norm and write."""
    net = make(layers=1)
    x, tau, cond = inputs()
    block, silu = net.blocks[0], torch.nn.functional.silu

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    h = net.read(torch.cat([x.flatten(1), cond.flat], -1))
    scale, shift = block.film(silu(torch.cat([net.time(tau), cond.flat], -1))).chunk(2, -1)
    h = h + block.mlp[2](silu(block.mlp[0](norm(h) * (1 + scale) + shift)))
    want = net.write(silu(norm(h) * net.norm.weight + net.norm.bias))
    torch.testing.assert_close(net(x, tau, cond), want.reshape(2, 6, 3), rtol=1e-5, atol=1e-5)


def test_the_number_of_parameters():
    """Of the default on Push-T; the U-Net has 4.56 M."""
    assert sum(p.numel() for p in MLP(2, (2, 20), 16).parameters()) == 2_281_632


def test_misfits_are_told():
    net = make()
    x, tau, cond = inputs()
    with pytest.raises(ValueError, match="a weight for every step of a chunk: pass its horizon"):
        MLP(2, (2, 5))
    with pytest.raises(ValueError, match=r"built for horizon=6, got chunks of 8 steps; net=unet1d and net=dit take any length"):
        net(inputs(8)[0], tau, cond)
    with pytest.raises(ValueError, match="conditioned on 2 tokens of 5 features; pass cond"):
        net(x, tau)
    with pytest.raises(ValueError, match=r"expected shape \(b, t, d=3\), got \(2, 6, 2\)"):
        net(x[..., :2], tau, cond)
    with pytest.raises(ValueError, match=r"conditioned on 2 tokens of 5 features, got cond.tokens of shape \(2, 3, 5\)"):
        net(x, tau, Cond(torch.zeros(2, 3, 5)))

"""Parts of the backbones: the quick convolution has torch's gradients, the time embedding tells times apart."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from policy.nets.blocks import Conv1d, TimeEmbedding, _ConvQuickGrad

SHAPES = [(2, 3, 4, 16, 5), (3, 4, 2, 7, 3), (1, 1, 1, 1, 5), (2, 5, 3, 2, 5), (4, 2, 6, 4, 3), (2, 3, 3, 3, 5), (1, 2, 2, 5, 1)]  # b, in, out, t, kernel


def arguments(b: int, c_in: int, c_out: int, t: int, kernel: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(b + 10 * t + kernel)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in ((b, c_in, t), (c_out, c_in, kernel), (c_out,))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_quick_gradients_are_those_of_torch(shape, dtype):
    """x, weight and bias; t shorter than the kernel too."""
    args = arguments(*shape, dtype)
    ours, theirs = _ConvQuickGrad.apply(*args, shape[-1] // 2), F.conv1d(*args, padding=shape[-1] // 2)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), args), torch.autograd.grad((theirs * weight).sum(), args), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_quick_gradients_and_their_gradients_are_the_finite_differences():
    for shape in ((2, 3, 2, 4, 5), (2, 2, 3, 2, 3)):
        args = arguments(*shape)
        assert torch.autograd.gradcheck(lambda *a, k=shape[-1]: _ConvQuickGrad.apply(*a, k // 2), args)
        assert torch.autograd.gradgradcheck(lambda *a, k=shape[-1]: _ConvQuickGrad.apply(*a, k // 2), args)


def test_only_what_needs_a_gradient_gets_one():
    x, weight, bias = arguments(2, 3, 4, 8, 5)
    x = x.detach()  # the first layer of a net
    out = _ConvQuickGrad.apply(x, weight, bias, 2)
    for a, b in zip(torch.autograd.grad(out.square().sum(), (weight, bias)),
                    torch.autograd.grad(F.conv1d(x, weight, bias, padding=2).square().sum(), (weight, bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(16, 8, 16, 16, 5), (16, 16, 8, 4, 5), (16, 8, 8, 2, 3)])
def test_autocast_trains_within_bf16_rounding(shape, monkeypatch):
    """In bf16 each gradient is as far from the exact one as torch's own bf16 gradient, give or take half."""
    b, c_in, c_out, t, kernel = shape
    torch.manual_seed(0)
    ours, theirs = Conv1d(c_in, c_out, kernel), nn.Conv1d(c_in, c_out, kernel, padding=kernel // 2)
    theirs.load_state_dict(ours.state_dict())
    x, weight = torch.randn(b, c_in, t), torch.randn(b, c_out, t)
    used = []
    quick = _ConvQuickGrad.apply
    monkeypatch.setattr(_ConvQuickGrad, "apply", lambda *a: (used.append(1), quick(*a))[1])

    def gradients(conv: nn.Module, dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
        conv, inp = conv.to(dtype), x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = conv(inp)
        assert out.dtype == (torch.bfloat16 if autocast else dtype)
        return [g.double() for g in torch.autograd.grad((out.to(dtype) * weight.to(dtype)).sum(), [inp, *conv.parameters()])]

    mine, torchs = gradients(ours, torch.float32, True), gradients(theirs, torch.float32, True)
    assert len(used) == 1
    exact = gradients(theirs, torch.float64, False)
    for a, b_, e in zip(mine, torchs, exact, strict=True):
        error, rounding = (a - e).norm() / e.norm(), (b_ - e).norm() / e.norm()
        assert error < max(1.5 * rounding, 2**-8), (error, rounding)


def test_without_gradients_or_bf16_it_is_torchs_convolution(monkeypatch):
    monkeypatch.setattr(_ConvQuickGrad, "apply", lambda *a: pytest.fail("the training path was taken"))
    conv, x = Conv1d(4, 6, 5), torch.randn(2, 4, 7)
    want = F.conv1d(x, conv.weight, conv.bias, padding=2)
    torch.testing.assert_close(conv(x), want, rtol=0, atol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv(x).float(), want, rtol=0.02, atol=0.02)


def test_the_time_embedding_tells_times_apart():
    """Of 1001 noise times, the ends included, no two have the same features, and neighbours are nearer than strangers."""
    torch.manual_seed(0)
    embed = TimeEmbedding(64)
    seen = []
    embed.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    tau = torch.linspace(0, 1, 1001)
    out = embed(tau)
    assert out.shape == (1001, 64) and out.isfinite().all()
    apart = torch.cdist(seen[0].double(), seen[0].double()) + 99 * torch.eye(1001)
    assert apart.min() > 0.5 and torch.cdist(out, out).add(99 * torch.eye(1001)).min() > 1e-3
    assert apart.diagonal(1).mean() < 0.5 * apart[apart < 50].mean()
    angle = 1000 * torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(32) / 31)  # Vaswani 2017 at position 1000 tau
    torch.testing.assert_close(seen[0][250], torch.cat([(angle / 4).sin(), (angle / 4).cos()]), rtol=0, atol=1e-4)

"""Parts shared by the backbones."""
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from policy.types import Cond

ACTIVATIONS = {"silu": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU}


def activation_of(name: str) -> Any:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class TimeEmbedding(nn.Module):
    """Noise time tau in [0, 1], (b,) -> (b, width): sinusoids of 1000 tau, then a two-layer MLP (Ho 2020)."""

    def __init__(self, width: int, activation: str = "silu"):
        super().__init__()
        half = width // 2
        self.register_buffer("freq", torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1)) * 1000, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, 4 * width), activation_of(activation), nn.Linear(4 * width, width))
        self.freq: Tensor

    def forward(self, tau: Tensor) -> Tensor:
        angle = tau[:, None].float() * self.freq
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


def flat_condition(cond: Cond | None, cond_shape: tuple[int, int]) -> Tensor:
    """cond.flat (b, n*d). ValueError when it is missing or not `cond_shape` = (n, d)."""
    n, d = cond_shape
    if cond is None:
        raise ValueError(f"this net is conditioned on {n} tokens of {d} features; pass cond")
    if tuple(cond.tokens.shape[1:]) != (n, d):
        raise ValueError(f"this net is conditioned on {n} tokens of {d} features, got cond.tokens of shape {tuple(cond.tokens.shape)}")
    return cond.flat


class _ConvQuickGrad(torch.autograd.Function):
    """conv1d of stride 1 and odd kernel whose weight gradient is itself a forward convolution.

    oneDNN's bf16 weight-gradient kernel is slow on short sequences: for 1024 channels, 4 steps, batch 256 it takes 340 ms, this 33.
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        return F.conv1d(x, weight, bias, padding=padding)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.padding = inputs  # type: ignore[attr-defined]
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx, _, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, [1], [ctx.padding], [1], False, [0], 1, [True, False, False])
        # batch and channels change places, so that time is what is summed over; the taps come out in reverse
        dw = F.conv1d(grad.transpose(0, 1), x.transpose(0, 1), padding=ctx.padding).flip(-1)
        return dx, dw, grad.sum((0, 2)), None


class Conv1d(nn.Conv1d):
    """nn.Conv1d of odd kernel, stride 1, "same" padding; faster to train in bf16 on CPUs, the same numbers within bf16 rounding."""

    def __init__(self, c_in: int, c_out: int, kernel: int):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.device.type == "cpu" and self._dtype(x) == torch.bfloat16 and self.bias is not None:
            return _ConvQuickGrad.apply(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16(), self.padding[0])
        return super().forward(x)

    def _dtype(self, x: Tensor) -> torch.dtype:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


class ConvBlock(nn.Module):
    """Conv1d -> GroupNorm -> activation over (b, c, t)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, groups: int, activation: str):
        super().__init__()
        self.conv = Conv1d(c_in, c_out, kernel)
        self.norm = nn.GroupNorm(groups, c_out)
        self.act = activation_of(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class FilmResBlock(nn.Module):
    """Two ConvBlocks with a per-channel scale and bias from the condition between them, and a skip (Perez 2018; Chi 2023).

    The scale is applied as (1 + scale): the block starts as an unconditioned one.
    """

    def __init__(self, c_in: int, c_out: int, c_cond: int, kernel: int, groups: int, activation: str):
        super().__init__()
        self.first = ConvBlock(c_in, c_out, kernel, groups, activation)
        self.second = ConvBlock(c_out, c_out, kernel, groups, activation)
        self.film = nn.Linear(c_cond, 2 * c_out)
        self.skip = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x (b, c, t), cond (b, c_cond) already activated."""
        scale, bias = self.film(cond)[..., None].chunk(2, 1)
        h = torch.addcmul(bias, self.first(x), 1 + scale)
        return self.second(h) + self.skip(x)

"""Parts shared by the backbones."""
import math

import torch
from torch import Tensor, nn

ACTIVATIONS = {"silu": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU}


class TimeEmbedding(nn.Module):
    """Noise time tau in [0, 1], (b,) -> (b, width): sinusoids of 1000 tau, then a two-layer MLP (Ho 2020)."""

    def __init__(self, width: int, activation: str = "silu"):
        super().__init__()
        half = width // 2
        self.register_buffer("freq", torch.exp(-math.log(1e4) * torch.arange(half) / (half - 1)) * 1000, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, 4 * width), ACTIVATIONS[activation](), nn.Linear(4 * width, width))
        self.freq: Tensor

    def forward(self, tau: Tensor) -> Tensor:
        angle = tau[:, None].float() * self.freq
        return self.mlp(torch.cat([angle.sin(), angle.cos()], -1))


class ConvBlock(nn.Module):
    """Conv1d -> GroupNorm -> activation over (b, c, t)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, groups: int, activation: str):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm = nn.GroupNorm(groups, c_out)
        self.act = ACTIVATIONS[activation](inplace=False) if activation != "gelu" else nn.GELU()

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

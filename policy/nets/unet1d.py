"""The 1-D temporal U-Net of Diffuser and Diffusion Policy (Janner 2022, Chi 2023): convolutions over time, FiLM conditioning."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.nets.blocks import ConvBlock, FilmResBlock, TimeEmbedding, activation_of
from policy.types import Cond, shape


class UNet1d(nn.Module):
    """x (b,t,d), tau (b,), cond -> (b,t,d).

    widths: channels of each level; time is halved between levels. Any t works: it is padded at the end (edge value) to a multiple of
    2^(levels-1) and cut again.   cond_shape: tokens and their width; (0, 0) for an unconditional net.
    """

    def __init__(self, action_dim: int, cond_shape: tuple[int, int] = (0, 0), horizon: int | None = None, *,
                 widths: Sequence[int] = (64, 128, 256), kernel: int = 5, groups: int = 8, time_dim: int = 128, activation: str = "silu"):
        super().__init__()
        if any(w % groups for w in widths):
            raise ValueError(f"widths {list(widths)} must be multiples of groups={groups}")
        cond_dim = cond_shape[0] * cond_shape[1]
        self.action_dim, self.cond_dim, self.stride = action_dim, cond_dim, 2 ** (len(widths) - 1)
        self.time = TimeEmbedding(time_dim, activation)
        self.act = activation_of(activation)
        c = time_dim + cond_dim

        def block(i: int, o: int) -> FilmResBlock:
            return FilmResBlock(i, o, c, kernel, groups, activation)

        pairs = list(zip([action_dim, *widths[:-1]], widths, strict=True))
        self.down = nn.ModuleList(nn.ModuleList([block(i, o), block(o, o)]) for i, o in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(w, w, 3, stride=2, padding=1) for w in widths[:-1])
        self.middle = nn.ModuleList([block(widths[-1], widths[-1]), block(widths[-1], widths[-1])])
        self.up = nn.ModuleList(nn.ModuleList([block(2 * o, i), block(i, i)]) for i, o in reversed(pairs[1:]))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(i, i, 4, stride=2, padding=1) for i, _ in reversed(pairs[1:]))
        self.out = nn.Sequential(ConvBlock(widths[0], widths[0], kernel, groups, activation), nn.Conv1d(widths[0], action_dim, 1))

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        _, t, _ = shape(x, "b t d", d=self.action_dim)
        c = self.time(tau)
        if self.cond_dim:
            if cond is None:
                raise ValueError(f"this net is conditioned on {self.cond_dim} features; pass cond")
            if cond.flat.shape[1] != self.cond_dim:
                raise ValueError(f"this net is conditioned on {self.cond_dim} features, got {cond.flat.shape[1]}")
            c = torch.cat([c, cond.flat.to(c.dtype)], -1)
        c = self.act(c)
        h = x.transpose(1, 2)
        if t % self.stride:
            h = F.pad(h, (0, -t % self.stride), mode="replicate")
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            h = _apply(blocks, h, c)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = _apply(self.middle, h, c)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            h = grow(_apply(blocks, torch.cat([h, skips.pop()], 1), c))
        return self.out(h)[..., :t].transpose(1, 2)


def _apply(blocks: nn.Module, h: Tensor, c: Tensor) -> Tensor:
    for block in blocks.children():
        h = block(h, c)
    return h

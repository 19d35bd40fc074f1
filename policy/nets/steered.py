"""The U-Net in two parts: what noise time and condition say to its blocks, which a plan needs once, and the blocks themselves."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.nets.blocks import FilmResBlock
from policy.nets.unet1d import UNet1d
from policy.types import Cond, shape


class Films(nn.Module):
    """All FiLM layers of a UNet1d as one. Noise time and condition enter linear layers through an activation of each number, so each has its own product.

    time (b,) -> (b, f) and cond -> (b, f): their sum steers, f = sum of 2 * channels over the blocks in their order.
    """

    def __init__(self, net: UNet1d, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cond_dim, self.embed, self.act = net.cond_dim, net.time, net.act
        blocks = res_blocks(net)
        self.widths = [b.film.out_features for b in blocks]
        weight = torch.cat([b.film.weight for b in blocks]).detach()
        time_dim = weight.shape[1] - net.cond_dim
        one = torch.cat([(torch.arange(w) < w // 2).to(weight) for w in self.widths]).to(weight.device)  # blocks scale by 1 + theirs
        self.register_buffer("weight_time", weight[:, :time_dim].clone())
        self.register_buffer("bias", torch.cat([b.film.bias for b in blocks]).detach() + one)
        self.register_buffer("weight_cond", weight[:, time_dim:].to(dtype).contiguous())
        self.weight_time: Tensor
        self.bias: Tensor
        self.weight_cond: Tensor

    def time(self, tau: Tensor) -> Tensor:
        return F.linear(self.act(self.embed(tau)), self.weight_time, self.bias)

    def cond(self, cond: Cond | None) -> Tensor:
        flat = None if cond is None else cond.flat
        if flat is None or flat.shape[1] != self.cond_dim:
            raise ValueError(f"this net is conditioned on {self.cond_dim} features, got {0 if flat is None else flat.shape[1]}")
        return F.linear(self.act(flat.float()).to(self.weight_cond.dtype), self.weight_cond)

    def forward(self, tau: Tensor, cond: Cond | None = None) -> Tensor:
        return self.time(tau) + self.cond(cond) if self.cond_dim else self.time(tau)


class SteeredUNet1d(nn.Module):
    """UNet1d.forward with its FiLM layers taken out: x (b,t,d), steer (b,f) as Films gives it -> (b,t,d)."""

    def __init__(self, net: UNet1d):
        super().__init__()
        self.net = net
        self.widths = [b.film.out_features for b in res_blocks(net)]

    def forward(self, x: Tensor, steer: Tensor) -> Tensor:
        net, films = self.net, list(steer[..., None].split(self.widths, 1))
        _, t, _ = shape(x, "b t d", d=net.action_dim)
        h = x.transpose(1, 2)
        if t % net.stride:
            h = torch.cat([h, h[..., -1:].expand(-1, -1, -t % net.stride)], -1)
        skips: list[Tensor] = []
        for level, blocks in enumerate(net.down):
            h = _through(blocks, h, films)
            skips.append(h)
            if level < len(net.shrink):
                h = net.shrink[level](h)
        h = _through(net.middle, h, films)
        for blocks, grow in zip(net.up, net.grow, strict=True):
            h = grow(_through(blocks, torch.cat([h, skips.pop()], 1), films))
        return net.out(h)[..., :t].transpose(1, 2)


def res_blocks(net: UNet1d) -> Sequence[FilmResBlock]:
    """In the order in which they are called."""
    return [b for b in net.modules() if isinstance(b, FilmResBlock)]


def _through(blocks: nn.Module, h: Tensor, films: list[Tensor]) -> Tensor:
    for block in blocks.children():
        assert isinstance(block, FilmResBlock)
        scale, bias = films.pop(0).chunk(2, 1)
        h = block.second(torch.addcmul(bias, block.first(h), scale)) + block.skip(h)
    return h

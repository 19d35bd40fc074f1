"""Networks for planning only, in bf16: about twice as fast where the hardware multiplies it, and within 1 % of the same answers.

On CPUs the U-Net is laid out anew: channels last, every convolution one large matrix product in bf16, the normalisations and activations
between them in fp32, which is the cheapest for them. Its weights are copied once; training goes on with the original.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.nets.blocks import ConvBlock, FilmResBlock
from policy.nets.prefix import Prefix
from policy.nets.steered import Films, res_blocks
from policy.nets.unet1d import UNet1d
from policy.types import Cond, shape


def quick(net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """net(x (b,t,d), tau (b,), cond) in this precision, for inference: FastUNet1d for the U-Net on a CPU, autocast for any other."""
    if isinstance(net, Prefix):
        return Prefix(quick(net.net, dtype))
    on_cpu = next(net.parameters()).device.type == "cpu"
    return FastUNet1d(net, dtype) if isinstance(net, UNet1d) and on_cpu else Autocast(net, dtype)


class Autocast(nn.Module):
    """net in lower precision where that is safe (torch.autocast)."""

    def __init__(self, net: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.net, self.dtype = net, dtype

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        with torch.autocast(x.device.type, self.dtype):
            return self.net(x, tau, cond).to(x.dtype)


class Windows(nn.Module):
    """A convolution over h (b, t, c) as one product: windows of `kernel` steps, `stride` apart, times a (c_out, kernel * c) matrix."""

    def __init__(self, weight: Tensor, bias: Tensor, *, stride: int = 1, dtype: torch.dtype):
        """weight (c_out, c_in, kernel) as nn.Conv1d's, padded by kernel // 2."""
        super().__init__()
        self.kernel, self.stride = weight.shape[-1], stride
        self.register_buffer("weight", weight.detach().transpose(1, 2).flatten(1).to(dtype).contiguous())
        self.register_buffer("bias", bias.detach().to(dtype))
        self.weight: Tensor
        self.bias: Tensor

    def forward(self, h: Tensor) -> Tensor:
        b, t, c = h.shape
        h = h.to(self.weight.dtype)
        if self.kernel > 1:
            h = F.pad(h, (0, 0, self.kernel // 2, self.kernel // 2))  # contiguous: windows that overlap are strides
            t = t // self.stride  # the caller makes it a multiple
            h = h.as_strided((b, t, self.kernel * c), (h.shape[1] * c, self.stride * c, 1))
        return F.linear(h.reshape(b * t, -1), self.weight, self.bias).float().view(b, t, -1)


class Block(nn.Module):
    """ConvBlock: product, GroupNorm, activation."""

    def __init__(self, block: ConvBlock, dtype: torch.dtype):
        super().__init__()
        self.conv, self.norm, self.act = Windows(block.conv.weight, block.conv.bias, dtype=dtype), block.norm, block.act  # type: ignore[arg-type]

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv(h).transpose(1, 2)[:, :, None]  # (b, c, 1, t), channels last in memory, for which torch has a quick GroupNorm
        return self.act(self.norm(h)[:, :, 0].transpose(1, 2))


class Res(nn.Module):
    """FilmResBlock, given its scale and bias (b, 1, 2 * c_out)."""

    def __init__(self, block: FilmResBlock, dtype: torch.dtype):
        super().__init__()
        self.first, self.second, self.width = Block(block.first, dtype), Block(block.second, dtype), block.film.out_features
        self.skip = block.skip if isinstance(block.skip, nn.Identity) else Windows(block.skip.weight, block.skip.bias, dtype=dtype)  # type: ignore[arg-type]

    def forward(self, h: Tensor, film: Tensor) -> Tensor:
        scale, bias = film.chunk(2, -1)
        return self.second(torch.addcmul(bias, self.first(h), scale)) + self.skip(h)


class FastUNet1d(nn.Module):
    """UNet1d's answers, for inference: in fp32 to rounding, in bf16 to about 1 %.   x (b,t,d), tau (b,), cond -> (b,t,d)."""

    def __init__(self, net: UNet1d, dtype: torch.dtype):
        super().__init__()
        self.action_dim, self.stride = net.action_dim, net.stride
        blocks = res_blocks(net)
        fast = {id(b): Res(b, dtype) for b in blocks}

        def level(pair: nn.Module) -> nn.ModuleList:
            return nn.ModuleList(fast[id(b)] for b in pair.children())

        self.down, self.middle, self.up = nn.ModuleList(map(level, net.down)), level(net.middle), nn.ModuleList(map(level, net.up))
        self.shrink = nn.ModuleList(Windows(c.weight, c.bias, stride=2, dtype=dtype) for c in net.shrink)  # type: ignore[arg-type]
        self.grow = nn.ModuleList(Windows(*_doubling(c), dtype=dtype) for c in net.grow)  # type: ignore[arg-type]
        self.last, self.out = Block(net.out[0], dtype), Windows(net.out[1].weight, net.out[1].bias, dtype=torch.float32)  # type: ignore[arg-type]
        self.film = Films(net, dtype)

    def films(self, tau: Tensor, cond: Cond | None) -> list[Tensor]:
        """Scale and bias of every block, (b, 1, 2 * c_out)."""
        same = bool((tau == tau[0]).all())  # as in every sampler
        return list(self.film(tau[:1] if same else tau, cond)[:, None].split(self.film.widths, -1))

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        _, t, _ = shape(x, "b t d", d=self.action_dim)
        films = iter(self.films(tau, cond))
        h = x if t % self.stride == 0 else torch.cat([x, x[:, -1:].expand(-1, -t % self.stride, -1)], 1)
        skips: list[Tensor] = []
        for i, pair in enumerate(self.down):
            h = _through(pair, h, films)
            skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
        h = _through(self.middle, h, films)
        for pair, grow in zip(self.up, self.grow, strict=True):
            h = _through(pair, torch.cat([h, skips.pop()], -1), films)
            h = grow(h).reshape(len(h), 2 * h.shape[1], -1)  # (b, t, even and odd steps) -> (b, 2 t, c)
        return self.out(self.last(h))[:, :t]


def _through(blocks: nn.Module, h: Tensor, films: Iterator[Tensor]) -> Tensor:
    for block in blocks.children():
        h = block(h, next(films))
    return h


def _doubling(conv: nn.ConvTranspose1d) -> tuple[Tensor, Tensor]:
    """ConvTranspose1d of kernel 4, stride 2, padding 1 as a convolution of kernel 3 to even and odd steps.

    out[2i] = w3 x[i-1] + w1 x[i] and out[2i+1] = w2 x[i] + w0 x[i+1].
    """
    w0, w1, w2, w3 = conv.weight.detach().permute(2, 1, 0)  # (c_out, c_in) each
    nothing = torch.zeros_like(w0)
    assert conv.bias is not None
    return torch.cat([torch.stack([w3, w1, nothing], -1), torch.stack([nothing, w2, w0], -1)]), conv.bias.detach().repeat(2)

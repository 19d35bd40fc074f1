"""UNet1d for one chunk at a time, as quick as plain torch allows: every buffer, every view and the FiLM of every noise time are made beforehand.

Activations are (t, c). A convolution is one product of overlapping windows, a strided view of a buffer whose padding stays zero, with a transposed
weight; whatever comes before writes straight into that buffer. On CPUs large weights are packed by oneDNN where torch can: on 4 to 8 steps such a
product takes half the time.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.nets.blocks import ConvBlock, FilmResBlock
from policy.nets.steered import Films
from policy.nets.unet1d import UNet1d
from policy.types import Cond

Film = list[tuple[Tensor, Tensor]]  # scale and bias of every block, (1,c,1,1)
Call = Callable[[Film], Any]
IN_PLACE = {nn.SiLU: partial(F.silu, inplace=True), nn.Mish: partial(F.mish, inplace=True)}
PACK_FROM = 64 * 1024  # numbers in a weight
CAN_PACK = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, op) for op in ("_reorder_linear_weight", "_linear_pointwise"))


class SingleUNet1d:
    """net: fp32, on any device; its weights are copied.   horizon: steps of a chunk.   taus: noise times that will be asked for.

    Write a chunk into x (t,d), call with the number of a noise time, read the answer (t,d) before the next call. For one thread at a time.
    """

    def __init__(self, net: UNet1d, horizon: int, taus: Sequence[float], *, pack: bool = CAN_PACK):
        self.like, self.cond_dim, self.films = next(net.parameters()).detach(), net.cond_dim, Films(net)
        self.pack, self.pad = pack and self.like.device.type == "cpu", _pad(net)
        with torch.no_grad():
            self.times = self.films.time(torch.tensor(list(taus)).to(self.like))
        self.steer = self.times.clone()
        self.film: list[Film] = [[(s[None, :, None, None], b[None, :, None, None]) for s, b in (part.chunk(2) for part in row.split(self.films.widths))]
                                 for row in self.steer]
        self.calls: list[Call] = []
        self.blocks = 0
        self._build(net, horizon)

    def condition(self, cond: Cond | None) -> None:
        """Of one row; it holds until the next."""
        if self.cond_dim:
            torch.add(self.times, self.films.cond(cond), out=self.steer)

    def __call__(self, i: int) -> Tensor:
        film = self.film[i]
        for call in self.calls:
            call(film)
        return self.answer

    def _build(self, net: UNet1d, horizon: int) -> None:
        t = horizon + -horizon % net.stride
        here = self._room(t, net.action_dim)
        self.x = here[self.pad: self.pad + horizon]
        if t > horizon:
            self.calls.append(_copy(here[self.pad + horizon: self.pad + t], here[self.pad + horizon - 1: self.pad + horizon]))
        widths = [w // 2 for w in self.films.widths[1: 2 * len(net.down): 2]]
        joined = [self._room(t >> level, 2 * w) for level, w in enumerate(widths)]  # what comes up from below beside the skip; none at level 0
        for level, (pair, w) in enumerate(zip(net.down, widths, strict=True)):
            below = self._room(t >> level, w)
            self._pair(pair, here, below, *([self._inside(joined[level])[:, w:]] if level else []))
            here = below
            if level < len(net.shrink):
                here = self._room(t >> level + 1, w)
                self._write(self._conv(net.shrink[level], below), here)
        end = joined[-1] if net.up else self._room(t, widths[0])
        self._pair(net.middle, here, end, columns=widths[-1])
        for level, pair, grow in zip(range(len(widths) - 1, 0, -1), net.up, net.grow, strict=True):
            small = self._room(t >> level, widths[level - 1])
            self._pair(pair, end, small)
            end = joined[level - 1] if level > 1 else self._room(t, widths[0])
            self._grow(grow, small, end)
        self._out(net.out, end, horizon)

    def _room(self, t: int, c: int) -> Tensor:
        """(pad + t + pad, c), all zero."""
        return self.like.new_zeros(t + 2 * self.pad, c)

    def _inside(self, room: Tensor) -> Tensor:
        return room[self.pad: len(room) - self.pad]

    def _windows(self, room: Tensor, kernel: int, before: int, stride: int = 1) -> Tensor:
        """Windows of `kernel` steps, `stride` apart, the first beginning `before` steps before the first one inside: (t / stride, kernel * c)."""
        t, c = len(room) - 2 * self.pad, room.shape[1]
        return room.as_strided((t // stride, kernel * c), (stride * c, 1), (self.pad - before) * c)

    def _conv(self, conv: Any, room: Tensor) -> Callable[[], Tensor]:
        """Its answer as a call, (t,c)."""
        weight, bias = conv.weight.detach(), conv.bias.detach().clone()
        windows = self._windows(room, weight.shape[2], weight.shape[2] // 2, conv.stride[0])
        flat = weight.transpose(1, 2).flatten(1)  # (c_out, kernel * c_in)
        if self.pack and flat.numel() >= PACK_FROM:
            return partial(torch.ops.mkldnn._linear_pointwise, windows, torch.ops.mkldnn._reorder_linear_weight(flat, len(windows)), bias, "none", [], "")
        return partial(torch.addmm, bias, windows, flat.t().contiguous(), out=self.like.new_empty(len(windows), len(flat)))

    def _block(self, block: ConvBlock, room: Tensor) -> Callable[[], Tensor]:
        """Convolution, GroupNorm, activation: (1,c,1,t), channels last in memory, for which torch has a quick GroupNorm."""
        conv, norm, act = self._conv(block.conv, room), block.norm, IN_PLACE.get(type(block.act), block.act)
        groups, weight, bias, eps = norm.num_groups, norm.weight.detach().clone(), norm.bias.detach().clone(), norm.eps
        t, c = len(room) - 2 * self.pad, len(weight)
        size, stride = (1, c, 1, t), (c * t, 1, c * t, c)

        def call() -> Tensor:
            return act(torch.group_norm(conv().as_strided(size, stride), groups, weight, bias, eps))
        return call

    def _res(self, block: FilmResBlock, room: Tensor, into: Tensor) -> None:
        """FilmResBlock from room into (t,c)."""
        n, self.blocks = self.blocks, self.blocks + 1
        middle = self._room(len(room) - 2 * self.pad, block.film.out_features // 2)
        first, second = self._block(block.first, room), self._block(block.second, middle)
        between, end, kept = _wide(self._inside(middle)), _wide(into), _wide(self._inside(room))
        skip = None if isinstance(block.skip, nn.Identity) else self._conv(block.skip, room)

        def call(film: Film) -> None:
            scale, bias = film[n]
            torch.addcmul(bias, first(), scale, out=between)
            torch.add(second(), kept if skip is None else _wide(skip()), out=end)
        self.calls.append(call)

    def _pair(self, blocks: Any, room: Tensor, into: Tensor, *also: Tensor, columns: int | None = None) -> None:
        """Two blocks from room into the first columns of a room, and copies of that."""
        first, second = blocks.children()
        between, end = self._room(len(room) - 2 * self.pad, first.film.out_features // 2), self._inside(into)[:, :columns]
        self._res(first, room, self._inside(between))
        self._res(second, between, end)
        self.calls += [_copy(other, end) for other in also]

    def _write(self, call: Callable[[], Tensor], room: Tensor) -> None:
        inside = self._inside(room)
        self.calls.append(lambda film: inside.copy_(call()))

    def _grow(self, conv: Any, room: Tensor, into: Tensor) -> None:
        """Kernel 4, stride 2, padding 1: out[2i] = w3 x[i-1] + w1 x[i] and out[2i+1] = w2 x[i] + w0 x[i+1]."""
        w0, w1, w2, w3 = conv.weight.detach().unbind(2)  # (c_in, c_out) each
        bias = conv.bias.detach().clone()
        for weight, before, out in ((torch.cat([w3, w1]), 1, 0), (torch.cat([w2, w0]), 0, 1)):
            self.calls.append(_drop(partial(torch.addmm, bias, self._windows(room, 2, before), weight, out=self._inside(into)[out::2, : len(bias)])))

    def _out(self, out: Any, room: Tensor, horizon: int) -> None:
        block, linear = self._block(out[0], room), out[1]
        weight, bias = linear.weight.detach()[..., 0].t().contiguous(), linear.bias.detach().clone()
        answer = self.like.new_empty(len(room) - 2 * self.pad, len(bias))
        self.calls.append(lambda film: torch.addmm(bias, block()[0, :, 0].t(), weight, out=answer))
        self.answer = answer[:horizon]


def _pad(net: UNet1d) -> int:
    """Empty steps on either side of a buffer: enough for its convolutions, of kernel 3 at least."""
    out: Any = net.out
    return max(int(out[0].conv.padding[0]), 1)


def _wide(x: Tensor) -> Tensor:
    """(t,c) -> (1,c,1,t) of the same memory."""
    return x.t()[None, :, None]


def _copy(into: Tensor, source: Tensor) -> Call:
    return lambda film: into.copy_(source)


def _drop(call: Callable[[], Any]) -> Call:
    return lambda film: call()

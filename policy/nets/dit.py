"""A diffusion transformer over action tokens: self-attention, cross-attention to the condition tokens, adaptive norm (Peebles 2023, Chi 2023)."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.nets.blocks import TimeEmbedding, activation_of, flat_condition
from policy.types import Cond, shape


class DiT(nn.Module):
    """x (b,t,d), tau (b,), cond -> (b,t,d). Any t works.

    patch: action steps joined in one token; t is padded at the end (edge value) to a multiple and cut again.   causal: an action sees itself and
    those before it only; needs patch=1.   cond_shape: tokens and their width; (0, 0) for an unconditional net. Absent tokens are not attended
    to; a learned token always is, so that all may be absent.   The noise time and all condition tokens together steer shift, scale and gate of
    every branch; gates and output start at 0.
    """

    def __init__(self, action_dim: int, cond_shape: tuple[int, int] = (0, 0), horizon: int | None = None, *, width: int = 128, layers: int = 4,
                 heads: int = 4, ratio: int = 4, patch: int = 1, causal: bool = False, activation: str = "gelu"):
        super().__init__()
        if patch < 1 or layers < 0:
            raise ValueError(f"patch={patch} and layers={layers} must be at least 1 and 0")
        if width < 1 or heads < 1:
            raise ValueError(f"width={width} and heads={heads} must be at least 1")
        if width % (2 * heads):
            raise ValueError(f"width {width} must be a multiple of 2 * heads = {2 * heads}")
        if causal and patch > 1:
            raise ValueError(f"causal=True needs patch=1: the {patch} actions of one token would see each other")
        tokens, features = cond_shape
        self.action_dim, self.cond_shape, self.patch, self.causal = action_dim, (tokens, features), patch, causal
        self.time = TimeEmbedding(width)
        self.read = nn.Linear(patch * action_dim, width)
        if tokens:
            self.pool = nn.Sequential(nn.Linear(tokens * features, width), nn.SiLU(), nn.Linear(width, width))
            self.look = nn.Linear(features, width)
            self.which = nn.Parameter(torch.randn(tokens, width))  # without it the order of observations would not count
            self.null = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads, ratio, activation, cross=tokens > 0) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate, self.write = _zero(nn.Linear(width, 2 * width)), _zero(nn.Linear(width, patch * action_dim))

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        _, t, _ = shape(x, "b t d", d=self.action_dim)
        c, context, mask = self.time(tau), None, None
        if self.cond_shape[0]:
            c = c + self.pool(flat_condition(cond, self.cond_shape))
            context, mask = self.context(cond)  # type: ignore[arg-type]
        c = F.silu(c)[:, None]
        if t % self.patch:
            x = torch.cat([x, x[:, -1:].expand(-1, -t % self.patch, -1)], 1)
        h = self.read(x.unflatten(1, (-1, self.patch)).flatten(2))
        h = h + sinusoids(h.shape[1], h)
        for block in self.blocks:
            h = block(h, c, context, mask, self.causal)
        shift, scale = self.modulate(c).chunk(2, -1)
        return self.write(torch.addcmul(shift, self.norm(h), 1 + scale)).unflatten(-1, (self.patch, -1)).flatten(1, 2)[:, :t]

    def context(self, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """What actions attend to, (b, n+1, width), and which of it is there, (b, 1, 1, n+1) or None for all."""
        tokens = self.look(cond.tokens) + self.which
        context = F.layer_norm(torch.cat([tokens, self.null.to(tokens).expand(len(tokens), 1, -1)], 1), self.null.shape)
        return context, None if cond.mask is None else F.pad(cond.mask, (0, 1), value=True)[:, None, None]


class Block(nn.Module):
    """Self-attention, cross-attention and a two-layer MLP, each after a LayerNorm with shift and scale from c (b, 1, width), each gated."""

    def __init__(self, width: int, heads: int, ratio: int, activation: str, *, cross: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attend = Attention(width, heads)
        self.look = Attention(width, heads) if cross else None
        self.mlp = nn.Sequential(_xavier(nn.Linear(width, ratio * width)), activation_of(activation), _xavier(nn.Linear(ratio * width, width)))
        self.modulate = _zero(nn.Linear(width, (9 if cross else 6) * width))

    def forward(self, h: Tensor, c: Tensor, context: Tensor | None, mask: Tensor | None, causal: bool) -> Tensor:
        steer = self.modulate(c).chunk(self.modulate.out_features // h.shape[-1], -1)
        y = self.tuned(h, *steer[:2])
        h = torch.addcmul(h, steer[2], self.attend(y, y, causal=causal))
        if self.look is not None and context is not None:
            h = torch.addcmul(h, steer[-1], self.look(self.tuned(h, *steer[6:8]), context, mask))
        return torch.addcmul(h, steer[5], self.mlp(self.tuned(h, *steer[3:5])))

    def tuned(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return torch.addcmul(shift, self.norm(h), 1 + scale)


class Attention(nn.Module):
    """Multi-head attention of h (b, t, width) to context (b, n, width); mask (b, 1, 1, n), False where nothing is to be seen."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key_value, self.out = (_xavier(nn.Linear(width, n * width)) for n in (1, 2, 1))

    def forward(self, h: Tensor, context: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(h), *self.key_value(context).chunk(2, -1)))
        return self.out(_attend(q, k, v, mask, causal).transpose(1, 2).flatten(2))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # torch's gradient of 16 bf16 tokens takes 13 ms on CPUs, of fp32 ones 1
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=causal).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def sinusoids(n: int, like: Tensor) -> Tensor:
    """Positions 0 … n-1 as sines and cosines of wavelengths 2 pi … 20000 pi, (n, width of like) (Vaswani 2017)."""
    half = like.shape[-1] // 2
    angle = torch.arange(n, device=like.device)[:, None] * torch.exp(-math.log(1e4) * torch.arange(half, device=like.device) / half)
    return torch.cat([angle.sin(), angle.cos()], -1).to(torch.float32 if like.dtype == torch.bfloat16 else like.dtype)


def _xavier(linear: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear

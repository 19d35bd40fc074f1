"""A residual MLP over the whole chunk at once: the plainest backbone, and the quickest."""
import torch
from torch import Tensor, nn

from policy.nets.blocks import TimeEmbedding, activation_of, flat_condition
from policy.types import Cond, shape


class MLP(nn.Module):
    """x (b,t,d), tau (b,), cond -> (b,t,d), for t = horizon alone.

    Chunk and condition enter flattened; noise time and condition scale and shift every layer too. The output starts at 0.
    """

    def __init__(self, action_dim: int, cond_shape: tuple[int, int] = (0, 0), horizon: int | None = None, *, width: int = 512, layers: int = 3,
                 time_dim: int = 128, activation: str = "silu"):
        super().__init__()
        if horizon is None:
            raise ValueError("net=mlp has a weight for every step of a chunk: pass its horizon")
        if width < 1 or layers < 1:
            raise ValueError(f"width={width} and layers={layers} must be at least 1")
        self.action_dim, self.cond_shape, self.horizon = action_dim, (cond_shape[0], cond_shape[1]), horizon
        cond_dim = cond_shape[0] * cond_shape[1]
        self.time = TimeEmbedding(time_dim, activation)
        self.act = activation_of(activation)
        self.read = nn.Linear(horizon * action_dim + cond_dim, width)
        self.blocks = nn.ModuleList(FilmMlp(width, time_dim + cond_dim, activation) for _ in range(layers))
        self.norm, self.write = nn.LayerNorm(width), nn.Linear(width, horizon * action_dim)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        _, t, _ = shape(x, "b t d", d=self.action_dim)
        if t != self.horizon:
            raise ValueError(f"this MLP was built for horizon={self.horizon}, got chunks of {t} steps; net=unet1d and net=dit take any length")
        c, h = self.time(tau), x.flatten(1)
        if self.cond_shape[0]:
            seen = flat_condition(cond, self.cond_shape)
            c, h = torch.cat([c, seen.to(c.dtype)], -1), torch.cat([h, seen.to(h.dtype)], -1)
        c, h = self.act(c), self.read(h)
        for block in self.blocks:
            h = block(h, c)
        return self.write(self.act(self.norm(h))).unflatten(1, (t, -1))


class FilmMlp(nn.Module):
    """Two linear layers around a skip, (b, width); the normalised input is scaled by (1 + scale) and shifted, both linear in the condition."""

    def __init__(self, width: int, c_cond: int, activation: str):
        super().__init__()
        self.norm, self.film = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(c_cond, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), activation_of(activation), nn.Linear(width, width))

    def forward(self, h: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond).chunk(2, -1)
        return h + self.mlp(torch.addcmul(shift, self.norm(h), 1 + scale))

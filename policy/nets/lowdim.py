"""Low-dimensional observations as condition tokens."""
import torch
from torch import Tensor, nn

from policy.types import Cond, Obs


class LowDim(nn.Module):
    """Observations {key: (b, t_obs, *shape)} -> one token per observed step, all keys flattened and joined in the order of `obs`.

    width: 0 passes the numbers through; otherwise a two-layer MLP of that width per step.
    """

    def __init__(self, obs: dict[str, tuple[int, ...]], t_obs: int, *, width: int = 0):
        super().__init__()
        self.keys = list(obs)
        features = sum(torch.Size(s).numel() for s in obs.values())
        self.tokens, self.dim = t_obs, width or features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width)) if width else nn.Identity()

    def forward(self, obs: Obs) -> Cond:
        x: Tensor = torch.cat([obs[k].reshape(*obs[k].shape[:2], -1).float() for k in self.keys], -1)
        return Cond(self.mlp(x))

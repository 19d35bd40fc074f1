"""Tiny planners of every backbone for what exports and plans fast."""
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from policy.data.normalize import Normalizer
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import clip
from policy.diffusion.path import Cosine, Path
from policy.nets.dit import DiT
from policy.nets.lowdim import LowDim
from policy.nets.mlp import MLP
from policy.nets.prefix import Prefix
from policy.nets.unet1d import UNet1d
from policy.planner import Planner
from policy.types import Spec

NETS = {"unet1d": partial(UNet1d, widths=(8, 16), groups=4, time_dim=16), "dit": partial(DiT, width=16, layers=1, heads=2, patch=2),
        "mlp": partial(MLP, width=16, layers=1, time_dim=16)}
ACTIONS, T_OBS = 3, 2
OBS = {"x": (4,), "wrist.force": (2, 1)}


def small(net: str = "unet1d", horizon: int = 7, *, path: Path | None = None, target: str = "v", rtc: int = 0, width: int = 0, limits: Sequence[float] = (1.0,),
          **options) -> Planner:
    """Weights, norms and scalings are random, so that a swapped or forgotten one would show."""
    torch.manual_seed(0)
    spec = Spec(OBS, ACTIONS, T_OBS, horizon, 10.0, task="toy", units={"action": "rad"})
    encoder = LowDim(spec.obs, T_OBS, width=width)
    made: torch.nn.Module = NETS[net](ACTIONS + bool(rtc), (encoder.tokens, encoder.dim), horizon)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)
    normalizer = Normalizer({**OBS, "action": (ACTIONS,)})
    for b in normalizer.buffers():
        b.copy_(torch.rand_like(b) + 0.5)
    planner = Planner(spec, normalizer, encoder, Denoiser(Prefix(made) if rtc else made, path or Cosine(), target), rtc=rtc,
                      guides=[partial(clip, limit=limit) for limit in limits], **{"steps": 4, **options})
    return planner.eval().requires_grad_(False)


def asked(horizon: int = 7, seed: int = 0, known: int = 5) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """An observation, noise and promised actions."""
    rng = np.random.default_rng(seed)
    obs = {k: rng.standard_normal((T_OBS, *size), np.float32) for k, size in OBS.items()}
    return obs, rng.standard_normal((horizon, ACTIONS), np.float32), 1 + 0.5 * rng.standard_normal((known, ACTIONS), np.float32)

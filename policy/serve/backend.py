"""A trained planner as policy.serve.card.Backend: one robot's observation in, one chunk out, numpy on both sides."""
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policy.data.statistics import PHYSICAL
from policy.planner import Planner
from policy.serve.card import Card
from policy.timeline import MERGES


class PlannerBackend:
    """planner: its sampler and guides as they are to be served.   config: what it was built from, part of the model's name.   facts: where it comes from.

    joints, joint_units: of the action dimensions, where they are known.   warm, limit, prior: as in Planner.plan.

    Make it before the network is replaced by a quicker one of the same answers, which is the same model.
    """

    def __init__(self, planner: Planner, config: Mapping[str, Any] | None = None, *, facts: Mapping[str, Any] | None = None,
                 joints: Sequence[str] = (), joint_units: Sequence[str] = (), warm: float | None = None, limit: float = 5.0, prior: float = 1.0):
        self.planner, self.warm, self.limit, self.prior = planner.eval().requires_grad_(False), warm, limit, prior
        self.device = next(planner.normalizer.buffers()).device
        spec = planner.spec
        name = model_id(planner, {"planner": dict(config or {}), "spec": spec.to_json()})
        low, high = seen_range(planner)
        merges = tuple(m for m in MERGES if m != "prefix" or planner.rtc)
        self.card = Card(name, spec.task, dict(spec.obs), spec.t_obs, spec.horizon, spec.action_dim, 1 / spec.fps, dict(spec.units), spec.action_semantics,
                         merges, planner.rtc or spec.horizon - 1, tuple(joints), tuple(joint_units), low, high, dict(facts or {}),
                         noise_dim=planner.size[1] if planner.size[1] != spec.action_dim else 0)

    @torch.inference_mode()
    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        """See Backend. With noise the whole plan is fixed, whatever the sampler draws in between."""
        seen = {k: self._tensor(obs[k]) for k in self.planner.spec.obs}
        promised = None if prefix is None or not len(prefix) else self._tensor(prefix)
        start = None if noise is None else self._tensor(noise)
        plan = self.planner.plan(seen, noise=start, prefix=promised, committed=None if promised is None else committed, merge=merge, warm=self.warm,
                                 limit=self.limit, prior=self.prior, draw=drawing(noise))
        return plan[0].float().cpu().numpy()

    def _tensor(self, x: np.ndarray) -> Tensor:
        """(…) -> (1, …) float32 on the planner's device."""
        return torch.from_numpy(np.array(x, np.float32))[None].to(self.device)


def drawing(noise: np.ndarray | None) -> Any:
    """What a stochastic sampler draws: by chance, or as `noise` determines."""
    if noise is None:
        return torch.randn_like
    seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(noise, np.float32).tobytes()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator).to(like)


def model_id(model: nn.Module, config: Mapping[str, Any]) -> str:
    """16 hex digits that stand for all weights, of every name and type, and the configuration."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        x = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def seen_range(planner: Planner) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Actions that the normaliser maps to -1 and 1: the range of the demonstrations, or a standard deviation around their mean where it measured that."""
    key = PHYSICAL if PHYSICAL in planner.normalizer.shapes else "action"
    unit = torch.ones(1, 1, planner.spec.action_dim, device=next(planner.normalizer.buffers()).device)
    low, high = (planner.normalizer.decode({key: sign * unit})[key].flatten().tolist() for sign in (-1, 1))
    return tuple(low), tuple(high)

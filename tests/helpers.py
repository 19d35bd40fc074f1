"""Small real parts for tests: a synthetic dataset on disk and a planner that trains in seconds."""
from pathlib import Path

import numpy as np
import torch

from policy.data.normalize import Normalizer
from policy.data.store import Store
from policy.data.windows import TrajectoryDataset
from policy.planner import Planner
from policy.train import checkpoint
from policy.types import Spec

CONFIG = {
    "encoder": {"_target_": "policy.nets.lowdim.LowDim", "width": 0},
    "net": {"_target_": "policy.nets.unet1d.UNet1d", "widths": [8, 16], "groups": 4, "time_dim": 16},
    "schedule": {"_target_": "policy.diffusion.path.Cosine"},
    "denoiser": {"target": "v"},
    "sampler": {"fn": {"_target_": "policy.diffusion.samplers.first_order", "_partial_": True}, "steps": 5, "spacing": "trailing"},
    "guides": {"clip": {"_target_": "policy.diffusion.guides.clip", "_partial_": True, "limit": 1.0}},
    "padding_loss": False,
}


def make_store(path: Path, episodes: int = 6, steps: int = 20, bad: float | None = None) -> Store:
    """Episodes of x (3,) and action (2,) = first two of x, slowly moving; `bad` is written into one action."""
    rng = np.random.default_rng(0)
    store = Store.create(path, {"x": ((3,), "float32"), "action": ((2,), "float32")}, fps=10, units={"x": "m", "action": "m"})
    for e in range(episodes):
        x = (np.sin(np.arange(steps)[:, None] * 0.2 + rng.uniform(0, 6, 3)) + 5).astype(np.float32)
        action = x[:, :2].copy()
        if bad is not None and e == 3:
            action[7, 1] = bad
        store.append({"x": x, "action": action})
    return Store.open(path)


def make_data(store: Store, split: str = "train", **options) -> TrajectoryDataset:
    return TrajectoryDataset(store, {"x": "x"}, "action", t_obs=2, horizon=8, split=split, val_ratio=0.2, **options)


def make_planner(data: TrajectoryDataset, config: dict = CONFIG, seed: int = 0) -> Planner:
    torch.manual_seed(seed)
    spec = Spec(obs={"x": (3,)}, action_dim=2, t_obs=2, horizon=8, fps=10, task="toy")
    return checkpoint.build(config, spec, Normalizer.fit(data.arrays))

"""Which episodes are trained on and which are held out: whole ones, by a permutation from a seed. No torch, so that validation asks the same."""
import numpy as np


def split_episodes(n: int, split: str, *, val_ratio: float, seed: int, max_episodes: int | None) -> list[int]:
    """Sorted episode ids of a split of n episodes. ValueError when the split is unknown or holds none."""
    if split not in ("train", "val", "all"):
        raise ValueError(f"split {split!r} is unknown; use one of train, val, all")
    if not 0 <= val_ratio < 1:
        raise ValueError(f"val_ratio is a share of the episodes in [0, 1), got {val_ratio}")
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes is at least 1 or None for all, got {max_episodes}")
    order = np.random.default_rng(seed).permutation(n)
    n_val = min(max(1, round(n * val_ratio)), n - 1) if val_ratio > 0 and n >= 2 else 0
    train, val = order[n_val:][:max_episodes], order[:n_val]
    chosen = {"train": train, "val": val, "all": np.concatenate([train, val])}[split]
    if not len(chosen):
        raise ValueError(f"split {split!r} is empty: {n} episodes, val_ratio={val_ratio}. "
                         "Use val_ratio > 0 and at least 2 episodes, or split=train")
    return sorted(chosen.tolist())

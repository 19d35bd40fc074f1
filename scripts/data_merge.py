"""One dataset of several: dipole data merge src=[a.zarr,b.zarr] dst=both.zarr."""
from omegaconf import DictConfig

from policy.data.edit import merge
from policy.page import counted
from policy.train.log import console
from scripts.settings import plain
from scripts.verb import verb


@verb("data_merge")
def start(cfg: DictConfig) -> None:
    src = plain(cfg)["src"]
    made = merge([src] if isinstance(src, str) else src, cfg.dst, missing=cfg.missing)
    line = f"{len(src)} datasets: {counted(made.episodes, 'episode')}, {counted(made.steps, 'step')} -> {made.path}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)

"""Several datasets of one, by whole episodes: dipole data split src=a.zarr dst=[train.zarr,val.zarr] ratio=0.9."""
from omegaconf import DictConfig

from policy.data.edit import split
from policy.page import counted
from policy.train.log import console
from scripts.settings import plain, whole
from scripts.verb import verb


@verb("data_split")
def start(cfg: DictConfig) -> None:
    whole(0, seed=cfg.seed)
    d = plain(cfg)
    dsts = [d["dst"]] if isinstance(d["dst"], str) else d["dst"]
    for made in split(d["src"], dsts, ratio=d["ratio"], episodes=d["episodes"], seed=d["seed"], missing=d["missing"]):
        console.print(f"{counted(made.episodes, 'episode')}, {counted(made.steps, 'step')} -> {made.path}", highlight=False, soft_wrap=True, markup=False)

"""What is in a dataset, as a table and a picture: dipole data info path=demos/gantry.zarr."""
from pathlib import Path

from omegaconf import DictConfig

from policy.data.draw import describe, draw
from policy.data.store import Store
from policy.train.log import console
from scripts.verb import verb


def info(path: str, out: str | None, missing: str = "error") -> Path:
    store = Store.open(path, missing=missing)
    console.print(describe(store), highlight=False, markup=False)
    picture = Path(out or (f"{path.rstrip('/')}.png" if store.local else f"{store.path.name}.png"))
    draw(store, picture)
    return picture


@verb("data_info")
def start(cfg: DictConfig) -> None:
    console.print(f"picture: {info(cfg.path, cfg.out, cfg.missing)}", highlight=False, soft_wrap=True)

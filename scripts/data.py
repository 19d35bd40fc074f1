"""Look at a dataset and draw it: dipole data info path=demos/gantry.zarr."""
import sys
from pathlib import Path

from omegaconf import DictConfig

from policy.data.draw import describe, draw
from policy.data.store import Store
from policy.train.log import console
from scripts.cli import words_to_overrides
from scripts.verb import verb


def info(path: str, out: str | None) -> Path:
    store = Store.open(path)
    console.print(describe(store), highlight=False, markup=False)
    picture = Path(out or f"{path.rstrip('/')}.png")
    draw(store, picture)
    return picture


@verb("data")
def main(cfg: DictConfig) -> None:
    if cfg.do != "info":
        raise ValueError(f"dipole data {cfg.do} is unknown; use: dipole data info path=…")
    console.print(f"picture: {info(cfg.path, cfg.out)}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

"""Range, mean, spread and quantiles of every channel: dipole data stats path=a.zarr out=stats.json."""
from pathlib import Path

from omegaconf import DictConfig

from policy.data.store import Store
from policy.data.summary import stats, table
from policy.page import save_json
from policy.train.log import console
from scripts.settings import plain
from scripts.verb import verb


@verb("data_stats")
def start(cfg: DictConfig) -> None:
    d = plain(cfg)
    store = Store.open(d["path"], missing=d["missing"])
    found = stats(store, d["keys"], d["quantiles"])
    console.print(table(found), highlight=False, soft_wrap=True, markup=False)
    if d["out"]:
        save_json(Path(d["out"]), found)
        console.print(f"written: {d['out']}", highlight=False, soft_wrap=True)

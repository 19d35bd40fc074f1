"""A dataset without some episodes, steps or keys: dipole data trim src=a.zarr dst=b.zarr drop=[3,7] idle.where=both."""
from omegaconf import DictConfig

from policy.data.edit import Idle, trim
from policy.page import counted
from policy.train.log import console
from scripts.settings import listed, number, plain, whole
from scripts.verb import verb


@verb("data_trim")
def start(cfg: DictConfig) -> None:
    whole(1, shortest=cfg.shortest)
    d = plain(cfg)
    if d["steps"] is not None and (not isinstance(d["steps"], list) or len(d["steps"]) != 2):
        raise ValueError(f"steps={d['steps']} must be [first,end], as python slices: steps=[10,null] leaves out the first ten, steps=[0,-5] the last five")
    idle = d["idle"]
    number(0, **{"idle.still": idle["still"]})
    whole(0, **{"idle.margin": idle["margin"]})
    keep = None if d["keep"] is None else listed(d["keep"])
    made, said = trim(d["src"], d["dst"], drop=listed(d["drop"]), keep=keep, steps=d["steps"], idle=Idle(**idle) if idle["where"] else None,
                      drop_keys=listed(d["drop_keys"]), shortest=d["shortest"], missing=d["missing"])
    lines = [*said, f"{counted(made.episodes, 'episode')}, {counted(made.steps, 'step')} -> {made.path}"]
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)

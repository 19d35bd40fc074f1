"""One episode as a page to scrub through, findings marked: dipole data view path=demos/gantry.zarr episode=3."""
import math
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig

from policy.data.files import where
from policy.data.rerun import write_rrd
from policy.data.store import Store
from policy.data.validate import check
from policy.data.view import view
from policy.train.log import console
from scripts.data_validate import beside, opened
from scripts.settings import plain, truth, whole
from scripts.verb import verb


@verb("data_view")
def start(cfg: DictConfig) -> None:
    whole(0, episode=cfg.episode)
    truth(findings=cfg.findings)
    if cfg.fps is not None and not (type(cfg.fps) in (int, float) and 0 < cfg.fps < math.inf):
        raise ValueError(f"fps={cfg.fps} must be a rate in Hz above 0")
    d = plain(cfg)
    path, episode, form, findings = where(d.pop("path")), d.pop("episode"), d.pop("as"), d.pop("findings")
    missing = d.pop("missing")
    if form not in ("html", "rerun"):
        raise ValueError(f"as={form!r} is unknown; use html or rerun")
    with ExitStack() as stack:
        store = Store.open(opened(path, d.pop("format"), d.pop("mapping"), d["fps"], stack, missing), missing=missing)
        out = Path(d.pop("out") or f"{beside(path)}.episode{episode}.{'html' if form == 'html' else 'rrd'}")
        if form == "rerun":
            write_rrd(store, episode, out, **d)
        else:
            view(store, episode, out, check(store, **d).findings if findings else (), **d)
    console.print(f"open {out}", highlight=False, soft_wrap=True)

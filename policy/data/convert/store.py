"""a dataset of our own, read to be made anew: other names, another rate, other words for what its numbers mean."""
from pathlib import Path

from policy.data.convert.source import Source
from policy.data.files import DataError, Url
from policy.data.semantics import Semantics
from policy.data.store import Store

OWN = ("fps", "units", "action_semantics", "action", "obs", "source")  # attributes that convert writes itself


def detects(path: Path) -> bool:
    """Whether dipole wrote it; others' zarr is a format of its own."""
    try:
        return (isinstance(path, Url) or path.exists()) and "action_semantics" in Store.open(path).attrs
    except DataError:
        return False


def read(path: Path, *, missing: str = "error") -> Source:
    store = Store.open(path, missing=missing)
    meant = {"text": store.action_semantics or "", **{k: v for k, v in (store.attrs.get("action") or {}).items() if v or k != "text"}}
    return Source(path, "store", store.schema, lambda: (store.episode(i) for i in range(store.episodes)), store.episodes, fps=store.fps, units=store.units,
                  action="action" if "action" in store.keys else None, semantics=Semantics.from_json(meant), obs=store.attrs.get("obs"),
                  attrs={k: v for k, v in store.attrs.items() if k not in OWN})

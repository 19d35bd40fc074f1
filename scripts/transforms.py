"""What `transform=…` leaves open, filled in from the dataset that is trained on."""
from math import prod
from typing import Any

from omegaconf import DictConfig

from policy.data.meaning import Known, complete
from policy.data.semantics import Semantics
from policy.data.sources import Entry
from policy.data.windows import Field, TrajectoryDataset
from scripts.settings import plain


def completed(cfg: DictConfig, data: TrajectoryDataset, first: Entry) -> dict[str, dict[str, Any]]:
    """Node transform with every argument said, {name: {_target_: …}}. ValueError says what the dataset, the first of several, does not tell."""
    nodes, about = plain(cfg.transform) or {}, plain(cfg.data)
    if not nodes:
        return {}
    store, action = first.store, Field.of(first.action)
    fields = {name: Field.of(f) for name, f in first.obs.items()}
    seen = {name: (f.key, None if f.take is None else list(f.take)) for name, f in fields.items()}
    stored = {} if action.take is not None else store.attrs.get("action") or {}  # which is about all channels
    said = Semantics.from_json({**stored, **(about.get("semantics") or {})})

    def limits() -> tuple[list[float], list[float]]:
        actions = data.arrays["action"]
        return actions.amin(0).tolist(), actions.amax(0).tolist()
    widths = {key: prod(shape) for key, (shape, _) in store.schema.items()}
    return complete(nodes, Known.of(said, data.shapes["action"][0], seen, limits, str(store.path), widths))

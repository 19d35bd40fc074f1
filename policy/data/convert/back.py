"""What the writers of other formats share: a store's episodes under the names, shapes and dtypes they came with."""
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert.keep import read_keep
from policy.data.convert.plan import NO_OBSERVATION
from policy.data.convert.source import Episode
from policy.data.files import DataError
from policy.data.store import BLOCK_BYTES, Schema, Store


def observed(store: Store) -> list[str]:
    """The stored keys that a policy observes by default."""
    said = store.attrs.get("obs")
    if said:
        return list(dict.fromkeys(s if isinstance(s, str) else s["key"] for s in (said.values() if isinstance(said, dict) else said)))
    return [k for k in store.keys if not NO_OBSERVATION.fullmatch(k)]


def inside(folder: Path, name: Any) -> Path:
    """folder/name.   DataError when a store that a stranger made names a file elsewhere."""
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise DataError(f"what the store keeps of its source names a file {name!r}, which is no plain name: it is not written. "
                        "Is the store from a source you trust?")
    return folder / name


@dataclass
class Origin:
    """names {stored key: name in the format}; schema of what is written, under those names; keep of the source.

    came: whether the store was converted from this very format, so that names and keep are those it had.   notes: stored keys that are not written, and why.
    """
    store: Store
    came: bool
    names: dict[str, str]
    schema: Schema
    keep: dict[str, Any]
    empty: Schema
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, store: Store, format: str, *, obs: str = "", action: str = "action") -> "Origin":
        """obs: goes before the names of a store that came from elsewhere, all but the action, which is called `action`."""
        info = store.attrs.get("source") or {}
        came = info.get("format") == format
        back = {stored: name for name, stored in info.get("keys", {}).items()} if came else {}
        names = {k: back[k] for k in store.keys if k in back} if came else {k: action if k == "action" else obs + k for k in store.keys}
        notes = [f"{k} was made by the conversion, not by the source, and is not written back" for k in store.keys if k not in names]
        dtypes = info.get("dtypes", {}) if came else {}
        schema = {names[k]: (shape, np.dtype(dtypes.get(names[k], dtype))) for k, (shape, dtype) in store.schema.items() if k in names}
        empty = {k: (tuple(s), np.dtype(d)) for k, (s, d) in info.get("empty", {}).items()} if came else {}
        return cls(store, came, names, schema, read_keep(store) if came else {}, empty, notes)

    def episode(self, i: int) -> Episode:
        """{name: (n, *shape)} of episode i, keys of no channels included."""
        lo, hi = self.store.span(i)
        found = {name: self.store.read(key, lo, hi).astype(self.schema[name][1], copy=False) for key, name in self.names.items()}
        return {**found, **{name: np.zeros((hi - lo, *shape), dtype) for name, (shape, dtype) in self.empty.items()}}

    def episodes(self) -> Iterator[Episode]:
        """All of them in order; short ones are read together, which is several times as fast."""
        frame = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.store.schema.values())
        spans = [self.store.span(i) for i in range(self.store.episodes)]
        i = 0
        while i < len(spans):
            j = i + 1
            while j < len(spans) and (spans[j][1] - spans[i][0]) * frame <= BLOCK_BYTES:
                j += 1
            start = spans[i][0]
            block = {key: self.store.read(key, start, spans[j - 1][1]).astype(self.schema[name][1], copy=False) for key, name in self.names.items()}
            for lo, hi in spans[i:j]:
                yield {**{name: block[key][lo - start:hi - start] for key, name in self.names.items()},
                       **{name: np.zeros((hi - lo, *shape), dtype) for name, (shape, dtype) in self.empty.items()}}
            i = j

    def of_episode(self, i: int) -> dict[str, Any]:
        """What the source said about episode i; {} where it said nothing or the episode was changed since."""
        each = self.keep.get("episodes", [])
        return each[i] or {} if len(each) == self.store.episodes else {}

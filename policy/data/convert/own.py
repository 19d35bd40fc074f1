"""What a store says about itself and other formats have no place for, as JSON under the name `dipole`, which other programs pass over."""
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from policy.data.convert.back import Origin
from policy.data.convert.mapping import legal, stored_names
from policy.data.semantics import Semantics

NAME = "dipole"
PLAIN = re.compile(r"[<>|][fiub]\d+")  # dtypes of numbers


@dataclass(frozen=True)
class Own:
    """Of the store, under the names that its keys have in the other format; obs under stored ones.

    keys {name there: stored name} where mapping.stored_names would find another.   columns [(stored key, shape, dtype)] of those that the format has side by
    side in one array.   said: whether there was anything.
    """
    fps: float | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    semantics: Semantics = field(default_factory=Semantics)
    task: str | None = None
    obs: Any = None
    keys: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[tuple[str, tuple[int, ...], np.dtype]] = ()
    said: bool = False

    def attrs(self, otherwise: str) -> dict[str, str]:
        """The store's attributes. It has the task of the store before, none if that had none, and `otherwise` if there was no such store."""
        task = self.task if self.said else otherwise
        return {"task": task} if task else {}


def dump(origin: Origin, *, columns: Sequence[str] = (), made: Iterable[str] = ()) -> str:
    """columns: stored keys that are written side by side in one array.   made: names that the format adds, which no stored key gets back."""
    store = origin.store
    meant = {"text": store.action_semantics or "", **{k: v for k, v in (store.attrs.get("action") or {}).items() if v or k != "text"}}
    meant["of"] = origin.names.get(meant.get("of") or "")
    units = {origin.names.get(k, k): u for k, u in store.units.items()}
    made = set(made) - set(origin.names.values())
    found = stored_names(list(origin.names.values()), {}, origin.names.get("action"))
    keys = {name: k for k, name in origin.names.items() if found[name] != k and k not in made}
    side = [[k, list(store.schema[k][0]), store.schema[k][1].str] for k in columns]
    return json.dumps({"fps": store.fps, "units": units, "action": meant, "task": store.attrs.get("task"), "obs": store.attrs.get("obs"),
                       **({"keys": keys} if keys else {}), **({"columns": side} if side else {})}, ensure_ascii=False)


def load(text: Any, notes: list[str]) -> Own:
    """What dump wrote. Anything else is no reason not to read the rest: a note says what was passed over."""
    if text is None:
        return Own()
    try:
        said = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        notes.append(f"{NAME}, where a dataset of dipole says what its numbers mean, is not understood and was passed over")
        return Own()
    found, wrong = Own(said=True), []
    for name, read in (("fps", _rate), ("units", _units), ("action", Semantics.from_json), ("task", _text), ("obs", _obs), ("keys", _keys),
                       ("columns", _columns)):
        try:
            value = None if said.get(name) is None else read(said[name])
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError):
            wrong.append(name)
            continue
        if value is not None:
            found = replace(found, **{"semantics" if name == "action" else name: value})  # type: ignore[arg-type]
    if wrong:
        notes.append(f"{', '.join(wrong)} in {NAME}, where a dataset of dipole says what its numbers mean, cannot be so and was passed over")
    return found


def _rate(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < math.inf:
        raise ValueError
    return float(x)


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise ValueError
    return x


def _units(x: Any) -> dict[str, str]:
    return {_text(k): _text(v) for k, v in x.items()}


def _keys(x: Any) -> dict[str, str]:
    return {_text(k): _stored(v) for k, v in x.items()}


def _columns(x: Any) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    found = [(_stored(key), tuple(int(i) for i in shape), dtype) for key, shape, dtype in x]
    if any(min(shape, default=1) < 0 or not PLAIN.fullmatch(dtype) for _, shape, dtype in found) or len({key for key, _, _ in found}) < len(found):
        raise ValueError
    return [(key, shape, np.dtype(dtype)) for key, shape, dtype in found]


def _stored(x: Any) -> str:
    if not legal(x):
        raise ValueError
    return str(x)


def _obs(x: Any) -> Any:
    """{name: key or {key, take}} or [key]."""
    for spec in x.values() if isinstance(x, dict) else list(x):
        _text(spec["key"] if isinstance(spec, dict) else spec)
    if isinstance(x, str):
        raise ValueError
    return x

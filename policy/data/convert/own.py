"""What a store says about itself and other formats have no place for, as JSON under the name `dipole`, which other programs pass over."""
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from policy.data.convert.back import Origin
from policy.data.semantics import Semantics

NAME = "dipole"


@dataclass(frozen=True)
class Own:
    """Of the store, under the names that its keys have in the other format; obs under stored ones.   said: whether there was anything."""
    fps: float | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    semantics: Semantics = field(default_factory=Semantics)
    task: str | None = None
    obs: Any = None
    said: bool = False


def dump(origin: Origin) -> str:
    store = origin.store
    meant = {"text": store.action_semantics or "", **{k: v for k, v in (store.attrs.get("action") or {}).items() if v or k != "text"}}
    meant["of"] = origin.names.get(meant.get("of") or "")
    units = {origin.names.get(k, k): u for k, u in store.units.items()}
    return json.dumps({"fps": store.fps, "units": units, "action": meant, "task": store.attrs.get("task"), "obs": store.attrs.get("obs")}, ensure_ascii=False)


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
    for name, read in (("fps", _rate), ("units", _units), ("action", Semantics.from_json), ("task", _text), ("obs", _obs)):
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


def _obs(x: Any) -> Any:
    """{name: key or {key, take}} or [key]."""
    for spec in x.values() if isinstance(x, dict) else list(x):
        _text(spec["key"] if isinstance(spec, dict) else spec)
    if isinstance(x, str):
        raise ValueError
    return x

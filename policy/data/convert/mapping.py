"""How a foreign dataset's keys become the store's, in a small yaml; every entry may be left out, and a list of one name needs no brackets.

format: robomimic                        # which reader; found out when left out
fps: 20                                  # Hz. With time stamps (clock) of another rate the episodes are resampled to it
clock: states[0]                         # key[channel] with time stamps in s; `frames`: even steps at the rate the source tells
keys: {obs/robot0_eef_pos: eef}          # source name: stored name; others keep their last part, see `stored_names`
skip: [next_obs/*]                       # source names to leave out; of what has not one row a step, such as obs/intrinsics: to keep beside
obs: [eef]                               # stored names a policy observes by default, or {name: {key: eef, take: [0, 1]}}
action_from: actions                     # source name; or parts side by side: [right_dpos, {key: states, take: [1, 2], shift: 1}], where
                                         # shift: 1 is the value one step later (the last is repeated); none: there is no action
action: {kind: delta, space: ee}         # what the numbers of the action mean: the fields of policy.data.semantics.Semantics
units: {eef: m}                          # stored name: unit
task: Lift the cube
video: [front]                           # stored names of cameras to be kept as mp4: smaller by far, and not bit for bit
options: {mask: train}                   # of the reader
"""
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from policy.data.files import DataError
from policy.data.semantics import Semantics

GROUPS = ("obs/", "observation/", "observations/")  # left out of a stored name
NONE = "none"


@dataclass(frozen=True)
class Part:
    """Channels `take` (None: all) of a source key, `shift` steps later."""
    key: str
    take: tuple[int, ...] | None = None
    shift: int = 0


@dataclass(frozen=True)
class Rules:
    """See the head of the module.   ValueError, also from `of`, names what is not an entry and what was meant."""
    format: str | None = None
    fps: float | None = None
    clock: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    skip: Sequence[str] = ()
    obs: Mapping[str, Any] | Sequence[str] | None = None
    action_from: Any = None
    action: Mapping[str, Any] | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    video: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("keys", "units", "options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} of a mapping is written {{source name: …}}, got {getattr(self, name)!r}")
        for name in ("skip", "video", "obs"):
            if isinstance(one := getattr(self, name), str):
                object.__setattr__(self, name, [one])
        for name, value in (("skip", self.skip), ("video", self.video)):
            if not isinstance(value, Sequence) or not all(isinstance(s, str) for s in value):
                raise ValueError(f"{name} of a mapping is a list of names such as [next_obs/*], got {value!r}")
        if self.fps is not None and not (isinstance(self.fps, int | float) and 0 < self.fps < float("inf")):
            raise ValueError(f"fps is a rate in Hz above 0, got {self.fps!r}")
        if wrong := {k: v for k, v in self.keys.items() if not legal(v)}:
            raise ValueError(f"keys: {wrong} names what cannot be a stored key. Use letters, digits, _ and .")
        Semantics.from_json(self.action)
        self.parts()

    @classmethod
    def of(cls, spec: "Rules | Mapping[str, Any] | Path | str | None") -> "Rules":
        """From a yaml file, a dict, or nothing."""
        if isinstance(spec, Rules):
            return spec
        if isinstance(spec, str | Path):
            if not Path(spec).is_file():
                raise FileNotFoundError(f"there is no mapping {spec}. It is a small yaml, described at the head of policy/data/convert/mapping.py")
            try:
                found = yaml.safe_load(Path(spec).read_text(encoding="utf-8"))
            except yaml.YAMLError as e:
                raise ValueError(f"{spec} is not yaml: {e}") from e
            if not isinstance(found, dict | None):
                raise ValueError(f"{spec} is a {type(found).__name__}; a mapping is written name: value")
            spec = found
        known = list(cls.__dataclass_fields__)
        for name in set(spec or {}) - set(known):
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"{name!r} is no entry of a mapping. " + (f"Did you mean {close[0]}? " if close else "") + f"Known: {', '.join(known)}")
        return cls(**{k: v for k, v in (spec or {}).items() if v is not None})

    def but(self, **given: Any) -> "Rules":
        """Entries that are not None replace mine; keys, units, options and skip are added to mine."""
        mine = asdict(self)
        said: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        said |= {k: {**mine[k], **said[k]} for k in ("keys", "units", "options") if k in said and isinstance(said[k], Mapping)}
        if "skip" in said:
            said["skip"] = [*mine["skip"], *replace(self, skip=said["skip"]).skip]
        return replace(self, **said)

    def parts(self, default: Any = None) -> list[Part] | None:
        """The action's parts; None where nothing is said, [] where there is to be no action."""
        spec = default if self.action_from is None else self.action_from
        if spec is None or spec == NONE:
            return None if spec is None else []
        parts = []
        for part in [spec] if isinstance(spec, str | Mapping) else spec:
            given = {"key": part} if isinstance(part, str) else dict(part)
            if "key" not in given or set(given) - {"key", "take", "shift"}:
                raise ValueError(f"action_from: {part!r} is not understood; a part is a name or {{key: states, take: [1, 2], shift: 1}}")
            take, shift = given.get("take"), given.get("shift", 0)
            if not isinstance(shift, int) or shift < 0:
                raise ValueError(f"action_from: shift of {given['key']!r} counts steps into the future, 0 or more, got {shift!r}")
            parts.append(Part(given["key"], None if take is None else tuple(int(i) for i in take), shift))
        return parts


def legal(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and "/" not in name and not name.startswith((".", "__"))


def kept(names: Iterable[str], skip: Sequence[str]) -> list[str]:
    """The names that no pattern matches.   ValueError for a pattern that matches none, which is a slip."""
    names = list(names)
    for pattern in skip:
        if not any(fnmatchcase(n, pattern) for n in names):
            raise ValueError(f"skip: {pattern!r} matches none of the source's keys: {', '.join(names)}")
    return [n for n in names if not any(fnmatchcase(n, pattern) for pattern in skip)]


def stored_names(names: Sequence[str], keys: Mapping[str, str], action: str | None, reserved: Sequence[str] = ()) -> dict[str, str]:
    """{source name: stored name}.

    A name in keys is what keys says, the action is `action`; any other loses a leading obs/, observation/ or observations/, and its other
    slashes become _. Where two names meet that way both keep the full path. DataError when two still meet.
    """
    if unknown := [k for k in keys if k not in names]:
        close = difflib.get_close_matches(unknown[0], names, n=1)
        raise ValueError(f"keys: {unknown[0]!r} is not in the source. " + (f"Did you mean {close[0]!r}? " if close else "") + f"Known: {', '.join(names)}")
    fixed = {**({action: "action"} if action else {}), **keys}
    short = {n: fixed.get(n) or _plain(next((n[len(g):] for g in GROUPS if n.startswith(g)), n)) for n in names}
    taken = [*short.values(), *reserved]
    full = {n: s if n in fixed or taken.count(s) == 1 else _plain(n) for n, s in short.items()}
    if "action" in reserved:
        full = {n: "recorded_action" if s == "action" and n not in keys else s for n, s in full.items()}
    clash = [s for s in set(full.values()) if [*full.values(), *reserved].count(s) > 1]
    if clash:
        both = [n for n, s in full.items() if s == clash[0]]
        raise DataError(f"{' and '.join(both)} would be stored under the name {clash[0]!r}. Name one with keys: {{{both[0]}: …}}")
    return full


def _plain(name: str) -> str:
    """A legal stored name."""
    return re.sub(r"^(\.|__)+", "", name.strip("/").replace("/", "_")) or "unnamed"

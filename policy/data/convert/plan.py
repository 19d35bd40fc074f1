"""What becomes of a source's keys: which are stored, under which names, what is the action and what a policy observes by default."""
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from policy.data.convert.mapping import Part, Rules, kept, stored_names
from policy.data.convert.resample import FRAMES, resampled, stamps
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.semantics import Semantics
from policy.data.store import Schema

# What is recorded beside the observations: outcomes, the future, clocks and counters. A policy that saw them would learn to cheat.
NO_OBSERVATION = re.compile(r"actions?|next[._/].*|rewards?|dones?|success|discounts?|returns?|is_(first|last|terminal)|joint_torques|infos?([._/].*)?|"
                            r"(.*[._/])?(terminals?|terminations?|terminated|timeouts?|truncations?|truncated)|"
                            r"(.*[._])?(timestamps?|time|frame_index|episode_index|task_index|index)")
OBSERVED = re.compile(r"(obs|observations?)([._/].*|$)")


@dataclass
class Plan:
    """names {source: stored}; schema, units, fps and attrs of the store; semantics of its action; parts that make it, where it is not one key."""
    source: Source
    rules: Rules
    names: dict[str, str]
    schema: Schema
    fps: float
    semantics: Semantics
    units: dict[str, str]
    attrs: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    resample: str | None = None
    notes: list[str] = field(default_factory=list)
    _gap: float = 0.0
    _gone: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, rules: Rules) -> "Plan":
        parts, notes = _action(source, rules), list[str]()
        names = [k for k in kept([*source.schema, *source.beside], rules.skip) if k in source.schema]
        empty = {k: [list(s), np.dtype(d).str] for k, (s, d) in source.schema.items() if k in names and 0 in s}
        names = [k for k in names if k not in empty]
        if odd := [k for k in [*names, *(p.key for p in parts)] if np.dtype(source.schema[k][1]).kind not in "fiub"]:
            what = "complex numbers" if np.dtype(source.schema[odd[0]][1]).kind == "c" else "no numbers"
            raise DataError(f"{source.path}: {odd[0]!r} holds {what} ({source.schema[odd[0]][1]}), which no policy reads. Store it as floats (of complex ones "
                            f"real and imaginary part), or leave it out with skip=[{odd[0]}]")
        alone = len(parts) == 1 and parts[0].take is None and not parts[0].shift and len(source.schema[parts[0].key][0]) < 2  # others are flattened
        one = parts[0].key if alone else None
        said = {**{k: s for k, s in source.names.items() if k in names}, **rules.keys}
        stored = stored_names(names, said, one, reserved=["action"] if parts and not one else [])
        schema: Schema = {stored[k]: (tuple(source.schema[k][0]), np.dtype(source.schema[k][1]).newbyteorder("=")) for k in names}
        if parts and not one:
            schema["action"] = _composed(source, parts)
        if absent := _absent(source, parts, one, schema, rules):
            raise DataError(absent)
        fps, clock = _rate(source, rules)
        semantics = _declared(_meant(source, rules, parts, stored), rules, stored, schema, notes)
        if rules.action_from is None and not source.action and parts:
            made = " and ".join(f"{p.key}{'' if p.take is None else list(p.take)}{f' {p.shift} step later' if p.shift else ''}" for p in parts)
            notes.append(f"the source has no action of its own: it was made of {made}{' side by side' if len(parts) > 1 else ''}; action_from says otherwise")
        if left := [k for k in source.schema if k not in stored and k not in empty]:
            notes.append(f"left out as asked: {', '.join(left)}")
        plan = cls(source, rules, stored, schema, fps, semantics, {}, {}, [] if one else parts, clock, notes)
        plan.units = {stored.get(k, k): u for k, u in {**source.units, **rules.units}.items() if stored.get(k, k) in schema}
        if unknown := [k for k in rules.units if stored.get(k, k) not in schema]:
            raise ValueError(f"units: {unknown[0]!r} is not a stored key (known: {', '.join(schema)})")
        bytes_swapped = {k: np.dtype(d).str for k, (_, d) in source.schema.items() if k in stored and not np.dtype(d).isnative}
        named = {"names": {stored.get(k, k): v for k, v in source.attrs["names"].items()}} if source.attrs.get("names") else {}
        plan.attrs = {**source.attrs, **named, **({"task": rules.task} if rules.task else {}), "action": semantics.to_json(), "obs": plan._observed(),
                      "source": {"format": source.format, "name": source.path.name, "keys": stored,
                                 **({"empty": empty} if empty else {}), **({"dtypes": bytes_swapped} if bytes_swapped else {}),
                                 **({"resampled": {"clock": clock, "fps": fps}} if clock else {})}}
        return plan

    def episode(self, episode: Episode, i: int) -> Episode | None:
        """Episode i under its stored names, None when it has no step."""
        if not len(next(iter(episode.values()))):
            self.notes.append(f"episode {i} has no steps and was left out")
            self._gone.append(i)
            return None
        if self.resample:
            times = stamps(episode, self.resample, self.source.fps, i)
            self._gap = max(self._gap, float(np.diff(times).max(initial=0)))
            acting = {p.key for p in self.parts if not p.shift} or {k for k, s in self.names.items() if s == "action"}
            wanted = {k: x for k, x in episode.items() if k in self.names or k in {p.key for p in self.parts}}
            episode = resampled(wanted, times, self.fps, acting, self.semantics)
        out = {stored: episode[k] for k, stored in self.names.items()}
        if self.parts:
            out["action"] = np.concatenate([_part(episode, p) for p in self.parts], 1).astype(self.schema["action"][1], copy=False)
        return out

    def keep(self) -> dict[str, Any]:
        """The source's keep, without the entries of episodes that were left out."""
        keep = dict(self.source.keep)
        if "episodes" in keep and self._gone:
            keep["episodes"] = [e for i, e in enumerate(keep["episodes"]) if i not in self._gone]
        if self.resample and self._gap > 2 / self.fps:
            self.notes.append(f"the time stamps have gaps of up to {self._gap:.3g} s, filled by interpolation: look at the source if that is long")
        return keep

    def _observed(self) -> dict[str, Any]:
        """{name: stored key or {key, take}} for recipe=own."""
        said = self.source.obs if self.rules.obs is None else self.rules.obs
        if said is None:
            numbers = [k for k in self.names if self.schema[self.names[k]][1].kind in "fiub" and len(self.source.schema[k][0]) < 3]
            hidden = {p.key for p in self.parts if not p.shift} | {k for k in numbers if self.names[k] == "action"} | {self.rules.clock or self.source.clock}
            free = [k for k in numbers if k not in hidden and not NO_OBSERVATION.fullmatch(k)]
            return {s: s for s in (self.names[k] for k in [k for k in free if OBSERVED.match(k)] or free)}
        named = dict(said) if isinstance(said, Mapping) else {self.names.get(k, k): k for k in said}
        out = {}
        for name, spec in named.items():
            f = {"key": spec} if isinstance(spec, str) else dict(spec)
            key = self.names.get(f["key"], f["key"])
            if key not in self.schema and self.rules.obs is not None:
                raise ValueError(f"obs: {f['key']!r} is not a stored key (known: {', '.join(self.schema)})")
            if key in self.schema:
                out[name] = key if set(f) == {"key"} else {**f, "key": key}
        return out


def _action(source: Source, rules: Rules) -> list[Part]:
    parts = rules.parts(source.action or source.action_from)
    if parts is None:
        raise DataError(f"{source.path} has no actions (keys: {', '.join(source.schema)}). Say what they are with action_from: a name, parts side by "
                        "side, or, for absolute targets, the next measured state: action_from: {key: states, take: [1, 2, 3], shift: 1}; "
                        "or action_from: none for a dataset without")
    for p in parts:
        if p.key not in source.schema:
            raise ValueError(f"action_from: {p.key!r} is not in {source.path} (known: {', '.join(source.schema)})")
        shape = source.schema[p.key][0]
        if p.take and (not shape or max(p.take) >= shape[-1] or min(p.take) < 0):
            raise ValueError(f"action_from: {p.key!r} has shape {shape} per step, take={list(p.take)} does not fit")
    return parts


def _meant(source: Source, rules: Rules, parts: list[Part], stored: Mapping[str, str]) -> Semantics:
    """What the reader says of its actions, or that others are a measured value some steps later."""
    if rules.action_from is None:
        return replace(source.semantics, of=stored.get(source.semantics.of or ""))
    if len(parts) != 1 or not parts[0].shift or parts[0].key not in stored:
        return Semantics()
    key, take = stored[parts[0].key], parts[0].take
    later = f"{parts[0].shift} step{'s' * (parts[0].shift > 1)} later"
    some = "" if take is None else f"[{take[0]}:{take[-1] + 1}]" if take == tuple(range(take[0], take[-1] + 1)) else f"{list(take)}"
    return Semantics("absolute", of=key, of_take=take, text=f"{key}{some} {later}")


def _declared(meant: Semantics, rules: Rules, stored: Mapping[str, str], schema: Schema, notes: list[str]) -> Semantics:
    """What the reader says with what the user says of it. Of the reader's a note tells what cannot be.   ValueError: what the user says cannot be."""
    if wrong := meant.misfit(schema):
        notes.append(f"what the source says of its action cannot be so and was passed over: {wrong}")
        meant = Semantics(meant.kind, meant.space, text=meant.text)
    said = Semantics.from_json({**meant.to_json(), **(rules.action or {})})
    said = replace(said, of=stored.get(said.of, said.of)) if said.of else said
    if wrong := said.misfit(schema):
        raise ValueError(f"action: {wrong}")
    return said


def _absent(source: Source, parts: list[Part], one: str | None, schema: Schema, rules: Rules) -> str:
    """Why no action would be left of one that the source has, and what to do; '' where there is one, or where none is wanted."""
    cure = "Name another with action_from=KEY, or say action_from=none for a dataset without actions"
    if one and any(fnmatchcase(one, pattern) for pattern in rules.skip):
        return f"{source.path}: {one!r} is the action, and skip leaves it out. {cure}"
    if (one and 0 in source.schema[one][0]) or (parts and not one and 0 in schema["action"][0]):
        return f"{source.path}: its action, {' and '.join(p.key for p in parts)}, has no channels. {cure} (known: {', '.join(source.schema)})"
    return ""


def _composed(source: Source, parts: list[Part]) -> tuple[tuple[int, ...], np.dtype]:
    one = {k: np.zeros((1, *source.schema[k][0]), source.schema[k][1]) for k in {p.key for p in parts}}
    whole = np.concatenate([_part(one, p) for p in parts], 1)
    return whole.shape[1:], whole.dtype if whole.dtype.kind == "f" else np.dtype("float32")


def _part(episode: Episode, part: Part) -> np.ndarray:
    """(n, d) of the action."""
    x = episode[part.key]
    x = x.reshape(len(x), -1) if part.take is None else x[..., list(part.take)].reshape(len(x), -1)
    return x[np.minimum(np.arange(len(x)) + part.shift, len(x) - 1)]


def _rate(source: Source, rules: Rules) -> tuple[float, str | None]:
    """The store's rate and the clock to resample by, None where the steps stay as they are."""
    clock = rules.clock or source.clock
    if rules.fps is None:
        if not source.fps:
            raise DataError(f"{source.path} does not say how many steps there are in a second: add fps=…")
        return float(source.fps), None
    if source.fps and abs(source.fps - rules.fps) <= 1e-6 * rules.fps and not rules.clock:
        return float(rules.fps), None
    if source.fps and not clock:
        raise DataError(f"{source.path} says {source.fps:g} Hz, so fps={rules.fps:g} means other steps: say by which time stamps with clock=key[channel], or "
                        f"clock={FRAMES} if its steps are even")
    return float(rules.fps), clock

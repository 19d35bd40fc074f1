"""Which arrays of HDF5 episodes have one row a step, settled over all episodes: the others are kept beside, or are faults."""
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from policy.data.convert import h5
from policy.data.files import DataError
from policy.data.store import Schema


@dataclass
class Rows:
    """add each episode, then settle.   skip: patterns of arrays that may have other rows; images: JPEG files in rows are images.

    schemas: of each episode.   beside: once settled, names that have no row a step.   gone: those of them that are not kept either, as asked.
    """
    skip: Sequence[str] = ()
    images: bool = False
    schemas: list[Schema] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)
    _shapes: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    _odd: dict[str, str] = field(default_factory=dict)

    def add(self, group: Any, found: Mapping[str, Any], n: int, where: str) -> tuple[Schema, list[str], dict[str, Any]]:
        """(rows, observations with a last one beside, the rest as h5.rest gives it) of an episode of n steps; odd observations are in none of them yet."""
        rows, more, odd = h5.steps(found, n, where, images=self.images)
        self.schemas.append(dict(rows))
        self._counts.append(n)
        self._shapes.append({k: d.shape for k, d in found.items() if d.shape})
        self._odd = {**self._odd, **{k: message for k, message in odd.items() if k not in self._odd}}
        return rows, more, h5.rest(group, found, {**rows, **odd})

    def settle(self, each: Sequence[dict[str, Any]], read: Callable[[int, Collection[str]], dict[str, Any]]) -> list[str]:
        """Move what is kept without a row a step into each["arrays"]; gives notes on what is not kept.   read(i, names): of episode i, whole.

        An array of one shape in episodes of different lengths is no fault (a camera's matrix), unless it is as long as the longest: that may be padded.
        Skipped ones are kept where they never fit; one that fits some episodes is a key like others, and left out.
        DataError: any other odd observation.
        """
        fixed = [k for k in dict.fromkeys(k for shapes in self._shapes for k in shapes) if self._fixed(k)]
        asked = [k for k in self._odd if k not in fixed and any(fnmatchcase(k, pattern) for pattern in self.skip)]
        for key, message in self._odd.items():
            if key not in fixed and key not in asked:
                raise DataError(message)
        self.gone = [k for k in asked if any(k in schema for schema in self.schemas)]
        kept = [k for k in (*fixed, *asked) if k not in self.gone]
        for i, (said, schema) in enumerate(zip(each, self.schemas, strict=True)):
            for key in (*kept, *self.gone):
                schema.pop(key, None)
                said.get("final", {}).pop(key, None)
            said["arrays"] |= read(i, [k for k in kept if k in self._shapes[i] and k not in said["arrays"]]) if kept else {}
        self.beside = sorted({*self.gone, *(k for said in each for k in said["arrays"])})
        return [f"left out as asked: {', '.join(self.gone)}"] if self.gone else []

    def _fixed(self, key: str) -> bool:
        shapes = {s.get(key) for s in self._shapes}
        shape = next(iter(shapes))
        return (len(shapes) == 1 and shape is not None and len(set(self._counts)) > 1 and shape[0] < max(self._counts)
                and any(key not in schema for schema in self.schemas))

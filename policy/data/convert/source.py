"""What every reader of a foreign format returns: facts at once, episodes one by one, so that a dataset larger than memory can be converted."""
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.semantics import Semantics

Episode = dict[str, np.ndarray]  # {key: (n, *shape)}


@dataclass
class Source:
    """One foreign dataset, opened.

    schema {key: (shape of one frame, dtype)} and episodes() -> {key: (n, *shape)} use the format's own key names; renaming is convert's job.
    fps [Hz], None where the format does not say.   count: number of episodes.   action: key of the actions, None where there are none.
    notes: what was left out and why, one sentence each.   keep: what a way back to the format needs and the arrays do not hold: JSON and numpy
    arrays; keep["episodes"], if there, is one entry for each episode, which follows it through trim, split and merge.
    beside: names of arrays without one row a step, which are no keys but which skip may name.
    names {key: stored name}: of a format that says what its keys are to be called.
    What stays None is convert's default: action_from, see mapping.Rules; obs, the observations a policy gets when nobody says, {name: key}
    or {name: {key, take}} or [key]; clock, "key[channel]" with time stamps in s.
    """
    path: Path
    format: str
    schema: dict[str, tuple[tuple[int, ...], np.dtype]]
    episodes: Callable[[], Iterator[Episode]]
    count: int
    fps: float | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    action: str | None = None
    semantics: Semantics = field(default_factory=Semantics)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    keep: Mapping[str, Any] = field(default_factory=dict)
    action_from: Sequence[Any] | None = None
    obs: Mapping[str, Any] | Sequence[str] | None = None
    clock: str | None = None
    beside: Collection[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

"""What every reader of a foreign format returns: facts at once, episodes one by one, so that a dataset larger than memory can be converted."""
from collections.abc import Callable, Iterator, Mapping
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
    notes: what was left out and why, one sentence each.   keep: JSON that a way back to the format needs and the arrays do not hold.
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

"""What a served or exported policy says about itself, and the one call behind which torch, ONNX, OpenVINO and a distant server look alike."""
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Card:
    """The model card, json in an export and in the server's hello.

    obs: {key: shape of one step}.   t_obs: steps of history.   horizon, action_dim: shape of a chunk.   dt: s between its actions.
    model_id: hash of weights and configuration.   merges: of policy.timeline.MERGES, those it can plan with.   committed: most steps of a
    prefix it takes.   lower, upper: (action_dim,) range of the actions it was trained on, in their units.   facts: where it comes from.
    """
    model_id: str
    task: str
    obs: Mapping[str, Sequence[int]]
    t_obs: int
    horizon: int
    action_dim: int
    dt: float
    units: Mapping[str, str] = field(default_factory=dict)
    action_semantics: str = ""
    merges: Sequence[str] = ("naive", "ensemble", "frozen")
    committed: int = 0
    lower: Sequence[float] = ()
    upper: Sequence[float] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> "Card":
        """TypeError or ValueError when something is missing or of the wrong kind; unknown names of a later version are ignored."""
        known = {k: v for k, v in d.items() if k in cls.__dataclass_fields__}
        card = cls(**{**known, "obs": {str(k): tuple(int(n) for n in v) for k, v in dict(known["obs"]).items()}})
        if min(card.t_obs, card.horizon, card.action_dim) < 1 or not card.dt > 0:
            raise ValueError("the model card is not one: t_obs, horizon, action_dim and dt must be above 0")
        return card


class Backend(Protocol):
    """What plans. Stateless: the same arguments give the same chunk."""
    card: Card

    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        """obs {key: (t_obs, *shape)} -> actions (horizon, d) in physical units; the first is due when the newest observation was taken.

        noise: (horizon, d) standard normal, drawn when absent.   prefix: (p, d) physical actions already promised from that moment on, the first
        `committed` of which are going to be executed whatever the plan says; merge says what is made of them (policy.timeline.MERGES).
        """


class Delayed:
    """A backend whose plans take `seconds` longer, to see what a slower one does."""

    def __init__(self, backend: Backend, seconds: float):
        self.backend, self.seconds, self.card = backend, seconds, backend.card

    def plan(self, obs: Mapping[str, np.ndarray], **request: Any) -> np.ndarray:
        time.sleep(self.seconds)
        return self.backend.plan(obs, **request)

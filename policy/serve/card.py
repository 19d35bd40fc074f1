"""What a served or exported policy says about itself, and the one call behind which torch, ONNX, OpenVINO and a distant server look alike."""
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

VERSION = 2  # of the card: 2 has joints, joint_units, and seen_low and seen_high for lower and upper


@dataclass(frozen=True)
class Card:
    """The model card, json in an export and in the server's hello.

    obs: {key: shape of one step}.   t_obs: steps of history.   horizon, action_dim: shape of a chunk.   dt: s between its actions.
    model_id: hash of weights and configuration.   merges: of policy.timeline.MERGES, those it can plan with.   committed: most steps of a
    prefix it takes.   joints, joint_units: what each action dimension is, in their order; () where the run does not know.   seen_low, seen_high:
    (action_dim,) range of the demonstrations' actions, in their units.   facts: where it comes from, and `limits` of the robot it is meant for, where
    that is known: to read; a bridge goes by its own robot's.
    noise_dim: channels of the noise that a plan is made of where they are not action_dim, because transforms widen actions; else 0.
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
    joints: Sequence[str] = ()
    joint_units: Sequence[str] = ()
    seen_low: Sequence[float] = ()
    seen_high: Sequence[float] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION
    noise_dim: int = 0

    @property
    def noise_size(self) -> tuple[int, int]:
        """Of the noise of a plan, (horizon, …)."""
        return self.horizon, self.noise_dim or self.action_dim

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, d: Any) -> "Card":
        """ValueError says what is missing or of the wrong kind, or which side is to be brought up to date."""
        if not isinstance(d, Mapping):
            raise ValueError("it is not a model card")
        version = d.get("version", 1)
        if type(version) is int and version != VERSION:
            raise ValueError(f"the model card is of version {version}, this dipole reads {VERSION}: " + (
                "export again, or serve the run by this dipole" if version < VERSION else "pip install --upgrade dipole"))
        said: Any = {"noise_dim": 0, **d}
        if wrong := [name for name, right in FIELDS.items() if not (name in said and right(said[name]))]:
            raise ValueError(f"it is not a model card: {', '.join(wrong)} cannot be")
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in said.items() if k in FIELDS}
        card = cls(**{**known, "obs": {k: tuple(v) for k, v in said["obs"].items()}})
        each = (card.joints, card.joint_units, card.seen_low, card.seen_high)
        if any(len(x) not in (0, card.action_dim) for x in each):
            raise ValueError(f"it is not a model card: joints, joint_units, seen_low and seen_high have none or {card.action_dim} entries each")
        return card


Right = Callable[[Any], bool]


def _text(x: Any) -> bool:
    return isinstance(x, str) and x.isprintable()


def _number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def _whole(least: int) -> Right:
    return lambda x: type(x) is int and least <= x <= LARGEST


def _list(right: Right) -> Right:
    return lambda x: isinstance(x, list | tuple) and all(map(right, x))


def _map(right: Right) -> Right:
    return lambda x: isinstance(x, Mapping) and all(map(_text, x)) and all(map(right, x.values()))


LARGEST = 4 << 20
FIELDS: dict[str, Right] = {
    "model_id": _text, "task": _text, "obs": _map(_list(_whole(1))), "t_obs": _whole(1), "horizon": _whole(1), "action_dim": _whole(1),
    "dt": lambda x: _number(x) and x > 0, "units": _map(_text), "action_semantics": _text, "merges": _list(_text), "committed": _whole(0),
    "joints": _list(_text), "joint_units": _list(_text), "seen_low": _list(_number), "seen_high": _list(_number),
    "facts": lambda x: isinstance(x, Mapping), "version": _whole(1), "noise_dim": _whole(0)}


class Backend(Protocol):
    """What plans. Stateless: the same arguments give the same chunk."""
    card: Card

    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        """obs {key: (t_obs, *shape)} -> actions (horizon, d) in physical units; the first is due when the newest observation was taken.

        noise: card.noise_size standard normal, drawn when absent.   prefix: (p, d) physical actions already promised from that moment on, the first
        `committed` of which are going to be executed whatever the plan says; merge says what is made of them (policy.timeline.MERGES).
        """


class Delayed:
    """A backend whose plans take `seconds` longer, to see what a slower one does."""

    def __init__(self, backend: Backend, seconds: float):
        self.backend, self.seconds, self.card = backend, seconds, backend.card

    def plan(self, obs: Mapping[str, np.ndarray], **request: Any) -> np.ndarray:
        time.sleep(self.seconds)
        return self.backend.plan(obs, **request)

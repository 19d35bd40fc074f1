"""What a planner server and its clients say to each other: msgpack maps of raw little-endian arrays, believed only once all of it was checked.

Four messages, each a map with `v` and `type`: hello and chunk from the server, obs from the client, err from the server. unpack takes any bytes at all
and returns one of the four classes below or raises WireError. The server knows no clock but its own: `t_obs` is only echoed.
"""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

from policy.serve.card import Card
from policy.serve.packing import LIMITS, Limits, WireError, array, finite, parse, sendable, short
from policy.timeline import MERGES

VERSION = 1
WHOLE = 2**63 - 1


@dataclass(frozen=True)
class Hello:
    """The server's first message.   bytes: the largest it takes."""
    card: Card
    bytes: int


@dataclass(frozen=True)
class Observation:
    """A request for a plan.   t_obs: ns on the client's own clock.   deadline_ms: from its arrival on; a plan that would start later is not made.

    noise or seed fix the plan; see policy.serve.card.Backend for the rest.
    """
    seq: int
    epoch: int
    t_obs: int
    obs: Mapping[str, np.ndarray]
    deadline_ms: float | None = None
    prefix: np.ndarray | None = None
    committed: int = 0
    merge: str = "naive"
    noise: np.ndarray | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Planned:
    """The answer to an observation.   seq, epoch, t_obs: the request's.   actions: (horizon, d), every dt [s], the first due at t_obs."""
    seq: int
    epoch: int
    t_obs: int
    dt: float
    actions: np.ndarray
    plan_ms: float
    queue_ms: float
    model_id: str


@dataclass(frozen=True)
class Err:
    """Why a request has no answer.   seq: None where it could not be read."""
    code: str
    text: str
    seq: int | None = None


Message = Hello | Observation | Planned | Err
NAMES: dict[type, str] = {Hello: "hello", Observation: "obs", Planned: "chunk", Err: "err"}


def pack(message: Message, limits: Limits = LIMITS) -> bytes:
    """WireError when an array has no place on the wire or the whole is too big for the other side."""
    body = {name: _plain(value) for name, value in vars(message).items()}
    data: bytes = msgpack.packb({"v": VERSION, "type": NAMES[type(message)], **body})
    if len(data) > limits.bytes:
        raise WireError("too_big", f"the message has {len(data)} bytes, the other side takes {limits.bytes}: send smaller images, or raise the server's limit")
    return data


def unpack(data: bytes, limits: Limits = LIMITS) -> Message:
    """The message in `data`; arrays are read-only views of it. WireError otherwise, whatever the bytes."""
    body = parse(data, limits)
    seq = body.get("seq")
    try:
        return _message(body, limits)
    except WireError as e:
        raise WireError(e.code, e.text, seq if type(seq) is int and 0 <= seq <= WHOLE else None) from None


def fit(request: Observation, card: Card) -> None:
    """WireError when the request is not one that the model of this card can answer."""
    if missing := [k for k in card.obs if k not in request.obs]:
        raise WireError("missing_key", f"the observation lacks {', '.join(missing)}", request.seq)
    if unknown := [k for k in request.obs if k not in card.obs]:
        raise WireError("unknown_key", f"the model does not know {short(', '.join(unknown))} (known: {', '.join(card.obs)})", request.seq)
    for key, size in card.obs.items():
        _size(repr(key), request.obs[key], (card.t_obs, *size), request.seq)
    if request.noise is not None:
        _size("noise", request.noise, card.noise_size, request.seq)
    if request.merge not in card.merges:
        raise WireError("merge", f"this model does not plan with merge {request.merge!r}, but with {', '.join(card.merges)}", request.seq)
    known = 0 if request.prefix is None else len(request.prefix) if request.prefix.ndim else -1
    if request.prefix is not None and not 0 <= known <= card.horizon:
        raise WireError("shape", f"the prefix promises {known} actions, the horizon is {card.horizon}", request.seq)
    if request.prefix is not None:
        _size("prefix", request.prefix, (known, card.action_dim), request.seq)
    if not request.committed <= min(known, card.committed):
        raise WireError("merge", f"committed={request.committed} must not exceed the prefix of {known} actions nor the model's {card.committed}", request.seq)


def _plain(value: Any) -> Any:
    """What msgpack can pack."""
    if isinstance(value, np.ndarray | np.generic):
        x = sendable(value)
        return {"dtype": x.dtype.str, "shape": list(x.shape), "data": x.tobytes()}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return _plain(value.to_json()) if isinstance(value, Card) else value


def _message(body: dict[str, Any], limits: Limits) -> Message:
    if body.get("v") != VERSION or type(body["v"]) is not int:
        raise WireError("version", f"this side speaks version {VERSION} of the protocol, the message is of version {short(body.get('v'))}")
    kind = next((k for k, name in NAMES.items() if name == body.get("type")), None)
    if kind is None:
        raise WireError("schema", f"the type of a message is one of {', '.join(NAMES.values())}")
    rules = SCHEMA[kind]
    if wrong := sorted({*rules} ^ (body.keys() - {"v", "type"})):
        raise WireError("schema", f"a message of type {NAMES[kind]} has {', '.join(['v', 'type', *rules])}; wrong here: {short(', '.join(wrong))}")
    values = {}
    for name, rule in rules.items():
        try:
            values[name] = rule(body[name], limits)
        except WireError as e:
            raise WireError(e.code, f"{name}: {e.text}") from None
    message: Message = kind(**values)
    if isinstance(message, Observation) and message.noise is not None and message.seed is not None:
        raise WireError("schema", "noise and seed exclude each other")
    return message


def _size(name: str, x: np.ndarray, want: tuple[int, ...], seq: int) -> None:
    if x.shape != tuple(want):
        raise WireError("shape", f"{name} must be {tuple(want)}, got {x.shape}", seq)
    if not finite(x):
        raise WireError("not_finite", f"{name} holds NaN or infinity", seq)


Rule = Callable[[Any, Limits], Any]


def _whole(value: Any, limits: Limits) -> int:
    if type(value) is not int or not 0 <= value <= WHOLE:
        raise WireError("schema", "must be a whole number from 0, below 2**63")
    return value


def _number(value: Any, limits: Limits) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e15:
        raise WireError("schema", "must be a finite number")
    return float(value)


def _positive(value: Any, limits: Limits) -> float:
    if not (number := _number(value, limits)) > 0:
        raise WireError("schema", "must be above 0")
    return number


def _text(value: Any, limits: Limits) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise WireError("schema", "must be printable text")
    return value


def _of(names: tuple[str, ...]) -> Rule:
    def rule(value: Any, limits: Limits) -> str:
        if not isinstance(value, str) or value not in names:
            raise WireError("schema", f"must be one of {', '.join(names)}")
        return value
    return rule


def _or_none(rule: Rule) -> Rule:
    return lambda value, limits: None if value is None else rule(value, limits)


def _array(value: Any, limits: Limits) -> np.ndarray:
    return array(value, limits)


def _arrays(value: Any, limits: Limits) -> dict[str, np.ndarray]:
    if not isinstance(value, dict):
        raise WireError("schema", "must be a map of arrays")
    return {_text(k, limits): array(v, limits) for k, v in value.items()}


def _card(value: Any, limits: Limits) -> Card:
    try:
        return Card.from_json(value)
    except ValueError as e:
        raise WireError("schema", str(e)) from None


SCHEMA: dict[type, dict[str, Rule]] = {
    Hello: {"card": _card, "bytes": _whole},
    Observation: {"seq": _whole, "epoch": _whole, "t_obs": _whole, "obs": _arrays, "deadline_ms": _or_none(_number), "prefix": _or_none(_array),
                  "committed": _whole, "merge": _of(MERGES), "noise": _or_none(_array), "seed": _or_none(_whole)},
    Planned: {"seq": _whole, "epoch": _whole, "t_obs": _whole, "dt": _positive, "actions": _array, "plan_ms": _number, "queue_ms": _number,
              "model_id": _text},
    Err: {"code": _text, "text": _text, "seq": _or_none(_whole)},
}

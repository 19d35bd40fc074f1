"""Arguments of transforms that a configuration leaves open, from what a dataset says of its actions (policy.data.semantics)."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from policy.data.relative import AbsoluteToDelta, DeltaToAbsolute, RelativeToChunk
from policy.data.semantics import WIDTHS, Semantics
from policy.data.transform import Binarise, Chain, Rotation, Transform

Node = Mapping[str, Any]  # {_target_: …, argument: value or None}
Limits = Callable[[], tuple[Sequence[float], Sequence[float]]]  # smallest and largest value of each stored action channel
OURS = {f"{kind.__module__}.{kind.__name__}": kind for kind in (RelativeToChunk, AbsoluteToDelta, DeltaToAbsolute, Rotation, Binarise)}


@dataclass(frozen=True)
class Known:
    """What holds for actions at a place in a chain of transforms.

    pairs: {action channel: channel of the flattened observation `state` that it commands}, without the rotation, which is in the channels `turns` and, of
    the observation, turns_take.   origin: {channel: the stored one it still is}.   lacks: why `state` is not known.   name: of the dataset, for errors.
    """
    name: str
    kind: str
    width: int
    pairs: Mapping[int, int] = field(default_factory=dict)
    state: str | None = None
    lacks: str = ""
    rotation: str | None = None
    turns: tuple[int, ...] = ()
    turns_take: tuple[int, ...] = ()
    state_rotation: str | None = None
    position: tuple[int, ...] = ()
    gripper: tuple[int, ...] = ()
    origin: Mapping[int, int] = field(default_factory=dict)
    limits: Limits = lambda: ((), ())

    @classmethod
    def of(cls, said: Semantics, width: int, seen: Mapping[str, tuple[str, Sequence[int] | None]], limits: Limits, name: str,
           widths: Mapping[str, int] | None = None) -> "Known":
        """seen: {observation: (stored key, its channels or None for all)}.   widths: {stored key: channels it has}."""
        parts = said.parts
        moving = sorted({i for part, channels in parts.items() if part != "gripper" for i in channels}) if parts else list(range(width))
        turns = parts.get("rotation", ()) if said.rotation else ()
        known = cls(name, said.kind, width, rotation=said.rotation, turns=tuple(turns), position=tuple(parts.get("position", ())),
                    gripper=tuple(parts.get("gripper", ())), origin={i: i for i in range(width)}, limits=limits,
                    pairs={i: i for i in moving if i not in turns})
        if said.of is None:
            return replace(known, lacks=f"{name} does not say which observation its actions are about (attribute action: of, of_take)")
        of = list(range((widths or {}).get(said.of, len(moving))) if said.of_take is None else said.of_take)
        if len(of) != len(moving):
            return replace(known, lacks=f"{name} says that {len(moving)} action channels are about {len(of)} of {said.of!r}, so which belongs to which is "
                                        "open: name the action's channels, those about it in its order, like parts: {position: [0, 1, 2], gripper: [3]}")
        for observation, (key, take) in seen.items():
            if key == said.of and set(of) <= set(of if take is None else take):
                at = {i: j if take is None else list(take).index(j) for i, j in zip(moving, of, strict=True)}
                return replace(known, state=observation, pairs={i: at[i] for i in known.pairs}, turns_take=tuple(at[i] for i in turns),
                               state_rotation=said.rotation)
        return replace(known, lacks=f"{name} says that its actions are about channels {of} of {said.of!r}, which the policy does not observe: "
                                    f"data.obs={{…, {said.of}: {said.of}}} shows it")


def complete(nodes: Mapping[str, Node], known: Known) -> dict[str, dict[str, Any]]:
    """{name: node} with every argument that is None filled in, in order. ValueError says what the dataset lacks and how to say it."""
    done = {}
    for name, node in nodes.items():
        kind = OURS.get(str(node["_target_"]))
        given = {k: v for k, v in node.items() if v is not None}
        if kind is not None:
            fill = _rotation if kind is Rotation else _gripper if kind is Binarise else _measured
            given = fill({k: v for k, v in given.items() if k != "_target_"}, known, name, kind)
            known = _behind(make({"_target_": node["_target_"], **given}), known)
        done[name] = {"_target_": node["_target_"], **given}
    return done


def make(node: Node) -> Transform:
    """A transform of ours from its configuration, without hydra. ValueError when it is none."""
    target = str(node.get("_target_"))
    if target not in OURS:
        raise ValueError(f"{target!r} is no transform of dipole's; known are {', '.join(OURS)}")
    return OURS[target](**{k: v for k, v in node.items() if k != "_target_"})


def described(transform: Transform) -> dict[str, dict[str, Any]]:
    """The configuration that chain makes it of again. ValueError when it has a transform that is not ours."""
    parts = transform.parts if isinstance(transform, Chain) else (transform,)
    if foreign := [type(part).__name__ for part in parts if type(part) not in OURS.values()]:
        raise ValueError(f"the transform {foreign[0]} cannot leave torch: an export knows {', '.join(kind.__name__ for kind in OURS.values())} alone. Export "
                         "with format=torch, or serve the run: dipole serve run=…")
    return {str(i): {"_target_": f"{type(part).__module__}.{type(part).__name__}", **asdict(part)} for i, part in enumerate(parts)}  # type: ignore[call-overload]


def chain(nodes: Mapping[str, Node]) -> Chain:
    return Chain(tuple(make(node) for node in nodes.values()))


def _measured(given: dict[str, Any], known: Known, name: str, kind: type) -> dict[str, Any]:
    wants = "delta" if kind is DeltaToAbsolute else "absolute"
    if known.kind not in (wants, "unknown"):
        other = {"delta": "sum them up first: transform=[absolute,…]", "absolute": "leave transform=absolute out"}
        raise ValueError(f"transform.{name} is for actions that are {wants}, and those of {known.name} are {known.kind} here; "
                         + other.get(known.kind, "use transform=none"))
    if "state" not in given and (known.state is None or known.kind == "unknown"):
        why = known.lacks or f"{known.name} does not say whether its actions are absolute or deltas (attribute action: kind)"
        raise ValueError(f"transform.{name} needs to know what actions are measured from, and {why}. Name it: transform.{name}.state=OBSERVATION "
                         f"transform.{name}.channels=[…] transform.{name}.take=[…]; or say it of the data: "
                         f"data.semantics={{kind: {wants}, of: KEY, of_take: […]}}, which a converted dataset keeps as its attribute action")
    same = given.setdefault("state", known.state) == known.state
    if "turns" not in given and known.turns and (same or "turns_take" in given):
        given |= {"turns": list(known.turns)}
    if given.get("turns"):
        given.setdefault("rotation", known.rotation)
        given.setdefault("turns_take", list(known.turns_take))
        given.setdefault("state_rotation", known.state_rotation if same else given["rotation"])
    given.setdefault("channels", [i for i in known.pairs if i not in given.get("turns", ())])
    if same and "take" not in given and set(given["channels"]) <= set(known.pairs):
        given["take"] = [known.pairs[i] for i in given["channels"]]
    if given.get("frame") == "tool":
        given.setdefault("position", list(known.position))
        if not given.get("rotation") or not given["position"]:
            raise ValueError(f"transform.{name}.frame=tool is about poses, and {known.name} does not say which action channels are one: data.semantics="
                             "{rotation: axis_angle, parts: {position: [0, 1, 2], rotation: [3, 4, 5]}, …}; without rotations use frame=mixed")
    return given


def _rotation(given: dict[str, Any], known: Known, name: str, kind: type) -> dict[str, Any]:
    if "channels" not in given or "source" not in given:
        if known.rotation is None and ("channels" not in given or "source" not in given):
            raise ValueError(f"transform.{name} turns a rotation into another representation, and {known.name} does not say that its actions have one. Say it: "
                             f"transform.{name}.source=axis_angle transform.{name}.channels=[3,4,5]; or of the data: data.semantics={{rotation: axis_angle, "
                             "parts: {position: [0,1,2], rotation: [3,4,5], gripper: [6]}, …}")
        given = {"channels": list(known.turns), "source": known.rotation, **given}
    return given


def _gripper(given: dict[str, Any], known: Known, name: str, kind: type) -> dict[str, Any]:
    given.setdefault("channels", list(known.gripper))
    if not given["channels"]:
        raise ValueError(f"transform.{name} is about a gripper, and {known.name} does not say which action channel is one. Say it: "
                         f"transform.{name}.channels=[6]; or of the data: data.semantics={{parts: {{gripper: [6]}}, …}}")
    if not {"low", "high"} <= given.keys():
        if lost := [i for i in given["channels"] if i not in known.origin]:
            raise ValueError(f"channel {lost[0]} is not a stored one any more: say transform.{name}.low=… transform.{name}.high=…")
        low, high = known.limits()
        stored = [known.origin[i] for i in given["channels"]]
        given = {"low": float(min(low[i] for i in stored)), "high": float(max(high[i] for i in stored)), **given}
    if not given["low"] < given["high"]:
        raise ValueError(f"the gripper of {known.name} never moves, it is always {given['low']:g}: leave transform.{name} out, or say what open and "
                         f"closed are: transform.{name}.low=… transform.{name}.high=…")
    given.setdefault("threshold", (given["low"] + given["high"]) / 2)
    return given


def _behind(made: Transform, known: Known) -> Known:
    """What holds behind a transform."""
    if isinstance(made, Rotation):
        return _turned(made, known) if made.channels else known
    if isinstance(made, RelativeToChunk):
        kind = "absolute" if isinstance(made, DeltaToAbsolute) else "delta" if isinstance(made, AbsoluteToDelta) else "relative"
        moved = {*(range(known.width) if made.channels is None else made.channels), *made.turns}
        return replace(known, kind=kind, origin={i: j for i, j in known.origin.items() if i not in moved})
    if isinstance(made, Binarise):
        return replace(known, origin={i: j for i, j in known.origin.items() if i not in made.channels})
    return known


def _turned(made: Rotation, known: Known) -> Known:
    """Channels have other numbers behind a rotation that is wider or narrower."""
    lo, grown = min(made.channels), WIDTHS[made.to]
    rest = [i for i in range(known.width) if i not in made.channels]
    at = {i: n if i < lo else n + grown for n, i in enumerate(rest)}
    mine = set(known.turns) == set(made.channels)

    def moved(channels: Sequence[int]) -> tuple[int, ...]:
        return tuple(at[i] for i in channels if i in at)
    return replace(known, width=len(rest) + grown, pairs={at[i]: j for i, j in known.pairs.items() if i in at}, position=moved(known.position),
                   gripper=moved(known.gripper), origin={at[i]: j for i, j in known.origin.items() if i in at},
                   rotation=made.to if mine else known.rotation, turns=tuple(range(lo, lo + grown)) if mine else moved(known.turns))

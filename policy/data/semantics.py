"""What the numbers of an action mean, kept with the data (attribute `action` of a store) and looked at by validation, transforms and exports."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("unknown", "absolute", "delta", "velocity", "effort")
SPACES = ("unknown", "joint", "ee", "base", "image")
ROTATIONS = ("axis_angle", "quaternion_xyzw", "quaternion_wxyz", "matrix", "rotation_6d", "euler_xyz")
WIDTHS = {"axis_angle": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4, "matrix": 9, "rotation_6d": 6, "euler_xyz": 3}


@dataclass(frozen=True)
class Semantics:
    """How to read an action (d,).

    kind: absolute, a target for what `of` measures; delta, a change to it in one step; velocity; effort; unknown.
    space: joint, ee (end effector), base (a vehicle), image (pixels), unknown.
    of, of_take: stored key, and its channels (null: all), that an absolute action commands or a delta adds to: as wide as the parts but the gripper.
    rotation: representation of the part `rotation`, one of ROTATIONS.   parts {name: channels of the action}: position, rotation, gripper, joints, …
    text: one sentence for people.   ValueError when a word is unknown.
    """
    kind: str = "unknown"
    space: str = "unknown"
    of: str | None = None
    of_take: tuple[int, ...] | None = None
    rotation: str | None = None
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, KINDS), ("space", self.space, SPACES), ("rotation", self.rotation, (None, *ROTATIONS))):
            if value not in known:
                raise ValueError(f"{name}={value!r} of an action is unknown; use one of {', '.join(map(str, known))}")
        turning = list(self.parts.get("rotation", ()))
        if self.rotation and len(turning) != WIDTHS[self.rotation]:
            raise ValueError(f"rotation={self.rotation} has {WIDTHS[self.rotation]} channels: name them in parts.rotation, got {turning}")
        object.__setattr__(self, "of_take", None if self.of_take is None else tuple(int(i) for i in self.of_take))
        object.__setattr__(self, "parts", {k: tuple(int(i) for i in v) for k, v in self.parts.items()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def misfit(self, schema: Mapping[str, tuple[Sequence[int], Any]]) -> str:
        """Why this cannot be true of `action` in a store of schema {key: (shape of one frame, dtype)}; '' where it can, or where there is no such key."""
        if "action" not in schema:
            return ""
        width, named = math.prod(schema["action"][0]), [i for channels in self.parts.values() for i in channels]
        if outside := [i for i in named if not 0 <= i < width]:
            return f"parts names channel {outside[0]}, and the action has {width}: 0 to {width - 1}"
        if twice := sorted({i for i in named if named.count(i) > 1}):
            return f"parts names channel {twice[0]} twice; each channel of the action is in one part"
        if self.of is None:
            return ""
        if self.of not in schema:
            return f"of: {self.of!r} is not a stored key (known: {', '.join(schema)})"
        has = math.prod(schema[self.of][0])
        if outside := [i for i in self.of_take or () if not 0 <= i < has]:
            return f"of_take names channel {outside[0]} of {self.of!r}, which has {has}: 0 to {has - 1}"
        moving = len(named) - len(self.parts.get("gripper", ())) if named else width
        about = has if self.of_take is None else len(self.of_take)
        if about == moving:
            return ""
        return (f"of: {moving} channels of the action cannot be about {about} of {self.of!r}. Say which of its channels with of_take, and which of the "
                "action's with parts, like parts: {position: [0, 1, 2], gripper: [3]}")

    @classmethod
    def from_json(cls, d: Mapping[str, Any] | None) -> "Semantics":
        """Of a store's attrs.get("action"); unknown where there is none. ValueError names an argument that does not exist."""
        d = dict(d or {})
        if wrong := sorted(set(d) - set(cls.__dataclass_fields__)):
            raise ValueError(f"{', '.join(wrong)} says nothing about an action; use {', '.join(cls.__dataclass_fields__)}")
        return cls(**d)


def described(said: str | Semantics | Mapping[str, Any] | None, attrs: Mapping[str, Any] | None,
              schema: Mapping[str, tuple[Sequence[int], Any]]) -> dict[str, Any]:
    """attrs of a store and what its action means: a sentence alone, or all of it as Semantics has it.   ValueError: said twice, or it cannot be so."""
    if said is None or isinstance(said, str):
        return {"action_semantics": said, **(attrs or {})}
    if (attrs or {}).get("action"):
        raise ValueError("what the action means is said twice: leave `action` out of attrs, or give action_semantics as a sentence")
    meant = said if isinstance(said, Semantics) else Semantics.from_json(said)
    if wrong := meant.misfit(schema):
        raise ValueError(f"action_semantics: {wrong}")
    return {"action_semantics": meant.text or None, **(attrs or {}), "action": meant.to_json()}

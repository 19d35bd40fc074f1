"""Actions relative to where the robot is: to the chunk's start, or step to step, and steps summed up again. See policy.data.transform.

Poses are composed as quaternions (policy.data.rotation), in whichever representation they come.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from policy.data.channels import Array, inside, join, library, like, pick, put
from policy.data.rotation import from_quaternion, inverse, multiply, to_quaternion, turn
from policy.data.semantics import WIDTHS
from policy.data.transform import Seen, Sizes, Transform

FRAMES = ("mixed", "tool", "base")


@dataclass(frozen=True)
class RelativeToChunk(Transform):
    """Absolute targets as differences from where the robot is when the chunk starts: `state`, an observation's newest values.

    channels: of the action that subtract, None all.   take: of the flattened observation, one for each of these, None all.
    rotation: representation of the action's channels `turns`, which are taken relative as rotations; turns_take and state_rotation (None: the same) say
    where the observation has its own.   frame: mixed, positions subtract and rotations are R_now^T R; tool, SE(3) as UMI has it: of `channels` those in
    `position` (x, y, z) are turned into the tool's axes too; base, rotations are R R_now^T, about the axes of the base.
    """
    state: str
    channels: Sequence[int] | None = None
    take: Sequence[int] | None = None
    rotation: str | None = None
    turns: Sequence[int] = ()
    turns_take: Sequence[int] = ()
    state_rotation: str | None = None
    frame: str = "mixed"
    position: Sequence[int] = ()

    @property
    def volume(self) -> bool:  # type: ignore[override]
        return self.rotation is None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.state,)

    def __post_init__(self) -> None:
        self._settle("channels", "take", "turns", "turns_take", "position")
        if self.frame not in FRAMES:
            raise ValueError(f"frame={self.frame!r} is unknown; use one of {', '.join(FRAMES)}")
        for name, rotation, channels in (("turns", self.rotation, self.turns), ("turns_take", self._state_rotation, self.turns_take)):
            if len(channels) != (WIDTHS.get(rotation, -1) if rotation else 0):
                raise ValueError(f"{name}={list(channels)} is not rotation={rotation}: one of {', '.join(f'{k} ({v} channels)' for k, v in WIDTHS.items())}")
        if self.frame == "tool" and (not self.rotation or len(self.position) != 3 or not set(self.position) <= set(self.channels or self.position)):
            raise ValueError("frame=tool turns positions into the tool's axes: it needs rotation, and position=[x,y,z] among the channels")

    @property
    def _state_rotation(self) -> str | None:
        return self.state_rotation or self.rotation

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        places, turned = self._split(action)
        return self._joined(action, *self._apart(places, turned, *self._now(action, obs)))

    def decode(self, action: Array, obs: Seen) -> Array:
        places, turned = self._split(action)
        now, facing = self._now(action, obs)
        return self._joined(action, now + self._position(places, facing), None if turned is None else self._after(facing, turned))

    def width(self, d: int, sizes: Sizes) -> int:
        if self.state not in sizes:
            raise ValueError(f"{type(self).__name__} measures actions from the observation {self.state!r}, which the policy does not have "
                             f"(it sees {', '.join(sizes)}): observe it, data.obs.{self.state}=…, or name another, state=…")
        n = prod(sizes[self.state])
        mine, theirs = range(d) if self.channels is None else self.channels, range(n) if self.take is None else self.take
        if len(mine) != len(theirs):
            raise ValueError(f"{type(self).__name__} takes {len(mine)} action channels from {len(theirs)} of {self.state!r}: name as many, "
                             "channels=[…] take=[…]")
        inside(d, "actions have", [*mine, *self.turns])
        inside(n, f"{self.state!r} has", [*theirs, *self.turns_take])
        return d

    def _now(self, action: Array, obs: Seen) -> tuple[Array, Array | None]:
        """What `state` says of the channels, (b,1,m), and of the rotation, (b,1,4)."""
        state = obs[self.state][:, -1:]
        state = like(state.reshape(*state.shape[:2], -1), action)
        facing = to_quaternion(pick(state, self.turns_take), self._state_rotation) if self._state_rotation else None
        return pick(state, self.take), facing

    def _split(self, action: Array) -> tuple[Array, Array | None]:
        return pick(action, self.channels), to_quaternion(pick(action, self.turns), self.rotation) if self.rotation else None

    def _joined(self, action: Array, places: Array, turned: Array | None) -> Array:
        action = put(action, self.channels, places)
        return action if turned is None or self.rotation is None else put(action, self.turns, from_quaternion(turned, self.rotation))

    def _apart(self, places: Array, turned: Array | None, before: Array, facing: Array | None) -> tuple[Array, Array | None]:
        """places and turned as seen from before and facing, which broadcast with them."""
        moved = places - before
        if turned is None or facing is None:
            return moved, None
        if self.frame == "tool":
            moved = self._position(moved, inverse(facing))
        return moved, multiply(turned, inverse(facing)) if self.frame == "base" else multiply(inverse(facing), turned)

    def _position(self, moved: Array, facing: Array | None) -> Array:
        """moved with its position turned by facing, in the tool's frame."""
        if self.frame != "tool":
            return moved
        at = self.position if self.channels is None else [list(self.channels).index(i) for i in self.position]
        return put(moved, at, turn(facing, pick(moved, at)))

    def _after(self, first: Array | None, then: Array) -> Array:
        """The rotation `first` followed by the relative one `then`."""
        return multiply(then, first) if self.frame == "base" else multiply(first, then)


@dataclass(frozen=True)
class AbsoluteToDelta(RelativeToChunk):
    """Absolute targets as steps: the first from where the robot is, each other from the target before it. Arguments as RelativeToChunk has them.

    A target repeated behind an episode's end is a step of zero.
    """

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        places, turned = self._split(action)
        now, facing = self._now(action, obs)
        return self._joined(action, *self._apart(places, turned, join([now, places[:, :-1]]), None if turned is None else join([facing, turned[:, :-1]])))

    def decode(self, action: Array, obs: Seen) -> Array:
        moved, turned = self._split(action)
        now, facing = self._now(action, obs)
        if turned is None:
            return self._joined(action, join([now, moved]).cumsum(1)[:, 1:], None)
        moved, turned = join([now, moved]), join([facing, turned])
        done, t = 1, turned.shape[1]
        if self.frame != "tool":
            moved = moved.cumsum(1)
        while done < t:  # all products of the first k in log2(t) rounds: each is joined with the one `done` before it
            if self.frame == "tool":
                moved = join([moved[:, :done], moved[:, :-done] + self._position(moved[:, done:], turned[:, :-done])])
            turned = join([turned[:, :done], self._after(turned[:, :-done], turned[:, done:])])
            done *= 2
        return self._joined(action, moved[:, 1:], turned[:, 1:])


@dataclass(frozen=True)
class DeltaToAbsolute(AbsoluteToDelta):
    """Stored steps as targets, summed up from where the robot is: the inverse of AbsoluteToDelta.

    scale, turns_scale: what a stored 1 is in the unit of `state` (turns_scale of an axis-angle alone): actions in [-1, 1] that mean up to 5 cm have .05.
    robosuite's OSC_POSE turns about the base's axes: frame=base.   A step repeated behind an episode's end is one of zero, the robot has stopped.
    """
    scale: float = 1.0
    turns_scale: float = 1.0

    @property
    def volume(self) -> bool:  # type: ignore[override]
        return self.rotation is None and self.scale == 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0 or not self.turns_scale > 0 or (self.turns_scale != 1 and self.rotation != "axis_angle"):
            raise ValueError(f"scale={self.scale} and turns_scale={self.turns_scale} must be above 0, and turns_scale 1 unless rotation=axis_angle")

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        action = action if valid is None else self._stopped(action, valid)
        return super().decode(self._scaled(action, self.scale, self.turns_scale), obs)

    def decode(self, action: Array, obs: Seen) -> Array:
        return self._scaled(super().encode(action, obs), 1 / self.scale, 1 / self.turns_scale)

    def _stopped(self, action: Array, valid: Array) -> Array:
        """Where valid (b,t) is False the robot stays where it is: a target repeated says so, a step repeated does not."""
        places, turned = self._split(action)
        still = self._joined(action, 0 * places, None if turned is None else multiply(turned, inverse(turned)))
        return library(action).where(valid[..., None], action, still)

    def _scaled(self, action: Array, by: float, turns_by: float) -> Array:
        if by != 1:
            action = put(action, self.channels, pick(action, self.channels) * by)
        return put(action, self.turns, pick(action, self.turns) * turns_by) if self.turns and turns_by != 1 else action

"""What actions are turned into before they are normalised, and back: one value of a planner, named in its checkpoint's configuration.

A transform has no state and no weights. Actions are (b,t,d) in physical units, the first of a chunk answers the newest observation; obs {key: (b, t_obs,
*shape)} is what the robot sees, in physical units too, whatever other transforms make of it. decode(encode(x)) is x to rounding: 1e-6 of the largest number
in float32, 1e-12 in float64; of rotations the same rotation, since quaternions have two signs and angles a period. Written for numpy and torch alike: an
export decodes its plans without torch.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from policy.data.channels import Array, inside, like, pick, put, replaced, restored
from policy.data.rotation import convert
from policy.data.semantics import WIDTHS

Seen = Mapping[str, Array]  # an observation
Sizes = Mapping[str, tuple[int, ...]]  # {key: shape of one step}


class Transform:
    """The identity, and what every transform can be asked."""
    volume = True  # a density of what encode gives is one of the actions

    @property
    def reads(self) -> tuple[str, ...]:
        """Observations that encode and decode look at."""
        return ()

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        """valid: (b,t) bool, False on actions repeated behind an episode's end; all hold when absent."""
        return action

    def decode(self, action: Array, obs: Seen) -> Array:
        return action

    def encode_obs(self, obs: Seen) -> dict[str, Array]:
        """Observations as the network sees them; obs may hold other keys, which stay."""
        return dict(obs)

    def decode_obs(self, obs: Seen) -> dict[str, Array]:
        return dict(obs)

    def width(self, d: int, sizes: Sizes) -> int:
        """Channels that encode makes of d. ValueError when it does not fit actions (d,) and observations {key: shape}."""
        return d

    def sizes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Shapes of observations behind encode_obs."""
        return dict(sizes)

    def _settle(self, *names: str) -> None:
        """Channels as tuples, whatever they came as: equal transforms are equal."""
        for name in names:
            channels = getattr(self, name)
            object.__setattr__(self, name, None if channels is None else tuple(int(i) for i in channels))


@dataclass(frozen=True)
class Chain(Transform):
    """Transforms one after the other; none of them is the identity. All are given the robot's own observation."""
    parts: tuple[Transform, ...] = ()

    @property
    def volume(self) -> bool:  # type: ignore[override]
        return all(part.volume for part in self.parts)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(key for part in self.parts for key in part.reads))

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        for part in self.parts:
            action = part.encode(action, obs, valid)
        return action

    def decode(self, action: Array, obs: Seen) -> Array:
        for part in reversed(self.parts):
            action = part.decode(action, obs)
        return action

    def encode_obs(self, obs: Seen) -> dict[str, Array]:
        for part in self.parts:
            obs = part.encode_obs(obs)
        return dict(obs)

    def decode_obs(self, obs: Seen) -> dict[str, Array]:
        for part in reversed(self.parts):
            obs = part.decode_obs(obs)
        return dict(obs)

    def width(self, d: int, sizes: Sizes) -> int:
        for part in self.parts:
            d = part.width(d, sizes)
        return d

    def sizes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        for part in self.parts:
            sizes = part.sizes(sizes)
        return dict(sizes)


NOTHING = Chain()


@dataclass(frozen=True)
class Rotation(Transform):
    """The action's `channels` from one representation of rotations (policy.data.rotation) to another, put where the first of them was.

    obs: observations to be shown to the network in the same way, {key: channels of its last axis, None all}; obs_source: their representation, None the same.
    Networks learn rotation_6d best: it is continuous, the others jump somewhere.
    """
    volume = False
    source: str
    to: str
    channels: Sequence[int] = ()
    obs: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    obs_source: str | None = None

    def __post_init__(self) -> None:
        self._settle("channels")
        object.__setattr__(self, "obs", {key: None if take is None else tuple(take) for key, take in self.obs.items()})
        for name in (self.source, self.to, self._obs_source):
            if name not in WIDTHS:
                raise ValueError(f"{name!r} is no representation of a rotation; use one of {', '.join(WIDTHS)}")
        if len(self.channels) not in (0, WIDTHS[self.source]):
            raise ValueError(f"channels={list(self.channels)} cannot be a rotation in {self.source}: it has {WIDTHS[self.source]}")

    @property
    def _obs_source(self) -> str:
        return self.obs_source or self.source

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        return replaced(action, self.channels, convert(pick(action, self.channels), self.source, self.to)) if self.channels else action

    def decode(self, action: Array, obs: Seen) -> Array:
        return self._back(action, self.channels, self.source) if self.channels else action

    def encode_obs(self, obs: Seen) -> dict[str, Array]:
        of = {k: self._of(k) for k in self.obs}
        return {k: replaced(x, of[k], convert(pick(x, of[k]), self._obs_source, self.to)) if k in of else x for k, x in obs.items()}

    def decode_obs(self, obs: Seen) -> dict[str, Array]:
        return {k: self._back(x, self._of(k), self._obs_source) if k in self.obs else x for k, x in obs.items()}

    def _back(self, x: Array, channels: Sequence[int], source: str) -> Array:
        lo, n = min(channels), WIDTHS[self.to]
        return restored(x, channels, n, convert(x[..., lo: lo + n], self.to, source))

    def width(self, d: int, sizes: Sizes) -> int:
        inside(d, "actions have", self.channels)
        return d + (WIDTHS[self.to] - WIDTHS[self.source] if self.channels else 0)

    def sizes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        if unknown := sorted(set(self.obs) - set(sizes)):
            raise ValueError(f"Rotation.obs names {', '.join(unknown)}, which the policy does not see (it sees {', '.join(sizes)})")
        for key in self.obs:
            channels = self._of(key)
            if len(channels) != WIDTHS[self._obs_source] or (self.obs[key] is None and sizes[key][-1] != len(channels)):
                raise ValueError(f"observation {key!r} {sizes[key]} gives {self.obs[key] or 'all'} of its channels to a rotation in {self._obs_source}, which "
                                 f"has {WIDTHS[self._obs_source]}")
            inside(sizes[key][-1], f"{key!r} has", channels)
        return {k: (*size[:-1], size[-1] + WIDTHS[self.to] - WIDTHS[self._obs_source]) if k in self.obs else size for k, size in sizes.items()}

    def _of(self, key: str) -> Sequence[int]:
        channels = self.obs[key]
        return range(WIDTHS[self._obs_source]) if channels is None else channels


@dataclass(frozen=True)
class Binarise(Transform):
    """Channels that are open or closed, a gripper's, as 1 above `threshold` and -1 up to it; decoded by their sign as `high` and `low`.

    There is no hysteresis: a plan near the middle may chatter. Exact for data that hold these two values alone; others are snapped to the nearer meaning.
    """
    volume = False
    channels: Sequence[int]
    threshold: float
    low: float
    high: float

    def __post_init__(self) -> None:
        self._settle("channels")
        if not self.low <= self.threshold < self.high:
            raise ValueError(f"threshold={self.threshold} must lie between low={self.low} and high={self.high}")

    def encode(self, action: Array, obs: Seen, valid: Array | None = None) -> Array:
        return put(action, self.channels, 2 * like(pick(action, self.channels) > self.threshold, action) - 1)

    def decode(self, action: Array, obs: Seen) -> Array:
        up = like(pick(action, self.channels) > 0, action)
        return put(action, self.channels, up * self.high + (1 - up) * self.low)

    def width(self, d: int, sizes: Sizes) -> int:
        inside(d, "actions have", self.channels)
        return d

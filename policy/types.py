"""The words every layer shares, and the axis legend.

b batch, e environments, t robot time, d features, n tokens, k denoising steps, c h w image. Axis order is always (b, t, d).
Noise time is `tau` (0 data, 1 noise), because `t` is robot time.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

Obs = dict[str, Tensor]  # {key: (b, t_obs, *shape)}


def shape(x: Tensor, axes: str, /, **known: int) -> tuple[int, ...]:
    """Sizes of x by axis name, checked: `b, t, d = shape(x, "b t d", d=7)`. Raises ValueError naming both shapes."""
    names = axes.split()
    want = tuple(known.get(n, n) for n in names)
    if x.ndim != len(names) or any(isinstance(w, int) and w != s for w, s in zip(want, x.shape, strict=True)):
        raise ValueError(f"expected shape ({', '.join(f'{n}={w}' if n != w else n for n, w in zip(names, want, strict=True))}), got {tuple(x.shape)}")
    return tuple(x.shape)


@dataclass(frozen=True)
class Spec:
    """What a policy sees and does; saved with every checkpoint and compared with the robot or task it is put on.

    obs: {key: shape of one time step}.   action_dim: channels of an action, as the robot is sent it, whatever transforms show the network.
    t_obs: observation history.   horizon: steps in a predicted chunk.   fps: control rate [Hz].
    """
    obs: dict[str, tuple[int, ...]]
    action_dim: int
    t_obs: int = 2
    horizon: int = 16
    fps: float = 10.0
    task: str = ""
    units: dict[str, str] = field(default_factory=dict)
    action_semantics: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> "Spec":
        return cls(**{**d, "obs": {k: tuple(v) for k, v in d["obs"].items()}})

    def differences(self, obs: dict[str, tuple[int, ...]], action_dim: int, fps: float) -> str:
        """What a task or robot with these observations {key: shape}, actions and control rate [Hz] lacks; '' when it fits."""
        wrong = [f"observation {k!r} is {'missing' if k not in obs else f'{tuple(obs[k])}'}, trained on {tuple(s)}"
                 for k, s in self.obs.items() if tuple(obs.get(k, ("missing",))) != tuple(s)]
        if action_dim != self.action_dim:
            wrong.append(f"actions have {action_dim} dimensions, trained on {self.action_dim}")
        if fps and self.fps and abs(fps - self.fps) > 1e-6:
            wrong.append(f"control runs at {fps} Hz, trained at {self.fps} Hz")
        return "; ".join(wrong)

    def check(self, obs: dict[str, tuple[int, ...]], action_dim: int, fps: float, where: str) -> None:
        """Raise ValueError when `where` (a task, a robot) does not offer what this policy was trained on."""
        if wrong := self.differences(obs, action_dim, fps):
            raise ValueError(f"this checkpoint (trained for {self.task or 'an unnamed task'}) does not fit {where}: {wrong}. "
                             f"Evaluate it on its own task, or train one for {where}")


@dataclass
class Batch:
    """obs {key: (b, t_obs, *shape)};   action (b, t, d), action[:, 0] answers the newest observation;   valid (b, t) bool, False on padding.

    source: (b,) int64, which of several datasets each row is of, where they are normalised each for itself.
    """
    obs: Obs
    action: Tensor
    valid: Tensor
    source: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch({k: fn(v) for k, v in self.obs.items()}, fn(self.action), fn(self.valid), None if self.source is None else fn(self.source))

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda x: x.to(device, non_blocking=True))


@dataclass
class Cond:
    """Condition tokens (b, n, d) for the denoiser; mask (b, n) bool, False where a token is absent."""
    tokens: Tensor
    mask: Tensor | None = None

    @property
    def flat(self) -> Tensor:
        """(b, n*d): what FiLM layers take. Absent tokens are filled with 2: zeros are an observation in the middle of the data."""
        tokens = self.tokens if self.mask is None else torch.where(self.mask[..., None], self.tokens, 2.0)
        return tokens.flatten(1)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Cond":
        return Cond(fn(self.tokens), None if self.mask is None else fn(self.mask))

    def null(self) -> "Cond":
        """No condition: every token absent."""
        return Cond(self.tokens, torch.zeros(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device))

    def drop(self, p: float) -> "Cond":
        """Absent altogether in a share p of the rows, drawn anew: what trains classifier-free guidance."""
        keep = torch.rand(len(self.tokens), 1, device=self.tokens.device) >= p
        return Cond(self.tokens, keep.expand(self.tokens.shape[:2]) if self.mask is None else self.mask & keep)


Denoise = Callable[[Tensor, Tensor, Cond | None], Tensor]  # (x (b,t,d), tau (b,), cond) -> E[x0 | x] (b,t,d)

"""Guides wrap a Denoise into a Denoise, so they nest in any order and work with every sampler.

A guide is (denoise, frame) -> denoise. Whoever writes one thinks in physical units: frame.decode turns a normalised x0_hat into actions, frame.encode
turns them back, frame.obs is what the robot sees. Gradients can be taken inside, also where a controller plans without them. Five lines are a guide:

    def slow(denoise, frame):
        def guided(x, tau, cond):
            actions = frame.decode(denoise(x, tau, cond))           # (b,t,d) in the units of the data
            return frame.encode(actions.clamp(-0.2, 0.2))           # m/s
        return guided

and fewer are a value for `tilt` and BestOf, or a constraint for `project`:

    def left(actions, obs):                                         # more is better; a cost is a negative value
        beyond = actions[..., 0] - obs["pillar"][:, -1:, 0]         # m to the right of the pillar, (b,t)
        return -beyond.relu().square().mean(1)                      # (b,), m^2

    dipole eval run=… guide=tilt guide.tilt.value._target_=my_pkg.values.left guide.tilt.scale=500 trust=[my_pkg]

Innermost first, the order that makes sense is cfg, tilt, project, clip: cfg calls what it wraps twice, tilt takes a gradient through what it
wraps (a clip's is zero outside), and constraints have the last word. BestOf may stand anywhere.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policy.diffusion.path import Path
from policy.types import Cond, Denoise, Obs

Value = Callable[[Tensor, Obs], Tensor]  # (actions (b,t,d) in physical units, obs) -> (b,), more is better


@dataclass(frozen=True)
class Frame:
    """Where a guide stands: the path, the observation {key: (b, t_obs, *shape)}, and the way from normalised to physical actions and back."""
    path: Path
    obs: Obs
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]


class Undefined(ValueError):
    """A value or its gradient is not finite although the actions are."""


def clip(denoise: Denoise, frame: Frame | None = None, *, limit: float = 1.0) -> Denoise:
    """Keep x0_hat inside [-limit, limit] (normalised units): only for min-max normalised actions, mean/std data would be cut off."""
    if not limit > 0:
        raise ValueError(f"clip limit={limit!r} must be above 0")

    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return denoise(x, tau, cond).clamp(-limit, limit)
    return guided


def pin(denoise: Denoise, frame: Frame | None = None, *, known: Tensor, mask: Tensor) -> Denoise:
    """Inpainting of a start, a goal or a prefix (Janner 2022): known entries enter clean and leave clean.

    known: (b,t,d), normalised; physical when the guide is given a frame.   mask: bool, broadcastable to (b,t,d), True where `known` holds.
    """
    clean = known if frame is None else frame.encode(known)

    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        return torch.where(mask, clean, denoise(torch.where(mask, clean, x), tau, cond))
    return guided


def cfg(denoise: Denoise, frame: Frame | None = None, *, scale: float = 1.5) -> Denoise:
    """Classifier-free guidance (Ho 2022): scale 0 ignores the condition, 1 is plain conditioning, above 1 sharpens. Train with cond_drop=0.1.

    Two network calls for one. The samples are those of p(x)^(1-scale) p(x | obs)^scale where both are Gaussians of equal covariance. Where the
    conditional is narrower, they are narrower than it but wider than that: their standard deviation is std^(1-scale) std_cond^scale.
    """
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        if cond is None:
            raise ValueError("classifier-free guidance needs a condition; this planner has none")
        return torch.lerp(denoise(x, tau, cond.null()), denoise(x, tau, cond), scale)
    return guided


def tilt(denoise: Denoise, frame: Frame, *, value: Value, scale: float = 1.0, reach: float = 1.0) -> Denoise:
    """Sample from p(actions | obs) exp(scale value(actions)): value guidance with the gradient taken through the denoiser.

    value: (actions (b,t,d) in physical units, obs) -> (b,), differentiable.   scale: per unit of value; on Gaussian actions a value with gradient
    g moves the mean by scale * covariance * g.   reach: largest size of the data in normalised units, 1 with normalize=limits. Data inside it
    have no two means further apart than 2 reach, and p_i^2 <= reach^2 g.p; a p that breaks this is error of the network, large where alpha is small: it is cut.

    x0_hat moves by p = Cov[x0 | x] g with Cov = sigma^2 / alpha d x0_hat / d x and g the gradient at x0_hat, times the step that is best along p
    for the curvature seen at its end. Exact on Gaussian actions for a value that is linear, or quadratic with one curvature along p;
    elsewhere an approximation, good while the value is nearly so over the spread of the actions that one x leaves possible.
    A step costs one network call forward and one backward.   Source: Chung 2023 (DPS), Janner 2022; the step length is ours.
    """
    if not reach > 0:
        raise ValueError(f"tilt reach={reach!r} must be above 0")

    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x, tau = x.detach().clone().requires_grad_(), tau.clone()
            x0 = denoise(x, tau, cond)
            g = scale * _gradient(value, frame, x0)
            a, s = frame.path.at(tau, x)
            shift, = torch.autograd.grad(x0, x, s**2 / a.clamp_min(1e-4) * g)
            most, rise = shift.abs().amax((1, 2), keepdim=True).clamp_min(1e-12), (g * shift).sum((1, 2), keepdim=True)
            cut = (2 * reach / most).minimum(reach**2 * rise.clamp_min(0) / most**2).clamp_max(1)
            shift, rise, x0 = cut * shift, cut * rise, x0.detach()
            bend = rise - (scale * _gradient(value, frame, x0 + shift) * shift).sum((1, 2), keepdim=True)
        step = (rise / (cut * rise + bend.clamp_min(0))).clamp_max(1)
        step = torch.where(rise > 0, step, 0)  # a covariance never leads downhill: where one does, the network is wrong
        return x0 + step * shift
    return guided


def _gradient(value: Value, frame: Frame, x0: Tensor) -> Tensor:
    """Of value at the normalised actions x0, (b,t,d)."""
    x0 = x0.detach().requires_grad_()
    v = scores(value, frame.decode(x0), frame.obs)
    if not v.requires_grad:
        raise ValueError(f"tilt needs the gradient of {_name(value)}, but what it returns does not depend on the actions by torch operations. "
                         "Without a gradient, use best_of")
    g, = torch.autograd.grad(v.sum(), x0, materialize_grads=True)
    if not (g.isfinite().flatten(1).all(1) | ~x0.isfinite().flatten(1).all(1)).all():
        raise Undefined(f"the gradient of {_name(value)} is not finite. A root or norm has none at zero: add a small number under the root")
    return g


def scores(value: Value, actions: Tensor, obs: Obs) -> Tensor:
    """value(actions, obs), (b,). ValueError where it has another shape, or is NaN although the actions are finite."""
    v = value(actions, obs)
    if not isinstance(v, Tensor) or v.shape != actions.shape[:1]:
        raise ValueError(f"{_name(value)} must return one number for each of the {len(actions)} plans, a tensor ({len(actions)},), got "
                         f"{tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}: sum or average over time and dimensions")
    if (v.isnan() & actions.isfinite().flatten(1).all(1)).any():
        raise Undefined(f"{_name(value)} is NaN for finite actions: look for 0 / 0, the root of a negative number, or a NaN in the observation")
    return v


def _name(value: Any) -> str:
    value = getattr(value, "func", value)
    return f"the value {getattr(value, '__name__', type(value).__name__)!r}"


def project(denoise: Denoise, frame: Frame, *, onto: Callable[[Tensor, Obs], Tensor]) -> Denoise:
    """Hard constraints at every step: x0_hat is replaced by onto(actions (b,t,d) in physical units, obs), the nearest allowed actions.

    A planner applies it to the finished plan once more: it holds (to float rounding) with every sampler and inside every other guide.
    """
    def guided(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        actions = frame.decode(denoise(x, tau, cond))
        allowed = onto(actions, frame.obs)
        if not isinstance(allowed, Tensor) or allowed.shape != actions.shape:
            raise ValueError(f"onto must return actions {tuple(actions.shape)} like those it is given, got "
                             f"{tuple(allowed.shape) if isinstance(allowed, Tensor) else type(allowed).__name__}")
        return frame.encode(allowed)
    return guided


def base(guide: Any) -> Any:
    """What a guide is: the function under functools.partial, as configurations make them, or BestOf."""
    return type(guide) if isinstance(guide, BestOf) else getattr(guide, "func", guide)


@dataclass(frozen=True)
class BestOf:
    """Draw n plans and keep the one of highest value. It stands among the guides but acts on whole plans: the others guide each of the n.

    value: as for tilt, but need not be differentiable.   The first candidate uses the caller's noise, so n = 1 changes nothing.
    """
    n: int
    value: Value

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"best_of draws a whole number n of plans from 1, got n={self.n!r}")


HARD = (pin, project)  # hold for the plan itself, not only for x0_hat
WITHOUT_GRADIENT = (clip, pin, cfg, project, BestOf)  # need nothing that inference mode forbids


def smooth(actions: Tensor, obs: Obs) -> Tensor:
    """A value: minus the mean squared second difference of the actions, in their unit squared."""
    return -actions.diff(n=2, dim=1).square().mean((1, 2))


def near(actions: Tensor, obs: Obs, *, goal: Any, dims: Sequence[int] | slice | None = None) -> Tensor:
    """A value: minus the squared distance of the last action to `goal`, in the actions' unit squared.   dims: which dimensions, all when None."""
    last = actions[:, -1] if dims is None else actions[:, -1, dims if isinstance(dims, slice) else list(dims)]
    return -(last - _per_dim(goal, last)).square().sum(-1)


def within(actions: Tensor, obs: Obs, *, lower: Any = None, upper: Any = None, step: Any = None, start: str | None = None) -> Tensor:
    """A constraint for project: limits in the units of the data, one number or one for each dimension (None where there is none).

    lower, upper: of the actions.   step: largest change from one control step to the next (a speed limit over fps; for actions that are
    positions), kept by following the plan as fast as allowed.   start: observation whose newest values are where the first dimensions are now,
    so that the first action obeys `step` too.
    """
    if lower is None and upper is None and step is None:
        raise ValueError("within limits nothing: set lower, upper or step, in the units of the actions")
    low, high, most = _per_dim(lower, actions, -torch.inf), _per_dim(upper, actions, torch.inf), _per_dim(step, actions, torch.inf)
    if (low > high).any() or not (most >= 0).all():
        raise ValueError(f"within lower={lower}, upper={upper}, step={step} allows nothing: lower must not exceed upper, and step not be negative")
    actions = actions.maximum(low).minimum(high)
    if step is None:
        return actions
    rows = list(actions.unbind(1))
    if start is not None:
        if start not in obs:
            raise ValueError(f"within start={start!r} is not an observation (there are {', '.join(obs)})")
        now = obs[start][:, -1].flatten(1)
        k = min(now.shape[1], actions.shape[2])
        rows.insert(0, torch.cat([now[:, :k], rows[0][:, k:]], 1))
    for i in range(1, len(rows)):
        rows[i] = rows[i].maximum(rows[i - 1] - most).minimum(rows[i - 1] + most)
    return torch.stack(rows[-actions.shape[1]:], 1)


def _per_dim(limit: Any, like: Tensor, missing: float = 0.0) -> Tensor:
    """A number, or one for each dimension of like (…, d), as a tensor; None is `missing`."""
    whole = [limit] if not hasattr(limit, "__len__") else list(limit)
    if len(whole) not in (1, like.shape[-1]):
        raise ValueError(f"a limit for each of {like.shape[-1]} action dimensions, or one for all; got {len(whole)}")
    return torch.tensor([missing if v is None else float(v) for v in whole], dtype=like.dtype, device=like.device)

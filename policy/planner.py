"""From an observation history to a chunk of actions: normaliser, encoder, denoiser, sampler and guides as one pure function."""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from policy.data.normalize import Normalizer
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import pin
from policy.diffusion.objective import denoising_loss
from policy.diffusion.path import grid
from policy.diffusion.samplers import Sampler, first_order
from policy.types import Batch, Denoise, Obs, Spec, shape

Guide = Callable[[Denoise], Denoise]


class Planner(nn.Module):
    """`loss(batch)` trains it, `plan(obs)` uses it. It keeps no state between calls.

    encoder: Obs -> Cond.   sampler, steps, spacing: how plans are drawn, free to change after training.   guides: applied in order, the
    last one outermost.   padding_loss: whether actions repeated behind an episode's end are learned (the robot learns to stop there).
    obs_noise: standard deviation added to normalised observations in training, against overfitting few demonstrations.
    """

    def __init__(self, spec: Spec, normalizer: Normalizer, encoder: nn.Module, denoiser: Denoiser, *, sampler: Sampler = first_order,
                 steps: int = 10, spacing: str = "trailing", guides: Sequence[Guide] = (), padding_loss: bool = False, obs_noise: float = 0.0):
        super().__init__()
        self.spec, self.normalizer, self.encoder, self.denoiser = spec, normalizer, encoder, denoiser
        self.guides, self.padding_loss, self.obs_noise = list(guides), padding_loss, obs_noise
        self.set_sampler(sampler, steps, spacing)

    def set_sampler(self, sampler: Sampler, steps: int, spacing: str = "trailing") -> None:
        """Draw plans differently from now on; nothing learned changes. ValueError when the sampler cannot follow the planner's path."""
        path = self.denoiser.path
        taus = grid(path, steps, spacing)
        sampler(lambda x, tau, cond: x, path, torch.zeros(1, self.spec.horizon, 1), taus, None)  # a misfit shows now, not on the robot
        self.sampler, self.taus = sampler, taus

    def loss(self, batch: Batch) -> Tensor:
        """Mean denoising loss of each sample, (b,)."""
        obs = self.normalizer.encode(batch.obs)
        if self.training and self.obs_noise:
            obs = {k: v + self.obs_noise * torch.randn_like(v) for k, v in obs.items()}
        cond = self.encoder(obs)
        x0 = self.normalizer.encode({"action": batch.action})["action"]
        loss = denoising_loss(self.denoiser, x0, cond).mean(-1)
        if self.padding_loss:
            return loss.mean(-1)
        weight = batch.valid.to(loss.dtype)
        return (loss * weight).sum(-1) / weight.sum(-1).clamp_min(1)

    def plan(self, obs: Obs, *, noise: Tensor | None = None, prefix: Tensor | None = None) -> Tensor:
        """Actions (b, t, d) in physical units; plan[:, 0] is due now.

        obs: {key: (b, t_obs, *shape)} in physical units.   noise: (b, t, d) standard normal, drawn when absent; the same noise gives the
        same plan with a deterministic sampler.   prefix: (b, p, d) physical actions already promised: the plan starts with exactly these.
        """
        missing = [k for k in self.spec.obs if k not in obs]
        if missing:
            raise KeyError(f"observation lacks {', '.join(missing)} (got {', '.join(obs) or 'nothing'})")
        for key, size in self.spec.obs.items():
            if tuple(obs[key].shape[1:]) != (self.spec.t_obs, *size):
                raise ValueError(f"observation {key!r} must be (b, {self.spec.t_obs}, {', '.join(map(str, size))}), got {tuple(obs[key].shape)}")
        b = len(obs[next(iter(self.spec.obs))])
        cond = self.encoder(self.normalizer.encode({k: obs[k] for k in self.spec.obs}))
        size = (b, self.spec.horizon, self.spec.action_dim)
        if noise is None:
            noise = torch.randn(size, device=cond.tokens.device, dtype=cond.tokens.dtype)
        shape(noise, "b t d", b=b, t=size[1], d=size[2])
        denoise: Denoise = self.denoiser
        for guide in self.guides:
            denoise = guide(denoise)
        if prefix is not None:
            _, p, _ = shape(prefix, "b p d", b=b, d=size[2])
            if p > size[1]:
                raise ValueError(f"prefix promises {p} actions, more than the horizon {size[1]}")
            known = torch.zeros_like(noise)
            known[:, :p] = self.normalizer.encode({"action": prefix})["action"]
            denoise = pin(denoise, known, torch.arange(size[1], device=noise.device)[:, None] < p)
        x = self.sampler(denoise, self.denoiser.path, noise * self.denoiser.path.start_std(), self.taus, cond)
        actions = self.normalizer.decode({"action": x})["action"]
        if prefix is not None:
            actions = torch.cat([prefix, actions[:, prefix.shape[1]:]], 1)
        return actions

"""From an observation history to a chunk of actions: normaliser, encoder, denoiser, sampler and guides as one pure function."""
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from policy.data.normalize import Normalizer
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import HARD, WITHOUT_GRADIENT, BestOf, Frame, Undefined, base, cfg, pin, scores
from policy.diffusion.objective import JUMPS, Objective, denoising, discrete, inside
from policy.diffusion.path import grid
from policy.diffusion.samplers import Draw, Sampler, consistency, first_order
from policy.types import Batch, Cond, Denoise, Obs, Spec, shape

Guide = Callable[[Denoise, Frame], Denoise]


class Planner(nn.Module):
    """`loss(batch)` trains it, `plan(obs)` uses it. It keeps no state between calls.

    encoder: Obs -> Cond.   sampler, steps, spacing, temperature: how plans are drawn, free to change after training.   guides: applied in
    order, the last one outermost.   objective: what training minimises (policy.diffusion.objective).   padding_loss: whether actions repeated
    behind an episode's end are learned (the robot learns to stop there).   obs_noise: standard deviation added to normalised observations in
    training, against overfitting few demonstrations.   cond_drop: share of training samples without condition, for classifier-free guidance.
    """

    def __init__(self, spec: Spec, normalizer: Normalizer, encoder: nn.Module, denoiser: Denoiser, *, sampler: Sampler = first_order,
                 steps: int = 10, spacing: str | Sequence[float] = "trailing", temperature: float = 1.0, guides: Sequence[Guide | BestOf] = (),
                 objective: Objective = denoising, padding_loss: bool = False, obs_noise: float = 0.0, cond_drop: float = 0.0):
        super().__init__()
        self.spec, self.normalizer, self.encoder, self.denoiser, self.objective = spec, normalizer, encoder, denoiser, objective
        if not 0 <= cond_drop < 1 or not obs_noise >= 0:
            raise ValueError(f"cond_drop={cond_drop} must lie in [0, 1) and obs_noise={obs_noise} not be negative")
        self.padding_loss, self.obs_noise, self.cond_drop = padding_loss, obs_noise, cond_drop
        self._try_objective()
        self.set_sampler(sampler, steps, spacing, temperature)
        self.set_guides(guides)

    def set_sampler(self, sampler: Sampler, steps: int, spacing: str | Sequence[float] = "trailing", temperature: float = 1.0) -> None:
        """Draw plans differently from now on; nothing learned changes. ValueError when the sampler cannot follow the planner's path.

        temperature: factor on every noise drawn; below 1 plans gather where they are likely (Ajay 2023: .5), 0 starts from zero.
        Afterwards self.calls is how often a plan calls the network.
        """
        path = self.denoiser.path
        taus = grid(path, steps, spacing)
        if not isinstance(temperature, int | float) or not temperature >= 0:
            raise ValueError(f"temperature={temperature!r} must be a number from 0")
        noisy = "draw" in inspect.signature(sampler).parameters
        trial = torch.ones(1, self.spec.horizon, 1)
        visited: list[float] = []

        def visit(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
            visited.append(tau[0].item())
            return trial + 0 * x  # NaN stays NaN

        with torch.no_grad():
            end = sampler(visit, path, trial, taus, None, **({"draw": torch.zeros_like} if noisy else {}))  # a misfit shows now, not on the robot
        if not end.isfinite().all():
            raise ValueError(f"the sampler gives NaN on {path} at the times {[round(t, 4) for t in taus]}: it divides by alpha, which is 0 at the first. "
                             "Start below, at schedule.tau_max or the first of sampler.spacing")
        self._refuse_untrained(sampler, visited)
        self.sampler, self.taus, self.temperature, self.noisy, self.calls = sampler, taus, temperature, noisy, len(visited)

    def _refuse_untrained(self, sampler: Sampler, visited: Sequence[float]) -> None:
        """ValueError when the sampler asks the network what its objective does not teach."""
        objective, options = inside(self.objective)
        density, times = inside(options.get("density"))
        if objective in JUMPS and inside(sampler)[0] is not consistency:
            raise ValueError("this policy learned to jump to data, not to estimate their mean: only sampler=consistency plans with it; "
                             "the others need a policy that denoises, such as the teacher of a distilled one")
        known = list(times["taus"]) if density is discrete else []
        if known and (unseen := sorted({round(t, 4) for t in visited if min(abs(t - k) for k in known) > 1e-4})):
            raise ValueError(f"this policy was trained at the noise times {known} only, and the sampler asks at {unseen[:3]}: "
                             f"use sampler=consistency sampler.spacing={known} sampler.steps={len(known)}, or another formalism")

    def _try_objective(self) -> None:
        """ValueError when the objective cannot train this denoiser: now, on a network that knows nothing, not after the data is loaded."""
        trial = Denoiser(_Nothing(), self.denoiser.path, self.denoiser.target, sigma_data=self.denoiser.sigma_data)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                taught = {"teacher": trial} if "teacher" in inspect.signature(self.objective).parameters else {}
                self.objective(trial, torch.zeros(2, self.spec.horizon, self.spec.action_dim), None, 0.0, **taught)
        except TypeError as e:
            raise ValueError(f"the objective cannot be used: {e}. `dipole train --help` lists what objective and density take") from e

    def set_guides(self, guides: Sequence[Guide | BestOf]) -> None:
        """Guide plans differently from now on; nothing learned changes. ValueError, or what a guide raises, when they cannot work here."""
        if any(base(g) is cfg for g in guides) and not self.cond_drop:
            raise ValueError("classifier-free guidance needs a policy that was also trained without its condition, and this one has cond_drop=0: "
                             "train with cond_drop=0.1, or choose another guide")
        best = [g for g in guides if isinstance(g, BestOf)]
        if len(best) > 1:
            raise ValueError("plans are chosen once: one BestOf, whose value may add several")
        g = torch.Generator().manual_seed(0)  # a misfit shows now, not on the robot: the guides around a denoiser that knows nothing
        x = 0.3 * torch.randn(2, self.spec.horizon, self.spec.action_dim, generator=g)
        obs = {k: 0.3 * torch.randn(2, self.spec.t_obs, *size, generator=g) for k, size in self.spec.obs.items()}
        first = next(self.normalizer.buffers())
        x, obs = x.to(first), self.normalizer.decode({k: v.to(first) for k, v in obs.items()})
        frame = self.frame(obs)
        with suppress(Undefined), torch.no_grad():  # random numbers are no place to judge values
            self._wrap(guides, lambda x, tau, cond: x, frame)(x, x.new_full((2,), self.denoiser.path.tau_max / 2), Cond(x[:, :1]))
            for b in best:
                scores(b.value, frame.decode(x), obs)
        self.guides = list(guides)

    def loss(self, batch: Batch, progress: float = 0.0) -> Tensor:
        """Mean loss of each sample, (b,). progress in [0, 1]: how much of training is done."""
        obs = self.normalizer.encode(batch.obs)
        if self.training and self.obs_noise:
            obs = {k: v + self.obs_noise * torch.randn_like(v) for k, v in obs.items()}
        cond = self.encoder(obs)
        if self.training and self.cond_drop:
            cond = cond.drop(self.cond_drop)
        x0 = self.normalizer.encode({"action": batch.action})["action"]
        loss = self.objective(self.denoiser, x0, cond, progress).mean(-1)
        if self.padding_loss:
            return loss.mean(-1)
        weight = batch.valid.to(loss.dtype)
        return (loss * weight).sum(-1) / weight.sum(-1).clamp_min(1)

    def encode(self, obs: Obs) -> Cond:
        """Condition tokens of a checked observation {key: (b, t_obs, *shape)} in physical units. KeyError, ValueError when it does not fit."""
        missing = [k for k in self.spec.obs if k not in obs]
        if missing:
            raise KeyError(f"observation lacks {', '.join(missing)} (got {', '.join(obs) or 'nothing'})")
        for key, size in self.spec.obs.items():
            if tuple(obs[key].shape[1:]) != (self.spec.t_obs, *size):
                raise ValueError(f"observation {key!r} must be (b, {self.spec.t_obs}, {', '.join(map(str, size))}), got {tuple(obs[key].shape)}")
        return self.encoder(self.normalizer.encode({k: obs[k] for k in self.spec.obs}))

    def _wrap(self, guides: Sequence[Guide | BestOf], denoise: Denoise, frame: Frame) -> Denoise:
        for guide in guides:
            if not isinstance(guide, BestOf):
                denoise = guide(denoise, frame)
        return denoise

    def frame(self, obs: Obs) -> Frame:
        return Frame(self.denoiser.path, obs, lambda x: self.normalizer.decode({"action": x})["action"],
                     lambda actions: self.normalizer.encode({"action": actions})["action"])

    def plan(self, obs: Obs, *, noise: Tensor | None = None, prefix: Tensor | None = None, draw: Draw = torch.randn_like) -> Tensor:
        """Actions (b, t, d) in physical units; plan[:, 0] is due now.

        obs: {key: (b, t_obs, *shape)} in physical units.   noise: (b, t, d) standard normal, drawn when absent; the same noise gives the
        same plan with a deterministic sampler, and with a stochastic one when draw (x -> noise like x) gives the same too.
        prefix: (b, p, d) physical actions already promised: the plan starts with exactly these.
        """
        chosen = next((g for g in self.guides if isinstance(g, BestOf)), None)
        if chosen is not None:
            return self._best(chosen, obs, noise, prefix, draw)
        return self.sample(obs, self.encode(obs), noise=noise, prefix=prefix, draw=draw)

    def sample(self, obs: Obs, cond: Cond, *, noise: Tensor | None = None, prefix: Tensor | None = None, draw: Draw = torch.randn_like) -> Tensor:
        """plan, for a condition that is encoded already; no BestOf."""
        if torch.is_inference_mode_enabled() and any(base(g) not in WITHOUT_GRADIENT for g in self.guides):
            with torch.inference_mode(False), torch.no_grad():
                # inference mode is the quicker, but its tensors take no part in gradients
                noise, prefix = (None if x is None else x.clone() for x in (noise, prefix))
                return self.sample({k: v.clone() for k, v in obs.items()}, cond.map(torch.clone), noise=noise, prefix=prefix, draw=draw)
        b = len(cond.tokens)
        size = (b, self.spec.horizon, self.spec.action_dim)
        if noise is None:
            noise = torch.randn(size, device=cond.tokens.device, dtype=cond.tokens.dtype)
        shape(noise, "b t d", b=b, t=size[1], d=size[2])
        frame = self.frame(obs)
        denoise = self._wrap(self.guides, self.denoiser, frame)
        settle = self._wrap([g for g in self.guides if base(g) in HARD], lambda x, tau, cond: x, frame)
        if prefix is not None:
            _, p, _ = shape(prefix, "b p d", b=b, d=size[2])
            if p > size[1]:
                raise ValueError(f"prefix promises {p} actions, more than the horizon {size[1]}")
            known = torch.zeros_like(noise)
            known[:, :p] = self.normalizer.encode({"action": prefix})["action"]
            mask = torch.arange(size[1], device=noise.device)[:, None] < p
            denoise, settle = pin(denoise, known=known, mask=mask), pin(settle, known=known, mask=mask)
        options = {"draw": lambda x: self.temperature * draw(x)} if self.noisy else {}
        start = noise * (self.temperature * self.denoiser.path.start_std(self.taus[0]))
        x = self.sampler(denoise, self.denoiser.path, start, self.taus, cond, **options)
        x = settle(x, x.new_zeros(b), cond)  # not every sampler ends on x0_hat, nor are the hard guides always outermost
        actions = self.normalizer.decode({"action": x})["action"]
        if prefix is not None:
            actions = torch.cat([prefix, actions[:, prefix.shape[1]:]], 1)
        return actions

    def _best(self, best: BestOf, obs: Obs, noise: Tensor | None, prefix: Tensor | None, draw: Draw) -> Tensor:
        n, cond = best.n, self.encode(obs)
        b, (t, d) = len(cond.tokens), (self.spec.horizon, self.spec.action_dim)
        obs, cond = {k: v.repeat_interleave(n, 0) for k, v in obs.items()}, cond.map(lambda x: x.repeat_interleave(n, 0))
        first = torch.randn(b, t, d, device=cond.tokens.device, dtype=cond.tokens.dtype) if noise is None else noise
        starts = torch.stack([first, *(draw(first) for _ in range(n - 1))], 1).flatten(0, 1)

        def each(x: Tensor) -> Tensor:  # one draw of every row for each of its candidates
            return torch.stack([draw(part) for part in x.unflatten(0, (b, n)).unbind(1)], 1).flatten(0, 1)

        plans = self.sample(obs, cond, noise=starts, prefix=None if prefix is None else prefix.repeat_interleave(n, 0), draw=each)
        value = scores(best.value, plans, obs)
        value = torch.where(plans.isfinite().flatten(1).all(1), value, -torch.inf)
        return plans.unflatten(0, (b, n))[torch.arange(b, device=plans.device), value.reshape(b, n).argmax(1)]


class _Nothing(nn.Module):
    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.zeros_like(x)

"""From an observation history to a chunk of actions: transform, normaliser, encoder, denoiser, sampler and guides as one pure function."""
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from policy.data.normalize import Normalizer, Rows
from policy.data.transform import NOTHING, Transform
from policy.diffusion.denoiser import Denoiser
from policy.diffusion.guides import HARD, WITHOUT_GRADIENT, BestOf, Frame, Undefined, base, cfg, scores
from policy.diffusion.objective import JUMPS, Objective, denoising, discrete, inside
from policy.diffusion.path import grid
from policy.diffusion.rtc import Past, Promise
from policy.diffusion.samplers import Draw, Sampler, consistency, first_order
from policy.timeline import CONTINUES, MERGES, soft_mask
from policy.types import Batch, Cond, Denoise, Obs, Spec, shape

Guide = Callable[[Denoise, Frame], Denoise]


class Planner(nn.Module):
    """`loss(batch)` trains it, `plan(obs)` uses it. It keeps no state between calls.

    normalizer, transform: from physical units to the network's, the transform first; self.size is a chunk's there.   encoder: Obs -> Cond.
    sampler, steps, spacing, temperature: how plans are drawn, free to change after training.   guides: applied in order, the last one outermost.
    objective: what training minimises (policy.diffusion.objective).   padding_loss: whether actions repeated behind an episode's end are learned (the
    robot learns to stop there).   obs_noise: standard deviation added to normalised observations in training, against overfitting few
    demonstrations.   cond_drop: share of training samples without condition, for classifier-free guidance.   rtc: most first steps of a chunk that
    training shows as known (training-time real-time chunking, arXiv 2512.05964), for merge=prefix; the denoiser's network must be a
    policy.nets.prefix.Prefix then.
    """

    def __init__(self, spec: Spec, normalizer: Normalizer, encoder: nn.Module, denoiser: Denoiser, *, sampler: Sampler = first_order,
                 steps: int = 10, spacing: str | Sequence[float] = "trailing", temperature: float = 1.0, guides: Sequence[Guide | BestOf] = (),
                 objective: Objective = denoising, padding_loss: bool = False, obs_noise: float = 0.0, cond_drop: float = 0.0,
                 rtc: int = 0, transform: Transform = NOTHING):
        super().__init__()
        self.spec, self.normalizer, self.encoder, self.denoiser, self.objective = spec, normalizer, encoder, denoiser, objective
        self.transform, self.size = transform, (spec.horizon, transform.width(spec.action_dim, spec.obs))
        if not 0 <= cond_drop < 1 or not obs_noise >= 0:
            raise ValueError(f"cond_drop={cond_drop} must lie in [0, 1) and obs_noise={obs_noise} not be negative")
        if not 0 <= rtc < spec.horizon:
            raise ValueError(f"rtc={rtc} known steps must be fewer than the horizon {spec.horizon}")
        if rtc and inside(objective)[0] is not denoising:
            raise ValueError("train.rtc teaches a network to denoise beside known steps: it needs objective=denoising. A consistency model, or a student "
                             "of a run trained with it, cannot be told them: train without rtc and plan with control.merge=frozen or guided")
        self.padding_loss, self.obs_noise, self.cond_drop, self.rtc = padding_loss, obs_noise, cond_drop, rtc
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
                self.objective(trial, torch.zeros(2, *self.size), None, 0.0, **taught)
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
        x = 0.3 * torch.randn(2, *self.size, generator=g)
        obs = {k: 0.3 * torch.randn(2, self.spec.t_obs, *size, generator=g) for k, size in self.transform.sizes(self.spec.obs).items()}
        first = next(self.normalizer.buffers())
        x, obs = x.to(first), self.decode_obs({k: v.to(first) for k, v in obs.items()})
        frame = self.frame(obs)
        with suppress(Undefined), torch.no_grad():  # random numbers are no place to judge values
            self._wrap(guides, lambda x, tau, cond: x, frame)(x, x.new_full((2,), self.denoiser.path.tau_max / 2), Cond(x[:, :1]))
            for b in best:
                scores(b.value, frame.decode(x), obs)
        self.guides = list(guides)

    def loss(self, batch: Batch, progress: float = 0.0) -> Tensor:
        """Mean loss of each sample, (b,). progress in [0, 1]: how much of training is done."""
        rows = self.normalizer.of(batch.source)
        obs = self.encode_obs(batch.obs, rows)
        if self.training and self.obs_noise:
            obs = {k: v + self.obs_noise * torch.randn_like(v) for k, v in obs.items()}
        cond = self.encoder(obs)
        if self.training and self.cond_drop:
            cond = cond.drop(self.cond_drop)
        x0 = self.encode_actions(batch.action, batch.obs, batch.valid, rows)
        weight = torch.ones_like(batch.valid) if self.padding_loss else batch.valid
        told: dict[str, Tensor] = {}
        if self.rtc:
            steps = torch.randint(0, self.rtc + 1, (len(x0), 1), device=x0.device)
            told["known"] = torch.arange(x0.shape[1], device=x0.device) < steps
            weight = weight & ~told["known"]
        loss = self.objective(self.denoiser, x0, cond, progress, **told).mean(-1)
        if self.padding_loss and not self.rtc:
            return loss.mean(-1)
        weight = weight.to(loss.dtype)
        return (loss * weight).sum(-1) / weight.sum(-1).clamp_min(1)

    def encode(self, obs: Obs) -> Cond:
        """Condition tokens of a checked observation {key: (b, t_obs, *shape)} in physical units. KeyError, ValueError when it does not fit."""
        missing = [k for k in self.spec.obs if k not in obs]
        if missing:
            raise KeyError(f"observation lacks {', '.join(missing)} (got {', '.join(obs) or 'nothing'})")
        for key, size in self.spec.obs.items():
            if tuple(obs[key].shape[1:]) != (self.spec.t_obs, *size):
                raise ValueError(f"observation {key!r} must be (b, {self.spec.t_obs}, {', '.join(map(str, size))}), got {tuple(obs[key].shape)}")
        return self.encoder(self.encode_obs({k: obs[k] for k in self.spec.obs}))

    def encode_obs(self, obs: Obs, normalizer: Normalizer | Rows | None = None) -> Obs:
        """Physical observations {key: (b, t_obs, *shape)} as the encoder sees them.   normalizer: another than the planner's."""
        return (normalizer or self.normalizer).encode(self.transform.encode_obs(obs))

    def decode_obs(self, obs: Obs) -> Obs:
        """The inverse of encode_obs."""
        return self.transform.decode_obs(self.normalizer.decode(obs))

    def encode_actions(self, actions: Tensor, obs: Obs, valid: Tensor | None = None, normalizer: Normalizer | Rows | None = None) -> Tensor:
        """Physical actions (b,p,d), or (p,d) for every row, from now on under obs -> as the network sees them, (b,p,d'); p up to the horizon.

        valid: (b,p), see Batch.
        """
        p = actions.shape[-2]
        if actions.ndim == 2:
            actions = actions.expand(len(next(iter(obs.values()))), -1, -1)
        return (normalizer or self.normalizer).encode({"action": _whole(self.transform.encode(actions, obs, valid), self.size[0])})["action"][:, :p]

    def decode_actions(self, x: Tensor, obs: Obs) -> Tensor:
        """A chunk (b,t,d') of the network's as physical actions (b,t,d) under obs."""
        return self.transform.decode(self.normalizer.decode({"action": x})["action"], obs)

    def _wrap(self, guides: Sequence[Guide | BestOf], denoise: Denoise, frame: Frame) -> Denoise:
        for guide in guides:
            if not isinstance(guide, BestOf):
                denoise = guide(denoise, frame)
        return denoise

    def frame(self, obs: Obs) -> Frame:
        return Frame(self.denoiser.path, obs, lambda x: self.decode_actions(x, obs), lambda actions: self.encode_actions(actions, obs))

    def plan(self, obs: Obs, *, noise: Tensor | None = None, prefix: Tensor | None = None, committed: int | None = None, merge: str = "frozen",
             warm: float | None = None, limit: float = 5.0, prior: float = 1.0, draw: Draw = torch.randn_like) -> Tensor:
        """Actions (b, t, d) in physical units; plan[:, 0] is due now.

        obs: {key: (b, t_obs, *shape)} in physical units.   noise: (b, *self.size) standard normal, drawn when absent; the same noise gives the
        same plan with a deterministic sampler, and with a stochastic one when draw (x -> noise like x) gives the same too.
        prefix: (b, p, d) physical actions already promised from now on.   committed: how many of them are going to be executed whatever the plan
        says, all when absent.   merge: what is made of them. naive, ensemble: nothing.   frozen: the plan is denoised around the committed ones.
        guided: it is pulled towards all, by real-time chunking with this limit and prior (policy.diffusion.rtc).   identity: the same without the
        Jacobian.   prefix: the network is told the committed ones; it must have been trained so.   But for the first two, the plan starts with
        exactly the committed ones.
        warm: noise time in (0, 1] to start from, at the noised prefix (its last action repeated) instead of noise alone: the solver's steps above
        it are left out. Goes with every merge; without a prefix it does nothing.
        """
        past = None if prefix is None else self._past(prefix, committed, merge, warm, limit, prior)
        chosen = next((g for g in self.guides if isinstance(g, BestOf)), None)
        if chosen is not None:
            return self._best(chosen, obs, noise, past, draw)
        return self.sample(obs, self.encode(obs), noise=noise, past=past, draw=draw)

    def _past(self, prefix: Tensor, committed: int | None, merge: str, warm: float | None, limit: float, prior: float) -> Past:
        p = shape(prefix, "b p d", b=len(prefix), d=self.spec.action_dim)[1]
        committed = p if committed is None else committed
        if p > self.spec.horizon:
            raise ValueError(f"prefix promises {p} actions, more than the horizon {self.spec.horizon}")
        if not 0 <= committed <= p:
            raise ValueError(f"committed={committed} steps must be among the {p} that the prefix promises")
        if merge not in MERGES:
            raise ValueError(f"merge {merge!r} is unknown; use one of {', '.join(MERGES)}")
        if warm is not None and not 0 < warm <= 1:
            raise ValueError(f"warm={warm!r} must be a noise time above 0 and not above 1")
        if merge == "prefix" and committed > self.rtc:
            raise ValueError(f"merge=prefix goes on from {committed} known steps, and this policy learned to from {self.rtc or 'none'}: "
                             f"train with train.rtc={max(committed, 1)} or more, or use merge=frozen or guided, which need no training")
        return Past(prefix, committed, merge, warm, limit, prior)

    def sample(self, obs: Obs, cond: Cond, *, noise: Tensor | None = None, past: Past | None = None, draw: Draw = torch.randn_like) -> Tensor:
        """plan, for a condition that is encoded already; no BestOf."""
        if torch.is_inference_mode_enabled() and ((past and past.merge == "guided") or any(base(g) not in WITHOUT_GRADIENT for g in self.guides)):
            with torch.inference_mode(False), torch.no_grad():
                # inference mode is the quicker, but its tensors take no part in gradients
                past = past and past.map(torch.clone)
                return self.sample({k: v.clone() for k, v in obs.items()}, cond.map(torch.clone), noise=None if noise is None else noise.clone(),
                                   past=past, draw=draw)
        b = len(cond.tokens)
        size = (b, *self.size)
        if noise is None:
            noise = torch.randn(size, device=cond.tokens.device, dtype=cond.tokens.dtype)
        shape(noise, "b t d", b=b, t=size[1], d=size[2])
        frame = self.frame(obs)
        denoise: Denoise = self.denoiser
        settle: Denoise = self._wrap([g for g in self.guides if base(g) in HARD], lambda x, tau, cond: x, frame)
        promise = None
        if past is not None:
            shape(past.prefix, "b p d", b=b, d=self.spec.action_dim)
            promise = self._promise(past, obs, noise)
            denoise, settle = promise.inside(denoise, self.denoiser.path), promise.outside(settle)
        denoise = self._wrap(self.guides, denoise, frame)
        if promise is not None:
            denoise = promise.outside(denoise)
        options = {"draw": lambda x: self.temperature * draw(x)} if self.noisy else {}
        start, taus = self._start(noise, past, obs)
        x = self.sampler(denoise, self.denoiser.path, start, taus, cond, **options)
        x = settle(x, x.new_zeros(b), cond)  # not every sampler ends on x0_hat, nor are the hard guides always outermost
        actions = self.decode_actions(x, obs)
        if past is not None and past.merge in CONTINUES:
            actions = torch.cat([past.prefix[:, :past.committed], actions[:, past.committed:]], 1)
        return actions

    def _promise(self, past: Past, obs: Obs, like: Tensor) -> Promise:
        p, t = past.prefix.shape[1], like.shape[1]
        known = torch.zeros_like(like)
        if p:
            known[:, :p] = self.encode_actions(past.prefix, obs)
        weight = torch.from_numpy(soft_mask(t, past.committed, p)).to(like)[:, None]
        return Promise(known, past.committed, weight, past.merge, past.limit, past.prior)

    def _start(self, noise: Tensor, past: Past | None, obs: Obs) -> tuple[Tensor, Sequence[float]]:
        """Where the sampler starts, and its times from there on."""
        taus, path = self.taus, self.denoiser.path
        if past is None or past.warm is None or not past.prefix.shape[1]:
            return noise * (self.temperature * path.start_std(taus[0])), taus
        taus = [t for t in taus if t <= past.warm + 1e-6]
        if len(taus) < 2:
            raise ValueError(f"warm={past.warm} lies below the sampler's last noise time {self.taus[-2]:.3g}: nothing would be left to do. "
                             f"Use warm={self.taus[-2]:.2g} or more, or more sampler.steps")
        guess, known = _whole(past.prefix, noise.shape[1]), torch.arange(noise.shape[1], device=noise.device) < past.prefix.shape[1]
        a = float(path.alpha(torch.tensor(taus[0], dtype=torch.float64)))
        return a * self.encode_actions(guess, obs, known.expand(len(guess), -1)) + noise * (self.temperature * path.start_std(taus[0])), taus

    def _best(self, best: BestOf, obs: Obs, noise: Tensor | None, past: Past | None, draw: Draw) -> Tensor:
        n, cond = best.n, self.encode(obs)
        b, (t, d) = len(cond.tokens), self.size
        obs, cond = {k: v.repeat_interleave(n, 0) for k, v in obs.items()}, cond.map(lambda x: x.repeat_interleave(n, 0))
        first = torch.randn(b, t, d, device=cond.tokens.device, dtype=cond.tokens.dtype) if noise is None else noise
        starts = torch.stack([first, *(draw(first) for _ in range(n - 1))], 1).flatten(0, 1)

        def each(x: Tensor) -> Tensor:  # one draw of every row for each of its candidates
            return torch.stack([draw(part) for part in x.unflatten(0, (b, n)).unbind(1)], 1).flatten(0, 1)

        plans = self.sample(obs, cond, noise=starts, past=past and past.map(lambda x: x.repeat_interleave(n, 0)), draw=each)
        value = scores(best.value, plans, obs)
        value = torch.where(plans.isfinite().flatten(1).all(1), value, -torch.inf)
        return plans.unflatten(0, (b, n))[torch.arange(b, device=plans.device), value.reshape(b, n).argmax(1)]


def _whole(actions: Tensor, t: int) -> Tensor:
    """(b,p,d) as (b,t,d), the last action repeated."""
    return actions if actions.shape[1] == t else torch.cat([actions, actions[:, -1:].expand(-1, t - actions.shape[1], -1)], 1)


class _Nothing(nn.Module):
    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        return torch.zeros_like(x)

"""The quick way to plan with torch: one robot, buffers made beforehand; a re-laid U-Net on CPUs, the whole loop as one CUDA graph on GPUs.

The answers are PlannerBackend's to rounding. What is not covered (guided, other guides than clip) goes the ordinary way.
"""
import threading
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from policy.nets.prefix import Prefix
from policy.nets.single import SingleUNet1d
from policy.planner import Planner
from policy.serve.backend import PlannerBackend, drawing
from policy.serve.probe import tabulate
from policy.serve.solver import Promised, Solver, check_prefix, kept, promised
from policy.serve.step import Step, limits, unet_of
from policy.types import Cond

WARM_UP = 3


class FastPlan:
    """A Backend with the answers of `ordinary`, whose planner is to stay as it is.   lacks: why it is no quicker than that, '' when it is."""

    def __init__(self, ordinary: PlannerBackend):
        planner = ordinary.planner
        self.ordinary, self.card, self.planner, self.lock = ordinary, ordinary.card, planner, threading.Lock()
        self.size = planner.size
        self.lacks, kind = uncovered(planner), GraphLoop if ordinary.device.type == "cuda" else CpuLoop
        starts = [] if self.lacks else [None] if ordinary.warm is None else [None, ordinary.warm]
        self.loops: Sequence[CpuLoop | GraphLoop] = [kind(planner, tabulate(planner, warm)) for warm in starts]

    @torch.inference_mode()
    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        """See Backend."""
        if not self.loops or merge == "guided":
            return self.ordinary.plan(obs, noise=noise, prefix=prefix, committed=committed, merge=merge)
        planner, device, loop = self.planner, self.ordinary.device, self.loops[0]
        size = (planner.spec.horizon, planner.spec.action_dim)
        known = check_prefix(prefix, committed, merge, size=size, merges=tuple(self.card.merges), rtc=planner.rtc)
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and the plan is refused for it
            seen = {k: torch.from_numpy(np.array(obs[k], np.float32))[None].to(device) for k in planner.spec.obs}
        cond = planner.encode(seen)
        noises, near = self._noises(noise, loop.solver.draws), None
        if known is not None:
            near = planner.encode_actions(torch.from_numpy(known)[None].to(device), seen)[0].cpu().numpy()
            if loop is not self.loops[-1]:
                loop = self.loops[-1]
                whole = torch.from_numpy(np.concatenate([known, np.repeat(known[-1:], size[0] - len(known), 0)]))[None].to(device)
                guess = planner.encode_actions(whole, seen, torch.arange(size[0], device=device)[None] < len(known))
                noises = torch.cat([noises[: loop.solver.draws], guess.cpu()])
        told = promised(loop.solver, self.size, near, committed, merge, limit=self.ordinary.limit, prior=self.ordinary.prior)
        with self.lock:
            x = loop.walk(cond, noises, told)
            actions: np.ndarray = planner.decode_actions(x[None], seen)[0].float().cpu().numpy()
        return kept(actions, known, committed, merge)

    def _noises(self, noise: np.ndarray | None, draws: int) -> Tensor:
        """(1 + draws, t, d), of which the given one fixes the others as it does for PlannerBackend."""
        first = torch.randn(self.size) if noise is None else torch.from_numpy(np.array(noise, np.float32))
        if tuple(first.shape) != self.size:
            raise ValueError(f"noise must be {self.size}, got {tuple(first.shape)}")
        draw = drawing(noise)
        return torch.stack([first, *(draw(first[None])[0] for _ in range(draws))])


def uncovered(planner: Planner) -> str:
    """Why FastPlan cannot be quicker than the ordinary way with this planner; '' when it can."""
    device = next(planner.parameters()).device.type
    if device == "cpu" and unet_of(planner) is None:
        return "on CPUs it re-lays net=unet1d in fp32 alone"
    if device not in ("cpu", "cuda"):
        return f"it knows no device {device}"
    try:
        limits(planner)
    except ValueError as e:
        return str(e)
    return ""


class CpuLoop:
    """The solver's loop around SingleUNet1d."""

    def __init__(self, planner: Planner, solver: Solver):
        (t, d), net, denoiser = planner.size, unet_of(planner), planner.denoiser
        assert net is not None
        self.solver, self.limits, self.d = solver, limits(planner), d
        self.net = SingleUNet1d(net, t, solver.taus.tolist())
        self.flag = self.net.x[:, d] if isinstance(denoiser.net, Prefix) else None
        like = torch.empty(1, 1, 1)
        self.scales = [tuple(c.item() for c in denoiser.scales(like, torch.tensor([tau], dtype=torch.float32))) for tau in solver.taus]
        self.clean = denoiser.scales(like, torch.zeros(1))[0].item()
        self.terms = torch.zeros(len(solver.final), t * d)
        first = 1 + solver.draws
        self.rows = [(torch.from_numpy(r).float(), self.terms[: first + i], self.terms[first + i].view(t, d)) for i, r in enumerate(solver.rows)]
        self.noise, self.final = self.terms[:first].view(first, t, d), torch.from_numpy(solver.final).float()
        self.x = torch.zeros(t, d)

    def walk(self, cond: Cond, noises: Tensor, told: Promised) -> Tensor:
        """The normalised plan (t,d).   noises: (1 + draws, t, d)."""
        x, enter, flat = self.x, self.net.x[:, : self.d], self.x.view(-1)
        known, pinned = torch.from_numpy(told.known), int(told.mask.sum())
        pull = torch.from_numpy(told.pull) if told.pull.any() else None
        if self.flag is not None:
            self.flag.zero_()[: pinned if told.told else 0] = 1
        self.noise.copy_(noises)
        self.net.condition(cond)
        for i, ((row, before, m), (c_in, c_skip, c_out)) in enumerate(zip(self.rows, self.scales, strict=True)):
            torch.mv(before.t(), row, out=flat)
            if pinned:
                x[:pinned] = known[:pinned]
            torch.mul(x, c_in, out=enter)
            if told.told:
                torch.mul(known[:pinned], self.clean, out=enter[:pinned])
            torch.mul(x, c_skip, out=m).add_(self.net(i)[:, : self.d], alpha=c_out)
            if pull is not None:
                m.lerp_(known, pull[i])
            for limit in self.limits:
                m.clamp_(-limit, limit)
            if pinned:
                m[:pinned] = known[:pinned]
        return torch.mv(self.terms.t(), self.final).view_as(x)


class GraphLoop:
    """The solver's loop around any network as one CUDA graph with fixed inputs; on other devices the same loop without a graph.

    Nothing is copied to the GPU inside: the denoiser's scales are known beforehand, what a plan is about is written into tensors that stay.
    """

    def __init__(self, planner: Planner, solver: Solver):
        (t, d), self.solver, self.rtc = planner.size, solver, planner.rtc
        like = next(planner.parameters()).detach()
        self.net, self.step = planner.denoiser.net, Step(planner)
        self.terms = like.new_zeros(len(solver.final), t * d)
        self.noise = self.terms[: 1 + solver.draws].view(-1, t, d)
        self.known, self.mask, self.told = like.new_zeros(1, t, d), torch.zeros(1, t, 1, dtype=torch.bool, device=like.device), like.new_zeros(1, t)
        self.pull = like.new_zeros(solver.calls, 1, t, 1)
        self.rows, self.final = [torch.from_numpy(r).to(like) for r in solver.rows], torch.from_numpy(solver.final).to(like)
        with torch.no_grad():
            self.cond = planner.encode({k: like.new_zeros(1, planner.spec.t_obs, *size) for k, size in planner.spec.obs.items()}).map(torch.clone)
            self.taus = [like.new_full((1, t) if self.rtc else (1,), float(tau)) for tau in solver.taus]
            self.scales = [planner.denoiser.scales(self.known, tau[:, 0] if self.rtc else tau) for tau in self.taus]
            self.clean = planner.denoiser.scales(self.known, like.new_zeros(1))[0]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out = torch.empty(0)
        if like.device.type == "cuda":
            self._capture(like.device)

    @torch.no_grad()
    def _capture(self, device: torch.device) -> None:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._once()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self._once()

    def _once(self) -> Tensor:
        at, size, told = len(self.noise), self.known.shape, self.told[..., None] > 0
        for tau, row, pull, (c_in, c_skip, c_out) in zip(self.taus, self.rows, self.pull, self.scales, strict=True):
            x = torch.where(self.mask, self.known, (row @ self.terms[:at]).view(size))
            if self.rtc:
                tau, c_in = tau * (1 - self.told), torch.where(told, self.clean, c_in)
            x0 = c_skip * x + c_out * self.net(c_in * x, tau, self.cond)
            self.terms[at] = self.step.around(x0, self.known, self.mask, pull).flatten()
            at += 1
        return (self.final @ self.terms).view(size[1:])

    def walk(self, cond: Cond, noises: Tensor, told: Promised) -> Tensor:
        """The normalised plan (t,d), until the next one.   noises: (1 + draws, t, d)."""
        self.noise.copy_(noises)
        self.cond.tokens.copy_(cond.tokens)
        if self.cond.mask is not None and cond.mask is not None:
            self.cond.mask.copy_(cond.mask)
        self.known.copy_(torch.from_numpy(told.known))
        self.mask.copy_(torch.from_numpy(told.mask))
        self.pull.copy_(torch.from_numpy(told.pull)[:, None])
        self.told.copy_(torch.from_numpy(told.mask[:, 0] & told.told))
        if self.graph is None:
            return self._once()
        self.graph.replay()
        return self.out

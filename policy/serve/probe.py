"""A planner's sampler read off as the table of coefficients that policy.serve.solver walks."""
from collections.abc import Sequence

import torch
from torch import Tensor

from policy.diffusion.samplers import Draw
from policy.planner import Planner
from policy.serve.solver import Solver
from policy.types import Cond, Denoise

TOLERANCE = 1e-6  # of the table against the sampler itself, on a network that is not linear, in double precision


def tabulate(planner: Planner, warm: float | None = None) -> Solver:
    """Run the sampler once on one-hot vectors in double precision: noise, draws and the denoiser's answers are the basis.

    warm: as in Planner.plan; the promised plan is the last of the draws then.   ValueError when the sampler is not linear in them, or depends on the values
    it sees, which no sampler of ours does, and when warm leaves it nothing to do.
    """
    walk = _Walk(planner, warm)
    first = 1 + walk.draws
    basis = torch.eye(first + walk.calls, dtype=torch.float64)[:, None, :, None]  # an element each, along the time axis
    taus: list[float] = []
    rows: list[Tensor] = []

    def answer(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        taus.append(tau[0].item())
        rows.append(x.flatten())
        return basis[first + len(rows) - 1]

    final = walk(answer, basis[:first]).flatten()
    future = max((r[first + i:].abs().max().item() for i, r in enumerate(rows)), default=0.0)
    a, s = planner.denoiser.path.at(torch.tensor(taus, dtype=torch.float64), final[:, None])
    table = Solver(torch.tensor(taus, dtype=torch.float64).numpy(), a.flatten().numpy(), s.flatten().numpy(),
                   tuple(r[: first + i].numpy() for i, r in enumerate(rows)), final.numpy(), walk.draws)
    if future or not _agrees(walk, table):
        raise ValueError("the sampler is not linear in its noise and the network's answers, so it cannot be a table of coefficients. Choose one that is: "
                         "sampler=ddim, heun, dpmpp_2m, consistency or diffusers")
    return table


class _Walk:
    """The planner's sampler with everything given that it draws, from noise alone or from a promised plan.   draws, calls: how many it makes of each."""

    def __init__(self, planner: Planner, warm: float | None):
        self.planner, self.warm = planner, warm is not None
        self.times: Sequence[float] = planner.taus if warm is None else [t for t in planner.taus if t <= warm + 1e-6]
        if len(self.times) < 2:
            raise ValueError(f"control.warm={warm} lies below the sampler's last noise time {planner.taus[-2]:.3g}: use that or more, or more sampler.steps")
        self.draws, self.calls = 0, 0
        one = torch.ones(1, 1, 1, dtype=torch.float64)
        self._run(self._called, one, self._drawn)
        self.draws += self.warm

    def __call__(self, answer: Denoise, given: Tensor) -> Tensor:
        """given: (1 + draws, 1, t, d); of a warm start the promised plan is the last."""
        start, drawn = given[0] * (self.planner.temperature * self.planner.denoiser.path.start_std(self.times[0])), iter(given[1:])
        if self.warm:
            start = start + float(self.planner.denoiser.path.alpha(torch.tensor(self.times[0], dtype=torch.float64))) * given[-1]
        return self._run(answer, start, lambda x: next(drawn))

    def _run(self, answer: Denoise, start: Tensor, draw: Draw) -> Tensor:
        planner = self.planner
        noisy = {"draw": lambda x: planner.temperature * draw(x)} if planner.noisy else {}
        with torch.inference_mode(False), torch.no_grad():
            end: Tensor = planner.sampler(answer, planner.denoiser.path, start, self.times, None, **noisy)
        return end

    def _called(self, x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        self.calls += 1
        return x

    def _drawn(self, x: Tensor) -> Tensor:
        self.draws += 1
        return x


def _agrees(walk: _Walk, table: Solver) -> bool:
    """Whether table and sampler end alike on random noise and a denoiser that is not linear."""
    noise = torch.randn(1 + table.draws, 1, 5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = walk(lambda x, tau, cond: 2 * torch.tanh(x + tau[0]), noise)
    terms = list(noise)
    for tau, row in zip(table.taus, table.rows, strict=True):
        x = sum(float(c) * m for c, m in zip(row, terms, strict=True))
        terms.append(2 * torch.tanh(x + float(tau)))
    got = sum(float(c) * m for c, m in zip(table.final, terms, strict=True))
    return bool((torch.as_tensor(got) - want).abs().max() < TOLERANCE * max(1.0, float(want.abs().max())))

"""A planner's sampler read off as the table of coefficients that policy.serve.solver walks."""
import torch
from torch import Tensor

from policy.diffusion.samplers import Draw
from policy.planner import Planner
from policy.serve.solver import Solver
from policy.types import Cond, Denoise

TOLERANCE = 1e-6  # of the table against the sampler itself, on a network that is not linear, in double precision


def tabulate(planner: Planner) -> Solver:
    """Run the sampler once on one-hot vectors in double precision: noise, draws and the denoiser's answers are the basis.

    ValueError when the sampler is not linear in them, or depends on the values it sees, which no sampler of ours does.
    """
    draws = _count_draws(planner)
    first, width = 1 + draws, 1 + draws + planner.calls
    basis = torch.eye(width, dtype=torch.float64)[:, None, :, None]  # an element each, along the time axis
    taus: list[float] = []
    rows: list[Tensor] = []
    drawn = iter(range(1, first))

    def answer(x: Tensor, tau: Tensor, cond: Cond | None) -> Tensor:
        taus.append(tau[0].item())
        rows.append(x.flatten())
        return basis[first + len(rows) - 1]

    final = _sample(planner, answer, basis[0], lambda x: basis[next(drawn)]).flatten()
    future = max((r[first + i:].abs().max().item() for i, r in enumerate(rows)), default=0.0)
    a, s = planner.denoiser.path.at(torch.tensor(taus, dtype=torch.float64), final[:, None])
    table = Solver(torch.tensor(taus, dtype=torch.float64).numpy(), a.flatten().numpy(), s.flatten().numpy(),
                   tuple(r[: first + i].numpy() for i, r in enumerate(rows)), final.numpy(), draws)
    if future or not _agrees(planner, table):
        raise ValueError("the sampler is not linear in its noise and the network's answers, so it cannot be a table of coefficients. Choose one that is: "
                         "sampler=ddim, heun, dpmpp_2m, consistency or diffusers")
    return table


def _sample(planner: Planner, answer: Denoise, start: Tensor, draw: Draw) -> Tensor:
    path = planner.denoiser.path
    noisy = {"draw": lambda x: planner.temperature * draw(x)} if planner.noisy else {}
    with torch.inference_mode(False), torch.no_grad():
        end: Tensor = planner.sampler(answer, path, start * (planner.temperature * path.start_std(planner.taus[0])), planner.taus, None, **noisy)
    return end


def _count_draws(planner: Planner) -> int:
    drawn = []

    def draw(x: Tensor) -> Tensor:
        drawn.append(1)
        return torch.zeros_like(x)

    _sample(planner, lambda x, tau, cond: x, torch.ones(1, 1, 1, dtype=torch.float64), draw)
    return len(drawn)


def _agrees(planner: Planner, table: Solver) -> bool:
    """Whether table and sampler end alike on random noise and a denoiser that is not linear."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 + table.draws, 1, 5, 1, generator=generator, dtype=torch.float64)
    drawn = iter(noise[1:])
    want = _sample(planner, lambda x, tau, cond: 2 * torch.tanh(x + tau[0]), noise[0], lambda x: next(drawn))
    terms = list(noise)
    for tau, row in zip(table.taus, table.rows, strict=True):
        x = sum(float(c) * m for c, m in zip(row, terms, strict=True))
        terms.append(2 * torch.tanh(x + float(tau)))
    got = sum(float(c) * m for c, m in zip(table.final, terms, strict=True))
    return bool((torch.as_tensor(got) - want).abs().max() < TOLERANCE * max(1.0, float(want.abs().max())))

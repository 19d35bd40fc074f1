"""Exponential moving average of the weights. Its decay is a function of the step, so a resumed run continues it exactly."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(step: int, *, limit: float, power: float = 0.75) -> float:
    """Decay of the update after optimiser step `step` (0-based): min(limit, 1 - (1 + step)^-power), 0 at step 0. Oracle: diffusers.EMAModel."""
    return max(0.0, min(limit, 1 - (1 + step) ** -power))


class Ema:
    """Averages of all parameters of a module; buffers (normaliser statistics) are constant and not averaged."""

    def __init__(self, module: nn.Module, *, limit: float = 0.999, power: float = 0.75):
        self.limit, self.power = limit, power
        self.live = dict(module.named_parameters())
        self.average = {k: p.detach().clone() for k, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.live.values()], 1 - decay_at(step, limit=self.limit, power=self.power))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for k, p in self.live.items():
            held: Tensor = p.detach().clone()
            p.copy_(self.average[k])
            self.average[k].copy_(held)

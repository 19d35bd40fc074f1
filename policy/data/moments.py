"""What a normaliser needs to know of numbers that are looked at once, in pieces, in bounded memory."""
import torch
from torch import Tensor

BLOCK, KEEP = 2**20, 2**22  # numbers looked at at once; of those kept for quantiles


class Moments:
    """Rows (n, m) as they come, in double precision: n, smallest lo, largest hi, mean and std (of the population), each (m,).

    quantiles: also keep rows for `sample`: all of them up to KEEP numbers, beyond that every second, fourth, … so that KEEP / 2 to KEEP numbers are an even
    sample of everything seen. Of independent rows the 1 % quantile is then one at 1 ± .01 % (a million rows), of smooth trajectories it is closer.
    """

    def __init__(self, *, quantiles: bool = True):
        self.n, self._quantiles, self._stride, self._seen = 0, quantiles, 1, 0
        self.lo = self.hi = self.mean = self._square = torch.empty(0)
        self._kept: list[Tensor] = []

    def add(self, windows: Tensor) -> None:
        """windows: (w, …, m), rows that belong together are kept together."""
        if not windows.numel():
            return
        rows = windows.to(torch.float64).reshape(-1, windows.shape[-1])
        n, lo, hi, mean = len(rows), rows.amin(0), rows.amax(0), rows.mean(0)
        square, whole = (rows - mean).square().sum(0), self.n + n
        if self.n:  # Chan et al. 1979
            lo, hi, apart = lo.minimum(self.lo), hi.maximum(self.hi), mean - self.mean
            square = square + self._square + apart**2 * (self.n * n / whole)
            mean = self.mean + apart * (n / whole)
        self.n, self.lo, self.hi, self.mean, self._square = whole, lo, hi, mean, square
        if self._quantiles:
            self._kept.append(windows[-self._seen % self._stride:: self._stride].clone())
            self._seen += len(windows)
            while sum(x.numel() for x in self._kept) > KEEP:
                self._kept, self._stride = [torch.cat(self._kept)[::2]], 2 * self._stride

    @property
    def std(self) -> Tensor:
        return (self._square / self.n).sqrt()

    def sample(self) -> Tensor:
        """(k, m) float64"""
        return torch.cat(self._kept).to(torch.float64).reshape(-1, len(self.lo))

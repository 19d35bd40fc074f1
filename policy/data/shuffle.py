"""The order in which windows are drawn from more data than fits into memory.

The dataset is cut into N blocks of consecutive frames, of which `live` are in memory. In every epoch the blocks arrive in a random order, one a tick; a
window of the block that arrived at tick t is drawn at time t + live * u, u uniform in [0, 1), and what would be drawn behind tick N is drawn at the
beginning instead, from blocks that are read a second time. So at every moment exactly `live` blocks are in use, each window is drawn once an epoch, and
with live = N the order is a uniformly random permutation. What distinguishes it from one otherwise (measured in tests/data/test_shuffle.py):

- A batch of b windows is a random sample of `live` blocks, renewed at one block a tick, not of all N: it has about live * (1 - (1 - 1 / live)^b) distinct
  ones. 64 windows from 500 live blocks: 60.1; from 10,000, a perfect shuffle: 63.8.
- Windows of one block are drawn within live / N of an epoch, so two of them meet in a batch N / live times as often as in a perfect shuffle.
- Successive draws are of independent blocks but for the chance 1 / live of the same one: the autocorrelation of frame numbers within a batch is about
  1 / live at any lag.
"""
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Schedule:
    """An epoch.   order (n,): windows.   visit (n,): which reading of a block each is drawn from, counted in order of first use.   block (v,): what it reads.

    begun (n,): readings that must have been made for the draws up to this one.   last (v,): the last draw from a reading.
    """
    order: np.ndarray
    visit: np.ndarray
    block: np.ndarray
    begun: np.ndarray
    last: np.ndarray


def schedule(block: np.ndarray, live: int, seed: int) -> Schedule:
    """block (n,): the block of each window, 0 to N - 1, each of them at least once."""
    count, generator = int(block.max()) + 1, torch.Generator().manual_seed(seed)
    live = min(live, count)
    arrival = torch.randperm(count, generator=generator).numpy()
    time = arrival[block] + live * torch.rand(len(block), generator=generator, dtype=torch.float64).numpy()
    again = time >= count
    order = np.argsort(np.where(again, time - count, time), kind="stable")
    reading = (2 * block + again)[order]
    known, first, which = np.unique(reading, return_index=True, return_inverse=True)
    rank = np.empty(len(known), np.int64)
    rank[by_use := np.argsort(first)] = np.arange(len(known))
    visit = rank[which.ravel()]
    last = np.zeros(len(known), np.int64)
    last[visit] = np.arange(len(visit))  # of repeated indices the last value stays
    return Schedule(order, visit, known[by_use] // 2, np.maximum.accumulate(visit) + 1, last)


def expected_distinct(live: int, batch: int) -> float:
    """Mean number of distinct blocks among `batch` windows, each drawn from one of `live` at random."""
    return live * (1 - (1 - 1 / live) ** batch)

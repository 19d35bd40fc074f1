"""Windows over more data than fits into memory: large keys stay where they are and are read in blocks ahead of training; the rest is resident.

The order is that of policy.data.shuffle, a function of the seed and of how many blocks fit: training goes on bit for bit where it stopped, whatever the
threads that read are doing. Every frame is decoded once an epoch, a share of live / N of the blocks twice.
"""
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.data.pool import Pool
from policy.data.shuffle import schedule
from policy.data.store import Store
from policy.data.windows import Epoch, Field, TrajectoryDataset, read_frames
from policy.types import Batch

RESIDENT = 4096  # bytes of a frame above which a key is streamed
BLOCK = 2**21  # bytes of a block; a chunk of the store where that is more; less of a small memory, so that LEAST blocks are live
LEAST = 64
DECODING = 8  # blocks' worth of what is read and decoded at a time; not the number of readers, for the order must not depend on where the data lies
AHEAD = 16  # slots, or an eighth of them, that are filled before they are needed


class OnDisk:
    """Frames (n, *shape) of a key where they are stored, in spans [lo, hi) of the store's; read and split as a tensor is."""
    device = torch.device("cpu")

    def __init__(self, store: Store, field: Field, spans: Sequence[tuple[int, int]]):
        self.store, self.field, self.spans = store, field, spans
        first = read_frames(store, field, *((lo := spans[0][0]), lo + 1)) if spans else torch.empty(0)
        self.shape, self.dtype = torch.Size([sum(hi - lo for lo, hi in spans), *first.shape[1:]]), first.dtype
        self.frame_bytes = first.numel() * first.element_size()
        stored, kind = store.schema[field.key]
        self.stored_bytes, self.chunk = math.prod(stored) * kind.itemsize, store.chunk(field.key)
        self.as_stored = torch.empty(0, dtype=self.dtype).numpy().dtype == kind and field.take is None and len(stored) > 0

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        for lo, hi in self.spans:
            for at in range(lo, hi, split_size):
                yield self.read(at, min(at + split_size, hi))

    def read(self, lo: int, hi: int) -> Tensor:
        """Frames [lo, hi) of the store."""
        return read_frames(self.store, self.field, lo, hi)

    def read_into(self, out: Tensor, lo: int, hi: int) -> None:
        """The same, put into out (hi - lo, *shape)."""
        if self.as_stored and self.dtype == torch.uint8:
            self.store.read(self.field.key, lo, hi, out=out.numpy())
        else:
            out.copy_(self.read(lo, hi))


class Streamed(TrajectoryDataset):
    """A TrajectoryDataset whose large keys are not loaded.   batch(index) reads what it needs; epoch(seed).batch(lo, hi) has it already.

    memory: bytes for the resident keys, the blocks in use and those being decoded; the rest of the process comes on top (torch alone takes 250 MB).
    stream: observations that are not resident, all of more than RESIDENT bytes a frame when None.   readers: threads that read and decode, None: 2 for files,
    8 for a URL.   Other arguments as TrajectoryDataset has them.   ValueError when memory is too small.
    arrays holds resident keys as tensors, the others as OnDisk.   block: frames of a block.   live: blocks in use at a time.
    """

    def __init__(self, store: Store, obs: Mapping[str, str | Field | Mapping], action: str | Field | Mapping, *, memory: int, readers: int | None = None,
                 stream: Collection[str] | None = None, device: torch.device | str = "cpu", **how: Any):
        fields = {name: Field.of(f) for name, f in obs.items()}
        large = [name for name, f in fields.items() if (OnDisk(store, f, [(0, 1)]).frame_bytes > RESIDENT if stream is None else name in stream)]
        super().__init__(store, {name: f for name, f in fields.items() if name not in large}, action, device=device, **how)
        self.streamed = {name: OnDisk(store, fields[name], self.spans) for name in large}
        self.resident = dict(self.arrays)
        self.arrays = {name: self.streamed.get(name, self.resident.get(name)) for name in [*fields, "action"]}  # type: ignore[misc]
        self.readers, self.device = readers or (2 if store.local else 8), torch.device(device)
        starts, ends = (np.array(x) for x in zip(*self.spans, strict=True))
        self._starts, self._until = starts, np.cumsum(ends - starts)  # of each episode: first frame in the store, end in the split
        self.block = self.live = self._slots = 0
        self._path = store.path
        self._pool: Pool | None = None
        if self.streamed:
            self._cut(memory)

    def _cut(self, memory: int) -> None:
        """The split's frames into blocks, memory into slots."""
        frame, stored = (sum(n) for n in zip(*((x.frame_bytes, x.stored_bytes) for x in self.streamed.values()), strict=True))
        chunk = max(x.chunk for x in self.streamed.values())
        resident = sum(x.numel() * x.element_size() for x in self.resident.values()) + 16 * len(self)
        left = memory - resident
        self.block = chunk * max(1, min(BLOCK, left // (LEAST + 2 * DECODING)) // (chunk * frame))
        absolute = self._absolute(np.arange(len(self)))
        most = min(self.block, int(absolute[-1] - absolute[0]) + 1)
        rows = most + self.t_obs - 1  # a slot holds the history of its first window too
        grid, self._block_of = np.unique(absolute // self.block, return_inverse=True)
        decoding = DECODING * most * stored
        slots = min(len(grid), (left - decoding) // (rows * frame))
        if slots < (least := min(len(grid), 4)):
            need = resident + decoding + least * rows * frame
            raise ValueError(f"data.memory={memory:.3g} bytes are too few to stream {', '.join(self.streamed)} of {self._path}: resident keys take "
                             f"{resident:.3g}, a block {rows * frame:.3g}. Give it {need} or more")
        self._slots, self._rows = slots, rows
        self.live = slots if slots == len(grid) else max(1, slots - max(1, min(slots // 8, AHEAD)))
        lo = np.flatnonzero(np.diff(self._block_of, prepend=-1))  # first window of each block
        hi = np.append(lo[1:], len(self)) - 1
        self._base = np.maximum(absolute[lo] - (self.t_obs - 1), self._starts[np.searchsorted(self._until, lo, side="right")])
        self._end = absolute[hi] + 1

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self._base) if self.streamed else 0

    @property
    def order_facts(self) -> dict[str, Any]:
        """What the order of an epoch depends on beside the seed."""
        return {"block": self.block, "live": self.live} if self.streamed else {}

    def epoch(self, seed: int) -> Epoch:
        if not self.streamed:
            return super().epoch(seed)
        if self._pool is None:
            self.slots = {name: torch.empty(self._slots * self._rows, *x.shape[1:], dtype=x.dtype) for name, x in self.streamed.items()}
            self._pool = Pool(self._slots, self._fill, self.readers)
        return StreamedEpoch(self, self._pool, seed)

    def _fill(self, block: int, slot: int) -> None:
        lo, hi = int(self._base[block]), int(self._end[block])
        for name, x in self.streamed.items():
            x.read_into(self.slots[name][slot * self._rows:][:hi - lo], lo, hi)

    def _absolute(self, frames: np.ndarray) -> np.ndarray:
        """Frames of the split -> frames of the store."""
        episode = np.searchsorted(self._until, frames, side="right")
        return frames - np.concatenate([[0], self._until])[episode] + self._starts[episode]

    def _frames(self, name: str, frames: Tensor) -> Tensor:
        if name not in self.streamed:
            return super()._frames(name, frames)
        source = self.streamed[name]
        wanted, inverse = np.unique(self._absolute(frames.cpu().numpy()), return_inverse=True)
        out = torch.empty(len(wanted), *source.shape[1:], dtype=source.dtype)
        cuts = [0, *(np.flatnonzero(np.diff(wanted // source.chunk)) + 1).tolist(), len(wanted)]

        def fetch(a: int, b: int) -> None:  # frames of one chunk
            lo = int(wanted[a])
            out[a:b] = source.read(lo, int(wanted[b - 1]) + 1)[torch.from_numpy(wanted[a:b] - lo)]
        with ThreadPoolExecutor(self.readers) as threads:
            list(threads.map(fetch, cuts[:-1], cuts[1:]))
        return out[torch.from_numpy(inverse.reshape(frames.shape))].to(self.device)


class StreamedEpoch(Epoch):
    """Blocks are read ahead of the batches, from the first one asked for on."""

    def __init__(self, data: Streamed, pool: Pool, seed: int):
        self._plan = schedule(data._block_of, data.live, seed)
        super().__init__(data, torch.from_numpy(self._plan.order))
        self._streamed, self._pool, self._at = data, pool, -1

    def batch(self, lo: int, hi: int) -> Batch:
        if lo != self._at or self._pool.followed is not self._plan:  # the first batch, one elsewhere, or another epoch came between
            self._pool.follow(self._plan, lo)
        data, self._at = self._streamed, hi
        index = self.order[lo:hi]
        batch = data.batch(index, only=data.resident)
        back = data._past_of(index.to(data.device)).cpu() - index[:, None]  # frames of history behind each window's own, 0 or less
        offset = back + torch.from_numpy(data._absolute(index.numpy()) - data._base[data._block_of[index]])[:, None]  # in the slot
        out = {name: torch.empty(len(index), data.t_obs, *x.shape[1:], dtype=x.dtype, pin_memory=data.device.type == "cuda")
               for name, x in data.streamed.items()}
        at = lo
        while at < hi:
            end = min(hi, self._pool.take(at))
            slot = torch.from_numpy(self._pool.slot[self._plan.visit[at:end]])
            rows = (slot[:, None] * data._rows + offset[at - lo:end - lo]).flatten()
            for name, x in out.items():
                torch.index_select(data.slots[name], 0, rows, out=x[at - lo:end - lo].flatten(0, 1))
            at = end
        return Batch({name: out[name].to(data.device, non_blocking=True) if name in out else batch.obs[name] for name in data.arrays if name != "action"},
                     batch.action, batch.valid)

    def close(self) -> None:
        self._pool.close()

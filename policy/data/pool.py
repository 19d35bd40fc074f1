"""Blocks of frames in a fixed number of slots, read by threads ahead of those who use them."""
import threading
from collections.abc import Callable

import numpy as np

from policy.data.shuffle import Schedule


class Pool:
    """read(block, slot) puts a block into a slot, in a thread.   slots: at least one more than a schedule has blocks in use at a time.

    What a slot held stays in it until the slot is needed, and is not read again before that: a dataset that fits is read once. reads counts.
    """

    def __init__(self, slots: int, read: Callable[[int, int], None], readers: int):
        self.slots, self.readers, self.reads, self._read = slots, readers, 0, read
        self._held = [-1] * slots  # block of each slot
        self._complete = [False] * slots
        self._users = [0] * slots  # readings that still need it
        self._threads: list[threading.Thread] = []
        self._change, self._stop = threading.Condition(), False
        self._error: BaseException | None = None
        self.followed: Schedule | None = None

    def follow(self, schedule: Schedule, start: int) -> None:
        """Read what the draws from `start` on need, in that order. What was followed before is over."""
        self.close()
        self.followed = schedule
        for slot in range(self.slots):
            self._users[slot] = 0
            if not self._complete[slot]:
                self._held[slot] = -1
        needed = schedule.last >= start
        self._todo = np.flatnonzero(needed)  # readings in order of first use
        self._up_to = np.cumsum(needed)  # {reading: how many of todo come up to it}
        self._begun, self._block = schedule.begun, schedule.block
        self._ends = sorted(zip(schedule.last[self._todo].tolist(), self._todo.tolist(), strict=True), reverse=True)
        self._later: dict[int, list[int]] = {}  # {block: places in todo, the next one last}
        for place, block in reversed(list(enumerate(self._block[self._todo].tolist()))):
            self._later.setdefault(block, []).append(place)
        self.slot = np.full(len(self._block), -1, np.int64)  # {reading: slot}
        self._next = self._ready = 0  # how many of todo have a slot; how many are complete, without a gap
        self._stop, self._error = False, None
        self._threads = [threading.Thread(target=self._run, name="dipole reader", daemon=True) for _ in range(self.readers)]
        for thread in self._threads:
            thread.start()

    def take(self, at: int) -> int:
        """Wait until the draws [at, end) can be made from self.slot and give end > at; what was used before `at` alone may go."""
        with self._change:
            freed = False
            while self._ends and self._ends[-1][0] < at:
                slot = self.slot[self._ends.pop()[1]]
                self._users[slot] -= 1
                freed |= not self._users[slot]
            if freed:
                self._change.notify_all()
            wanted = self._up_to[self._begun[at] - 1]
            self._change.wait_for(lambda: self._error is not None or self._ready >= wanted)
            if self._error is not None:
                raise self._error
            return int(np.searchsorted(self._begun, self._todo[self._ready], side="right")) if self._ready < len(self._todo) else len(self._begun)

    def close(self) -> None:
        """End the threads; each finishes the block it reads."""
        with self._change:
            self._stop = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads, self.followed = [], None

    def _run(self) -> None:
        try:
            while (job := self._job()) is not None:
                block, slot = job
                self._read(block, slot)
                with self._change:
                    self._complete[slot] = True
                    self.reads += 1
                    self._advance()
        except BaseException as e:  # a panic in a library of Rust's is no Exception, and a batch that waits must hear of it
            with self._change:
                self._error = e
                self._change.notify_all()

    def _job(self) -> tuple[int, int] | None:
        """The next block to be read and a slot for it, as soon as there is one; None at the end."""
        with self._change:
            while not self._stop and self._error is None and self._next < len(self._todo):
                reading = int(self._todo[self._next])
                block = int(self._block[reading])
                held = block in self._held
                slot = self._held.index(block) if held else self._free()
                if slot is None:
                    self._change.wait()
                    continue
                self._next += 1
                self._later[block].pop()
                self._users[slot] += 1
                self.slot[reading] = slot
                if held:
                    self._advance()
                    continue
                self._held[slot], self._complete[slot] = block, False
                return block, slot
            return None

    def _free(self) -> int | None:
        """The unused slot whose block is needed last, None when all are used."""
        unused = [slot for slot in range(self.slots) if not self._users[slot]]
        return max(unused, key=lambda slot: later[-1] if (later := self._later.get(self._held[slot])) else len(self._todo), default=None)

    def _advance(self) -> None:
        while self._ready < self._next and self._complete[self.slot[self._todo[self._ready]]]:
            self._ready += 1
        self._change.notify_all()

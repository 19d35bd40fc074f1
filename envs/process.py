"""A worker process seen from its parent: asked, watched, and, when it hangs or dies, made to say where it was."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np

from envs.worker import MARKS

BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from envs.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # the processes share the cores
PATIENCE = 10  # s for a message to pass, once it is on its way
Message = tuple[str, tuple[Any, ...]]  # a method of envs.worker.Group and its arguments


class End(NamedTuple):
    """copy, step: what the process was at in its last message, -1 for nothing.   hung: it was alive, but silent.   text: what is known."""

    copy: int
    step: int
    hung: bool
    text: str


class Process:
    """A fresh interpreter running envs.worker.main. It shares no thread, no lock and no __main__ with this one."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # a process can be stopped in the middle of a message
            here.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", PATIENCE, 0))
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.write(struct.pack("3q", -1, 0, 0))
        self._file.flush()
        fds = there.fileno(), self._file.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps([str(path) for path in sys.path]), *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
        )
        there.close()
        self.pipe = Connection(here.detach())
        self._marks = np.frombuffer(mmap.mmap(self._file.fileno(), MARKS), np.int64)
        self._calls, self._since, self._limit, self.busy, self._end = 0, 0.0, 0.0, False, None

    def post(self, message: Message | None, limit: float) -> None:
        """Send; what goes wrong shows when the answer is waited for."""
        self._since, self._limit, self.busy = time.monotonic(), limit, True
        try:
            self.pipe.send(message)
        except OSError:
            self.kill()

    def silent(self) -> bool:
        """Whether it has died, or has not begun a new reset or step for `limit` seconds."""
        if self._process.poll() is not None:
            return not self.pipe.poll()
        if self._calls != self._marks[2]:
            self._calls, self._since = int(self._marks[2]), time.monotonic()
        return time.monotonic() - self._since > self._limit

    def receive(self) -> Any:
        """The answer, None if there will be none; RuntimeError with the traceback of what is no environment's fault."""
        try:
            well, answer = self.pipe.recv()
        except (EOFError, OSError):
            return None
        self.busy = False
        if not well:
            raise RuntimeError(f"a worker process failed:\n{answer}")
        return answer

    def end(self) -> End:
        """Stop it and say what it was at."""
        try:
            self._process.wait(0 if self.silent() else 1)
        except subprocess.TimeoutExpired:
            hung = True
            self._process.send_signal(signal.SIGUSR1)  # makes faulthandler write where it is, even from within C
            time.sleep(0.3)
        else:
            hung = False
        self.kill()
        trace = os.pread(self._file.fileno(), 1 << 16, MARKS).decode(errors="replace")
        if hung:
            what = f"no answer for {self._limit:g} s"
        elif (code := self._process.returncode) < 0:
            what = f"its process died of {signal.Signals(-code).name}" + " (the system's way with too much memory)" * (code == -signal.SIGKILL)
        else:
            what = f"its process exited with {code}"
        return End(int(self._marks[0]), int(self._marks[1]), hung, f"{what}.\n{trace or 'It left no traceback.'}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self, deadline: float) -> None:
        """Wait for it to go until then (time.monotonic), or kill it."""
        try:
            self._process.wait(max(0.0, 0.0 if self.busy else deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
        self.pipe.close()
        self._file.close()


def ask(processes: Sequence[Process], messages: Mapping[int, Message], limit: float) -> dict[int, Any]:
    """Send each its message, at once; the answers of those that give one. limit: s that a reset or step may take."""
    answers: dict[int, Any] = {}
    waiting = set(messages)
    try:
        for w, message in messages.items():
            processes[w].post(message, limit)
        while waiting:
            ready = wait([processes[w].pipe for w in waiting], timeout=min(limit / 4, 1.0))
            for w in list(waiting):
                if processes[w].pipe in ready:
                    waiting.remove(w)
                    if (answer := processes[w].receive()) is not None:
                        answers[w] = answer
                elif processes[w].silent():
                    waiting.remove(w)
    except BaseException:
        for w in waiting:  # what it still has to say would be taken for the answer to the next question
            processes[w].kill()
        raise
    return answers


def close(processes: Sequence[Process], seconds: float = 2.0) -> None:
    """End all of them: the idle ones get that long to close their environments."""
    for process in processes:
        if not process.busy:
            process.post(None, seconds)
            process.busy = False
    for process in processes:
        process.close(time.monotonic() + seconds)

"""What a control loop asks of the operating system, and what it got."""
import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

MCL_CURRENT, MCL_FUTURE = 1, 2
SWITCH = 0.0005  # s after which a thread that waits for the interpreter gets it, a tenth of Python's own


def claim(priority: int = 10, cpu: int | None = None, partners: Sequence[threading.Thread] = ()) -> dict[str, Any]:
    """Ask for SCHED_FIFO, locked memory, a core, and no garbage collection in the loop, for the calling thread; what was obtained, with the reason where not.

    partners: threads of this process that work for the loop, one priority lower. As ordinary ones they may be put off by other programs while they
    hold the interpreter, and the loop would wait with them.
    Python's collector is switched off, what there is so far frozen; `tidy` collects what is new. Nothing here raises: a robot runs without, less evenly.
    """
    got: dict[str, Any] = {"scheduler": "normal", "memory_locked": False, "cpu": None, "why_not": []}
    gc.collect()  # tens of milliseconds, and locking memory takes its time too: first, so that no other robot's loop has to wait for it
    gc.freeze()
    gc.disable()
    try:
        if ctypes.CDLL(None, use_errno=True).mlockall(MCL_CURRENT | MCL_FUTURE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        got["memory_locked"] = True
    except (OSError, AttributeError) as e:
        got["why_not"].append(f"mlockall: {e}")
    if cpu is not None:
        try:
            os.sched_setaffinity(0, {cpu})
            got["cpu"] = cpu
        except (OSError, AttributeError) as e:
            got["why_not"].append(f"cpu {cpu}: {e}")
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))  # threads made from here on are ordinary
        got["scheduler"] = f"SCHED_FIFO {priority}"
    except (OSError, AttributeError) as e:
        partners = ()
        got["why_not"].append(f"SCHED_FIFO: {e}; allow it with `setcap cap_sys_nice=ep` on python, or an rtprio line in /etc/security/limits.conf")
    for thread in partners:
        _schedule(thread, os.SCHED_FIFO, max(1, priority - 1))
    sys.setswitchinterval(SWITCH)
    return got


def _schedule(thread: threading.Thread, policy: int, priority: int) -> None:
    if thread.is_alive() and thread.native_id:
        with suppress(OSError):
            os.sched_setscheduler(thread.native_id, policy, os.sched_param(priority))


class Taken:
    """What the system took from this process between two looks, which tells why a loop was late.

    stolen_ms: time of all cores that the host of a virtual machine gave to others (Linux; to 10 ms).   disk_faults: pages that had to be read from a
    disk.   put_off: how often another thread or process got a core of ours. What the system does not say is left out. A look costs about 0.02 ms.
    """

    def __init__(self) -> None:
        self._last = self._now()

    def look(self) -> dict[str, int]:
        """Since the last look."""
        before, self._last = self._last, self._now()
        return {k: v - before[k] for k, v in self._last.items() if k in before}

    @staticmethod
    def _now() -> dict[str, int]:
        out = {}
        with suppress(OSError, IndexError, ValueError, AttributeError), open("/proc/stat", encoding="ascii") as file:
            out["stolen_ms"] = 1000 * int(file.readline().split()[8]) // os.sysconf("SC_CLK_TCK")
        with suppress(ImportError):
            import resource
            used = resource.getrusage(resource.RUSAGE_SELF)
            out |= {"disk_faults": used.ru_majflt, "put_off": used.ru_nivcsw}
        return out


def tidy(before: float, least: float = 0.004) -> None:
    """Collect garbage if at least `least` s are left until `before` [s, monotonic]: what the network's thread leaves behind is a millisecond's work."""
    if not gc.isenabled() and before - time.monotonic() > least:
        gc.collect()


def release(partners: Sequence[threading.Thread] = ()) -> None:
    """Back to an ordinary process."""
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        for thread in partners:
            _schedule(thread, os.SCHED_OTHER, 0)
    sys.setswitchinterval(10 * SWITCH)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).munlockall()
    gc.enable()
    gc.unfreeze()


def ticks(rate: float) -> Iterator[tuple[float, float]]:
    """(deadline, lateness) s on the monotonic clock, `rate` times a second; deadlines are absolute, so lateness does not add up.

    A loop that falls behind by whole periods, asleep or at work, skips them: the deadline is then the latest that has passed, lateness counts from the
    first that was missed.
    """
    start, period, i = time.monotonic(), 1 / rate, 0
    while True:
        due = start + i * period
        if (left := due - time.monotonic()) > 0:
            time.sleep(left)
        now = time.monotonic()
        i = max(i, int((now - start) / period))
        yield start + i * period, max(0.0, now - due)
        i += 1

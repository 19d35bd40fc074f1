"""A live terminal view of a bridge: mode, plan, joints against their limits, delays, counters. A process of its own draws it, so the control loop only
writes a line into a pipe, and no line when the pipe is full: a terminal that hangs or a view that dies costs pictures, nothing else.
"""
import json
import os
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # the process that draws needs none of it
    from policy.serve.bridge import Bridge

COLOURS = {"RUN": "bold green", "DEGRADED": "bold yellow", "BRAKE": "bold red", "HOLD": "bold cyan", "STOP": "bold white on red"}
WIDTH = 24
RECENT = 500  # control periods that the lateness shown is of
ROOT = Path(__file__).parents[2]


class View:
    """`with View(bridge): bridge.run()`.   hz: pictures per second."""

    def __init__(self, bridge: "Bridge", *, hz: float = 8.0):
        self.bridge, self.every = bridge, max(1, round(bridge.robot.rate / hz))
        self.process: subprocess.Popen[bytes] | None = None
        self._late: list[float] = []
        self._left, self._count = b"", 0

    def __enter__(self) -> "View":
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen([sys.executable, "-m", "policy.serve.view"], stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.bridge.watchers.append(self.show)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.process is not None and self.process.stdin is not None
        self._let_go()
        self.process.stdin.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            Console().show_cursor()

    def show(self, bridge: "Bridge", late: float) -> None:
        """Tell the process what to draw, every few periods. Never waits, never raises."""
        self._late.append(late)
        self._count += 1
        if self._count % self.every:
            return
        if not self._left:  # else the rest of a line that did not fit comes first
            self._left, self._late = json.dumps({**facts(bridge), "late": self._late}).encode() + b"\n", []
        assert self.process is not None and self.process.stdin is not None
        try:
            self._left = self._left[os.write(self.process.stdin.fileno(), self._left):]
        except BlockingIOError:
            pass
        except OSError:  # it is gone
            self._let_go()

    def _let_go(self) -> None:
        self.bridge.watchers = [w for w in self.bridge.watchers if w != self.show]


def facts(b: "Bridge") -> dict[str, Any]:
    """What there is to see of a bridge, as plain numbers and words."""
    delays = list(b.execution.delays)
    return {"mode": str(b.supervisor.mode), "reason": b.supervisor.reason, "ahead": b.execution.end - b.clock(), "delay": max(delays) if delays else None,
            "merge": b.execution.merge, "scheduler": b.journal.obtained.get("scheduler", ""), "joints": list(b.robot.joints), "units": list(b.robot.units),
            "lower": list(b.robot.lower), "upper": list(b.robot.upper), "velocity": list(b.robot.velocity), "q": b.limiter.q.tolist(),
            "dq": b.limiter.dq.tolist(), "measured": None if b.state is None else b.state.q.tolist(),
            "counts": {**b.counts, **b.execution.counts, "interventions": b.limiter.interventions}}


def picture(f: dict[str, Any], late: list[float]) -> Group:
    """f: as facts() tells.   late: s, of the last control periods."""
    head = Text.assemble((f" {f['mode']:<8} ", COLOURS[f["mode"]]), f" {f['reason']}")
    p99 = sorted(late)[int(0.99 * len(late))] if late else None
    said = ["no plan" if abs(f["ahead"]) == float("inf") else f"plan {f['ahead']:5.2f} s ahead",
            "delay –" if f["delay"] is None else f"delay {1e3 * f['delay']:.0f} ms", "late –" if p99 is None else f"late p99 {1e3 * p99:.2f} ms",
            f"merge {f['merge']}", str(f["scheduler"])]
    table = Table.grid(padding=(0, 1))
    for i, joint in enumerate(f["joints"]):
        table.add_row(joint, bar(f["q"][i], f["lower"][i], f["upper"][i]), f"{f['q'][i]:8.3f} {f['units'][i]}",
                      "" if f["measured"] is None else f"measured {f['measured'][i]:8.3f}", f"speed {abs(f['dq'][i]) / f['velocity'][i]:4.0%}")
    return Group(head, Text("  ".join(said), style="dim"), table, Text("  ".join(f"{k} {v}" for k, v in f["counts"].items()), style="dim"))


def bar(value: float, low: float, high: float) -> Text:
    """Where a value lies between its limits."""
    at = min(WIDTH - 1, max(0, int((value - low) / (high - low) * WIDTH))) if abs(value) < float("inf") else 0
    return Text("·" * at + "█" + "·" * (WIDTH - 1 - at), style="red" if at in (0, WIDTH - 1) else "blue")


def main() -> None:
    """Draw the newest line of standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ctrl-C is for the bridge, which brakes
    with suppress(OSError):
        os.nice(10)
    late: deque[float] = deque(maxlen=RECENT)
    rest = b""
    with Live(console=Console(), auto_refresh=False, transient=True) as live:
        while read := os.read(0, 1 << 16):
            *lines, rest = (rest + read).split(b"\n")
            told = [json.loads(line) for line in lines]
            for one in told:
                late.extend(one["late"])
            if told:
                live.update(picture(told[-1], list(late)), refresh=True)


if __name__ == "__main__":
    main()

"""A live terminal view of a bridge: mode, plan, joints against their limits, delays, counters. Drawn by its own thread, never by the control loop."""
import threading
import time
from types import TracebackType

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from policy.serve.bridge import Bridge

COLOURS = {"RUN": "bold green", "DEGRADED": "bold yellow", "BRAKE": "bold red", "HOLD": "bold cyan", "STOP": "bold white on red"}
WIDTH = 24


class View:
    """`with View(bridge): bridge.run()`.   hz: pictures per second."""

    def __init__(self, bridge: Bridge, *, console: Console | None = None, hz: float = 8.0):
        self.bridge, self.hz = bridge, hz
        self.live = Live(self.picture(), console=console, refresh_per_second=hz, auto_refresh=False, transient=True)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def __enter__(self) -> "View":
        self.live.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(1)
        self.live.stop()

    def _draw(self) -> None:
        while not self._end.wait(1 / self.hz):
            self.live.update(self.picture(), refresh=True)

    def picture(self) -> Group:
        b = self.bridge
        mode = str(b.supervisor.mode)
        head = Text.assemble((f" {mode:<8} ", COLOURS[mode]), f" {b.supervisor.reason}")
        ahead = b.execution.end - time.monotonic()
        delays = list(b.execution.delays)
        late = [row[1] for row in list(b.journal.ticks)[-200:]]
        facts = [f"plan {ahead:5.2f} s ahead" if np.isfinite(ahead) else "no plan", f"delay {1e3 * max(delays):.0f} ms" if delays else "delay –",
                 f"late p99 {1e3 * float(np.percentile(late, 99)):.2f} ms" if late else "late –", f"merge {b.execution.merge}",
                 f"{b.journal.obtained.get('scheduler', '')}"]
        table = Table.grid(padding=(0, 1))
        state = b.state
        for i, joint in enumerate(b.robot.joints):
            table.add_row(joint, bar(b.limiter.q[i], b.robot.lower[i], b.robot.upper[i]), f"{b.limiter.q[i]:8.3f} {b.robot.units[i]}",
                          "" if state is None else f"measured {state.q[i]:8.3f}", f"speed {abs(b.limiter.dq[i]) / b.robot.velocity[i]:4.0%}")
        counts = {**b.counts, **b.execution.counts, "interventions": b.limiter.interventions}
        return Group(head, Text("  ".join(facts), style="dim"), table, Text("  ".join(f"{k} {v}" for k, v in counts.items()), style="dim"))


def bar(value: float, low: float, high: float) -> Text:
    """Where a value lies between its limits."""
    at = min(WIDTH - 1, max(0, int((value - low) / (high - low) * WIDTH))) if np.isfinite(value) else 0
    return Text("·" * at + "█" + "·" * (WIDTH - 1 - at), style="red" if at in (0, WIDTH - 1) else "blue")

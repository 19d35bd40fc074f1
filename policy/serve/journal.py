"""What a bridge keeps of a run: events as JSON lines, written by a thread so that the loop never waits for a disk, and numbers for the picture."""
import json
import queue
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from policy.serve.client import Chunk
from policy.serve.robot import RobotSpec, RobotState


class Journal:
    """path: JSON lines, one object each: events (mode, refused, chunk, …), and once a second mode and lateness.   keep: s of ticks kept in memory."""

    def __init__(self, path: Path | str | None = None, *, keep: float = 600.0):
        self.path, self.keep = None if path is None else Path(path), keep
        self.ticks: deque[tuple[Any, ...]] = deque(maxlen=1000)
        self.chunks: deque[dict[str, Any]] = deque(maxlen=5000)
        self.events: deque[dict[str, Any]] = deque(maxlen=5000)
        self.obtained: dict[str, Any] = {}
        self.robot: RobotSpec | None = None
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._told = 0.0

    def start(self, robot: RobotSpec, obtained: dict[str, Any]) -> None:
        if self.robot is None:
            self.robot = robot
            self.ticks = deque(maxlen=int(self.keep * robot.rate))
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._thread = threading.Thread(target=self._write, daemon=True)
                self._thread.start()
        self.obtained = obtained
        self.event(time.monotonic(), "start", {"robot": robot.name, "rate": robot.rate, **obtained})

    def event(self, t: float, event: str, facts: dict[str, Any]) -> None:
        row = {"t": round(t, 4), "event": event, **facts}
        self.events.append(row)
        self._lines.put(row) if self._thread is not None else None

    def chunk(self, chunk: Chunk, now: float, seam: float, execution: Any) -> None:
        facts = {"seq": chunk.seq, "t0": chunk.t0, "landed": now, "end": execution.end, "seam": round(seam, 4), "plan_ms": chunk.plan_ms,
                 "queue_ms": chunk.queue_ms, "rtt_ms": chunk.rtt_ms, "delay_steps": round((now - chunk.t0) / chunk.dt, 2)}
        self.chunks.append(facts)
        self.event(now, "chunk", facts)

    def tick(self, now: float, late: float, mode: str, state: RobotState | None, limiter: Any) -> None:
        q = state.q if state is not None else np.full(len(limiter.q), np.nan)
        self.ticks.append((now, late, mode, limiter.q.copy(), limiter.dq.copy(), limiter.ddq.copy(), q.copy()))
        if self._thread is not None and now - self._told >= 1:
            self._told = now
            self._lines.put({"t": round(now, 3), "event": "second", "mode": str(mode), "late_ms": round(1e3 * late, 3)})

    def finish(self, counts: dict[str, int], limiter: Any) -> dict[str, Any]:
        """The run in numbers: lateness, share of each mode, planning and round-trip times, delays, seams, counts."""
        rows = list(self.ticks)
        out: dict[str, Any] = {"ticks": len(rows), "counts": dict(counts), "obtained": self.obtained, "interventions": limiter.interventions}
        if rows and self.robot is not None:
            late, modes = np.array([r[1] for r in rows]) * 1e3, np.array([str(r[2]) for r in rows])
            out["late_ms"] = dict(zip(("p50", "p99", "max"), (float(np.percentile(late, p)) for p in (50, 99, 100)), strict=True))
            out["missed"] = int((late > 1e3 / self.robot.rate).sum())
            out["modes"] = {m: round(float((modes == m).mean()), 4) for m in np.unique(modes).tolist()}
        if self.chunks:
            for name in ("plan_ms", "rtt_ms", "delay_steps", "seam"):
                values = [c[name] for c in self.chunks]
                out[name] = {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99)), "max": float(np.max(values))}
        self.event(time.monotonic(), "finish", {k: v for k, v in out.items() if k != "obtained"})
        return out

    def arrays(self) -> dict[str, np.ndarray]:
        """t (n,), late (n,) s, mode (n,) names, q, dq, ddq (n, dof) commanded, measured (n, dof)."""
        rows = list(self.ticks)
        names = ("t", "late", "mode", "q", "dq", "ddq", "measured")
        return {name: np.array([str(r[i]) if name == "mode" else r[i] for r in rows]) for i, name in enumerate(names)}

    def close(self) -> None:
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join(2)
            self._thread = None

    def _write(self) -> None:
        assert self.path is not None
        with open(self.path, "a", encoding="utf-8") as file:
            while (row := self._lines.get()) is not None:
                file.write(json.dumps(row, default=str) + "\n")
                if self._lines.empty():
                    file.flush()

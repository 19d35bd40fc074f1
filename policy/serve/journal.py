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
from policy.serve.supervisor import Mode

MODES = list(Mode)
WAITING = 10_000  # lines that a slow disk may leave unwritten before more are lost


class Journal:
    """path: JSON lines, one object each: events (mode, refused, chunk, …), and once a second mode and lateness.

    In memory, taken at the start and bounded: ticks of the last `keep` s, the last 1000 chunks, 100 moments when the loop was late, 1000 other events.
    """

    def __init__(self, path: Path | str | None = None, *, keep: float = 600.0):
        self.path, self.keep = None if path is None else Path(path), keep
        self.chunks: deque[dict[str, Any]] = deque(maxlen=1000)
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)
        self.late: deque[dict[str, Any]] = deque(maxlen=100)
        self.obtained: dict[str, Any] = {}
        self.robot: RobotSpec | None = None
        self.ticks = 0  # since the start
        self._rows = np.zeros((0, 0))
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self._told = 0.0

    def open(self, robot: RobotSpec) -> None:
        """Take the memory and start the thread that writes, once."""
        if self.robot is None:
            self.robot = robot
            self._rows = np.full((int(self.keep * robot.rate), 3 + 4 * robot.dof), np.nan)
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.thread = threading.Thread(target=self._write, daemon=True)
                self.thread.start()

    def start(self, robot: RobotSpec, obtained: dict[str, Any]) -> None:
        self.open(robot)
        self.obtained = obtained
        self.event(time.monotonic(), "start", {"robot": robot.name, "rate": robot.rate, **obtained})

    def event(self, t: float, event: str, facts: dict[str, Any]) -> None:
        row = {"t": round(t, 4), "event": event, **facts}
        if event != "chunk":
            (self.late if event == "late" else self.events).append(row)
        self._put(row)

    def chunk(self, chunk: Chunk, now: float, seam: float, execution: Any) -> None:
        facts = {"seq": chunk.seq, "t0": chunk.t0, "landed": now, "end": execution.end, "seam": round(seam, 4), "plan_ms": chunk.plan_ms,
                 "queue_ms": chunk.queue_ms, "rtt_ms": chunk.rtt_ms, "delay_steps": round((now - chunk.t0) / chunk.dt, 2)}
        self.chunks.append(facts)
        self.event(now, "chunk", facts)

    def tick(self, now: float, late: float, mode: Mode, state: RobotState | None, limiter: Any) -> None:
        """One control period, once started."""
        if self.robot is None:
            return
        row = self._rows[self.ticks % len(self._rows)]
        row[:3] = now, late, MODES.index(mode)
        np.concatenate((limiter.q, limiter.dq, limiter.ddq, np.full(self.robot.dof, np.nan) if state is None else state.q), out=row[3:])
        self.ticks += 1
        if now - self._told >= 1:
            self._told = now
            self._put({"t": round(now, 3), "event": "second", "mode": str(mode), "late_ms": round(1e3 * late, 3)})

    def finish(self, counts: dict[str, int], limiter: Any) -> dict[str, Any]:
        """The run in numbers: ticks and counts of all of it; lateness, share of each mode, planning and round-trip times, delays, seams of what is kept."""
        a = self.arrays()
        out: dict[str, Any] = {"ticks": self.ticks, "counts": dict(counts), "obtained": self.obtained, "interventions": limiter.interventions,
                               "no_way_found": limiter.errors}
        if len(a["t"]) and self.robot is not None:
            out["largest_intervention"] = dict(zip(self.robot.joints, limiter.largest.round(4).tolist(), strict=True))  # in the joints' units
            late = 1e3 * a["late"]
            out["late_ms"] = dict(zip(("p50", "p99", "max"), (float(np.percentile(late, p)) for p in (50, 99, 100)), strict=True))
            out["missed"] = int(np.floor(a["late"] * self.robot.rate).sum())  # periods
            out["modes"] = {m: round(float((a["mode"] == m).mean()), 4) for m in np.unique(a["mode"]).tolist()}
        if self.chunks:
            for name in ("plan_ms", "rtt_ms", "delay_steps", "seam"):
                values = [c[name] for c in self.chunks]
                out[name] = {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99)), "max": float(np.max(values))}
        self.event(time.monotonic(), "finish", {k: v for k, v in out.items() if k != "obtained"})
        return out

    def arrays(self) -> dict[str, np.ndarray]:
        """Of the ticks that are kept, oldest first: t (n,), late (n,) s, mode (n,) names; q, dq, ddq (n, dof) commanded at their end, measured (n, dof)."""
        at = self.ticks % len(self._rows) if len(self._rows) else 0
        rows = np.concatenate([self._rows[at:], self._rows[:at]]) if self.ticks > len(self._rows) else self._rows[:self.ticks]
        t, late, mode = rows[:, :3].T if len(rows) else np.zeros((3, 0))
        q, dq, ddq, measured = np.split(rows[:, 3:], 4, 1)
        return {"t": t, "late": late, "mode": np.array([str(m) for m in MODES])[mode.astype(int)], "q": q, "dq": dq, "ddq": ddq, "measured": measured}

    def close(self) -> None:
        if self.thread is not None:
            self._lines.put(None)
            self.thread.join(2)
            self.thread = None

    def _put(self, row: dict[str, Any]) -> None:
        if self.thread is not None and self._lines.qsize() < WAITING:
            self._lines.put(row)

    def _write(self) -> None:
        assert self.path is not None
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                while (row := self._lines.get()) is not None:
                    file.write(json.dumps(row, default=str) + "\n")
                    if self._lines.empty():
                        file.flush()
        except OSError as e:  # a full disk must not stop a robot
            self.events.append({"t": round(time.monotonic(), 4), "event": "unwritten", "why": f"{self.path}: {e.strerror or e}"})

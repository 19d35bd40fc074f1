"""A simulated robot in a process of its own, in real time: python -m envs.robot --task envs.gantry:Gantry

It plays joint setpoints from UDP packets on the loopback interface, one per physics step at absolute deadlines, and answers with its state. Its own
watchdog lets nobody move it who has been silent for 100 ms, until they connect again. Its first line of output is JSON: the port and what a
driver must know. Packets are msgpack maps; what is no packet of ours is counted and ignored. Times are s on the monotonic clock of this computer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections import Counter
from importlib import import_module
from typing import Any

import msgpack
import numpy as np

from envs.task import Task
from envs.twin import ANCHOR, Twin, Unplayable

VERSION = 1
LARGEST = 60_000  # bytes of a packet
SLIP = 0.5  # s that it may be late before it shifts its schedule instead of catching up
SETTLE = 0.5  # s at rest before it ends: joints follow what they are told
FIELDS: dict[str, dict[str, type]] = {
    "describe": {},
    "connect": {"session": int},
    "alive": {"session": int},
    "stop": {"session": int},
    "quit": {"session": int},
    "reset": {"session": int, "id": int, "seed": int},
    "move": {"session": int, "episode": int, "id": int, "step": int, "anchor": bytes, "q": bytes},
}


def parse(packet: bytes) -> dict[str, Any]:
    """A packet as a command with exactly the fields of its op; ValueError for anything else."""
    if len(packet) > LARGEST:
        raise ValueError("oversize")
    try:
        message = msgpack.unpackb(packet, max_map_len=16, max_array_len=0, max_str_len=64, max_bin_len=LARGEST, max_ext_len=0)
    except Exception as error:  # msgpack raises a dozen kinds
        raise ValueError("not msgpack") from error
    if not isinstance(message, dict) or message.pop("v", None) != VERSION or not isinstance(op := message.pop("op", None), str) or op not in FIELDS:
        raise ValueError("not a command")
    fields = FIELDS[op]
    if message.keys() != fields.keys() or any(type(message[key]) is not kind for key, kind in fields.items()):
        raise ValueError("not a command")
    if any(value < 0 or value >= 2**63 for value in message.values() if isinstance(value, int)):
        raise ValueError("not a command")
    return {"op": op, **message}


class Link:
    """The robot's side of the conversation. One client at a time: another one may connect when that one has been silent for the watchdog's time."""

    def __init__(self, twin: Twin, port: int, *, drop: float = 0.0) -> None:
        self.twin, self.counts, self.quit = twin, Counter[str](), False
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.port = self.socket.getsockname()[1]
        self.peer: Any = None
        self.session, self.last, self.reset = 0, -np.inf, -1
        self.accepted, self.rejected, self.why = -1, -1, ""  # ids of packets since connect
        self._drop, self._chance = drop, random.Random(0)

    def poll(self, now: float) -> None:
        """Take in what has come; a flood is left for the next step."""
        for _ in range(64):
            try:
                packet, sender = self.socket.recvfrom(LARGEST + 1)
            except BlockingIOError:
                return
            except ConnectionError:  # the last state met a closed port
                continue
            try:
                self._obey(parse(packet), sender, now)
            except ValueError:
                self.counts["garbage"] += 1

    def _obey(self, message: dict[str, Any], sender: Any, now: float) -> None:
        op = message["op"]
        if op == "describe":
            self._send({"op": "facts", **self.twin.facts}, sender)
        elif op == "connect":
            if message["session"] != self.session:
                if sender != self.peer and now - self.last <= self.twin.watchdog:
                    self.counts["busy"] += 1
                    return
                self.session, self.reset, self.accepted, self.rejected, self.why = message["session"], -1, -1, -1, ""
                self.twin.connect(now)
            self.peer, self.last = sender, now
        elif message["session"] != self.session or sender != self.peer:
            self.counts["stranger"] += 1
        else:
            self.last = now
            self.twin.hear(now)
            self._obey_client(message, now)

    def _obey_client(self, message: dict[str, Any], now: float) -> None:
        op = message["op"]
        if op == "alive":
            return
        if op == "stop":
            self.twin.stop()
        elif op == "quit":
            self.quit = True
        elif op == "reset":
            if message["id"] != self.reset:
                self.twin.reset(message["seed"])
                self.reset, self.accepted, self.rejected = message["id"], -1, -1
        elif message["episode"] != self.twin.episode.number:
            self.counts["stale"] += 1
        elif self._drop and self._chance.random() < self._drop:
            self.counts["dropped"] += 1
        else:
            self._move(message, now)

    def _move(self, message: dict[str, Any], now: float) -> None:
        row = 8 * self.twin.dof
        if len(message["anchor"]) != ANCHOR * row or len(message["q"]) % row or not message["q"]:
            raise ValueError("not a command")
        anchor, q = (np.frombuffer(message[key], "<f8").reshape(-1, self.twin.dof) for key in ("anchor", "q"))
        try:
            self.twin.move(message["step"], anchor, q, now)
        except Unplayable as why:
            self.rejected, self.why = message["id"], str(why)
        else:
            self.accepted = message["id"]

    def report(self, t: float, start: float, late: dict[str, float]) -> None:
        """Send the state of time t, before the physics step that begins then."""
        if self.peer is None:
            return
        twin, episode = self.twin, self.twin.episode
        q, dq = twin.measured
        self._send({
            "op": "state", "session": self.session, "step": twin.step, "t": t, "start": start,
            "episode": episode.number, "reset": self.reset, "seed": episode.seed, "elapsed": twin.elapsed, "over": twin.elapsed >= twin.seconds,
            "success": episode.success_at is not None, "success_at": episode.success_at, "metrics": episode.metrics,
            "q": _bytes(q), "dq": _bytes(dq), "commanded": _bytes(twin.commanded), "rest": twin.rest, "peak": _bytes(twin.peak),
            "obs": {key: np.ascontiguousarray(value, "<f4").tobytes() for key, value in twin.observe().items()},
            "watchdog": twin.tripped, "stopped": twin.stopped, "fault": twin.fault,
            "accepted": self.accepted, "rejected": self.rejected, "why": self.why, "refused": dict(twin.refused), "counts": dict(self.counts), **late,
        }, self.peer)  # fmt: skip

    def _send(self, message: dict[str, Any], to: Any) -> None:
        try:
            self.socket.sendto(msgpack.packb({"v": VERSION, **message}), to)
        except OSError:  # a full buffer, or nobody there: the next state follows
            self.counts["unsent"] += 1


def _bytes(x: np.ndarray) -> bytes:
    return np.ascontiguousarray(x, "<f8").tobytes()


class Log:
    """The last `minutes` of one row per physics step, in memory that is taken at once, until it is saved as npz."""

    def __init__(self, twin: Twin, minutes: float) -> None:
        self._rows = np.full((max(1, round(60 * minutes / twin.dt)), 5 + twin.dof + twin.state.qpos.size + twin.state.qvel.size), np.nan)
        self._count = 0
        self._starts: list[dict[str, Any]] = []

    def add(self, twin: Twin, t: float, late: float, played: np.ndarray) -> None:
        if not self._starts or self._starts[-1]["number"] != twin.episode.number:
            self._starts.append({"number": twin.episode.number, "seed": twin.episode.seed, "mocap": twin.state.mocap_pos, "row": self._count})
            while len(self._starts) > 1 and self._starts[1]["row"] <= self._count - len(self._rows):
                self._starts.pop(0)
        row = [t, late, twin.step, twin.episode.number, twin.tripped], played, twin.state.qpos, twin.state.qvel
        np.concatenate(row, out=self._rows[self._count % len(self._rows)])
        self._count += 1

    def save(self, path: str, twin: Twin) -> None:
        """t, late [s], step, episode, watchdog, commanded (n, dof), qpos, qvel after each step; and of each episode its number, seed and mocap positions."""
        at = self._count % len(self._rows)
        rows = self._rows[:at] if self._count < len(self._rows) else np.concatenate([self._rows[at:], self._rows[:at]])
        t, late, step, episode, watchdog = rows[:, :5].T
        commanded, qpos, qvel = np.split(rows[:, 5:], np.cumsum([twin.dof, twin.state.qpos.size]), 1)
        number, seed, mocap = ([one[key] for one in self._starts] for key in ("number", "seed", "mocap"))
        with open(f"{path}.part", "wb") as file:
            np.savez_compressed(file, t=t, late=late, step=step, episode=episode.astype(int), watchdog=watchdog > 0, commanded=commanded, qpos=qpos, qvel=qvel,
                                dt=twin.dt, number=number, seed=seed, mocap=mocap)  # fmt: skip
        os.replace(f"{path}.part", path)


def run(twin: Twin, link: Link, *, log: Log | None = None, every: int = 1, stall: tuple[float, float] | None = None, alone: bool = True) -> dict[str, Any]:
    """Play in real time until told to quit, then come to rest; lateness [ms] and counts.

    stall: s after the start, and how many s it hangs then (a test's fault).   every: physics steps between two states sent.
    alone: False ends it when its standard input closes, as that of a parent that died does.
    """
    start, late, worst, slips = time.monotonic() + 0.02, np.full(1 << 16, 0.0), 0.0, 0  # filled, so that its memory is taken now
    begun, k, moved = twin.step, 0, twin.step
    while not link.quit or (twin.step - moved) * twin.dt < SETTLE:
        deadline = start + k * twin.dt
        if (left := deadline - time.monotonic()) > 0:
            time.sleep(left)
        if stall and k * twin.dt >= stall[0]:
            time.sleep(stall[1])
            stall = None
        now = time.monotonic()
        late[k % len(late)] = now - deadline
        if now - deadline > SLIP:
            start, deadline, slips = start + now - deadline, now, slips + 1
        if not link.quit:
            link.poll(now)
        if not twin.rest:
            moved = twin.step
        worst = max(worst, late[k % len(late)])
        if k % every == 0:
            link.report(deadline, start - begun * twin.dt, {"late": float(late[k % len(late)]), "late_max": float(worst), "slips": slips})
        played = twin.advance(now)
        if log is not None:
            log.add(twin, deadline, late[k % len(late)], played)
        k += 1
        if not alone and k % 16 == 0 and not link.quit and select.select([0], [], [], 0)[0] and not os.read(0, 4096):
            link.quit = True
    ms = 1e3 * late[: min(k, len(late))]
    p50, p99 = np.percentile(ms, [50, 99]) if k else (0.0, 0.0)
    return {"steps": k, "late_ms": {"p50": round(p50, 3), "p99": round(p99, 3), "max": round(1e3 * float(worst), 3)}, "slips": slips,
            "success_at": twin.episode.success_at, "refused": dict(twin.refused), "counts": dict(link.counts)}  # fmt: skip


def scheduling(priority: int) -> str:
    """Ask for a real-time priority; what was obtained."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except (OSError, AttributeError) as error:
        return f"normal ({error})"
    return f"SCHED_FIFO {priority}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m envs.robot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, help="module:Class of a task, such as envs.gantry:Gantry")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help='the task\'s own arguments, such as {"pillar": true}')
    parser.add_argument("--port", type=int, default=0, help="UDP port on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--log", help="where the recording goes when it ends (.npz): setpoints and state of every physics step")
    parser.add_argument("--keep", type=float, default=10.0, help="minutes of the recording that are kept, the last ones (default: 10)")
    parser.add_argument("--seconds", type=float, help="length of an episode (default: that of the task)")
    parser.add_argument("--every", type=int, default=1, help="physics steps between two states sent")
    parser.add_argument("--priority", type=int, default=0, help="SCHED_FIFO priority to ask for; 0 asks for none")
    parser.add_argument("--with-parent", action="store_true", help="end when standard input closes")
    parser.add_argument("--stall", type=float, nargs=2, metavar=("AT", "FOR"), help="for tests: hang FOR seconds, AT seconds after the start")
    parser.add_argument("--drop", type=float, default=0.0, help="for tests: share of setpoint packets that are lost")
    args = parser.parse_args(argv)
    module, _, name = args.task.partition(":")
    task = getattr(import_module(module), name, None)
    if not (isinstance(task, type) and issubclass(task, Task)):
        parser.error(f"--task {args.task} names no task: give module:Class, such as envs.gantry:Gantry")
    twin = Twin(task(**args.options), seconds=args.seconds)
    if not args.keep > 0:
        parser.error(f"--keep {args.keep:g} must be above 0 minutes")
    link, log = Link(twin, args.port, drop=args.drop), Log(twin, args.keep) if args.log else None
    signal.signal(signal.SIGTERM, lambda *_: setattr(link, "quit", True))
    signal.signal(signal.SIGINT, lambda *_: setattr(link, "quit", True))
    got = scheduling(args.priority) if args.priority else "normal"
    print(json.dumps({"port": link.port, "scheduling": got, **twin.facts}), flush=True)
    summary = run(twin, link, log=log, every=args.every, stall=args.stall, alone=not args.with_parent)
    if got.startswith("SCHED_FIFO"):
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # compressing takes seconds, and others on this computer may be in time
    if log is not None:
        log.save(args.log, twin)
    twin.close()
    try:
        print(json.dumps(summary), flush=True)
    except BrokenPipeError:  # a parent that was killed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

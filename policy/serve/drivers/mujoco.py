"""Driver of the simulated robot, `python -m envs.robot`, which is another process: setpoints and states are UDP packets on the loopback interface."""
import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from policy.serve.robot import DriverError, RobotSpec, RobotState, Setpoints

ANCHOR = 3  # setpoints before a packet's first that the robot must agree on (envs.twin)
ROOT = Path(__file__).parents[3]


class MujocoDriver:
    """A task of envs/ played as a robot in real time.

    port: of a robot that runs already; None starts one with this task, its `options`, a recording of the last `keep` minutes at `log` (.npz, written when
    it ends), `priority` (SCHED_FIFO, where the system allows) and `extra` arguments of its command line.   silent: control periods without a state after
    which read() says that the robot is gone.

    RobotState.info: commanded (dof,), rest (nothing left to play), success, success_at [s], elapsed [s], over, seed, episode, metrics, watchdog, stopped,
    fault, peak (3, dof: largest commanded velocity, acceleration, jerk of the episode), late, late_max [s], refused {reason: packets}, and lost: the
    last setpoints were refused (`why`), so the robot brakes; once it is at rest, whoever plans goes on from `commanded`.
    """

    def __init__(self, task: str, *, port: int | None = None, options: dict[str, Any] | None = None, log: str | None = None, keep: float = 10.0,
                 priority: int = 20, silent: float = 3.0, extra: Sequence[str] = ()):
        self.task, self.port, self.silent = task, port, silent
        self._command = [sys.executable, "-m", "envs.robot", "--task", task, "--options", json.dumps(options or {}), "--priority", str(priority),
                         "--with-parent", *(["--log", str(Path(log).absolute()), "--keep", str(keep)] if log else []), *map(str, extra)]
        self._spawn = port is None
        self.process: subprocess.Popen[bytes] | None = None
        self.facts: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self._session, self._packet, self._request, self._stopped = 0, 0, 0, False
        self._robot: RobotSpec | None = None
        self._forget()

    def _forget(self) -> None:
        self._state: RobotState | None = None
        self._sent: tuple[int, np.ndarray] | None = None  # step of the first row, and what is played from then on
        self._grid: tuple[float, float, int] | None = None  # the robot's start [s]; a t0 [s] and its step
        self._since = self._packet + 1  # refusals of earlier packets are over

    @property
    def rate(self) -> float:
        """Setpoints per second [Hz]; starts or asks the robot when it is not known yet."""
        if not self.facts:
            self._reach(20.0)
        return 1 / self.facts["dt"]

    def _reach(self, timeout: float) -> None:
        """Start the robot, or find the one that runs, and learn what it is. DriverError."""
        if self._spawn:
            self._start(timeout)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect(("127.0.0.1", self.port))
        self._socket.setblocking(False)
        self.facts = self._ask({"op": "describe"}, lambda m: m.get("op") == "facts", timeout)

    def _start(self, timeout: float) -> None:
        if not (find_spec("mujoco") and find_spec("gymnasium")):
            raise DriverError("the simulated robot needs MuJoCo and gymnasium: pip install 'dipole[sim]'")
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **threads, "PYTHONPATH": path},
                                        start_new_session=True)  # a terminal's ctrl-C is for the bridge, which brakes
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self.process.kill()
            raise DriverError(f"the simulated robot did not start{'' if ready else f' within {timeout:g} s'}, its error is above: {' '.join(self._command)}")
        self.port = json.loads(line)["port"]

    def connect(self, robot: RobotSpec, timeout: float = 5.0) -> RobotState:
        """See policy.serve.robot.Driver; also returns only when the robot is at rest, so it may take as long as that needs."""
        _ = self.rate
        if self.facts["dof"] != robot.dof or (robot.task and robot.task not in (self.facts["task"], self.facts["name"])):
            raise DriverError(f"robot {robot.name} has {robot.dof} joints for task {robot.task or 'any'}, the simulated one plays {self.facts['task']} with "
                              f"{self.facts['dof']}: choose another conf/robot, or another task of the driver")
        self._robot, self._session, self._request, self._stopped = robot, random.SystemRandom().randrange(1, 2**63), 0, False
        self._forget()
        self._ask({"op": "connect", "session": self._session}, lambda m: m["op"] == "state" and m["session"] == self._session and m["rest"], timeout)
        assert self._state is not None
        return self._state

    def reset(self, seed: int, timeout: float = 5.0) -> RobotState:
        """A new episode: the robot at rest at the start of this seed. Waits for it. DriverError."""
        self._check_alive()
        self._request += 1
        self._forget()
        self._ask({"op": "reset", "session": self._session, "id": self._request, "seed": int(seed)},
                  lambda m: m["op"] == "state" and m["session"] == self._session and m["reset"] == self._request, timeout)
        assert self._state is not None
        return self._state

    def _ask(self, message: dict[str, Any], answered: Any, timeout: float) -> dict[str, Any]:
        """Send until answered."""
        end, again = time.monotonic() + timeout, 0.0
        while (now := time.monotonic()) < end:
            if now >= again:
                self._send(message)
                again = now + 0.1
            select.select([self._socket], [], [], 0.02)
            self._check_process()
            for answer in self._received():
                if answered(answer):
                    if answer["op"] == "state":
                        self._state = self._taken(answer)
                    return answer
        raise DriverError(f"the simulated robot at UDP port {self.port} did not answer {message['op']} within {timeout:g} s: is it running, and "
                          "is no other bridge connected to it?")

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.send(msgpack.packb({"v": 1, **message}))
        except OSError as e:
            if not isinstance(e, BlockingIOError | ConnectionRefusedError):
                raise DriverError(f"cannot send to the simulated robot: {e}") from e

    def _received(self) -> list[dict[str, Any]]:
        """The packets that have come, oldest first; what is none of the robot's is ignored."""
        out = []
        for _ in range(1000):
            try:
                packet = self._socket.recv(65536)
            except BlockingIOError:
                break
            except ConnectionRefusedError:
                continue
            try:
                message = msgpack.unpackb(packet)
            except Exception:  # whatever msgpack thinks of it, it is not a state
                continue
            if isinstance(message, dict) and message.get("v") == 1 and message.get("op") in ("facts", "state"):
                out.append(message)
        return out

    def _taken(self, m: dict[str, Any]) -> RobotState:
        q, dq, commanded = (np.frombuffer(m[key], "<f8") for key in ("q", "dq", "commanded"))
        obs = {key: np.frombuffer(value, "<f4").reshape(self.facts["obs"][key]) for key, value in m["obs"].items()}
        kept = ("rest", "success", "success_at", "elapsed", "over", "seed", "episode", "metrics", "watchdog", "stopped", "fault", "late", "late_max", "slips",
                "refused", "counts", "why", "step", "start")
        info = {**{key: m[key] for key in kept}, "commanded": commanded, "peak": np.frombuffer(m["peak"], "<f8").reshape(3, -1),
                "lost": m["rejected"] > m["accepted"] and m["rejected"] >= self._since}
        return RobotState(m["t"], q, dq, obs, info)

    def read(self) -> RobotState | None:
        states = [m for m in self._received() if m["op"] == "state" and m["session"] == self._session and (not self._request or m["reset"] == self._request)]
        if states:
            self._state = self._taken(states[-1])
            if self._state.info["fault"]:
                raise DriverError(f"the simulated robot is at fault: {self._state.info['fault']}. Reset it")
            return self._state
        self._check_process()
        if self._state is not None and self._robot and (age := time.monotonic() - self._state.t) > self.silent / self._robot.rate:
            raise DriverError(f"the simulated robot has said nothing for {1e3 * age:.0f} ms: is its process stopped or the computer too busy?")
        return None

    def write(self, setpoints: Setpoints) -> None:
        """See policy.serve.robot.Driver. DriverError, and nothing is sent, when the setpoints break a limit or do not begin where the last ones lead.

        While the last ones are `lost`, nothing is sent until the robot is at rest; those after it begin at `commanded`, at rest.
        """
        if self._stopped or self._state is None or self._robot is None:
            raise DriverError("the simulated robot was stopped: connect again" if self._stopped else "connect before the first setpoints")
        q, info, dt = np.ascontiguousarray(setpoints.q, "<f8"), self._state.info, self.facts["dt"]
        if q.ndim != 2 or q.shape[1] != self.facts["dof"] or abs(setpoints.dt - dt) > 1e-9:
            raise DriverError(f"setpoints {q.shape} every {setpoints.dt} s do not fit a robot of {self.facts['dof']} joints and {dt} s")
        if info["lost"]:
            if not info["rest"]:
                self._send({"op": "alive", "session": self._session})
                return
            self._forget_sent()
        step = self._step(setpoints.t0)
        first, rows = self._sent or (step - ANCHOR, np.repeat(np.asarray(info["commanded"])[None], ANCHOR, 0))
        at = np.arange(step - ANCHOR, step) - first
        if (at < 0).any():
            raise DriverError(f"setpoints for {setpoints.t0:.3f} s lie before those written last: they must go forward in time")
        anchor = rows[at.clip(0, len(rows) - 1)]
        played = np.concatenate([anchor, q])
        self._check_limits(played, dt)
        self._sent = step - ANCHOR, played
        self._packet += 1
        self._send({"op": "move", "session": self._session, "episode": info["episode"], "id": self._packet, "step": step, "anchor": anchor.tobytes(),
                    "q": q.tobytes()})

    def _step(self, t0: float) -> int:
        """The robot's physics step at which setpoints for t0 begin; a multiple of dt later is exactly so many steps later."""
        assert self._state is not None
        start, dt = float(self._state.info["start"]), self.facts["dt"]  # type: ignore[arg-type]
        if self._grid is None or self._grid[0] != start:
            self._grid = start, t0, int(np.ceil((t0 - start) / dt - 1e-6))
        return self._grid[2] + round((t0 - self._grid[1]) / dt)

    def _check_limits(self, q: np.ndarray, dt: float) -> None:
        assert self._robot is not None
        for order, name in enumerate(("velocity", "acceleration", "jerk"), 1):
            most = np.abs(np.diff(q, order, axis=0)).max(0) / dt**order
            if not (most <= (1 + 1e-6) * np.asarray(getattr(self._robot, name))).all():
                joint, allowed = int(np.argmax(most / getattr(self._robot, name))), getattr(self._robot, name)
                raise DriverError(f"setpoints move {self._robot.joints[joint]} with a {name} of {most[joint]:.4g}, {allowed[joint]:g} allowed: pass "
                                  "them through the limiter, and begin at info['commanded'] after connect, reset and lost")

    def _forget_sent(self) -> None:
        self._sent, self._grid, self._since = None, None, self._packet + 1
        assert self._state is not None
        self._state.info["lost"] = False

    def stop(self) -> None:
        self._stopped = True
        if self._session:
            for _ in range(3):
                self._send({"op": "stop", "session": self._session})

    def close(self) -> None:
        """End the robot's process when this driver started it, whose recording is then complete; `summary` holds what it says at its end."""
        if self.process is not None and self.process.poll() is None:
            if self._session:
                self._send({"op": "quit", "session": self._session})
            self.process.terminate()
        if self.process is not None:
            try:
                out, _ = self.process.communicate(timeout=20)
                lines = out.decode().splitlines()
                self.summary = json.loads(lines[-1]) if lines else {}
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.communicate()
        if self.facts:
            self._socket.close()
        self.process, self.facts, self._session, self._state = None, {}, 0, None

    def _check_alive(self) -> None:
        if not self._session:
            raise DriverError("the simulated robot is not connected: call connect first")
        self._check_process()

    def _check_process(self) -> None:
        if self.process is not None and (code := self.process.poll()) is not None:
            raise DriverError(f"the simulated robot's process has ended with {code}: start it again")

"""A driver in a process of its own: what a vendor's library crashes, hangs or holds of Python's lock does not take the control loop along.

The process ends when the bridge's does: setpoints are played to their end, at rest, then the robot is let go. Messages are raw bytes, no pickle.
"""
import importlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from policy.serve.drivers.stream import Gone, Sense, Streamed
from policy.serve.realtime import claim
from policy.serve.robot import DriverError, RobotSpec, RobotState, Setpoints

CONNECT, WRITE, STOP, STATE, FAULT, GONE = b"c", b"w", b"s", b"S", b"F", b"G"
HEAD, POINT = struct.Struct("<ddq"), struct.Struct("<dq")  # t0, dt, setpoints; t, joints
GRACE = 0.15  # s that the way through the process may add to `stale`


class Apart:
    """The driver `client` (a Streamed) with these options, behind the same five calls.   sense: policy.serve.drivers.stream.Streamed.

    realtime: ask for SCHED_FIFO for the process; where it is not granted the robot is told less evenly.
    """

    def __init__(self, client: type[Streamed], *, realtime: bool = True, sense: Sense | None = None, **options: Any):
        made = client(**options)  # wrong settings show here
        self.client, self.options, self.realtime, self.sense = client, options, realtime, sense
        self.name, self.rate, self.stale = made.name, made.rate, made.stale
        self._process: subprocess.Popen[bytes] | None = None

    def connect(self, robot: RobotSpec, timeout: float = 5.0) -> RobotState:
        self.close()
        self._line, theirs = Pipe()
        self._fault: DriverError | None = None
        self._newest: RobotState | None = None
        self._stopped, self._dof, self._heard = False, robot.dof, time.monotonic()
        command = [sys.executable, "-m", "policy.serve.drivers.apart", str(theirs.fileno()), self.client.__module__, self.client.__qualname__,
                   json.dumps({"options": self.options, "realtime": self.realtime})]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                         start_new_session=True)  # ctrl-C and a terminal that closes are for the bridge, which brakes first
        theirs.close()
        self._line.send_bytes(CONNECT + json.dumps({"robot": {k: v if isinstance(v, str | float | int) else list(v) for k, v in asdict(robot).items()},
                                                    "timeout": timeout}).encode())
        until = time.monotonic() + timeout + 5.0  # what starting Python may take
        while self._fault is None and self._newest is None and time.monotonic() < until:
            self._line.poll(0.05)
            self._hear()
        if self._newest is None:
            fault = self._fault or DriverError(f"{self.name}: its process does not start within {timeout + 5:g} s")
            self.close()
            raise fault
        state = self.read()
        assert state is not None
        return state

    def read(self) -> RobotState | None:
        if self._process is None:
            raise DriverError(f"{self.name} is not connected: call connect(robot)")
        self._hear()
        if self._fault is not None:
            raise self._fault
        newest, self._newest = self._newest, None
        if newest is None:
            self._check_heard()
        elif self.sense is not None:
            newest.obs.update(self.sense(newest))
        return newest

    def write(self, setpoints: Setpoints) -> None:
        if self._process is None or self._stopped:
            raise DriverError(f"{self.name} was stopped: it takes no setpoints until connect()")
        if self._fault is not None:
            raise self._fault
        if setpoints.q.ndim != 2 or setpoints.q.shape[1] != self._dof or not setpoints.q.shape == setpoints.dq.shape == setpoints.ddq.shape:
            raise DriverError(f"setpoints must be (n, {self._dof}), got positions {setpoints.q.shape} and velocities {setpoints.dq.shape}")
        self._hear()
        self._check_heard()  # a process that no longer reads would block us
        arrays = np.stack([setpoints.q, setpoints.dq, setpoints.ddq]).astype("<f8").tobytes()
        self._send(WRITE + HEAD.pack(setpoints.t0, setpoints.dt, len(setpoints.q)) + arrays)

    def stop(self) -> None:
        if self._process is not None and not self._stopped:
            self._stopped = True
            self._send(STOP)

    def close(self) -> None:
        if self._process is None:
            return
        self._line.close()
        try:
            self._process.wait(0.1 if isinstance(self._fault, Gone) else 3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _send(self, message: bytes) -> None:
        with suppress(OSError):  # _hear says why
            self._line.send_bytes(message)

    def _hear(self) -> None:
        """Take in what the process said. What it said last counts."""
        try:
            while self._fault is None and self._line.poll(0):
                said = self._line.recv_bytes()
                self._heard = time.monotonic()
                if said[:1] == STATE:
                    self._newest = unpack_state(said[1:])
                else:
                    self._fault = (Gone if said[:1] == GONE else DriverError)(said[1:].decode())
        except (OSError, EOFError):
            assert self._process is not None
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0.01)
            self._fault = Gone(f"{self.name} is gone: the process that talks to it ended ({self._process.returncode}). Look at the robot, then connect again")

    def _check_heard(self) -> None:
        if (silent := time.monotonic() - self._heard) > self.stale + GRACE:
            self._fault = Gone(f"{self.name} is gone: nothing heard for {silent:.2f} s. Check cable, power and network, then connect again")
            raise self._fault


def pack_state(state: RobotState) -> bytes:
    more = json.dumps({"obs": {k: v.tolist() for k, v in state.obs.items()}, "info": state.info}).encode()
    return POINT.pack(state.t, len(state.q)) + np.stack([state.q, state.dq]).astype("<f8").tobytes() + more


def unpack_state(said: bytes) -> RobotState:
    t, n = POINT.unpack_from(said)
    end = POINT.size + 16 * n
    q, dq = np.frombuffer(said[POINT.size:end], "<f8").reshape(2, n).copy()
    more = json.loads(said[end:])
    return RobotState(t, q, dq, {k: np.asarray(v, np.float32) for k, v in more["obs"].items()}, more["info"])


def unpack_setpoints(said: bytes) -> Setpoints:
    t0, dt, n = HEAD.unpack_from(said)
    q, dq, ddq = np.frombuffer(said[HEAD.size:], "<f8").reshape(3, n, -1)
    return Setpoints(t0, dt, q, dq, ddq)


def serve(line: Connection, driver: Streamed) -> None:
    """Do what the bridge asks for until it closes the line, then play the setpoints to their end and let go."""
    end = time.monotonic()
    try:
        while True:
            if line.poll(0.5 / driver.rate):
                said = line.recv_bytes()
                if said[:1] == CONNECT:
                    asked: Mapping[str, Any] = json.loads(said[1:])
                    line.send_bytes(STATE + pack_state(driver.connect(RobotSpec(**asked["robot"]), asked["timeout"])))
                elif said[:1] == STOP:
                    driver.stop()
                else:
                    setpoints = unpack_setpoints(said[1:])
                    driver.write(setpoints)
                    end = setpoints.t0 + len(setpoints.q) * setpoints.dt
            if (state := driver.read()) is not None:
                line.send_bytes(STATE + pack_state(state))
    except DriverError as e:
        with suppress(OSError):
            line.send_bytes((GONE if isinstance(e, Gone) else FAULT) + str(e).encode())
            while True:  # the bridge is to read it before the line closes
                line.recv_bytes()
    except (OSError, EOFError):
        with suppress(DriverError):
            last = min(end, time.monotonic() + 5.0)
            while time.monotonic() < last:
                driver.read()
                time.sleep(0.01)


def main(fd: str, module: str, name: str, given: str) -> None:
    settings = json.loads(given)
    if settings["realtime"]:
        claim()
    driver = getattr(importlib.import_module(module), name)(**settings["options"])
    serve(Connection(int(fd)), driver)
    driver.close()
    os._exit(0)  # a vendor's library may hang in its destructors


if __name__ == "__main__":
    main(*sys.argv[1:])

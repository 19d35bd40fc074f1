"""A UR controller as a network sees it, for tests of policy.serve.drivers.ur: python -m tests.serve.fake_rtde 127.0.0.2

It speaks the Real-Time Data Exchange protocol 2 (port 30004), the dashboard's (29999) and takes programs (30003), well enough for the real ur-rtde client,
whose control program it does not interpret: what that does with the registers is written out in Program. Joints follow servoj with the lag of its lookahead.
Commands on stdin, one json answer a line on stdout: state, protective, emergency, nan, local, stop, mute.
"""
import contextlib
import json
import math
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

DOF = 6
KINDS = {"DOUBLE": "d", "INT32": "i", "UINT32": "I", "UINT64": "Q", "VECTOR6D": "6d", "VECTOR3D": "3d", "VECTOR6INT32": "6i"}
VECTORS = {"actual_q", "actual_qd", "target_q", "target_qd", "target_qdd", "target_current", "target_moment", "actual_current", "joint_control_output",
           "actual_TCP_pose", "actual_TCP_speed", "actual_TCP_force", "target_TCP_pose", "target_TCP_speed", "joint_temperatures", "actual_joint_voltage",
           "ft_raw_wrench", "payload_inertia", "external_force_torque"}
OTHERS = {"robot_status_bits": "UINT32", "safety_status_bits": "UINT32", "runtime_state": "UINT32", "robot_mode": "INT32", "safety_mode": "INT32",
          "joint_mode": "VECTOR6INT32", "actual_tool_accelerometer": "VECTOR3D", "payload_cog": "VECTOR3D", "actual_digital_input_bits": "UINT64",
          "actual_digital_output_bits": "UINT64"}
READY, DONE = 1, 2            # output_int_register_0, as the control program sets it
SERVOJ, SERVO_STOP, WATCHDOG, END = 11, 16, 35, 255
REALTIME = (6, 9, 10, SERVOJ, 24, 25, 26, 27, 38, 58, 66, 67, 68, 69, 70, 71)
STOPPED, PLAYING = 1, 2       # runtime_state


def kind(name: str) -> str:
    if name in VECTORS:
        return "VECTOR6D"
    if "int_register" in name:
        return "INT32"
    return OTHERS.get(name, "DOUBLE")


def pack(names: list[str], values: dict) -> bytes:
    out = []
    for name in names:
        count = int(KINDS[kind(name)][:-1] or 1)
        value = values.get(name, 0)
        out += list(value) if isinstance(value, list) else [value] * count
    return struct.pack(">" + "".join(KINDS[kind(n)] for n in names), *out)


class Arm:
    """Joints that servoj pulls behind a target, critically damped with the lag of its lookahead, and that brake evenly otherwise."""

    def __init__(self):
        self.q, self.dq = [0.0, -1.57, 1.57, -1.57, -1.57, 0.0], [0.0] * DOF
        self.target, self.lookahead, self.brake = None, 0.1, 4.0
        self.top = {"dq": [0.0] * DOF, "ddq": [0.0] * DOF}

    def step(self, dt: float) -> None:
        w = 2 / self.lookahead
        for j in range(DOF):
            if self.target is not None:
                a = w * w * (self.target[j] - self.q[j]) - 2 * w * self.dq[j]
            else:
                a = -math.copysign(min(self.brake, abs(self.dq[j]) / dt), self.dq[j])
            self.dq[j] += a * dt
            self.q[j] += self.dq[j] * dt
            self.top["ddq"][j] = max(self.top["ddq"][j], abs(a))
            self.top["dq"][j] = max(self.top["dq"][j], abs(self.dq[j]))

    @property
    def rests(self) -> bool:
        return self.target is None and not any(self.dq)


class Program:
    """ur-rtde's control program, as of 1.6.5: commands in input register 0, state in output register 0, one look at them in a control cycle."""

    def __init__(self, arm: Arm):
        self.arm, self.running, self.ready, self.executing = arm, False, READY, False
        self.stopping = False
        self.limit, self.heard = math.inf, 0.0  # s between writes of input register 0; robot time of the last
        self.log: list[str] = []

    def start(self) -> None:
        self.running, self.ready, self.executing, self.stopping, self.limit = True, READY, False, False, math.inf

    def end(self, why: str) -> None:
        self.running, self.arm.target, self.arm.brake, self.limit = False, None, 4.0, math.inf
        self.log.append(why)

    def cycle(self, now: float, registers: dict) -> None:
        if not self.running:
            return
        if now - self.heard > self.limit:
            return self.end("watchdog")
        command = registers.get("input_int_register_0", 0)
        if command in REALTIME:
            if command == SERVOJ:
                self.arm.target = [registers[f"input_double_register_{j}"] for j in range(DOF)]
                self.arm.lookahead = max(registers["input_double_register_9"], 0.002)
            self.ready = READY
        elif command == 0:
            self.executing, self.ready = False, READY
        elif not self.executing:
            self.executing = True
            if command == END:
                return self.end("ended")
            if command == SERVO_STOP:
                self.arm.target, self.arm.brake, self.stopping = None, registers["input_double_register_0"], True
                self.log.append("servo_stop")
                return
            if command == WATCHDOG:
                self.limit, self.heard = 1 / registers["input_double_register_0"], now
            self.ready = DONE
        elif self.stopping and self.arm.rests:  # stopj returns at rest
            self.stopping, self.ready = False, DONE


class Controller:
    def __init__(self, major: int):
        self.major, self.rate = major, 500 if major > 3 else 125
        self.arm = Arm()
        self.program = Program(self.arm)
        self.registers: dict = {}
        self.owned: set[str] = set()
        self.remote, self.safety, self.nan, self.mute = True, 1, False, False
        self.subscribers: dict[socket.socket, list[str]] = {}
        self.lock = threading.Lock()
        self.cycles = 0

    def outputs(self) -> dict:
        nan = [math.nan] * DOF
        return {"timestamp": self.cycles / self.rate, "actual_q": nan if self.nan else self.arm.q, "actual_qd": self.arm.dq, "target_q": self.arm.q,
                "robot_mode": 7, "safety_mode": self.safety, "runtime_state": PLAYING if self.program.running else STOPPED,
                "robot_status_bits": 1 + 2 * self.program.running, "safety_status_bits": {1: 1, 3: 4, 7: 1 << 6 | 1 << 7}.get(self.safety, 1),
                "output_int_register_0": self.program.ready, "speed_scaling": 1.0, "target_speed_fraction": 1.0}

    def run(self) -> None:
        start = time.monotonic()
        while True:
            left = start + (self.cycles + 1) / self.rate - time.monotonic()
            if left > 0:
                time.sleep(left)
            elif left < -0.01:  # not scheduled for so long: robot time stood still
                start -= left
            with self.lock:
                self.cycles += 1
                self.program.cycle(self.cycles / self.rate, self.registers)
                self.arm.step(1 / self.rate)
                said = [] if self.mute else [(sock, message(85, b"\1" + pack(names, self.outputs()))) for sock, names in self.subscribers.items()]
            for sock, text in said:
                with contextlib.suppress(OSError):
                    sock.sendall(text)

    def rtde(self, sock: socket.socket) -> None:
        outputs: list[str] = []
        inputs: dict[int, list[str]] = {}
        mine: set[str] = set()
        reader = sock.makefile("rb")
        try:
            while head := reader.read(3):
                size, what = struct.unpack(">HB", head)
                body = reader.read(size - 3)
                with self.lock:
                    if what == 85:
                        names = inputs[body[0]]
                        self.registers.update(zip(names, struct.unpack(">" + "".join(KINDS[kind(n)] for n in names), body[1:]), strict=False))
                        if "input_int_register_0" in names:
                            self.program.heard = self.cycles / self.rate
                    elif what == 86:
                        sock.sendall(message(86, b"\1"))
                    elif what == 118:
                        sock.sendall(message(118, struct.pack(">4I", self.major, 15, 0, 128000)))
                    elif what == 79:
                        outputs = body[8:].decode().strip(",").split(",")
                        sock.sendall(message(79, b"\1" + ",".join(map(kind, outputs)).encode()))
                    elif what == 73:
                        names = body.decode().strip(",").split(",")
                        taken = (self.owned - mine) & set(names)
                        mine |= set(names) - taken
                        self.owned |= mine
                        inputs[len(inputs) + 1] = names
                        kinds = ["IN_USE" if n in taken else kind(n) for n in names]
                        sock.sendall(message(73, bytes([0 if taken else len(inputs)]) + ",".join(kinds).encode()))
                    elif what == 83:
                        sock.sendall(message(83, b"\1"))
                        self.subscribers[sock] = outputs
        finally:
            with self.lock:
                self.owned -= mine
                self.subscribers.pop(sock, None)

    def dashboard(self, sock: socket.socket) -> None:
        sock.sendall(b"Connected: Universal Robots Dashboard Server\n")
        safety = {1: "NORMAL", 3: "PROTECTIVE_STOP", 7: "ROBOT_EMERGENCY_STOP"}[self.safety]
        answers = {"polyscopeversion": f"URSoftware {self.major}.15.0.128000 (Jan 01 2024)", "get serial number": "20235500000", "stop": "Stopped",
                   "robotmode": "Robotmode: RUNNING", "safetystatus": f"Safetystatus: {safety}"}
        for line in sock.makefile("r"):
            command = line.strip().lower()
            if command == "stop":
                with self.lock:
                    self.program.end("stop")
            answer = str(self.remote).lower() if command == "is in remote control" else answers.get(command, f'could not understand: "{command}"')
            sock.sendall(answer.encode() + b"\n")

    def programs(self, sock: socket.socket) -> None:
        text = b""
        while more := sock.recv(1 << 16):
            text += more
            if text.rstrip().endswith(b"\nend") and self.remote and self.safety == 1:
                if b"def rtde_control()" in text and b"servoj(" in text:
                    with self.lock:
                        self.program.start()
                text = b""

    def obey(self, command: str) -> dict:
        if command in ("protective", "emergency"):
            self.safety = 3 if command == "protective" else 7
            self.program.end(command)
        elif command == "nan":
            self.nan = True
        elif command == "local":
            self.remote = False
        elif command == "stop":
            self.program.end("stop")
        elif command == "mute":
            self.mute = True
        elif command == "reset":
            self.arm.top = {"dq": [0.0] * DOF, "ddq": [0.0] * DOF}
        return {"q": self.arm.q, "dq": self.arm.dq, "top": self.arm.top, "running": self.program.running, "log": self.program.log, "limit": self.program.limit
                if math.isfinite(self.program.limit) else None}


def message(what: int, body: bytes) -> bytes:
    return struct.pack(">HB", len(body) + 3, what) + body


def claim() -> None:
    """A controller runs in real time; so does this one where it may."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(12))


def listen(host: str, port: int, serve: Callable[[socket.socket], None]) -> None:
    server = socket.create_server((host, port))

    def one(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, struct.error):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            serve(sock)

    def accept() -> None:
        while True:
            threading.Thread(target=one, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def main(host: str, major: int = 5) -> None:
    claim()
    controller = Controller(major)
    for port, serve in ((29999, controller.dashboard), (30002, controller.programs), (30003, controller.programs), (30004, controller.rtde)):
        listen(host, port, serve)
    threading.Thread(target=controller.run, daemon=True).start()
    print(json.dumps({"host": host}), flush=True)
    for line in sys.stdin:
        with controller.lock:
            print(json.dumps(controller.obey(line.strip())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

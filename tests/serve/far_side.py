"""A far side in its own process that answers commands on stdin with json lines (fake_rtde, fake_servos), and loopback addresses for fixed ports."""
import json
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def free_address(port: int) -> str:
    """A 127.x.y.z on which nobody listens on `port`: protocols with fixed ports, several at a time."""
    if sys.platform != "linux":
        pytest.skip("only Linux answers on every 127.x.y.z")
    draw = random.SystemRandom()
    while True:
        host = f"127.{draw.randint(1, 250)}.{draw.randint(0, 250)}.{draw.randint(1, 250)}"
        with socket.socket() as s:
            if s.connect_ex((host, port)):
                return host


class FarSide:
    def __init__(self, module: str, *args: object):
        self.process = subprocess.Popen([sys.executable, "-m", module, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.hello = self._line()

    def _line(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the far side ended with {self.process.wait()}"
        return json.loads(line)

    def ask(self, command: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.kill()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

"""Feetech STS3215 servos on a serial line, for tests of policy.serve.drivers.bus: python -m tests.serve.fake_servos 1 2 3 4 5 6

The line is a pseudo terminal, its name the first json line on stdout. Servos follow their goals with a lag and a top speed, and, unlike real ones, stay
where they are when they hear no goal for half a second. Commands on stdin, one json answer each: state, deaf N (the next N writes of goals are lost),
dumb N (the next N requests to read are not answered), limp, unplug.
"""
import contextlib
import json
import math
import os
import select
import sys
import time
import tty

LAG, TOP, QUIET = 0.08, 4000.0, 0.5  # s, steps/s, s
PING, READ, WRITE, SYNC_READ, SYNC_WRITE = 1, 2, 3, 130, 131
TORQUE, GOAL, PRESENT = 40, 42, 56
EVERYONE = 254


class Servo:
    def __init__(self, position: float = 2048.0):
        self.memory = bytearray(80)
        self.position, self.heard = position, time.monotonic()
        self.put(GOAL, round(position))

    def put(self, address: int, word: int) -> None:
        self.memory[address:address + 2] = word.to_bytes(2, "little")

    @property
    def goal(self) -> int:
        return int.from_bytes(self.memory[GOAL:GOAL + 2], "little")

    def step(self, dt: float, now: float) -> None:
        if self.memory[TORQUE]:
            if now - self.heard > QUIET and self.goal != round(self.position):
                self.put(GOAL, round(self.position))
            move = (self.goal - self.position) * (1 - math.exp(-dt / LAG))
            self.position += max(-TOP * dt, min(TOP * dt, move))
        self.put(PRESENT, round(self.position))


class Line:
    def __init__(self, ids: list[int]):
        self.servos = {i: Servo() for i in ids}
        self.deaf = self.dumb = self.goals = self.reads = 0

    def answer(self, number: int, data: bytes = b"") -> bytes:
        body = bytes([number, len(data) + 2, 0]) + data
        return b"\xff\xff" + body + bytes([~sum(body) & 0xFF])

    def take(self, number: int, instruction: int, data: bytes) -> bytes:
        """What is said on the line in answer to one packet."""
        now = time.monotonic()
        if instruction in (READ, SYNC_READ):
            self.reads += 1
            if self.dumb:
                self.dumb -= 1
                return b""
        if instruction == SYNC_READ:
            address, size = data[:2]
            return b"".join(self.answer(i, bytes(self.servos[i].memory[address:address + size])) for i in data[2:] if i in self.servos)
        if instruction == SYNC_WRITE:
            self.goals += 1
            if self.deaf:
                self.deaf -= 1
                return b""
            address, size = data[:2]
            for k in range(2, len(data), size + 1):
                self.store(data[k], address, data[k + 1:k + 1 + size], now)
            return b""
        if number not in self.servos:
            return b""
        if instruction == READ:
            return self.answer(number, bytes(self.servos[number].memory[data[0]:data[0] + data[1]]))
        if instruction == WRITE:
            self.store(number, data[0], data[1:], now)
        return self.answer(number)

    def store(self, number: int, address: int, data: bytes, now: float) -> None:
        if number in self.servos:
            servo = self.servos[number]
            servo.memory[address:address + len(data)] = data
            servo.heard = now

    def packets(self, text: bytearray) -> bytes:
        """Answers to the whole packets at the head of text, which they leave."""
        said = b""
        while (at := text.find(b"\xff\xff")) >= 0 and len(text) >= at + 4 and len(text) >= at + 4 + text[at + 3]:
            body = bytes(text[at + 2:at + 4 + text[at + 3]])
            del text[:at + 4 + text[at + 3]]
            if ~sum(body[:-1]) & 0xFF == body[-1]:
                said += self.take(body[0], body[2], body[3:-1])
        return said

    def obey(self, words: list[str]) -> dict:
        if words[0] in ("deaf", "dumb"):
            setattr(self, words[0], int(words[1]))
        elif words[0] == "limp":
            for servo in self.servos.values():
                servo.memory[TORQUE] = 0
        return {"steps": [s.position for s in self.servos.values()], "goals": [s.goal for s in self.servos.values()], "torque":
                [s.memory[TORQUE] for s in self.servos.values()], "writes": self.goals, "reads": self.reads}


def main(ids: list[int]) -> None:
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    line, text, now = Line(ids), bytearray(), time.monotonic()
    print(json.dumps({"port": os.ttyname(theirs)}), flush=True)
    while True:
        ready, _, _ = select.select([ours, sys.stdin], [], [], 0.002)
        before, now = now, time.monotonic()
        for servo in line.servos.values():
            servo.step(now - before, now)
        if ours in ready:
            with contextlib.suppress(OSError):
                text += os.read(ours, 4096)
                os.write(ours, line.packets(text))
        if sys.stdin in ready:
            words = sys.stdin.readline().split()
            if not words or words[0] == "unplug":
                return
            print(json.dumps(line.obey(words)), flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])

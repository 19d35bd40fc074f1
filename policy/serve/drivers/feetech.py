"""Feetech STS/SMS servos (SO-100, SO-101) as a position bus, in degrees from the middle of their turn. Packets are Feetech's own SDK's."""
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    import termios
    GONE: tuple[type[Exception], ...] = (termios.error,)  # what pyserial lets through when the port vanishes
except ImportError:
    GONE = ()
try:
    import scservo_sdk as sdk
except ImportError as e:
    raise ImportError("Feetech servos need their SDK: pip install 'dipole[bus]'") from e

TORQUE_ENABLE, GOAL_POSITION, PRESENT_POSITION = 40, 42, 56  # addresses in a servo's memory (STS3215)
TURN, MIDDLE = 4096, 2048  # steps of a turn, and where 0 degrees is


class FeetechBus:
    """port: such as /dev/ttyACM0.   ids: {servo: its id on the bus}.   baudrate: 1 Mbaud is what SO-101 are set to."""

    def __init__(self, port: str, ids: Mapping[str, int], *, baudrate: int = 1_000_000):
        self.ids, self.baudrate = dict(ids), baudrate
        self._port, self._packets, self._lock = sdk.PortHandler(port), sdk.PacketHandler(0), threading.Lock()  # 0: bytes as STS servos order them
        self._reader = sdk.GroupSyncRead(self._port, self._packets, PRESENT_POSITION, 2)
        for number in self.ids.values():
            self._reader.addParam(number)

    def connect(self) -> None:
        if not self._port.openPort() or not self._port.setBaudRate(self.baudrate):
            raise ConnectionError(f"{self._port.getPortName()} cannot be opened at {self.baudrate} baud")
        self._port.ser.timeout = 0.002  # s; the SDK would spin instead of wait
        for servo, number in self.ids.items():
            with self._line():
                _, result, _ = self._packets.ping(self._port, number)
                self._check(result, f"servo {servo} (id {number}) does not answer")

    def read_positions(self) -> dict[str, float]:
        with self._line():
            self._check(self._reader.txRxPacket(), "positions")
            steps = {servo: self._reader.getData(number, PRESENT_POSITION, 2) for servo, number in self.ids.items()}
        return {servo: (sdk.SCS_TOHOST(step, 15) - MIDDLE) * 360 / TURN for servo, step in steps.items()}

    def write_goals(self, goals: Mapping[str, float]) -> None:
        writer = sdk.GroupSyncWrite(self._port, self._packets, GOAL_POSITION, 2)
        for servo, degrees in goals.items():
            step = sdk.SCS_TOSCS(round(degrees * TURN / 360) + MIDDLE, 15)
            writer.addParam(self.ids[servo], [sdk.SCS_LOBYTE(step), sdk.SCS_HIBYTE(step)])
        with self._line():
            self._check(writer.txPacket(), "goals")

    def torque(self, on: bool) -> None:
        if on:
            self.write_goals(self.read_positions())  # a servo that wakes up goes to the goal it had
        for servo, number in self.ids.items():
            with self._line():
                result, _ = self._packets.write1ByteTxRx(self._port, number, TORQUE_ENABLE, int(on))
                self._check(result, f"torque of {servo}")

    def close(self) -> None:
        with self._line():
            if self._port.is_open:
                self._port.closePort()

    @contextmanager
    def _line(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except GONE as e:
                raise ConnectionError(f"{self._port.getPortName()} is gone ({e})") from e

    def _check(self, result: Any, what: str) -> None:
        if result != sdk.COMM_SUCCESS:
            self._port.ser.reset_input_buffer()  # or the late answer would be taken for the next one
            raise TimeoutError(f"{what}: {self._packets.getTxRxResult(result)}")

"""Bags as rosbags and mcap write them, with messages whose values are known functions of time."""
import io
from pathlib import Path

import numpy as np
import PIL.Image
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.rosbag2.enums import CompressionFormat, CompressionMode
from rosbags.typesys import Stores, get_typestore

TYPES = get_typestore(Stores.ROS2_HUMBLE)
T = TYPES.types
JOINTS = ("lift", "turn", "grip")
BEGIN = 1_700_000_000 * 10**9  # ns
LATE = 3_000_000  # ns from a header's stamp to the recorder


def header(t: float):
    ns = BEGIN + round(t * 1e9)
    return T["std_msgs/msg/Header"](T["builtin_interfaces/msg/Time"](ns // 10**9, ns % 10**9), "base")


def joint(i: int, t):
    """Position of joint i at t [s]: linear in time, so that interpolation is exact."""
    return (i + 1) * 0.1 * np.asarray(t) - i


def joint_state(t: float, names=JOINTS):
    index = [JOINTS.index(n) for n in names]
    at = np.array([joint(i, t) for i in index])
    return T["sensor_msgs/msg/JointState"](header(t), list(names), at, np.array([0.1 * (i + 1) for i in index]), np.empty(0))


def trajectory(t: float):
    point = T["trajectory_msgs/msg/JointTrajectoryPoint"]
    still = T["builtin_interfaces/msg/Duration"](0, 0)
    none = np.empty(0)
    points = [point(np.full(3, 99.0), none, none, none, still), point(np.array([t, 2 * t, 3 * t]), none, none, none, still)]
    return T["trajectory_msgs/msg/JointTrajectory"](header(t), list(JOINTS), points)


def pose(t: float):
    """Turns about z by t rad, and the sender flips the quaternion's sign at every message."""
    sign = 1 if round(t * 100) % 2 else -1
    q = sign * np.array([0, 0, np.sin(t / 2), np.cos(t / 2)])
    at = T["geometry_msgs/msg/Pose"](T["geometry_msgs/msg/Point"](t, 2 * t, -t), T["geometry_msgs/msg/Quaternion"](*q))
    return T["geometry_msgs/msg/PoseStamped"](header(t), at)


def array(values):
    return T["std_msgs/msg/Float64MultiArray"](T["std_msgs/msg/MultiArrayLayout"]([], 0), np.asarray(values, np.float64))


def pixels(i: int, encoding: str = "rgb8") -> np.ndarray:
    """Frame i: (6, 8, 3) uint8 RGB, or (6, 8, 1) of depth or grey."""
    rng = np.random.default_rng(i)
    if encoding in ("16UC1", "mono16"):
        return rng.integers(0, 2**16, (6, 8, 1), np.uint16)
    if encoding == "32FC1":
        return rng.normal(size=(6, 8, 1)).astype(np.float32)
    return rng.integers(0, 256, (6, 8, 1 if encoding == "mono8" else 3), np.uint8)


def image(t: float, i: int, encoding: str = "rgb8", pad: int = 0, big: bool = False):
    """pad: bytes at the end of each row that are no pixels."""
    x = pixels(i, encoding)
    x = x[..., ::-1] if encoding.startswith("bgr") else x
    x = np.concatenate([x, np.full((6, 8, 1), 200, np.uint8)], -1) if encoding.endswith("a8") else x
    rows = np.ascontiguousarray(x.astype(x.dtype.newbyteorder(">")) if big else x).view(np.uint8).reshape(6, -1)
    data = np.pad(rows, ((0, 0), (0, pad)), constant_values=7)
    return T["sensor_msgs/msg/Image"](header(t), 6, 8, encoding, int(big), data.shape[1], data.reshape(-1))


def compressed(t: float, x: np.ndarray, format: str = "png", head: bytes = b""):
    out = io.BytesIO()
    PIL.Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(out, "PNG" if "png" in format or "Depth" in format else "JPEG", quality=95)
    return T["sensor_msgs/msg/CompressedImage"](header(t), format, np.frombuffer(head + out.getvalue(), np.uint8))


def write_bag(path: Path, messages, storage: str = "mcap", compression: CompressionMode = CompressionMode.NONE) -> Path:
    """messages [(topic, t [s] of the header, message)], recorded LATE after their time, in the order of receipt."""
    with_writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3)
    with_writer.set_compression(compression, CompressionFormat.ZSTD)
    with with_writer as writer:
        connections = {}
        for topic, t, message in sorted(messages, key=lambda m: m[1]):
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=TYPES)
            writer.write(connections[topic], BEGIN + round(t * 1e9) + LATE, TYPES.serialize_cdr(message, message.__msgtype__))
    return path


def lone(path: Path, messages, compression=CompressionType.ZSTD, definition: bytes = b"", chunk: int = 4096) -> Path:
    """One .mcap without a folder, by mcap's own writer."""
    with open(path, "wb") as f:
        writer = McapWriter(f, chunk_size=chunk, compression=compression)
        writer.start("ros2", "")
        known: dict[str, int] = {}
        for topic, t, message in sorted(messages, key=lambda m: m[1]):
            if topic not in known:
                schema = writer.register_schema(message.__msgtype__, "ros2msg", definition)
                known[topic] = writer.register_channel(topic, "cdr", schema)
            ns = BEGIN + round(t * 1e9)
            writer.add_message(known[topic], ns + LATE, bytes(TYPES.serialize_cdr(message, message.__msgtype__)), ns)
        writer.finish()
    return path


def arm(seconds: float = 2.0, *, start: float = 0.0, shuffle: bool = True):
    """Joint states at 100 Hz whose order changes, commands at 20 Hz, poses at 50 Hz, images at 10 Hz; they begin at different times."""
    out = []
    for k in range(round(seconds * 100)):
        t = start + k / 100
        out.append(("/joint_states", t, joint_state(t, JOINTS if k % 2 or not shuffle else JOINTS[::-1])))
    out += [("/arm/command", t, trajectory(t)) for t in start + 0.11 + np.arange(round(seconds * 20) - 4) / 20]
    out += [("/tool", t, pose(t)) for t in start + np.arange(round(seconds * 50)) / 50]
    out += [("/camera/image_raw", start + 0.05 + i / 10, image(start + 0.05 + i / 10, i)) for i in range(round(seconds * 10))]
    return out

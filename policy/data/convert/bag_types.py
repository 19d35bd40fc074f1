"""What the standard ROS 2 messages hold, as arrays: values, units, and how they may be carried from the messages' times to others.

linear: measured, between two messages; slerp: the same for a quaternion; hold: the latest value counts until the next (commands, counters); image: hold,
of pictures, which are decoded when they are needed.
"""
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy.data.convert.bag_files import needed
from policy.data.convert.images import read_image
from policy.data.files import DataError

LINEAR, SLERP, HOLD, IMAGE = "linear", "slerp", "hold", "image"
Values = dict[str, np.ndarray]


@dataclass(frozen=True)
class Type:
    """values(message) -> {field: array}; fields {field: (how, unit)}; "" is the only field of a message.   joints: fields are one number a joint."""
    values: Callable[[Any], Values]
    fields: Mapping[str, tuple[str, str]]
    joints: str | None = None  # attribute with their names


def _xyz(v: Any) -> np.ndarray:
    return np.array([v.x, v.y, v.z])


def _xyzw(q: Any) -> np.ndarray:
    return np.array([q.x, q.y, q.z, q.w])


def _pose(p: Any) -> Values:
    return {"position": _xyz(p.position), "orientation": _xyzw(p.orientation)}


def _twist(t: Any) -> Values:
    return {"linear": _xyz(t.linear), "angular": _xyz(t.angular)}


def _wrench(w: Any) -> Values:
    return {"force": _xyz(w.force), "torque": _xyz(w.torque)}


def _transform(t: Any) -> Values:
    return {"translation": _xyz(t.translation), "rotation": _xyzw(t.rotation)}


def _joints(m: Any) -> Values:
    return {k: np.asarray(getattr(m, k), np.float64) for k in ("position", "velocity", "effort")}


def _trajectory(m: Any) -> Values:
    """The last point: where the message wants the joints to be in the end."""
    last = m.points[-1] if len(m.points) else None
    return {k: np.asarray(getattr(last, k) if last is not None else (), np.float64) for k in ("positions", "velocities")}


def _imu(m: Any) -> Values:
    return {"orientation": _xyzw(m.orientation), "angular_velocity": _xyz(m.angular_velocity), "linear_acceleration": _xyz(m.linear_acceleration)}


def _odometry(m: Any) -> Values:
    return {**_pose(m.pose.pose), **_twist(m.twist.twist)}


def _data(dtype: str) -> Callable[[Any], Values]:
    return lambda m: {"": np.asarray(m.data, dtype)}


def _image(m: Any) -> Values:
    return {"": picture(m)}


def _compressed(m: Any) -> Values:
    return {"": compressed_picture(m)}


def _part(name: str, values: Callable[[Any], Values]) -> Callable[[Any], Values]:
    return lambda m: values(getattr(m, name))


def _alone(value: Callable[[Any], np.ndarray]) -> Callable[[Any], Values]:
    return lambda m: {"": value(m)}


POSE = {"position": (LINEAR, "m"), "orientation": (SLERP, "quaternion xyzw")}
TRANSFORM = {"translation": (LINEAR, "m"), "rotation": (SLERP, "quaternion xyzw")}
TWIST = {"linear": (LINEAR, "m/s"), "angular": (LINEAR, "rad/s")}
WRENCH = {"force": (LINEAR, "N"), "torque": (LINEAR, "N m")}
IMU = {"orientation": (SLERP, "quaternion xyzw"), "angular_velocity": (LINEAR, "rad/s"), "linear_acceleration": (LINEAR, "m/s^2")}
JOINT = {"position": (LINEAR, "rad (m where a joint slides)"), "velocity": (LINEAR, "rad/s (m/s)"), "effort": (LINEAR, "N m (N)")}
TRAJECTORY = {"positions": (HOLD, "rad (m where a joint slides)"), "velocities": (HOLD, "rad/s (m/s)")}
GEOMETRY = {"Pose": (_pose, POSE), "Transform": (_transform, TRANSFORM), "Twist": (_twist, TWIST), "Wrench": (_wrench, WRENCH),
            "Point": (_alone(_xyz), {"": (LINEAR, "m")}), "Vector3": (_alone(_xyz), {"": (LINEAR, "")}),
            "Quaternion": (_alone(_xyzw), {"": (SLERP, "quaternion xyzw")})}
NUMBERS = ("Float32", "Float64", *(f"{sign}Int{n}" for sign in ("", "U") for n in (8, 16, 32, 64)))
TYPES: dict[str, Type] = {
    "sensor_msgs/msg/JointState": Type(_joints, JOINT, "name"),
    "trajectory_msgs/msg/JointTrajectory": Type(_trajectory, TRAJECTORY, "joint_names"),
    "sensor_msgs/msg/Imu": Type(_imu, IMU),
    "nav_msgs/msg/Odometry": Type(_odometry, {**POSE, **TWIST}),
    "sensor_msgs/msg/Image": Type(_image, {"": (IMAGE, "")}),
    "sensor_msgs/msg/CompressedImage": Type(_compressed, {"": (IMAGE, "")}),
    **{f"geometry_msgs/msg/{name}": Type(values, fields) for name, (values, fields) in GEOMETRY.items()},
    **{f"geometry_msgs/msg/{name}Stamped": Type(_part("vector" if name == "Vector3" else name.lower(), values), fields)
       for name, (values, fields) in GEOMETRY.items()},
    **{f"std_msgs/msg/{name}{many}": Type(_data(name.lower()), {"": (HOLD, "")}) for name in NUMBERS for many in ("", "MultiArray")},
    "std_msgs/msg/Bool": Type(_data("bool"), {"": (HOLD, "")}),
}
PIXELS: dict[str, tuple[type, int, list[int] | None]] = {  # encoding: dtype, channels, their order as RGB
    "rgb8": (np.uint8, 3, None), "bgr8": (np.uint8, 3, [2, 1, 0]), "rgba8": (np.uint8, 4, [0, 1, 2]), "bgra8": (np.uint8, 4, [2, 1, 0]),
    "mono8": (np.uint8, 1, None), "8UC1": (np.uint8, 1, None), "8UC3": (np.uint8, 3, None), "mono16": (np.uint16, 1, None), "16UC1": (np.uint16, 1, None),
    "32FC1": (np.float32, 1, None)}


class Decoder:
    """CDR bytes of a standard message -> the message, by rosbags' own definitions, never by those in a bag."""

    def __init__(self) -> None:
        types = needed("rosbags.typesys")
        self._types = types.get_typestore(types.Stores.LATEST)

    def message(self, kind: str, data: bytes, where: str) -> Any:
        try:
            return self._types.deserialize_cdr(data, kind)
        except Exception as e:  # rosbags raises whatever numpy and struct do
            raise DataError(f"{where} is not a whole {kind} ({type(e).__name__}: {e}). The bag is damaged, or was written with another definition of this "
                            "type: leave the topic out with options: {topics: […]}") from e


def stamp(data: bytes) -> int | None:
    """header.stamp [ns] of the CDR bytes of a message that begins with a header."""
    if len(data) < 12:
        return None
    sec, nanosec = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return sec * 10**9 + nanosec


def stamped(kind: str) -> bool:
    """Whether messages of this type begin with a header that says when they are from; a trajectory's says when it is to start, mostly 0 for now."""
    package, _, name = kind.rpartition("/")
    return package in ("sensor_msgs/msg", "nav_msgs/msg") or name.endswith("Stamped")


def picture(m: Any) -> np.ndarray:
    """sensor_msgs/Image -> (h, w, 3) uint8 RGB, (h, w, 1) uint8, or depth as it is: (h, w, 1) uint16 (16UC1: mm) or float32 (32FC1: m)."""
    if m.encoding not in PIXELS:
        raise DataError(f"an image is encoded as {m.encoding!r}; read are {', '.join(PIXELS)}. Leave the topic out with options: {{topics: […]}}")
    kind, channels, order = PIXELS[m.encoding]
    dtype = np.dtype(kind).newbyteorder(">" if m.is_bigendian else "<")
    row = m.width * channels * dtype.itemsize
    data = np.asarray(m.data, np.uint8)
    if not m.width * m.height or m.step < row or data.size < m.step * m.height:
        raise DataError(f"an image of {m.height}x{m.width} {m.encoding} has {data.size} bytes in rows of {m.step}, which is too few. The bag is damaged")
    rows = np.ascontiguousarray(data[:m.step * m.height].reshape(m.height, m.step)[:, :row])
    x: np.ndarray = rows.view(dtype).astype(kind, copy=False).reshape(m.height, m.width, channels)
    return x if order is None else np.ascontiguousarray(x[..., order])


def compressed_picture(m: Any) -> np.ndarray:
    """sensor_msgs/CompressedImage, PNG or JPEG, depth PNG of compressed_depth_image_transport too."""
    data = np.asarray(m.data, np.uint8).tobytes()
    depth = "compressedDepth" in m.format
    return read_image(data[12:] if depth else data, f"a compressed image ({m.format or 'format not told'})")

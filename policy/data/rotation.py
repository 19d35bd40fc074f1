"""Rotations between their representations, for numpy and torch alike, batched over all leading axes; by way of the quaternion (w, x, y, z), w >= 0.

Written for both because an export decodes plans without torch. Differentiable in torch (but for Euler angles at gimbal lock); exact near no turn and near
half a turn: against scipy 1e-12 in float64, 2e-6 in float32, of a matrix' entries.

axis_angle        (3,) rad, length the angle, given back in [0, pi]
quaternion_xyzw   (4,) scipy, ROS, robosuite; quaternion_wxyz (4,) MuJoCo, pytorch3d. Given back of unit length and with w >= 0: q and -q are one rotation
matrix            (9,) row after row. Read by its first two rows alone, like rotation_6d, so what a network predicts need not be orthogonal
rotation_6d       (6,) the first two ROWS of the matrix, as pytorch3d, and so UMI, diffusion_policy and robomimic, have it: their numbers are ours. Zhou et
                  al. 2019 (arXiv 1812.07035) write the first two columns, which are the rows of the inverse: numbers of that convention read here as
                  rotation_6d give the inverse rotation. Read by Gram-Schmidt, so any two rows that are not parallel will do
euler_xyz         (3,) rad: roll, pitch, yaw about fixed x, then y, then z, R = Rz Ry Rx, as URDF, ROS and scipy's "xyz"; pitch in [-pi/2, pi/2]
"""
import numpy as np

from policy.data.channels import Array, library
from policy.data.semantics import ROTATIONS, WIDTHS


def convert(x: Array, source: str, to: str) -> Array:
    """(…, width of source) -> (…, width of to).   ValueError when a name is unknown or the width is another."""
    for name in (source, to):
        if name not in ROTATIONS:
            raise ValueError(f"{name!r} is no representation of a rotation; use one of {', '.join(ROTATIONS)}")
    return from_quaternion(to_quaternion(x, source), to)


def to_quaternion(x: Array, source: str) -> Array:
    """(…, width of source) -> (…, 4) as w, x, y, z, of unit length, w >= 0.   ValueError when the width is another."""
    if x.shape[-1] != WIDTHS[source]:
        raise ValueError(f"{source} has {WIDTHS[source]} numbers, got {x.shape[-1]}")
    if source == "axis_angle":
        return upright(_from_axis_angle(x))
    if source == "euler_xyz":
        return upright(_from_euler(x))
    if source in ("matrix", "rotation_6d"):
        return _from_rows(x[..., :3], x[..., 3:6])
    if source == "quaternion_xyzw":
        x = _pack(x[..., 3], x[..., 0], x[..., 1], x[..., 2])
    return upright(x / _length(x))


def from_quaternion(q: Array, to: str) -> Array:
    """(…, 4) of unit length -> (…, width of to)."""
    if to == "axis_angle":
        return _to_axis_angle(upright(q))
    if to == "euler_xyz":
        return _to_euler(q)
    if to == "matrix":
        return _rows(q, 3)
    if to == "rotation_6d":
        return _rows(q, 2)
    q = upright(q)
    return q if to == "quaternion_wxyz" else _pack(q[..., 1], q[..., 2], q[..., 3], q[..., 0])


def multiply(a: Array, b: Array) -> Array:
    """The rotation b followed by a, (…, 4) each."""
    w, x, y, z = _unpack(a)
    s, i, j, k = _unpack(b)
    return _pack(w * s - x * i - y * j - z * k, w * i + x * s + y * k - z * j, w * j - x * k + y * s + z * i, w * k + x * j - y * i + z * s)


def inverse(q: Array) -> Array:
    w, x, y, z = _unpack(q)
    return _pack(w, -x, -y, -z)


def turn(q: Array, v: Array) -> Array:
    """The vector v (…, 3) turned by q (…, 4)."""
    t = 2 * _cross(q[..., 1:], v)
    return v + q[..., :1] * t + _cross(q[..., 1:], t)


def upright(q: Array) -> Array:
    """Of the two quaternions of a rotation, the one with w >= 0."""
    return library(q).where(q[..., :1] < 0, -q, q)


def _pack(*parts: Array) -> Array:
    return library(parts[0]).stack(parts, axis=-1)


def _unpack(x: Array) -> tuple[Array, ...]:
    return tuple(x[..., i] for i in range(x.shape[-1]))


def _cross(a: Array, b: Array) -> Array:
    (x, y, z), (i, j, k) = _unpack(a), _unpack(b)
    return _pack(y * k - z * j, z * i - x * k, x * j - y * i)


def _length(x: Array) -> Array:
    """(…, 1); of a zero vector 1, so that nothing is divided by it."""
    xp, square = library(x), (x * x).sum(-1)[..., None]
    return xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))


def _from_axis_angle(v: Array) -> Array:
    """sin(a/2)/a is a series below an angle of 0.01, where its own gradient divides by zero; the first term left out is 1e-18 of it."""
    xp, square = library(v), (v * v).sum(-1)[..., None]
    small = square < 1e-4
    angle = xp.sqrt(xp.where(small, xp.ones_like(square), square))
    w = xp.where(small, 1 - square / 8 + square**2 / 384 - square**3 / 46080, xp.cos(angle / 2))
    sinc = xp.where(small, 0.5 - square / 48 + square**2 / 3840 - square**3 / 645120, xp.sin(angle / 2) / angle)
    return xp.concatenate([w, sinc * v], axis=-1)


def _to_axis_angle(q: Array) -> Array:
    """q upright. a/sin(a/2) = 2 asin(s)/s is a series where the vector part is short."""
    xp, w, v = library(q), q[..., :1], q[..., 1:]
    square = (v * v).sum(-1)[..., None]
    small = square < 1e-4
    s = xp.sqrt(xp.where(small, xp.ones_like(square), square))
    ratio = xp.where(small, 2 + square / 3 + 3 * square**2 / 20 + 5 * square**3 / 56, 2 * xp.arctan2(s, w) / s)
    return ratio * v


def _rows(q: Array, n: int) -> Array:
    """The first n rows of the matrix, one after the other."""
    w, x, y, z = _unpack(q)
    rows = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]
    return _pack(*rows[: 3 * n])


def _from_rows(a: Array, b: Array) -> Array:
    """Gram-Schmidt, then of four columns that are all the quaternion times one of its entries the one of the largest: nothing small is divided by."""
    xp = library(a)
    a = a / _length(a)
    b = b - (a * b).sum(-1)[..., None] * a
    b = b / _length(b)
    (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = _unpack(a), _unpack(b), _unpack(_cross(a, b))
    x, y, z, xy, xz, yz = r21 - r12, r02 - r20, r10 - r01, r01 + r10, r02 + r20, r12 + r21
    sizes = [1 + r00 + r11 + r22, 1 + r00 - r11 - r22, 1 - r00 + r11 - r22, 1 - r00 - r11 + r22]
    columns = [_pack(sizes[0], x, y, z), _pack(x, sizes[1], xy, xz), _pack(y, xy, sizes[2], yz), _pack(z, xz, yz, sizes[3])]
    most, q = sizes[0], columns[0]
    for size, column in zip(sizes[1:], columns[1:], strict=True):
        q = xp.where((size > most)[..., None], column, q)
        most = xp.where(size > most, size, most)
    return upright(q / _length(q))


def _from_euler(v: Array) -> Array:
    xp = library(v)
    (a, b, c), (i, j, k) = _unpack(xp.cos(v / 2)), _unpack(xp.sin(v / 2))
    return _pack(a * b * c + i * j * k, i * b * c - a * j * k, a * j * c + i * b * k, a * b * k - i * j * c)


def _to_euler(q: Array) -> Array:
    """Exact at gimbal lock too (Bernardes and Viollet 2022): there only the sum or the difference of roll and yaw is known, and only it counts."""
    xp, (w, x, y, z) = library(q), _unpack(q)
    plus, minus = xp.arctan2(x + z, w - y), xp.arctan2(z - x, w + y)
    pitch = 2 * xp.arctan2(xp.sqrt((w + y) ** 2 + (z - x) ** 2), xp.sqrt((w - y) ** 2 + (x + z) ** 2)) - np.pi / 2
    return _pack(_wrapped(plus - minus), pitch, _wrapped(plus + minus))


def _wrapped(angle: Array) -> Array:
    """To [-pi, pi]; the angle is within two turns of it."""
    xp = library(angle)
    angle = xp.where(angle > np.pi, angle - 2 * np.pi, angle)
    return xp.where(angle < -np.pi, angle + 2 * np.pi, angle)

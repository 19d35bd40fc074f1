"""Where an arm's hand is and which joint angles put it somewhere: batched forward kinematics and damped least squares, numpy or torch.

Everything is a function of joint arrays with any leading axes, so that one line serves an observation of (n, t) states, an expert of n
environments and a test of one. Quaternions are MuJoCo's, (w, x, y, z).
"""

from __future__ import annotations

from collections.abc import Sequence

import mujoco
import numpy as np

from envs.arrays import Array, clip, like, namespace

JOINTS = (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)


class Chain:
    """The k hinge and slide joints between the world and a point fixed to a body or a site.

    body or site names where the point is, `offset` (3,) moves it in that frame. qpos, dof (k,) index a state's qpos and qvel,
    low, high (k,) are the joints' limits (infinite where there are none), home (k,) is qpos0; rad or m.
    A free or ball joint on the way is a ValueError.
    """

    def __init__(self, model: mujoco.MjModel, *, body: str | None = None, site: str | None = None, offset: Sequence[float] = (0, 0, 0)) -> None:
        if (body is None) == (site is None):
            raise ValueError("name one place: body='hand' or site='grip'")
        tip = np.eye(4)
        if site is not None:
            i = _find(model, mujoco.mjtObj.mjOBJ_SITE, site)
            tip, here = _transform(model.site_pos[i], model.site_quat[i]), int(model.site_bodyid[i])
        else:
            here = _find(model, mujoco.mjtObj.mjOBJ_BODY, str(body))
        tip = tip @ _transform(offset, [1, 0, 0, 0])
        joints: list[int] = []
        fixed: list[np.ndarray] = []  # the constant frame in front of each joint, whose origin is the joint's anchor
        while here:
            first, count = model.body_jntadr[here], model.body_jntnum[here]
            for joint in range(first + count - 1, first - 1, -1):
                if model.jnt_type[joint] not in JOINTS:
                    raise ValueError(f"the way to {site or body!r} has joint {model.joint(joint).name!r}, neither hinge nor slide: choose a place on an arm")
                anchor = _transform(model.jnt_pos[joint], [1, 0, 0, 0])
                joints.insert(0, joint)
                fixed.insert(0, np.linalg.inv(anchor) @ tip)
                tip = anchor
            tip = _transform(model.body_pos[here], model.body_quat[here]) @ tip
            here = int(model.body_parentid[here])
        if not joints:
            raise ValueError(f"{site or body!r} hangs on no joint: its pose is constant")
        self.qpos, self.dof, limited = model.jnt_qposadr[joints], model.jnt_dofadr[joints], model.jnt_limited[joints] == 1
        self.low, self.high = (np.where(limited, model.jnt_range[joints, side], sign * np.inf) for side, sign in ((0, -1), (1, 1)))
        self.home = model.qpos0[self.qpos]
        self._hinge = (model.jnt_type[joints] == mujoco.mjtJoint.mjJNT_HINGE).astype(float)
        self._axis = model.jnt_axis[joints]  # (k, 3), in the joint's own frame
        self._frames = self._expand([tip, *fixed])

    def _expand(self, frames: list[np.ndarray]) -> np.ndarray:
        """F, G, H (3, k+1, 4, 4): the frame after joint j is F + s G + (1 - cos) H, s = sin for a hinge and q for a slide (Rodrigues)."""
        moves = np.zeros((2, len(frames), 4, 4))
        for j, axis in enumerate(self._axis):
            if self._hinge[j]:
                cross = np.cross(axis, np.eye(3)).T  # cross @ v = axis x v
                moves[:, j, :3, :3] = cross, cross @ cross
            else:
                moves[0, j, :3, 3] = axis
        return np.stack([np.stack(frames), *(np.stack(frames) @ moves)])

    def _joint_frames(self, q: Array) -> list[Array]:
        """World frames (..., 4, 4) after each joint, at its anchor, and last the tip's."""
        xp = namespace(q)
        home, hinge, frames = like(self.home, q), like(self._hinge, q), like(self._frames, q)
        q = q - home
        s, c = hinge * xp.sin(q) + (1 - hinge) * q, hinge * (1 - xp.cos(q))
        local = frames[0, :-1] + s[..., None, None] * frames[1, :-1] + c[..., None, None] * frames[2, :-1]
        world = [local[..., 0, :, :]]
        for j in range(1, len(self.home)):
            world.append(world[-1] @ local[..., j, :, :])
        return [*world, world[-1] @ frames[0, -1]]

    def pose(self, q: Array) -> tuple[Array, Array]:
        """Joint positions (..., k) -> position (..., 3) m and rotation matrix (..., 3, 3) of the point in the world."""
        tip = self._joint_frames(q)[-1]
        return tip[..., :3, 3], tip[..., :3, :3]

    def jacobian(self, q: Array) -> Array:
        """(..., k) -> (..., 6, k): the point's velocity, then its angular velocity, in world axes, per joint velocity."""
        return self._pose_and_jacobian(q)[2]

    def _pose_and_jacobian(self, q: Array) -> tuple[Array, Array, Array]:
        xp = namespace(q)
        *joints, tip = self._joint_frames(q)
        frames, hinge = xp.stack(joints, axis=-3), like(self._hinge, q)[:, None]
        axis = (frames[..., :3, :3] @ like(self._axis, q)[..., None])[..., 0]  # (..., k, 3)
        turning = xp.linalg.cross(axis, tip[..., None, :3, 3] - frames[..., :3, 3])
        columns = xp.concat([hinge * turning + (1 - hinge) * axis, hinge * axis], axis=-1)
        return tip[..., :3, 3], tip[..., :3, :3], xp.matrix_transpose(columns)

    def solve(
        self, q: Array, position: Array, rotation: Array = None, *, steps: int = 20, damping: float = 0.1, max_step: float = 0.5,
        rest: Array = None, pull: float = 0.1,
    ) -> Array:  # fmt: skip
        """Joint positions (..., k) within the limits that bring the point to position (..., 3) and, if given, rotation (..., 3, 3).

        From q, `steps` times: dq = J' (J J' + lambda^2)^-1 e, lambda = damping * |e| (m and rad alike), so that a far or unreachable target moves
        the joints cautiously and a near one is met quadratically. Joints that a step would push out of their limits stay and the others make up
        for it. max_step: the most any joint moves per step, rad or m. rest (k,): what the joints without a task of their own are drawn to, by the
        share `pull` per step. Where no solution is found, the last step's joints: compare pose(q) with what was asked.
        Source: Wampler 1986 (damped least squares); Sugihara 2011 (damping by the error).
        """
        xp = namespace(q)
        low, high = like(self.low, q), like(self.high, q)
        rows = 3 if rotation is None else 6
        for _ in range(steps):
            at, turned, jacobian = self._pose_and_jacobian(q)
            error = position - at
            if rotation is not None:
                error = xp.concat([error, rotation_vector(rotation @ xp.matrix_transpose(turned))], axis=-1)
            jacobian = jacobian[..., :rows, :]
            drift = 0 * q if rest is None else pull * (like(rest, q) - q)
            free = xp.ones_like(q)
            for _ in range(2):
                step = _least_squares(jacobian * free[..., None, :], error, drift * free, damping)
                free = free * xp.astype((q + step > low) & (q + step < high), q.dtype)
            largest = xp.max(xp.abs(step), axis=-1, keepdims=True)
            step = step * clip(max_step / clip(largest, 1e-12), high=1.0)
            q = clip(q + step, low, high)
        return q


def _least_squares(jacobian: Array, error: Array, drift: Array, damping: float) -> Array:
    """drift (..., k) and on top of it the smallest damped step that leaves J step = error (..., r)."""
    xp = namespace(error)
    back = xp.matrix_transpose(jacobian)
    slack = damping**2 * xp.sum(error * error, axis=-1)[..., None, None] + 1e-9
    left = error[..., None] - jacobian @ drift[..., None]
    return drift + (back @ xp.linalg.solve(jacobian @ back + slack * like(np.eye(error.shape[-1]), error), left))[..., 0]


def matrix(quaternion: Array) -> Array:
    """Unit quaternions (..., 4) as rotation matrices (..., 3, 3)."""
    xp = namespace(quaternion)
    w, x, y, z = (quaternion[..., i] for i in range(4))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def quaternion(matrix: Array) -> Array:
    """Rotation matrices (..., 3, 3) as unit quaternions (..., 4) with w >= 0."""
    xp = namespace(matrix)
    m = [[matrix[..., i, j] for j in range(3)] for i in range(3)]
    x, y, z = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]
    # Each row is 4 q times one of q's own components; the longest row is far from zero.
    outer = [
        [1 + m[0][0] + m[1][1] + m[2][2], x, y, z],
        [x, 1 + m[0][0] - m[1][1] - m[2][2], m[0][1] + m[1][0], m[0][2] + m[2][0]],
        [y, m[0][1] + m[1][0], 1 - m[0][0] + m[1][1] - m[2][2], m[1][2] + m[2][1]],
        [z, m[0][2] + m[2][0], m[1][2] + m[2][1], 1 - m[0][0] - m[1][1] + m[2][2]],
    ]
    best = xp.stack(outer[0], axis=-1)
    for row in outer[1:]:
        other = xp.stack(row, axis=-1)
        longer = xp.linalg.vector_norm(other, axis=-1, keepdims=True) > xp.linalg.vector_norm(best, axis=-1, keepdims=True)
        best = xp.where(longer, other, best)
    best = xp.where(best[..., :1] < 0, -best, best)
    return best / xp.linalg.vector_norm(best, axis=-1, keepdims=True)


def multiply(a: Array, b: Array) -> Array:
    """The quaternion (..., 4) of first b, then a."""
    xp = namespace(a)
    w, v, u, r = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    return xp.concat([w * u - xp.sum(v * r, axis=-1, keepdims=True), w * r + u * v + xp.linalg.cross(v, r)], axis=-1)


def rotation_vector(matrix: Array) -> Array:
    """Rotation matrices (..., 3, 3) as axis times angle (..., 3), angle in [0, pi] rad."""
    xp = namespace(matrix)
    q = quaternion(matrix)
    length = xp.linalg.vector_norm(q[..., 1:], axis=-1, keepdims=True)
    return 2 * q[..., 1:] * xp.where(length > 1e-9, xp.atan2(length, q[..., :1]) / clip(length, 1e-9), 1.0 + 0 * length)


def from_rotation_vector(vector: Array) -> Array:
    """Axis times angle (..., 3) rad as unit quaternions (..., 4)."""
    xp = namespace(vector)
    angle = xp.linalg.vector_norm(vector, axis=-1, keepdims=True)
    sine = xp.where(angle > 1e-9, xp.sin(angle / 2) / clip(angle, 1e-9), 0.5 + 0 * angle)
    return xp.concat([xp.cos(angle / 2), sine * vector], axis=-1)


def slerp(start: Array, end: Array, share: Array) -> Array:
    """The unit quaternion (..., 4) that share (..., 1) in [0, 1] of the shorter way from start to end reaches at constant speed."""
    xp = namespace(start)
    cosine = xp.sum(start * end, axis=-1, keepdims=True)
    end, cosine = xp.where(cosine < 0, -end, end), xp.abs(cosine)
    angle = xp.acos(clip(cosine, high=1.0))
    sine = clip(xp.sin(angle), 1e-6)
    a = xp.where(angle > 1e-5, xp.sin((1 - share) * angle) / sine, 1 - share)
    b = xp.where(angle > 1e-5, xp.sin(share * angle) / sine, share)
    mixed = a * start + b * end
    return mixed / xp.linalg.vector_norm(mixed, axis=-1, keepdims=True)


def _find(model: mujoco.MjModel, kind: mujoco.mjtObj, name: str) -> int:
    i = mujoco.mj_name2id(model, kind, name)
    if i < 0:
        count = model.nsite if kind == mujoco.mjtObj.mjOBJ_SITE else model.nbody
        known = [mujoco.mj_id2name(model, kind, j) for j in range(count)]
        raise ValueError(f"the model has no {kind.name[6:].lower()} {name!r} (it has: {', '.join(filter(None, known))})")
    return int(i)


def _transform(position: Array, quat: Array) -> np.ndarray:
    frame = np.eye(4)
    frame[:3, :3], frame[:3, 3] = matrix(np.asarray(quat, float)), position
    return frame

"""The exact area two convex polygons share, batched, on numpy or torch."""

from envs.arrays import Array, clip, namespace


def overlap(a: Array, b: Array) -> Array:
    """Area (...) of the intersection of convex polygons a (..., p, 2) and b (..., q, 2), both counter-clockwise, float64.

    Green's theorem: the intersection's outline is made of the parts of a's edges inside b and of b's edges inside a.
    Where two edges lie on each other a's counts, if both run the same way (else the polygons only touch).
    """
    return 0.5 * (_outline(a, b, boundary=True) + _outline(b, a, boundary=False))


def _outline(a: Array, b: Array, *, boundary: bool) -> Array:
    """The integral of x dy - y dx along the parts of a's edges inside b; boundary: edges lying on b's outline count as inside."""
    xp = namespace(a, b)
    start, along = a, xp.roll(a, -1, axis=-2) - a  # (..., p, 2)
    edge = (xp.roll(b, -1, axis=-2) - b)[..., None, :, :]  # (..., 1, q, 2)
    away = start[..., None, :] - b[..., None, :, :]  # (..., p, q, 2)
    height = _cross(edge, away)  # of each start above each of b's edges, times that edge's length
    slope = _cross(edge, along[..., None, :])  # and how it changes along a's edge
    size = xp.sum(xp.abs(edge), axis=-1) * xp.sum(xp.abs(along[..., None, :]), axis=-1)
    parallel = xp.abs(slope) <= 1e-12 * size
    same_way = xp.sum(edge * along[..., None, :], axis=-1) > 0
    inside = xp.where(xp.abs(height) <= 1e-9 * size, boundary & same_way, height > 0)  # only asked of parallel edges
    cut = -height / xp.where(parallel, 1.0, slope)
    # a's edge is start + s * along; b keeps enter <= s <= leave of it.
    enter = xp.max(xp.where(parallel, xp.where(inside, 0.0, 2.0), xp.where(slope > 0, cut, 0.0)), axis=-1)
    leave = xp.min(xp.where(parallel | (slope > 0), 1.0, cut), axis=-1)
    kept = clip(clip(leave, high=1.0) - clip(enter, low=0.0), low=0.0)
    return xp.sum(kept * _cross(start, along), axis=-1)


def _cross(a: Array, b: Array) -> Array:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

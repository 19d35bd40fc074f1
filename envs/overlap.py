"""The exact area two convex polygons share, batched, in numpy alone."""

import numpy as np


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Area (...) of the intersection of convex polygons a (..., p, 2) and b (..., q, 2), both counter-clockwise.

    Green's theorem: the intersection's outline is made of the parts of a's edges inside b and of b's edges inside a.
    Where two edges lie on each other a's counts, if both run the same way (else the polygons only touch).
    """
    return 0.5 * (_outline(a, b, boundary=True) + _outline(b, a, boundary=False))


def _outline(a: np.ndarray, b: np.ndarray, *, boundary: bool) -> np.ndarray:
    """The integral of x dy - y dx along the parts of a's edges inside b; boundary: edges lying on b's outline count as inside."""
    start, along = a, np.roll(a, -1, axis=-2) - a  # (..., p, 2)
    edge = (np.roll(b, -1, axis=-2) - b)[..., None, :, :]  # (..., 1, q, 2)
    away = start[..., None, :] - b[..., None, :, :]  # (..., p, q, 2)
    height = _cross(edge, away)  # of each start above each of b's edges, times that edge's length
    slope = _cross(edge, along[..., None, :])  # and how it changes along a's edge
    size = np.abs(edge).sum(-1) * np.abs(along[..., None, :]).sum(-1)
    parallel = np.abs(slope) <= 1e-12 * size
    same_way = (edge * along[..., None, :]).sum(-1) > 0
    inside = np.where(np.abs(height) <= 1e-9 * size, boundary & same_way, height > 0)  # only asked of parallel edges
    cut = -height / np.where(parallel, 1.0, slope)
    # a's edge is start + s * along; b keeps enter <= s <= leave of it.
    enter = np.where(parallel, np.where(inside, 0.0, 2.0), np.where(slope > 0, cut, 0.0)).max(-1).clip(0.0)
    leave = np.where(parallel | (slope > 0), 1.0, cut).min(-1).clip(max=1.0)
    return (np.maximum(leave - enter, 0.0) * _cross(start, along)).sum(-1)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

"""Between the actions of a plan: cubic or held. Positions and velocities at any time, in steps of the plan; numpy only."""
import numpy as np


def cubic(knots: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cubic Hermite through knots (t, d), whose velocities are central differences (one-sided at the ends): C1, exact on parabolas inside.

    at: (n,) in steps, knot i is due at i.   Positions (n, d) and velocities (n, d) per step. Before the first and behind the last knot it stands still.
    """
    knots = np.asarray(knots, float)
    if len(knots) == 1:
        return np.repeat(knots, len(at), 0), np.zeros((len(at), knots.shape[1]))
    slopes = np.gradient(knots, axis=0)
    at = np.asarray(at, float)
    inside = at.clip(0, len(knots) - 1)
    i = np.minimum(inside.astype(int), len(knots) - 2)
    u = (inside - i)[:, None]
    p, q, m, n = knots[i], knots[i + 1], slopes[i], slopes[i + 1]
    c, d = 3 * (q - p) - 2 * m - n, 2 * (p - q) + m + n
    moving = ((at >= 0) & (at <= len(knots) - 1))[:, None]
    return p + u * (m + u * (c + u * d)), (m + u * (2 * c + 3 * u * d)) * moving


def hold(knots: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knot i from time i until i + 1, as in a simulator that waits: positions (n, d) and velocities (n, d), which are 0."""
    knots = np.asarray(knots, float)
    q = knots[np.floor(np.asarray(at, float) + 1e-9).astype(int).clip(0, len(knots) - 1)]
    return q, np.zeros_like(q)

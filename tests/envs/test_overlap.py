import numpy as np
import pytest

from envs.overlap import overlap
from envs.pusht import GOAL, coverage

SQUARE = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])


def clip_by_edges(a: np.ndarray, b: np.ndarray) -> float:
    """Sutherland-Hodgman, one vertex at a time: another algorithm than the one tested."""

    def above(point, corner, edge):
        return edge[0] * (point[1] - corner[1]) - edge[1] * (point[0] - corner[0])

    kept = [tuple(p) for p in a]
    for corner, nxt in zip(b, np.roll(b, -1, axis=0), strict=True):
        edge, points, kept = nxt - corner, kept, []
        for p, q in zip(points, points[1:] + points[:1], strict=True):
            hp, hq = above(p, corner, edge), above(q, corner, edge)
            if hp >= 0:
                kept.append(p)
            if hp * hq < 0:
                s = hp / (hp - hq)
                kept.append((p[0] + s * (q[0] - p[0]), p[1] + s * (q[1] - p[1])))
    return 0.5 * abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(kept, kept[1:] + kept[:1], strict=True)))


def random_polygons(rng: np.random.Generator, n: int, corners: int) -> np.ndarray:
    """Inscribed in circles that mostly overlap: convex and counter-clockwise."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, (n, corners)), axis=1)
    radius, centre = rng.uniform(0.5, 1.5, (n, 1, 1)), rng.uniform(-1, 1, (n, 1, 2))
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def test_overlap_equals_an_independent_clipping():
    rng = np.random.default_rng(0)
    a, b = random_polygons(rng, 500, 4), random_polygons(rng, 500, 5)
    expected = np.array([clip_by_edges(p, q) for p, q in zip(a, b, strict=True)])
    assert (expected > 0.01).mean() > 0.5
    np.testing.assert_allclose(overlap(a, b), expected, atol=1e-12)
    np.testing.assert_allclose(overlap(b, a), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("other", "area"),
    [
        (SQUARE, 1.0),
        (SQUARE + [0.25, 0.0], 0.75),  # two edges in common
        (SQUARE + [0.25, 0.5], 0.375),
        (SQUARE + [1.0, 0.0], 0.0),  # touching along an edge
        (SQUARE + [1.0, 1.0], 0.0),  # touching at a corner
        (SQUARE + [3.0, 0.0], 0.0),
        (SQUARE * 0.5, 0.25),  # inside, sharing two edges
        (SQUARE * 0.5 + 0.25, 0.25),  # inside
        (SQUARE * 3 - 1, 1.0),  # around
    ],
)
def test_overlap_of_squares(other, area):
    assert overlap(SQUARE, other) == pytest.approx(area, abs=1e-15)
    assert overlap(other, SQUARE) == pytest.approx(area, abs=1e-15)


def test_coverage_at_the_goal_is_one_whatever_the_turn():
    turns = GOAL + [[0, 0, 2 * np.pi * k] for k in range(-2, 3)]
    np.testing.assert_allclose(coverage(turns), 1.0, atol=1e-9)


def test_coverage_of_a_block_slid_along_its_bar():
    slide = np.array([0.0, 1.0, 10.0, 29.0, 30.0, 60.0, 119.0])  # px
    poses = GOAL + slide[:, None] * [np.cos(GOAL[2]), np.sin(GOAL[2]), 0.0]
    expected = (30 * (120 - slide) + 90 * np.maximum(30 - slide, 0)) / 6300
    np.testing.assert_allclose(coverage(poses), expected, atol=1e-9)


def test_coverage_far_away_is_exactly_zero():
    poses = np.array([[60.0, 60.0, 0.3], [450.0, 450.0, -2.0], [256.0, 500.0, 0.0]])
    assert (coverage(poses) == 0).all()


def test_coverage_keeps_leading_axes_and_skipping_changes_nothing():
    rng = np.random.default_rng(1)
    poses = np.column_stack([rng.uniform(100, 400, (300, 2)), rng.uniform(-np.pi, np.pi, 300)])
    poses[:150, :2] = GOAL[:2] + rng.uniform(-30, 30, (150, 2))
    together = coverage(poses.reshape(10, 30, 3))
    assert together.shape == (10, 30)
    assert (together.ravel() == [coverage(pose) for pose in poses]).all()


def test_coverage_equals_shapely():
    geometry = pytest.importorskip("shapely.geometry")
    affinity = pytest.importorskip("shapely.affinity")
    tee = geometry.Polygon([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)])

    def placed(pose):
        return affinity.translate(affinity.rotate(tee, pose[2], origin=(0, 0), use_radians=True), pose[0], pose[1])

    rng = np.random.default_rng(2)
    poses = np.column_stack([GOAL[:2] + rng.uniform(-120, 120, (500, 2)), rng.uniform(-np.pi, np.pi, 500)])
    expected = [placed(pose).intersection(placed(GOAL)).area / tee.area for pose in poses]
    np.testing.assert_allclose(coverage(poses), expected, atol=1e-12)

"""Rotations beside scipy: 1e-12 in float64, 2e-6 in float32, of a matrix' entries; near no turn, half a turn and gimbal lock; numpy and torch alike."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from policy.data.rotation import convert, inverse, multiply, to_quaternion, turn
from policy.data.semantics import ROTATIONS

TOLERANCE = {np.float64: 1e-12, np.float32: 2e-6}
SMALL = st.floats(-14, 0).map(lambda e: 10.0**e)
ANGLE = st.one_of(st.floats(0, np.pi), SMALL, SMALL.map(lambda e: np.pi - e), st.sampled_from([0.0, np.pi]))
AXIS = st.tuples(*3 * [st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-1, 1)]).map(np.array).filter(lambda a: np.linalg.norm(a) > 0.1)


def oracle(r: Rotation, name: str) -> np.ndarray:
    if name == "axis_angle":
        return r.as_rotvec()
    if name == "euler_xyz":
        return r.as_euler("xyz")
    if name.startswith("quaternion"):
        q = r.as_quat(canonical=True)
        return q if name == "quaternion_xyzw" else q[..., [3, 0, 1, 2]]
    return r.as_matrix().reshape(-1, 9)[:, : 9 if name == "matrix" else 6]


def read(x: np.ndarray, name: str) -> np.ndarray:
    """The matrix (n,9) that scipy makes of numbers."""
    x = np.asarray(x, np.float64)
    if name == "axis_angle":
        r = Rotation.from_rotvec(x)
    elif name == "euler_xyz":
        r = Rotation.from_euler("xyz", x)
    elif name.startswith("quaternion"):
        r = Rotation.from_quat(x if name == "quaternion_xyzw" else x[..., [1, 2, 3, 0]])
    else:
        return x if name == "matrix" else np.concatenate([x, np.cross(x[:, :3], x[:, 3:])], 1)
    return r.as_matrix().reshape(-1, 9)


def some(n: int = 300) -> Rotation:
    """Random ones, and near 0, pi and gimbal lock, as near as doubles go."""
    rng = np.random.default_rng(0)
    axes, near = rng.standard_normal((n, 3)), 10.0 ** rng.uniform(-15, -1, n)
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    lock = np.stack([rng.uniform(-3, 3, n), np.sign(axes[:, 0]) * (np.pi / 2 - near), rng.uniform(-3, 3, n)], 1)
    exact = Rotation.concatenate([Rotation.from_rotvec(a * np.eye(3)[i] * s) for a in (0.0, np.pi / 2, np.pi) for i in range(3) for s in (1, -1)])
    return Rotation.concatenate([Rotation.random(n, random_state=1), Rotation.from_rotvec(axes * near[:, None]),
                                 Rotation.from_rotvec(axes * (np.pi - near)[:, None]), Rotation.from_euler("xyz", lock), exact])


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("source", ROTATIONS)
def test_every_pair_is_the_same_rotation(source, make, dtype):
    r = some()
    if source == "euler_xyz":  # scipy's own Euler angles are wrong by 1e-7 near gimbal lock
        m = r.as_matrix()
        r = r[1 - np.abs(m[:, 2, 0]) > 1e-11]
    x = make(oracle(r, source).astype(dtype))
    for to in ROTATIONS:
        y = convert(x, source, to)
        assert type(y) is type(x) and y.dtype == x.dtype
        np.testing.assert_allclose(read(np.asarray(y), to), r.as_matrix().reshape(-1, 9), atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("to", ROTATIONS)
def test_the_numbers_are_scipys(to):
    r = Rotation.random(500, random_state=2)
    np.testing.assert_allclose(convert(r.as_matrix().reshape(-1, 9), "matrix", to), oracle(r, to), atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(AXIS, ANGLE, st.sampled_from(ROTATIONS), st.sampled_from([np.float64, np.float32]))
def test_there_and_back_whatever_the_angle(axis, angle, name, dtype):
    v = (axis / np.linalg.norm(axis) * angle).astype(dtype)[None]
    back = convert(convert(v, "axis_angle", name), name, "axis_angle")
    np.testing.assert_allclose(read(back, "axis_angle"), read(v, "axis_angle"), atol=2 * TOLERANCE[dtype], rtol=0)
    if angle < 3 and name in ("quaternion_xyzw", "quaternion_wxyz"):
        np.testing.assert_allclose(back, v, rtol=1e-5 if dtype is np.float32 else 1e-13, atol=1e-30)  # a small angle keeps its digits


def test_rotation_6d_is_pytorch3ds_first_two_rows_and_not_zhous_columns():
    turned = Rotation.from_rotvec([0.3, -0.2, 0.9])
    m = turned.as_matrix()
    np.testing.assert_allclose(convert(m.reshape(1, 9), "matrix", "rotation_6d")[0], m[:2].reshape(6))
    zhou = m[:, :2].T.reshape(1, 6)  # the first two columns, one after the other
    np.testing.assert_allclose(convert(zhou, "rotation_6d", "axis_angle")[0], turned.inv().as_rotvec())


def test_what_a_network_predicts_is_made_a_rotation():
    """Gram-Schmidt: scale and shear do not matter, the answer is orthogonal; zeros give something finite."""
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 50, 3))
    got = convert(np.concatenate([3 * a, b - 2 * a], 1), "rotation_6d", "matrix").reshape(-1, 3, 3)
    np.testing.assert_allclose(got @ got.transpose(0, 2, 1), np.broadcast_to(np.eye(3), got.shape), atol=1e-12)
    first = a / np.linalg.norm(a, axis=1, keepdims=True)
    np.testing.assert_allclose(got[:, 0], first, atol=1e-12)
    assert ((got[:, 1] * (b - (b * first).sum(1, keepdims=True) * first)).sum(1) > 0).all() and np.allclose(np.linalg.det(got), 1)
    for name, width in (("rotation_6d", 6), ("quaternion_xyzw", 4), ("matrix", 9)):
        assert np.isfinite(convert(np.zeros((1, width)), name, "axis_angle")).all()


def test_quaternions_have_one_sign_and_unit_length():
    q = np.random.default_rng(4).standard_normal((100, 4))
    for name, w in (("quaternion_wxyz", 0), ("quaternion_xyzw", 3)):
        out = convert(q, name, name)
        np.testing.assert_allclose(convert(-5 * q, name, name), out, atol=1e-15)
        np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-15)
        assert (out[:, w] >= 0).all()


def test_products_inverses_and_turned_vectors():
    a, b = Rotation.random(50, random_state=5), Rotation.random(50, random_state=6)
    p, q = (to_quaternion(r.as_quat(), "quaternion_xyzw") for r in (a, b))
    v = np.random.default_rng(7).standard_normal((50, 3))
    np.testing.assert_allclose(convert(multiply(p, q), "quaternion_wxyz", "matrix"), (a * b).as_matrix().reshape(-1, 9), atol=1e-14)
    np.testing.assert_allclose(convert(inverse(p), "quaternion_wxyz", "matrix"), a.inv().as_matrix().reshape(-1, 9), atol=1e-14)
    np.testing.assert_allclose(turn(p, v), a.apply(v), atol=1e-14)


@pytest.mark.parametrize("source, to", [*((name, "quaternion_wxyz") for name in ROTATIONS), *(("quaternion_xyzw", name) for name in ROTATIONS)])
def test_gradients_are_those_of_finite_differences(source, to):
    """Also at no turn at all and next to half a turn, where formulas divide by zero."""
    v = np.array([[0.4, -0.7, 0.2], [0, 0, 0], [1e-9, 0, 0], [0.1, 3.1, 0.1]])
    x = torch.from_numpy(convert(v, "axis_angle", source)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: convert(x, source, to), (x,), eps=1e-7, atol=1e-5)


def test_half_a_turn_has_finite_gradients():
    v = torch.tensor([[np.pi, 0, 0], [0, 0, 0]], requires_grad=True)
    for to in ROTATIONS:
        g, = torch.autograd.grad(convert(v, "axis_angle", to).sum(), v)
        assert g.isfinite().all()


def test_any_leading_shape_and_misuse():
    x = np.random.default_rng(8).standard_normal((2, 3, 5, 3))
    assert convert(x, "axis_angle", "rotation_6d").shape == (2, 3, 5, 6)
    with pytest.raises(ValueError, match=r"'euler' is no representation of a rotation; use one of axis_angle"):
        convert(x, "axis_angle", "euler")
    with pytest.raises(ValueError, match="quaternion_xyzw has 4 numbers, got 3"):
        convert(x, "quaternion_xyzw", "matrix")

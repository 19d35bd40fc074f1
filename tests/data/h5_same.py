"""The oracle of HDF5 round trips: two files hold the same groups, arrays and attributes, bit for bit. Layout on disk may differ."""
import h5py
import numpy as np


def assert_same_hdf5(a, b) -> None:
    with h5py.File(a) as x, h5py.File(b) as y:
        names: tuple[set[str], set[str]] = set(), set()
        x.visit(names[0].add)
        y.visit(names[1].add)
        assert names[0] == names[1], names[0] ^ names[1]
        for name in ("/", *names[0]):
            one, two = x[name], y[name]
            assert type(one) is type(two) and set(one.attrs) == set(two.attrs), (name, dict(one.attrs), dict(two.attrs))
            for key in one.attrs:
                same_type(one.attrs.get_id(key), two.attrs.get_id(key), f"{name} {key}")
                same_value(one.attrs[key], two.attrs[key], f"{name} {key}")
            if isinstance(one, h5py.Dataset):
                same_type(one, two, name)
                same_value(one[()], two[()], name)


def same_type(one, two, where: str) -> None:
    assert one.shape == two.shape and one.dtype == two.dtype, (where, one.dtype, two.dtype, one.shape, two.shape)
    assert h5py.check_string_dtype(one.dtype) == h5py.check_string_dtype(two.dtype), where


def same_value(one, two, where: str) -> None:
    if isinstance(one, h5py.Empty):
        assert isinstance(two, h5py.Empty) and one.dtype == two.dtype, where
    elif np.asarray(one).dtype.hasobject:
        assert np.asarray(one).tolist() == np.asarray(two).tolist(), where
    else:
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), where

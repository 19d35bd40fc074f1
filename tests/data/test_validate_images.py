"""Pictures of one episode that come at another time than the others', or are another episode's: of a dot that goes where two joints are, and of people."""
import numpy as np
import pytest
from recordings import Arrays, clean, lengths

from policy.data import Store
from policy.data.validate import check


@pytest.fixture(scope="module")
def watched() -> Arrays:
    """Episodes whose camera sees a blurred dot, and noise."""
    data, rng = clean(10).copy("joints", "action"), np.random.default_rng(0)
    spot = 12 + 8 * np.clip((data.arrays["joints"][:, :2] - [0, -0.5]) / 0.6, -1.3, 1.3)
    far = (np.arange(24)[:, None] - spot[:, None, None, 1]) ** 2 + (np.arange(24)[None, :] - spot[:, None, None, 0]) ** 2
    data.arrays["image"] = (40 + 180 * np.exp(-far / 6) + rng.integers(0, 4, far.shape))[..., None].repeat(3, axis=-1).astype(np.uint8)
    return data


@pytest.fixture(scope="module")
def people(pusht) -> Arrays:
    store = Store.open(pusht)
    ends = store.episode_ends[:12]
    return Arrays({**{k: store.read(k, 0, int(ends[-1])) for k in ("state", "action")}, "image": store.read("img", 0, int(ends[-1])).astype(np.uint8)},
                  ends, {"fps": 10.0})


@pytest.fixture(params=["watched", pytest.param("people", marks=pytest.mark.data)])
def pictures(request) -> Arrays:
    return request.getfixturevalue(request.param)


def seen(data: Arrays, **how) -> list[tuple[str, list[int]]]:
    return [(f.code, [p.episode for p in f.places]) for f in check(data, skip=["odd", "copies"], **how).findings if f.code.startswith("image")]


@pytest.mark.parametrize("steps", [3, 8, -8])
def test_pictures_that_come_late_are_named(pictures, steps):
    data = pictures.copy()
    assert seen(data) == []
    x = data.arrays["image"][data.span(5)]
    x[:] = np.roll(x, steps, axis=0)
    assert seen(data) == [("image_lag", [5])]
    assert seen(data, image_bytes=10_000) == [], "too few are looked at"


def test_pictures_of_another_episode_are_named(pictures):
    data = pictures.copy()
    data.arrays["image"][data.span(5)] = np.resize(data.arrays["image"][data.span(8)], (lengths(data)[5], *data.arrays["image"].shape[1:]))
    assert seen(data) == [("image_copy", [5, 8])]


def test_an_episode_that_is_there_twice_is_no_other_ones_picture(watched):
    data = watched.copy()
    at = np.concatenate([np.arange(data.episode_ends[-1]), np.arange(data.start(1), data.episode_ends[1])])
    data.arrays, data.episode_ends = {k: x[at] for k, x in data.arrays.items()}, np.append(data.episode_ends, len(at))
    assert seen(data) == []


def test_of_pictures_that_the_robot_does_not_explain_nothing_is_said(watched):
    data = watched.copy()
    data.arrays["image"] = np.random.default_rng(1).integers(0, 255, data.arrays["image"].shape).astype(np.uint8)
    data.arrays["image"][data.span(5)] = np.roll(data.arrays["image"][data.span(5)], 8, axis=0)
    assert seen(data) == []

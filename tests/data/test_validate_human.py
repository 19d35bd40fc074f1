"""What is truly in the human Push-T demonstrations, and that faults planted into them are found beside it."""
import numpy as np
import pytest
from recordings import Arrays, lengths

from policy.data import Store
from policy.data.validate import check, validate


@pytest.mark.data
def test_human_pusht_has_what_is_truly_there(pusht):
    """The block's angle is kept in 0 … 2π and passes through it in 91 places, images are floats, and no rate is stored. People never pause for a second:
    the longest rest is 5 frames. Nothing else is wrong with it, as everybody who trained on it found."""
    report = validate(pusht, image_bytes=5e7)
    assert [(f.severity, f.code, f.where, f.count) for f in report.findings] == [
        ("warning", "angle_wrap", "state[4]", 91), ("note", "image_range", "img", 0), ("note", "no_rate", "", 0)]
    angle = Store.open(pusht).read("state")[:, 4]
    for p in report.findings[0].places:
        at = Store.open(pusht).span(p.episode)[0] + p.lo
        assert abs(abs(angle[at] - angle[at - 1]) - 2 * np.pi) < 0.3
    assert report.facts["action"]["looks"] == "absolute" and report.facts["action"]["lag"] == 2


def human(pusht) -> Arrays:
    store = Store.open(pusht)
    return Arrays({k: store.read(k) for k in ("state", "action", "keypoint")}, store.episode_ends, {"fps": 10.0})


def rest(data: Arrays) -> None:
    at = data.start(50) + 40
    order = np.insert(np.arange(data.episode_ends[-1]), at, np.full(30, at))
    data.arrays = {k: x[order] for k, x in data.arrays.items()}
    data.episode_ends = data.episode_ends + 30 * (np.arange(len(data.episode_ends)) >= 50)


def shift(data: Arrays) -> None:
    for e in range(len(data.episode_ends)):
        x = data.arrays["action"][data.span(e)]
        x[6:] = x[:-6].copy()


def put(key: str, where, value) -> "callable":
    def plant(data: Arrays) -> None:
        data.arrays[key][where] = value(data.arrays[key][where])
    return plant


def join(data: Arrays) -> None:
    data.episode_ends = np.delete(data.episode_ends, 99)


def again(data: Arrays) -> None:
    data.arrays = {k: np.concatenate([x, x[data.span(10)]]) for k, x in data.arrays.items()}
    data.episode_ends = np.append(data.episode_ends, data.episode_ends[-1] + lengths(data)[10])


def of_one(key: str, change) -> "callable":
    """change(its frames (n, c), how far the key goes (c,)) of episode 103."""
    def plant(data: Arrays) -> None:
        x = data.arrays[key]
        x[data.span(103)] = change(x[data.span(103)], np.ptp(x, axis=0))
    return plant


ACROSS, SIGN, FIRST = [1, 0], np.float32([-1, 1]), np.float32([1, 0, 0, 0, 0])


@pytest.mark.data
@pytest.mark.parametrize("code, plant, episode, step", [
    ("not_finite", put("state", (5000, 1), lambda x: np.nan), 39, 22),
    ("glitch", put("state", (5000, 0), lambda x: (x + 200) % 512), 39, 22),
    ("jump", put("state", (slice(5000, 5040), slice(0, 1)), lambda x: x + 150), 39, 22),
    ("missed_border", join, 99, 82),
    ("idle_middle", rest, 50, 40),
    ("action_lag", shift, None, None),
    ("duplicate", again, 206, 0),
    ("outlier", put("state", (5000, 0), lambda x: x + 1e5), 39, 22),
    ("units_mixed", of_one("action", lambda x, far: 10 * x), 103, None),
    ("units_mixed", of_one("action", lambda x, far: x / 10), 103, None),
    ("units_mixed", of_one("state", lambda x, far: 100 * x), 103, None),
    ("action_exchanged", of_one("action", lambda x, far: x[:, ACROSS]), 103, None),
    ("action_flipped", of_one("action", lambda x, far: SIGN * x), 103, None),
    ("noise", of_one("state", lambda x, far: x + 0.03 * far * FIRST * np.random.default_rng(0).normal(size=(len(x), 1))), 103, None),
    ("precision", put("keypoint", slice(None), lambda x: x + 1e8), None, None),
])
def test_faults_planted_into_human_pusht(pusht, code, plant, episode, step):
    data = human(pusht)
    plant(data)
    report = check(data, skip=["images"])
    also = {"angle_wrap", "action_lag"} | ({"glitch"} if code == "outlier" else {"jump"} if code == "units_mixed" else set())
    got = next((f for f in report.findings if f.code == code), None)
    assert got is not None and {f.code for f in report.findings} <= {code, *also}
    if episode is not None:
        assert any(p.episode == episode and (step is None or p.lo <= step < p.hi) for p in got.places)

"""What the report draws where there is little to draw: a point that rests, episodes of one length, an action that never changes."""
import re

import numpy as np
from recordings import clean, lengths

from policy.data.validate import check
from policy.data.validate_page import write_page


def test_goals_that_rest_are_dots(tmp_path):
    data = clean(6).copy("joints", "action")
    goals = np.random.default_rng(0).random((6, 2)).astype(np.float32)
    data.arrays["goal"] = np.repeat(goals, lengths(data), axis=0)
    page = write_page(check(data), tmp_path / "a.html").read_text()
    box = re.search(r"<h3>goal<small>second over first component</small></h3><svg.*?</svg>", page)[0]
    dots = {(float(x), float(y)) for x, y in re.findall(r'<circle class="dot" cx="([\d.]+)" cy="([\d.]+)"', box)}
    far = goals - goals.min(axis=0)
    at = 4 + far * 292 / far.max()
    assert sorted(dots) == [(x, y) for x, y in sorted((round(float(x), 1), round(300 - float(y), 1)) for x, y in at)]


def test_the_length_of_one_episode_is_said_once(tmp_path):
    data = clean(1).copy("joints", "action")
    data.arrays = {key: np.resize(x, (1036, *x.shape[1:])) for key, x in data.arrays.items()}
    for ends, labels in (([1036], ["1036"]), ([516, 1036], ["516", "517", "518", "519", "520"])):
        data.episode_ends = np.array(ends)
        page = write_page(check(data), tmp_path / "a.html").read_text()
        card = re.search(r"<h3>Length of the episodes.*?</svg>", page)[0]
        assert re.findall(r'text-anchor="middle">([^<]*)<', card) == labels


def test_an_action_that_never_changes_cannot_be_left_out():
    data = clean(6)
    data.arrays["action"] = np.ones_like(data.arrays["action"])
    fix = next(f.fix for f in check(data).findings if (f.code, f.key) == ("constant", "action"))
    assert fix.startswith("Name another key, action=…, or record again")
    data = clean(6)
    data.arrays["action"][:, 2] = 1
    fix = next(f.fix for f in check(data).findings if (f.code, f.key) == ("constant", "action"))
    assert fix.endswith("data.action={key:action,take:[0,1,3,4,5,6]}")


def test_targets_whose_changes_nothing_follows_are_drawn_by_their_level(tmp_path):
    """As if the robot took the way in its own time: noise on every step, and the same place in the end."""
    data, rng = clean(8).copy("joints", "action"), np.random.default_rng(0)
    data.arrays["action"] = data.arrays["action"][:, :6] / 2 + rng.normal(size=data.arrays["joints"].shape).astype(np.float32) * 0.04
    report = check(data, skip=["odd"])
    assert report.facts["action"]["looks"] == "absolute" and report.findings == []
    assert "<small>the state goes with the action</small>" in write_page(report, tmp_path / "a.html").read_text()

"""The page of one episode carries its numbers bit for bit, its pictures, its findings, and stays small."""
import base64
import io
import json
import re

import numpy as np
import pytest
from faults import FAULTS
from recordings import Arrays, clean

from policy.data.checks.look import Data
from policy.data.validate import check
from policy.data.validate_page import plane
from policy.data.view import as_picture, data, of_one_scale, view


@pytest.fixture(scope="module")
def recording() -> Arrays:
    recording = clean(8)
    FAULTS["teleport"].plant(recording)
    return recording


def numbers(key) -> np.ndarray:
    return np.frombuffer(base64.b64decode(key["values"]), "<f4").reshape(-1, len(key["labels"]))


def pictures(key) -> np.ndarray:
    from PIL import Image
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(frame)))) for frame in key["frames"]])


def test_a_page_carries_the_episode(recording, tmp_path):
    path = view(recording, 7, tmp_path / "e7.html", check(recording).findings)
    page = path.read_text()
    content = json.loads(re.search(r"const D=(\{.*\});", page)[1])
    assert content["steps"] == recording.span(7).stop - recording.span(7).start and content["fps"] == 20
    assert [key["name"] for key in content["keys"]] == ["joints", "pose", "heading", "timestamp", "action"]
    for key in content["keys"]:
        np.testing.assert_array_equal(numbers(key), recording.arrays[key["name"]][recording.span(7)].reshape(content["steps"], -1).astype(np.float32))
    found, = content["findings"]
    assert (found["code"], found["key"], found["lo"], found["hi"]) == ("jump", "pose", 60, 61)
    assert [(group["dimensions"], [k["name"] for k in group["keys"]]) for group in content["paths"]] == [(3, ["pose"])]
    camera, = content["images"]
    assert camera["at"] == list(range(content["steps"]))
    off = pictures(camera).astype(float) - recording.arrays["image"][recording.span(7)]
    assert np.abs(off).mean() < 12 and np.abs(off.mean(axis=(1, 2))).max() < 2  # these are noise, the worst for JPEG
    assert "http://" not in page and "https://" not in page


def test_channels_are_called_by_their_names(recording):
    named = recording.copy("joints", "action")
    named.attrs["names"] = {"joints": list("abcdef"), "action": ["too", "few"]}
    labels = {key["name"]: key["labels"] for key in data(Data(named), 0, ())["keys"]}
    assert labels["joints"] == list("abcdef") and labels["action"][6] == "6"
    assert Data(named).label("joints", 2) == "joints[c]"


def test_findings_of_other_episodes_stay_there(recording):
    assert data(Data(recording), 6, check(recording).findings)["findings"] == []


def test_names_cannot_break_out_of_the_page(recording, tmp_path):
    bad = recording.copy("action", "joints")
    bad.arrays["</script><b>"] = bad.arrays["joints"].copy()
    page = view(bad, 0, tmp_path / "e.html").read_text()
    assert page.count("</script>") == 1


def test_long_episodes_and_many_pictures_are_thinned(recording, monkeypatch):
    monkeypatch.setattr("policy.data.view.NUMBERS", 1000)
    monkeypatch.setattr("policy.data.view.IMAGE_BYTES", 20_000)
    content = data(Data(recording), 2, ())
    assert all(key["every"] == content["keys"][0]["every"] > 1 for key in content["keys"])
    assert sum(numbers(key).size for key in content["keys"]) <= 1100
    camera, = content["images"]
    assert 4 <= len(camera["at"]) < content["steps"] and sum(map(len, camera["frames"])) <= 20_000
    assert camera["at"][0] == 0 and camera["at"][-1] == content["steps"] - 1
    assert f"{len(camera['at'])} of {content['steps']} frames" in camera["note"] and any("step of the curves" in note for note in content["notes"])


def test_points_that_share_an_area_are_drawn_together():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 500, (50, 2)).astype(np.float32)
    recording = Arrays({"action": x, "points": rng.uniform(0, 500, (50, 9, 2)).astype(np.float32), "far": x + 1e6, "angles": rng.normal(size=(50, 3)),
                        "hand": rng.normal(size=(50, 3)).astype(np.float32)}, np.array([50]), {"units": {"action": "px"}})
    content = data(Data(recording), 0, ())
    assert [(g["dimensions"], g["down"], [k["name"] for k in g["keys"]]) for g in content["paths"]] == [
        (2, True, ["action", "points"]), (2, False, ["far"]), (3, False, ["hand"])]


def test_y_points_down_where_there_are_pictures():
    """Push-T says no unit: its path must not be the mirror image of its picture."""
    x, metres = np.random.default_rng(0).uniform(0, 500, (2, 20, 2)).astype(np.float32)
    recording = Arrays({"agent": x, "far": metres + 1e6}, np.array([20]), {"units": {"far": "m"}})
    assert [g["down"] for g in data(Data(recording), 0, ())["paths"]] == [False, False]
    recording.arrays["img"] = np.zeros((20, 16, 16, 3), np.uint8)
    look = Data(recording)
    assert [g["down"] for g in data(look, 0, ())["paths"]] == [True, False]
    line = [np.array([[[0.0, 0.0]], [[1.0, 1.0]]])]
    assert [re.search('points="([^"]*)"', plane("agent", line, look.down(key)))[1] for key in ("agent", "far")] == ["4,4.0 296,296.0", "4,296.0 296,4.0"]


def test_an_angle_beside_pixels_has_a_plot_of_its_own():
    t = np.linspace(0, 6, 200)
    state = np.stack([250 + 200 * np.sin(t), 300 + 90 * np.cos(t), 220 + 60 * t, np.full(200, 260.0), t, np.full(200, 1e9)], axis=1).astype(np.float32)
    key, = data(Data(Arrays({"state": state}, np.array([200]), {})), 0, ())["keys"]
    assert key["groups"] == [[0, 1, 2, 3], [4], [5]]
    assert of_one_scale(np.full((5, 2), np.nan, np.float32)) == [[0, 1]] and of_one_scale(np.zeros((5, 0), np.float32)) == []
    many = of_one_scale((t[:, None] * 100.0 ** np.arange(9)).astype(np.float32))
    assert len(many) == 4 and sorted(c for group in many for c in group) == list(range(9))


@pytest.mark.parametrize("x", [
    np.full((5, 7, 3), 51, np.uint8), np.full((3, 12, 9), 0.2, np.float32), np.full((5, 7), 13107, np.uint16), np.full((5, 7, 1), 51, np.float64)])
def test_pictures_of_every_kind(x):
    top = {np.dtype(np.uint8): 255, np.dtype(np.float32): 1, np.dtype(np.uint16): 65535, np.dtype(np.float64): 255}[x.dtype]
    picture = as_picture(x, top)
    assert picture.dtype == np.uint8 and picture.ndim in (2, 3) and (picture == 51).all()


def test_an_episode_that_is_not_there(recording):
    with pytest.raises(ValueError, match="there is no episode 8: memory has 8 episodes, 0 to 7"):
        data(Data(recording), 8, ())


def test_rerun(recording, tmp_path):
    pytest.importorskip("rerun", reason="pip install 'dipole[rerun]'")
    from policy.data.rerun import write_rrd
    assert write_rrd(recording, 7, tmp_path / "e.rrd").read_bytes()[:3] == b"RRF"

"""Every fault that is planted is found where it was planted, and nothing else; clean data are clean; real data give what is truly in them."""
import json
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from faults import FAULTS, Arrays, clean, duplicate, lengths, smooth, teleport

from policy.data import DataError, Store
from policy.data.checks.finding import PLACES, Place, finding, ordered, shortened
from policy.data.split import split_episodes
from policy.data.validate import CHECKS, check, validate
from policy.data.validate_page import write_page


@pytest.fixture(scope="module")
def spotless() -> Arrays:
    return clean()


def reported(data, **how) -> set[str]:
    return {f.code for f in check(data, **how).findings}


def missed(findings, fault, places) -> list[tuple]:
    """Planted places that no finding of the fault's code names."""
    def seen(key, channel, episode, lo, hi):
        at = [f for f in findings if f.code == fault.code and (not key or f.key == key) and (channel is None or channel in f.channels)]
        return bool(at) if episode is None else any(p.episode == episode and p.lo < hi and p.hi > lo for f in at for p in f.places)
    return [p for p in places if not seen(*p)]


def test_nothing_is_found_in_clean_data(spotless):
    report = check(spotless)
    assert report.findings == []
    assert report.exit_code(strict=True) == 0
    assert report.facts["action"] == {"looks": "absolute", "declared": "absolute", "lag": 2, "correlation": report.facts["action"]["correlation"]}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_its_place_and_nothing_else(spotless, name):
    fault, data = FAULTS[name], spotless.copy()
    places = fault.plant(data)
    findings = check(data).findings
    assert {f.code for f in findings} - set(fault.also) == {fault.code}
    assert next(f.severity for f in findings if f.code == fault.code) == fault.severity
    assert missed(findings, fault, places) == []


def test_each_check_is_needed_for_some_fault():
    found = {fault.code for fault in FAULTS.values()}
    assert len(found) >= 29
    assert len(CHECKS) == 17


def test_a_copy_of_a_validation_episode_in_training_is_a_leak(spotless):
    data = spotless.copy()
    n = len(lengths(data)) + 1
    val = split_episodes(n, "val", val_ratio=0.02, seed=42, max_episodes=None)
    assert 1 not in val and n - 1 not in val, "the copy of episode 1 and episode 1 are both trained on"
    duplicate(data)
    assert reported(data) == {"duplicate"}
    seed = next(s for s in range(100) if n - 1 in split_episodes(n, "val", val_ratio=0.02, seed=s, max_episodes=None))
    report = check(data, seed=seed)
    leak = next(f for f in report.findings if f.code == "split_leak")
    assert [str(p) for p in leak.places] == [f"episode {n - 1}, steps 0 to {lengths(data)[-1] - 1} (as episode 1)"]


def test_an_effort_that_answers_the_motion_is_no_error(spotless):
    """A damper's torque follows the velocity it brakes: undeclared, that is a note at most."""
    data = spotless.copy("joints")
    d = np.gradient(data.arrays["joints"].astype(float), axis=0)
    data.arrays["action"] = np.roll(-d, 3, axis=0).astype(np.float32)
    data.attrs.pop("action")
    assert all(f.severity == "note" for f in check(data).findings if f.code == "action_lag")


def test_delta_actions_that_come_late_are_found(spotless):
    data = spotless.copy("joints")
    q = data.arrays["joints"].astype(float)
    for e in range(len(data.episode_ends)):
        s = data.span(e)
        q[s] = np.cumsum(0.02 * smooth(np.random.default_rng(e), s.stop - s.start, 6, 20), axis=0)
    data.arrays["joints"] = q.astype(np.float32)
    step = np.diff(q, axis=0, append=q[-1:])
    data.attrs["action"] = {"kind": "delta", "space": "joint", "of": "joints"}
    data.arrays["action"] = step.astype(np.float32)
    data.arrays["action"][data.episode_ends - 1] = data.arrays["action"][data.episode_ends - 2]
    assert "action_lag" not in reported(data, skip=["jumps"])
    data.arrays["action"] = np.roll(data.arrays["action"], 4, axis=0)
    report = check(data)
    lag = next(f for f in report.findings if f.code == "action_lag")
    assert (lag.severity, lag.numbers["lag"]) == ("error", -4)


def test_switches_and_counters_are_no_jumps(spotless):
    data = spotless.copy()
    n = len(data.arrays["joints"])
    data.arrays["contact"] = (np.random.default_rng(0).random((n, 1)) < 0.1).astype(np.float32)
    data.arrays["reward"] = np.random.default_rng(0).normal(size=n)
    data.arrays["frame_index"] = np.concatenate([np.arange(m) for m in lengths(data)])
    data.arrays["episode_index"] = np.repeat(np.arange(len(data.episode_ends)), lengths(data))
    assert reported(data) == set()
    data.arrays["frame_index"][data.start(3) + 30:data.episode_ends[3]] += 2
    data.arrays["episode_index"][data.start(6) + 50:data.episode_ends[6]] += 1
    found = {f.key: f for f in check(data).findings}
    assert found["frame_index"].code == "time_gap" and str(found["frame_index"].places[0]) == "episode 3, step 30 (+3)"
    assert found["episode_index"].code == "missed_border" and str(found["episode_index"].places[0]) == "episode 6, step 50 (+1)"


def test_a_clock_within_a_state_is_known_by_its_pace(spotless):
    data = spotless.copy()
    data.arrays["states"] = np.concatenate([data.arrays.pop("timestamp")[:, None], data.arrays["joints"]], axis=1)
    assert reported(data) == set()
    data.arrays["states"][data.start(16) + 55:data.episode_ends[16], 0] += 0.4
    gap = next(f for f in check(data).findings if f.code == "time_gap")
    assert (gap.where, str(gap.places[0])) == ("states[0]", "episode 16, step 55 (+9.01 steps)")


def test_blocks_make_no_difference(spotless, monkeypatch):
    """Episodes longer than a block are cut; what is on the cut is seen once."""
    data = spotless.copy()
    teleport(data)
    data.arrays["joints"][data.start(7) + 60, 2] = np.nan
    whole = check(data).findings
    monkeypatch.setattr("policy.data.checks.look.BLOCK", 64)
    monkeypatch.setattr("policy.data.checks.look.STRETCH", 60)
    small = check(data, keep=0).findings

    def said(findings):
        return {(f.code, f.key, tuple((p.episode, p.lo) for p in f.places)) for f in findings if f.code != "idle_middle"}
    assert said(small) == said(whole) == {("jump", "pose", ((7, 60),)), ("not_finite", "joints", ((7, 60),))}


def test_findings_are_grouped_bounded_and_ordered():
    many = finding("warning", "jump", "", why="", fix="", places=[Place(0, i, i + 1) for i in range(10_000)])
    assert (len(many.places), many.count) == (PLACES, 10_000)
    assert [f.severity for f in ordered([finding(s, "x", "", why="", fix="") for s in ("note", "error", "warning")])] == ["error", "warning", "note"]
    assert shortened([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9, 10"


def test_exit_codes(spotless):
    bad, odd = spotless.copy(), spotless.copy()
    FAULTS["nan"].plant(bad)
    FAULTS["glitch"].plant(odd)
    assert (check(bad).exit_code(), check(odd).exit_code(), check(odd).exit_code(strict=True)) == (1, 0, 2)
    with pytest.raises(ValueError, match="there is no such check; use some of finite, lengths"):
        check(odd, skip=["idles"])


def stored(data: Arrays, path: Path) -> Path:
    store = Store.create(path, data.schema, fps=data.attrs["fps"], units=data.attrs["units"], attrs={"action": data.attrs["action"]})
    store.extend([{k: x[data.span(e)] for k, x in data.arrays.items()} for e in range(len(data.episode_ends))])
    return path


def test_a_store_its_ends_and_its_files(spotless, tmp_path):
    path = stored(spotless.copy("joints", "action"), tmp_path / "mine.zarr")
    assert validate(path).findings == []
    ends = zarr.open_array(path / "meta" / "episode_ends", mode="r+")
    good = ends[:]
    for wrong, said in ((np.where(np.arange(len(good)) == 5, good[4] - 3, good), "entry 5 is"), (good + 7, "has 3,661")):
        ends[:] = wrong
        report = validate(path)
        assert [f.code for f in report.findings] == ["episode_bounds"] and said in report.findings[0].text and report.exit_code() == 1
    ends[:] = good
    ends.resize((len(good) - 1,))
    assert [f.code for f in validate(path).findings] == ["episode_bounds"] and validate(path).exit_code(strict=True) == 0
    ends.resize((len(good),))
    ends[:] = good
    chunk = next(p for p in sorted((path / "data" / "joints" / "c").rglob("*")) if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-100])
    report = validate(path)
    assert report.findings[0].code == "unreadable" and "joints" in report.findings[0].text
    with pytest.raises(DataError, match="does not exist"):
        validate(tmp_path / "none.zarr")


def test_the_page_carries_what_was_found_and_asks_nothing_of_the_network(spotless, tmp_path):
    data = spotless.copy()
    for name in ("nan", "time gap", "frozen"):
        FAULTS[name].plant(data)
    data.arrays["<b>"] = data.arrays["joints"][:, :2].copy()
    report = check(data)
    page = write_page(report, tmp_path / "validate.html").read_text()
    assert all(f.code in page for f in report.findings) and "<b>[" not in page
    assert "http://" not in page and "https://" not in page and len(page) < 2_000_000
    assert "NaN" in page and "nan," not in page
    json.dumps(report.to_json(), default=float)


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
    ("precision", put("keypoint", slice(None), lambda x: x + 1e8), None, None),
])
def test_faults_planted_into_human_pusht(pusht, code, plant, episode, step):
    data = human(pusht)
    plant(data)
    report = check(data, skip=["images"])
    also = {"angle_wrap", "action_lag"} | ({"glitch"} if code == "outlier" else set())
    got = next((f for f in report.findings if f.code == code), None)
    assert got is not None and {f.code for f in report.findings} <= {code, *also}
    if episode is not None:
        assert any(p.episode == episode and (step is None or p.lo <= step < p.hi) for p in got.places)


@pytest.mark.slow
def test_a_million_steps_of_twenty_channels(tmp_path):
    """13 s on one core, 10 of them reading and comparing; 0.9 GB."""
    rng, store = np.random.default_rng(0), Store.create(tmp_path / "big.zarr", {"state": ((13,), "float32"), "action": ((7,), "float32")}, fps=20)
    for _ in range(20):
        episodes = []
        for _ in range(100):
            x = smooth(rng, 502, 13, 80) + 0.002 * rng.normal(size=(502, 13))
            episodes.append({"state": x[:500].astype(np.float32), "action": x[2:, :7].astype(np.float32)})
        store.extend(episodes)
    start = time.perf_counter()
    report = validate(store.path)
    assert report.findings == []
    assert time.perf_counter() - start < 30

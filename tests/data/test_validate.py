"""Every fault that is planted is found where it was planted, and nothing else; clean data are clean; real data give what is truly in them."""
import json
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from faults import FAULTS
from planted_meaning import duplicate
from planted_motion import teleport
from recordings import Arrays, clean, lengths, smooth

from policy.data import DataError, Store
from policy.data.checks.finding import PLACES, Place, finding, ordered, shortened
from policy.data.split import split_episodes
from policy.data.validate import check, validate
from policy.data.validate_page import write_page
from policy.data.view import view


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


def test_a_validation_episode_that_begins_as_a_training_episode(spotless):
    data = spotless.copy("joints", "action")
    val, = split_episodes(len(lengths(data)), "val", val_ratio=0.02, seed=42, max_episodes=None)
    other = (val + 5) % 24
    for key in ("joints", "action"):
        x = data.arrays[key]
        x[data.span(val)][:, :6] += (x[data.start(other)] - x[data.start(val)])[:6]
    note, = check(data).findings
    assert (note.code, note.severity, str(note.places[0])) == ("same_start", "note", f"episode {val}, step 0 (as episode {other})")


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


def test_a_gripper_that_closes_in_one_step_is_no_teleport(spotless):
    """Its width has noise, so it takes many values; whether it closes on things of one size or of several."""
    data, rng = spotless.copy(), np.random.default_rng(5)
    n = len(data.arrays["joints"])
    opened = data.arrays["action"][:, 6] > 0
    data.arrays["width"] = (np.where(opened, 0.08, 0.02) + 1e-4 * rng.normal(size=n)).astype(np.float32)
    assert reported(data) == set()
    size = np.repeat(rng.uniform(0.01, 0.06, len(data.episode_ends)), lengths(data))
    data.arrays["width"] = (np.where(opened, 0.08, size) + 1e-4 * rng.normal(size=n)).astype(np.float32)
    assert {f.severity for f in check(data).findings} <= {"note"}, "several sizes"
    data.arrays["width"][data.start(3) + 20:data.episode_ends[3]] += 0.1
    teleport(data)
    assert "pose" in {f.key for f in check(data).findings if f.severity == "warning" and f.code == "jump"}


def test_what_rests_at_its_end_or_counts_in_coarse_steps_is_not_clipped(spotless):
    """A hand that closes smoothly and stays closed; a dial that goes to and fro in steps of 5 %."""
    data = spotless.copy("joints", "action")
    t = np.arange(len(data.arrays["joints"]))
    closing = ((t % 200) / 25).clip(0, 1) - ((t % 200 - 100) / 25).clip(0, 1)
    data.arrays["hand"] = (0.04 * (1 - np.cos(np.pi * closing)) / 2).astype(np.float32)
    data.arrays["dial"] = (np.abs(t % 44 - 22) / 22).astype(np.float32)
    assert reported(data, skip=["jumps"]) == set()


def test_a_goal_near_the_origin_is_in_no_other_unit(spotless):
    data = spotless.copy("joints", "action")
    goal = np.random.default_rng(0).uniform(-1, 1, (24, 2))
    goal[7] *= np.pi / 180 * np.median(np.abs(goal), axis=0) / np.abs(goal[7])
    data.arrays["goal"] = np.repeat(goal, lengths(data), axis=0).astype(np.float32)
    assert reported(data) == set()
    data.arrays["goal"][data.span(9)] *= 180 / np.pi * np.median(np.abs(goal), axis=0) / np.abs(goal[9])
    assert reported(data) == {"units_mixed"}


def test_two_axes_of_a_hand_that_points_down_are_no_quaternion(spotless):
    data = spotless.copy("joints", "action")
    x = smooth(np.random.default_rng(3), len(data.arrays["joints"]), 3)
    a = np.stack([np.cos(x[:, 0]), np.sin(x[:, 0]), 3 * np.maximum(0, x[:, 1] - np.quantile(x[:, 1], 0.95))], axis=1)
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b = np.cross(np.stack([0.02 * x[:, 2], 0 * x[:, 2], -np.ones(len(x))], axis=1), a)
    data.arrays["hand_axes"] = np.concatenate([a, b / np.linalg.norm(b, axis=1, keepdims=True)], axis=1).astype(np.float32)
    assert reported(data, skip=["jumps"]) == set()


def test_a_clock_within_a_state_is_known_by_its_pace(spotless):
    data = spotless.copy()
    data.arrays["states"] = np.concatenate([data.arrays.pop("timestamp")[:, None], data.arrays["joints"]], axis=1)
    assert reported(data) == set()
    data.arrays["states"][data.start(16) + 55:data.episode_ends[16], 0] += 0.4
    gap = next(f for f in check(data).findings if f.code == "time_gap")
    assert (gap.where, str(gap.places[0])) == ("states[0]", "episode 16, step 55 (+9.01 steps)")


def test_a_part_of_the_windows_finds_the_same_copies(spotless, monkeypatch):
    data = spotless.copy()
    duplicate(data)
    monkeypatch.setattr("policy.data.checks.copies.WINDOWS", 1000)
    monkeypatch.setattr("policy.data.checks.copies.STEP", 333)
    copy, = check(data).findings
    assert (copy.code, str(copy.places[0])) == ("duplicate", "episode 24, steps 0 to 159 (as episode 1: 1 of it)")


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


@pytest.mark.parametrize("seed", range(12))
def test_strange_data_end_in_findings_not_in_tracebacks(seed, tmp_path):
    """Short episodes, no width, text, nothing but NaN, huge and tiny numbers, with the page and the view of it."""
    rng = np.random.default_rng(seed)
    lens = rng.choice([1, 2, 3, 17, 60], 5)
    n, arrays = int(lens.sum()), {}
    for name in rng.choice(["action", "state", "timestamp", "frame_index", "img", "reward", "quat", "joint_pos"], 4, replace=False):
        dtype, shape = [("f4", ()), ("f4", (3,)), ("f8", (7,)), ("f2", (4,)), ("i8", ()), ("u1", (16, 16, 3)), ("f4", (3, 16, 16)), ("?", ()), ("f4", (0,)),
                        ("U3", ()), ("u2", (40, 40))][rng.integers(11)]
        x = rng.normal(size=(n, *shape)) * 10.0 ** rng.integers(-6, 7)
        x = [x, 0 * x, np.cumsum(x, 0), np.full(x.shape, np.nan), np.where(rng.random(x.shape) < 0.1, np.inf, x)][rng.integers(5)]
        with np.errstate(all="ignore"):
            arrays[str(name)] = (x if np.dtype(dtype).kind == "f" else np.nan_to_num(x)).astype(dtype)
    data = Arrays(arrays, np.cumsum(lens), {})
    report = check(data)
    json.dumps(report.to_json(), default=float)
    write_page(report, tmp_path / "validate.html")
    view(data, 3, tmp_path / "view.html", report.findings)


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
    assert validate(f"file://{path}").to_json()["findings"] == []
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


@pytest.mark.slow
def test_a_million_steps_of_twenty_channels(tmp_path):
    """10 s on one core and 0.8 GB."""
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

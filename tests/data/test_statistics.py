"""Statistics behind transforms beside numpy: over all windows, every step, what is repeated behind the end included; per channel or per step."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.data import Normalizer, Store, statistics
from policy.data.moments import Moments
from policy.data.relative import AbsoluteToDelta, DeltaToAbsolute, RelativeToChunk
from policy.data.rotation import convert
from policy.data.transform import NOTHING, Chain, Rotation
from policy.data.windows import TrajectoryDataset

LENGTHS, HORIZON = (5, 9, 30), 8


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrajectoryDataset:
    rng = np.random.default_rng(0)
    store = Store.create(tmp_path_factory.mktemp("s") / "d.zarr", {"q": ((4,), "float32"), "turn": ((3,), "float32"), "action": ((6,), "float32")}, fps=10)
    for n in LENGTHS:
        q = rng.standard_normal((n, 4)).cumsum(0)
        turn = rng.uniform(-1, 1, (n, 3))
        store.append({"q": q, "turn": turn, "action": np.concatenate([q[:, :3] + 0.3 * rng.standard_normal((n, 3)), turn], 1)})
    return TrajectoryDataset(Store.open(store.path), {"q": "q", "turn": "turn"}, "action", horizon=HORIZON, split="all")


def windows(data: TrajectoryDataset, make) -> np.ndarray:
    """(n, HORIZON, d) of make(actions (t,d), q (4,), real (t,)) for every frame, episode by episode, without the library's windows."""
    action, q, out, at = data.arrays["action"].numpy().astype(float), data.arrays["q"].numpy().astype(float), [], 0
    for n in LENGTHS:
        for i in range(at, at + n):
            index = np.minimum(np.arange(i, i + HORIZON), at + n - 1)
            out.append(make(action[index], q[i], np.arange(i, i + HORIZON) < at + n))
        at += n
    return np.stack(out)


def relative(a, q, real):
    return np.concatenate([a[:, :3] - q[:3], a[:, 3:]], 1)


def delta(a, q, real):
    return np.concatenate([np.diff(a[:, :3], axis=0, prepend=q[None, :3]), a[:, 3:]], 1)


def summed(a, q, real):
    return np.concatenate([q[:3] + np.cumsum(np.where(real[:, None], a[:, :3], 0), 0), a[:, 3:]], 1)


OF = {"state": "q", "channels": [0, 1, 2], "take": [0, 1, 2]}
CASES = {"relative": (RelativeToChunk(**OF), relative), "delta": (AbsoluteToDelta(**OF), delta)}


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("mode", ["limits", "gaussian", "quantile"])
@pytest.mark.parametrize("name", CASES)
def test_they_are_numpys(data, name, mode, per_step):
    transform, make = CASES[name]
    x = windows(data, make)
    x = x.reshape(len(x), -1) if per_step else x.reshape(-1, 6)
    if mode == "gaussian":
        middle, half = x.mean(0), x.std(0)
    else:
        a, b = (x.min(0), x.max(0)) if mode == "limits" else (np.sort(x, 0)[round(q * (len(x) - 1))] for q in (0.01, 0.99))
        middle, half = (a + b) / 2, (b - a) / 2
    got = statistics.fit(data, transform, {"action": mode, "q": "limits", "turn": "identity"}, per_step=per_step)
    size = (HORIZON, 6) if per_step else (6,)
    assert got.shapes == statistics.shapes(transform, {"q": (4,), "turn": (3,)}, 6, HORIZON, per_step=per_step) and got.shapes["action"] == size
    np.testing.assert_allclose(got.shift_action, middle.reshape(size), atol=1e-5)
    np.testing.assert_allclose(got.scale_action, half.reshape(size), atol=1e-5)
    frames = data.arrays
    assert torch.equal(got.shift_q, Normalizer.fit({"q": frames["q"]}).shift_q) and not got.shift_turn.any()
    physical = Normalizer.fit({"action": frames["action"]})
    key = f"action%2E{statistics.PHYSICAL.split('.')[1]}"
    assert torch.equal(getattr(got, f"shift_{key}"), physical.shift_action) and torch.equal(getattr(got, f"scale_{key}"), physical.scale_action)


def test_blocks_are_the_whole(data, monkeypatch):
    """Measured a few windows at a time."""
    transform = Chain((RelativeToChunk(**OF), Rotation("axis_angle", "rotation_6d", [3, 4, 5], {"turn": None})))
    whole = statistics.fit(data, transform, "gaussian")
    monkeypatch.setattr(statistics, "BLOCK", 100)
    parts = statistics.fit(data, transform, "gaussian")
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=1e-6, atol=1e-7)
    six = convert(data.arrays["turn"].double().numpy(), "axis_angle", "rotation_6d")
    np.testing.assert_allclose(whole.shift_turn, six.mean(0), atol=1e-6)
    assert whole.shapes["turn"] == (6,) and whole.shapes["action"] == (9,)


def test_steps_repeated_behind_the_end_do_not_count_on(data):
    """Summed up they would run away: the last real target is the last."""
    got, want = statistics.fit(data, DeltaToAbsolute(**OF)), windows(data, summed)[..., :3].reshape(-1, 3)
    np.testing.assert_allclose(got.shift_action[:3], (want.min(0) + want.max(0)) / 2, atol=1e-5)


def test_without_transforms_they_are_as_ever(data):
    a, b = statistics.fit(data, NOTHING), Normalizer.fit(data.arrays)
    assert a.shapes == b.shapes == statistics.shapes(NOTHING, {"q": (4,), "turn": (3,)}, 6, HORIZON) and all(
        torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    with pytest.raises(ValueError, match="mode 'image' of 'action' is unknown"):
        statistics.fit(data, CASES["delta"][0], {"action": "image"})
    with pytest.raises(KeyError, match=r"modes are given for \['z'\]"):
        statistics.fit(data, CASES["delta"][0], {"z": "limits"})


def test_a_sample_of_windows_keeps_every_step():
    """Steps of a chunk differ: a sample that took every 16th row of chunks of 16 would see one step alone."""
    seen = Moments()
    for _ in range(40):
        seen.add(torch.arange(16.0).expand(2**13, 16)[..., None].contiguous())
    assert seen.sample().unique().tolist() == list(range(16)) and len(seen.sample()) < 2**23


@pytest.mark.data
def test_human_pushes_beside_numpy():
    root = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = root / "pusht" / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"{path} is not there; set DIPOLE_DATA to the folder that holds pusht/")
    store = Store.open(path)
    data = TrajectoryDataset(store, {"agent_pos": {"key": "state", "take": [0, 1]}}, "action")
    state, action, rows = store.read("state").astype(float), store.read("action").astype(float), []
    for e in data.episodes:
        lo, hi = store.span(e)
        index = np.minimum(np.arange(lo, hi)[:, None] + np.arange(16), hi - 1)
        rows.append(np.diff(action[index], axis=1, prepend=state[lo:hi, None, :2]))
    x = np.concatenate(rows)
    for per_step, flat in ((False, x.reshape(-1, 2)), (True, x.reshape(len(x), -1))):
        got = statistics.fit(data, AbsoluteToDelta("agent_pos"), "gaussian", per_step=per_step)
        np.testing.assert_allclose(got.shift_action.flatten(), flat.mean(0), atol=1e-5)
        np.testing.assert_allclose(got.scale_action.flatten(), flat.std(0), rtol=1e-6)

"""`dipole data validate` and `dipole data view` as they are typed: what they print, write and exit with."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faults import FAULTS
from omegaconf import OmegaConf
from recordings import clean

from policy.data import DataError, Store
from policy.data.validate import check
from scripts.data_validate import possible, told
from scripts.settings import plain


def typed(*words: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scripts.cli", "data", *words], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={"PATH": "/usr/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)})


@pytest.fixture
def faulty(tmp_path):
    data = clean(6)
    for name in ("nan", "glitch"):
        FAULTS[name].plant(data)
    store = Store.create(tmp_path / "mine.zarr", data.schema, fps=20, attrs={"action": data.attrs["action"]})
    store.extend([{k: x[data.span(e)] for k, x in data.arrays.items()} for e in range(6)])
    return store.path


def test_findings_are_told_written_and_fail_ci(faulty, tmp_path):
    done = typed("validate", "path=mine.zarr", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    said = done.stdout
    assert "error    not_finite  joints[2]" in said and "    at   episode 5, steps 40 to 42" in said and "1 error, 1 warning, 0 notes" in said
    assert "dipole data trim src=mine.zarr dst=mine_clean.zarr drop=[5]" in said
    written = json.loads((tmp_path / "mine.zarr.validate" / "findings.json").read_text())
    assert [f["code"] for f in written["findings"]] == ["not_finite", "glitch"] and written["errors"] == 1
    assert (tmp_path / "mine.zarr.validate" / "validate.html").stat().st_size > 20_000


@pytest.mark.slow
def test_other_formats_strictness_and_the_view(faulty, tmp_path):
    data = clean(6)
    FAULTS["glitch"].plant(data)
    np.savez(tmp_path / "mine.npz", observations=data.arrays["joints"], actions=data.arrays["action"], episode_ends=data.episode_ends)
    done = typed("validate", "path=mine.npz", "fps=20", "strict=true", "out=checked", cwd=tmp_path)
    assert done.returncode == 2 and "warning  glitch" in done.stdout, done.stdout + done.stderr
    done = typed("view", "path=mine.zarr", "episode=3", cwd=tmp_path)
    assert done.returncode == 0 and '"code": "glitch"' in (tmp_path / "mine.zarr.episode3.html").read_text(), done.stderr
    done = typed("view", "path=mine.zarr", "episode=6", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: there is no episode 6: mine.zarr has 6 episodes, 0 to 5")


def test_nothing_but_totals_is_said_of_clean_data(tmp_path):
    said = told(check(clean(6)))
    assert said[-1] == "0 errors, 0 warnings, 0 notes" and len(said) == 4


def settings(*typed: str) -> dict:
    conf = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data_validate.yaml")
    return plain(OmegaConf.merge(conf, OmegaConf.from_dotlist(list(typed))))


@pytest.mark.parametrize("typed, said", [
    ("horizon=abc", "horizon='abc' must be a whole number from 1"), ("horizon=0", "horizon=0 must be"), ("horizon=-4", "horizon=-4 must be"),
    ("seed=x", "seed='x' must be a whole number from 0"), ("images=abc", "images='abc' must be a number"), ("images=-1", "images=-1 must be"),
    ("val_ratio=abc", "val_ratio='abc' must be a number"), ("val_ratio=1", "below 1"), ("fps=-3", "fps=-3 must be"), ("fps=0", "fps=0 is no rate"),
    ("strict=maybe", "strict=maybe must be true or false"), ("skip=foo", r"skip=foo must be a list: skip=\[foo\]")])
def test_settings_that_cannot_be_are_refused(typed, said):
    with pytest.raises(ValueError, match=said):
        possible(settings("path=a.zarr", typed))


def test_settings_that_can_be():
    possible(settings("path=a.zarr"))
    possible(settings("path=a.zarr", "horizon=1", "seed=0", "images=.inf", "val_ratio=0", "fps=59.94", "strict=true", "skip=[idle,clipped]"))


def test_a_misspelt_action_key_fails_ci(faulty, tmp_path):
    """None of the default name is a warning; any other name that is not there would leave out every check of actions."""
    done = typed("validate", "path=mine.zarr", "action=nope", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: action=nope is no key of the dataset; use one of "), done.stdout + done.stderr
    assert "joints" in done.stderr and "action" in done.stderr
    data = clean(6)
    data.arrays["task"] = np.full(len(data.arrays["action"]), "door")
    with pytest.raises(DataError, match="action=task is text, no numbers; use one of joints, pose"):
        check(data, action="task")
    data.arrays["actions"] = data.arrays.pop("action")
    assert check(data).findings == [], "called actions, it is found"
    del data.arrays["actions"]
    assert {f.code for f in check(data).findings} == {"no_action"}

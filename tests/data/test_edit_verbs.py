"""dipole data convert, merge, split, trim and stats as typed: what is printed last, exit codes, one-line errors."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from policy.data import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def say(tmp_path):
    def say(*words: str):
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from scripts.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, str(ROOT), "data", *words], capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout.strip().splitlines(), done.stderr.strip()
    return say


@pytest.mark.slow
def test_from_a_file_to_statistics(say, tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("a", 40), ("b", 60)):
        np.savez(tmp_path / f"{name}.npz", action=rng.normal(size=(n, 2)), q=rng.normal(size=(n, 3)), episode_ends=[10, n])
        code, lines, err = say("convert", f"src={name}.npz", f"dst={name}.zarr", "fps=10", "units={q:rad}", "task=Reach the goal")
        assert (code, lines[-1], err) == (0, f"{name}.npz (npz): 2 episodes, {n} steps -> {name}.zarr", ""), err
        assert "observed by default: q" in lines
    assert say("merge", "src=[a.zarr,b.zarr]", "dst=ab.zarr")[1] == ["2 datasets: 4 episodes, 100 steps -> ab.zarr"]
    assert say("split", "src=ab.zarr", "dst=[t.zarr,v.zarr]", "ratio=0.75", "seed=1")[0] == 0
    assert {Store.open(tmp_path / p).episodes for p in ("t.zarr", "v.zarr")} == {1, 3}
    code, lines, _ = say("trim", "src=ab.zarr", "dst=short.zarr", "drop=[0]", "steps=[5,null]", "shortest=6")
    assert (code, lines[-1]) == (0, "2 episodes, 70 steps -> short.zarr") and "episode 2 has 5 of 10 steps left and is left out" in lines
    code, lines, _ = say("stats", "path=short.zarr", "out=s.json", "keys=[q]", "quantiles=[0.5]")
    found = json.loads((tmp_path / "s.json").read_text())
    assert code == 0 and list(found) == ["q"] and lines[1].split()[:3] == ["q[0]", "float64", "rad"]
    np.testing.assert_allclose(found["q"]["mean"], Store.open(tmp_path / "short.zarr").read("q").mean(0))
    code, lines, _ = say("convert", "src=ab.zarr", "dst=back.npz")
    assert (code, lines[-1]) == (0, "ab.zarr (npz): 4 episodes, 100 steps -> back.npz")
    for words, told in ((("merge", "src=[a.zarr,b.zarr]", "dst=ab.zarr"), "exists and is not overwritten"),
                        (("merge", "src=[a.zarr]", "dst=c.zarr"), "at least two"),
                        (("split", "src=a.zarr", "dst=[c.zarr,d.zarr]"), "ratio=0.9"), (("trim", "src=a.zarr", "dst=c.zarr", "steps=5"), "steps=[10,null]"),
                        (("trim", "src=a.zarr", "dst=c.zarr", "idle.where=top"), "head, tail or both"), (("convert", "src=a.npz", "dst=c.zarr"), "add fps="),
                        (("stats", "path=a.zarr", "keys=[p]"), "'p' is not in"), (("stats", "path=a.zarr", "quantiles=[5]"), "shares in [0, 1]")):
        code, _, err = say(*words)
        assert code == 1 and err.startswith("error: ") and told in err and len(err.splitlines()) == 1, (words, err)
    assert not (tmp_path / "c.zarr").exists()

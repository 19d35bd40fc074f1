"""dipole data convert, merge, split, trim and stats as typed: what is printed last, exit codes, one-line errors."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

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


@pytest.fixture
def four(tmp_path):
    store = Store.create(tmp_path / "a.zarr", {"action": ((2,), "float32"), "foo": ((), "float32")}, fps=10)
    store.extend([{"action": np.full((5, 2), e, "f4"), "foo": np.zeros(5, "f4")} for e in range(4)])
    return store.path


def run(task, *typed):
    """The verb itself, without hydra around it."""
    known = OmegaConf.load(ROOT / "conf" / f"data_{task}.yaml")
    del known["hydra"], known["defaults"]
    importlib.import_module(f"scripts.data_{task}").start.__wrapped__(OmegaConf.merge(known, OmegaConf.from_dotlist(list(typed))))


@pytest.mark.parametrize("task, typed, said", [
    ("view", "episode=abc", "episode='abc' must be a whole number from 0"), ("view", "episode=1.5", "episode=1.5 must be a whole number"),
    ("view", "findings=maybe", "findings=maybe must be true or false"), ("view", "fps=-3", "fps=-3 must be a rate in Hz above 0"),
    ("split", "ratio=abc", "ratio is a share above 0 for each of the 2 datasets.*got abc"), ("split", "ratio=[a,b]", r"ratio is a share .*got \['a', 'b'\]"),
    ("split", "ratio=.nan", "ratio is a share"), ("split", "episodes=abc", r"episodes=\[\[0,1,2\],\[3\]\], got abc"),
    ("split", "episodes=[1,2]", r"got \[1, 2\]"),
    ("trim", "idle={where: both, still: abc}", "idle.still='abc' must be a number"),
    ("trim", "idle={where: both, margin: x}", "idle.margin='x' must be a whole"),
    ("trim", "keep=x", "keep names episode 'x'")])
def test_settings_that_cannot_be_are_told_in_a_line(four, tmp_path, task, typed, said):
    made = f"{tmp_path}/b.zarr" if task == "trim" else f"[{tmp_path}/b.zarr,{tmp_path}/c.zarr]"
    places = [f"path={four}"] if task == "view" else [f"src={four}", f"dst={made}"]
    with pytest.raises(ValueError, match=said):
        run(task, *places, typed)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]


def test_what_is_trimmed_may_be_one_without_brackets(four, tmp_path):
    run("trim", f"src={four}", f"dst={tmp_path}/b.zarr", "drop=1", "drop_keys=foo")
    run("trim", f"src={four}", f"dst={tmp_path}/c.zarr", "keep=2")
    b, c = Store.open(tmp_path / "b.zarr"), Store.open(tmp_path / "c.zarr")
    assert (b.keys, b.episodes, c.episodes, c.read("action")[0, 0]) == (["action"], 3, 1, 2)

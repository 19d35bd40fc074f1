"""The suite: every stage once, whatever ends it; a changed row, a missing package, a failure are told; one table in three forms."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import load_file

from policy.data.store import Store
from scripts import suite, suite_page
from tests.shell import ENV
from tests.test_conf import composed

ROOT = Path(__file__).parent.parent
ROWS = {"one": {"collect": ["env=gantry"], "train": ["recipe=gantry"], "cpu_s": 100}, "two": {"collect": ["env=maze"], "train": ["recipe=maze"], "cpu_s": 50}}


class Verbs:
    """Stands for the processes: does in a moment what the verbs leave behind, and keeps what it was asked."""

    def __init__(self):
        self.asked: list[list[str]] = []
        self.fails: dict[str, str] = {}
        self.stop_training_at: int | None = None

    def __call__(self, argv, log, lock, watch):
        self.asked.append(argv)
        os.fstat(lock)  # is held
        said = {k: v.strip("'") for k, v in (a.split("=", 1) for a in argv[1:])}
        for word, message in self.fails.items():
            if word in argv:
                log.write_text(f"$ dipole\nsome output\n{message}\n")
                return 1, 0.1
        if argv[0] == "collect":
            assert not Path(said["path"]).exists()
            Store.create(said["path"], {"action": ((2,), "float32")}, fps=10).append({"action": np.zeros((3, 2), np.float32)})
        elif argv[0] == "train":
            folder = Path(said["run"]) / "checkpoints"
            folder.mkdir(parents=True, exist_ok=True)
            steps = self.stop_training_at or 10
            (folder / "last.safetensors").touch()
            (folder / "policy.json").write_text(json.dumps({"step": steps, "settings": {"steps": 10}, "cpu_s": 7.0 * steps}))
        else:
            seed = int(Path(said["run"]).name.removeprefix("seed"))
            (Path(said["out"])).mkdir(parents=True, exist_ok=True)
            won = 0.9 + 0.05 * seed
            ci = [won - 0.05, won + 0.04]
            (Path(said["out"]) / "metrics.json").write_text(json.dumps(
                {"success": won, "success_ci": ci, "score": won, "score_ci": ci, "episodes": int(said["episodes"])}))
        return 0, 2.0


@pytest.fixture
def verbs(monkeypatch):
    verbs = Verbs()
    monkeypatch.setattr(suite, "call", verbs)
    return verbs


def settings(folder: Path, **changes):
    return OmegaConf.create({"run": str(folder), "rows": ROWS, "only": None, "seeds": [0, 1], "episodes": 100, "seed": 100000, **changes})


def test_every_stage_is_done_once_and_the_table_holds_all(tmp_path, verbs):
    rows = suite.measure(settings(tmp_path))
    assert [a[0] for a in verbs.asked] == ["collect", "train", "eval", "train", "eval"] * 2
    assert verbs.asked[1] == ["train", "recipe=gantry", f"data.path='{tmp_path}/suite/one/demos.zarr'", "train.seed=0", f"run='{tmp_path}/suite/one/seed0'",
                              "log.wandb=disabled"]
    assert rows["one"]["success"] == pytest.approx(0.925) and rows["one"]["demonstrations"] == 1
    lo, hi = rows["one"]["success_ci"]  # .9 and .95: Student's with one degree of freedom is wide
    assert lo == pytest.approx(0.925 - 12.7062 * 0.025, abs=1e-3) and hi == 1
    assert suite.measure(settings(tmp_path)) == rows and len(verbs.asked) == 10
    assert json.loads((tmp_path / "suite" / "suite.json").read_text())["rows"] == json.loads(json.dumps(rows))
    text = (tmp_path / "suite" / "suite.md").read_text()
    assert "| one | 1 | `recipe=gantry` | 70 | **92.5%** [60.7, 100.0] of 100 | 90%, 95% |" in text
    page = (tmp_path / "suite" / "suite.html").read_text()
    assert page.count("report.html") == 4 and "http" not in page
    assert suite_page.headline(rows) == "2 of 2 rows done: one 92%, two 92%"


def test_more_episodes_evaluate_again_more_seeds_train_more_and_other_settings_are_refused(tmp_path, verbs):
    suite.measure(settings(tmp_path, only=["one"], seeds=[0]))
    verbs.asked.clear()
    suite.measure(settings(tmp_path, only=["one"], seeds=[0], episodes=200))
    assert [a[0] for a in verbs.asked] == ["eval"]
    suite.measure(settings(tmp_path, only=["one"], seeds=[0, 1], episodes=200))
    assert [a[0] for a in verbs.asked] == ["eval", "train", "eval"]
    changed = {**ROWS, "one": {**ROWS["one"], "train": ["recipe=gantry", "train.steps=5"]}}
    rows = suite.measure(settings(tmp_path, only=["one"], seeds=[0], episodes=200, rows=changed))
    assert len(verbs.asked) == 3 and rows["one"]["cells"][0]["status"] == "failed"
    assert "train.steps=5" in rows["one"]["cells"][0]["reason"] and "remove the folder" in rows["one"]["cells"][0]["reason"]


def test_the_last_line_names_the_page(tmp_path, verbs, monkeypatch):
    from scripts import bench
    cfg = settings(tmp_path, only=["one"], do="suite", threads=1)
    said = []
    monkeypatch.setattr(bench.console, "print", lambda *words, **_: said.extend(words))
    bench.main.__wrapped__(cfg)
    assert said[-1].endswith(f": {tmp_path}/suite/suite.html")
    assert json.loads((tmp_path / "bench" / "suite.json").read_text())["rows"]["one"]["cells"]


def test_the_table_keeps_seeds_of_other_calls(tmp_path, verbs):
    suite.measure(settings(tmp_path, only=["one"], seeds=[0, 1]))
    rows = suite.measure(settings(tmp_path, only=["two"], seeds=[10]))
    verbs.fails = {"train.seed=5": "error: no"}
    again = suite.measure(settings(tmp_path, only=["one"], seeds=[5]))
    assert [c["seed"] for c in rows["one"]["cells"]] == [0, 1] and [c["seed"] for c in rows["two"]["cells"]] == [10]
    assert [(c["seed"], c["status"]) for c in again["one"]["cells"]] == [(0, "done"), (1, "done"), (5, "failed")]
    assert "90%, 95%, failed" in (tmp_path / "suite" / "suite.md").read_text()


def test_a_stopped_training_goes_on_and_half_a_store_is_made_anew(tmp_path, verbs):
    verbs.stop_training_at = 4
    Store.create(tmp_path / "suite/one/demos.zarr", {"action": ((2,), "float32")}, fps=10)  # what a killed collect leaves
    with pytest.raises(KeyboardInterrupt):
        suite.measure(settings(tmp_path, only=["one"]))
    assert not (tmp_path / "suite/one/seed0.train.json").exists() and (tmp_path / "suite/suite.json").exists()
    verbs.stop_training_at = None
    verbs.asked.clear()
    rows = suite.measure(settings(tmp_path, only=["one"], seeds=[0]))
    assert verbs.asked[0] == ["train", f"run='{tmp_path}/suite/one/seed0'", "resume=true"] and rows["one"]["cells"][0]["train_cpu_s"] == 70


def test_a_failure_is_told_loses_no_other_and_is_tried_again(tmp_path, verbs):
    verbs.fails = {"train.seed=0": "error: the loss is not finite", "env=maze": "dipole collect needs nowhere, which is not installed: pip install nowhere"}
    rows = suite.measure(settings(tmp_path))
    assert [c["status"] for c in rows["one"]["cells"]] == ["failed", "done"] and "the loss is not finite" in rows["one"]["cells"][0]["reason"]
    assert rows["one"]["success"] == pytest.approx(0.95) and "seed 0 failed" in (tmp_path / "suite" / "suite.html").read_text()
    assert "is not installed" in rows["two"]["skipped"] and not rows["two"]["cells"]
    verbs.fails = {}
    rows = suite.measure(settings(tmp_path))
    assert all(c["status"] == "done" for r in rows.values() for c in r["cells"]) and rows["two"]["skipped"] is None


def test_what_is_not_here_is_skipped_with_what_to_do(tmp_path, verbs):
    rows = {"pkg": {**ROWS["one"], "needs": "gymnasium_nowhere"}, "rec": {"train": ["recipe=pusht_human"], "data": str(tmp_path / "none.zarr")}}
    found = suite.measure(settings(tmp_path, rows=rows))
    assert not verbs.asked and "gymnasium_nowhere is not installed" in found["pkg"]["skipped"] and "rows.rec.data=" in found["rec"]["skipped"]
    with pytest.raises(ValueError, match=r"no row gantri.*pkg, rec"):
        suite.measure(settings(tmp_path, rows=rows, only=["gantri"]))


@pytest.mark.parametrize("name", composed("bench").rows)
def test_the_verbs_take_what_a_row_tells_them(name):
    row = suite.Row(name, Path("x"), **OmegaConf.to_container(composed("bench").rows[name], resolve=True))
    if row.collect:
        collected, trained = composed("collect", *row.collect, "path='x'"), composed("train", *row.train, "data.path='x'")
        for key in collected.env:  # demonstrations of the task that is trained and evaluated
            assert collected.env[key] == trained.env.get(key), key
    else:
        composed("train", *row.train)
    assert row.cpu_s in (120, 900)  # two minutes, or fifteen


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["suite", "all", "background"])
def test_killed_in_the_middle_and_resumed(tmp_path, whom):
    """The same command goes on, and the policy is the uninterrupted one: kill -9 of the suite while it trains, with its child or without; SIGTERM in the
    background of a script, where SIGINT is ignored."""
    small = '"train.batch=8","train.warmup=1","train.save=50","net.widths=[8,16]","net.groups=4","net.time_dim=16","train.precision=fp32"'

    def typed(run: str) -> list[str]:
        return [sys.executable, "-m", "scripts.cli", "bench", "suite", "only=[gantry]", "seeds=[0]", "episodes=4", f"run={tmp_path / run}",
                'rows.gantry.collect=["env=gantry","episodes=6"]', f'rows.gantry.train=["recipe=gantry","train.steps=400",{small}]']

    assert subprocess.run(typed("whole"), cwd=ROOT, env=ENV).returncode == 0
    deaf = (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if whom == "background" else None
    process = subprocess.Popen(typed("cut"), cwd=ROOT, env=ENV, preexec_fn=deaf)
    run = tmp_path / "cut/suite/gantry/seed0"
    while not (run / "checkpoints/last.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.02)
    if whom == "all":
        child = int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True).split()[0])
        os.kill(child, signal.SIGKILL)
    process.terminate() if whom == "background" else process.kill()
    process.wait(timeout=60)
    assert not (run.parent / "seed0.train.json").exists()
    assert subprocess.run(typed("cut"), cwd=ROOT, env=ENV).returncode == 0
    rows = [json.loads((tmp_path / run / "suite/suite.json").read_text())["rows"]["gantry"] for run in ("whole", "cut")]
    assert [r["cells"][0]["step"] for r in rows] == [400, 400] and rows[0]["success"] == rows[1]["success"]
    one, other = (tmp_path / r / "suite/gantry/seed0/checkpoints/policy.safetensors" for r in ("whole", "cut"))
    assert all(np.array_equal(v, load_file(other)[k]) for k, v in load_file(one).items())
    log = (run.parent / "seed0.train.log").read_text()
    assert ("resume=true" in log) == (whom != "suite")  # without its child: it was waited for

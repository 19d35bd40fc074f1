"""dipole export and dipole bench deploy, as a user types them."""
import json
import re

import numpy as np
import pytest

from policy.serve.artifact import load
from policy.serve.measure import PARITY
from scripts.export import replaced
from tests.shell import refused

pytest.importorskip("onnxscript", reason="pip install 'dipole[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'dipole[onnx]'")
pytestmark = pytest.mark.slow


def test_export_compares_times_and_replaces(shell, run):
    done = shell("export", "run=run", "format=onnx", "observations=5", "rounds=1", "sampler=heun", "sampler.steps=2", "out=robot")
    assert done.code == 0, done.err
    folder = shell.folder / "robot"
    card = json.loads((folder / "card.json").read_text())
    facts = card["facts"]
    assert facts["solver"]["calls"] == 3 and facts["sampler"]["steps"] == 2 and facts["run"] == "run" and "dipole export" in facts["command"]
    assert list(facts["latency"]) == ["eager", "FastPlan", "onnx"] and all(row["cpu_ms"] > 0 for row in facts["latency"].values())
    assert "5 held-out observations of demos.zarr" in facts["parity"]["observations"] and facts["parity"]["worst"] < PARITY
    assert "identity" in done.out and "times faster" in done.out and "Differences to the planner" in (folder / "report.html").read_text()
    backend = load(folder)
    obs = {k: np.zeros((card["t_obs"], *size), np.float32) for k, size in card["obs"].items()}
    assert backend.plan(obs).shape == (card["horizon"], card["action_dim"])
    refused(shell("export", "run=run", "format=torch", "control.merge=guidd"), "control.merge=guidd", "guided")
    (folder / "old").touch()
    short = ("observations=2", "rounds=1")
    refused(shell("export", "run=run", "format=torch", *short, "out=robot"), "robot already holds an export", "overwrite=true", "out=…")
    done = shell("export", "run=run", "format=torch", "precision=bf16", "accept=1e-9", *short, "out=robot", "overwrite=true")
    refused(done, "accept=1e-09", "nothing was written")
    assert (folder / "old").exists() and load(folder).plan(obs).shape == (card["horizon"], card["action_dim"])  # a failed one takes nothing away
    again = shell("export", "run=run", "format=torch", *short, "out=robot", "overwrite=true")
    assert again.code == 0, again.err
    assert not (folder / "old").exists() and load(folder).plan(obs).shape == (card["horizon"], card["action_dim"])
    assert not list(shell.folder.glob(".robot*"))


def test_killed_between_its_two_renames_it_gives_back_what_was_there(tmp_path):
    out, old = tmp_path / "robot", tmp_path / ".robot.old"
    old.mkdir()
    (old / "card.json").write_text("{}")
    with pytest.raises(FileExistsError, match="already holds an export"), replaced(out, False):
        pass
    assert (out / "card.json").exists() and not old.exists()


def test_bf16_has_to_be_asked_for_by_how_much_it_may_differ(shell, run):
    words = ("export", "run=run", "format=torch", "precision=bf16", "observations=3", "rounds=1")
    done = shell(*words)
    refused(done, "precision=bf16: actions differ from the planner's by up to", "more than 1e-04", "precision=fp32")
    worst, fine = (float(re.search(rf"{word}([\d.e-]+\d)", done.err)[1]) for word in ("by up to ", "accept="))
    assert worst < fine <= 2 * worst
    assert not (shell.folder / "run" / "export").exists() or not list((shell.folder / "run" / "export").glob("*bf16*"))
    done = shell(*words, "accept=0.5")
    assert done.code == 0, done.err
    facts = json.loads((shell.folder / "run/export/torch-bf16/card.json").read_text())["facts"]
    assert 1e-4 < facts["parity"]["worst"] <= 0.5 and facts["parity"]["accept"] == 0.5 and list(facts["latency"]) == ["eager", "torch, fp32", "torch"]
    quicker = facts["latency"]["torch"]["cpu_ms"] < facts["latency"]["torch, fp32"]["cpu_ms"]
    assert ("bf16 is no quicker than fp32" in done.out) == (not quicker)


def test_what_the_run_advises_is_exported_or_refused(shell, run):
    short = ("export", "run=run", "format=onnx", "observations=3", "rounds=1", "sampler.steps=4")
    refused(shell(*short, "control.merge=prefix"), "control.merge=prefix", "not trained for it", "control.merge=frozen or identity")
    done = shell(*short, "control.merge=guided", "control.warm=0.8", "out=guided")
    assert done.code == 0, done.err
    card = json.loads((shell.folder / "guided" / "card.json").read_text())
    facts = card["facts"]
    assert facts["control"]["merge"] == "guided" and "guided" in card["merges"] and facts["warm"] == 0.8 and facts["without"] == {}
    assert facts["parity"]["merges"]["guided"]["normalised"] < PARITY and {"eager, guided", "onnx, guided"} <= set(facts["latency"])
    assert card["joints"] == ["x", "y", "z", "fingers"] and card["joint_units"] == ["m"] * 4 and card["version"] == 2
    assert card["facts"]["limits"]["robot"] == "gantry" and card["facts"]["limits"]["velocity"] == [1.5, 1.5, 1.5, 1.0]


def test_what_cannot_be_is_told_and_what_was_there_stays(shell, run):
    (shell.folder / "mine").mkdir()
    (shell.folder / "mine" / "thesis.tex").write_text("x")
    refused(shell("export", "run=run", "out=mine", "format=torch", "observations=1", "rounds=1"), "holds something that is no export")
    refused(shell("export", "run=run", "net=mlp"), "net cannot change in an export")
    refused(shell("export", "run=run", "overwrite=no"), "overwrite=no must be true or false")
    refused(shell("export", "run=run", "robot=franka"), "robot=franka has 7 joints", "4 action dimensions")
    refused(shell("export", "format=onnx"), "which run?", "dipole export run=FOLDER")
    refused(shell("export", "run=run", "format=onnx", "precision=bf16"), "bf16 is for format=openvino and torch")
    assert (shell.folder / "mine" / "thesis.tex").read_text() == "x"

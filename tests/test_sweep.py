"""Sweeps: every job in its own folder, one table at the end, means over seeds with intervals that hold, and no job lost to another's fault."""
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student_t

from policy.stats import wilson
from scripts import sweep
from scripts.cli import words_to_overrides
from tests.shell import SHORT, TINY, metrics, refused

ROLL = ["+env.max_steps=16", "rollout.episodes=3", "rollout.videos=0", "train.eval=2", "train.steps=2"]


def result(shell, folder: str) -> dict:
    return json.loads((shell.folder / folder / "sweep.json").read_text())


def test_a_failed_job_is_listed_and_loses_no_other_and_resume_does_what_is_missing(shell, run):
    typed = ["train", "-m", "train.seed=0,1", "data.path=late.zarr,demos.zarr", "run=sw", *ROLL, *TINY]
    done = shell(*typed)
    assert done.code == 1 and "Traceback" not in done.out + done.err
    found = result(shell, "sw")
    assert [j["status"] for j in found["jobs"]] == ["failed", "done", "failed", "done"]
    assert all("there is no dataset late.zarr" in j["error"] and "Traceback" in j["traceback"] for j in found["jobs"][::2])
    assert done.out.count("there is no dataset late.zarr") == 4  # when it happens and at the end
    assert [j["folder"] for j in found["jobs"][1::2]] == ["sw/1", "sw/3"]
    late, there = found["groups"]  # the seeds of each value of the other setting
    assert (late["name"], late["jobs"], late["failed"]) == ("data.path=late.zarr", [0, 2], 2) and "success" not in late
    assert (there["name"], there["jobs"], there["failed"]) == ("data.path=demos.zarr", [1, 3], 0)
    scores = [metrics(shell, f"sw/{i}")["score"] for i in (1, 3)]
    assert there["score"] == pytest.approx(np.mean(scores)) and there["success_ci"][0] == 0 and 0.2 < there["success_ci"][1] < 0.57
    assert "data.path=demos.zarr" in (shell.folder / "sw" / "sweep.txt").read_text()

    shutil.copytree(shell.folder / "demos.zarr", shell.folder / "late.zarr")
    before = (shell.folder / "sw/1/checkpoints/policy.json").stat().st_mtime_ns
    done = shell(*typed, "resume=true")
    assert done.code == 0, done.out + done.err
    again = result(shell, "sw")
    assert [j["status"] for j in again["jobs"]] == ["done"] * 4 and again["jobs"][1] == found["jobs"][1]
    assert (shell.folder / "sw/1/checkpoints/policy.json").stat().st_mtime_ns == before
    assert {p.name for p in (shell.folder / "sw").iterdir()} == {"0", "1", "2", "3", "jobs", "multirun.yaml", "sweep.json", "sweep.txt"}


def test_a_job_cut_short_goes_on_from_its_checkpoint(shell, run):
    typed = ["train", "-m", "train.seed=0,1", "data.path=demos.zarr", "run=cut", "train.steps=4", "train.save=2", *TINY]
    assert shell(*typed).code == 0
    whole = (shell.folder / "cut/1/checkpoints/policy.safetensors").read_bytes()
    record = shell.folder / "cut/jobs/1.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "status": "running"}))  # as a killed process leaves it
    done = shell(*typed, "resume=true")
    assert done.code == 0 and "job 0: train.seed=0: done before" in done.out, done.out + done.err
    assert (shell.folder / "cut/1/checkpoints/policy.safetensors").read_bytes() == whole
    refused(shell("train", "resume=true"), "run=FOLDER")


def test_a_dead_job_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["dipole train", "-m", "train.seed=0,1"])
    for n, more in enumerate([{"status": "done", "success": 0.5, "success_ci": [0.4, 0.6]}, {"status": "running"}]):
        sweep._write(tmp_path / "jobs" / f"{n}.json", {"job": n, "overrides": [f"train.seed={n}"], **more})
    assert sweep.finish(tmp_path) == 1
    assert "job 1 failed: did not finish" in capsys.readouterr().out
    assert sweep.finish(tmp_path / "nothing") == 0  # a refused command line has made no jobs


def test_eval_over_samplers_keeps_each_result(shell, run):
    done = shell("eval", "-m", "run=run", "sampler=ddim,heun", *SHORT)
    assert done.code == 0, done.err
    folders = [Path(line.split()[-1]) for line in done.out.splitlines() if line.startswith("report: ")]
    assert [f.parent.name.rpartition("-")[2] for f in folders] == ["sampler=ddim", "sampler=heun"]
    assert shell("eval", "-m", "run=run", "sampler=ddim,heun", "out=cmp", *SHORT).code == 0
    found = result(shell, "cmp")
    assert [j["folder"] for j in found["jobs"]] == ["cmp/0", "cmp/1"] and [g["name"] for g in found["groups"]] == ["sampler=ddim", "sampler=heun"]
    one = metrics(shell, "cmp/1")
    assert one["sampler"]["fn"]["_target_"].endswith("heun") and "-m" not in one["command"].split() and "sampler=heun" in one["command"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher, package", [("joblib", "hydra_joblib_launcher"), ("local", "hydra_submitit_launcher")])
def test_jobs_run_at_once_in_processes_of_their_own(shell, run, launcher, package):
    pytest.importorskip(f"hydra_plugins.{package}", reason="extras sweep, slurm")
    done = shell("train", "-m", "train.seed=0,1", "data.path=absent.zarr,demos.zarr", f"hydra.launcher={launcher}", f"run=by_{launcher}", *ROLL, *TINY)
    assert done.code == 1, done.out + done.err
    jobs = result(shell, f"by_{launcher}")["jobs"]
    assert [j["status"] for j in jobs] == ["failed", "done", "failed", "done"] and "there is no dataset absent.zarr" in jobs[0]["error"]
    assert max(jobs[1]["started"], jobs[3]["started"]) < min(j["started"] + j["wall_s"] for j in jobs[1::2])
    alone = shell("train", "train.seed=1", "data.path=demos.zarr", f"run=alone_{launcher}", *ROLL, *TINY)
    assert alone.code == 0
    assert metrics(shell, f"by_{launcher}/3")["per_episode"] == metrics(shell, f"alone_{launcher}")["per_episode"]
    done = shell("eval", "-m", f"run=by_{launcher}/1,by_{launcher}/3", f"hydra.launcher={launcher}", f"out=eval_{launcher}", *SHORT)
    assert done.code == 0 and [j["status"] for j in result(shell, f"eval_{launcher}")["jobs"]] == ["done", "done"], done.out + done.err


def test_a_launcher_that_is_missing_or_has_no_cluster_is_explained(shell, run):
    pytest.importorskip("hydra_plugins", reason="extras sweep, slurm")
    if not importlib.util.find_spec("hydra_plugins.hydra_ray_launcher"):
        refused(shell("train", "-m", "train.seed=0,1", "hydra.launcher=ray"), "pip install 'dipole[ray]'")
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") and not shutil.which("srun"):
        slurm = ["hydra.launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=240", "hydra.launcher.array_parallelism=8"]
        refused(shell("train", "-m", "train.seed=0,1", *slurm, *TINY), "srun", "HYDRA_FULL_ERROR=1")
    assert words_to_overrides(["-m", "hydra.launcher=slurm"]) == ["-m", "hydra/launcher=submitit_slurm"]


@pytest.mark.parametrize("verb, argv, folder", [
    ("train", ["-m", "run=here", "train.seed=0,1"], "here"),
    ("train", ["--multirun", "run='rün'"], "rün"),
    ("eval", ["-m", "run=a,b", "out=there"], "there"),
    ("eval", ["-m", "run=a"], "outputs/sweep"),
    ("train", ["-m", "run=a,b"], "outputs/sweep"),
    ("train", ["-m", "run=${hydra:job.num}"], "outputs/sweep"),
    ("train", ["-m", "run=a", "hydra.sweep.dir=b"], "b"),
    ("train", ["run=a"], None),
])
def test_where_a_sweep_goes(verb, argv, folder):
    found = sweep.asked(verb, argv)
    assert found is None if folder is None else str(found) == folder or str(found.parent) == folder


def test_student_is_scipys():
    for n in (*range(1, 31), 100, 1000):
        assert sweep.student(n) == pytest.approx(student_t.ppf(0.975, n), abs=5e-4)


@pytest.mark.parametrize("between", [0.0, 0.04])
def test_the_interval_over_seeds_holds(between):
    """Of 2000 sweeps of three training seeds, 100 episodes each, at least 93 % of the intervals hold the mean rate of all trainings."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        rates = np.clip(0.8 + between * rng.standard_normal(3), 0, 1)
        won = rng.binomial(100, rates)
        lo, hi = sweep.across(won / 100, [wilson(int(w), 100) for w in won])
        held.append(lo <= 0.8 <= hi)
    assert 0.93 < np.mean(held) <= 1


def test_seeds_that_agree_prove_no_more_than_their_episodes():
    lo, hi = sweep.across([1.0, 1.0, 1.0], [(0.963, 1.0)] * 3)
    assert hi == 1.0 and lo == pytest.approx(1 - 0.037 / 3**0.5, abs=1e-3)
    assert sweep.across([0.5], [(0.4, 0.6)]) == pytest.approx([0.4, 0.6])
    assert sweep.across([-3.0, -5.0], [(-3, -3), (-5, -5)]) == pytest.approx([-4 - 12.7062, -4 + 12.7062])  # Student's, one degree of freedom

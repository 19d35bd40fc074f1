"""The verbs as a user types them, from a folder that is not the repository: what they leave behind, and what a slip is answered with."""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.shell import ENV, ROOT, SHORT, TINY, Done, Shell, facts, metrics, refused


def test_collect_and_train_say_what_they_left_where(shell, run):
    collected, trained = run
    assert collected.splitlines()[-1].startswith("5 demonstrations, ") and collected.endswith(": demos.zarr\n")
    assert trained.splitlines()[-2:] == [f"trained 4 steps in {trained.split(' in ')[-1].split()[0]} CPU-seconds", "report: run/report.html"]
    left = {p.name for p in (shell.folder / "run").iterdir()}
    assert left == {"checkpoints", "config.yaml", "overrides.json", "report.html", "train.jsonl", "versions.json"}
    assert facts(shell)["step"] == 4
    assert "error" not in shell("data", "info", "path=demos.zarr").err and (shell.folder / "demos.zarr.png").stat().st_size > 5000


def test_eval_leaves_metrics_and_a_report_and_its_command_does_it_again(shell, run):
    done = shell("eval", "run=run", "out=quoted folder", "seed=7", *SHORT)
    assert done.code == 0, done.err
    first = metrics(shell, "quoted folder")
    assert {"task", "episodes", "seeds", "success", "success_ci", "score", "score_ci", "return", "plan_ms", "env_steps_per_s", "wall_s"} <= first.keys()
    assert first["seeds"] == [7, 8, 9] and first["episodes"] == 3 and first["step"] == 4 and set(first["plan_ms"]) == {"p50", "p99"}
    assert done.out.splitlines()[-2].startswith("gantry: success 0.0% [0.0%, 56.1%]")  # Wilson's interval of 0 of 3
    assert (shell.folder / "quoted folder" / "report.html").stat().st_size > 1000
    words = shlex.split(first["command"])
    assert words[:2] == ["dipole", "eval"]
    (shell.folder / "quoted folder" / "metrics.json").unlink()
    assert shell(*words[1:]).code == 0
    again = metrics(shell, "quoted folder")
    assert again["per_episode"] == first["per_episode"] and again["command"] == first["command"]


@pytest.mark.parametrize("overrides, folder, calls", [
    (["sampler=heun"], "policy-*sampler=heun", "heun"),
    (["sampler=ddpm", "sampler.steps=8"], "policy-*sampler.steps=8-sampler=ddpm", "first_order"),
    (["sampler=diffusers", "sampler.fn.name=UniPCMultistep", "sampler.steps=6", "control.execute=4"], "policy-*UniPCMultistep*", "scheduler"),
])
def test_eval_draws_plans_in_other_ways(shell, run, overrides, folder, calls):
    done = shell("eval", "run=run", *overrides, *SHORT)
    assert done.code == 0, done.err
    written, = (shell.folder / "run" / "eval").glob(folder)  # each evaluation has a folder of its own
    found = metrics(shell, f"run/eval/{written.name}")
    assert (written / "train.jsonl").read_text() == (shell.folder / "run" / "train.jsonl").read_text()  # for the curves of its page
    assert found["sampler"]["fn"]["_target_"].endswith(calls)
    execute = found["control"]["execute"]
    assert execute == (4 if "control.execute=4" in overrides else 8) and found["plans"] == 16 // execute
    assert found["steps"] == 3 * 16


def test_an_override_of_one_setting_keeps_the_rest_as_trained(shell, run):
    """sampler.steps alone keeps the sampler the run was trained with, not the default one."""
    assert shell("train", "data.path=demos.zarr", "run=heun", "sampler=heun", "train.steps=1", "control.execute=2", *TINY).code == 0
    assert shell("eval", "run=heun", "sampler.steps=3", "out=few", *SHORT).code == 0
    found = metrics(shell, "few")
    assert found["sampler"]["fn"]["_target_"].endswith("heun") and found["sampler"]["steps"] == 3 and found["control"]["execute"] == 2
    done = shell("eval", "run=heun", "sampler=ddim", "out=other", *SHORT)  # the group itself, chosen once in training and once now
    assert done.code == 0, done.err
    assert metrics(shell, "other")["sampler"]["fn"]["_target_"].endswith("first_order")


def test_another_sampler_or_env_takes_nothing_from_the_trained_one(shell, run):
    """sampler=heun forgets the scheduler that was chosen for training; sampler.fn.name=… alone needs it."""
    unipc = ["sampler=diffusers", "sampler.fn.name=UniPCMultistep", "sampler.steps=4", "+env.max_steps=16"]
    assert shell("train", "data.path=demos.zarr", "run=unipc", "train.steps=1", *unipc, *TINY).code == 0

    def sampled(*said: str) -> tuple[str, int, int]:
        done = shell("eval", "run=unipc", "out=unipc-eval", "episodes=2", "videos=0", *said)
        assert done.code == 0, done.err
        found = metrics(shell, "unipc-eval")
        return found["sampler"]["fn"].get("name", found["sampler"]["fn"]["_target_"].rsplit(".", 1)[-1]), found["sampler"]["steps"], found["steps"]

    assert sampled("sampler=heun") == ("heun", 10, 2 * 16)
    assert sampled("sampler=heun", "sampler.steps=3") == ("heun", 3, 2 * 16)
    assert sampled("sampler.fn.name=DEISMultistep") == ("DEISMultistep", 4, 2 * 16)
    assert "episodes=2 videos=0 sampler.fn.name=DEISMultistep" in metrics(shell, "unipc-eval")["command"]
    assert sampled("env=gantry") == ("UniPCMultistep", 4, 2 * 100)
    refused(shell("eval", "run=unipc", "sampler.stpes=3"), "no setting 'sampler.stpes'", "sampler.steps")
    refused(shell("eval", "run=unipc", "env.max_stps=3"), "no setting 'env.max_stps'", "+env.max_stps=…")
    assert shell("train", "run=unipc", "resume=true", "sampler=heun").code == 0
    assert sampled("control.execute=4")[0] == "heun"


def test_what_a_run_was_trained_with_stays_but_for_what_is_said_now():
    from scripts.common import remembered
    before = ["env=maze", "env.size=medium", "+env.max_steps=9", "sampler=heun", "sampler.steps=5", "net.widths=[8,16]", "envelope=1"]
    groups = {"env", "sampler", "net"}
    assert remembered(before, ["sampler.steps=4"], groups) == [b for b in before if b != "sampler.steps=5"]
    assert remembered(before, ["env=gantry"], groups) == [b for b in before if not b.startswith(("env=", "env.", "+env."))]
    assert remembered(before, ["env.max_steps=3"], groups) == before  # which it added before
    assert remembered(before, ["+env.max_steps=3"], groups) == [b for b in before if b != "+env.max_steps=9"]
    assert remembered(before, ["~env.size"], groups) == before


def test_resume_goes_on_to_more_steps(shell, run):
    assert shell("train", "data.path=demos.zarr", "run=more", "train.steps=2", *TINY).code == 0
    done = shell("train", "run=more", "resume=true", "train.steps=5")
    assert done.code == 0, done.err
    assert "steps: 2 -> 5" in done.out and facts(shell, "more")["step"] == 5
    assert facts(shell, "more")["planner"]["net"]["widths"] == [8, 16]  # as it was started
    assert [json.loads(line)["step"] for line in (shell.folder / "more" / "train.jsonl").read_text().splitlines()] == [2, 5]


def test_paths_and_commands_are_not_broken_where_a_terminal_ends(shell, run, tmp_path):
    long = tmp_path / ("long_folder-" * 8)
    server = Shell(shell.folder, COLUMNS="60")
    try:
        done = server("eval", "run=run", f"out={long}", "+env.max_steps=2", "episodes=1", "videos=0")
    finally:
        server.close()
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"report: {long}/report.html" and "over 1 distinct seed;" in done.out
    assert json.loads((long / "metrics.json").read_text())["command"].startswith(f"dipole eval run=run out={long}")


def test_eval_records_what_happened_as_demonstrations(shell, run):
    """The recorded actions, replayed from the seeds, show the recorded observations bit for bit; a second evaluation is appended."""
    from envs.gantry import Gantry
    from envs.task import TaskEnv
    from policy.data import Store
    for seed, how in ((7, ["copies=2"]), (100, ["lanes=2", "copies=2"])):
        done = shell("eval", "run=run", "out=recorded", "+env.max_steps=11", "episodes=3", f"seed={seed}", "videos=0", "record=policy.zarr", *how)
        assert done.code == 0, done.err
    store, env = Store.open(shell.folder / "policy.zarr"), TaskEnv(Gantry(max_steps=11))
    assert (store.episodes, store.fps, store.attrs["task"], store.attrs["policy"]) == (6, 10, "gantry", "run, policy")
    assert store.attrs["action"] == Store.open(shell.folder / "demos.zarr").attrs["action"]
    assert (store.attrs["action"]["kind"], store.attrs["action"]["of"]) == ("absolute", "hand")
    starts = set()
    for i in range(6):
        got = store.episode(i)
        matching = [seed for seed in (7, 8, 9, 100, 101, 102) if all(np.array_equal(x, got[k][0]) for k, x in env.reset(seed=seed)[0].items())]
        assert len(matching) == 1 and len(got["action"]) == 11
        starts.add(matching[0])
        obs, _ = env.reset(seed=matching[0])
        for k in range(11):
            assert set(obs) == set(got) - {"action", "reward"}
            for key in obs:
                np.testing.assert_array_equal(obs[key], got[key][k])
            obs, reward, *_ = env.step(got["action"][k])
            assert reward == got["reward"][k]
    assert len(starts) == 6
    done = shell("eval", "run=run", "out=recorded", "+env.max_steps=11", "episodes=2", "videos=0", "record=policy.zarr", "record_only=success")
    assert done.code == 0 and Store.open(shell.folder / "policy.zarr").episodes == 6  # a policy of four steps of training
    assert "use all or success" in shell("eval", "run=run", "out=recorded", "episodes=1", "record=policy.zarr", "record_only=good").err


@pytest.mark.gl
def test_eval_films_failures_first(shell, run):
    done = shell("eval", "run=run", "out=film", "+env.max_steps=4", "episodes=2", "videos=1")
    assert done.code == 0, done.err
    if "no videos" in done.out:
        pytest.skip(done.out)
    video, = metrics(shell, "film")["videos"]
    assert (shell.folder / "film" / video["file"]).stat().st_size > 1000 and not video["success"]


@pytest.mark.parametrize("verb", ["train", "eval", "collect", "data info"])
def test_help_shows_three_commands(shell, verb):
    done = shell(*verb.split(), "--help")
    assert done.code == 0 and len([line for line in done.out.splitlines() if line.startswith(f"  dipole {verb} ")]) >= 3


@pytest.mark.parametrize("argv, words", [
    (["train", "trian.steps=1"], ["no setting 'trian.steps'", "train.steps", "dipole train --help"]),
    (["train", "recpe=gantry"], ["no setting 'recpe'", "Did you mean recipe"]),
    (["train", "env.max_stps=3"], ["no setting 'env.max_stps'", "+env.max_stps=…"]),
    (["train", "net=unet9d"], ["no net=unet9d", "Did you mean net=unet1d"]),
    (["train", "train.seed=0,1"], ["Ambiguous value", "train.seed=0,1"]),
    (["eval"], ["run=FOLDER"]),
    (["eval", "run=demos.zarr"], ["demos.zarr is not a training run", "config.yaml"]),
    (["eval", "run=run", "checkpoint=best"], ["no checkpoint", "there are last, policy"]),
    (["eval", "run=run", "env=pusht"], ["does not fit pusht", "'hand' is missing, trained on (3,)", "2 dimensions, trained on 4", "on its own task"]),
    (["eval", "run=run", "sampler=diffusers", "sampler.fn.name=FlowMatchEulerDiscrete"], ["schedule=linear, not Cosine"]),
    (["eval", "run=run", "sampler=diffusers", "sampler.fn.name=Unipc"], ["no scheduler 'Unipc'", "UniPCMultistep"]),
    (["eval", "run=run", "control.execute=17"], ["execute=17", "horizon 16"]),
    (["train", "run=run", "data.path=demos.zarr"], ["run already holds a run", "resume=true", "another run="]),
    (["train", "run=run", "resume=true", "recipe=pusht_human"], ["keeps its recipe"]),
    (["train", "resume=true"], ["run=FOLDER"]),
    (["train", "run=nowhere", "resume=true"], ["nowhere is not a training run"]),
    (["train", "run=new", "data.path=absent.zarr"], ["absent.zarr", "data.path=", "dipole collect"]),
    (["train", "run=new", "data.path=run"], ["run is not a zarr group", "data/ and meta/"]),
    (["train", "run=new", "data.path=demos.zarr", "data.action=motion"], ["'motion' is not in demos.zarr", "known: action, cube"]),
    (["train", "recipe=pusht_human"], ["data.path has no value", "data.path=…"]),
    (["train", "run=new", "data.path=demos.zarr", "net.widths=[12]"], ["widths [12] must be multiples of groups=8"]),
    (["collect", "env=pusht", "path=new.zarr"], ["pusht has no scripted expert"]),
    (["collect", "path=demos.zarr"], ["demos.zarr already holds data"]),
    (["collect", "env=maze", "env.map=umaze", "path=new.zarr"], ["env.size=umaze"]),
    (["collect", "env=robosuite", "path=new.zarr"], ["pip install", "robosuite"]),
    (["collect", "episodes=-1", "path=new.zarr"], ["episodes=-1 must be a whole number from 1"]),
    (["collect", "episodes=many", "path=new.zarr"], ["episodes='many' must be a whole number from 1"]),
    (["collect", "seed=-1", "path=new.zarr"], ["seed=-1 must be a whole number from 0"]),
    (["collect", "seed=abc", "path=new.zarr"], ["seed='abc' must be a whole number from 0"]),
    (["collect", "noise=abc", "path=new.zarr"], ["noise='abc'", "noise=0.01"]),
    (["collect", "noise=[.1,.2]", "path=new.zarr"], ["noise=[0.1, 0.2]", "4 numbers"]),
    (["collect", "noise=-1", "path=new.zarr"], ["noise=-1"]),
    (["collect", "workers=-1", "path=new.zarr"], ["workers=-1 must be a whole number from 0"]),
    (["eval", "run=run", "videos=-1"], ["videos=-1 must be a whole number from 0"]),
    (["eval", "run=run", "seed=-5"], ["seed=-5 must be a whole number from 0"]),
    (["eval", "run=run", "seed=abc"], ["seed='abc' must be a whole number from 0"]),
    (["train", "run=new", "data.path=demos.zarr", "train.seed=abc"], ["train.seed='abc' must be a whole number from 0"]),
    (["eval", "delay", "run=run", "videos=-1"], ["videos=-1"]),
    (["data", "info"], ["path has no value"]),
    (["data", "info", "path=absent.zarr"], ["absent.zarr does not exist"]),
    (["data", "inf", "path=demos.zarr"], ["use one of: dipole data info"]),
])
def test_a_slip_is_answered_without_a_traceback(shell, run, argv, words):
    refused(shell(*argv), *words)
    assert not (shell.folder / "new.zarr").exists()


def test_a_refused_training_leaves_its_folder_free(shell, run):
    refused(shell("train", "run=later", "data.path=absent.zarr"), "absent.zarr")
    assert not (shell.folder / "later").exists()


def test_the_installed_command_and_the_script_are_the_same(tmp_path):
    """In processes of their own, from another folder; a mistake shows its traceback on request."""
    def typed(*argv: str, **env: str) -> Done:
        done = subprocess.run([*argv, "info", "path=absent.zarr"], cwd=tmp_path, env={**ENV, **env}, capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)

    refused(typed(sys.executable, str(ROOT / "scripts" / "data.py")), "absent.zarr does not exist")
    full = typed(str(Path(sys.executable).with_name("dipole")), "data", HYDRA_FULL_ERROR="1")
    assert full.code == 1 and "Traceback" in full.err and "DataError: absent.zarr does not exist" in full.err


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    from scripts.verb import verb

    @verb("data_info")
    def main(cfg):
        [].pop()

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["dipole data", "path=bug"])
    with pytest.raises(IndexError, match="pop from empty list"):
        main()
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_collect_stores_every_demonstration(tmp_path):
    """More than one chunk of appends, none lost at their borders."""
    from envs.gantry import Gantry
    from scripts.collect import collect
    assert collect(Gantry(), tmp_path / "d.zarr", episodes=60, seed=10_000, noise=None).episodes == 60


@pytest.mark.parametrize("command, says", [
    (["eval", "run=run", "schedule=vp"], ["schedule cannot change after training", "sampler"]),
    (["eval", "run=run", "horizon=8"], ["horizon cannot change"]),
    (["train", "run=run", "resume=true", "denoiser.target=eps"], ["another denoiser", "start a new run"]),
    (["train", "run=run", "resume=true", "net.widths=[64,128]"], ["another net"]),
    (["train", "run=bad", "data.path=demos.zarr", "train.batch=0"], ["train.batch=0"]),
    (["train", "run=bad", "data.path=demos.zarr", "train.log=0"], ["train.log=0"]),
    (["train", "run=bad", "data.path=demos.zarr", "train.steps=-2"], ["train.steps=-2"]),
    (["train", "run=bad", "data.path=demos.zarr", "device=quantum"], ["device=quantum", "device=auto"]),
    (["train", "run=bad", "data.path=demos.zarr", "env.pillar=true"], ["was recorded with env.pillar=false", "training for env.pillar=true"]),
    (["train", "run=bad", "data.path=demos.zarr", "env=pusht"], ["not a recording of pusht", "hand", "env=none"]),
    (["eval", "run=run", "episodes=0"], ["episodes=0"]),
    (["eval", "run=run", "sampler.steps=abc"], ["sampling steps"]),
    (["eval", "run=run", "env._target_=envs.nope.X"], ["envs.nope.X"]),
    (["eval", "run=run", "env._target_=envs.render.mujoco.MjModel"], ["trusted"]),
    (["eval", "there"], ["written key=value"])])
def test_what_would_be_ignored_or_break_later_is_refused_now(shell, run, command, says):
    done = shell(*command)
    assert done.code == 1 and "Traceback" not in done.err
    assert all(word in done.err for word in says), done.err
    assert not (shell.folder / "bad" / "config.yaml").exists()


def test_a_resumed_run_remembers_its_new_length_and_paths_may_be_unicode(shell, run):
    assert shell("train", "data.path=demos.zarr", "run=rün", "train.steps=2", *TINY).code == 0
    assert shell("train", "run=rün", "resume=true", "train.steps=4").code == 0
    assert "steps: 4" in (shell.folder / "rün" / "config.yaml").read_text()
    done = shell("train", "run=rün", "resume=true")
    assert done.code == 0 and "trained 4 steps" in done.out, done.err

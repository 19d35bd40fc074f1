"""dipole distill: an ordinary run comes out, resumed bit for bit, from what the teacher learned; and what cannot be taught is refused."""
import pytest
from omegaconf import OmegaConf

from policy.train import checkpoint
from tests.shell import SHORT, facts, metrics, refused

FEW = ["train.batch=8", "train.warmup=1", "log.wandb=disabled", "train.precision=fp32"]


@pytest.fixture(scope="module")
def teacher(shell, run):
    done = shell("train", "recipe=gantry", "formalism=flow", "data.path=demos.zarr", "run=teacher", "train.steps=4", "net.widths=[8,16]", "net.groups=4",
                 "net.time_dim=16", "control.execute=4", *FEW)
    assert done.code == 0, done.err
    return "teacher"


def test_a_student_is_an_ordinary_run_that_plans_in_one_call(shell, teacher):
    done = shell("distill", "run=teacher", "out=student", "train.steps=3", *FEW)
    assert done.code == 0 and "trained 3 steps" in done.out, done.err
    planner, about = checkpoint.load(shell.folder / "student")
    old, _ = checkpoint.load(shell.folder / "teacher")
    assert planner.calls == 1 and old.calls == 10 and planner.denoiser.target == "flow" and planner.spec == old.spec
    assert about["planner"]["net"]["widths"] == [8, 16] and "teacher" not in str(about["planner"]["objective"])
    moved = max((a - b).abs().max().item() for a, b in zip(planner.parameters(), old.parameters(), strict=True))
    assert 0 < moved < 0.05  # it started from the teacher
    assert shell("eval", "run=student", "out=one", *SHORT).code == 0 and shell("eval", "run=student", "sampler.steps=2", "out=two", *SHORT).code == 0
    assert metrics(shell, "one")["calls"] == 1 and metrics(shell, "two")["calls"] == 2 and metrics(shell, "two")["control"]["execute"] == 4
    refused(shell("eval", "run=student", "sampler=heun", "sampler.steps=3", "out=three", *SHORT), "only sampler=consistency plans with it")


def test_the_demos_own_policy_can_be_a_teacher(shell, run):
    """recipe=gantry predicts x0."""
    assert shell("distill", "run=run", "out=quick", "train.steps=2", *FEW).code == 0
    assert checkpoint.load(shell.folder / "quick")[0].calls == 1


def test_a_resumed_student_still_has_its_teacher(shell, teacher):
    assert shell("distill", "run=teacher", "out=more", "train.steps=2", *FEW).code == 0
    assert shell("train", "run=more", "resume=true", "train.steps=5").code == 0 and facts(shell, "more")["step"] == 5
    (shell.folder / "teacher").rename(shell.folder / "away")
    try:
        refused(shell("train", "run=more", "resume=true", "train.steps=9"), "teacher")
    finally:
        (shell.folder / "away").rename(shell.folder / "teacher")


@pytest.mark.parametrize("words, says", [
    (["distill", "run=teacher", "out=student"], "already holds a run"),
    (["distill", "run=teacher", "out=x", "net.widths=[8]"], "net cannot differ"),
    (["distill", "run=teacher", "out=x", "denoiser.target=v"], "denoiser cannot differ"),
    (["distill", "run=nowhere"], "not a training run"),
    (["distill"], "which teacher"),
    (["distill", "run=mip", "out=x"], "cannot teach: it was trained at a few noise times only"),
    (["distill", "run=student", "out=x"], "cannot teach: a consistency model jumps"),
    (["distill", "run=eps", "out=x"], "denoiser.target=v, flow, edm or x0"),
    (["train", "data.path=demos.zarr", "teacher=teacher", "run=x"], "dipole distill"),
    (["train", "data.path=demos.zarr", "formalism=consistency", "denoiser.target=eps", "run=x"], "denoiser.target=v, flow, edm or x0"),
    (["train", "data.path=demos.zarr", "density=beta", "+objective.density.std=2", "run=x"], "objective"),
    (["train", "data.path=demos.zarr", "objective.weight=heavy", "run=x"], "simple, x0"),
    (["train", "data.path=demos.zarr", "formalism=vp_sde", "density=discrete", "objective.density.taus=[2.0]", "run=x"], "noise times from 0 to 1"),
    (["train", "data.path=demos.zarr", "formalism=regression", "sampler=ddim", "sampler.spacing=trailing", "run=x"], "noise times [1.0] only"),
    (["train", "data.path=demos.zarr", "formalism=edm", "objective.weight=elbo", "run=x"], "uniform times"),
    (["train", "data.path=demos.zarr", "schedule=cosine", "+schedule.tau_max=0.1", "run=x"], "the data still show"),
    (["train", "data.path=demos.zarr", "net.activation=foo", "run=x"], "silu, mish"),
    (["train", "data.path=demos.zarr", "formalism=ddpm", "sampler.steps=200", "run=x"], "at most 100"),
    (["train", "data.path=demos.zarr", "formalism=flow", "sampler=diffusers", "run=x"], "integrates"),
])
def test_what_cannot_be_distilled_is_refused(shell, teacher, words, says):
    if "run=eps" in words and not (shell.folder / "eps").exists():
        assert shell("train", "formalism=ddpm", "data.path=demos.zarr", "run=eps", "train.steps=1", "net.widths=[8,16]", "net.groups=4", "net.time_dim=16",
                     *FEW).code == 0
    if "run=mip" in words and not (shell.folder / "mip").exists():
        assert shell("train", "formalism=mip", "data.path=demos.zarr", "run=mip", "train.steps=1", "net=mlp", "net.width=8", *FEW).code == 0
    if {"out=student", "run=student"} & set(words) and not (shell.folder / "student").exists():
        assert shell("distill", "run=teacher", "out=student", "train.steps=1", *FEW).code == 0
    refused(shell(*words), says)
    assert not (shell.folder / "x").exists()


def test_a_sampler_that_is_named_is_that_sampler_whole(shell, run):
    """formalism=edm says sampler.spacing=karras of its own sampler; hydra would let that win over conf/sampler/langevin.yaml."""
    trained = shell("train", "recipe=gantry", "formalism=edm", "sampler=langevin", "data.path=demos.zarr", "run=named", "train.steps=1", "net=mlp",
                    "net.width=8", *FEW)
    assert trained.code == 0, trained.err
    for words, spacing, steps in ((["out=n1"], "logsnr", 30), (["out=n2", "sampler.steps=3"], "logsnr", 3), (["out=n3", "sampler=ddim"], "trailing", 10)):
        assert shell("eval", "run=named", *words, *SHORT).code == 0
        sampler = OmegaConf.load(shell.folder / words[0].removeprefix("out=") / "config.yaml").sampler
        assert (sampler.spacing, sampler.steps) == (spacing, steps)

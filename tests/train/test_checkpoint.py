"""Checkpoints: what they refuse, and that a loaded planner is the one that was trained."""
import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from policy.train import checkpoint
from policy.train.log import Log
from policy.train.loop import Settings, Trainer
from policy.types import Spec
from tests.helpers import CONFIG, make_data, make_planner, make_store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = make_data(make_store(folder / "d.zarr"))
    trainer = Trainer(make_planner(data), data, folder, Settings(steps=30, batch=16, warmup=2, log=10, precision="fp32"), config=CONFIG)
    with Log(folder, wandb="disabled") as log:
        trainer.run(log)
    return trainer


def test_a_loaded_planner_plans_the_same(run):
    planner, facts = checkpoint.load(run.folder)
    obs, noise = {"x": torch.full((3, 2, 3), 5.0)}, torch.randn(3, 8, 2)
    with run.ema.applied():
        want = run.planner.eval().plan(obs, noise=noise)
    torch.testing.assert_close(planner.plan(obs, noise=noise), want, rtol=0, atol=0)
    assert planner.spec == run.planner.spec and facts["step"] == 30
    assert json.loads((run.folder / "checkpoints" / "policy.json").read_text())["step"] == 30


def test_a_damaged_or_foreign_file_is_refused(run, tmp_path):
    good = (run.folder / "checkpoints" / "policy.safetensors").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "policy.safetensors"
    for bad in (good[: len(good) // 2], b"", b"garbage" * 100):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load(tmp_path)
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by dipole"):
        checkpoint.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="dipole train"):
        checkpoint.load(tmp_path / "nowhere")


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "subprocess.Popen", "policyevil.Net", "torch.load", "policy.train.checkpoint.write",
                                    "policy.nets.blocks.torch.hub.load", "policy.diffusion.from_diffusers.diffusers.DDIMPipeline",
                                    "policy.nets.blocks.no_such"])
def test_a_checkpoint_cannot_name_code_to_run(run, tmp_path, target):
    tensors, facts = checkpoint.read(run.folder / "checkpoints" / "policy.safetensors")
    for place in ("net", "encoder", "schedule", "sampler", "guides"):
        evil = copy.deepcopy(facts)
        evil["planner"][place] = {"fn": {"_target_": target}, "steps": 3} if place in ("sampler", "guides") else {"_target_": target}
        checkpoint.write(tmp_path / "checkpoints" / "policy.safetensors", tensors, evil)
        with pytest.raises(ValueError, match=r"trusted|does not import"):
            checkpoint.load(tmp_path)


def test_a_policy_refuses_another_task(run):
    with pytest.raises(ValueError, match=r"trained for toy.*gantry.*'x' is missing.*4 dimensions, trained on 2.*20.0 Hz, trained at 10"):
        run.planner.spec.check({"hand": (3,)}, 4, 20.0, "gantry")
    with pytest.raises(ValueError, match=r"'x' is \(4,\), trained on \(3,\)"):
        run.planner.spec.check({"x": (4,)}, 2, 10.0, "toy")
    run.planner.spec.check({"x": (3,), "more": (5,)}, 2, 10.0, "toy")
    assert Spec.from_json(json.loads(json.dumps(run.planner.spec.to_json()))) == run.planner.spec


def test_weights_of_another_net_are_refused(run, tmp_path):
    tensors, facts = checkpoint.read(run.folder / "checkpoints" / "policy.safetensors")
    facts["planner"]["net"]["widths"] = [16, 16]
    checkpoint.write(tmp_path / "checkpoints" / "policy.safetensors", tensors, facts)
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.load(tmp_path)

"""`dipole serve` as it is typed: what it serves, how it ends, and what a slip is answered with."""
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("websockets", reason="pip install 'dipole[serve]'")
pytest.importorskip("prometheus_client", reason="pip install 'dipole[serve]'")
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from policy.data.normalize import Normalizer
from policy.serve.backend import PlannerBackend
from policy.serve.client import PlannerClient
from policy.train import checkpoint
from policy.types import Spec
from scripts import common
from tests.serve.far import ROOT, Far

TINY = ["recipe=gantry", "net.widths=[8,16]", "net.groups=4", "net.time_dim=16"]
SPEC = Spec({"hand": (3,), "goal": (2,)}, 4, task="Gantry", units={"action": "m"})
TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose policy has random weights."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    with initialize_config_module("conf", version_base=None):
        cfg = compose("train", TINY)
    torch.manual_seed(0)
    config = common.planner_config(cfg)
    planner = checkpoint.build(config, SPEC, Normalizer({**SPEC.obs, "action": (4,)}))
    facts = {"spec": SPEC.to_json(), "planner": config, "step": 3, "cpu_s": 1.0}
    checkpoint.write(folder / "checkpoints/policy.safetensors", {f"model/{k}": v for k, v in planner.state_dict().items()}, facts)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return folder


def serve(*argv: str, **env: str) -> Far:
    return Far([sys.executable, "-m", "scripts.cli", "serve", "port=0", *argv], env, timeout=120)


def test_it_serves_the_plans_of_the_run(run, tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    far = serve(f"run={run}", "sampler.steps=4", f"token_file={tmp_path / 'token'}", "delay=0.05")
    try:
        planner, _ = checkpoint.load(run)
        planner.set_sampler(planner.sampler, 4)
        with PlannerClient(far.url, token=TOKEN) as client:
            card = client.wait_ready(30)
            assert (card.task, card.action_dim, card.dt, card.units) == ("Gantry", 4, 0.1, {"action": "m"})
            assert card.facts["run"] == "toy" and card.facts["calls"] == 4 and card.facts["control"]["execute"] == 8
            obs = {"hand": np.full((2, 3), 0.1, np.float32), "goal": np.zeros((2, 2), np.float32)}
            for seed in range(3):
                noise = np.random.default_rng(seed).standard_normal((16, 4), np.float32)
                chunk = client.plan(obs, seed=seed, timeout=30)
                assert np.allclose(chunk.actions, PlannerBackend(planner).plan(obs, noise=noise), atol=1e-4) and chunk.plan_ms > 50
        assert far.end() == 0
    finally:
        far.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("argv, words", [
    ([], ["run=FOLDER", "artifact=FOLDER"]), (["run=nowhere"], ["nowhere", "config.yaml"]), (["do=something", "run=x"], ["something"]),
    (["run={run}", "precision=fp8"], ["fp8"]), (["run={run}", "host=0.0.0.0"], ["token", "DIPOLE_TOKEN"]), (["run={run}", "port=-1"], ["port=-1"]),
    (["run={run}", "tls.cert=x"], ["tls.key"]), (["run={run}", "prot=1"], ["port"]), (["run={run}", "token_file=/nowhere"], ["/nowhere"]),
    (["artifact={run}", "sampler.steps=3"], ["sampler"]), (["run={run}", "checkpoint=policy_7"], ["policy_7"])])
def test_a_slip_is_answered_with_what_to_do(run, argv, words):
    command = [sys.executable, "-m", "scripts.cli", "serve", *(a.format(run=run) for a in argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr

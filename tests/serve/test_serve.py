"""`dipole serve` as it is typed: what it serves, how it ends, and what a slip is answered with."""
import os
import signal
import socket
import subprocess
import sys
import time

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
from scripts import common, policies
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
    (["run={run}", "precision=fp8"], ["fp8"]), (["run={run}", "host=0.0.0.0"], ["TLS", "insecure=true"]), (["run={run}", "port=-1"], ["port=-1"]),
    (["run={run}", "port=99999"], ["port=99999", "65535"]), (["run={run}", "port={taken}"], ["{taken} of 127.0.0.1 is taken", "port=…"]),
    (["run={run}", "host=nowhere.invalid", "insecure=true"], ["host=nowhere.invalid is no name or address"]),
    (["run={run}", "tls.cert=/nowhere.pem", "tls.key=/no.pem"], ["tls.cert=/nowhere.pem is no file"]),
    (["run={run}", "insecure=no"], ["insecure=no", "true or false"]), (["run={run}", "delay=soon"], ["delay='soon'"]),
    (["run={run}", "tls.cert=x"], ["tls.key"]), (["run={run}", "prot=1"], ["port"]), (["run={run}", "token_file=/nowhere"], ["/nowhere"]),
    (["artifact={run}", "sampler.steps=3"], ["sampler"]), (["artifact={run}"], ["is a training run", "run={run}"]),
    (["run={run}", "limits.bytes=10"], ["limits.bytes=10", "1024"]), (["run={run}", "control.merge=guidd"], ["control.merge=guidd", "guided"]),
    (["run={run}", "control.execute=100"], ["control.execute=100", "horizon 16"]), (["run={run}", "checkpoint=policy_7"], ["policy_7"])])
def test_a_slip_is_answered_with_what_to_do(run, argv, words):
    with socket.create_server(("127.0.0.1", 0)) as s:
        names = {"run": run, "taken": s.getsockname()[1]}
        command = [sys.executable, "-m", "scripts.cli", "serve", *(a.format(**names) for a in argv)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, "DIPOLE_TOKEN": TOKEN})
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word.format(**names) in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("control, words", [
    ({"merge": "guidd"}, "control.merge=guidd .* guided"), ({"merge": "prefix"}, "train.rtc"), ({"execute": 17}, "control.execute=17 .* horizon 16"),
    ({"execute": "x"}, "control.execute='x'"), ({"execute": 0}, "control.execute=0"), ({"delay": -5}, "control.delay=-5"),
    ({"warm": "yes"}, "control.warm=yes"), ({"warm": float("nan")}, "control.warm=nan"), ({"warm": 2}, "control.warm=2"), ({"warm": True}, "control.warm=True"),
    ({"limit": "x"}, "control.limit='x'")])
def test_control_that_no_plan_can_follow_is_refused(control, words):
    """In serve and export: both take the policy from policies.policy_of."""
    policies.check_control({"execute": 16, "merge": "prefix", "warm": 1}, 16, 4)
    with pytest.raises(ValueError, match=words):
        policies.check_control(control, 16, 0)


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.6, 1.2, 1.8, 2.4, 3.0, 3.6, 6.0])
def test_ctrl_c_ends_it_quietly_whatever_it_does(run, after):
    """130 while it loads, 0 once it serves, and no traceback."""
    process = subprocess.Popen([sys.executable, "-m", "scripts.cli", "serve", f"run={run}", "port=0", "delay=0.2"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == (0 if "ready" in out else 130) and not err, (out, err)

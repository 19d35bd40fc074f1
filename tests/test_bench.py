"""dipole bench: what is timed is what it says, and both sides of a ratio do the same work."""
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from envs.batch import BatchEnv
from envs.simulator import Simulator
from policy.serve.measure import PARITY
from scripts import bench_evaluate, bench_rollout
from tests.shell import refused


def test_bare_physics_is_the_batchs():
    task, n = bench_rollout.TASK(), 3
    space = task.action_space
    actions = bench_rollout.held(space.low, space.high, n, 16)
    assert actions.shape == (n, 16, 2) and (actions[:, :5] == actions[:, :1]).all() and (actions[:, 5] != actions[:, 4]).any()
    bare, batch = bench_rollout.Bare(task, n, 2), BatchEnv(task, n, threads=1)
    bare.reset(seed=7)
    batch.reset(seed=7)
    for k in (0, 8):
        bare.step_chunk(actions[:, k: k + 8])
        batch.step_chunk(actions[:, k: k + 8])
    nq = task.model.nq  # the full state is time, qpos, qvel, …
    np.testing.assert_allclose(bare.state[:, 1: 1 + nq], batch.state.qpos, atol=1e-9)
    bare.close()


class Sleeper:
    """An environment whose step takes a known time."""

    action_space = bench_rollout.TASK().action_space

    def __init__(self, seconds: float):
        self.seconds, self.closed = seconds, False

    def reset(self, *, seed: int) -> None:
        time.sleep(0.02)

    def step_chunk(self, actions: np.ndarray) -> None:
        time.sleep(self.seconds * actions.shape[1])

    def close(self) -> None:
        self.closed = True


def test_steps_per_second_count_every_copy_and_leave_the_reset_out():
    slow, fast = Sleeper(0.002), Sleeper(0.001)
    rows = bench_rollout.throughput({"slow": (4, slow, bench_rollout.chunked), "fast": (4, fast, bench_rollout.chunked)}, blocks=2)
    assert 0.7 * 4 / 0.002 < rows["slow"]["steps_per_s"] <= 4 / 0.002 and 0.7 * 4 / 0.001 < rows["fast"]["steps_per_s"] <= 4 / 0.001
    assert len(rows["slow"]["blocks"]) == 2 and slow.closed and fast.closed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpu_seconds_see_the_children():
    before = bench_rollout.cpu_seconds()
    code = "import time\nt = time.process_time()\nwhile time.process_time() - t < .3: pass\nprint(flush=True); time.sleep(20)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 0.28 < bench_rollout.cpu_seconds() - before < 1.0
        child.kill()


def test_the_clock_of_the_physics_is_taken_off_again():
    before = Simulator.run
    task = bench_rollout.TASK()
    batch = BatchEnv(task, 2, threads=1)
    batch.reset(seed=0)
    with bench_evaluate.timed() as seconds:
        batch.step_chunk(np.full((2, 8, 2), 200.0))
    assert len(seconds) == 1 and 0 < seconds[0] < 1 and Simulator.run is before


def test_an_evaluation_is_taken_apart_and_its_scores_are_paired(shell, run):
    folder = shell.folder / "run"
    trained, threads = (folder / "config.yaml").read_text(), torch.get_num_threads()
    try:
        (folder / "config.yaml").write_text(trained.replace("pillar: false", "pillar: false\n  max_steps: 16"))
        cfg = OmegaConf.create({"run": str(folder), "checkpoint": "policy", "episodes": 3, "seed": 100000,
                                "evaluations": ["fp32 1x3", "fp32 2x2", "bf16 1x3 2 threads"]})
        rows = bench_evaluate.measure(cfg)
    finally:
        (folder / "config.yaml").write_text(trained)
    assert [r["steps"] for r in rows.values()] == [48, 48, 48] and torch.get_num_threads() == threads
    for r in rows.values():
        assert sum(r["shares"].values()) == pytest.approx(1) and all(-0.02 < s < 1 for s in r["shares"].values())
        assert r["cpu_s"] > 0 and r["difference"] == 0 and r["equal"] == 3
    assert "3 episodes in " in bench_evaluate.headline(rows)
    bench_evaluate.show(rows)
    for way in ("fp64 1x3", "fp32 3"):
        with pytest.raises(ValueError, match="is no way to evaluate"):
            bench_evaluate.one(cfg, None, way)


@pytest.mark.slow
def test_a_closed_loop_stays_on_the_device(shell, run):
    pytest.importorskip("mujoco_warp", reason="extra warp")
    cfg = OmegaConf.create({"run": str(shell.folder / "run"), "checkpoint": "policy"})
    found = bench_evaluate.on_device(cfg, OmegaConf.load(shell.folder / "run" / "config.yaml"), device="cpu", worlds=4, chunks=3)
    assert found["steps"] == 4 * 8 * 3 and found["steps_per_s"] > 0


@pytest.mark.slow
def test_bench_rollout_prints_every_way_and_keeps_the_figures(shell, run):
    pytest.importorskip("gym_pusht", reason="extra pymunk")
    done = shell("bench", "rollout", "copies=4", "blocks=1", "tasks=[maze]", "run=elsewhere")
    assert done.code == 0, done.err
    rows = json.loads((shell.folder / "elsewhere" / "bench" / "rollout.json").read_text())["rows"]
    assert len(rows["push-t"]) >= 11 and set(rows["tasks"]) == {"maze"} and rows["evaluations"] == {}
    assert rows["push-t"][bench_rollout.OURS]["ratio"] == 1 and all(r["steps_per_cpu_s"] > 0 for r in rows["push-t"].values())
    assert "x AsyncVectorEnv" in done.out and "x gym-pusht" in done.out and "no evaluation is measured" in done.out
    refused(shell("bench", "rolout"), "dipole bench rollout")


@pytest.mark.slow
def test_the_bench_of_plans_names_every_way(shell):
    pytest.importorskip("onnxscript", reason="pip install 'dipole[export]'")
    pytest.importorskip("onnxruntime", reason="pip install 'dipole[onnx]'")
    done = shell("bench", "deploy", "run=.", "deploy.widths=[8,16]", "deploy.steps=4", "rounds=1")
    assert done.code == 0, done.err
    rows = json.loads((shell.folder / "bench" / "deploy.json").read_text())["rows"]
    assert list(rows)[:4] == ["diffusers loop", "Planner.plan", "FastPlan", "ONNX Runtime"]
    assert all(r["difference"] < PARITY for name, r in rows.items() if "bf16" not in name) and rows["FastPlan"]["wanted"] == 2.3
    assert rows["FastPlan"]["faster"] == pytest.approx(rows["diffusers loop"]["cpu_ms"] / rows["FastPlan"]["cpu_ms"])
    assert "FastPlan" in done.out and "times faster" in done.out

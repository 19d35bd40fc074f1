"""The table of scripted experts: what it counts, and that a failing one is named by its seeds."""
from functools import partial

import numpy as np
import pytest
from omegaconf import OmegaConf

from envs.adapter import Adapter
from envs.collect import attempts, demonstrations
from envs.gantry import Gantry
from envs.task import box
from policy.data.store import Store
from policy.types import Spec
from scripts.common import check_task


class Countdown(Adapter):
    """Succeeds after 3 steps up; odd seeds never do."""
    name, units, action_semantics, expert_noise = "countdown", {"x": "1", "action": "1"}, "up", 5.0

    def __init__(self):
        super().__init__(max_steps=6, fps=10)
        import gymnasium
        self.observation_space, self.action_space = gymnasium.spaces.Dict({"x": box(-100, 100, (1,))}), box(-1, 1, (1,))

    def expert(self, seed):
        return lambda obs: np.ones(1, np.float32)

    def _start(self, seed):
        self.at, self.odd = 0.0, seed % 2
        return {"x": np.zeros(1, np.float32)}, False, {}

    def _advance(self, action):
        self.at += float(action[0])
        return {"x": np.full(1, self.at, np.float32)}, 0.0, self.at >= 3 and not self.odd, {}


def test_failures_are_none_and_lengths_are_without_what_is_kept_after_success():
    assert list(attempts(Countdown, 4, seed=10, workers=0)) == [(10, 3), (11, None), (12, 3), (13, None)]


def test_a_batched_expert_gets_every_seed_once_and_the_length_its_demonstration_has():
    task = Gantry()
    found = list(attempts(task, 60, seed=100))
    assert [seed for seed, _ in found] == list(range(100, 160))
    first = next(demonstrations(task, task.expert, 1, seed=100, noise=0.0))
    assert found[0][1] == len(first["action"]) - 4


def test_an_expert_that_fails_is_counted(monkeypatch):
    monkeypatch.setattr(Gantry, "success", lambda self, state: np.zeros(state.qpos.shape[:-1], bool))
    assert list(attempts(Gantry(max_steps=5), 3, seed=0)) == [(0, None), (1, None), (2, None)]


@pytest.mark.slow
def test_processes_find_the_same():
    factory = partial(Countdown)
    assert list(attempts(factory, 5, seed=0, workers=2)) == list(attempts(factory, 5, seed=0, workers=0))


def test_data_of_another_environment_is_refused_before_training(tmp_path):
    Store.create(tmp_path / "x.zarr", {"action": ((1,), "float32")}, fps=10).append({"action": np.zeros((3, 1), np.float32)})
    cfg = OmegaConf.create({"env": {"_target_": "tests.test_experts.Countdown", "_partial_": True, "workers": 2}, "trust": ["tests"],
                            "data": {"path": str(tmp_path / "x.zarr"), "action": "action"}})
    check_task(cfg, Spec(obs={"x": (1,)}, action_dim=1, fps=10))
    for wrong in ({"obs": {"x": (2,)}}, {"obs": {"y": (1,)}}, {"action_dim": 2}, {"fps": 20}):
        with pytest.raises(ValueError, match=r"x\.zarr is not a recording of countdown"):
            check_task(cfg, Spec(**{"obs": {"x": (1,)}, "action_dim": 1, "fps": 10, **wrong}))

"""Demonstrations from environments of another make: what is recorded, from which seeds, and that processes change nothing."""

import os
import sys
from functools import partial

import gymnasium
import numpy as np
import pytest

from envs.adapter import Adapter, need, seen
from envs.collect import HOPELESS, KEEP, demonstrations, from_env, run
from envs.crew import Processes, crew_of
from envs.gantry import Gantry
from envs.task import box


class Line(Adapter):
    """A point on a line walks to 1 from a start in [0, 0.1); where `traps` divides the seed it cannot move. 0.01 wide goal."""

    name, units, action_semantics, expert_noise = "line", {"x": "m", "action": "0.1 m"}, "velocity", 0.3

    def __init__(self, *, traps: int = 3, max_steps: int = 40, breaks: int = -1, render_mode: str | None = None):
        super().__init__(max_steps=max_steps, fps=10, render_mode=render_mode)
        self.traps, self.breaks = traps, breaks
        self.observation_space, self.action_space = gymnasium.spaces.Dict({"x": seen(-9, 9, (1,))}), box(-1, 1, (1,))

    def expert(self, seed):
        return lambda obs: np.clip((1 - obs["x"]) / 0.1, -1, 1)

    def _start(self, seed):
        if seed == self.breaks:
            raise ZeroDivisionError("the line broke")
        self.x, self.trapped = np.random.default_rng(seed).uniform(0, 0.1, 1), seed % self.traps == 0
        return {"x": self.x.astype(np.float32)}, False, {}

    def _advance(self, action):
        self.x = self.x + 0.1 * action * (not self.trapped)
        return {"x": self.x.astype(np.float32)}, -float(abs(1 - self.x[0])), bool(abs(1 - self.x[0]) < 0.01), {}


def test_an_episode_is_what_the_expert_saw_and_chose_until_a_little_after_success():
    env = Line()
    episode = run(env, 1, 0.0)
    assert episode is not None and set(episode) == {"x", "action", "seed"} and episode["seed"] == 1
    obs, _ = env.reset(seed=1)
    for k, action in enumerate(episode["action"]):  # without noise the actions lead from each observation to the next
        np.testing.assert_array_equal(episode["x"][k], obs["x"])
        obs, _, terminated, *_ = env.step(action)
        if terminated:
            break
    assert k == len(episode["action"]) - 1 - KEEP
    assert episode["x"].dtype == episode["action"].dtype == np.float32 and episode["action"].shape == episode["x"].shape


def test_noise_is_executed_but_not_recorded():
    env = Line()
    episode = run(env, 1)
    assert episode is not None
    np.testing.assert_allclose(episode["action"], np.clip((1 - episode["x"]) / 0.1, -1, 1), atol=1e-6)  # the expert's own answer
    moved = np.diff(episode["x"], axis=0) / 0.1
    off = moved - episode["action"][:-1]
    assert off.min() < -0.3 and off.max() <= 1e-5 + (1 - episode["action"][:-1]).max()  # clipped at 1, where most of them are


def test_seeds_count_up_and_failures_are_left_out():
    episodes = list(from_env(Line, 6, seed=100, workers=0))
    assert [each["seed"] for each in episodes] == [100, 101, 103, 104, 106, 107]
    assert list(from_env(Line, 0, workers=0)) == []


def test_success_after_the_limit_is_no_success():
    lengths = len(run(Line(), 1, 0.0)["action"]) - KEEP
    assert run(Line(max_steps=lengths), 1, 0.0) is not None
    assert run(Line(max_steps=lengths - 1), 1, 0.0) is None


def test_processes_yield_the_same_episodes_in_the_same_order():
    here = list(from_env(partial(Line, traps=4), 9, seed=7, workers=0))
    there = list(from_env(partial(Line, traps=4), 9, seed=7, workers=2))
    assert [each["seed"] for each in here] == [each["seed"] for each in there]
    for one, other in zip(here, there, strict=True):
        for key in ("x", "action"):
            np.testing.assert_array_equal(one[key], other[key])
    kicks = {round(float(each["x"][1, 0] - each["x"][0, 0]), 4) for each in here}  # the first step of each, at full speed but for the noise
    assert len(kicks) > 3


def assert_equal(here, there):
    assert [each["seed"] for each in here] == [each["seed"] for each in there]
    for one, other in zip(here, there, strict=True):
        assert set(one) == set(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_a_task_of_ours_is_collected_alike_by_threads_and_by_processes():
    task = Gantry()
    here = list(demonstrations(task, None, 12, batch=5))
    assert_equal(here, list(demonstrations(task, None, 12, batch=5, crew=Processes(2))))
    assert len(here) == 12


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'dipole[ray]'")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}})
    yield ray
    ray.shutdown()


def test_a_ray_cluster_collects_the_same(ray):
    task = Gantry()
    assert_equal(list(demonstrations(task, None, 12, batch=5)), list(demonstrations(task, None, 12, batch=5, crew=crew_of(ray="auto"))))
    assert_equal(list(from_env(partial(Line, traps=4), 9, seed=7, workers=0)), list(from_env(partial(Line, traps=4), 9, seed=7, crew=crew_of(3, "auto"))))
    with pytest.raises(ZeroDivisionError, match="the line broke"):
        list(from_env(partial(Line, breaks=9), 9, seed=7, crew=crew_of(ray="auto")))
    assert ray.is_initialized()  # a cluster that was there is left as it was


def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"dipole\[ray\]"):
        crew_of(ray="auto")


def test_an_expert_that_never_succeeds_is_given_up():
    with pytest.raises(RuntimeError, match=rf"failed from all of seeds 5\.\.{4 + HOPELESS}"):
        list(from_env(partial(Line, traps=1), 1, seed=5, workers=0))


def test_a_workers_traceback_reaches_the_caller():
    with pytest.raises(ZeroDivisionError, match="the line broke") as raised:
        list(from_env(partial(Line, breaks=8), 9, seed=7, workers=1))
    assert "_start" in str(raised.value.__cause__)


def test_the_verb_stores_them_with_their_facts(tmp_path):
    from policy.data.store import Store
    from scripts.collect import collect

    collect(Line, tmp_path / "line.zarr", episodes=30, seed=1, noise=None, workers=0)
    store = Store.open(tmp_path / "line.zarr")
    assert store.episodes == 30 and store.fps == 10 and store.units == Line.units and store.action_semantics == "velocity"
    assert store.attrs["task"] == "line" and store.attrs["first_seed"] == 1
    first = run(Line(), 1)
    assert first is not None
    np.testing.assert_array_equal(store.episode(0)["x"], first["x"])
    with pytest.raises(ValueError, match="reads no recordings"):
        collect(Line, tmp_path / "new.zarr", episodes=1, seed=1, noise=None, recording="human.npz")
    assert not (tmp_path / "new.zarr").exists()


def test_needing_a_package_says_how_to_install_it_and_which_version_does_not_fit():
    with pytest.raises(ImportError, match=r"absent_package.envs does not import .*: pip install it") as raised:
        need("absent_package.envs", "pip install it")
    assert raised.value.name == "absent_package"
    with pytest.raises(ValueError, match=r"math does not work with numpy \S+: pip install 'numpy<1'"):
        need("math", "sim", numpy="<1")
    assert need("math", "sim", numpy=">=1").pi > 3

"""Copies of other packages' environments against gymnasium's own vector environment, chunks against steps, and how they start and go."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from envs.copies import Copies, make, makes_one
from tests.envs.faulty import LENGTH, Faulty, broken

ACTIONS = np.random.default_rng(0).uniform(-1, 0.5, (5, 24, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def spread():
    """Five copies in two processes; every test resets them."""
    envs = Copies(Faulty, 5, workers=2)
    yield envs
    envs.close()


@pytest.fixture(params=["here", "spread"])
def copies(request):
    yield Copies(Faulty, 5, workers=0) if request.param == "here" else request.getfixturevalue("spread")


def test_copies_equal_gymnasiums_vector_env_step_by_step(copies):
    theirs = SyncVectorEnv([Faulty] * 5)
    (obs, info), (expected, told) = copies.reset(seed=40), theirs.reset(seed=40)
    assert all((obs[key] == expected[key]).all() and obs[key].dtype == expected[key].dtype for key in expected)
    assert (info["distance"] == told["distance"]).all() and (info["error"] == None).all()  # noqa: E711
    running, ends = np.ones(5, bool), []
    for k in range(24):
        obs, reward, terminated, truncated, info = copies.step(ACTIONS[:, k])
        o, r, te, tr, told = theirs.step(ACTIONS[:, k])
        for ours, other in ((reward, r), (terminated, te), (truncated, tr), (info["success"], told["success"]), (info["distance"], told["distance"])):
            assert (ours[running] == other[running]).all()
        assert all((obs[key][running] == o[key][running]).all() for key in o)
        assert (reward[~running] == 0).all() and (terminated | truncated)[~running].all()
        ends += [k + 1] * int((running & (te | tr)).sum())
        running &= ~(te | tr)
    assert not running.any() and len(set(ends)) > 1 and LENGTH in ends
    assert copies.single_observation_space == theirs.single_observation_space and copies.single_action_space == theirs.single_action_space
    assert copies.name == "faulty" and copies.metadata["render_fps"] == 10


def test_a_chunk_equals_its_steps_and_who_has_ended_stands_still(copies):
    other = Copies(Faulty, 5, workers=0)
    copies.reset(seed=40)
    other.reset(seed=40)
    for c in range(0, 24, 8):
        obs, *flags, info = copies.step_chunk(ACTIONS[:, c : c + 8])
        for k in range(8):
            o, *f, i = other.step(ACTIONS[:, c + k])
            assert all((o[key] == obs[key][:, k]).all() for key in o)
            assert all((a == b[:, k]).all() for a, b in zip(f, flags, strict=True))
            assert all((i[key] == info[key][:, k]).all() for key in i if key not in ("error", "torch"))
    again = copies.step_chunk(ACTIONS[:, :8])
    assert (again[0]["place"] == obs["place"][:, -1:]).all() and (again[1] == 0).all()
    assert (info["elapsed"][:, -1] <= LENGTH).all() and set(info) == {"success", "elapsed", "distance", "torch", "error"}


def test_only_those_named_are_reset_or_stepped(copies):
    copies.reset(seed=0)
    before, *_ = copies.step_chunk(ACTIONS[:, :8], active=np.array([True, True, False, True, True]))
    mask = np.array([False, True, False, False, True])
    after, _ = copies.reset(seed=100, options={"reset_mask": mask, "place": np.array([3.0, 4.0])})
    assert (after["place"][mask] == [3, 4]).all() and (after["place"][~mask] == before["place"][~mask, -1]).all()
    *_, info = copies.step_chunk(ACTIONS[:, 8:12])
    assert info["elapsed"][:, -1].tolist() == [12, 4, 4, 12, 4]
    first, _ = copies.reset()
    second, _ = copies.reset()
    assert (first["place"] != second["place"]).all()
    bad = ACTIONS[:, :8].copy()
    bad[3, 2] = np.nan
    with pytest.raises(ValueError, match="env 3 is not finite"):
        copies.step_chunk(bad)


def test_a_worker_loads_no_torch_though_we_do(spread):
    assert "torch" in sys.modules and torch.get_num_threads()
    spread.reset(seed=0)
    *_, info = spread.step(ACTIONS[:, 0])
    assert (info["torch"] == 0).all()


def test_other_observations():
    boxed, named = Copies(partial(Faulty, box=True), 2, workers=0), Copies(Faulty, 2, workers=0)
    assert list(boxed.single_observation_space) == ["state"]
    assert (boxed.reset(seed=0)[0]["state"] == named.reset(seed=0)[0]["place"]).all()
    with pytest.raises(TypeError, match="FlattenObservation"):
        Copies(lambda: gymnasium.make("Blackjack-v1"), 1, workers=0)
    with pytest.raises(TypeError, match="only a Box"):
        Copies(partial(make, "CartPole-v1"), 1, workers=0)
    with pytest.raises(TypeError, match="must take the number of copies"):
        Copies(lambda: SyncVectorEnv([Faulty]), 1, workers=0)


def test_what_makes_one_environment():
    assert all(makes_one(f) for f in (Faulty, partial(Faulty, at=3), partial(make, id="x"), lambda: Faulty()))
    assert not makes_one(lambda n: SyncVectorEnv([Faulty] * n))


def test_a_factory_that_fails_shows_its_traceback_here():
    with pytest.raises(RuntimeError, match=r'(?s)faulty.py", line \d+, in broken.*ImportError: no module named robots'):
        Copies(broken, 4, workers=1)


def test_an_episode_is_drawn_from_its_seed_and_actions(copies):
    path = copies.reset(seed=40)[0]["place"][2, 0], *copies.step_chunk(ACTIONS)[0]["place"][2, :, 0]
    frames = copies.render_episode(42, ACTIONS[2], size=64)
    assert frames.shape == (25, 64, 64, 3) and frames.dtype == np.uint8
    assert not frames[:, :8].any() and not frames[:, -8:].any()  # 48 x 64 in a square
    assert (frames[:, 32, :, 0] > 0).sum(1).tolist() == [int(8 * x) for x in path]


def test_any_gymnasium_id_from_the_command_line():
    from hydra import compose, initialize_config_module

    from scripts.common import make_envs

    with initialize_config_module("conf", version_base=None):
        node = compose("eval", ["env=gym", "env.id=tests.envs.faulty:dipole-test/Faulty-v0", "+env.at=3", "+env.workers=0", "run=x"]).env
        missing = compose("eval", ["env=gym", "run=x"]).env
        ours = compose("eval", ["env=pusht", "+env.workers=2", "run=x"]).env
    name, fps, envs = make_envs(node, 2)
    assert (name, fps, envs.num_envs) == ("faulty", 10.0, 2)
    envs.reset(seed=0)
    *_, truncated, _ = envs.step_chunk(np.zeros((2, 8, 2)))
    assert truncated.argmax(1).tolist() == [6, 6]
    with pytest.raises(ValueError, match=r"env.id="):
        make_envs(missing, 2)
    with pytest.raises(ValueError, match="no worker processes"):
        make_envs(ours, 2)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, None])
def test_nothing_stays_behind(tmp_path, how):
    """Ctrl-C during a hang, the death of the parent, and a parent that never closes what it made."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import numpy as np
from functools import partial
from envs.copies import Copies
from tests.envs.faulty import Faulty
envs = Copies(partial(Faulty, {{1: "sleep"}}, at={2 if how == signal.SIGINT else 99}), 4, workers=2)
envs.reset(seed=0)
print("ready", flush=True)
envs.step_chunk(np.zeros((4, 8, 2)))
{"input()" if how else ""}
""")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env=env, start_new_session=True)  # fmt: skip
    assert parent.stdout and parent.stderr and parent.stdout.readline() == "ready\n", parent.stderr and parent.stderr.read()
    workers = children(parent.pid) if how else []
    time.sleep(1)
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)
    elif how:
        parent.send_signal(how)
    _, said = parent.communicate(timeout=20)
    assert (said.strip().endswith("KeyboardInterrupt") and said.count("Traceback") == 1) if how == signal.SIGINT else not said
    deadline = time.monotonic() + 5
    while (left := [w for w in workers if Path(f"/proc/{w}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left and (len(workers) == 2 or not how)

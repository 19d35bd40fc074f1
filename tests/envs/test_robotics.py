"""Adroit, kitchen and point maze of gymnasium-robotics: its numbers under our names, starts from the seed, recordings, success."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs import robotics
from envs.robotics import ADROIT, Adroit, Kitchen, PointMaze
from tests.envs import contract

DATA = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")
KINDS = [
    ("Adroit", {"task": "door"}), ("Adroit", {"task": "hammer"}), ("Adroit", {"task": "pen"}), ("Adroit", {"task": "relocate"}),
    ("Kitchen", {}), ("PointMaze", {"maze": "medium"}),
]  # fmt: skip
SLOW = [pytest.param(*kind, marks=pytest.mark.slow, id="-".join(map(str, (kind[0], *kind[1].values())))) for kind in KINDS[1:]]


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics is not installed: pip install dipole[robotics]")


@pytest.mark.parametrize("name, options", [pytest.param(*KINDS[0], id="Adroit-door"), *SLOW])
def test_gymnasium_finds_nothing_to_warn_of(package, name, options):
    contract.gymnasium_finds_nothing(f"envs.robotics:{name}", options)


@pytest.mark.parametrize("name, options", [pytest.param(*KINDS[0], id="Adroit-door"), *SLOW])
def test_starts_are_functions_of_the_seed(package, name, options):
    contract.starts_are_functions_of_the_seed(f"envs.robotics:{name}", options, 40)


@pytest.mark.parametrize("task", ADROIT)
def test_adroit_is_the_original_under_other_names(package, task):
    env = Adroit(task=task)
    theirs = getattr(robotics.robotics(f"adroit_hand.adroit_{task}"), f"AdroitHand{task.title()}Env")()
    flat, _ = theirs.reset(seed=4)
    obs, _ = env.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(10):
        np.testing.assert_allclose(np.concatenate([obs[key] for key in ADROIT[task] if key != "to_go"]), flat, rtol=1e-6, atol=1e-6)
        action = rng.uniform(-1, 1, env.action_space.shape)
        flat, reward, *_ = theirs.step(action)
        obs, ours, *_ = env.step(action)
        assert ours == pytest.approx(float(reward), abs=1e-9)


def test_adroits_parts_are_what_their_names_say(package):
    """Against MuJoCo's own state, so that no two parts of equal size are exchanged."""
    for task in ADROIT:
        env = Adroit(task=task)
        env.reset(seed=1)
        rng = np.random.default_rng(1)
        for _ in range(20):
            obs, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
        model, data = env._scene()
        joint = {model.joint(i).name: data.qpos[model.jnt_qposadr[i]] for i in range(model.njnt)}
        palm = data.site("S_grasp").xpos
        expected = {
            "door": lambda: {"hinge": joint["door_hinge"], "latch": joint["latch"], "palm": palm, "handle": data.site("S_handle").xpos,  # noqa: B023
                             "palm_from_handle": palm - data.site("S_handle").xpos},  # noqa: B023
            "hammer": lambda: {"nail_depth": joint["nail_dir"], "palm": palm, "hammer": data.body("Object").xpos, "nail": data.site("S_target").xpos},  # noqa: B023
            "pen": lambda: {"pen": data.body("Object").xpos, "pen_from_goal": data.body("Object").xpos - data.site("eps_ball").xpos},  # noqa: B023
            "relocate": lambda: {"palm_from_ball": palm - data.body("Object").xpos, "ball_from_goal": data.body("Object").xpos - data.site("target").xpos},  # noqa: B023
        }[task]()  # fmt: skip
        for key, value in expected.items():
            np.testing.assert_allclose(obs[key].squeeze(), value, atol=1e-5, err_msg=f"{task} {key}")


def test_the_door_is_open_from_1_35_rad_and_that_ends_an_episode(package):
    env = Adroit(max_steps=2)
    for angle, open_ in ((1.3, False), (1.4, True)):
        env.reset(seed=0)
        state = env._world.get_env_state()
        state["qpos"][28] = angle
        env._world.set_env_state(state)
        obs, _, terminated, truncated, info = env.step(np.zeros(28))
        assert (terminated, truncated, info["success"]) == (open_, False, open_) and abs(obs["hinge"] - angle) < 0.04
    assert env.step(np.zeros(28))[3]


def test_to_go_says_what_is_left_of_the_opening_asked_for(package):
    env = Adroit(opening=1.2)
    for angle, left in ((0.0, 0.3), (1.0, 0.2), (1.3, 0.0)):
        env.reset(seed=0)
        state = env._world.get_env_state()
        state["qpos"][28] = angle
        env._world.set_env_state(state)
        obs = env.step(np.zeros(28))[0]
        assert abs(obs["to_go"][0] - left) < 0.04 and obs["to_go"][0] == pytest.approx(np.clip(1.2 - obs["hinge"][0], 0, 0.3), abs=1e-6)


def test_recordings_are_read_to_the_widest_opening_and_others_refused(package, tmp_path):
    env, rng, file = Adroit(), np.random.default_rng(0), tmp_path / "door.npz"
    flat, actions = rng.normal(size=(9, 39)), 2 * rng.normal(size=(9, 28))
    flat[:, 28] = [0, 0.1, 0.2, 0.1, 0.5, 0.8, 1.2, 0.7, 0.1]  # the second episode is cut behind 1.2
    np.savez(file, observations=flat, actions=actions, episode_ends=np.array([3, 9]))
    episodes = list(env.recorded(file))
    assert [len(each["action"]) for each in episodes] == [3, 4]
    back = np.concatenate([np.concatenate([each[key] for key in ADROIT["door"] if key != "to_go"], axis=1) for each in episodes])
    np.testing.assert_array_equal(back, flat[:7].astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([each["action"] for each in episodes]), np.clip(actions[:7], -1, 1).astype(np.float32))
    np.testing.assert_allclose(np.concatenate([each["to_go"][:, 0] for each in episodes]), [0.2, 0.1, 0, 0.3, 0.3, 0.3, 0], atol=1e-6)
    assert set(episodes[0]) == {*env.observation_space.spaces, "action"}
    with pytest.raises(ValueError, match="does not record adroit/pen"):
        list(Adroit(task="pen").recorded(file))
    np.savez(file, observations=flat)
    with pytest.raises(ValueError, match="lacks actions, episode_ends"):
        list(env.recorded(file))


@pytest.mark.data
def test_the_human_door_demonstrations_replay(package):
    """What is stored as observation k is what the environment shows before action k, here to the end of three episodes."""
    path = DATA / "adroit_door" / "door_human_00-19.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set DIPOLE_DATA to the folder that holds adroit_door/{path.name}")
    env, opened = Adroit(), []
    with np.load(path, allow_pickle=False) as file:
        starts, doors = file["init_qpos_reconstructed"], file["init_door_body_pos"]
    for i, episode in enumerate(env.recorded(path)):
        opened.append(episode["hinge"].max() >= 1.35)
        if i not in (8, 11, 16):
            continue
        env.reset(seed=0)
        env._world.set_env_state({"qpos": starts[i], "qvel": np.zeros(30), "door_body_pos": doors[i]})
        first = env._seen(env._world._get_obs(), episode["hinge"].max())
        for key, value in first.items():
            np.testing.assert_allclose(value, episode[key][0], atol=1e-5)
        angles = [env.step(action)[0]["hinge"][0] for action in episode["action"]]
        assert abs(max(angles) - episode["hinge"].max()) < 0.06
    assert np.flatnonzero(opened).tolist() == [8, 11, 16, 18]


@pytest.mark.slow
def test_the_kitchen_counts_what_is_done_and_ends_when_all_is(package):
    env = Kitchen(tasks=["microwave", "slide cabinet"])
    _, info = env.reset(seed=0)
    assert info == {"success": False, "completed": 0.0}
    world, seen = env._world, []
    for qpos, value in ((22, -0.75), (19, 0.37)):
        world.data.qpos[qpos] = value
        obs, reward, terminated, _, info = env.step(np.zeros(9))
        seen.append((reward, info["completed"], terminated, info["success"]))
    assert seen == [(1.0, 1.0, False, False), (1.0, 2.0, True, True)]
    assert abs(obs["microwave"] + 0.75) < 0.1 and abs(obs["slide_cabinet"] - 0.37) < 0.1
    np.testing.assert_allclose(np.concatenate([obs[k] for k in ("joints", "burners", "light", "slide_cabinet", "hinge_cabinet", "microwave", "kettle")]),
                               world.data.qpos, atol=0.05)  # fmt: skip
    with pytest.raises(ValueError, match="unknown: toaster"):
        Kitchen(tasks=["toaster"])


@pytest.mark.parametrize("maze, steps", [("umaze", 250), ("medium", 400), pytest.param("large", 600, marks=pytest.mark.slow)])
def test_our_mazes_expert_finds_its_way(package, maze, steps):
    """The original's walls stand where ours do, and its axes point where ours do: otherwise the way would end at a wall."""
    env = PointMaze(maze=maze)
    rate, lengths = contract.success_rate(env, range(10_000, 10_030), 0.3)
    assert rate == 1 and max(lengths) <= steps


@pytest.mark.gl
@pytest.mark.slow
@pytest.mark.parametrize("name, options", KINDS)
def test_they_draw(package, gl, name, options):
    env = contract.make(f"envs.robotics:{name}", {**options, "render_mode": "rgb_array", "size": 64})
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (64, 64, 3) and frame.std() > 20
    env.close()


def test_mistakes_are_answered(package, monkeypatch):
    with pytest.raises(ValueError, match="no task 'window'; it has: door, hammer, pen, relocate"):
        Adroit(task="window")
    with pytest.raises(ValueError, match="no maze 'tiny'; there are: umaze, medium, large"):
        PointMaze(maze="tiny")
    with pytest.raises(NotImplementedError, match=r"dipole collect env=adroit env\.task=pen recording="):
        Adroit(task="pen").expert(0)
    with pytest.raises(NotImplementedError, match="kitchen has no scripted expert: train on recorded"):
        Kitchen().expert(0)
    monkeypatch.setattr("envs.adapter.version", lambda package: {"mujoco": "3.12.1"}[package])
    with pytest.raises(ValueError, match=r"does not work with mujoco 3\.12\.1: pip install 'mujoco<3\.12'"):
        Kitchen()
    Adroit()  # works with every mujoco tried


def test_importing_the_module_needs_no_gymnasium_robotics():
    code = "import sys, envs.robotics; sys.exit('gymnasium_robotics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0

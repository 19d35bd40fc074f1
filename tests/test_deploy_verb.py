"""dipole deploy: what it refuses before anything moves, and once whole: server, bridge and robot from one command."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from policy.serve.card import Card
from policy.serve.expect import Expect
from policy.serve.robot import RobotSpec
from scripts.driving import folder_of, options_of
from tests.serve.fakes import ROBOT

ROOT = Path(__file__).parent.parent


def deploy(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return dipole("deploy", *args, **env)


def dipole(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "scripts.cli", *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, timeout=300)


@pytest.mark.parametrize("args, said", [
    ((), "which policy?"), (("run=a", "url=ws://b"), "which policy?"), (("demoo", "run=a"), "is unknown"),
    (("robot=gantr", "run=a"), "there is no robot=gantr. Did you mean robot=gantry? Known: franka, gantry, panda_pick, ros2_panda, so101, ur5e"),
    (("control.merg=naive", "run=a"), "there is no setting 'control.merg'. Did you mean control.merge? `dipole deploy --help` lists all"),
    (("robot=ur5e", "url=ws://127.0.0.1:1"), "robot.driver.host has no value: add robot.driver.host=…; conf/robot/ur5e.yaml says what it is"),
    (("robot=so101", "url=ws://127.0.0.1:1"), "robot.driver.bus.port has no value: add robot.driver.bus.port=…"),
    (("control.warm=0.8", "url=ws://127.0.0.1:1"), "control.warm=0.8 belongs to the planner: dipole serve run=… control.warm=0.8"),
    (("eval", "run=a", "delays=0.04"), "delays=0.04 must be a list of seconds from 0, such as [0,0.04]"),
    (("eval", "run=a", "delays=[0,a]"), "must be a list of seconds from 0"), (("eval", "run=a", "delays=[-1]"), "must be a list of seconds from 0"),
    (("eval", "run=a", "delays=[]"), "must be a list of seconds from 0"), (("run=a", "delay=-1"), "delay=-1 must be seconds from 0"),
    (("demo", "run=a", "seed=abc"), "seed='abc' must be a whole number from 0"), (("demo", "run=a", "episodes=1.5"), "episodes=1.5 must be a whole number"),
    (("robot.driver.kep=1", "url=ws://127.0.0.1:1"), "unexpected keyword argument 'kep'"),
])
def test_mistakes_end_in_one_line(args, said):
    done = deploy(*args)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_simulated_robot_plays_the_runs_own_environment(tmp_path):
    (tmp_path / "config.yaml").write_text("env: {_target_: envs.gantry.Gantry, pillar: false, belt: 0.2}\n")

    def options(run, task):
        return options_of(OmegaConf.create({"run": run, "robot": {"driver": {"task": task}}}))

    assert options(str(tmp_path), "envs.gantry:Gantry") == {"pillar": False, "belt": 0.2}
    assert options(str(tmp_path), "envs.panda:PandaPick") == options(None, "envs.gantry:Gantry") == options(str(tmp_path / "no"), "envs.gantry:Gantry") == {}


def test_two_runs_that_start_in_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "2026-11-26_16-10-44")
    cfg = OmegaConf.create({"out": None, "robot": {"spec": {"name": "toy"}}})
    assert [folder_of(cfg).name for _ in range(3)] == ["2026-11-26_16-10-44", "2026-11-26_16-10-44_2", "2026-11-26_16-10-44_3"]
    assert folder_of(OmegaConf.merge(cfg, {"out": "mine"})) == Path("mine") and not Path("mine").exists()


def test_a_server_that_does_not_start_says_why(tmp_path):
    done = deploy("demo", f"run={tmp_path}", f"out={tmp_path / 'out'}")
    assert done.returncode == 1 and "did not start" in done.stderr and "is not a training run" in done.stderr, done.stderr


@pytest.mark.parametrize("card, wrong", [
    (dict(action_dim=2, task="toy"), ""), (dict(action_dim=3, task="toy"), "it plans 3 action dimensions, the robot has 2 joints (a, b)"),
    (dict(action_dim=2, task="Panda"), "it was trained for Panda, the robot's task is Toy"), (dict(action_dim=2, task=""), ""),
])
def test_a_policy_for_another_robot_is_refused(card, wrong):
    robot = RobotSpec(**{**{k: getattr(ROBOT, k) for k in ("name", "joints", "units", "lower", "upper", "velocity", "acceleration", "jerk")}, "task": "Toy"})
    assert Expect.of(robot).differences(Card("id", card["task"], {"q": (2,)}, 2, 16, card["action_dim"], 0.1)) == wrong


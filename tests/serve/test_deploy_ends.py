"""dipole deploy as it ends on a bench: ctrl-C, kill -9, a planner that dies, a robot that hangs. What is left: a robot at rest, a page, no process."""
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("mujoco", reason="the simulated robot needs MuJoCo: pip install 'dipole[sim]'")
pytest.importorskip("ruckig", reason="the limiter needs ruckig: pip install 'dipole[deploy]'")

from tests.serve import dance
from tests.serve.bench import judged
from tests.serve.far import Far

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]
ROOT = Path(__file__).parents[2]
ENV = {**{k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

# Its controlling terminal, so that ctrl-C typed there is SIGINT for whoever runs in the foreground.
CONTROLLED = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Deploy:
    """`dipole deploy …` in a process group of its own, on a terminal when `terminal`."""

    def __init__(self, out: Path, *args: str, terminal: bool = False):
        self.out, self.said, mine, its = out, "", *(pty.openpty() if terminal else os.pipe())
        command = [sys.executable, "-m", "scripts.cli", "deploy", *args, f"out={out}"]
        if terminal:
            command = [sys.executable, "-c", CONTROLLED, *command]
        self.process = subprocess.Popen(command, cwd=ROOT, env=ENV, start_new_session=True, stdin=its if terminal else subprocess.DEVNULL, stdout=its,
                                        stderr=its)
        os.close(its)
        self.fd = mine

    def read(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self.fd], [], [], left)[0]:
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # a terminal without processes
                return
            if not data:
                return
            self.said += data.decode(errors="replace")

    def until(self, happened: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < end and self.process.poll() is None, self.said
            self.read(0.05)

    def events(self) -> list[dict]:
        path = next(iter(self.out.rglob("bridge.jsonl")), None)
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path else []

    def dances(self) -> None:
        """Wait until it has moved for a second."""
        self.until(lambda: any(e.get("mode") == "RUN" for e in self.events()))
        self.read(1.0)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait(self, seconds: float = 60.0) -> int:
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.05)
        code = self.process.wait(1)
        self.read(0.2)
        return code

    def family(self) -> dict[int, str]:
        """Processes that it started, and what they run."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
        found, new = set(), {self.process.pid}
        while new:
            found |= new
            new = {pid for pid, parent in parents.items() if parent in found} - found
        return {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in found - {self.process.pid}}

    def one(self, name: str) -> int:
        return next(pid for pid, line in self.family().items() if name in line)


@pytest.fixture
def deploy(tmp_path) -> Iterator[Callable[..., Deploy]]:
    made: list[Deploy] = []

    def start(*args: str, terminal: bool = False) -> Deploy:
        made.append(Deploy(tmp_path / "out", *args, terminal=terminal))
        return made[-1]

    yield start
    for one in made:
        for pid in one.family():
            os.kill(pid, signal.SIGKILL)
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        os.close(one.fd)


@pytest.fixture
def planner() -> Iterator[Far]:
    far = Far([sys.executable, "-m", "tests.serve.dance", "gantry"])
    yield far
    far.process.kill()
    far.process.wait()
    far.process.stdout.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A policy of a few seconds' training: it need not succeed, it moves."""
    folder = tmp_path_factory.mktemp("trained")
    for words in (["collect", "env=gantry", "episodes=20", f"path={folder / 'd.zarr'}"],
                  ["train", "recipe=gantry", f"data.path={folder / 'd.zarr'}", f"run={folder / 'run'}", "train.steps=60", "log.wandb=disabled"]):
        done = subprocess.run([sys.executable, "-m", "scripts.cli", *words], capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=300)
        assert done.returncode == 0, done.stderr
    return folder / "run"


def runs(pid: int) -> bool:
    """Whether it is there, and not only what is left of it for its parent to see."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: dict[int, str], seconds: float) -> dict[str, float]:
    """When each of them has ended, s from now; inf for those still there after so long."""
    start, left, out = time.monotonic(), dict(pids), {}
    while left and time.monotonic() - start < seconds:
        for pid in [pid for pid in left if not runs(pid)]:
            out[left.pop(pid)] = round(time.monotonic() - start, 2)
        time.sleep(0.01)
    return {**out, **dict.fromkeys(left.values(), float("inf"))}


def test_from_demonstrations_to_a_moving_robot_in_three_processes(deploy, trained):
    """It must move within its limits and leave page, timeline and recording."""
    d = deploy("demo", f"run={trained}", "episodes=2", "seconds=2", "view=false")
    assert d.wait(120) == 0, d.said
    facts = json.loads((d.out / "deploy.json").read_text())
    assert len(facts["episodes"]) == 2 and facts["counts"]["chunks"] >= 4 and (d.out / "timeline.png").exists() and "report:" in d.said
    assert "lost" not in facts["counts"]
    judged(d.out / "robot.npz", dance.spec("gantry"))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_demo_that_is_ended_brakes_and_leaves_its_page(deploy, planner, number, code):
    d = deploy("demo", f"url={planner.url}", "episodes=5", "view=false")
    d.dances()
    os.killpg(d.process.pid, number)  # as a terminal does
    assert d.wait() == code and "Traceback" not in d.said, d.said
    facts = json.loads((d.out / "deploy.json").read_text())
    assert facts["ended"] == number.name and facts["counts"]["chunks"] >= 1 and "report:" in d.said and (d.out / "report.html").exists()
    log = judged(d.out / "robot.npz", dance.spec("gantry"))
    assert log["moving"][-300:].any()


def test_ctrl_c_typed_on_the_terminal_while_it_is_drawn_brakes_the_robot_and_is_the_usual_end(deploy, planner):
    d = deploy("robot=gantry", f"url={planner.url}", terminal=True)
    d.dances()
    d.until(lambda: "late p99" in d.said)
    d.type("\x03")
    assert d.wait() == 0 and "at rest, the run is over" in d.said and "Traceback" not in d.said, d.said
    assert judged(d.out / "robot.npz", dance.spec("gantry"))["moving"][-300:].any()


@pytest.mark.parametrize("words", [["demo", "episodes=3", "view=false"], ["eval", "delays=[0]", "unaligned=false", "episodes=3"]])
def test_a_planner_that_dies_costs_no_report(deploy, trained, words):
    d = deploy(*words, f"run={trained}", "seconds=3")
    d.dances()
    os.kill(d.one(" serve "), signal.SIGKILL)
    assert d.wait() == 1, d.said
    last = d.said.strip().splitlines()[-1]
    assert last.startswith("error:") and "no planner at" in last and "Traceback" not in d.said, d.said
    facts = json.loads((d.out / "deploy.json").read_text())
    assert facts["trouble"] and (d.out / "report.html").exists() and "report:" in d.said
    judged(next(d.out.rglob("robot.npz")), dance.spec("gantry"))


def test_kill_9_leaves_no_process_and_the_robot_at_rest(deploy, trained):
    d = deploy("demo", f"run={trained}", "episodes=5", terminal=True)
    d.dances()
    family = d.family()
    assert sorted(re.findall(r"scripts.cli serve|envs.robot|policy.serve.view", " ".join(family.values()))) == [
        "envs.robot", "policy.serve.view", "scripts.cli serve"], family
    d.process.kill()
    took = gone(family, 5.0)
    print("s after kill -9:", took)
    assert max(took.values()) < 2.5, took  # about 1 s where nothing else runs
    judged(d.out / "robot.npz", dance.spec("gantry"))


def test_at_the_prompt_a_robot_that_hangs_is_told_in_one_line_and_ctrl_c_ends_with_the_page(deploy, planner):
    d = deploy("robot=gantry", f"url={planner.url}", terminal=True)
    d.dances()
    robot = d.one("envs.robot")
    os.kill(robot, signal.SIGSTOP)
    d.until(lambda: "Enter re-arms" in d.said)
    d.type("\r")
    d.until(lambda: "not re-armed" in d.said)
    told = next(line for line in d.said.splitlines() if "not re-armed" in line)
    assert "did not answer connect within 5 s" in told and "Traceback" not in d.said, told
    os.kill(robot, signal.SIGCONT)
    d.until(lambda: d.said.count("Enter re-arms") == 2)
    runs = sum(e.get("mode") == "RUN" for e in d.events())
    d.type("\r")
    d.until(lambda: sum(e.get("mode") == "RUN" for e in d.events()) > runs)
    planner.process.kill()
    os.kill(robot, signal.SIGKILL)
    d.until(lambda: d.said.count("Enter re-arms") == 3)
    d.type("\x03")
    assert d.wait() == 1 and "Traceback" not in d.said and (d.out / "report.html").exists(), d.said
    assert not d.family()

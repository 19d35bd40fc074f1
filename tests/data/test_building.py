"""A dataset in the making that is stopped: what is left of it, what is said about it, and where none is made."""
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from policy.data import DataError
from policy.data.building import beside
from policy.data.convert import convert
from policy.data.edit import merge, split, trim

SLOW = """
import sys, time
from policy.data.convert import convert
def told(i, n, steps):
    print("go", flush=True)
    time.sleep(60)
convert(sys.argv[1], sys.argv[2], fps=10, progress=told)
"""


@pytest.fixture
def arrays(tmp_path):
    np.savez(tmp_path / "a.npz", action=np.zeros((40, 2)), q=np.zeros((40, 2)), episode_ends=[10, 40])
    return tmp_path / "a.npz"


def killed(arrays, dst, number):
    job = subprocess.Popen([sys.executable, "-c", SLOW, str(arrays), str(dst)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "go\n"
    job.send_signal(number)
    said = job.communicate(timeout=30)[1]
    return job.returncode, said


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_terminated_conversion_leaves_nothing_and_a_killed_one_until_the_next(arrays, tmp_path):
    assert killed(arrays, tmp_path / "a.zarr", signal.SIGTERM) == (128 + signal.SIGTERM, "")
    assert names(tmp_path) == ["a.npz"]
    assert killed(arrays, tmp_path / "a.zarr", signal.SIGKILL)[0] == -signal.SIGKILL
    assert len(left := [n for n in names(tmp_path) if n.startswith(".a.zarr.")]) == 1
    convert(arrays, tmp_path / "b.zarr", fps=10)
    assert left[0] in names(tmp_path)  # of another dst
    convert(arrays, tmp_path / "a.zarr", fps=10)
    assert names(tmp_path) == ["a.npz", "a.zarr", "b.zarr"]


def test_what_a_living_process_or_another_computer_makes_stays(tmp_path):
    head = f".a.zarr.{os.uname().nodename}-"
    stays = [f"{head}{os.getpid()}.abc", f"{head}{os.getppid()}.abc", ".a.zarr.another_computer-999999999.abc", f"{head}x.abc"]
    for name in [*stays, f"{head}999999999.abc"]:
        (tmp_path / name).mkdir()
    others = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ray leaves one in its process
    try:
        with beside(tmp_path / "a.zarr") as part:
            part.mkdir()
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert names(tmp_path) == sorted([*stays, "a.zarr"]) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, others)


def test_a_dataset_is_not_made_inside_its_source(dataset, tmp_path):
    inside = dataset / "b.zarr"
    for make in (lambda: convert(dataset, inside, format="store"), lambda: merge([dataset, dataset], inside), lambda: trim(dataset, inside),
                 lambda: split(dataset, [tmp_path / "c.zarr", dataset / "../demo.zarr/b.zarr"], ratio=0.5)):
        with pytest.raises(DataError, match=r"lies inside .*demo\.zarr, which stays as it is"):
            make()
    with pytest.raises(DataError, match="exists and is not overwritten"):
        convert(dataset, tmp_path, format="npz")
    assert not inside.exists() and names(tmp_path) == ["demo.zarr"]


@pytest.mark.parametrize("verb, words, kept", [
    (["data", "convert", "src=a.npz", "dst=a.zarr", "fps=10"], "stopped: nothing is kept, a.zarr was not made\n", ["a.npz"]),
    (["collect", "env=gantry", "path=b.zarr", "episodes=100000"], "stopped: .* episodes in b.zarr\n", ["a.npz", "b.zarr"])])
def test_ctrl_c_says_what_was_kept(tmp_path, verb, words, kept):
    np.savez(tmp_path / "a.npz", action=np.zeros((3_000_000, 2)), q=np.zeros((3_000_000, 2)), episode_ends=np.arange(1, 30_001) * 100)
    job = subprocess.Popen([sys.executable, "-m", "scripts.cli", *verb], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and job.poll() is None:
            stores = [p for p in tmp_path.glob("b.zarr/data/action/c/*/*")] or [p for p in tmp_path.glob(".a.zarr.*/a.zarr/data/action")]
            if stores:
                break
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(signal.SIGINT)
        said = job.communicate(timeout=60)[1]
    finally:
        job.kill()
    assert job.returncode == 130, said
    assert re.fullmatch(words, said) and names(tmp_path) == kept

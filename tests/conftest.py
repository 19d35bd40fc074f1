"""One torch thread for each worker: two on busy cores are many times slower than one. Tests of the command line share one process and one small run."""
import os
import shutil
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what runs in its background so, and tests press ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from tests.shell import TINY, Shell, serve


@pytest.fixture(scope="session")
def server():
    server = serve()
    yield server
    server.stdin.close()
    server.wait(10)


@pytest.fixture(scope="module")
def shell(tmp_path_factory, server):
    return Shell(tmp_path_factory.mktemp("elsewhere"), server)


@pytest.fixture(scope="session")
def first(tmp_path_factory, server):
    """A folder with demos.zarr and a trained run; what was printed on the way."""
    shell = Shell(tmp_path_factory.mktemp("first"), server)
    collected = shell("collect", "env=gantry", "episodes=5", "path=demos.zarr")
    assert collected.code == 0, collected.err
    trained = shell("train", "recipe=gantry", "data.path=demos.zarr", "run=run", "train.steps=4", *TINY)
    assert trained.code == 0, trained.err
    return shell.folder, (collected.out, trained.out)


@pytest.fixture(scope="module")
def run(shell, first):
    """demos.zarr and a trained run in the shell's folder; what was printed on the way."""
    folder, said = first
    shutil.copytree(folder, shell.folder, dirs_exist_ok=True)
    return said

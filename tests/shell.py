"""`dipole` as a user types it: shell("eval", "run=run") in a folder that is not the repository, by a fork of a process that has imported everything."""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Importing torch takes longer than any verb here, so it is done once: every command is a fork of this process, which runs cli.main().
SERVER = """
import gc, json, os, sys, traceback
import diffusers, envs.batch, envs.collect, matplotlib.pyplot, scripts.collect, scripts.data, scripts.eval, scripts.train, torch._dynamo
diffusers.UniPCMultistepScheduler, diffusers.FlowMatchEulerDiscreteScheduler
from scripts import cli
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    if not (pid := os.fork()):
        os.chdir(job["folder"])
        for fd in (1, 2):
            os.dup2(os.open(job["output"][fd - 1], os.O_CREAT | os.O_TRUNC | os.O_WRONLY), fd)
        sys.argv = ["dipole", *job["argv"]]
        try:
            code = cli.main()
        except SystemExit as e:
            code = e.code
        except BaseException:
            code = traceback.format_exc()
        if isinstance(code, str):  # as the interpreter does it, but without taking torch apart
            print(code, file=sys.stderr)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1 if isinstance(code, str) else code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
ENV.pop("HYDRA_FULL_ERROR", None)  # what a user sees, whoever runs the tests
TINY = ["train.batch=8", "train.warmup=1", "net.widths=[8,16]", "net.groups=4", "net.time_dim=16", "log.wandb=disabled", "train.precision=fp32"]
SHORT = ["+env.max_steps=16", "episodes=3", "videos=0"]


@dataclass
class Done:
    code: int
    out: str
    err: str


def serve(**env: str) -> subprocess.Popen[str]:
    """What Shell asks to fork; env: more of the environment that commands see."""
    return subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**ENV, **env})


class Shell:
    """`shell("train", "recipe=gantry")` is `dipole train recipe=gantry` typed in `folder`."""

    def __init__(self, folder: Path, server: subprocess.Popen[str] | None = None, **env: str):
        self.folder, self.server, self.own = folder, server or serve(**env), server is None

    def __call__(self, *argv: str) -> Done:
        files = [str(self.folder / f".std{i}") for i in (1, 2)]
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps({"argv": argv, "folder": str(self.folder), "output": files}) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return Done(code, *(Path(f).read_text() for f in files))

    def close(self) -> None:
        if self.own:
            self.server.stdin.close()  # type: ignore[union-attr]
            self.server.wait(10)


def metrics(shell: Shell, out: str) -> dict:
    return json.loads((shell.folder / out / "metrics.json").read_text())


def facts(shell: Shell, run: str = "run") -> dict:
    return json.loads((shell.folder / run / "checkpoints" / "policy.json").read_text())


def refused(done: Done, *words: str) -> None:
    """One short message, no traceback, exit code 1."""
    assert done.code == 1, (done.code, done.out, done.err)
    assert done.err.startswith("error: ") and "Traceback" not in done.err + done.out, done.err
    assert all(w in done.err for w in words), (done.err, words)

"""What the deploy verb needs of others: a server process of its own, the in-process result to compare with."""
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policy.page import read_json

PLANS = ("sampler", "guide", "checkpoint=", "precision=", "control.warm=", "control.limit=", "control.prior=")  # settings of dipole serve that change plans
READY = re.compile(r"^ready (\S+) ", re.MULTILINE)  # of dipole serve, whole


def token(file: str | None) -> str | None:
    """From the file, else the environment's DIPOLE_TOKEN; None when there is neither. ValueError when the file cannot be read."""
    if not file:
        return os.environ.get("DIPOLE_TOKEN") or None
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text"
        raise ValueError(f"token_file={file} cannot be read: {why}. Make one: python -c 'import secrets; print(secrets.token_urlsafe())' > {file}") from e


@contextmanager
def server(cfg: DictConfig, delay: float, log: Path, seconds: float = 180.0) -> Iterator[tuple[str, int]]:
    """`dipole serve` of cfg.run or cfg.artifact in a process of its own on a free port; its address and process.

    OSError with its last words when it does not start.
    """
    source = f"run={cfg.run}" if cfg.run else f"artifact={cfg.artifact}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "scripts.cli", "serve", source, "port=0", f"delay={delay}", *warm(cfg), *cfg.serve],
                                   stdout=out, stderr=subprocess.STDOUT, env=_environment(), preexec_fn=_with_parent)
    try:
        yield _address(process, log, seconds), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def warm(cfg: DictConfig) -> list[str]:
    return [] if cfg.control.warm is None else [f"control.warm={cfg.control.warm}"]


def _address(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := READY.search(log.read_text(encoding="utf-8", errors="replace")):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.05)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    raise OSError(f"the planner server did not start{f' within {seconds:.0f} s' if process.poll() is None else ''}: "
                  f"{' '.join(last).removeprefix('error: ') or 'it said nothing'} (all of it: {log})")


def _with_parent() -> None:
    """The server ends with whoever started it, be that one killed (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _environment() -> dict[str, str]:
    """This process's, one thread, and mistakes in one line as usual."""
    return {**{k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}, "OMP_NUM_THREADS": "1"}


def resident(pid: int) -> float:
    """MB of memory that a process keeps; NaN where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, ValueError):
        return float("nan")


def in_process(cfg: DictConfig, folder: Path, control: dict[str, Any]) -> dict[str, Any]:
    """`dipole eval` of the same seeds and planner with these control settings: {success, success_ci, …}; empty when there is no run to evaluate."""
    if not cfg.run:
        return {}
    out = folder / "in_process"
    words = [*(w for w in cfg.serve if w.startswith(PLANS)), *(f"control.{k}={str(v).lower()}" for k, v in control.items()), *warm(cfg)]
    done = subprocess.run([sys.executable, "-m", "scripts.cli", "eval", f"run={cfg.run}", f"episodes={cfg.episodes}", f"seed={cfg.seed}", "videos=0",
                           f"out={out}", *words], capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise OSError(f"dipole eval run={cfg.run} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}")
    metrics = read_json(out / "metrics.json")
    return {**{k: metrics[k] for k in ("success", "success_ci", "episodes", "plan_ms")}, **control}

"""Say what is wrong with this machine, and how to mend it.

Standard library only up here: a doctor must open where torch, rich or dipole's own metadata is broken. Each check returns one Finding.
"""
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HELP = """dipole doctor: checks this machine and says how to mend what is wrong. Exit code 1 when something FAILs.

  dipole doctor
  dipole doctor path=demos/gantry.zarr   # opens a dataset too
  dipole doctor timeout=60               # seconds a graphics backend may take to draw one frame (20)
"""
SETTINGS = ("path", "timeout")
OK, WARN, FAIL = "OK", "WARN", "FAIL"


@dataclass(frozen=True)
class Finding:
    name: str
    status: str  # OK, WARN (works, but worse than it could) or FAIL (something dipole offers will not work)
    found: str
    fix: str = ""


def python() -> Finding:
    return Finding("python", OK, f"{platform.python_version()} at {sys.prefix} ({platform.system()} {platform.machine()})")


def cores() -> float:
    """Cores this process may really use: the affinity mask, cut by a container's quota (which torch does not see)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(float(allowed), int(quota) / int(period))
    except (OSError, ValueError):  # not Linux, or "max": no quota
        return float(allowed)


def torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", OK, "not installed: this computer asks a server for its plans", "to train, plan or serve here: pip install 'dipole[policy]'")
    import torch

    native = sorted({"avx512_bf16", "amx_bf16"} & cpu_flags())
    half = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    bf16 = f"bf16 by {' and '.join(native)}" if half and native else "bf16 emulated, so slow" if half else "no bf16"
    gpu = "no GPU"
    if torch.cuda.is_available():
        gpu = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    elif torch.backends.mps.is_available():
        gpu = "Apple GPU (mps)"
    threads, usable = torch.get_num_threads(), cores()
    found = f"{torch.__version__}, {threads} threads on {usable:g} cores, {bf16}, {gpu}"
    if threads > usable:
        return Finding("torch", WARN, found, f"more threads than cores slow every step: export OMP_NUM_THREADS={max(1, int(usable))}")
    if gpu == "no GPU" and shutil.which("nvidia-smi"):
        return Finding("torch", WARN, found, "there is an NVIDIA driver, but this torch does not see the card: install torch's CUDA build "
                                             "for this driver (compare nvidia-smi's CUDA version with torch.version.cuda)")
    return Finding("torch", OK, found)


def cpu_flags() -> set[str]:
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return set()
    return set(line.split())


def load() -> Finding:
    if not hasattr(os, "getloadavg"):
        return Finding("load", OK, "this system does not tell")
    busy, usable = os.getloadavg()[0], cores()
    found = f"{busy:.1f} of {usable:g} cores busy over the last minute"
    if busy > 0.75 * usable:
        return Finding("load", WARN, found, "two torch threads on busy cores are many times slower than one: wait, or export "
                                            "OMP_NUM_THREADS=1. Do not trust timings taken now")
    return Finding("load", OK, found)


def extras() -> list[str]:
    """The core, "", and the extras of pyproject.toml that name packages themselves."""
    try:
        return ["", *(e for e in importlib.metadata.metadata("dipole").get_all("Provides-Extra", []) if e != "all")]
    except importlib.metadata.PackageNotFoundError:  # packages("") says so
        return [""]


def packages(extra: str) -> Finding:
    """What `extra` ("" for the core) asks for in pyproject.toml against what is installed."""
    from packaging.requirements import Requirement

    name = f"packages: {extra or 'core'}"
    install = f"pip install 'dipole[{extra}]'" if extra else "pip install --upgrade dipole, or in a checkout: make install"
    try:
        lines = importlib.metadata.requires("dipole") or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, FAIL, "dipole itself is not installed here", "in a checkout: make install, then .venv/bin/dipole doctor")
    every = [Requirement(line) for line in lines]
    needs = [r for r in every if (r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""}) if r.marker else not extra)]
    present: list[str] = []
    absent: list[str] = []
    outside: list[str] = []
    for need in needs:
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(need.name)
            continue
        present.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            outside.append(f"{need.name} {version} is outside {need.specifier}")
    if extra and not present:
        return Finding(name, OK, "not installed (optional)", f"when wanted: {install}")
    if absent:
        return Finding(name, WARN if extra else FAIL, f"missing: {', '.join(absent)}", install)
    if outside:
        return Finding(name, WARN, "; ".join(outside), f"untested: {install}")
    return Finding(name, OK, ", ".join(present))


def versions() -> Finding:
    """Where nothing can read the ranges that extras ask for, as on a robot with dipole[client] alone."""
    found = importlib.metadata.version("dipole")
    return Finding("packages", OK, f"dipole {found}; versions were not compared", "to have them compared: pip install 'dipole[command]'")


DRAW = """
import time
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 2"/><geom size=".3" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 96, 96) as renderer:
    renderer.update_scene(data)
    renderer.render()
    start = time.perf_counter()
    image = renderer.render()
    took = time.perf_counter() - start
    from OpenGL import GL
    by = GL.glGetString(GL.GL_RENDERER)
assert image.max() > 0, "the frame is black"
print(f"{1000 * took:.1f} ms for 96x96 by {by.decode() if by else 'an unknown renderer'}")
"""


def draw(backend: str, timeout: float, code: str = DRAW) -> tuple[bool, str]:
    """(did it draw, what happened) for one MUJOCO_GL value, in a process of its own: a broken driver hangs or kills whoever calls it."""
    env = {**os.environ, "MUJOCO_GL": backend}
    env.pop("PYOPENGL_PLATFORM", None)  # mujoco sets it from MUJOCO_GL and refuses a contradiction
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=out, stderr=err)
        try:
            status = child.wait(timeout)
        except subprocess.TimeoutExpired:
            child.kill()  # not waited for: a process stuck in a driver may never go
            return False, f"hung for {timeout:g} s"
        out.seek(0), err.seek(0)
        if status == 0:
            return True, out.read().strip()
        complaint = err.read().strip().splitlines()
    return False, complaint[-1][:160] if complaint else f"died with exit code {status}"


def graphics(timeout: float = 20.0) -> Finding:
    """Draws one frame with MUJOCO_GL as set, then with this system's off-screen backends, up to the first that works."""
    if importlib.util.find_spec("mujoco") is None:
        return Finding("graphics", OK, "mujoco is not installed, nothing to draw", "when wanted: pip install 'dipole[sim]'")
    chosen = os.environ.get("MUJOCO_GL", "")
    fallback = {"Darwin": ["cgl"], "Windows": ["wgl"]}.get(platform.system(), ["egl", "osmesa"])
    failed: list[str] = []
    for backend in dict.fromkeys([chosen, *fallback] if chosen else fallback):
        drawn, what = draw(backend, timeout)
        if drawn and (backend == chosen or not failed):
            return Finding("graphics", OK, f"{backend}: {what}")
        if drawn:
            return Finding("graphics", WARN, f"{backend}: {what}; {'; '.join(failed)}", f"export MUJOCO_GL={backend}")
        failed.append(f"{backend}: {what}")
    return Finding("graphics", FAIL, "; ".join(failed), "on Debian: apt install libegl1 libgl1-mesa-dri libosmesa6. In a container "
                   "with an NVIDIA card: NVIDIA_DRIVER_CAPABILITIES=all. Tasks without images run all the same")


def ffmpeg() -> Finding:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return Finding("ffmpeg", WARN, "imageio-ffmpeg is not installed: no videos", "pip install 'dipole[train]'")
    import imageio_ffmpeg

    exe = imageio_ffmpeg.get_ffmpeg_exe()
    with tempfile.TemporaryDirectory() as folder:
        command = [exe, "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-r", "10", "-i", "-", "-c:v", "libx264",
                   "-pix_fmt", "yuv420p", f"{folder}/five.mp4"]
        done = subprocess.run(command, input=bytes(64 * 64 * 3 * 5), capture_output=True, timeout=30)
        size = Path(folder, "five.mp4").stat().st_size if done.returncode == 0 else 0
    if not size:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        return Finding("ffmpeg", FAIL, said[:160], "point IMAGEIO_FFMPEG_EXE at a working ffmpeg, or "
                       "pip install --force-reinstall imageio-ffmpeg")
    return Finding("ffmpeg", OK, f"{Path(exe).name} encoded 5 frames")


def disk(folder: Path = Path(), megabytes: int = 64) -> Finding:
    block = os.urandom(1 << 20)  # random, so that a compressing file system does not flatter itself
    try:
        free = shutil.disk_usage(folder).free / 1e9
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = megabytes * 1.048576 / (time.perf_counter() - start)
    except OSError as error:
        return Finding("disk", FAIL, f"cannot write to {folder.resolve()}: {error.strerror}", "go to a writable folder, or make room")
    found = f"{free:.0f} GB free, writes {speed:.0f} MB/s at {folder.resolve()}"
    if free < 2:
        return Finding("disk", WARN, found, "checkpoints and videos fill 2 GB quickly: make room, or run=… on another disk")
    if speed < 50:
        return Finding("disk", WARN, found, "slow disk: keep datasets in RAM (the default), or run=… on another one")
    return Finding("disk", OK, found)


def wandb() -> Finding:
    if importlib.util.find_spec("wandb") is None:
        return Finding("wandb", OK, "not installed; train.jsonl has the same numbers", "when wanted: pip install 'dipole[train]'")
    mode = os.environ.get("WANDB_MODE", "")
    if mode == "online":
        return Finding("wandb", OK, "online: runs are uploaded", "once per machine: wandb login")
    return Finding("wandb", OK, f"{mode or 'offline'}: nothing leaves this machine", "to upload: export WANDB_MODE=online")


def dataset(path: str) -> Finding:
    from policy.data.store import DataError, Store

    try:
        store = Store.open(path)
    except DataError as error:
        return Finding("dataset", FAIL, str(error))  # says itself what to do
    found = f"{path}: {store.episodes} episodes, {store.steps} steps at {store.fps or 'an unknown number of'} Hz, {', '.join(store.keys)}"
    if not store.fps:
        return Finding("dataset", WARN, found, "give it its control rate [1/s] as the attribute fps of the zarr group")
    return Finding("dataset", OK, found)


def examine(checks: Iterable[Callable[[], Finding]]) -> list[Finding]:
    """Every check's finding; one that breaks is itself a finding, so the others are still heard."""
    findings = []
    for check in checks:
        name = (check.func if isinstance(check, partial) else check).__name__
        try:
            findings.append(check())
        except Exception as error:
            fix = "make install, or pip install --upgrade dipole" if isinstance(error, ImportError) else ""
            findings.append(Finding(name, FAIL, f"{type(error).__name__}: {error}", fix))
    return findings


def show(findings: list[Finding]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # its absence is among the findings
        print(*(f"{f.status:<5} {f.name}: {f.found}{f' -> {f.fix}' if f.fix else ''}" for f in findings), sep="\n")
        return
    colour = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    table = Table(title="dipole doctor", title_justify="left", title_style="bold", show_header=False)
    for f in findings:
        cell = Text(f.found)
        if f.fix:
            cell.append(f"\n→ {f.fix}", style="dim" if f.status == OK else colour[f.status])
        table.add_row(Text(f.status, style=colour[f.status]), Text(f.name, style="bold"), cell)
    Console().print(table)


def main() -> None:
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        return print(HELP, end="")
    given = {key: value for key, _, value in (arg.partition("=") for arg in argv)}
    if unknown := given.keys() - set(SETTINGS):
        print(f"dipole doctor: no setting {', '.join(map(repr, sorted(unknown)))} (known: {', '.join(SETTINGS)})", file=sys.stderr)
        raise SystemExit(2)
    each = [partial(packages, extra) for extra in extras()] if importlib.util.find_spec("packaging") else [versions]
    checks: list[Callable[[], Finding]] = [python, torch, load, *each,
                                           partial(graphics, float(given.get("timeout", 20))), ffmpeg, disk, wandb]
    if "path" in given:
        checks.append(partial(dataset, given["path"]))
    findings = examine(checks)
    show(findings)
    count = {status: sum(f.status == status for f in findings) for status in (OK, WARN, FAIL)}
    print(f"{count[OK]} fine, {count[WARN]} could be better, {count[FAIL]} broken")
    raise SystemExit(1 if count[FAIL] else 0)


if __name__ == "__main__":
    main()

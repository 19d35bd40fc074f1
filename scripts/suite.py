"""`dipole bench suite`: one table of task x recipe x training seed. Every cell is our own verbs in processes of their own, with one torch thread.

A stage (collect, train, eval) that ended well leaves a json file with its command, CPU-seconds and commit, and is not done again; a training
that was cut off goes on from its checkpoint. So the same command resumes the suite, whatever ended it. All results are read from these files.
"""
import fcntl
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape

from policy.data.store import Store
from policy.train.log import bar, console, read_rows
from scripts import common, suite_page
from scripts.cli import missing
from scripts.sweep import across

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TERM": "dumb"}
Facts = dict[str, Any]


@dataclass
class Row:
    """A line of conf/suite.yaml and where its results lie."""
    name: str
    folder: Path
    train: list[str]
    collect: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    cpu_s: float = 120.0
    needs: str | None = None
    data: str | None = None
    of: "Row | None" = None       # whose training this row evaluates in another way
    teacher: "Row | None" = None  # whose training this row distils: train is what `dipole distill` is told
    after: list[list[str]] = field(default_factory=list)  # what else to run on the trained policy: [eval, do=likelihood]

    def run(self, seed: int) -> Path:
        return (self.of or self).folder / f"seed{seed}"

    def failed(self, seed: int) -> Path:
        return self.folder / f"seed{seed}.failed.json"

    def lacking(self) -> str:
        """Why this row cannot be done here, or ''."""
        if self.needs and not importlib.util.find_spec(self.needs):
            return f"{self.needs} is not installed: {missing(self.needs) or f'pip install {self.needs}'}"
        if self.data and not Path(self.data).exists():
            return f"there is no {self.data}: set DIPOLE_DATA to the folder of the recordings, or rows.{self.name}.data=…"
        return ""


show, headline, page, commit = suite_page.show, suite_page.headline, suite_page.where, suite_page.commit


class Stopped(Exception):
    """A stage did not end well; its text says why."""


def measure(cfg: DictConfig, name: str = "suite", write: Callable[[Path, Facts], None] = suite_page.write) -> Facts:
    """Fill the table <run>/<name> as far as it is not filled yet, and return it."""
    folder = Path(cfg.run) / name
    rows = chosen(cfg, folder)
    seeds = list(cfg.seeds)
    with terminable(), bar() as progress:
        task = progress.add_task("suite", total=sum(r.cpu_s for r in rows) * len(seeds), note="")  # in CPU-seconds of training meant
        try:
            for row in rows:
                if why := row.lacking():
                    note(row.folder / "skipped.json", {"reason": why})
                    console.print(f"{row.name}: skipped, {escape(why)}", highlight=False, soft_wrap=True)
                else:
                    (row.folder / "skipped.json").unlink(missing_ok=True)
                    for seed in seeds:
                        start = progress.tasks[0].completed

                        def show(text: str, done: float, row: Row = row, start: float = start) -> None:
                            progress.update(task, completed=start + done * row.cpu_s, note=text)
                        cell(row, seed, cfg, show)
                        progress.update(task, completed=start + row.cpu_s)
                        write(folder, table(cfg, folder))
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            raise
        finally:
            found = table(cfg, folder)
            write(folder, found)
    return found


def chosen(cfg: DictConfig, folder: Path) -> list[Row]:
    """The rows that only=[…] names, all without it. ValueError for a name that is none."""
    known = common.plain(cfg.rows)
    only = list(cfg.only) if cfg.only else list(known)
    if wrong := [name for name in only if name not in known]:
        raise ValueError(f"there is no row {', '.join(wrong)} in the suite; choose from {', '.join(known)}, or add yours to conf/suite.yaml")
    return [row_of(name, known, folder) for name in only]


def row_of(name: str, known: dict[str, Facts], folder: Path) -> Row:
    """A row with the rows it builds on."""
    said = known[name]
    others = {key: row_of(said[key], known, folder) for key in ("of", "teacher") if said.get(key)}
    return Row(name, folder / name, **{"train": [], **said, **others})


def cell(row: Row, seed: int, cfg: DictConfig, show: Callable[[str, float], None]) -> None:
    """Collect, train and evaluate one seed of a row; what goes wrong is noted in its folder, and the next one is done."""
    run, own, failed = row.run(seed), row.folder / f"seed{seed}", row.failed(seed)
    try:
        learn(row.of or row, seed, show)
        with locked(row.folder, lambda: show(f"{row.name}: waiting for another process", 0.0)) as lock:
            failed.unlink(missing_ok=True)
            out, label = own / "eval" / "suite", f"{row.name} seed {seed}"
            asked = ["eval", f"run='{run}'", f"out='{out}'", f"episodes={cfg.episodes}", f"seed={cfg.seed}", *row.eval]
            stage(own.with_suffix(".eval"), asked, lock, again=True, watch=lambda: show(f"{label}: {cfg.episodes} episodes", 1.0), label=label)
            for more in row.after:
                what = more[1].removeprefix("do=")
                stage(own.with_suffix(f".{what}"), [*more, f"run='{run}'", f"out='{own / 'eval' / what}'"], lock, again=True,
                      watch=lambda what=what: show(f"{label}: {what}", 1.0), label=label)  # type: ignore[misc]
    except Stopped as e:
        note(row.folder / "skipped.json" if "is not installed" in str(e) else failed, {"reason": str(e)})
        console.print(f"[red]{row.name} seed {seed}[/]: {escape(str(e))}", highlight=False, soft_wrap=True)


def learn(row: Row, seed: int, show: Callable[[str, float], None]) -> None:
    """Collect and train one seed of a row, its teacher first. Raises Stopped."""
    if row.teacher:
        learn(row.teacher, seed, show)
    run, label = row.run(seed), f"{row.name} seed {seed}"
    with locked(row.folder, lambda: show(f"{row.name}: waiting for another process", 0.0)) as lock:
        row.failed(seed).unlink(missing_ok=True)
        demos = row.folder / "demos.zarr"
        if row.collect:
            stage(row.folder / "collect", ["collect", *row.collect, f"path='{demos}'"], lock, unfinished=demos,
                  watch=lambda: show(f"{row.name}: demonstrations", 0.0), label=row.name)
        named = [f"data.path='{demos}'"] if row.collect else []
        where = ["distill", f"run='{row.teacher.run(seed)}'", f"out='{run}'"] if row.teacher else ["train", f"run='{run}'"]
        train = [where[0], *row.train, *named, f"train.seed={seed}", *where[1:], "log.wandb=disabled"]
        stage(run.with_suffix(".train"), train, lock, resume=run, watch=lambda: show(f"{label}: training", trained(run)), label=label)


def stage(path: Path, argv: list[str], lock: int, *, watch: Callable[[], None], label: str, again: bool = False, unfinished: Path | None = None,
          resume: Path | None = None) -> None:
    """Run `dipole argv` unless path.json says that it was done. Raises Stopped when it fails, or was done with other settings and not `again`.

    unfinished: a store that a broken-off stage has left, to be removed.   resume: the folder of a training to go on with.
    """
    marker, before = path.with_name(path.name + ".json"), read(path.with_name(path.name + ".json"))
    if before and before["argv"] == argv:
        return
    if before and not again:
        changed = sorted(set(argv) ^ set(before["argv"]))
        raise Stopped(f"{path.parent} holds a {argv[0]} with other settings ({', '.join(changed)}); remove the folder, or choose another run=…")
    if unfinished and unfinished.exists():
        shutil.rmtree(unfinished)
    going = bool(resume and (resume / "checkpoints" / "last.safetensors").exists())
    asked = ["train", f"run='{resume}'", "resume=true"] if going else argv
    tick, log = time.perf_counter(), path.with_name(path.name + ".log")
    code, cpu_s = call(asked, log, lock, watch)
    if code:
        raise Stopped(last_words(log))
    facts: Facts = {"argv": argv, "command": shlex.join(["dipole", *argv]), "cpu_s": cpu_s, "wall_s": time.perf_counter() - tick, "commit": commit()}
    if resume:
        known = read(resume / "checkpoints" / "policy.json") or {}
        if known.get("step", 0) < known.get("settings", {}).get("steps", 1):
            raise KeyboardInterrupt  # it has answered a signal by saving
        facts |= {"cpu_s": known["cpu_s"], "step": known["step"]}  # of all its parts, and of training alone
    note(marker, facts)
    console.print(f"{label}: {argv[0]} done, {facts['cpu_s']:.0f} CPU-s", highlight=False, soft_wrap=True)


def call(argv: list[str], log: Path, lock: int, watch: Callable[[], None]) -> tuple[int, float]:
    """`dipole argv` in a process of its own with one thread: its exit code and CPU-seconds. An interrupt is passed on, and waited for."""
    with log.open("a", encoding="utf-8") as f:
        f.write(f"$ {shlex.join(['dipole', *argv])}\n")
        f.flush()
        # In a session of its own, so that ctrl-C reaches it once, through us; the lock outlives us with it.
        child = subprocess.Popen([sys.executable, "-m", "scripts.cli", *argv], stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT,
                                 env={**os.environ, **ONE_THREAD}, pass_fds=(lock,), start_new_session=True)
        while True:
            try:
                pid, status, used = os.wait4(child.pid, os.WNOHANG)
                if pid:
                    break
                watch()
                time.sleep(0.2)
            except KeyboardInterrupt:
                child.send_signal(signal.SIGINT)
                os.wait4(child.pid, 0)
                child.returncode = 130
                raise
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, used.ru_utime + used.ru_stime


@contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[int]:
    """One process at a time works on a row, also one that outlived the suite that began it; the descriptor of the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as f:
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(0.5)
        yield f.fileno()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the suite as ctrl-C does, also in the background of a script, where SIGINT is ignored."""
    term, interrupt = signal.signal(signal.SIGTERM, signal.default_int_handler), signal.getsignal(signal.SIGINT)
    if interrupt is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)  # ignored here as before, but children do not inherit it: they are told by it to stop
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, term)
        signal.signal(signal.SIGINT, interrupt)


# ---------------------------------------------------------------- what is known
def table(cfg: DictConfig, folder: Path) -> Facts:
    """All rows, from the files that the stages have left."""
    known = common.plain(cfg.rows)
    rows = [result(row := row_of(name, known, folder), seeds_of(row)) for name in known]
    return {r["name"]: r for r in rows if r["cells"] or r.get("skipped")}


def seeds_of(row: Row) -> list[int]:
    """Every training seed that has left a result here, whichever call asked for it."""
    return sorted({int(found[1]) for path in row.folder.glob("seed*.json") if (found := re.fullmatch(r"seed(\d+)\.(eval|failed)\.json", path.name))})


def result(row: Row, seeds: Sequence[int]) -> Facts:
    cells = [c for seed in seeds if (c := cell_result(row, seed))]
    done = [c for c in cells if c["status"] == "done"]
    found: Facts = {"name": row.name, "recipe": " ".join((row.of or row).train), "budget_cpu_s": row.cpu_s, "cells": cells,
                    "skipped": (read(row.folder / "skipped.json") or {}).get("reason")}
    if made := read(row.folder / "collect.json"):
        found |= {"collect_cpu_s": made["cpu_s"], "collect": made["command"], "demonstrations": Store.open(row.folder / "demos.zarr").episodes}
    for key in ("success", "score") if done else ():
        found[key] = sum(c[key] for c in done) / len(done)
        found[f"{key}_ci"] = across([c[key] for c in done], [c[f"{key}_ci"] for c in done])
    return found


def cell_result(row: Row, seed: int) -> Facts | None:
    own = row.folder / f"seed{seed}"
    if bad := read(row.failed(seed)):
        return {"seed": seed, "status": "failed", "reason": bad["reason"]}
    train, evaluated = read(row.run(seed).with_suffix(".train.json")), read(own.with_suffix(".eval.json"))
    if not train or not evaluated:
        return None
    metrics = read(own / "eval" / "suite" / "metrics.json") or {}
    kept = ("success", "success_ci", "score", "score_ci", "episodes", "plan_ms", "errors")
    return {"seed": seed, "status": "done", **{k: metrics[k] for k in kept if k in metrics}, "train_cpu_s": train["cpu_s"], "step": train["step"],
            "eval_cpu_s": evaluated["cpu_s"], "commit": train["commit"], "commands": [train["command"], evaluated["command"]],
            "report": f"{row.name}/seed{seed}/eval/suite/report.html"}


def trained(run: Path) -> float:
    """How much of a training is done, 0 to 1."""
    rows = read_rows(run / "train.jsonl")
    steps = (read(run / "checkpoints" / "last.json") or {}).get("settings", {}).get("steps")
    return rows[-1]["step"] / steps if rows and steps else 0.0


def last_words(log: Path) -> str:
    """Why a stage failed: its error line, else the last one; and where the rest stands."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")] or lines
    return f"{told[-1].removeprefix('error: ')} ({log})"


def note(path: Path, content: Facts) -> None:
    common.save_json(path, content)


def read(path: Path) -> Facts | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None

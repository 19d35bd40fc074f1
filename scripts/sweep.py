"""A sweep (`-m` and values with commas): one job per combination, each in a folder of its own, and at the end one table.

Every job leaves a record in <sweep>/jobs/, so it does not matter where a launcher runs it: here, in other processes (joblib), on other
machines (Slurm, Ray). A job that fails says why in its record and loses no other.
"""
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from policy.train.log import console

FOLDER = {"train": "run", "eval": "out"}  # the setting that names where a verb writes
SEEDS = ("train.seed", "seed")            # what a mean is taken over
T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)  # Student's t, 1 to 10 degrees of freedom
Row = dict[str, Any]


def asked(verb: str, argv: Sequence[str]) -> Path | None:
    """The folder of the sweep that argv asks for: what run= (train) or out= (eval) says, else outputs/sweep/<time>; None without -m."""
    if not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(argv):
        return None
    said = dict(arg.split("=", 1) for arg in argv if "=" in arg)
    where = said.get("hydra.sweep.dir") or said.get(FOLDER.get(verb, ""), "")
    swept = any(c in where for c in ",${(")  # each job has been given its own
    return Path(where.strip("'\"")) if where and not swept else Path("outputs") / "sweep" / time.strftime("%Y-%m-%d_%H-%M-%S")


@contextmanager
def table(folder: Path | None) -> Iterator[None]:
    """Around the command: what its jobs have recorded is shown at the end, however it ends. Exit code 1 when a job failed."""
    if folder is None:
        yield
        return
    quoted, terminal = str(folder).replace("'", "\\'"), os.environ.get("TERM")
    sys.argv += [f"hydra.sweep.dir='{quoted}'", "hydra.sweep.subdir=."]
    if any(arg.startswith("hydra/launcher=") for arg in sys.argv):
        os.environ["TERM"] = "dumb"  # the progress bars of jobs that run at once would overwrite each other
    try:
        yield
    finally:
        os.environ.pop("TERM", None)
        if terminal is not None:
            os.environ["TERM"] = terminal
        failed = finish(folder)
    if failed:
        sys.exit(failed)


def here() -> tuple[Path, int] | None:
    """Within a job of a sweep: the sweep's folder and the job's number."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir), int(HydraConfig.get().job.num)


def own(folder: Path) -> Path:
    """`folder`, or within a sweep the part of it that belongs to this job."""
    return folder / str(job[1]) if (job := here()) and folder == job[0] else folder


def recorded(work: Callable[[], Row | None], told: Callable[[Exception], str], *, resume: bool = False) -> None:
    """Do this job's work and record what came of it; what it raises is recorded too, and does not go on to the other jobs.

    told: the user's words for an exception, or '' for a bug, which shows its traceback.   resume: a job that is done is not done again.
    """
    place = here()
    assert place is not None
    sweep, number = place
    overrides = [o.removeprefix("++") for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]
    common = [o.removeprefix("++") for o in OmegaConf.load(sweep / "multirun.yaml").hydra.overrides.task]  # as typed, before the values were dealt out
    label = f"job {number}: {' '.join(o for o in overrides if o not in common)}"
    path, tick = sweep / "jobs" / f"{number}.json", time.perf_counter()
    record: Row = {"job": number, "overrides": overrides, "status": "running", "started": time.time(), "host": platform.node()}
    if resume and (before := _read(path)) and before["status"] == "done" and before["overrides"] == overrides:
        return console.print(escape(f"{label}: done before"), highlight=False)
    _write(path, record)
    console.print(f"[bold]{escape(label)}[/]", highlight=False)
    try:
        facts = {k: v for k, v in (work() or {}).items() if k not in ("per_episode", "seeds")}  # those are in its folder
        record |= {**facts, "status": "done"}
    except (Exception, SystemExit) as e:
        text = str(e) if isinstance(e, SystemExit) else told(e)
        trace = "".join(traceback.format_exception(e))
        record |= {"status": "failed", "error": text.removeprefix("error: ") or trace, "traceback": trace}
        console.print(f"[red]{escape(label)}: {escape(record['error'])}[/]", highlight=False)
    _write(path, record | {"wall_s": time.perf_counter() - tick})


def interrupted() -> None:
    """Within a sweep, end it: for a verb that has answered ctrl-C by saving and returning."""
    if here():
        raise KeyboardInterrupt


def finish(folder: Path) -> int:
    """Print the table of a sweep's records, write sweep.json and sweep.txt; exit code 1 when a job did not end well."""
    jobs = [r for p in sorted((folder / "jobs").glob("*.json"), key=lambda p: int(p.stem)) if (r := _read(p))]
    if not jobs:
        return 0
    for job in jobs:
        if job["status"] == "running":
            job |= {"status": "failed", "error": "did not finish: interrupted, or its process was killed (memory?)"}
    varying = [k for k, values in _settings(jobs).items() if len({str(v) for v in values}) > 1]
    groups = grouped(jobs, [k for k in varying if k not in SEEDS])
    _write(folder / "sweep.json", {"command": " ".join(["dipole", Path(sys.argv[0].split()[-1]).stem, *sys.argv[1:]]), "groups": groups, "jobs": jobs})
    tables = [_jobs_table(jobs, varying)] + ([_groups_table(groups)] if any(len(g["jobs"]) > 1 and "success" in g for g in groups) else [])
    with (folder / "sweep.txt").open("w", encoding="utf-8") as f:
        Console(file=f, width=160).print(*tables)
    console.print(*tables)
    failed = [j for j in jobs if j["status"] == "failed"]
    for j in failed:
        console.print(f"[red]job {j['job']} failed[/]: {escape(j['error'].strip().splitlines()[-1])}", highlight=False)
    console.print(f"[bold]{len(jobs) - len(failed)} of {len(jobs)} jobs[/]: {folder / 'sweep.json'}", highlight=False)
    return 1 if failed else 0


def grouped(jobs: list[Row], by: Sequence[str]) -> list[Row]:
    """One row for each combination of the settings `by`: the mean of its jobs' numbers, which differ in their seeds, with 95 % intervals."""
    found: dict[str, list[Row]] = {}
    for job in jobs:
        said = _said(job)
        found.setdefault(" ".join(f"{k}={said[k]}" for k in by if k in said), []).append(job)
    rows: list[Row] = []
    for name, members in found.items():
        done = [j for j in members if j["status"] == "done"]
        row: Row = {"name": name, "jobs": [j["job"] for j in members], "failed": len(members) - len(done)}
        for key in ("success", "score"):
            if with_key := [j for j in done if j.get(key) is not None]:
                row[key] = sum(j[key] for j in with_key) / len(with_key)
                row[f"{key}_ci"] = across([j[key] for j in with_key], [j[f"{key}_ci"] for j in with_key])
        rows.append(row)
    return rows


def across(means: Sequence[float], intervals: Sequence[Sequence[float]]) -> list[float]:
    """95 % interval of the mean over seeds, from each seed's mean and own interval.

    Student's t over the seeds, and never narrower than the seeds' own uncertainties combined: three seeds that happen to agree prove little.
    """
    n, mean = len(means), sum(means) / len(means)
    spread = 0.0
    if n > 1:
        spread = student(n - 1) * math.sqrt(sum((m - mean) ** 2 for m in means) / (n - 1) / n)
    below = math.sqrt(sum((m - lo) ** 2 for m, (lo, _) in zip(means, intervals, strict=True))) / n
    above = math.sqrt(sum((hi - m) ** 2 for m, (_, hi) in zip(means, intervals, strict=True))) / n
    lo, hi = mean - max(spread, below), mean + max(spread, above)
    inside = all(0 <= m <= 1 for m in means)  # a rate, or a score of one
    return [max(0.0, lo), min(1.0, hi)] if inside else [lo, hi]


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Cornish-Fisher beyond the table)."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = 1.959963984540054
    first, second, third = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _said(job: Row) -> dict[str, str]:
    return {o.lstrip("+~").split("=", 1)[0]: o.split("=", 1)[-1] for o in job["overrides"]}


def _settings(jobs: list[Row]) -> dict[str, list[str | None]]:
    """Every setting that a job names, with its value in each."""
    said = [_said(j) for j in jobs]
    return {k: [s.get(k) for s in said] for k in dict.fromkeys(k for s in said for k in s)}


def _jobs_table(jobs: list[Row], varying: list[str]) -> Table:
    rows = []
    for j in jobs:
        said = _said(j)
        rows.append({"job": str(j["job"]), **{k: said.get(k, "") for k in varying}, "success": "failed" if j["status"] == "failed" else _number(j, "success"),
                     "score": _number(j, "score"), "loss": _digits(j.get("loss"), ".4f"), "CPU, s": _digits(j.get("cpu_s"), ".0f"),
                     "wall, s": _digits(j.get("wall_s"), ".0f"), "folder": j.get("folder", "")})
    return _table(rows)


def _groups_table(groups: list[Row]) -> Table:
    return _table([{"mean over seeds": g["name"] or "all", "jobs": str(len(g["jobs"]) - g["failed"]) + (f" ({g['failed']} failed)" if g["failed"] else ""),
                    "success": _number(g, "success"), "score": _number(g, "score")} for g in groups])


def _table(rows: list[dict[str, str]]) -> Table:
    """Columns by name, without those in which nothing stands."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    columns = [c for c in rows[0] if any(r[c] for r in rows)]
    for c in columns:
        table.add_column(escape(c), overflow="fold")
    for r in rows:
        table.add_row(*(escape(r[c]) for c in columns), style="red" if r.get("success") == "failed" else None)
    return table


def _digits(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _number(row: Row, key: str) -> str:
    if row.get(key) is None:
        return ""
    lo, hi = row[f"{key}_ci"]
    return f"{row[key]:.1%} [{lo:.1%}, {hi:.1%}]" if key == "success" else f"{row[key]:.3f} [{lo:.3f}, {hi:.3f}]"


def _read(path: Path) -> Row | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _write(path: Path, content: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path)

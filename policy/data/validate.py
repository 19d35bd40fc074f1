"""What is wrong with a dataset, before training finds out: every check, grouped findings, an exit code for CI. Backs `dipole data validate`.

A check is a function check(data) -> list[Finding]; CHECKS names them. Nothing is changed, and memory stays bounded (policy.data.checks.look).
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.checks import actions, copies, images, motion, odd, rotation, stamps, units, values
from policy.data.checks.finding import SEVERITIES, Finding, finding, ordered, some
from policy.data.checks.look import Data, Reads
from policy.data.files import DataError, Files, Url, where
from policy.data.store import ENDS, Store

Check = Callable[[Data], list[Finding]]
Progress = Callable[[str, int, int], None]
CHECKS: dict[str, Check] = {"finite": values.not_finite, "lengths": stamps.lengths, "stamps": stamps.stamps, "constant": values.constant,
                            "stuck": values.stuck, "clipped": values.clipped, "outlier": values.outlier, "precision": values.precision,
                            "units": units.units, "rotations": rotation.quaternions, "wraps": rotation.wraps, "jumps": motion.jumps, "idle": motion.idle,
                            "lag": actions.lag, "meaning": actions.meaning, "odd": odd.odd, "copies": copies.copies, "images": images.images}


@dataclass
class Report:
    """path: file or URL.   findings, worst first.   facts: what the dataset is.   data: to draw from, None when it could not be read.

    seconds: spent looking.
    """
    path: str
    findings: list[Finding]
    facts: dict[str, Any] = field(default_factory=dict)
    data: Data | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)

    def exit_code(self, *, strict: bool = False) -> int:
        """1 with errors; 2 with warnings and no error, if strict; else 0."""
        return 1 if self.count("error") else 2 if strict and self.count("warning") else 0

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, **self.facts, "seconds": round(self.seconds, 2), **{f"{s}s": self.count(s) for s in SEVERITIES},
                "findings": [f.to_json() for f in self.findings]}


def validate(path: Path | str, *, skip: Sequence[str] = (), missing: str = "error", progress: Progress | None = None, **how: Any) -> Report:
    """Every check but those in skip (names of CHECKS) on the store at path; a store that cannot be opened is a report with one error.

    missing: as Store.open takes it.   progress(name of a check, how many are done, of how many).
    how: as Data takes it (action, horizon, val_ratio, seed, image_bytes).
    """
    start = time.perf_counter()
    path = where(path)
    if not isinstance(path, Url) and not path.exists():
        raise DataError(f"{path} does not exist. Check path=…")
    try:
        wrong = bounds(files := Files(path))
        if any(f.severity == "error" for f in wrong):
            return Report(str(path), ordered(wrong), seconds=time.perf_counter() - start)
        store = Store.open(path, missing=missing)
    except DataError as error:
        return Report(str(path), [unreadable(str(error))], seconds=time.perf_counter() - start)
    report = check(store, skip=skip, progress=progress, chunks={key: files.array(f"data/{key}").chunks[0] for key in store.keys}, **how)
    report.findings = ordered([*wrong, *report.findings])
    report.seconds = time.perf_counter() - start
    return report


def check(store: Reads, *, skip: Sequence[str] = (), progress: Progress | None = None, **how: Any) -> Report:
    """The same for anything that reads like a Store.   how: as Data takes it.   ValueError names a check that does not exist."""
    if unknown := set(skip) - set(CHECKS):
        raise ValueError(f"skip={sorted(unknown)}: there is no such check; use some of {', '.join(CHECKS)}")
    start, data = time.perf_counter(), Data(store, **how)
    todo = {name: run for name, run in CHECKS.items() if name not in skip}
    found: list[Finding] = []
    for i, (name, run) in enumerate(todo.items()):
        if progress:
            progress(name, i, len(todo))
        try:
            with np.errstate(all="ignore"):  # nan and numbers near the end of float32 are what is looked for
                found += run(data)
        except DataError as error:  # a file that is missing or damaged
            found.append(unreadable(str(error)))
    if progress:
        progress("", len(todo), len(todo))
    if not data.action:
        found.append(finding("warning", "no_action", f"there is no action key: {', '.join(data.schema)}", why="Nothing can be learned without actions, and the "
                             "checks of lag and meaning were left out.", fix="Name it: action=…; or map it when converting"))
    if not data.fps:
        found.append(finding("note", "no_rate", "the dataset does not say its rate", why="Control steps have no duration: training and the robot must be told.",
                             fix="data.fps=… in training, or fps=… when converting"))
    unique = {(f.severity, f.code, f.key, f.text): f for f in found}
    if broken := any(f.code == "unreadable" for f in found):
        data.action = ""  # nothing more is read
    return Report(str(data.path), ordered(unique.values()), facts(data), None if broken else data, time.perf_counter() - start)


def facts(data: Data) -> dict[str, Any]:
    n = data.lengths
    out: dict[str, Any] = {"episodes": len(n), "steps": data.frames, "fps": data.fps, "length": [int(n.min()), int(np.median(n)), int(n.max())],
                           "keys": {key: {"shape": list(shape), "dtype": str(dtype), "role": data.roles[key]} for key, (shape, dtype) in data.schema.items()}}
    if data.looked:
        out["images_looked_at"] = {key: round(share, 3) for key, share in data.looked.items()}
    if seen := actions.looks(data):
        out["action"] = seen
    return out


def unreadable(text: str) -> Finding:
    return finding("error", "unreadable", text, why="What cannot be read cannot be trained on.", fix="As it says; or copy the dataset again from its source")


def bounds(files: Files) -> list[Finding]:
    """Episode ends as they are on disk: increasing, and as many frames as there are rows."""
    ends = np.asarray(files.array(ENDS)[:], np.int64)
    ends = ends[:len(np.trim_zeros(ends, "b"))]
    rows = {key: int(files.array(f"data/{key}").shape[0]) for key in files.data_keys()}
    if not len(ends) or not rows:
        return []
    why, n = "Episodes cannot be told apart: windows would reach from one into another.", min(rows.values())
    wrong = np.flatnonzero(np.diff(ends, prepend=0) <= 0)
    if len(wrong):
        return [finding("error", "episode_bounds", f"{ENDS} must increase; {some([f'entry {i} is {ends[i]} after {ends[i - 1] if i else 0}' for i in wrong])}",
                        why=why, fix="It holds cumulative frame counts: write np.cumsum(lengths), without empty episodes", count=len(wrong))]
    if ends[-1] > n:
        return [finding("error", "episode_bounds", f"{ENDS} counts {ends[-1]:,} frames, but {min(rows, key=lambda k: rows[k])} has {n:,}", why=why,
                        fix="Frames are missing: copy the dataset again, or cut the last ends")]
    if len({*rows.values()}) > 1 or n > ends[-1]:
        return [finding("note", "episode_bounds", f"{max(rows.values()) - ends[-1]:,} frames lie behind the last end and belong to no episode",
                        why="A recording that was broken off: they are not read.", fix="Nothing to do; the next append overwrites them")]
    return []

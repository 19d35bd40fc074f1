"""What is known about steps of several copies, by name, and why a copy left its episode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Rows = dict[tuple[str, str], np.ndarray]  # ("obs" | "info" | "state" | "", name) -> values
REWARD, TERMINATED, TRUNCATED = ("", "reward"), ("", "terminated"), ("", "truncated")
SUCCESS, ELAPSED = ("info", "success"), ("info", "elapsed")


class Fault(NamedTuple):
    """Why a copy left its episode. text: usually a traceback.

    step: the first of the call's control steps whose outcome is not known.   late: how many later the fault came.
    """

    step: int
    text: str
    late: int = 0


Faults = Mapping[int, Fault]


def earliest(*faults: Faults) -> Faults:
    """The first fault of each; of equally early ones that named first."""
    found: dict[int, Fault] = {}
    for i, fault in (item for each in faults for item in each.items()):
        if i not in found or fault.step < found[i].step:
            found[i] = fault
    return found


def first_bad(rows: Rows) -> Faults:
    """By row, the first step of rows (m, t, ...) with an observation, a reward or a state that is not finite."""
    faults: Faults = {}
    for (kind, name), value in rows.items():
        if kind == "info" or value.dtype.kind != "f" or np.isfinite(value).all():
            continue
        bad = ~np.asarray(np.isfinite(value).all(axis=tuple(range(2, value.ndim))))
        for row in np.flatnonzero(bad.any(axis=1)):
            k = int(bad[row].argmax())
            faults = earliest(faults, {int(row): Fault(k, not_finite(kind, name, value[row, k]))})
    return faults


def not_finite(kind: str, name: str, value: np.ndarray) -> str:
    return f"{f'observation {name!r}' if kind == 'obs' else name} is not finite: {np.array2string(value, threshold=20)}"


def named(rows: Rows, kind: str) -> dict[str, np.ndarray]:
    return {name: value for (of, name), value in rows.items() if of == kind}


def put(into: Rows, where: np.ndarray, rows: Rows, shape: tuple[int, ...]) -> None:
    """Write rows (m, ...) at `where` (m,) of into (*shape, ...); a value that was not there before is made, NaN for the others."""
    for key, value in rows.items():
        if key not in into:
            into[key] = np.full((*shape, *value.shape[len(shape) :]), np.nan if value.dtype.kind == "f" else 0, value.dtype)
        into[key][where] = value

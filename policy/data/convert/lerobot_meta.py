"""What a LeRobot dataset says about itself: meta/ of v2 (json lines) and v3 (parquet), and where each episode's rows and videos are."""
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert.own import Own, load
from policy.data.files import DataError

INFO, TASKS, EPISODES, STATS = "meta/info.json", "meta/tasks", "meta/episodes", "meta/stats.json"
EPISODE_STATS = "meta/episodes_stats.jsonl"  # v2.1
OWN = "meta/dipole.json"  # what LeRobot has no place for, see own.py: units, what the action means, the names and shapes of a store's keys
DATA_V2, VIDEO_V2 = ("data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                     "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")
DATA_V3, VIDEO_V3 = ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                     "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
AGAIN = "Copy meta/ again from the dataset's source"


def arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet"""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("LeRobot's tables are read and written by pyarrow: pip install 'dipole[data]'", name="pyarrow") from e
    return pyarrow, pyarrow.parquet


def guarded(file: Path, reader: Callable[[Path], Any]) -> Any:
    """reader(file), or DataError that names the file."""
    pa, _ = arrow()
    if not file.is_file():
        raise DataError(f"{file} is not there. Copy it from the dataset's source; videos may be missing, tables may not")
    try:
        return reader(file)
    except (pa.ArrowException, OSError, ValueError, KeyError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{file} cannot be read ({str(e).splitlines()[0] if str(e) else type(e).__name__}). It is truncated or damaged: copy it again") from e


@dataclass(frozen=True)
class Layout:
    """rows: one dict an episode, in order, with episode_index, length, tasks and, in v3, where its rows and frames are (no statistics)."""
    path: Path
    version: tuple[int, int]
    info: Mapping[str, Any]
    tasks: Mapping[int, str]
    rows: Sequence[Mapping[str, Any]]

    @property
    def features(self) -> Mapping[str, Any]:
        return self.info["features"]

    @property
    def v3(self) -> bool:
        return self.version[0] == 3

    def _named(self, template: str, **fields: Any) -> str:
        """A path inside the dataset from a template that the dataset itself brings."""
        if not re.fullmatch(r"(?:[^{}]|\{\w+(?::\d*d)?\})+", template) or template.startswith("/") or ".." in template:
            raise DataError(f"{self.path}: {template!r} in {INFO} is no path of LeRobot's. {AGAIN}")
        try:
            return template.format(**fields)
        except (KeyError, ValueError) as e:
            raise DataError(f"{self.path}: {template!r} in {INFO} does not fit v{self.version[0]} ({e}). {AGAIN}") from e

    def _v2(self, i: int) -> dict[str, int]:
        episode = self.rows[i]["episode_index"]
        return {"episode_chunk": episode // int(self.info.get("chunks_size") or 1000), "episode_index": episode}

    def data_files(self) -> list[str]:
        """In the order of their rows."""
        if self.v3:
            pairs = dict.fromkeys((r["data/chunk_index"], r["data/file_index"]) for r in self.rows)
            return [self._named(self.info["data_path"], chunk_index=c, file_index=f) for c, f in pairs]
        return [self._named(self.info["data_path"], **self._v2(i)) for i in range(len(self.rows))]

    def video_of(self, i: int, key: str) -> tuple[str, float, int]:
        """The file that holds camera key of the i-th episode, the time [s] at which the episode begins there, and the file's number of frames."""
        row = self.rows[i]
        if not self.v3:
            return self._named(self.info["video_path"], video_key=key, **self._v2(i)), 0.0, row["length"]
        chunk, file, start = (row.get(f"videos/{key}/{part}") for part in ("chunk_index", "file_index", "from_timestamp"))
        if chunk is None or file is None or start is None:
            raise DataError(f"{self.path}: {EPISODES} does not say where the video of {key} is. {AGAIN}, or leave the cameras out with videos: skip")
        return self._named(self.info["video_path"], video_key=key, chunk_index=chunk, file_index=file), float(start), self._frames[key, chunk, file]

    @cached_property
    def _frames(self) -> Counter[tuple[str, int, int]]:
        """{(camera, chunk, file): frames of all episodes in it}"""
        total: Counter[tuple[str, int, int]] = Counter()
        for row in self.rows:
            for name in row:
                if name.endswith("/chunk_index") and name.startswith("videos/"):
                    key = name.removeprefix("videos/").removesuffix("/chunk_index")
                    total[key, row[name], row[f"videos/{key}/file_index"]] += row["length"]
        return total

    def video_files(self, key: str) -> list[str]:
        if self.v3 and f"videos/{key}/chunk_index" not in self.rows[0]:
            return []
        return list(dict.fromkeys(self.video_of(i, key)[0] for i in range(len(self.rows)))) if self.info.get("video_path") else []

    def batches(self, file: str, columns: list[str], rows: int) -> Iterator[Any]:
        """The rows of one table, a few at a time."""
        pa, pq = arrow()
        table = guarded(self.path / file, pq.ParquetFile)
        if absent := [c for c in columns if c not in table.schema_arrow.names]:
            raise DataError(f"{self.path / file} lacks the column {absent[0]}, which the first file has. Copy it again from the dataset's source")
        try:
            yield from table.iter_batches(batch_size=rows, columns=columns)
        except (pa.ArrowException, OSError) as e:
            raise DataError(f"{self.path / file} cannot be read ({e}). It is truncated or damaged: copy it again") from e

    def tables(self, columns: list[str], rows: int) -> Iterator[Any]:
        """One table for each episode, in the order of the files."""
        pa, _ = arrow()
        held: list[Any] = []
        episode = None
        for file in self.data_files():
            for batch in self.batches(file, columns, rows):
                owner = np.asarray(batch["episode_index"])
                cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(owner)]
                for lo, hi in pairwise(cuts):
                    if hi > lo and owner[lo] != episode and held:
                        yield pa.Table.from_batches(held)
                        held = []
                    if hi > lo:
                        episode = owner[lo]
                        held.append(batch.slice(lo, hi - lo))
        if held:
            yield pa.Table.from_batches(held)


def open_layout(path: Path | str) -> Layout:
    path = Path(path)
    info = _json(path / INFO)
    try:
        version = tuple(int(x) for x in str(info["codebase_version"]).removeprefix("v").split("."))[:2]
        features, fps = info["features"], float(info["fps"])
        fine = 0 < fps < 1e6 and all(isinstance(f["dtype"], str) and _shape(f["shape"]) for f in features.values())
        fine &= all(isinstance(info.get(k) or "", str) for k in ("data_path", "video_path")) and int(info.get("chunks_size") or 1000) > 0
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"{path / INFO} lacks what LeRobot writes there ({e!r}). {AGAIN}") from e
    if not fine or any("/" in k or ".." in k for k in features):
        raise DataError(f"{path / INFO}: fps must be above 0, each feature needs dtype and shape, paths are text, and no feature's name holds / or ... {AGAIN}")
    if len(version) < 2 or version[0] not in (2, 3):
        raise DataError(f"{path} is LeRobot {info['codebase_version']}; v2.0 to v3.x are read. Bring it there with LeRobot's own conversion scripts")
    info["data_path"] = info.get("data_path") or (DATA_V3 if version[0] == 3 else DATA_V2)
    try:
        tasks, rows = _v3(path) if version[0] == 3 else _v2(path)
    except (KeyError, TypeError, ValueError, OverflowError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: the tasks in meta are not numbered ({e}). {AGAIN}") from e
    if not rows:
        raise DataError(f"{path}: meta lists no episode. {AGAIN}")
    for row in rows:
        if not all(_count(row.get(k)) for k in ("episode_index", "length")) or not isinstance(row.get("tasks") or [], list):
            raise DataError(f"{path}: an episode in meta has no episode_index, length and tasks: {str(row)[:200]}. {AGAIN}")
    return Layout(path, (version[0], version[1]), info, tasks, rows)


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 10**9


def _shape(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(_count(n) for n in x)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"{file} is not there. {AGAIN}") from e
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise DataError(f"{file} is not JSON ({e}). {AGAIN}") from e
    if not isinstance(found, dict):
        raise DataError(f"{file} holds a {type(found).__name__}, expected an object. {AGAIN}")
    return found


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file} is not there. {AGAIN}")
    with open(file, "rb") as f:
        for i, line in enumerate(f):
            if line.strip():
                try:
                    yield dict(json.loads(line.decode()))
                except (ValueError, TypeError, RecursionError) as e:
                    raise DataError(f"{file} line {i + 1} is not a JSON object ({e}). {AGAIN}") from e


def _v2(path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    tasks = {int(t.get("task_index", i)): str(t.get("task", "")) for i, t in enumerate(json_lines(path / f"{TASKS}.jsonl"))}
    return tasks, list(json_lines(path / f"{EPISODES}.jsonl"))


def _v3(path: Path) -> tuple[dict[int, str], list[dict[str, Any]]]:
    _, pq = arrow()
    table = guarded(path / f"{TASKS}.parquet", pq.read_table)
    text = [n for n in table.column_names if n != "task_index"]  # pandas calls its index __index_level_0__ or task
    if "task_index" not in table.column_names or not text:
        raise DataError(f"{path / TASKS}.parquet has the columns {table.column_names}, expected task_index and the task. {AGAIN}")
    tasks = dict(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist(), strict=True))
    rows: list[dict[str, Any]] = []
    for file in episode_tables(path):
        plain = [n for n in guarded(file, pq.read_schema).names if not n.startswith("stats/")]
        rows += guarded(file, partial(pq.read_table, columns=plain)).to_pylist()
    if rows and (absent := {"episode_index", "length", "data/chunk_index", "data/file_index"} - set(rows[0])):
        raise DataError(f"{path / EPISODES}: {', '.join(sorted(absent))} is missing. {AGAIN}")
    return tasks, rows


def episode_tables(path: Path) -> list[Path]:
    """The tables under meta/episodes of v3, in order."""
    files = sorted((path / EPISODES).glob("*/*.parquet"))
    if not files:
        raise DataError(f"{path / EPISODES} holds no tables. {AGAIN}")
    return files


def hwc(feature: Mapping[str, Any]) -> tuple[int, int, int]:
    """(h, w, c) of an image, which some descriptions give as (c, h, w)."""
    shape = [int(x) for x in feature["shape"]]
    if len(shape) != 3:
        raise DataError(f"an image feature has shape {shape}, expected three numbers. {AGAIN}")
    names = feature.get("names")
    first = str(names[0]).lower() if isinstance(names, list) and names else ""
    if first.startswith("channel") or (not first and shape[0] in (1, 3) and shape[2] not in (1, 3)):
        shape = [shape[1], shape[2], shape[0]]
    return shape[0], shape[1], shape[2]


def flat_names(feature: Mapping[str, Any]) -> list[str]:
    """The channels' names, which are a list, a list in a list, or a list in a dict; [] where there are not as many as channels."""
    names = feature.get("names")
    while isinstance(names, dict | list) and len(names) == 1 and not isinstance(first := next(iter(names.values() if isinstance(names, dict) else names)), str):
        names = first
    fine = isinstance(names, list) and all(isinstance(n, str) for n in names) and [len(names)] == list(feature.get("shape", []))
    return list(names) if fine and names else []


def read_own(path: Path, notes: list[str]) -> Own:
    return load((path / OWN).read_text(encoding="utf-8", errors="replace") if (path / OWN).is_file() else None, notes)


def shapes(own: Own) -> dict[str, tuple[int, ...]]:
    """{column: shape} of the keys of a store that was written as LeRobot; {} for a dataset that came from elsewhere."""
    columns = {stored: name for name, stored in own.keys.items()}
    return {columns.get(key, key): shape for key, shape, _ in own.columns}


def keep(layout: Layout) -> dict[str, Any]:
    """What a way back needs: info.json, the tasks, and the statistics that cannot be computed again because the videos may be gone."""
    again = [k for k, f in layout.features.items() if f["dtype"] in ("video", "image")] + ["timestamp"]  # of float64 times in some datasets
    rows = [{k: v for k, v in row.items() if k not in ("stats", "tasks")} for row in layout.rows]
    episodes = [{"row": row, "tasks": list(old.get("tasks") or []), "stats": {}} for row, old in zip(rows, layout.rows, strict=True)]
    for entry, stats in zip(episodes, _episode_stats(layout, again), strict=False):
        entry["stats"] = stats
    own = {"own": _json(layout.path / OWN)} if read_own(layout.path, []).columns else {}
    return {"info": layout.info, "tasks": [[i, text] for i, text in layout.tasks.items()], "episodes": episodes, **own}


def _episode_stats(layout: Layout, of: Sequence[str]) -> Iterator[dict[str, Any]]:
    """{feature: statistics} of each episode, for these features."""
    _, pq = arrow()
    if not layout.v3:
        file = layout.path / EPISODE_STATS
        for line in json_lines(file) if file.is_file() else ():
            stats = line.get("stats") or {}
            yield {k: stats[k] for k in of if k in stats}
        return
    for table in episode_tables(layout.path):
        names = [n for n in pq.read_schema(table).names if n.startswith("stats/") and n.removeprefix("stats/").rpartition("/")[0] in of]
        for row in pq.read_table(table, columns=names).to_pylist() if names else ():
            found: dict[str, Any] = {}
            for name, value in row.items():
                feature, _, what = name.removeprefix("stats/").rpartition("/")
                found.setdefault(feature, {})[what] = value
            yield found

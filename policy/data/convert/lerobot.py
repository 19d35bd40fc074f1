"""LeRobot datasets, v2.0 to v3.0: parquet tables, mp4 videos or embedded images, and meta/ that says what they are.

v2: one parquet file and one video per episode and camera. v3: files that many episodes share, and tables in meta/episodes that say where each lies.

Options of the reader (`options:` of a mapping): videos: decode, or skip to leave the cameras out; tolerance: s between a row's time stamp and its
frame's (1e-4).   Options of the writer, `write`, are in lerobot_write.py.

What comes back: every column under its own name but index, episode_index and frame_index, which count; `task_index` where there is more than one
task (attribute `tasks`); images and videos (n, h, w, 3) uint8. Columns of text or of lists that vary in length are left out, and said.
"""
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import lerobot_meta as meta
from policy.data.convert import video
from policy.data.convert.images import read_image
from policy.data.convert.lerobot_meta import Layout
from policy.data.convert.lerobot_write import write
from policy.data.convert.own import Own
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.semantics import Semantics

__all__ = ["detects", "read", "write"]

COUNTED = ("index", "episode_index", "frame_index")
ROWS = 256  # rows of a parquet file in memory at once, beside an episode


def detects(path: Path | str) -> bool:
    """Whether path is a folder with meta/info.json of LeRobot."""
    file = Path(path) / meta.INFO
    try:
        return "features" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


@dataclass(frozen=True)
class Column:
    """One feature as it is stored: shape and dtype of a frame, kind table (numbers), image (bytes in the table) or video."""
    kind: str
    shape: tuple[int, ...]
    dtype: np.dtype


def read(path: Path | str, *, videos: str = "decode", tolerance: float = video.TOLERANCE) -> Source:
    """DataError: a damaged or missing file, rows that do not count up, a video without the frame of a row."""
    if videos not in ("decode", "skip"):
        raise ValueError(f"videos is decode or skip, got {videos!r}")
    if not (isinstance(tolerance, int | float) and 0 < tolerance < 10):
        raise ValueError(f"tolerance is a time in s above 0, got {tolerance!r}")
    layout = meta.open_layout(path)
    notes: list[str] = []
    own = meta.read_own(layout.path, notes)
    columns = _columns(layout, videos, notes, meta.shapes(own))
    texts = [layout.tasks[i] for i in sorted(layout.tasks)]
    attrs: dict[str, Any] = {"names": {k: flat for k in columns if (flat := meta.flat_names(layout.features[k]))}}
    if layout.info.get("robot_type") not in (None, "unknown"):
        attrs["robot"] = layout.info["robot_type"]
    if len(texts) != 1:
        attrs["tasks"] = texts
    elif texts[0] or not own.columns:
        attrs["task"] = texts[0]
    return Source(
        path=layout.path, format="lerobot", schema={k: (c.shape, c.dtype) for k, c in columns.items()},
        episodes=partial(_episodes, layout, columns, float(tolerance)), count=len(layout.rows), fps=float(layout.info["fps"]),
        units=own.units, action="action" if "action" in columns else None, semantics=_semantics(layout, own), attrs=attrs, notes=notes,
        keep=meta.keep(layout), names={k: stored for k, stored in own.keys.items() if k in columns},
        obs=own.obs if own.columns else [k for k, c in columns.items() if k.startswith("observation.") and c.kind == "table"] or None)


def _semantics(layout: Layout, own: Own) -> Semantics:
    """LeRobot does not say what an action means, only its channels' names."""
    if own.columns or own.semantics != Semantics():
        return own.semantics
    flat = meta.flat_names(layout.features.get("action", {}))
    state = flat and flat == meta.flat_names(layout.features.get("observation.state", {}))
    return Semantics(of="observation.state" if state else None, text=f"LeRobot does not say; channels {', '.join(flat)}" if flat else "")


def _columns(layout: Layout, videos: str, notes: list[str], stored: Mapping[str, tuple[int, ...]]) -> dict[str, Column]:
    """The features that can be had, in the order of info.json; the others are noted.   stored: shapes of a store's keys, where it is made of one."""
    pa, pq = meta.arrow()
    schema = meta.guarded(layout.path / layout.data_files()[0], lambda f: pq.read_schema(f))
    found = {}
    for key, feature in layout.features.items():
        if key in COUNTED or (key == "task_index" and len(layout.tasks) <= 1) or (key == "timestamp" and stored and key not in stored):
            continue
        if feature["dtype"] == "video":
            if why := _without_video(layout, key, feature, videos):
                notes.append(f"{key} is left out: {why}")
            else:
                found[key] = Column("video", meta.hwc(feature), np.dtype("uint8"))
        elif key not in schema.names:
            notes.append(f"{key} is left out: it is declared, but the tables have no such column")
        elif feature["dtype"] == "image":
            shape, dtype = _first_image(layout, key, meta.hwc(feature))
            found[key] = Column("image", shape, dtype)
        else:
            value = schema.field(key).type
            while pa.types.is_list(value) or pa.types.is_fixed_size_list(value) or pa.types.is_large_list(value):
                value = value.value_type
            shape = tuple(feature["shape"]) if value != schema.field(key).type else ()
            if not (pa.types.is_integer(value) or pa.types.is_floating(value) or pa.types.is_boolean(value)) or 0 in shape:
                notes.append(f"{key} is left out: {feature['dtype']} {list(feature['shape'])} is not a number or a list of as many numbers in each row")
            else:
                shape = said if math.prod(said := stored.get(key, shape)) == math.prod(shape) else shape  # LeRobot has no (1,), which it calls a number
                found[key] = Column("table", shape, np.dtype(value.to_pandas_dtype()))
    for name in schema.names:
        if name not in layout.features:
            notes.append(f"{name} is left out: the tables have it, but meta/info.json does not describe it")
    if not found:
        raise DataError(f"{layout.path}: {meta.INFO} describes no column that can be read ({' '.join(notes) or 'it has none'})")
    return found


def _without_video(layout: Layout, key: str, feature: Mapping[str, Any], videos: str) -> str | None:
    """Why a camera cannot be had; None when it can. DataError when some of its files are there."""
    info = feature.get("info") or feature.get("video_info") or {}
    if info.get("video.is_depth_map"):
        return "depth videos are not decoded"
    if videos == "skip":
        return "videos: skip"
    files = layout.video_files(key)
    absent = [f for f in files if not (layout.path / f).is_file()]
    if absent and len(absent) < len(files):
        raise DataError(f"{layout.path} lacks {len(absent)} of {len(files)} videos of {key}, the first is {absent[0]}. Copy them too, or leave the "
                        "cameras out with videos: skip")
    if absent or not files:
        return f"its videos are not here ({absent[0] if absent else 'none are named'} and so on); copy them into the folder to have it"
    return None


def _first_image(layout: Layout, key: str, shape: tuple[int, int, int]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a frame, looked up in the first row: 16 bit depth is not told from 8 bit grey by the description."""
    for batch in layout.batches(layout.data_files()[0], [key], 1):
        x = read_image(_bytes(layout, key, batch[key][0].as_py()), f"the first {key} of {layout.path}", size=shape[:2], channels=shape[2])
        return x.shape, x.dtype
    return shape, np.dtype("uint8")


def _bytes(layout: Layout, key: str, cell: Any) -> bytes:
    """The encoded image in a cell, or in the file that it names."""
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"]
    name = cell.get("path") if isinstance(cell, dict) else cell
    file = layout.path / str(name)
    if name and file.is_file() and file.resolve().is_relative_to(layout.path.resolve()):
        return file.read_bytes()
    raise DataError(f"{layout.path}: {key} is an image whose bytes are not in the table and whose file {name!r} is not in the dataset. "
                    "Copy images/ too, or leave it out with skip: [" + key + "]")


def _episodes(layout: Layout, columns: Mapping[str, Column], tolerance: float) -> Iterator[Episode]:
    """Each episode in order, as meta lists them."""
    have = [k for k, c in columns.items() if c.kind != "video"]
    want = list(dict.fromkeys([*have, "timestamp", "frame_index", "episode_index"]))
    rows = iter(enumerate(layout.rows))
    for table in layout.tables(want, ROWS):
        at, row = next(rows, (len(layout.rows), None))
        episode = int(table["episode_index"][0].as_py())
        if row is None or episode != row["episode_index"]:
            raise DataError(f"{layout.path}: the tables go on with episode {episode} where meta lists "
                            f"{row['episode_index'] if row else 'no more'}. Copy data/ and meta/ from the same version of the dataset")
        count = np.asarray(table["frame_index"])
        if len(count) != row["length"] or (count != np.arange(len(count))).any():
            raise DataError(f"{layout.path}: episode {episode} has {len(count)} rows that count {count[0]} to {count[-1]}, meta says it is "
                            f"{row['length']} long. Copy data/ and meta/ from the same version of the dataset")
        out = {}
        for key, column in columns.items():
            if column.kind == "table":
                out[key] = _numbers(layout, table, key, column)
            elif column.kind == "image":
                out[key] = _images(layout, table, key, column)
            else:
                out[key] = _video(layout, at, key, column, np.asarray(table["timestamp"], np.float64), tolerance)
        yield out
    if (left := next(rows, None)) is not None:
        raise DataError(f"{layout.path}: meta lists {len(layout.rows)} episodes, the tables end before episode {left[1]['episode_index']}. "
                        "Copy data/ again")


def _numbers(layout: Layout, table: Any, key: str, column: Column) -> np.ndarray:
    flat = table[key].combine_chunks()
    for _ in column.shape:
        if flat.null_count or not hasattr(flat, "flatten"):
            break
        flat = flat.flatten()
    n, wrong = table.num_rows, f"{layout.path}: {key} of episode {table['episode_index'][0].as_py()}"
    if flat.null_count:
        raise DataError(f"{wrong} has {flat.null_count} empty cells. Repair the table, or leave the column out with skip: [{key}]")
    x = flat.to_numpy(zero_copy_only=False)
    if x.size != n * int(np.prod(column.shape)) or x.dtype != column.dtype:
        raise DataError(f"{wrong} holds {x.size} numbers of {x.dtype}, expected {n} rows of {column.shape} {column.dtype} as in the first file. "
                        f"Correct {meta.INFO} or the table")
    return x.reshape(n, *column.shape)


def _images(layout: Layout, table: Any, key: str, column: Column) -> np.ndarray:
    out = np.empty((table.num_rows, *column.shape), column.dtype)
    for i, cell in enumerate(table[key]):
        where = f"{layout.path}: {key} of row {i} of episode {table['episode_index'][0].as_py()}"
        x = read_image(_bytes(layout, key, cell.as_py()), where, size=(column.shape[0], column.shape[1]), channels=column.shape[2])
        if x.dtype != column.dtype:
            raise DataError(f"{where} is {x.dtype}, the first row is {column.dtype}. Convert the images to one kind")
        out[i] = x
    return out


def _video(layout: Layout, at: int, key: str, column: Column, times: np.ndarray, tolerance: float) -> np.ndarray:
    file, start, total = layout.video_of(at, key)
    return video.decode(layout.path / file, times + start, (column.shape[0], column.shape[1], 3), tolerance=tolerance, total=total)

"""The parquet tables and videos of a LeRobot dataset, written episode by episode: a file each (v2.1), or files that many share (v3.0)."""
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import lerobot_meta as meta
from policy.data.convert.images import png
from policy.data.convert.source import Episode
from policy.data.convert.video import Encoder

MB = 2**20


@dataclass
class Files:
    """features: of info.json.   chunk: files in a folder.   data_mb, video_mb: size at which v3 starts another file."""
    root: Path
    v3: bool
    features: Mapping[str, Any]
    fps: float
    chunk: int = 1000
    data_mb: float = 100
    video_mb: float = 200
    _table: Any = None
    _bytes: int = 0
    _at: int = -1  # file of v3 that is being written
    _video: dict[str, tuple[int, Encoder]] = field(default_factory=dict)

    def add(self, i: int, columns: Episode, videos: Episode, first: int) -> dict[str, Any]:
        """Episode i, whose first row is row `first` of all; returns what meta/episodes of v3 tells about its place."""
        rows = table(columns, self.features)
        if not self.v3:
            place: dict[str, Any] = {"episode_chunk": i // self.chunk, "episode_index": i}
            file = _made(self.root / meta.DATA_V2.format(**place))
            meta.arrow()[1].write_table(rows, file)
            for key, x in videos.items():
                with Encoder(self.root / meta.VIDEO_V2.format(video_key=key, **place), self.fps, x.shape[1:]) as encoder:
                    encoder.add(x)
                self._noted(key, encoder)
            return {}
        if self._table is None or self._bytes + rows.nbytes > self.data_mb * MB:
            self._next_table(rows.schema)
        self._table.write_table(rows, row_group_size=max(1, len(rows)))
        self._bytes += rows.nbytes
        out = {"data/chunk_index": self._at // self.chunk, "data/file_index": self._at % self.chunk,
               "dataset_from_index": first, "dataset_to_index": first + len(rows)}
        for key, x in videos.items():
            out |= self._shared(key, x)
        return out

    def _next_table(self, schema: Any) -> None:
        if self._table is not None:
            self._table.close()
        self._at, self._bytes = self._at + 1, 0
        file = _made(self.root / meta.DATA_V3.format(chunk_index=self._at // self.chunk, file_index=self._at % self.chunk))
        self._table = meta.arrow()[1].ParquetWriter(file, schema)

    def _shared(self, key: str, x: np.ndarray) -> dict[str, Any]:
        at, encoder = self._video.get(key, (-1, None))
        if encoder is None or encoder.path.stat().st_size > self.video_mb * MB:
            if encoder is not None:
                encoder.close()
            at += 1
            file = meta.VIDEO_V3.format(video_key=key, chunk_index=at // self.chunk, file_index=at % self.chunk)
            encoder = Encoder(self.root / file, self.fps, x.shape[1:])
            self._video[key] = at, encoder
            self._noted(key, encoder)
        start = encoder.frames / self.fps
        encoder.add(x)
        return {f"videos/{key}/chunk_index": at // self.chunk, f"videos/{key}/file_index": at % self.chunk,
                f"videos/{key}/from_timestamp": start, f"videos/{key}/to_timestamp": encoder.frames / self.fps}

    def _noted(self, key: str, encoder: Encoder) -> None:
        self.features[key]["info"] = encoder.info

    def close(self) -> None:
        if self._table is not None:
            self._table.close()
        for _, encoder in self._video.values():
            encoder.close()


def table(columns: Episode, features: Mapping[str, Any]) -> Any:
    """columns {name: (n, *shape)} -> a pyarrow table that pandas, Hugging Face datasets and LeRobot read."""
    pa, _ = meta.arrow()
    arrays: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for name, x in columns.items():
        if features[name]["dtype"] == "image":
            cells = [{"bytes": png(frame), "path": f"frame-{i:06d}.png"} for i, frame in enumerate(x)]
            arrays[name] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            known[name] = {"_type": "Image"}
            continue
        flat, value = pa.array(np.ascontiguousarray(x).reshape(-1)), {"dtype": str(x.dtype), "_type": "Value"}
        if x.ndim == 1:
            arrays[name], known[name] = flat, value
        elif x.ndim == 2:
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
            known[name] = {"feature": value, "length": x.shape[1], "_type": "Sequence"}
        else:
            for axis in range(x.ndim - 1, 0, -1):
                n = int(np.prod(x.shape[:axis]))
                flat = pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * x.shape[axis]), flat)
            arrays[name], known[name] = flat, {"shape": list(x.shape[1:]), "dtype": str(x.dtype), "_type": f"Array{x.ndim - 1}D"}
    return pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": known}})})


def write_tasks(root: Path, tasks: Mapping[int, str]) -> None:
    """meta/tasks.parquet of v3: task_index, with the text as pandas' index."""
    pa, pq = meta.arrow()
    index = "__index_level_0__"
    column = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {"index_columns": [index], "column_indexes": [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}],
              "columns": [{"name": "task_index", "field_name": "task_index", **column}, {"name": None, "field_name": index, **text}],
              "creator": {"library": "pyarrow", "version": pa.__version__}, "pandas_version": "2.2.3"}
    rows = pa.table({"task_index": pa.array(list(tasks), pa.int64()), index: pa.array(list(tasks.values()), pa.string())})
    pq.write_table(rows.replace_schema_metadata({"pandas": json.dumps(pandas)}), _made(root / f"{meta.TASKS}.parquet"))


def write_episodes(root: Path, rows: Sequence[Mapping[str, Any]], stats: Sequence[Mapping[str, Any]]) -> None:
    """meta/episodes of v3: one row an episode, its statistics flattened."""
    pa, pq = meta.arrow()
    flat = [{**row, **{f"stats/{k}/{name}": v for k, s in each.items() for name, v in s.items()}, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
            for row, each in zip(rows, stats, strict=True)]
    pq.write_table(pa.Table.from_pylist(flat), _made(root / meta.EPISODES / "chunk-000/file-000.parquet"))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    _made(file).write_text(json.dumps(content, indent=4, ensure_ascii=False), encoding="utf-8")


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(_made(file), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file

"""A store as a LeRobot dataset.

version: v2.1 or v3.0; by default the one the store came from, else v3.0.   images: embed (PNG in the tables, nothing is lost), video (h264, smaller,
not bit for bit) or skip.

Of a dataset that was LeRobot before, tables, info.json, tasks and statistics come back as they were, cameras whose videos were not there declared as
they were. Not equal bit for bit: PNG and mp4 bytes, and statistics of cameras that were decoded; `index`, if it did not count from 0; columns that the
reader leaves out; paths of files and how many rows of v3 share one.
"""
import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import lerobot_files as files
from policy.data.convert import lerobot_meta as meta
from policy.data.convert import lerobot_stats, own
from policy.data.convert.back import Origin
from policy.data.convert.source import Episode
from policy.data.files import DataError
from policy.data.semantics import Semantics
from policy.data.store import Store

COUNTED = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64", "task_index": "int64"}
KNOWN = {"reward": "next.reward", "rewards": "next.reward", "done": "next.done", "dones": "next.done", "terminals": "next.done", "success": "next.success"}
AXES = ["height", "width", "channels"]
PLACES = ("data/", "dataset_", "meta/", "videos/")  # columns of meta/episodes that say where things are


def write(store: Store, path: Path, *, version: str | None = None, images: str = "embed") -> list[str]:
    """Write store to the new folder path; returns what was left out and why, one sentence each."""
    if images not in ("embed", "video", "skip") or version not in (None, "v2.1", "v3.0"):
        raise ValueError(f"images is embed, video or skip, and version v2.1 or v3.0; got {images!r} and {version!r}")
    if not store.fps:
        raise DataError(f"{store.path} does not say its rate, which LeRobot needs. Write its attribute fps [Hz]")
    writer = _Writer.of(store, path, version, images)
    for i, episode in enumerate(writer.origin.episodes()):
        writer.add(i, episode)
    writer.finish()
    return writer.origin.notes


@dataclass
class _Writer:
    """cameras {name: image or video}; absent: cameras that are declared only; old: info.json of the source, {} where it was another version."""
    store: Store
    path: Path
    origin: Origin
    cameras: dict[str, str]
    absent: list[str]
    old: dict[str, Any]
    features: dict[str, Any]
    tasks: dict[int, str]
    files: files.Files
    rows: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0

    @classmethod
    def of(cls, store: Store, path: Path, version: str | None, images: str) -> "_Writer":
        origin = Origin.of(store, "lerobot", obs="observation.")
        if not origin.came:
            _rename(origin)
        info = origin.keep.get("info", {})
        declared, was = info.get("features", {}), str(info.get("codebase_version", "v3.0"))
        v3 = was.startswith("v3") if version is None else version == "v3.0"
        same = was.startswith("v3") == v3
        cameras = _cameras(origin, images, declared)
        unchanged = same and all(origin.of_episode(i).get("row", {}).get("length") == hi - lo for i in range(store.episodes) for lo, hi in [store.span(i)])
        absent = [k for k, f in declared.items() if f["dtype"] == "video" and k not in origin.schema and unchanged]
        origin.notes += [f"{k} is declared as in the source, but its videos are not written: copy videos/ from there" for k in absent]
        features = _features(origin, declared, cameras, absent)
        chunk = info.get("chunks_size") or 1000
        out = files.Files(path, v3, features, float(store.fps or 0), chunk, info.get("data_files_size_in_mb") or 100, info.get("video_files_size_in_mb") or 200)
        return cls(store, path, origin, cameras, absent, info if same else {}, features, _tasks(store, origin), out)

    def add(self, i: int, episode: Episode) -> None:
        ours = meta.shapes(own.load(json.dumps(self.origin.keep.get("own")), []))  # of a store before, whose (1,) was written as a number
        found = {name: x[:, 0] if x.shape[1:] == (1,) and (name in ours or not self.origin.came) else x for name, x in episode.items()}
        n = len(next(iter(found.values())))
        found.setdefault("timestamp", (np.arange(n) / float(self.store.fps or 0)).astype(np.float32))
        found.setdefault("task_index", np.full(n, next(iter(self.tasks)), np.int64))
        found |= {"frame_index": np.arange(n), "episode_index": np.full(n, i), "index": np.arange(self.frames, self.frames + n)}
        columns = {k: found[k] for k, f in self.features.items() if f["dtype"] != "video"}
        videos = {k: found[k] for k, kind in self.cameras.items() if kind == "video"}
        kept = self.origin.of_episode(i)
        texts = [self.tasks.get(int(t), "") for t in dict.fromkeys(found["task_index"].tolist())]
        if sorted(kept.get("tasks", [])) == sorted(texts):
            texts = kept["tasks"]
        row = {"episode_index": i, "tasks": texts, "length": n}
        more = {k: v for k, v in kept.get("row", {}).items() if k not in row and not k.startswith(PLACES)}
        if self.absent and self.files.v3:
            more |= {k: v for k, v in kept["row"].items() if any(k.startswith(f"videos/{camera}/") for camera in self.absent)}
        self.stats.append(self._statistics({**columns, **videos}, kept.get("stats", {})))
        self.rows.append({**row, **more, **self.files.add(i, columns, videos, self.frames)})
        self.frames += n

    def _statistics(self, episode: Episode, kept: Mapping[str, Any]) -> dict[str, Any]:
        """Of each feature, as JSON: ours, or the source's own numbers where ours differ by rounding or cannot be had."""
        quantiles = self.files.v3 and (not self.old or any("q01" in s for s in kept.values()))
        out = {k: lerobot_stats.plain(lerobot_stats.of_episode(x, image=k in self.cameras, quantiles=quantiles)) for k, x in episode.items()}
        out |= {k: kept[k] for k in out if k in kept and lerobot_stats.near(kept[k], out[k])}
        return {**out, **{k: kept[k] for k in self.absent if k in kept}}

    def finish(self) -> None:
        self.files.close()
        files.write_json(self.path / meta.INFO, self._info())
        if said := self._own():
            files.write_json(self.path / meta.OWN, said)
        if self.files.v3:
            files.write_tasks(self.path, self.tasks)
            files.write_episodes(self.path, self.rows, self.stats)
            files.write_json(self.path / meta.STATS, {k: lerobot_stats.plain(lerobot_stats.of_all([s[k] for s in self.stats])) for k in self.stats[0]})
        else:
            files.write_lines(self.path / f"{meta.TASKS}.jsonl", ({"task_index": i, "task": text} for i, text in self.tasks.items()))
            files.write_lines(self.path / f"{meta.EPISODES}.jsonl", self.rows)
            files.write_lines(self.path / meta.EPISODE_STATS, ({"episode_index": i, "stats": s} for i, s in enumerate(self.stats)))

    def _info(self) -> dict[str, Any]:
        v3, n, f = self.files.v3, self.store.episodes, self.files
        video = self.absent or "video" in self.cameras.values() or not v3
        new = {"codebase_version": "v3.0" if v3 else "v2.1", "robot_type": self.store.attrs.get("robot"), "chunks_size": f.chunk,
               **({"data_files_size_in_mb": f.data_mb, "video_files_size_in_mb": f.video_mb} if v3 else {}),
               "video_path": (meta.VIDEO_V3 if v3 else meta.VIDEO_V2) if video else None, "splits": {"train": f"0:{n}"}}
        counted = {"total_episodes": n, "total_frames": self.frames, "total_tasks": len(self.tasks), "features": self.features,
                   "fps": int(f.fps) if f.fps.is_integer() else f.fps, "data_path": meta.DATA_V3 if v3 else meta.DATA_V2,
                   **({} if v3 else {"total_videos": n * list(self.cameras.values()).count("video"), "total_chunks": math.ceil(n / f.chunk)})}
        splits = {"splits": new["splits"]} if self.old.get("total_episodes") != n else {}
        return {**new, **self.old, **counted, **splits}

    def _own(self) -> dict[str, Any]:
        """What LeRobot has no place for; names and shapes too, but of a dataset that was LeRobot's own before."""
        if not self.origin.came:
            return json.loads(own.dump(self.origin, columns=list(self.origin.names)))
        names, action, before = self.origin.names, dict(self.store.attrs.get("action") or {}), self.origin.keep.get("own", {})
        action["of"] = names.get(action.get("of") or "")
        known = action.get("kind", "unknown") != "unknown" or action.get("space", "unknown") != "unknown"
        known = known and Semantics.from_json(action) != own.load(json.dumps(before), []).semantics
        units = {names[k]: u for k, u in self.store.units.items() if k in names}
        return {**before, **({"units": units} if units else {}), **({"action": action} if known else {})}


def _rename(origin: Origin) -> None:
    """LeRobot's own names for what it knows, in a store that came from elsewhere."""
    def new(key: str, name: str) -> str:
        shape, dtype = origin.schema[name]
        if key.startswith(("observation.", "next.")) or (key == "task_index" and "tasks" in origin.store.attrs):
            return key
        picture = len(shape) == 3 and dtype.kind == "u"
        return KNOWN.get(key, f"observation.images.{key}" if picture else name)
    names = {key: new(key, name) for key, name in origin.names.items()}
    names = {key: name if list(names.values()).count(name) == 1 else origin.names[key] for key, name in names.items()}
    origin.schema = {names[key]: origin.schema[name] for key, name in origin.names.items()}
    origin.names = names


def _cameras(origin: Origin, images: str, declared: Mapping[str, Any]) -> dict[str, str]:
    """{name: image or video} of the images that are written; with skip they leave origin's names and schema."""
    found = {name: "video" if images == "video" and shape[2] == 3 else "image" for name, (shape, dtype) in origin.schema.items()
             if len(shape) == 3 and (declared.get(name, {}).get("dtype") in ("image", "video") or (shape[2], dtype) in ((3, np.uint8), (1, np.uint16)))}
    if images == "skip":
        origin.notes += [f"{name} is left out: images: skip" for name in found]
        origin.names = {k: n for k, n in origin.names.items() if n not in found}
        origin.schema = {n: s for n, s in origin.schema.items() if n not in found}
        return {}
    lossy = [name for name, kind in found.items() if kind == "video"]
    origin.notes += [f"{name} is written as h264 video, which changes its pixels a little" for name in lossy]
    return found


def _features(origin: Origin, declared: Mapping[str, Any], cameras: Mapping[str, str], absent: list[str]) -> dict[str, Any]:
    """features of info.json: those that were declared first, in their order."""
    found = {}
    said = origin.store.attrs.get("names") or {}
    names = {name: said[key] for key, name in origin.names.items() if key in said}
    for name in [*(k for k in declared if k in origin.schema or k in COUNTED or k in absent), *(k for k in [*origin.schema, *COUNTED] if k not in declared)]:
        shape, dtype = origin.schema.get(name, ((), np.dtype(COUNTED.get(name, "float32"))))
        kind = cameras.get(name, str(dtype))
        feature = copy.deepcopy(declared.get(name)) or {"dtype": kind, "shape": list(shape) or [1], "names": AXES if name in cameras else names.get(name)}
        if name not in absent:
            feature["dtype"] = kind
        if kind == "image":
            feature.pop("info", None), feature.pop("video_info", None)
        found[name] = feature
    return found


def _tasks(store: Store, origin: Origin) -> dict[int, str]:
    """{index: text}"""
    kept = {int(i): text for i, text in origin.keep.get("tasks", [])}
    said = store.attrs.get("tasks") or [store.attrs.get("task") or ""]
    return kept if kept and sorted(kept.values()) == sorted(said) else dict(enumerate(said))

"""Small LeRobot datasets, written by hand with pyarrow and PyAV as LeRobot lays them out, and frames that carry their number."""
import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS, LENGTHS = 30, (25, 40, 33)
BITS = 10


def frame(number: int) -> np.ndarray:
    """(32, 80, 3) uint8: the number in bars, 8 pixels a bit, so that it survives compression."""
    x = np.zeros((32, 8 * BITS, 3), np.uint8)
    for b in range(BITS):
        x[:, 8 * b:8 * b + 8] = 235 * (number >> b & 1)
    return x


def number(x: np.ndarray) -> int:
    return sum(int(x[:, 8 * b + 2:8 * b + 6].mean() > 120) << b for b in range(BITS))


def write_video(path: Path, numbers, *, gop: int = 30, codec: str = "libx264", fps: int = FPS, bf: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), "bf": str(bf), "crf": "20"})
        stream.height, stream.width, stream.pix_fmt = 32, 8 * BITS, "yuv420p"
        for n in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(n), format="rgb24")))
        container.mux(stream.encode())


def columns(episode: int, first: int) -> dict[str, np.ndarray]:
    n, rng = LENGTHS[episode], np.random.default_rng(episode)
    return {"observation.state": rng.normal(size=(n, 3)).astype("float32"), "action": rng.normal(size=(n, 2)).astype("float32"),
            "timestamp": (np.arange(n) / FPS).astype("float32"), "frame_index": np.arange(n), "episode_index": np.full(n, episode),
            "index": np.arange(first, first + n), "task_index": np.full(n, episode % 2)}


def _table(parts: list[dict[str, np.ndarray]]) -> pa.Table:
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    return pa.table({k: pa.FixedSizeListArray.from_arrays(x.ravel(), x.shape[1]) if x.ndim == 2 else pa.array(x) for k, x in whole.items()})


def make(root: Path, version: str, *, numbers=None, **video) -> Path:
    """Three episodes with two tasks and one camera, whose frame i of episode e shows 300 e + i; v3 has all of them in one file of each kind."""
    numbers = numbers or [[300 * e + i for i in range(n)] for e, n in enumerate(LENGTHS)]
    first = np.concatenate([[0], np.cumsum(LENGTHS)]).tolist()
    parts = [columns(e, first[e]) for e in range(3)]
    vector = {"dtype": "float32", "names": {"motors": ["x", "y", "z"]}, "shape": [3]}
    features = {"observation.state": vector, "action": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
                "observation.images.top": {"dtype": "video", "shape": [32, 8 * BITS, 3], "names": ["height", "width", "channels"]},
                **{k: {"dtype": "float32" if k == "timestamp" else "int64", "shape": [1], "names": None}
                   for k in ("timestamp", "frame_index", "episode_index", "index", "task_index")}}
    info = {"codebase_version": version, "robot_type": "toy", "fps": FPS, "chunks_size": 1000, "total_episodes": 3, "total_frames": sum(LENGTHS),
            "total_tasks": 2, "splits": {"train": "0:3"}, "features": features}
    (root / "meta").mkdir(parents=True)
    tasks = ["push", "pull"]
    rows = [{"episode_index": e, "tasks": [tasks[e % 2]], "length": n} for e, n in enumerate(LENGTHS)]
    if version == "v2.1":
        info |= {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
                 "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
        (root / "data/chunk-000").mkdir(parents=True)
        for e in range(3):
            pq.write_table(_table([parts[e]]), root / f"data/chunk-000/episode_{e:06d}.parquet")
            write_video(root / f"videos/chunk-000/observation.images.top/episode_{e:06d}.mp4", numbers[e], **video)
        lines = {"tasks": [{"task_index": i, "task": t} for i, t in enumerate(tasks)], "episodes": rows}
        for name, content in lines.items():
            (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in content))
    else:
        info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                 "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
        (root / "data/chunk-000").mkdir(parents=True)
        pq.write_table(_table(parts), root / "data/chunk-000/file-000.parquet", row_group_size=17)
        write_video(root / "videos/observation.images.top/chunk-000/file-000.mp4", [n for part in numbers for n in part], **video)
        camera = "videos/observation.images.top/"
        rows = [{**r, "data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": first[e], "dataset_to_index": first[e + 1], f"{camera}chunk_index": 0,
                 f"{camera}file_index": 0, f"{camera}from_timestamp": first[e] / FPS, f"{camera}to_timestamp": first[e + 1] / FPS} for e, r in enumerate(rows)]
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), root / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.table({"task_index": [0, 1], "__index_level_0__": tasks}), root / "meta/tasks.parquet")
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def edit_info(root: Path, **changes) -> Path:
    file = root / "meta/info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return root

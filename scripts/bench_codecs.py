"""How small images become, how fast they are decoded, and what is lost: every codec a store could use, by seconds of one thread's CPU."""
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import Blosc, Zstd, blosc
from rich.table import Table as TextTable

from policy.data.store import Store
from policy.train.log import console
from scripts.bench_images import Camera

FRAMES, CHUNK, ROUNDS = 1024, 8, 3
CODECS = {"zstd 1": Zstd(1, checksum=True), "zstd 3": Zstd(3, checksum=True), "zstd 9": Zstd(9, checksum=True),
          **{f"blosc {name} {level}{words}": Blosc(name, clevel=level, shuffle=shuffle) for name, level in (("zstd", 3), ("zstd", 5), ("lz4", 5))
             for shuffle, words in ((Blosc.NOSHUFFLE, ""), (Blosc.SHUFFLE, ", bytes shuffled"), (Blosc.BITSHUFFLE, ", bits shuffled"))}}


def codecs(path: str | None, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """{images: {codec: ratio, write and read bytes/s, psnr [dB]}} of Push-T's images, where a store that has them is named, and of synthetic ones."""
    rng, camera = np.random.default_rng(0), Camera()
    images = {"synthetic": np.concatenate([camera.episode(rng, 200)["image"] for _ in range(6)])[:FRAMES]}
    if path and "img" in Store.open(path).keys:
        images["Push-T"] = np.rint(Store.open(path).read("img", 0, FRAMES)).astype(np.uint8)
    threads, blosc.use_threads = blosc.use_threads, False
    try:
        return {name: {**{codec: _array(x, made) for codec, made in CODECS.items()}, **_videos(x, folder)} for name, x in images.items()}
    finally:
        blosc.use_threads = threads


def _array(x: np.ndarray, codec: Any) -> dict[str, float]:
    parts = [np.ascontiguousarray(x[i:i + CHUNK]) for i in range(0, len(x), CHUNK)]
    wrote = best = np.inf
    for _ in range(ROUNDS):
        start = time.process_time()
        encoded = [codec.encode(p) for p in parts]
        wrote = min(wrote, time.process_time() - start)
        start = time.process_time()
        for e in encoded:
            codec.decode(e)
        best = min(best, time.process_time() - start)
    return {"ratio": x.nbytes / sum(map(len, encoded)), "write": x.nbytes / wrote, "read": x.nbytes / best, "psnr": np.inf}


def _videos(x: np.ndarray, folder: Path) -> dict[str, dict[str, float]]:
    """mp4 as Store.create(video=[key]) keeps it; nothing where PyAV is not installed."""
    found: dict[str, dict[str, float]] = {}
    for crf in (18, 23):
        try:
            store = Store.create(Path(tempfile.mkdtemp(dir=folder)) / "video.zarr", {"image": (x.shape[1:], "uint8")}, fps=10, video={"image": {"crf": crf}})
            start = time.process_time()
            for lo in range(0, len(x), 128):
                store.append({"image": x[lo:lo + 128]})
        except ModuleNotFoundError:
            return found
        wrote, start = time.process_time() - start, time.process_time()
        got = store.read("image")
        read = time.process_time() - start
        error = np.square(got.astype(np.float32) - x).mean()
        found[f"mp4, crf {crf}"] = {"ratio": x.nbytes / store.disk_bytes("image"), "write": x.nbytes / wrote, "read": x.nbytes / read,
                                    "psnr": float(10 * np.log10(255**2 / error))}
    return found


def show_codecs(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    for name, each in rows.items():
        table = TextTable("codec", "times smaller", "write, MB/s", "read, MB/s", "PSNR, dB", title=f"{name} images, {CHUNK} of 96 x 96 x 3 a chunk, one thread")
        for codec, r in each.items():
            lost = "exact" if np.isinf(r["psnr"]) else f"{r['psnr']:.1f}"
            table.add_row(codec, f"{r['ratio']:.1f}", f"{r['write'] / 1e6:.0f}", f"{r['read'] / 1e6:.0f}", lost)
        console.print(table)

"""A key of a dataset kept as video: video/<key>/<first frame>.mp4, one file for each episode, or for each piece of one that was written in pieces.

H.264, so images come back nearly as they were and not bit for bit (`dipole bench data` says how nearly). A key frame every `gop` frames makes random
access cheap. A file is complete before it has its name and is written before its episode's end, so a killed recorder leaves at most files behind the last
end, which are ignored, and removed by the next that writes.
"""
import bisect
import io
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from policy.data.files import DataError, Files
from policy.data.places import Seekable

PARTIAL = ".partial.mp4"
DEFAULT = {"gop": 10, "crf": 18}
BUFFER = 2**18  # bytes read at once of a video behind a URL


def settings(path: Any, schema: Mapping[str, Any], video: Mapping[str, Mapping[str, int]] | Sequence[str]) -> dict[str, dict[str, Any]]:
    """Attribute `video` of a store.   video: keys, or {key: {gop: …, crf: …}}; crf is H.264's 0 (best) to 51.   DataError for what cannot be a video."""
    made = {}
    for key in video:
        shape, dtype = schema.get(key, ((), None))
        if len(shape) != 3 or shape[2] != 3 or np.dtype(dtype) != np.uint8:
            raise DataError(f"{path}: {key!r} {tuple(shape)} {dtype} cannot be kept as video, which is for images (h, w, 3) in uint8")
        said = {**DEFAULT, **(video[key] if isinstance(video, Mapping) else {})}
        if set(said) != set(DEFAULT) or said["gop"] < 1 or not 0 <= said["crf"] <= 51:
            raise DataError(f"{path}: video of {key!r} has gop from 1 and crf from 0 to 51, got {said}")
        made[key] = {"shape": [int(n) for n in shape], "codec": "h264", "lossy": True, **said}
    return made


class Video:
    """Stands for the zarr array of a key: shape of its frames, dtype, frames that are decoded together."""
    dtype = np.dtype(np.uint8)

    def __init__(self, files: Files, key: str, about: Mapping[str, Any], fps: float):
        self.key, self._files, self._crf, self._fps = key, files, int(about["crf"]), fps
        self.shape, self.chunks = (0, *about["shape"]), (int(about["gop"]),)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._folder = f"video/{key}"
        self._starts = files.listed(self._folder, ".mp4")

    def read(self, lo: int, hi: int, steps: int, holding: Callable[[int, int], str], out: np.ndarray | None = None) -> np.ndarray:
        """Frames [lo, hi) of a dataset that has `steps`."""
        out = np.empty((hi - lo, *self.shape[1:]), np.uint8) if out is None else out
        if lo < hi and self._files.local and self._end(hi) < hi:  # somebody records meanwhile
            self._starts = self._files.listed(self._folder, ".mp4")
        at = lo
        while at < hi:
            i = bisect.bisect_right(self._starts, at) - 1
            if i < 0:
                raise DataError(f"{self._files.path}: {self._folder} lacks the file that holds {holding(at, at + 1)}. Copy the dataset again")
            start, end = self._starts[i], min(hi, self._starts[i + 1] if i + 1 < len(self._starts) else steps)
            self._decode(start, at - start, end - start, out[at - lo:end - lo], holding)
            at = end
        return out

    def put(self, lo: int, frames: np.ndarray) -> None:
        """Write frames (n, h, w, 3) as those from lo on; whatever lay there was never finished."""
        from policy.data.convert.video import Encoder  # the extra data
        folder = self._files.path / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        for start in self._files.listed(self._folder, ".mp4"):
            if start >= lo:
                (folder / self._name(start)).unlink()
        part = folder / f"{lo:012d}{PARTIAL}"
        with Encoder(part, self._fps, self.shape[1:], crf=self._crf, gop=self.chunks[0]) as encoder:
            encoder.add(frames)
        os.replace(part, folder / self._name(lo))
        self._starts = [*(s for s in self._starts if s < lo), lo]

    def _end(self, hi: int) -> int:
        return hi if self._starts and self._starts[-1] >= hi else self._starts[-1] if self._starts else 0

    def _name(self, start: int) -> str:
        return f"{start:012d}.mp4"

    def _decode(self, start: int, i: int, j: int, out: np.ndarray, holding: Callable[[int, int], str]) -> None:
        """Frames [i, j) of the file that begins with frame start of the dataset."""
        from policy.data.convert.video import pyav  # the extra data
        av, name, n = pyav(), f"{self._folder}/{self._name(start)}", 0
        try:
            with av.open(self._source(name), options={"protocol_whitelist": "file"}) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # readers are the threads
                if i:
                    container.seek(int(Fraction(i) / self._rate / stream.time_base), stream=stream, backward=True)
                for frame in container.decode(stream):
                    k = round(frame.pts * stream.time_base * self._rate)
                    if k >= j:
                        break
                    if k >= i:
                        out[k - i] = frame.to_ndarray(format="rgb24")
                        n += 1
        except (av.error.FFmpegError, IndexError, ValueError) as e:
            raise self._damaged(name, str(e), holding(start + i, start + j)) from e
        if n != j - i:
            raise self._damaged(name, f"it holds {n} of these {j - i} frames", holding(start + i, start + j))

    def _source(self, name: str) -> Any:
        if self._files.kind == "directory":
            return str(self._files.path / name)
        return io.BufferedReader(Seekable(self._files.open(name)), BUFFER)

    def _damaged(self, name: str, why: str, what: str) -> DataError:
        return DataError(f"{self._files.path}: {self.key} cannot be decoded in the file {name} ({self._files.size(name)} bytes: {why}), which holds {what}. "
                         "The file is truncated or damaged, or one behind it is lost: copy the dataset again from its source")

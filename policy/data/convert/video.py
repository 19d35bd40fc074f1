"""Frames out of and into a video file through PyAV: the frame that belongs to each time stamp, an episode at a time.

An encoder stores differences to a key frame, so reading from the middle means seeking to the key frame before it and decoding on from there.
"""
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.files import DataError

TOLERANCE = 1e-4  # s between a row's time stamp and its frame's, as LeRobot allows


def pyav() -> Any:
    try:
        import av
        import av.error
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("videos are read and written by PyAV: pip install 'dipole[data]'", name="av") from e
    return av


def decode(path: Path | str, times: np.ndarray, shape: tuple[int, int, int], *, tolerance: float = TOLERANCE, total: int | None = None) -> np.ndarray:
    """The frames of a video nearest to times (n,) [s, increasing] -> (n, h, w, 3) uint8 RGB.

    shape: (h, w, 3) that the frames must have.   total: number of frames the file must have, if its header tells.
    DataError: no frame within tolerance [s] of a time, another size, another number of frames, a damaged file.
    """
    av, out = pyav(), np.empty((len(times), *shape), np.uint8)
    try:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video stream. Copy it again, or leave the camera out with videos: skip")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if total is not None and stream.frames not in (0, total):
                raise DataError(f"{path} has {stream.frames} frames for {total} rows, so images and states would not belong together. Encode it "
                                "again from the recording, remove the episode there, or leave the camera out with videos: skip")
            if not _fill(container, stream, out, times, tolerance, path):  # the demuxer landed behind the first frame
                _fill(container, stream, out, times, tolerance, path, seek=False)
    except (av.error.FFmpegError, UnicodeDecodeError) as e:
        raise DataError(f"{path} cannot be decoded ({e}). The file is truncated or damaged: copy it again, or leave the camera out with "
                        "videos: skip") from e
    return out


def _fill(container: Any, stream: Any, out: np.ndarray, times: np.ndarray, tolerance: float, path: Path | str, *, seek: bool = True) -> bool:
    """Decode into out; False when decoding began too late to hold the first time."""
    tick = float(stream.time_base)
    tolerance = max(tolerance, tick)
    if seek:
        container.seek(max(0, int(times[0] / tick)), stream=stream, backward=True)
    else:
        container.seek(0, stream=stream, backward=True)
    k, held = 0, None  # held: the frame before and its time
    for frame in container.decode(stream):
        if frame.pts is None:
            continue
        now = frame.pts * tick
        while k < len(times) and now >= times[k]:  # this frame and the one before enclose the time
            near = held if held is not None and times[k] - held[0] <= now - times[k] else (now, frame)
            if abs(near[0] - times[k]) > tolerance:
                if seek and held is None:
                    return False
                raise _no_frame(path, times[k], near[0])
            out[k] = _rgb(near[1], out.shape[1:], path)
            k += 1
        held = (now, frame)
        if k == len(times):
            return True
    while k < len(times) and held is not None and times[k] - held[0] <= tolerance:
        out[k] = _rgb(held[1], out.shape[1:], path)
        k += 1
    if k < len(times):
        raise _no_frame(path, times[k], None if held is None else held[0], ends=True)
    return True


def _rgb(frame: Any, shape: tuple[int, ...], path: Path | str) -> np.ndarray:
    if (frame.height, frame.width, 3) != tuple(shape):
        raise DataError(f"{path} has frames of {frame.height}x{frame.width}, expected {shape[0]}x{shape[1]}. Correct the shape in the dataset's "
                        "description, or encode the video again")
    return frame.to_ndarray(format="rgb24")


def _no_frame(path: Path | str, time: float, nearest: float | None, *, ends: bool = False) -> DataError:
    near = "it holds none" if nearest is None else f"{'it is cut short or truncated, the last' if ends else 'the nearest'} is at {nearest:.4f} s"
    return DataError(f"{path} has no frame at {time:.4f} s ({near}), so images and states would not belong together. Copy it again, encode it again "
                     "from the recording, allow more with tolerance: 0.01 (s), or leave the camera out with videos: skip")


class Encoder:
    """Writes frames (h, w, 3) uint8 RGB to an mp4 (h264, so not bit for bit): `with Encoder(path, fps) as e: e.add(frames)`."""

    def __init__(self, path: Path | str, fps: float, shape: tuple[int, ...], *, crf: int = 18, gop: int = 2):
        """gop: frames between key frames; 2 makes random access cheap, as LeRobot does."""
        self.path, self.frames = Path(path), 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = pyav().open(str(path), "w", options={"movflags": "faststart"})
        self._rate = Fraction(fps).limit_denominator(1001)
        stream = self._stream = self._container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width = shape[:2]
        stream.pix_fmt = "yuv420p" if shape[0] % 2 == shape[1] % 2 == 0 else "yuv444p"  # 4:2:0 needs even sizes
        stream.options = {"crf": str(crf), "g": str(gop), "bf": "0"}

    @property
    def info(self) -> dict[str, Any]:
        """What LeRobot notes about a video."""
        s = self._stream
        return {"video.height": s.height, "video.width": s.width, "video.codec": "h264", "video.pix_fmt": s.pix_fmt, "video.is_depth_map": False,
                "video.fps": int(self._rate) if self._rate.denominator == 1 else float(self._rate), "video.channels": 3, "has_audio": False}

    def add(self, frames: Iterable[np.ndarray]) -> None:
        for x in frames:
            frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(x), format="rgb24")
            frame.pts, frame.time_base = self.frames, 1 / self._rate
            self.frames += 1
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._container.close()

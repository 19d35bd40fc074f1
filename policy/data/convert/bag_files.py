"""The files of ROS 2 bags: which there are, and their messages as bytes. sqlite3 (.db3) and MCAP, split, compressed, or left behind by a killed recorder.

A message's definition, which bags carry along, is never looked at: bag_types.py knows the standard types.
"""
import importlib
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from policy.data.files import DataError

STORAGE, META = (".db3", ".mcap"), "metadata.yaml"
CHUNK_BYTES, MESSAGE_BYTES = 2**30, 2**28  # more than that decompressed is no recording of a robot
MAGIC = b"\x89MCAP0\r\n"


class Raw(NamedTuple):
    """received [ns] on the recorder's clock; data: CDR."""
    topic: str
    type: str
    received: int
    data: bytes


@dataclass(frozen=True)
class Bag:
    """One recording: its files in order, and how they are compressed (zstd: file or message, or None)."""
    path: Path
    files: tuple[Path, ...]
    compressed: str | None = None
    note: str | None = None


def suffix(path: Path) -> str:
    """.db3 or .mcap, without .zstd; '' for other files."""
    name = path.name.removesuffix(".zstd")
    return Path(name).suffix if Path(name).suffix in STORAGE else ""


def has_bags(path: Path) -> bool:
    """Whether path is a bag, or a folder of them."""
    if path.is_file():
        return bool(suffix(path))
    return path.is_dir() and (_is_bag(path) or any(_is_bag(p) for p in path.iterdir() if p.is_dir()))


def _is_bag(path: Path) -> bool:
    return any(p.is_file() and suffix(p) for p in path.iterdir())


def find(path: Path) -> list[Bag]:
    """The bags at path, in the order of their names; each is an episode.   DataError when there are none."""
    if path.is_file():
        return [Bag(path, (path,))]
    if _is_bag(path):
        return _in_folder(path)
    bags = [bag for p in sorted(filter(Path.is_dir, path.iterdir()), key=_natural) if _is_bag(p) for bag in _in_folder(p)]
    if not bags:
        raise DataError(f"{path} holds no bag: neither .mcap nor .db3 files, nor folders of them. Point src=… at the folder that ros2 bag record made")
    return bags


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _in_folder(path: Path) -> list[Bag]:
    """One bag where metadata.yaml lists the files, or where they are named like a split of the folder's bag; else each file is one."""
    found = sorted((p for p in path.iterdir() if p.is_file() and suffix(p)), key=_natural)
    if not (path / META).is_file():
        split = all(re.fullmatch(rf"{re.escape(path.name)}_\d+", p.name.removesuffix(".zstd").rsplit(".", 1)[0]) for p in found)
        note = f"{path.name} has no {META}: its recorder was stopped before it wrote one"
        return [Bag(path, tuple(found), note=note)] if split else [Bag(p, (p,)) for p in found]
    try:
        about = yaml.safe_load((path / META).read_text(encoding="utf-8"))["rosbag2_bagfile_information"]
        names = [Path(str(name)).name for name in about["relative_file_paths"]]  # old bags put their folder before the name
        mode = str(about.get("compression_mode") or "").lower() if about.get("compression_format") else ""
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path / META} is damaged ({type(e).__name__}). Copy it again, or remove it: the files are then taken by their names") from e
    if absent := [n for n in names if not (path / n).is_file()]:
        raise DataError(f"{path} lacks {absent[0]}, which its {META} lists. Copy it too, or remove {META} to read what is there")
    return [Bag(path, tuple(path / n for n in names), mode if mode in ("file", "message") else None)]


def messages(bag: Bag, *, damaged: str = "error", notes: list[str] | None = None) -> Iterator[Raw]:
    """All messages, file after file.

    damaged: `error` raises DataError where a file ends early or is broken, and says what comes before; `keep` takes that and notes it.
    """
    for file in bag.files:
        count, first, last = 0, None, 0
        try:
            with _plain(file) as plain:
                for raw in (_sqlite if suffix(file) == ".db3" else _mcap)(plain):
                    if bag.compressed == "message" and suffix(file) == ".db3":
                        raw = raw._replace(data=_zstd(raw.data, MESSAGE_BYTES))
                    count, first, last = count + 1, raw.received if first is None else first, raw.received
                    yield raw
        except _Broken as e:
            span = f"{count} messages over {(last - (first or 0)) / 1e9:.1f} s can be read before that" if count else "no message can be read"
            if damaged != "keep" or not count:
                cure = "take those with options: {damaged: keep}, or copy it again" if count else "copy it again"
                raise DataError(f"{file} {e}; {span}: {cure}") from e
            if notes is not None:
                notes.append(f"{file.name} {e}; {span}, and were taken")


class _Broken(Exception):
    """A file cannot be read on; the text says why."""


class _plain:
    """A file as it was before zstd."""

    def __init__(self, file: Path):
        self.file, self.folder = file, ""

    def __enter__(self) -> Path:
        if self.file.suffix != ".zstd":
            return self.file
        zstandard = needed("zstandard")
        self.folder = tempfile.mkdtemp(prefix="dipole-bag-")
        plain = Path(self.folder) / self.file.stem
        try:
            with open(self.file, "rb") as packed, open(plain, "wb") as out:
                zstandard.ZstdDecompressor().copy_stream(packed, out)
        except zstandard.ZstdError as e:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise _Broken(f"is not zstd ({e})") from e
        return plain

    def __exit__(self, *_: object) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def _zstd(data: bytes, most: int) -> bytes:
    zstandard = needed("zstandard")
    try:
        said = zstandard.frame_content_size(data)
        if said > most:
            raise _Broken(f"holds a message of {said} bytes")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=most)
    except zstandard.ZstdError as e:
        raise _Broken(f"holds what is not zstd ({e})") from e


def _sqlite(file: Path) -> Iterator[Raw]:
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        topics = {i: (str(name), str(kind)) for i, name, kind in connection.execute("SELECT id, name, type FROM topics")}
        for topic, stamp, data in connection.execute("SELECT topic_id, timestamp, data FROM messages ORDER BY id"):
            if topic not in topics or not isinstance(data, bytes) or not isinstance(stamp, int):
                raise _Broken("holds a row that is no message")
            yield Raw(*topics[topic], stamp, data)
    except (sqlite3.Error, UnicodeDecodeError) as e:
        raise _Broken(f"is no whole sqlite3 bag ({e})") from e
    finally:
        connection.close()


def needed(name: str) -> Any:
    """An optional module, or the error that names the pip line."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        package = name.partition(".")[0]
        raise ModuleNotFoundError(f"this bag is read with {package}, which is not installed: pip install 'dipole[data]'", name=package) from e


def _mcap(file: Path) -> Iterator[Raw]:
    stream, records, ends = needed("mcap.stream_reader"), needed("mcap.records"), needed("mcap.exceptions").EndOfFile
    schemas: dict[int, str] = {}
    channels: dict[int, tuple[str, str]] = {}
    with open(file, "rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            raise _Broken("does not begin like an MCAP file")
        f.seek(0)
        try:
            for record in stream.StreamReader(f, emit_chunks=True, record_size_limit=CHUNK_BYTES).records:
                for r in _chunk(record) if isinstance(record, records.Chunk) else [record]:
                    if isinstance(r, records.Schema):
                        schemas[r.id] = r.name
                    elif isinstance(r, records.Channel):
                        kind = schemas.get(r.schema_id, "") if r.message_encoding == "cdr" else f"{r.message_encoding} message"
                        channels[r.id] = (r.topic, kind)
                    elif isinstance(r, records.Message):
                        yield Raw(*channels[r.channel_id], r.log_time, r.data)
        except ends as e:
            raise _Broken("ends early: its recorder was killed, or the copy is not complete") from e
        except (_Broken, ModuleNotFoundError):
            raise
        except Exception as e:  # struct.error, zlib, lz4, zstd, UnicodeDecodeError, KeyError, CRCValidationError, …
            raise _Broken(f"is damaged ({type(e).__name__}: {e})") from e


def _chunk(chunk: Any) -> list[Any]:
    """The records of a chunk, whose size is known before it is decompressed."""
    breakup = needed("mcap.stream_reader").breakup_chunk
    if chunk.uncompressed_size > CHUNK_BYTES:
        raise _Broken(f"holds a chunk of {chunk.uncompressed_size} bytes")
    data = chunk.data
    if chunk.compression == "zstd":
        data = _zstd(data, chunk.uncompressed_size)
    elif chunk.compression == "lz4":
        data = needed("lz4.frame").LZ4FrameDecompressor().decompress(data, max_length=chunk.uncompressed_size)
    elif chunk.compression:
        raise _Broken(f"is compressed with {chunk.compression}, which is not known")
    if len(data) != chunk.uncompressed_size:
        raise _Broken("holds a chunk of another size than it says")
    return breakup(replace(chunk, compression="", data=data), validate_crc=True)

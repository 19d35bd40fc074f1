"""Where the files of a dataset lie: a folder, a .zip, or either of them behind a URL. Each says how long a file is and reads pieces of it."""
import asyncio
import io
import os
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Protocol

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

LOCAL_HEADER = 30  # bytes of a zip member's header before its name


class DataError(ValueError):
    """A dataset that cannot be used as it is; the message names the path, the key and what to do."""


class Opened(Protocol):
    """One file, the same one however long it is held: a writer that replaces it is not noticed."""
    size: int

    def read(self, lo: int, hi: int) -> bytes: ...

    def close(self) -> None: ...


class Place(Protocol):
    """Names are relative, with /. open raises FileNotFoundError."""

    @property
    def sizes(self) -> dict[str, int] | None:
        """{name: bytes} of every file, None where files are asked for one by one (a folder may be growing, a web server cannot list)."""
        ...

    def size(self, name: str) -> int: ...

    def open(self, name: str) -> Opened: ...

    def data_keys(self, meta: str) -> list[str]:
        """Folders directly under data/ that hold a file called meta."""
        ...


class Folder:
    def __init__(self, path: Path):
        self.path, self.sizes = path, None

    def size(self, name: str) -> int:
        try:
            info = os.stat(self.path / name)
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return info.st_size if not os.path.isdir(self.path / name) else 0

    def open(self, name: str) -> "File":
        return File(self.path / name)

    def data_keys(self, meta: str) -> list[str]:
        return sorted(p.parent.name for p in self.path.glob(f"data/*/{meta}"))


class File:
    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def read(self, lo: int, hi: int) -> bytes:
        return os.pread(self._fd, hi - lo, lo)

    def close(self) -> None:
        os.close(self._fd)


class Zip:
    """The members of a zip file; one that is stored as it is, as zarr's are, is read in pieces.   zipfile.BadZipFile when it is none."""

    def __init__(self, file: Opened):
        self._file = file
        with zipfile.ZipFile(io.BufferedReader(Seekable(file), 2**16)) as z:
            self._members = {info.filename: info for info in z.infolist()}
        self.sizes: dict[str, int] = {name: info.file_size for name, info in self._members.items()}

    def size(self, name: str) -> int:
        return self.sizes.get(name, 0)

    def open(self, name: str) -> Opened:
        if name not in self._members:
            raise FileNotFoundError(name)
        return _Member(self._file, self._members[name])

    def data_keys(self, meta: str) -> list[str]:
        return keys_among(self.sizes, meta)


class _Member:
    def __init__(self, file: Opened, info: zipfile.ZipInfo):
        self.size, self._file, self._info = info.file_size, file, info
        self._whole: bytes | None = None
        if info.compress_type == zipfile.ZIP_STORED:
            head = file.read(info.header_offset, info.header_offset + LOCAL_HEADER)
            self._at = info.header_offset + LOCAL_HEADER + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")

    def read(self, lo: int, hi: int) -> bytes:
        if self._info.compress_type == zipfile.ZIP_STORED:
            data = self._file.read(self._at + lo, self._at + min(hi, self.size))
            if (lo, len(data)) == (0, self.size) and zlib.crc32(data) != self._info.CRC:
                raise zipfile.BadZipFile("its checksum is another")
            return data
        if self._whole is None:
            with zipfile.ZipFile(io.BufferedReader(Seekable(self._file), 2**16)) as z:
                self._whole = z.read(self._info)
        return self._whole[lo:hi]

    def close(self) -> None:
        self._whole = None


class Seekable(io.RawIOBase):
    """A file as zipfile wants it."""

    def __init__(self, file: Opened):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._at, min(self._at + len(buffer), self._file.size)) if self._at < self._file.size else b""
        buffer[:len(data)] = data
        self._at += len(data)
        return len(data)


def keys_among(names: Iterable[str], meta: str) -> list[str]:
    return sorted(parts[1] for name in names if (parts := name.split("/"))[0] == "data" and len(parts) == 3 and parts[2] == meta)


class View(Store):
    """A place as zarr reads it, which finds no more in it than it asks for by name."""
    supports_writes, supports_deletes, supports_listing, supports_partial_writes = False, False, False, False

    def __init__(self, place: Place):
        super().__init__(read_only=True)
        self._place = place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and other._place is self._place

    __hash__ = None  # type: ignore[assignment]

    async def get(self, key: str, prototype: BufferPrototype, byte_range: Any = None) -> Buffer | None:
        data = await asyncio.to_thread(self._read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, Any]]) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, span) for key, span in key_ranges)))

    def _read(self, key: str, span: Any) -> bytes | None:
        if not self._place.size(key):
            return None
        file = self._place.open(key)
        try:
            match span:
                case None: lo, hi = 0, file.size
                case RangeByteRequest(): lo, hi = span.start, span.end
                case OffsetByteRequest(): lo, hi = span.offset, file.size
                case SuffixByteRequest(): lo, hi = max(0, file.size - span.suffix), file.size
            return file.read(lo, min(hi, file.size))
        finally:
            file.close()

    async def exists(self, key: str) -> bool:
        return bool(await asyncio.to_thread(self._place.size, key))

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

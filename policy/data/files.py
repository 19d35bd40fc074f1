"""The files under a dataset: a zarr group (v2 or v3) in a directory or a .zip, here or behind a URL, opened with errors that name the file and the cure.

zarr reads a chunk file that is missing, or empty in v3, as zeros without a word, and Blosc turns a truncated one into stray memory. For a
robot's data that is a silent lie, so `read_rows` looks at the files first.
"""
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numcodecs.errors
import numcodecs.registry
import numpy as np
import zarr
import zarr.errors
from zarr.storage import LocalStore

from policy.data.chunks import Chunks, Damaged
from policy.data.places import DataError, File, Folder, Opened, Place, View, Zip
from policy.data.remote import Remote

__all__ = ["CODECS", "DataError", "Files", "read_rows", "row_files", "where"]

URL = re.compile(r"([A-Za-z][\w+.-]+):/+")
CODECS = {"imagecodecs": "imagecodecs", "wavpack": "wavpack-numcodecs", "flac": "flac-numcodecs"}  # codec name contains -> pip package


class Url(type(Path())):  # type: ignore[misc]
    """A URL where a Path is expected: with a name and a stem, and written as it was."""

    def __str__(self) -> str:
        return URL.sub(r"\1://", super().__str__(), count=1)


class Files:
    """Read access to every file of one zarr group; write access when it is a v3 directory opened with writable=True.

    path: a directory, a .zip, or the URL of either (policy.data.remote).
    """

    def __init__(self, path: Path | str, *, writable: bool = False):
        self.path, self.writable = where(path), writable
        self.place, self.kind = _place(self.path)
        self.store: LocalStore | View = LocalStore(self.path, read_only=not writable) if self.kind == "directory" else View(self.place)
        self.format = 3 if self.size("zarr.json") else 2 if self.size(".zgroup") else 0
        self._chunks: dict[str, Chunks | None] = {}
        if not self.format:
            raise DataError(f"{self.path} is not a zarr group: it has neither zarr.json (v3) nor .zgroup (v2) at its top. "
                            "Point path=… at the folder (or .zip) that directly holds data/ and meta/")
        if writable and (self.kind != "directory" or self.format == 2):
            raise DataError(f"{self.path} is {f'a {self.kind}' if self.kind != 'directory' else 'zarr v2'}, which is read but not written. "
                            "Copy its episodes into a new dataset (Store.create, then extend) and append there")

    @property
    def local(self) -> bool:
        return not isinstance(self.path, Url)

    @property
    def sizes(self) -> dict[str, int] | None:
        """{file: bytes}, None where files are asked for one by one."""
        return self.place.sizes

    def size(self, name: str) -> int:
        """Bytes of the file called name, 0 when there is none."""
        return self.place.size(name)

    def open(self, name: str) -> Opened:
        return self.place.open(name)

    def data_keys(self) -> list[str]:
        """Names of the arrays directly under data/."""
        return self.place.data_keys("zarr.json" if self.format == 3 else ".zarray")

    def listed(self, folder: str, ending: str) -> list[int]:
        """The files <number><ending> of a folder, as numbers, ascending."""
        if self.kind == "directory":
            names = os.listdir(self.path / folder) if (self.path / folder).is_dir() else []
        elif self.sizes is not None:
            names = [name.rpartition("/")[2] for name in self.sizes if name.startswith(f"{folder}/")]
        else:
            raise DataError(f"{self.path}: the server does not list {folder}, so its videos cannot be found. Serve the dataset as one .zip, or from S3")
        return sorted(int(stem) for name in names if name.endswith(ending) and (stem := name.removesuffix(ending)).isdigit())

    def disk_bytes(self, name: str) -> int:
        """Bytes of all files under the array called name."""
        if self.sizes is None:
            return sum(p.stat().st_size for p in (self.path / name).rglob("*") if p.is_file())
        return sum(size for file, size in self.sizes.items() if file.startswith(f"{name}/"))

    def attrs(self) -> dict:
        return dict(self._open("", zarr.open_group, use_consolidated=False).attrs)

    def array(self, name: str) -> zarr.Array:
        array = self._open(name, zarr.open_array)
        # All-zero chunks are written too, so that a missing file always means lost data.
        return array.with_config({"write_empty_chunks": True}) if self.writable else array

    def chunks(self, name: str, array: zarr.Array) -> Chunks | None:
        """How to read the array without zarr, None where only zarr can."""
        if name not in self._chunks:
            self._chunks[name] = Chunks.of(array)
        return self._chunks[name]

    def _open(self, name: str, opener, **how):
        try:
            return opener(self.store, path=name, mode="r+" if self.writable else "r", zarr_format=self.format, **how)
        except FileNotFoundError as e:
            raise DataError(f"{self.path}: there is no array {name!r}. A dataset has data/<key> and meta/episode_ends") from e
        except (numcodecs.errors.UnknownCodecError, zarr.errors.UnknownCodecError) as e:
            if "imagecodecs" in str(e) and _imagecodecs():
                return self._open(name, opener, **how)
            package = next((pip for part, pip in CODECS.items() if part in str(e)), None)
            cure = f"pip install {package}" if package else "Install the package that provides it"
            raise DataError(f"{self.path}: {name} is compressed with a codec that is not installed ({e}). {cure}, then try again") from e
        except DataError:
            raise
        except (ValueError, TypeError, KeyError) as e:
            raise DataError(f"{self.path}: the metadata of {name or 'the group'} is damaged ({e}). "
                            "Copy the dataset again from its source") from e


def where(path: Path | str) -> Path:
    """A Path; a Url for what is behind one, but file://…"""
    if not (url := URL.match(str(path))):
        return Path(path)
    return Path(url2pathname(urlsplit(str(path)).path)) if url[1] == "file" else Url(path)


def _imagecodecs() -> bool:
    """Make the codecs of imagecodecs known, which UMI keeps its images in; False where they are already or are not installed."""
    try:
        import imagecodecs.numcodecs as codecs
    except ImportError:
        return False
    before = set(numcodecs.registry.codec_registry)
    codecs.register_codecs(verbose=False)
    return set(numcodecs.registry.codec_registry) != before


def _place(path: Path) -> tuple[Place, str]:
    """What is at path, and in one word what it is."""
    if isinstance(path, Url):
        remote = Remote(str(path))
        return (_zip(remote.open(""), path), ".zip") if remote.is_file else (remote, "URL")
    if not path.exists():
        raise DataError(f"{path} does not exist. Check path=…, or record a dataset there first")
    return (Folder(path), "directory") if path.is_dir() else (_zip(File(path), path), ".zip")


def _zip(file: Opened, path: Path) -> Zip:
    try:
        return Zip(file)
    except zipfile.BadZipFile as e:
        raise DataError(f"{path} is neither a directory nor a readable .zip ({e}). If it was downloaded, download it again") from e


def row_files(array: zarr.Array, name: str, lo: int, hi: int) -> Iterator[tuple[int, int, str]]:
    """Yield (first frame, end frame, file name) of every chunk or shard file that holds frames [lo, hi)."""
    grid = array.shards or array.chunks
    columns = [range(-(-n // c)) for n, c in zip(array.shape[1:], grid[1:], strict=True)]
    for row in range(lo // grid[0], -(-hi // grid[0])):
        for column in product(*columns):
            yield row * grid[0], (row + 1) * grid[0], f"{name}/{array.metadata.encode_chunk_key((row, *column))}"


def read_rows(files: Files, array: zarr.Array, name: str, lo: int, hi: int, *, fill_missing: bool,
              holding: Callable[[int, int], str], out: np.ndarray | None = None) -> np.ndarray:
    """Frames [lo, hi) of array, every file accounted for, put into out when given.   holding(lo, hi): words for the episodes those frames belong to."""
    if (chunks := files.chunks(name, array)) is not None:
        out = np.empty((hi - lo, *chunks.shape), chunks.dtype) if out is None else out
        return _direct(files, chunks, array, name, (lo, hi), out, fill_missing, holding)
    for a, b, file in row_files(array, name, lo, hi):
        if not files.size(file) and not fill_missing:
            raise _missing(files, name, file, holding(a, b))
    try:
        got = np.asarray(array[lo:hi])
    except DataError:
        raise
    except Exception as e:  # every codec raises a class of its own
        for a, b, file in row_files(array, name, lo, hi):
            try:
                array[max(a, lo):min(b, hi)]
            except Exception as cause:
                raise _undecodable(files, name, file, holding(a, b), str(cause)) from e
        raise
    if out is None:
        return got
    out[:] = got
    return out


def _direct(files: Files, chunks: Chunks, array: zarr.Array, name: str, span: tuple[int, int], out: np.ndarray, fill_missing: bool,
            holding: Callable[[int, int], str]) -> np.ndarray:
    """The same without zarr."""
    (lo, hi), steps = span, chunks.steps
    for a, b, name_of_file in row_files(array, name, lo, hi):
        first, end = max(lo, a), min(hi, b)
        if not files.size(name_of_file):
            if not fill_missing:
                raise _missing(files, name, name_of_file, holding(a, b))
            out[first - lo:end - lo] = 0 if chunks.fill is None else chunks.fill
            continue
        which = range((first - a) // steps, -(-(end - a) // steps))
        file = files.open(name_of_file)
        try:
            for k, part in zip(which, chunks.read(file, which), strict=True):
                at = a + k * steps
                x, y = max(first, at), min(end, at + steps)
                out[x - lo:y - lo] = part[x - at:y - at]
        except Damaged as e:
            raise _undecodable(files, name, name_of_file, holding(a, b), str(e)) from e
        finally:
            file.close()
    return out


def _missing(files: Files, name: str, file: str, holding: str) -> DataError:
    return DataError(f"{files.path}: {name} lacks the file {file}, which holds {holding}. Copy the dataset again; if its writer "
                     "leaves out chunks of zeros (zarr-python 3 does by default), read them as zeros: missing=zeros after dipole data, data.missing=zeros "
                     "after dipole train, Store.open(path, missing='zeros') in Python")


def _undecodable(files: Files, name: str, file: str, holding: str, why: str) -> DataError:
    return DataError(f"{files.path}: {name} cannot be decoded in the file {file} ({files.size(file)} bytes: {why}), which holds {holding}. "
                     "The file is truncated or damaged: copy the dataset again from its source")

"""The files under a dataset: a zarr group (v2 or v3) in a directory or a .zip, opened with errors that name the file and the cure.

zarr reads a chunk file that is missing, or empty in v3, as zeros without a word, and Blosc turns a truncated one into stray memory. For a
robot's data that is a silent lie, so `read_rows` looks at the files first.
"""
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numcodecs.errors
import numpy as np
import zarr
import zarr.errors
from zarr.storage import LocalStore, ZipStore


class DataError(ValueError):
    """A dataset that cannot be used as it is; the message names the path, the key and what to do."""


CODECS = {"imagecodecs": "imagecodecs", "wavpack": "wavpack-numcodecs", "flac": "flac-numcodecs"}  # codec name contains -> pip package


class Files:
    """Read access to every file of one zarr group; write access when it is a v3 directory opened with writable=True."""

    def __init__(self, path: Path | str, *, writable: bool = False):
        self.path, self.writable = Path(path), writable
        if not self.path.exists():
            raise DataError(f"{self.path} does not exist. Check path=…, or record a dataset there first")
        self.sizes: dict[str, int] | None = None  # a directory is asked file by file: it may be growing
        self.store: LocalStore | ZipStore
        if self.path.is_dir():
            self.store = LocalStore(self.path, read_only=not writable)
        else:
            self.sizes = _zip_sizes(self.path)
            self.store = ZipStore(self.path, mode="r")
        self.format = 3 if self.size("zarr.json") else 2 if self.size(".zgroup") else 0
        if not self.format:
            raise DataError(f"{self.path} is not a zarr group: it has neither zarr.json (v3) nor .zgroup (v2) at its top. "
                            "Point path=… at the folder (or .zip) that directly holds data/ and meta/")
        if writable and (self.sizes is not None or self.format == 2):
            raise DataError(f"{self.path} is {'a .zip' if self.sizes is not None else 'zarr v2'}, which is read but not written. "
                            "Copy its episodes into a new dataset (Store.create, then extend) and append there")

    def size(self, name: str) -> int:
        """Bytes of the file called name, 0 when there is none."""
        if self.sizes is not None:
            return self.sizes.get(name, 0)
        file = self.path / name
        return file.stat().st_size if file.is_file() else 0

    def head(self, name: str, n: int) -> bytes:
        """The first n bytes of the file called name."""
        if self.sizes is None:
            with open(self.path / name, "rb") as f:
                return f.read(n)
        with zipfile.ZipFile(self.path) as z, z.open(name) as f:
            return f.read(n)

    def data_keys(self) -> list[str]:
        """Names of the arrays directly under data/."""
        meta = "zarr.json" if self.format == 3 else ".zarray"
        if self.sizes is None:
            return sorted(p.parent.name for p in self.path.glob(f"data/*/{meta}"))
        return sorted(parts[1] for name in self.sizes if (parts := name.split("/"))[0] == "data" and len(parts) == 3 and parts[2] == meta)

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

    def _open(self, name: str, opener, **how):
        try:
            return opener(self.store, path=name, mode="r+" if self.writable else "r", zarr_format=self.format, **how)
        except FileNotFoundError as e:
            raise DataError(f"{self.path}: there is no array {name!r}. A dataset has data/<key> and meta/episode_ends") from e
        except (numcodecs.errors.UnknownCodecError, zarr.errors.UnknownCodecError) as e:
            package = next((pip for part, pip in CODECS.items() if part in str(e)), None)
            cure = f"pip install {package}" if package else "Install the package that provides it"
            raise DataError(f"{self.path}: {name} is compressed with a codec that is not installed ({e}). {cure}, then try again") from e
        except (ValueError, TypeError, KeyError) as e:
            raise DataError(f"{self.path}: the metadata of {name or 'the group'} is damaged ({e}). "
                            "Copy the dataset again from its source") from e


def _zip_sizes(path: Path) -> dict[str, int]:
    try:
        with zipfile.ZipFile(path) as z:
            return {info.filename: info.file_size for info in z.infolist()}
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
              where: Callable[[int, int], str]) -> np.ndarray:
    """Frames [lo, hi) of array, every file accounted for.   where(lo, hi): words for the episodes those frames belong to."""
    blosc = not array.shards and any(type(c).__name__ in ("Blosc", "BloscCodec") for c in array.compressors[-1:])
    for a, b, file in row_files(array, name, lo, hi):
        size = files.size(file)
        if not size and not fill_missing:
            raise DataError(f"{files.path}: {name} lacks the file {file}, which holds {where(a, b)}. Copy the dataset again; if its writer "
                            "leaves out chunks of zeros (zarr-python 3 does by default), open it with missing='zeros'")
        # Blosc believes its header and reads past the end of a truncated chunk, into whatever memory comes next.
        if size and blosc and (said := int.from_bytes(files.head(file, 16)[12:], "little")) != size:
            raise _undecodable(files, name, file, where(a, b), f"Blosc announces {said}")
    try:
        return np.asarray(array[lo:hi])
    except Exception as e:  # every codec raises a class of its own
        for a, b, file in row_files(array, name, lo, hi):
            try:
                array[max(a, lo):min(b, hi)]
            except Exception as cause:
                raise _undecodable(files, name, file, where(a, b), str(cause)) from e
        raise


def _undecodable(files: Files, name: str, file: str, where: str, why: str) -> DataError:
    return DataError(f"{files.path}: {name} cannot be decoded in the file {file} ({files.size(file)} bytes: {why}), which holds {where}. "
                     "The file is truncated or damaged: copy the dataset again from its source")

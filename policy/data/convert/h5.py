"""What the HDF5 formats share: opening with errors that say what to do, a group's arrays apart into steps and the rest, attributes to and fro.

Only h5py's own numbers and text are read. Its opaque and reference types are refused, so nothing of a file is ever run.
"""
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert.images import read_image
from policy.data.files import DataError
from policy.data.store import Schema

SIGNATURE = b"\x89HDF\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
DEEPEST = 16
OBSERVED = re.compile(r"(obs|observations?)(/|$)")
COMPRESSIONS = ("gzip", "lzf", "szip")
DAMAGED = (OSError, RuntimeError, KeyError, TypeError, EOFError, UnicodeDecodeError, OverflowError, MemoryError)  # what h5py raises


def h5py() -> Any:
    try:
        import h5py
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("HDF5 is read by h5py: pip install 'dipole[data]'", name="h5py") from e
    return h5py


def is_hdf5(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        return f.read(len(SIGNATURE)) == SIGNATURE


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, for reading.   DataError when it is damaged, which h5py may notice at any read, or still being written."""
    try:
        f = h5py().File(path, "r")
    except DAMAGED as e:
        raise DataError(f"{path} cannot be opened as HDF5 ({e}). If a recorder still writes it, wait; if it was downloaded or copied, do that again") from e
    with f:
        try:
            yield f
        except DAMAGED as e:
            why = " ".join(str(e).split()) or type(e).__name__
            raise DataError(f"{path} cannot be read ({why}). It is damaged or truncated: copy it again from its source") from e


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path below group, dataset) of every dataset, in the order of their names."""
    if prefix.count("/") > DEEPEST:
        raise DataError(f"{group.file.filename}: {group.name} is nested more than {DEEPEST} deep, or holds a link to itself. Remove that")
    for name in sorted(group):
        item = None if isinstance(group.get(name, getlink=True), h5py().ExternalLink) else group.get(name)
        if item is None or (isinstance(item, h5py().Dataset) and (item.external or item.is_virtual)):
            raise DataError(f"{group.file.filename}: {group.name}/{name} lies in another file, or nowhere. Only what is in the file itself is read: "
                            "copy it in with h5repack, or remove it")
        if isinstance(item, h5py().Group):
            yield from leaves(item, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", item


def numbers(dataset: Any) -> bool:
    """Whether it holds plain numbers; text is false, anything else a DataError."""
    if dataset.dtype.kind in "fiub" and dataset.shape is not None:
        return True
    refuse_objects(dataset)
    return False


def refuse_objects(dataset: Any) -> None:
    dtype = dataset.dtype
    if dataset.shape is None or dtype.kind in "SUVc" or h5py().check_string_dtype(dtype) is not None:
        return
    if dtype.kind == "O":
        raise DataError(f"{dataset.file.filename}: {dataset.name} holds objects (ragged arrays or references), not one array a step. "
                        "Remove it from the file (del f[…] in h5py), or write it with a fixed shape")


def whole(dataset: Any) -> Any:
    """A dataset's content as keep.py can hold it: an array of numbers, or text."""
    refuse_objects(dataset)
    if dataset.shape is None:
        return {"__empty__": dataset.dtype.str}
    text = h5py().check_string_dtype(dataset.dtype)
    if text is None or text.length is not None:
        return dataset[()]
    return {"__text__": _lists(dataset.asstr(errors="surrogateescape")[()]), "encoding": text.encoding}


def write_whole(group: Any, name: str, value: Any) -> None:
    data, dtype = from_kept(value)
    group.create_dataset(name, data=data, dtype=dtype)


def attrs_of(item: Any) -> dict[str, Any]:
    """{name: value} of a file, group or dataset, as keep.py can hold it."""
    out: dict[str, Any] = {}
    for name in item.attrs:
        try:
            value = item.attrs[name]
        except (OSError, TypeError, UnicodeDecodeError) as e:
            raise DataError(f"{item.file.filename}: the attribute {name!r} of {item.name} cannot be read ({e})") from e
        if isinstance(value, h5py().Empty):
            out[name] = {"__empty__": value.dtype.str}
            continue
        text = h5py().check_string_dtype(item.attrs.get_id(name).dtype)
        if text is not None and text.length is None:
            out[name] = value if isinstance(value, str) and text.encoding == "utf-8" else {"__text__": _lists(value), "encoding": text.encoding}
        elif np.asarray(value).dtype.hasobject:
            raise DataError(f"{item.file.filename}: the attribute {name!r} of {item.name} holds objects, which are not read")
        else:
            out[name] = value
    return out


def said(text: Any) -> dict[str, Any]:
    """What JSON in an attribute or a file beside holds, {} for anything that is no such object."""
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def set_attrs(item: Any, attrs: Mapping[str, Any]) -> None:
    for name, value in attrs.items():
        data, dtype = from_kept(value)
        if data is None:
            item.attrs[name] = h5py().Empty(dtype)
        else:
            item.attrs.create(name, data, dtype=dtype)


def from_kept(value: Any) -> tuple[Any, Any]:
    """(data, dtype) for h5py of what attrs_of and whole gave; data None is HDF5's empty."""
    if isinstance(value, dict) and "__empty__" in value:
        return h5py().Empty(np.dtype(value["__empty__"])), None
    if isinstance(value, dict):
        dtype = h5py().string_dtype(value["encoding"])
        text = value["__text__"]
        return (text if isinstance(text, str) else np.array(text, dtype=object)), dtype
    return (value, h5py().string_dtype()) if isinstance(value, str) else (value, None)


def rest(group: Any, found: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """What an episode says beside its rows: its attributes, those below it, and datasets without one row a step."""
    groups = {"/".join(k.split("/")[:i]) for k in found for i in range(1, k.count("/") + 1)}
    below = {k: got for k in [*sorted(groups), *found] if (got := attrs_of(group[k]))}
    return {"attrs": attrs_of(group), "arrays": {k: whole(d) for k, d in found.items() if k not in rows}, "below": below}


def write_rest(group: Any, said: Mapping[str, Any]) -> None:
    for key, value in said.get("arrays", {}).items():
        write_whole(group, key, value)
    for key, attrs in {"/": {}, **said.get("below", {})}.items():
        if key in group:
            set_attrs(group[key], attrs)
    set_attrs(group, said.get("attrs", {}))


def differs(path: Any, rows: Mapping[str, Any], where: str, first_rows: Mapping[str, Any], first: str) -> DataError:
    """An episode that has not the keys, shapes and dtypes of the first."""
    key = sorted(k for k in {*rows, *first_rows} if rows.get(k) != first_rows.get(k))[0]
    has, wants = (f"{r[key][0]} {r[key][1]} a step" if key in r else "missing" for r in (rows, first_rows))
    return DataError(f"{path}: {key!r} is {has} in {where} and {wants} in {first}. Every episode needs the same: repair that one, or remove it from the file")


def steps(found: Mapping[str, Any], n: int, where: str, *, images: bool = False) -> tuple[Schema, list[str], dict[str, str]]:
    """Schema of the datasets with one row for each of n steps, the observations among them that have a last one beside, after the last step, and
    observations of another number {name: error}, which rows.py judges.

    where: names the episode, for errors.   images: JPEG files in rows are images.   DataError: complex numbers.
    """
    schema: Schema = {}
    odd: dict[str, str] = {}
    for k, d in found.items():
        packed = images and jpeg(d)
        if d.dtype.kind == "c" and d.shape and d.shape[0] in (n, n + 1):
            raise DataError(f"{where}: {k!r} holds complex numbers ({d.dtype}), which no policy reads. Store real and imaginary part as two channels")
        if not (packed or numbers(d)) or not d.shape:
            continue
        if d.shape[0] == n or (OBSERVED.match(k) and d.shape[0] == n + 1):
            schema[k] = frame(d) if packed else (d.shape[1:], d.dtype)
        elif OBSERVED.match(k):
            odd[k] = (f"{where}: {k!r} has {d.shape[0]} rows for {n} steps, so which belongs to which action is open. An observation has one row a step, "
                      "or a last one more. Repair it, or remove it from the file (del f[…] in h5py). If it has no rows, as a camera's matrix, keep it beside: "
                      f"'skip=[{k}]' after dipole data convert, or skip: [{k}] in the mapping")
    return schema, [k for k in schema if len(found[k]) == n + 1], odd


def left_out(each: Iterable[Mapping[str, Any]]) -> list[str]:
    """A note on the arrays that are kept beside the rows, none where there are none."""
    names = sorted({k for said in each for k in said["arrays"]})
    return [f"not one row a step, so kept but no keys: {', '.join(names)}"] if names else []


def jpeg(dataset: Any) -> bool:
    """Whether each row is a JPEG file, of its own length or padded to one."""
    if h5py().check_vlen_dtype(dataset.dtype) != np.uint8 and not (dataset.dtype == np.uint8 and dataset.ndim == 2):
        return False
    return len(dataset) > 0 and dataset[0][:3].tobytes() == JPEG


def frame(dataset: Any) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of one row, decoded."""
    if not jpeg(dataset):
        return dataset.shape[1:], dataset.dtype
    first = rows(dataset, 0, 1)
    return first.shape[1:], first.dtype


def rows(dataset: Any, lo: int, hi: int) -> np.ndarray:
    """Rows [lo, hi); JPEG files decoded to (n, h, w, 3), or (n, h, w) grey ones, uint8."""
    if not jpeg(dataset):
        return dataset[lo:hi]
    frames = [read_image(x.tobytes(), f"{dataset.file.filename}: frame {lo + i} of {dataset.name}") for i, x in enumerate(dataset[lo:hi])]
    x = np.stack(frames)
    return x[..., 0] if x.shape[-1] == 1 else x


def filters(dataset: Any) -> dict[str, Any]:
    """How it was compressed, to compress it so again: {} for not at all or by a filter that h5py does not bring."""
    if dataset.compression not in COMPRESSIONS:
        return {}
    return {"compression": dataset.compression, "compression_opts": dataset.compression_opts, "shuffle": bool(dataset.shuffle)}


def _lists(x: Any) -> Any:
    if isinstance(x, bytes):
        return x.decode("utf-8", "surrogateescape")
    return [_lists(v) for v in x.tolist()] if isinstance(x, np.ndarray) else [_lists(v) for v in x] if isinstance(x, list | tuple) else str(x)

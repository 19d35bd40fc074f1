"""Replay buffers of Diffusion Policy and UMI: zarr v2 or v3, a folder or a .zip, with data/<key> and meta/episode_ends.

Options of the reader: images: auto stores images that are kept as floats 0 … 255 as uint8, if every pixel is whole, keep leaves them; missing: zeros
reads chunks that are not there as zeros, for writers that leave those out (error).
UMI (robot0_eef_pos, robot0_eef_rot_axis_angle, robot0_gripper_width, …) records no actions; they are, as in its own training, position, rotation and width
of each robot side by side, absolute, here one step later, so that an action says where to be next. Neither format tells its rate: fps=… (UMI: 59.94).
Way back: zarr v2, .zip where dst ends so, the same chunks and compressors; pixels that were compressed with loss are written without.
"""
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.storage import LocalStore, ZipStore

from policy.data.convert.back import Origin
from policy.data.convert.own import NAME, Own, dump, load
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError, Files
from policy.data.semantics import Semantics
from policy.data.store import BLOCK_BYTES, ENDS, Store

LOSSLESS = ("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma")
SMALL = 2**26  # bytes of an array under meta/ that is kept for the way back
UMI = re.compile(r"robot(\d+)_(eef_pos|eef_rot_axis_angle|gripper_width)")


def detects(path: Path) -> bool:
    if not (path.is_dir() and any((path / n).is_file() for n in (".zgroup", "zarr.json"))) and path.suffix != ".zip":
        return False
    try:
        files = Files(path)
    except DataError:
        return False
    ours = files.format == 3 and "action_semantics" in files.attrs()  # a store of dipole
    return bool(files.data_keys()) and bool(files.size(f"{ENDS}/.zarray") or files.size(f"{ENDS}/zarr.json")) and not ours


def read(path: Path, *, images: str = "auto", missing: str = "error") -> Source:
    """DataError: a missing or damaged chunk, a codec that is not installed, pixels that are not whole."""
    if images not in ("auto", "keep"):
        raise ValueError(f"images is auto or keep, got {images!r}")
    store = Store.open(path, missing=missing)
    files, notes = Files(path), list[str]()
    own = load(store.attrs.get(NAME), notes)
    whole = [k for k, (shape, dtype) in store.schema.items() if images == "auto" and not own.said and _pixels(shape, dtype) and _looks_whole(store, k)]
    schema = {k: (shape, np.dtype("uint8") if k in whole else dtype) for k, (shape, dtype) in store.schema.items()}
    notes += [f"{k} holds whole numbers 0 to 255 as {store.schema[k][1]} and is stored as uint8" for k in whole]
    keep = {"format": files.format, "floats": {k: store.schema[k][1].str for k in whole},
            "attrs": dict(store.attrs), "arrays": {k: _how(files.array(f"data/{k}")) for k in store.keys}, ENDS: _how(files.array(ENDS)),
            "meta": _meta(files, notes)}
    umi = sorted({int(m[1]) for k in store.keys if (m := UMI.fullmatch(k))})
    common: dict[str, Any] = {"fps": own.fps or store.fps, "units": own.units or store.units, "notes": notes, "keep": keep, "names": own.keys}
    if own.said:
        common |= _said(own, schema)
    elif "action" not in schema and umi and all(f"robot{i}_{part}" in schema for i in umi for part in ("eef_pos", "eef_rot_axis_angle")):
        common |= _umi(umi, schema)
    else:
        common["action"] = "action" if "action" in schema else None
    return Source(path, "diffusion_policy", schema, partial(_episodes, store, whole), store.episodes, **common)


def _said(own: Own, schema: Mapping[str, Any]) -> dict[str, Any]:
    """What the store said that it was written from."""
    return {"action": "action" if "action" in schema else None, "semantics": own.semantics, "obs": own.obs, "attrs": own.attrs("")}


def _umi(robots: list[int], schema: Mapping[str, Any]) -> dict[str, Any]:
    """The action of UMI, what it means, and what a policy of UMI observes."""
    keys = [k for i in robots for k in (f"robot{i}_eef_pos", f"robot{i}_eef_rot_axis_angle", f"robot{i}_gripper_width") if k in schema]
    parts, at = {}, 0
    for key in keys:
        robot, what = UMI.fullmatch(key).groups()  # type: ignore[union-attr]
        name = {"eef_pos": "position", "eef_rot_axis_angle": "rotation", "gripper_width": "gripper"}[what]
        width = int(np.prod(schema[key][0]))
        parts[name if len(robots) == 1 else f"robot{robot}_{name}"] = tuple(range(at, at + width))
        at += width
    text = "pose of each end effector and width of its gripper (m) one step later, absolute, in the frame of the recording's map; rotation axis-angle"
    units = {k: "m" if k.endswith(("pos", "width")) else "rad, axis-angle" for k in keys}
    semantics = Semantics("absolute", "ee", rotation="axis_angle" if len(robots) == 1 else None, parts=parts, text=text)
    return {"action_from": [{"key": k, "shift": 1} for k in keys], "semantics": semantics, "obs": keys, "units": {**units}}


def _pixels(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    return dtype.kind == "f" and len(shape) == 3 and (shape[-1] in (1, 3, 4) or shape[0] in (1, 3, 4)) and max(shape) >= 16


def _looks_whole(store: Store, key: str) -> bool:
    """Whether frames at the start, in the middle and at the end are whole numbers 0 … 255, and not all of them 0 or 1."""
    n = store.steps
    x = np.concatenate([store.read(key, a, min(n, a + 8)) for a in sorted({0, n // 2, max(0, n - 8)})])
    return bool((x >= 0).all() and (x <= 255).all() and (x == np.rint(x)).all() and x.max() > 1)


def _episodes(store: Store, whole: list[str]) -> Iterator[Episode]:
    for i in range(store.episodes):
        episode = store.episode(i)
        for key in whole:
            x = episode[key]
            episode[key] = np.clip(np.nan_to_num(x), 0, 255).astype(np.uint8)
            if (odd := (episode[key] != x).reshape(len(x), -1).any(1)).any():
                raise DataError(f"{store.path}: {key} of episode {i} is not whole numbers 0 to 255 at step {int(odd.argmax())}, unlike the frames looked at "
                                "first. Store it as it is with options: {images: keep}")
        yield episode


def _how(array: zarr.Array) -> dict[str, Any]:
    """How an array is laid out, enough to write it again."""
    v2, meta = array.metadata.zarr_format == 2, array.metadata
    codec: Any = array.compressors[-1] if array.compressors and v2 else None
    return {"chunks": list(array.chunks), "dtype": array.dtype.str, "fill": None if array.fill_value is None else np.asarray(array.fill_value).item(),
            "codec": codec.get_config() if codec is not None else None, "plain": v2 and codec is None, "order": getattr(meta, "order", "C"),
            "separator": getattr(meta, "dimension_separator", "."), "attrs": dict(array.attrs)}


def _meta(files: Files, notes: list[str]) -> dict[str, Any]:
    """Small arrays beside episode_ends, for the way back."""
    out = {}
    held = files.sizes if files.sizes is not None else [p.relative_to(files.path).as_posix() for p in files.path.glob("meta/*/*")]
    names = {m[1] for n in held if (m := re.fullmatch(r"meta/([^/]+)/(\.zarray|zarr\.json)", n))}
    for name in sorted(names - {"episode_ends", "source"}):
        array = files.array(f"meta/{name}")
        if array.nbytes > SMALL or array.dtype.hasobject:
            notes.append(f"meta/{name} is left out: {'objects' if array.dtype.hasobject else 'too large'}")
        else:
            out[name] = {"value": np.asarray(array[...]), "how": _how(array)}
    return out


def write(store: Store, path: Path) -> list[str]:
    """A replay buffer in zarr v2, a .zip where path ends so, and what only we say, see own.py; returns what was left out and why."""
    origin = Origin.of(store, "diffusion_policy")
    keep, notes = origin.keep, origin.notes
    if keep.get("format") == 3:
        notes.append("written as zarr v2, which Diffusion Policy reads, not v3 as it was")
    place = ZipStore(path, mode="w") if path.suffix == ".zip" else LocalStore(path)
    try:
        root = zarr.create_group(place, zarr_format=2, attributes=dict(keep.get("attrs", {})) if origin.came else {NAME: dump(origin)})
        for group in ("data", "meta"):
            root.create_group(group)
        schema = {name: (shape, np.dtype(keep.get("floats", {}).get(name, dtype))) for name, (shape, dtype) in origin.schema.items()}
        for key, name in origin.names.items():
            shape, dtype = schema[name]
            array = _create(root, f"data/{name}", (store.steps, *shape), dtype, keep.get("arrays", {}).get(name), notes)
            rows = array.chunks[0] * max(1, BLOCK_BYTES // max(1, int(np.prod(array.chunks)) * dtype.itemsize))
            for lo in range(0, store.steps, rows):
                hi = min(store.steps, lo + rows)
                array[lo:hi] = store.read(key, lo, hi).astype(dtype, copy=False)
        ends = store.episode_ends
        how = keep.get(ENDS)
        _create(root, ENDS, ends.shape, np.dtype(how["dtype"] if how else "<i8"), how, notes)[:] = ends
        for name, entry in keep.get("meta", {}).items():
            _create(root, f"meta/{name}", entry["value"].shape, entry["value"].dtype, entry["how"], notes)[...] = entry["value"]
    finally:
        place.close()
    return notes


def _create(root: zarr.Group, name: str, shape: tuple[int, ...], dtype: np.dtype, how: Mapping[str, Any] | None, notes: list[str]) -> zarr.Array:
    codec: Any = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
    if how and how["plain"]:
        codec = None
    elif how and how["codec"]:
        if how["codec"]["id"] in LOSSLESS:
            codec = numcodecs.get_codec(dict(how["codec"]))
        else:
            notes.append(f"{name} was compressed with {how['codec']['id']}, which may change pixels; it is written with Blosc, which does not")
    frame = max(1, int(np.prod(shape[1:])) * dtype.itemsize)
    chunks = tuple(how["chunks"]) if how and len(how["chunks"]) == len(shape) else (max(1, min(shape[0], 2**21 // frame)), *shape[1:])
    return root.create_array(name, shape=shape, chunks=chunks, dtype=dtype, compressors=codec, filters=None, order=how["order"] if how else "C",
                             fill_value=how["fill"] if how else 0, attributes=how["attrs"] if how else None, config={"write_empty_chunks": True},
                             chunk_key_encoding={"name": "v2", "separator": how["separator"] if how else "."})

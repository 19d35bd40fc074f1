"""Chunks decoded without zarr are what zarr decodes, from every layout, and damage is noticed at every byte."""
import contextlib

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from policy.data.chunks import Chunks, Damaged
from policy.data.files import DataError, Files, read_rows
from policy.data.places import Folder

SHAPE = (37, 4, 3)
V2 = [None, numcodecs.Zstd(3), numcodecs.GZip(5), numcodecs.Zlib(1), *(numcodecs.Blosc(name, shuffle=s) for name in ("zstd", "lz4") for s in (0, 1, 2))]
V3 = [None, ZstdCodec(checksum=True), GzipCodec(), BloscCodec(cname="zstd", shuffle="shuffle"), BloscCodec(cname="lz4", shuffle="bitshuffle")]


def content(dtype):
    x = np.random.default_rng(0).integers(0, 200, SHAPE).astype(dtype)
    x[16:24] = 0  # a chunk that zarr leaves out
    return x


def made(tmp_path, dtype, **how):
    root = zarr.create_group(tmp_path / "d.zarr", zarr_format=how.pop("zarr_format"))
    array = root.create_array("data/x", shape=SHAPE, chunks=(4, *SHAPE[1:]), dtype=dtype, config={"write_empty_chunks": how.pop("empty", True)}, **how)
    array[:] = content(dtype)
    return Files(tmp_path / "d.zarr")


def check(files, dtype):
    array = files.array("data/x")
    chunks = files.chunks("data/x", array)
    for lo, hi in ((0, 37), (3, 5), (8, 8), (15, 33), (36, 37)):
        got = read_rows(files, array, "data/x", lo, hi, fill_missing=True, holding=lambda a, b: "")
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, array[lo:hi])
        np.testing.assert_array_equal(got, content(dtype)[lo:hi])
        out = np.empty((hi - lo, *SHAPE[1:]), dtype)
        assert read_rows(files, array, "data/x", lo, hi, fill_missing=True, holding=lambda a, b: "", out=out) is out
        np.testing.assert_array_equal(out, got)
    return chunks


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
@pytest.mark.parametrize("compressor", V2, ids=str)
def test_v2(tmp_path, dtype, compressor):
    assert check(made(tmp_path, dtype, zarr_format=2, compressors=compressor), dtype) is not None


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("codec", V3, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("shards", [None, (8, 4, 3)], ids=["chunks", "shards"])
@pytest.mark.parametrize("empty", [True, False], ids=["zeros-kept", "zeros-left-out"])
def test_v3(tmp_path, dtype, codec, shards, empty):
    assert check(made(tmp_path, dtype, zarr_format=3, compressors=codec, shards=shards, empty=empty), dtype) is not None


def test_an_index_at_the_start(tmp_path):
    root = zarr.create_group(tmp_path / "d.zarr")
    codec = ShardingCodec(chunk_shape=(4, 4, 3), codecs=[BytesCodec(), ZstdCodec()], index_location="start")
    root.create_array("data/x", shape=SHAPE, chunks=(16, 4, 3), dtype="float32", serializer=codec, compressors=None)[:] = content("float32")
    chunks = check(Files(tmp_path / "d.zarr"), "float32")
    assert chunks is not None and chunks.index_first


@pytest.mark.parametrize("how", [
    dict(zarr_format=2, order="F"), dict(zarr_format=2, filters=[numcodecs.Delta("f4")]), dict(zarr_format=2, dtype=">f4"),
    dict(zarr_format=2, compressors=numcodecs.LZ4()), dict(zarr_format=3, filters=[TransposeCodec(order=(1, 0, 2))]),
    dict(zarr_format=3, serializer=BytesCodec(endian="big")), dict(zarr_format=3, compressors=[GzipCodec(), ZstdCodec()])], ids=str)
def test_what_zarr_alone_can_read(tmp_path, how):
    dtype = how.pop("dtype", "float32")
    assert check(made(tmp_path, dtype, **how), np.dtype(dtype)) is None


def test_chunks_that_split_a_frame_are_zarrs(tmp_path):
    root = zarr.create_group(tmp_path / "d.zarr")
    root.create_array("data/x", shape=SHAPE, chunks=(4, 2, 3), dtype="float32")[:] = content("float32")
    assert check(Files(tmp_path / "d.zarr"), "float32") is None


def all_of(chunks, path, name, which):
    with contextlib.closing(Folder(path).open(name)) as file:
        return list(chunks.read(file, which))


@pytest.mark.parametrize("zarr_format, codec, shards", [(3, ZstdCodec(checksum=True), (8, 4, 3)), (3, ZstdCodec(checksum=True), None)])
def test_every_changed_byte_and_every_cut_is_noticed(tmp_path, zarr_format, codec, shards):
    files = made(tmp_path, "float32", zarr_format=zarr_format, compressors=codec, shards=shards)
    path = next(p for p in sorted((tmp_path / "d.zarr/data/x/c").rglob("*")) if p.is_file())
    whole, chunks = path.read_bytes(), Chunks.of(files.array("data/x"))
    name, which = path.relative_to(tmp_path / "d.zarr").as_posix(), range(chunks.per_file)
    want = np.concatenate(all_of(chunks, tmp_path / "d.zarr", name, which))
    noticed, index = 0, len(whole) - (16 * chunks.per_file + 4) * (shards is not None)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1:])
        try:
            got = np.concatenate(all_of(chunks, tmp_path / "d.zarr", name, which))
            np.testing.assert_array_equal(got, want)  # a bit that means nothing, such as a reserved one
            assert i < index  # in the index all of them mean something
        except Damaged:
            noticed += 1
        path.write_bytes(whole[:i])
        with pytest.raises(Damaged):
            all_of(chunks, tmp_path / "d.zarr", name, which)
    assert noticed > 0.97 * len(whole)


@pytest.mark.parametrize("rows", [3, 5])
def test_a_chunk_of_another_size_is_noticed(tmp_path, rows):
    files = made(tmp_path, "float32", zarr_format=2, compressors=numcodecs.Zstd(3))
    (tmp_path / "d.zarr/data/x/0.0.0").write_bytes(numcodecs.Zstd(3).encode(np.zeros((rows, *SHAPE[1:]), "float32")))
    with pytest.raises(DataError, match=rf"decodes to {48 * rows} bytes instead of 192"):
        read_rows(files, files.array("data/x"), "data/x", 0, 8, fill_missing=False, holding=lambda a, b: "")

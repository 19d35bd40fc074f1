"""Replay buffers of Diffusion Policy and UMI: there and back bit for bit, images as uint8 where whole, JPEG XL, the action that UMI stacks."""
import json
import sys
import zipfile
from pathlib import Path

import imagecodecs.numcodecs
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from policy.data import DataError, Store
from policy.data.convert.core import convert, detect, open_source

LENGTHS = (9, 14, 5)
N = sum(LENGTHS)
BLOSC = numcodecs.Blosc("zstd", 5, numcodecs.Blosc.BITSHUFFLE)


def buffer(path: Path, data: dict[str, np.ndarray], *, codec=BLOSC, codecs=None, extra=None) -> Path:
    """As Diffusion Policy lays it out, zarr v2; a .zip where path ends so."""
    place = ZipStore(path, mode="w") if path.suffix == ".zip" else path
    root = zarr.create_group(place, zarr_format=2)
    for key, x in data.items():
        rows = 1 if x.ndim == 4 and codecs else 4
        root.create_array(f"data/{key}", data=x, chunks=(rows, *x.shape[1:]), compressors=(codecs or {}).get(key, codec), config={"write_empty_chunks": True})
    root.create_array("meta/episode_ends", data=np.cumsum(LENGTHS), chunks=(8,), compressors=codec)
    for name, x in (extra or {}).items():
        root.create_array(f"meta/{name}", data=x, compressors=None)
    if path.suffix == ".zip":
        place.close()
    return path


def numbers(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"state": rng.normal(size=(N, 5)).astype("f4"), "action": rng.normal(size=(N, 2)), "img": rng.integers(0, 256, (N, 16, 16, 3)).astype("f4"),
            "n_contacts": rng.integers(0, 3, (N, 1)).astype("i2")}


def arrays(path: Path) -> dict[str, tuple]:
    """{array: (values as bytes, dtype, chunks, compressor)} and the same of meta/, read by zarr alone."""
    place = ZipStore(path, mode="r") if path.suffix == ".zip" else path
    root = zarr.open_group(place, mode="r")
    out = {}
    for group in ("data", "meta"):
        for name, a in root[group].arrays():
            out[f"{group}/{name}"] = (a[...].tobytes(), a.dtype, a.shape, a.chunks, [c.get_config() for c in a.compressors])
    return out


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.zip"])
@pytest.mark.parametrize("codec", [numcodecs.Blosc("lz4", 3), numcodecs.Zlib(4), None])
def test_there_and_back(tmp_path, name, codec):
    data = numbers()
    src = buffer(tmp_path / name, data, codec=codec, extra={"seeds": np.arange(3.0)})
    assert detect(src) == "diffusion_policy"
    done = convert(src, tmp_path / "s.zarr", fps=10)
    store = Store.open(done.path)
    assert store.schema["img"] == ((16, 16, 3), np.dtype("uint8")) and store.fps == 10 and store.attrs["obs"].keys() == {"state", "n_contacts"}
    for key, x in data.items():
        np.testing.assert_array_equal(store.read(key), x)
    convert(store.path, tmp_path / "back" / name)
    assert arrays(tmp_path / "back" / name) == arrays(src)
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / "back" / name) as z:
            assert len(set(z.namelist())) == len(z.namelist())
    else:  # the chunk files too, and what .zarray says
        for file in sorted(src.rglob("*")):
            other = tmp_path / "back" / name / file.relative_to(src)
            assert not file.is_file() or (json.loads(file.read_text()) == json.loads(other.read_text()) if file.name.startswith(".")
                                          else file.read_bytes() == other.read_bytes()), file


@pytest.mark.data
def test_the_real_pusht_comes_back(tmp_path, pusht):
    small = tmp_path / "small.zarr"  # without the images, which take 30 s; the slow test has them
    root, out = zarr.open_group(pusht, mode="r"), zarr.create_group(small, zarr_format=2)
    for name in ("data/action", "data/state", "data/keypoint", "data/n_contacts", "meta/episode_ends"):
        a = root[name]
        out.create_array(name, data=a[:], chunks=a.chunks, compressors=a.compressors[0], config={"write_empty_chunks": True})
    convert(convert(small, tmp_path / "s.zarr", fps=10).path, tmp_path / "back.zarr")
    assert arrays(tmp_path / "back.zarr") == arrays(small) == arrays_but_images(pusht)


def arrays_but_images(path: Path) -> dict[str, tuple]:
    root = zarr.open_group(path, mode="r")
    names = ("data/action", "data/state", "data/keypoint", "data/n_contacts", "meta/episode_ends")
    return {n: (root[n][...].tobytes(), root[n].dtype, root[n].shape, root[n].chunks, [c.get_config() for c in root[n].compressors]) for n in names}


@pytest.mark.slow
@pytest.mark.data
def test_the_real_pusht_comes_back_with_its_images(tmp_path, pusht):
    done = convert(pusht, tmp_path / "s.zarr", fps=10)
    assert "img holds whole numbers" in done.notes[0] and Store.open(done.path).schema["img"][1] == np.uint8
    convert(done.path, tmp_path / "back.zip")
    back, root = Store.open(tmp_path / "back.zip"), Store.open(pusht)
    assert back.schema == root.schema
    for lo in range(0, root.steps, 2000):
        np.testing.assert_array_equal(back.read("img", lo, min(root.steps, lo + 2000)), root.read("img", lo, min(root.steps, lo + 2000)))


def test_pixels_that_are_not_whole_stay_floats_or_are_told(tmp_path):
    data = numbers()
    ones = {**data, "img": data["img"] / 255}
    store = Store.open(convert(buffer(tmp_path / "a.zarr", ones), tmp_path / "a", fps=10).path)
    np.testing.assert_array_equal(store.read("img"), ones["img"])
    data["img"] = np.random.default_rng(1).integers(0, 256, (N, 16, 16, 3)).astype("f4")
    data["img"][10, 3, 3, 1] += 0.5  # not among the frames that are looked at first
    late = buffer(tmp_path / "b.zarr", data)
    with pytest.raises(DataError, match=r"img of episode 1 is not whole numbers 0 to 255 at step 1.*images: keep"):
        list(open_source(late).episodes())
    kept = open_source(late, images="keep")
    np.testing.assert_array_equal(np.concatenate([e["img"] for e in kept.episodes()]), data["img"])


def umi(path: Path, robots: int = 1, codec=None) -> tuple[Path, dict[str, np.ndarray]]:
    """A UMI replay buffer: images in JPEG XL, one a chunk, the rest uncompressed, as its pipeline writes them."""
    imagecodecs.numcodecs.register_codecs(verbose=False)
    rng, data = np.random.default_rng(0), {}
    for i in range(robots):
        data |= {f"robot{i}_eef_pos": rng.normal(size=(N, 3)).astype("f4"), f"robot{i}_eef_rot_axis_angle": rng.normal(size=(N, 3)).astype("f4"),
                 f"robot{i}_gripper_width": rng.uniform(0, 0.08, (N, 1)).astype("f4"), f"robot{i}_demo_start_pose": rng.normal(size=(N, 6)),
                 f"robot{i}_demo_end_pose": rng.normal(size=(N, 6))}
    ramp = np.add.outer(np.arange(32), np.arange(32))[None, :, :, None] * 3 + np.arange(N)[:, None, None, None]
    data["camera0_rgb"] = np.broadcast_to(ramp, (N, 32, 32, 3)).astype("u1")
    codec = codec or imagecodecs.numcodecs.Jpegxl(level=99, numthreads=1)
    return buffer(path, data, codec=None, codecs={"camera0_rgb": codec}), data


@pytest.mark.parametrize("robots", [1, 2])
def test_umi(tmp_path, robots):
    src, data = umi(tmp_path / "umi.zarr.zip", robots)
    done = convert(src, tmp_path / "s.zarr", fps=59.94)
    store = Store.open(done.path)
    stacked = np.concatenate([data[f"robot{i}_{part}"] for i in range(robots) for part in ("eef_pos", "eef_rot_axis_angle", "gripper_width")], 1)
    for e in range(len(LENGTHS)):
        lo, hi = store.span(e)
        np.testing.assert_array_equal(store.read("action", lo, hi), np.concatenate([stacked[lo + 1:hi], stacked[hi - 1:hi]]))
    assert np.abs(store.read("camera0_rgb").astype(int) - data["camera0_rgb"]).max() <= 3
    np.testing.assert_array_equal(store.read("robot0_demo_end_pose"), data["robot0_demo_end_pose"])
    action = store.attrs["action"]
    assert (action["kind"], action["space"]) == ("absolute", "ee") and "one step later" in action["text"]
    assert action["rotation"] == ("axis_angle" if robots == 1 else None) and len(store.attrs["obs"]) == 3 * robots
    assert "robot0_demo_end_pose" not in store.attrs["obs"]  # the future
    back = convert(store.path, tmp_path / "back.zarr.zip")
    assert any("imagecodecs_jpegxl, which may change pixels" in n for n in back.notes) and any("action was made by the conversion" in n for n in back.notes)
    other = Store.open(tmp_path / "back.zarr.zip")
    assert other.keys == sorted(data)
    for key in data:
        np.testing.assert_array_equal(other.read(key), store.read(key))


def test_a_codec_that_is_not_installed_is_named(tmp_path, monkeypatch):
    src, _ = umi(tmp_path / "umi.zarr.zip")
    monkeypatch.delitem(numcodecs.registry.codec_registry, "imagecodecs_jpegxl")
    assert "camera0_rgb" in open_source(src).schema  # imagecodecs is found and makes its codecs known
    monkeypatch.delitem(numcodecs.registry.codec_registry, "imagecodecs_jpegxl")
    monkeypatch.setitem(sys.modules, "imagecodecs.numcodecs", None)
    with pytest.raises(DataError, match=r"imagecodecs_jpegxl.*pip install imagecodecs"):
        open_source(src)


def test_a_store_of_ours_becomes_a_replay_buffer(tmp_path, dataset):
    convert(dataset, tmp_path / "b.zarr", format="diffusion_policy")
    ours, theirs = Store.open(dataset), Store.open(tmp_path / "b.zarr")
    assert theirs.format == 2 and theirs.schema == ours.schema and theirs.episode_ends.tolist() == ours.episode_ends.tolist()
    for key in ours.keys:
        np.testing.assert_array_equal(ours.read(key), theirs.read(key))
    assert detect(tmp_path / "b.zarr") == "diffusion_policy" and detect(dataset) != "diffusion_policy"


def test_chunks_that_are_not_there(tmp_path):
    src = buffer(tmp_path / "a.zarr", numbers())
    (src / "data/state/2.0").unlink()
    with pytest.raises(DataError, match=r"lacks the file data/state/2.0"):
        list(open_source(src).episodes())
    found = list(open_source(src, missing="zeros").episodes())
    assert not found[0]["state"][8].any() and found[0]["state"][7].all()
    with pytest.raises(ValueError, match="images is auto or keep"):
        open_source(src, images="float")

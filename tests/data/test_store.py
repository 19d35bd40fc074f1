"""Datasets come back bit for bit, from every container, and a bad one says what is wrong with it."""
import json
import shutil

import numpy as np
import pytest
import zarr
from data_cases import EPISODES, SCHEMA, assert_same, foreign, make_episode, zipped
from numcodecs import Blosc

from policy.data import DataError, Store, check_finite


def test_round_trip(dataset):
    store = Store.open(dataset)
    assert_same(store, EPISODES)
    assert (store.format, store.steps, store.fps, store.units) == (3, 50, 10.0, {"pose": "m"})
    assert store.action_semantics == "target position, absolute"
    assert store.schema == {k: (s, np.dtype(d)) for k, (s, d) in SCHEMA.items()}
    np.testing.assert_array_equal(store.episode_ends, [7, 8, 38, 50])
    np.testing.assert_array_equal(store.read("pose", 6, 9), np.concatenate([e["pose"] for e in EPISODES])[6:9])


def test_extend_equals_append_and_appending_goes_on_after_reopening(tmp_path, dataset):
    store = Store.create(tmp_path / "b.zarr", SCHEMA, fps=10)
    store.extend(EPISODES[:3])
    Store.open(store.path, mode="a").extend(iter(EPISODES[3:]))
    assert_same(Store.open(store.path), EPISODES)
    assert {k: v.tolist() for k, v in store.episode(2).items()} == {k: v.tolist() for k, v in Store.open(dataset).episode(2).items()}


def test_many_shards_and_many_files_of_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("policy.data.making.CHUNK_STEPS", 4)
    monkeypatch.setattr("policy.data.making.CHUNKS_PER_SHARD", 2)
    monkeypatch.setattr("policy.data.making.ENDS_CHUNK", 3)
    episodes = [make_episode(i, 1 + i % 13) for i in range(20)]
    store = Store.create(tmp_path / "b.zarr", SCHEMA, fps=10)
    store.extend(episodes[:8])
    for episode in episodes[8:]:
        store.append(episode)
    assert_same(Store.open(store.path), episodes)


@pytest.mark.parametrize("container", [lambda p: p, zipped], ids=["directory", "zip"])
@pytest.mark.parametrize("how", [
    dict(zarr_format=2, compressors=Blosc(cname="zstd", clevel=5, shuffle=2)), dict(zarr_format=2), dict(zarr_format=3)])
def test_reads_what_others_write(tmp_path, container, how):
    path = container(foreign(tmp_path / "theirs.zarr", **how))
    store = Store.open(path)
    assert_same(store, EPISODES)
    assert store.format == how["zarr_format"] and store.fps is None and store.disk_bytes("image") > 50 * 60 / 2


def test_zip_of_our_own(dataset):
    assert_same(Store.open(zipped(dataset)), EPISODES)


@pytest.mark.data
def test_pusht(pusht):
    store = Store.open(pusht)
    assert (store.episodes, store.steps, store.format) == (206, 25650, 2)
    lengths = np.diff(store.episode_ends, prepend=0)
    assert (lengths.min(), lengths.max()) == (49, 246)
    action, state = store.read("action"), store.read("state")
    assert action.shape == (25650, 2) and (action % 1 == 0).all() and action.min() >= 0 and action.max() <= 512
    assert state[:, 4].min() >= 0 and state[:, 4].max() < 2 * np.pi
    rng = np.random.RandomState(3)  # the source resets episode i from seed i
    np.testing.assert_array_equal(state[store.span(3)[0], :2], [rng.randint(50, 450), rng.randint(50, 450)])
    check_finite(store, ["action", "state", "keypoint"])


# ---------------------------------------------------------------- an interrupted recording
def test_frames_behind_the_last_end_are_invisible_and_overwritten(dataset):
    root = zarr.open_group(dataset)
    for key in SCHEMA:
        array = root[f"data/{key}"]
        array.resize((73, *array.shape[1:]))
        array[50:] = 99
    root["meta/episode_ends"].resize((5,))  # grown, and not yet written
    assert_same(Store.open(dataset), EPISODES)
    with pytest.raises(IndexError, match="has 50 frames"):
        Store.open(dataset).read("pose", 0, 51)
    (dataset / "data/pose/c/0/0.abc.partial").write_bytes(b"half a shard")
    Store.open(dataset, mode="a").append(make_episode(4, 5))
    assert_same(Store.open(dataset), [*EPISODES, make_episode(4, 5)])
    assert not list(dataset.rglob("*.partial"))


def test_a_second_writer_is_noticed(dataset):
    one, two = Store.open(dataset, mode="a"), Store.open(dataset, mode="a")
    one.append(make_episode(4, 5))
    with pytest.raises(DataError, match="another process writes to it"):
        two.append(make_episode(4, 6))
    assert_same(Store.open(dataset), [*EPISODES, make_episode(4, 5)])


# ---------------------------------------------------------------- every bad input has its message
def test_create_refuses(tmp_path, dataset):
    with pytest.raises(DataError, match=r"already holds data and is not overwritten. Append with Store.open"):
        Store.create(dataset, SCHEMA, fps=10)
    with pytest.raises(DataError, match="at least one key and fps > 0"):
        Store.create(tmp_path / "x", {}, fps=10)
    with pytest.raises(DataError, match="each key is a folder name"):
        Store.create(tmp_path / "x", {"a/b": ((2,), "float32")}, fps=10)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))


def test_append_refuses(dataset):
    store = Store.open(dataset, mode="a")
    good = make_episode(4, 5)
    cases = [({**good, "pose": good["pose"][:, :2]}, r"'pose' of episode 4 has shape \(5, 2\), expected \(n, 3\)"),
             ({**good, "pose": good["pose"][:4]}, "same number of frames"),
             ({k: v[:0] for k, v in good.items()}, "at least 1"),
             ({k: v for k, v in good.items() if k != "reward"}, "They must be the same"),
             ({**good, "image": good["image"].astype("float32")}, "'image' of episode 4 is float32, which does not fit uint8")]
    for bad, message in cases:
        with pytest.raises(DataError, match=message):
            store.append(bad)
    assert_same(Store.open(dataset), EPISODES)
    with pytest.raises(DataError, match="open for reading"):
        Store.open(dataset).append(good)


def test_open_refuses_what_is_no_dataset(tmp_path, dataset):
    with pytest.raises(DataError, match=r"does not exist\. Check path="):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a zarr group"):
        Store.open(tmp_path)  # the folder above, the usual slip
    (tmp_path / "a.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"neither a directory nor a readable \.zip"):
        Store.open(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="mode is 'r' or 'a'"):
        Store.open(dataset, mode="w")
    with pytest.raises(DataError, match="no complete episode"):
        Store.open(Store.create(tmp_path / "empty.zarr", SCHEMA, fps=5).path)
    with pytest.raises(DataError, match=r"zarr v2, which is read but not written"):
        Store.open(foreign(tmp_path / "v2.zarr", 2), mode="a")


def test_keys_and_episodes_that_are_not_there(dataset):
    store = Store.open(dataset)
    with pytest.raises(KeyError, match=r"'velocity' is not in .*known: action, image, pose, reward"):
        store.read("velocity")
    with pytest.raises(IndexError, match=r"episode 4: .* has 4 episodes"):
        store.episode(4)
    with pytest.raises(KeyError, match="known: action"):
        check_finite(store, ["velocity"])


@pytest.mark.parametrize("ends, message", [
    ([7, 7, 50], r"strictly increasing, but entry 1 is 7 after 7.*np.cumsum"),
    ([7, 30, 13], r"entry 2 is 13 after 30"),
    ([-1, 7, 50], r"entry 0 is -1"),
    ([7, 8, 51], r"has 50 frames, but meta/episode_ends counts 51"),
    ([], r"no complete episode"),
    ([7.0, 50.0], r"must be one row of integers, got float64"),
    ([[7, 50]], r"must be one row of integers"),
])
def test_episode_ends_that_cannot_be(tmp_path, ends, message):
    path = foreign(tmp_path / "theirs.zarr", 3)
    zarr.open_group(path).create_array("meta/episode_ends", data=np.array(ends, None if ends else "int64"), overwrite=True)
    with pytest.raises(DataError, match=message):
        Store.open(path)


def test_missing_parts(tmp_path):
    path = foreign(tmp_path / "theirs.zarr", 2)
    shutil.move(path / "data", tmp_path / "data")
    with pytest.raises(DataError, match="nothing under data/"):
        Store.open(path)
    shutil.move(tmp_path / "data", path / "data")
    shutil.rmtree(path / "meta/episode_ends")
    with pytest.raises(DataError, match="no array 'meta/episode_ends'"):
        Store.open(path)


@pytest.mark.parametrize("version, file", [(2, "data/pose/1.0"), (3, "data/pose/c/1/0")])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
@pytest.mark.parametrize("container", [lambda p: p, zipped], ids=["directory", "zip"])
def test_lost_and_damaged_chunks(tmp_path, version, file, damage, container):
    path = foreign(tmp_path / "theirs.zarr", version)
    chunk = path / file
    content = chunk.read_bytes()
    chunk.unlink() if damage == "missing" else chunk.write_bytes(content[:0 if damage == "empty" else len(content) // 2])
    store = Store.open(container(path))
    assert len(store.read("pose", 0, 8)) == 8 and len(store.read("action")) == 50  # what is whole stays readable
    verb = "cannot be decoded in" if damage == "truncated" else "lacks"
    with pytest.raises(DataError, match=rf"data/pose {verb} the file {file}.*frames 8 to 15 of episode 2.* again"):
        store.read("pose")


def test_a_flipped_bit_in_our_own_shard_is_noticed(dataset):
    shard = dataset / "data/image/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[200] ^= 4
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"data/image cannot be decoded.*episodes 0 to 3"):
        Store.open(dataset).read("image")


def test_a_flipped_bit_in_a_zip_is_noticed(tmp_path):
    path = zipped(foreign(tmp_path / "theirs.zarr", 2, compressors=None))
    content = path.read_bytes()
    at = content.index(EPISODES[0]["pose"].tobytes())
    path.write_bytes(content[:at + 3] + bytes([content[at + 3] ^ 4]) + content[at + 4:])
    with pytest.raises(DataError, match=r"data/pose cannot be decoded in the file data/pose/0.0.*its checksum is another"):
        Store.open(path).read("pose")


def test_chunks_of_zeros_that_a_writer_left_out(tmp_path, dataset):
    zeros = [{k: v * 0 for k, v in e.items()} for e in EPISODES]
    root = zarr.create_group(tmp_path / "theirs.zarr")
    root.create_array("data/action", shape=(50, 2), chunks=(8, 2), dtype="float32")[:] = 0
    root.create_array("meta/episode_ends", data=np.array([50]))
    with pytest.raises(DataError, match=r"missing=zeros after dipole data, data\.missing=zeros after dipole train"):
        Store.open(tmp_path / "theirs.zarr").read("action")
    assert not Store.open(tmp_path / "theirs.zarr", missing="zeros").read("action").any()
    ours = Store.create(tmp_path / "ours.zarr", SCHEMA, fps=1)
    ours.extend(zeros)
    assert_same(Store.open(ours.path), zeros)


def test_lost_episode_ends_are_not_an_interrupted_recording(dataset):
    (dataset / "meta/episode_ends/c/0").unlink()
    for mode in "ra":
        with pytest.raises(DataError, match=r"lacks the file meta/episode_ends/c/0"):
            Store.open(dataset, mode=mode)


def test_codec_that_is_not_installed(tmp_path):
    path = foreign(tmp_path / "theirs.zarr", 2)
    meta = json.loads((path / "data/image/.zarray").read_text())
    (path / "data/image/.zarray").write_text(json.dumps({**meta, "compressor": {"id": "imagecodecs_of_tomorrow"}}))
    with pytest.raises(DataError, match=r"data/image is compressed with a codec.*imagecodecs_of_tomorrow.*pip install imagecodecs"):
        Store.open(path)


def test_damaged_metadata(dataset):
    (dataset / "data/pose/zarr.json").write_text('{"shape": [')
    with pytest.raises(DataError, match="the metadata of data/pose is damaged"):
        Store.open(dataset)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_finite(dataset, value):
    store = Store.open(dataset, mode="a")
    bad = make_episode(4, 9)
    bad["pose"][6, 1] = value
    store.append(bad)
    check_finite(store, ["action", "image"])
    with pytest.raises(DataError, match="'pose' is not finite at step 6 of episode 4"):
        check_finite(store)

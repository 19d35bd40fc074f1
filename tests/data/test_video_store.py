"""Images kept as mp4: nearly as they were, in any piece, streamed like others, and safe against being killed."""
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from object_server import ObjectServer

from policy.data import DataError, Recorder, Store, TrajectoryDataset
from policy.data.convert import convert
from policy.data.draw import describe
from policy.data.edit import trim
from policy.data.stream import Streamed

pytest.importorskip("av", reason="extra data")
SCHEMA = {"image": ((32, 48, 3), "uint8"), "action": ((2,), "float32")}
LENGTHS = [25, 1, 60, 13]


def episode(i, n):
    """A disc that moves over a gradient, its place told by the action; frames differ from all others."""
    y, x = np.mgrid[:32, :48]
    at = np.stack([8 + 30 * np.linspace(0, 1, n + 1)[:n], np.full(n, 6 + 6 * (i % 4))], 1)
    disc = (x[None] - at[:, :1, None]) ** 2 + (y[None] - at[:, 1:, None]) ** 2 < 25
    image = np.stack([np.where(disc, 230, 2 * x + 20), np.where(disc, 40, 4 * y + 40), np.full(disc.shape, 60 + 10 * i)], -1)
    return {"image": image.astype("uint8"), "action": at.astype("float32")}


EPISODES = [episode(i, n) for i, n in enumerate(LENGTHS)]
WHOLE = np.concatenate([e["image"] for e in EPISODES])


@pytest.fixture
def store(tmp_path):
    store = Store.create(tmp_path / "d.zarr", SCHEMA, fps=10, video=["image"])
    store.append(EPISODES[0])
    store.extend(EPISODES[1:3])
    store.append(EPISODES[3])
    return store


def near(got, want):
    """Nearly the same, and each frame nearer to its own than to the one five later."""
    assert got.shape == want.shape and got.dtype == np.uint8
    own, other = (np.abs(got.astype(int) - x).mean((1, 2, 3)) for x in (want, np.roll(want, -5, axis=0)))
    assert own.mean() < 3 and (len(want) < 8 or (own < other).mean() > 0.95), (own, other)


def test_any_piece_comes_back_nearly_as_it_was(store):
    for s in (store, Store.open(store.path)):
        assert (s.episodes, s.steps, s.keys) == (4, 99, ["action", "image"]) and s.schema["image"] == ((32, 48, 3), np.uint8)
        near(s.read("image"), WHOLE)
        for lo, hi in ((0, 1), (24, 27), (26, 86), (77, 99), (98, 99), (40, 40)):
            np.testing.assert_array_equal(s.read("image", lo, hi), s.read("image")[lo:hi])  # the same bits from wherever decoding begins
        np.testing.assert_array_equal(s.read("action"), np.concatenate([e["action"] for e in EPISODES]))
    files = sorted(p.name for p in (store.path / "video/image").iterdir())
    assert files == [f"{n:012d}.mp4" for n in (0, 25, 26, 86)]
    assert store.attrs["video"]["image"] == {"shape": [32, 48, 3], "codec": "h264", "lossy": True, "gop": 10, "crf": 18}
    assert "kept as video, not bit for bit: image" in describe(store)
    assert 0 < store.disk_bytes("image") < WHOLE.nbytes / 10 and store.chunk("image") == 10


def test_better_and_worse(tmp_path):
    errors = []
    for crf in (0, 18, 45):
        s = Store.create(tmp_path / f"{crf}.zarr", SCHEMA, fps=10, video={"image": {"crf": crf, "gop": 5}})
        s.append(EPISODES[2])
        errors.append((np.abs(s.read("image").astype(int) - EPISODES[2]["image"]).mean(), -s.disk_bytes("image")))
    assert errors == sorted(errors)


def test_streamed_windows_are_those_in_memory(store):
    how = dict(split="all", t_obs=3, horizon=4)
    here = TrajectoryDataset(Store.open(store.path), {"image": "image"}, "action", **how)
    there = Streamed(Store.open(store.path), {"image": "image"}, "action", memory=800_000, **how)
    assert there.live < there.blocks
    epoch = there.epoch(0)
    for lo in range(0, 99, 16):
        a, b = here.batch(epoch.order[lo:lo + 16]), epoch.batch(lo, min(99, lo + 16))
        assert torch.equal(a.obs["image"], b.obs["image"])
    epoch.close()
    index = torch.tensor([3, 98, 26])
    assert torch.equal(here.batch(index).obs["image"], there.batch(index).obs["image"])


def test_from_s3_and_from_a_zip(store, tmp_path, monkeypatch):
    want = store.read("image")
    root = tmp_path / "root/bucket"
    root.mkdir(parents=True)
    shutil.copytree(store.path, root / "d.zarr")
    archive = shutil.make_archive(str(root / "e.zarr"), "zip", store.path)
    np.testing.assert_array_equal(Store.open(archive).read("image", 20, 90), want[20:90])
    pytest.importorskip("obstore", reason="extra data")
    with ObjectServer(tmp_path / "root") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        np.testing.assert_array_equal(Store.open("s3://bucket/d.zarr").read("image", 20, 90), want[20:90])
        np.testing.assert_array_equal(Store.open(f"{server.web}/bucket/e.zarr.zip").read("image", 20, 90), want[20:90])
        with pytest.raises(DataError, match=r"does not list video/image.*one \.zip, or from S3"):
            Store.open(f"{server.web}/bucket/d.zarr")


def test_a_recorder_writes_them_too(tmp_path):
    with Recorder(tmp_path / "r.zarr", fps=10, schema=SCHEMA) as plain:
        assert plain.episodes == 0
    Store.create(tmp_path / "r.zarr", SCHEMA, fps=10, video=["image"])
    with Recorder(tmp_path / "r.zarr", fps=10) as recorder:
        for e in EPISODES:
            for k in range(len(e["action"])):
                recorder.add({key: x[k] for key, x in e.items()})
            recorder.end()
    near(Store.open(tmp_path / "r.zarr").read("image"), WHOLE)


def test_what_is_made_from_one_keeps_the_frames_as_they_were_seen(store, tmp_path):
    trim(store.path, tmp_path / "short.zarr", keep=[0])
    short = Store.open(tmp_path / "short.zarr")
    assert "video" not in short.attrs
    np.testing.assert_array_equal(short.read("image"), store.read("image", 0, 25))


def test_convert_makes_videos_of_the_cameras_it_is_told(tmp_path):
    np.savez(tmp_path / "d.npz", front=WHOLE, actions=np.concatenate([e["action"] for e in EPISODES]), episode_ends=np.cumsum(LENGTHS))
    convert(tmp_path / "d.npz", tmp_path / "d.zarr", fps=10, video=["front"])
    made = Store.open(tmp_path / "d.zarr")
    assert list(made.attrs["video"]) == ["front"] and made.episodes == 4
    near(made.read("front"), WHOLE)
    with pytest.raises(DataError, match=r"'action'.*cannot be kept as video"):
        convert(tmp_path / "d.npz", tmp_path / "e.zarr", fps=10, video=["action"])


# ---------------------------------------------------------------- what goes wrong
class Death(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True])
def test_death_around_every_file_leaves_what_was_complete(tmp_path, monkeypatch, after):
    """Episodes in two pieces each; the recorder dies before or after each file gets its name, and another goes on."""
    real, path = os.replace, tmp_path / "d.zarr"
    Store.create(path, SCHEMA, fps=10, video=["image"])
    done, deaths, n = [], 0, 1
    while len(done) < 3:
        store, e, count = Store.open(path, mode="a"), EPISODES[[0, 2, 3][len(done)]], [0]

        def replace(a, b, count=count, n=n):
            if str(b).endswith(".mp4"):
                count[0] += 1
                if count[0] == n:
                    if after:
                        real(a, b)
                    raise Death
            real(a, b)
        monkeypatch.setattr(os, "replace", replace)
        try:
            for piece in (slice(0, 12), slice(12, None)):
                store.write({k: x[piece] for k, x in e.items()})
            store.commit()
            done, n = [*done, e["image"]], 1
        except Death:
            deaths, n = deaths + 1, n + 1
        monkeypatch.setattr(os, "replace", real)
        if done:
            near(Store.open(path).read("image"), np.concatenate(done))
    assert deaths >= 6 and len(list((path / "video/image").iterdir())) == 6
    assert not list(path.rglob("*.partial*"))


def test_pieces_of_an_episode_that_was_never_finished_are_gone(store):
    store.write({k: x[:12] for k, x in EPISODES[2].items()})
    store.write({k: x[12:30] for k, x in EPISODES[2].items()})
    again = Store.open(store.path, mode="a")  # who wrote them is dead
    again.append(EPISODES[0])
    again.append(EPISODES[3])
    near(Store.open(store.path).read("image", 99), np.concatenate([EPISODES[0]["image"], EPISODES[3]["image"]]))


def test_lost_and_damaged_files(store):
    folder = store.path / "video/image"
    whole = (folder / "000000000026.mp4").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"garbage" * 99):
        (folder / "000000000026.mp4").write_bytes(content)
        with pytest.raises(DataError, match=r"image cannot be decoded in the file video/image/000000000026.mp4.*frames 26 to 85 of episode 2"):
            Store.open(store.path).read("image")
        near(Store.open(store.path).read("image", 0, 25), WHOLE[:25])
    (folder / "000000000026.mp4").unlink()
    with pytest.raises(DataError, match=r"000000000025.mp4.*it holds 1 of these 61 frames.*one behind it is lost"):
        Store.open(store.path).read("image")
    (folder / "000000000000.mp4").unlink()
    with pytest.raises(DataError, match="lacks the file that holds frames 0 to 0 of episode 0"):
        Store.open(store.path).read("image")


@pytest.mark.parametrize("schema, video, message", [
    ({"image": ((8, 8, 3), "float32")}, ["image"], "cannot be kept as video"), ({"image": ((8, 8), "uint8")}, ["image"], "cannot be kept as video"),
    ({"image": ((8, 8, 3), "uint8")}, ["other"], "'other'.*cannot be kept as video"),
    ({"image": ((8, 8, 3), "uint8")}, {"image": {"crf": 70}}, "crf from 0 to 51"), ({"image": ((8, 8, 3), "uint8")}, {"image": {"quality": 7}}, "gop from 1")])
def test_what_cannot_be_a_video(tmp_path, schema, video, message):
    with pytest.raises(DataError, match=message):
        Store.create(tmp_path / "d.zarr", schema, fps=10, video=video)
    assert not (tmp_path / "d.zarr").exists()


def test_a_dataset_that_grows_while_it_is_read(store):
    reader = Store.open(store.path)
    other = Store.open(store.path, mode="a")
    other.append(EPISODES[1])
    near(reader.read("image"), WHOLE)
    assert Store.open(Path(store.path)).read("image").shape[0] == 100

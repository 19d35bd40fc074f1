"""LeRobot v2.1 and v3.0: real datasets come back equal; datasets laid out by hand with pyarrow and PyAV; the right frame for each row; damage."""
import json
import os
import shutil
from pathlib import Path

import lerobot_cases as cases
import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_cases import FPS, LENGTHS, columns, edit_info, make, number, write_video

from policy.data import DataError, Store
from policy.data.convert import lerobot_stats
from policy.data.convert.core import convert, detect, open_source

CAMERA = "observation.images.top"


def real(name: str) -> Path:
    path = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data") / name
    if not path.exists():
        pytest.skip(f"{name} is not there; set DIPOLE_DATA to the folder that holds it")
    return path


def files_of(root: Path) -> dict[str, object]:
    """{name: content}: tables with their types and what Hugging Face datasets is told, JSON parsed."""
    out: dict[str, object] = {}
    for file in sorted((root / "meta").rglob("*")) + sorted((root / "data").rglob("*")):
        name = file.relative_to(root).as_posix()
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            told = (table.schema.metadata or {}).get(b"huggingface") if name.startswith("data") else b""
            out[name] = ({f.name: str(f.type) for f in table.schema}, told, {c: table[c].to_pylist() for c in table.column_names})
        elif file.suffix == ".json":
            out[name] = json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            out[name] = [json.loads(line) for line in file.read_text().splitlines()]
    return out


def assert_equal_files(got: dict, want: dict) -> None:
    assert set(got) == set(want)
    for name in want:
        assert got[name] == want[name], name


@pytest.mark.data
@pytest.mark.parametrize("name", ["pusht_lerobot_v3", "g1_bottle_lerobot_v21"])
def test_a_real_dataset_comes_back(tmp_path, name):
    src = real(name)
    assert detect(src) == "lerobot"
    done = convert(src, tmp_path / "a.zarr")
    assert len(done.notes) == 1 and "is left out: its videos are not here" in done.notes[0]
    back = convert(tmp_path / "a.zarr", tmp_path / "back")
    assert "copy videos/ from there" in back.notes[0]
    assert_equal_files(files_of(tmp_path / "back"), files_of(src))


@pytest.mark.data
def test_pusht_of_lerobot_is_pusht_of_diffusion_policy(tmp_path, pusht):
    store, other = Store.open(convert(real("pusht_lerobot_v3"), tmp_path / "a.zarr").path), Store.open(pusht)
    np.testing.assert_array_equal(store.episode_ends, other.episode_ends)
    np.testing.assert_array_equal(store.read("action"), other.read("action"))
    np.testing.assert_array_equal(store.read("observation.state"), other.read("state")[:, :2])
    assert store.fps == 10 and "T-shaped" in store.attrs["task"] and store.attrs["names"]["action"] == ["motor_0", "motor_1"]


@pytest.mark.parametrize("version,video", [("v2.1", {"gop": 30}), ("v3.0", {"gop": 2, "bf": 0}), ("v3.0", {"gop": 250, "bf": 3}), ("v3.0", {"gop": 12})])
def test_each_row_has_its_frame(tmp_path, version, video):
    source = open_source(make(tmp_path / "a", version, **video))
    found = list(source.episodes())
    assert source.count == len(found) == 3 and source.fps == FPS and source.attrs["tasks"] == ["push", "pull"] and source.attrs["robot"] == "toy"
    for e, episode in enumerate(found):
        want = columns(e, 0)
        assert [number(x) for x in episode[CAMERA]] == [300 * e + i for i in range(LENGTHS[e])]
        assert np.abs(episode[CAMERA][3].astype(int) - cases.frame(300 * e + 3)).mean() < 8
        for key in ("observation.state", "action", "task_index", "timestamp"):
            np.testing.assert_array_equal(episode[key], want[key])
            assert episode[key].dtype == want[key].dtype
    assert set(source.schema) == {"observation.state", "action", "task_index", "timestamp", CAMERA}
    assert source.action == "action" and source.semantics.of is None and source.obs == ["observation.state"]  # three states, two actions


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("images", ["embed", "video", "skip"])
def test_there_and_back_and_into_the_other_version(tmp_path, version, images):
    first = convert(make(tmp_path / "a", version), tmp_path / "a.zarr")
    other = "v3.0" if version == "v2.1" else "v2.1"
    convert(first.path, tmp_path / "b", options={"version": other, "images": images})
    assert json.loads((tmp_path / "b/meta/info.json").read_text())["codebase_version"] == other
    again = convert(tmp_path / "b", tmp_path / "b.zarr")
    x, y = Store.open(first.path), Store.open(again.path)
    assert set(x.keys) - set(y.keys) == ({CAMERA} if images == "skip" else set())
    np.testing.assert_array_equal(x.episode_ends, y.episode_ends)
    for key in y.keys:
        if key == CAMERA and images == "video":
            assert [number(f) for f in y.read(key)] == [number(f) for f in x.read(key)]
            assert np.abs(y.read(key).astype(int) - x.read(key)).mean() < 4
        else:
            np.testing.assert_array_equal(x.read(key), y.read(key))
    assert x.attrs["tasks"] == y.attrs["tasks"] and x.attrs["names"] == y.attrs["names"]
    convert(first.path, tmp_path / "c", options={"images": "embed"})  # its own version: all but the camera is as it was
    was, now = files_of(tmp_path / "a"), files_of(tmp_path / "c")
    tables = [n for n in was if n.startswith("data")]
    assert tables == [n for n in now if n.startswith("data")]
    for name in tables:
        assert {k: v for k, v in now[name][2].items() if k != CAMERA} == was[name][2]


def test_files_of_v3_are_shared_up_to_a_size(tmp_path):
    edit_info(make(tmp_path / "a", "v3.0"), data_files_size_in_mb=0.003, video_files_size_in_mb=1e-6)
    convert(tmp_path / "a", tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "b", options={"images": "video"})
    assert len(list((tmp_path / "b/data").rglob("*.parquet"))) == len(list((tmp_path / "b/videos").rglob("*.mp4"))) == 3
    for got, want in zip(open_source(tmp_path / "b").episodes(), open_source(tmp_path / "a").episodes(), strict=True):
        assert [number(x) for x in got[CAMERA]] == [number(x) for x in want[CAMERA]]
        np.testing.assert_array_equal(got["action"], want["action"])


def test_a_recorded_store_becomes_a_dataset(tmp_path):
    rng = np.random.default_rng(0)
    schema = {"pose": ((3,), "float32"), "grid": ((2, 3), "float64"), "camera": ((6, 8, 3), "uint8"), "depth": ((6, 8, 1), "uint16"), "one": ((1,), "float32"),
              "reward": ((), "float64"), "action": ((2,), "float32")}
    store = Store.create(tmp_path / "s.zarr", schema, fps=20, units={"pose": "m"}, action_semantics="target",
                         attrs={"task": "Lift", "action": {"kind": "absolute", "space": "ee", "of": "pose", "of_take": [0, 1], "text": "target"}})
    episodes = [{k: (rng.normal(size=(n, *s)) * 100).astype(d) for k, (s, d) in schema.items()} for n in (5, 9)]
    store.extend(episodes)
    for version in ("v2.1", "v3.0"):
        convert(store.path, tmp_path / version, format="lerobot", options={"version": version})
        source = open_source(tmp_path / version)
        names = {"pose": "observation.pose", "grid": "observation.grid", "camera": "observation.images.camera", "depth": "observation.images.depth",
                 "one": "observation.one", "reward": "next.reward", "action": "action"}
        for got, want in zip(source.episodes(), episodes, strict=True):
            for key, name in names.items():
                np.testing.assert_array_equal(got[name], want[key].reshape(got[name].shape))
                assert got[name].dtype == want[key].dtype
        assert source.units == {"observation.pose": "m"} and source.attrs["task"] == "Lift"
        assert (source.semantics.kind, source.semantics.of, source.semantics.of_take) == ("absolute", "observation.pose", (0, 1))
    stats = json.loads((tmp_path / "v3.0/meta/stats.json").read_text())
    whole = np.concatenate([e["pose"] for e in episodes]).astype(np.float64)
    np.testing.assert_allclose(stats["observation.pose"]["mean"], whole.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["observation.pose"]["std"], whole.std(0), rtol=1e-5)
    assert stats["observation.pose"]["count"] == [14] and stats["observation.pose"]["max"] == whole.max(0).tolist() and "q99" in stats["action"]
    assert np.shape(stats["observation.images.camera"]["mean"]) == (3, 1, 1) and stats["observation.images.camera"]["max"][0][0][0] <= 1


def test_statistics_of_parts_make_those_of_the_whole():
    x = np.random.default_rng(0).normal(size=(300, 4)) * [1, 10, 0.1, 0] + 5
    whole = lerobot_stats.of_all([lerobot_stats.of_episode(part) for part in np.split(x, [17, 120])])
    for name, value in {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0), "count": [300]}.items():
        np.testing.assert_allclose(whole[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_videos_that_do_not_fit_are_told(tmp_path, version):
    a = make(tmp_path / "a", version)
    file = sorted((a / "videos").rglob("*.mp4"))[0]
    whole = file.read_bytes()
    some = [300 * e + i for e, n in enumerate(LENGTHS) for i in range(n)] if version == "v3.0" else list(range(LENGTHS[0]))

    def refused(match: str, **options) -> None:
        with pytest.raises(DataError, match=match):
            list(open_source(a, **options).episodes())
    write_video(file, some[:-1])
    refused(f"{len(some) - 1} frames for {len(some)} rows.*videos: skip")
    write_video(file, some, fps=20)
    refused(r"has no frame at 0.0333 s \(the nearest is at 0.0[05]00 s\).*tolerance")
    file.write_bytes(whole[:len(whole) // 2])
    refused("video stream|cannot be decoded|truncated")
    file.write_bytes(b"no video at all")
    refused("cannot be decoded|holds no video")
    assert CAMERA not in open_source(a, videos="skip").schema
    file.unlink()
    if version == "v2.1":
        refused("lacks 1 of 3 videos")
    else:
        assert "its videos are not here" in open_source(a).notes[0]
    shutil.rmtree(a / "videos")
    assert "its videos are not here" in open_source(a).notes[0]


def test_frames_shifted_by_half_a_step_are_no_match(tmp_path):
    a = make(tmp_path / "a", "v3.0")
    table = pq.read_table(a / "meta/episodes/chunk-000/file-000.parquet").to_pydict()
    table[f"videos/{CAMERA}/from_timestamp"] = [t + 0.5 / FPS for t in table[f"videos/{CAMERA}/from_timestamp"]]
    pq.write_table(cases.pa.table(table), a / "meta/episodes/chunk-000/file-000.parquet")
    with pytest.raises(DataError, match="has no frame at"):
        list(open_source(a).episodes())
    list(open_source(a, tolerance=0.02).episodes())


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_damage_is_told_with_the_file(tmp_path, version):
    whole = make(tmp_path / "whole", version)

    def damaged(match: str, change, **options) -> None:
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        a = Path(shutil.copytree(whole, tmp_path / "a"))
        change(a)
        with pytest.raises(DataError, match=match):
            list(open_source(a, "lerobot", videos="skip", **options).episodes())
    table = "data/chunk-000/episode_000001.parquet" if version == "v2.1" else "data/chunk-000/file-000.parquet"
    damaged("cannot be read.*truncated", lambda a: (a / table).write_bytes((a / table).read_bytes()[:900]))
    damaged("is not there", lambda a: (a / table).unlink())
    damaged("is not JSON", lambda a: (a / "meta/info.json").write_text("{"))
    damaged("lacks what LeRobot writes", lambda a: (a / "meta/info.json").write_text("{}"))
    damaged("v2.0 to v3.x are read", lambda a: edit_info(a, codebase_version="v1.6"))
    damaged("fps must be above 0", lambda a: edit_info(a, fps=0))
    damaged("is no path of LeRobot's", lambda a: edit_info(a, data_path="../{episode_index}{chunk_index}"))
    damaged("is no path of LeRobot's", lambda a: edit_info(a, data_path="{episode_index.__class__}"))

    def fewer_rows(a: Path) -> None:
        pq.write_table(pq.read_table(a / table).slice(0, 20), a / table)
    damaged("episode [01] has 20 rows that count 0 to 19, meta says it is (25|40) long", fewer_rows)

    def hole(a: Path) -> None:
        t = pq.read_table(a / table)
        pq.write_table(cases.pa.concat_tables([t.slice(0, 5), t.slice(4, 1), t.slice(6)]), a / table)  # as many rows, one of them twice
    damaged("rows that count", hole)


def test_a_column_of_text_is_left_out_and_empty_cells_are_refused(tmp_path):
    a = make(tmp_path / "a", "v2.1")
    features = json.loads((a / "meta/info.json").read_text())["features"]
    edit_info(a, features={**features, "said": {"dtype": "string", "shape": [1], "names": None}, "gone": {"dtype": "float32", "shape": [1], "names": None}})
    for file in (a / "data").rglob("*.parquet"):
        t = pq.read_table(file)
        pq.write_table(t.append_column("said", cases.pa.array(["hi"] * len(t))).append_column("odd", cases.pa.array([1.0] * len(t))), file)
    notes = " ".join(open_source(a).notes)
    assert "said is left out: string" in notes and "gone is left out: it is declared" in notes and "odd is left out: the tables have it" in notes
    file = a / "data/chunk-000/episode_000001.parquet"
    t = pq.read_table(file)
    at = t.column_names.index("task_index")
    pq.write_table(t.set_column(at, "task_index", cases.pa.array([None, *[0] * (len(t) - 1)], cases.pa.int64())), file)
    with pytest.raises(DataError, match="task_index of episode 1 has 1 empty cells"):
        list(open_source(a).episodes())


def test_options_are_checked(tmp_path):
    a = make(tmp_path / "a", "v2.1")
    with pytest.raises(ValueError, match="no option 'video'; it has videos, tolerance"):
        open_source(a, video="skip")
    with pytest.raises(ValueError, match="videos is decode or skip"):
        open_source(a, videos="some")
    convert(a, tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"version v2\.1 or v3\.0"):
        convert(tmp_path / "a.zarr", tmp_path / "b", options={"version": "v1"})
    assert not (tmp_path / "b").exists()

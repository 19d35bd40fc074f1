"""A dataset that is broken where its format is found out: what is wrong with it is said, not which formats there are."""
import h5py
import pytest
import zarr

from policy.data import DataError
from policy.data.convert import detect, open_source


def foreign(path):
    with h5py.File(path, "w") as f:
        f["frames"] = [1]


def group(path):
    zarr.create_group(path).create_array("data/x", shape=(3,), dtype="f4")


@pytest.mark.parametrize("name, content, message", [
    ("a.hdf5", b"", r"a\.hdf5 is empty \(0 bytes\)"), ("a.npz", b"", r"a\.npz is empty"), ("a.mcap", b"", r"a\.mcap is empty"),
    ("a.txt", b"", r"a\.txt is empty"),
    ("a.h5", b"hello", r"a\.h5 ends in \.h5 but is no HDF5 file"), ("a.hdf5", foreign, "is HDF5 with frames at its top.*robomimic has data/demo_0"),
    ("a.hdf5", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "pointer of Git LFS.*git lfs pull"),
    ("a.zip", b"hello", r"neither a directory nor a readable \.zip"), ("a/meta/info.json", b"{'features'", r"meta/info\.json is not JSON \("),
    ("a/meta/info.json", b"", r"meta/info\.json is empty"), ("a/meta/info.json", b"[1]", "has no features"), ("a/meta/info.json", b"\xff\xfe", "is not JSON"),
    ("a/data/metadata.json", b"{", r"data/metadata\.json is not JSON"), ("a/episode_0.hdf5", b"", r"episode_0\.hdf5 is empty"),
    ("a/episode_0.hdf5", b"hello", r"episode_0\.hdf5 ends in"), ("a/zarr.json", b"{", "metadata of the group is damaged"),
    ("a.zarr/x", b"1", "is not a zarr group"),
    ("a.zarr", group, "there is no array 'meta/episode_ends'"), ("a", None, "is an empty folder"), ("a/notes.txt", b"hello", "Looked for:\n  robomimic: ")])
def test_what_is_wrong_is_said(tmp_path, name, content, message):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        file.mkdir()
    elif callable(content):
        content(file)
    else:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        detect(tmp_path / name.partition("/")[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_broken_metadata_beside_the_data_of_minari(tmp_path, content):
    foreign(tmp_path / "main_data.hdf5")
    (tmp_path / "metadata.json").write_bytes(content)
    assert detect(tmp_path) == "minari"
    with pytest.raises(DataError, match=r"metadata\.json is not JSON as Minari writes it \("):
        open_source(tmp_path)

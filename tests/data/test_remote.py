"""Datasets behind URLs are those on disk, and a server that fails is told apart from data that is lost."""
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import zarr
from data_cases import EPISODES, assert_same, foreign, zipped
from object_server import ObjectServer

from policy.data import DataError, Store, TrajectoryDataset
from policy.data.stream import Streamed

pytest.importorskip("obstore", reason="extra data")
OBS = {"image": "image", "pose": "pose"}


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """A server for tmp_path/bucket, and the environment that finds it."""
    (tmp_path / "bucket").mkdir(exist_ok=True)
    monkeypatch.setattr("policy.data.remote.PAUSE", 0.01)
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with ObjectServer(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def moved(dataset, tmp_path) -> Path:
    """The dataset as tmp_path/bucket/sub/d.zarr."""
    (tmp_path / "bucket/sub").mkdir(parents=True, exist_ok=True)
    return shutil.move(dataset, tmp_path / "bucket/sub/d.zarr")


def test_a_folder_in_s3(s3, moved):
    store = Store.open("s3://bucket/sub/d.zarr")
    assert_same(store, EPISODES)
    assert (store.fps, store.units, str(store.path), store.path.stem) == (10.0, {"pose": "m"}, "s3://bucket/sub/d.zarr", "d")
    assert store.disk_bytes("image") == Store.open(moved).disk_bytes("image") and not store.local
    listed = [r for r in s3.requests if r == ("GET", "/bucket")]
    assert len(listed) == -(-sum(p.is_file() for p in moved.rglob("*")) // s3.page)  # once, page by page
    assert_same(Store.open(Path("s3://bucket/sub/d.zarr")), EPISODES)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("scheme", ["s3", "http"])
@pytest.mark.parametrize("container", [lambda p: p, zipped], ids=["directory", "zip"])
def test_what_others_wrote(s3, tmp_path, scheme, zarr_format, container):
    path = container(foreign(tmp_path / "bucket/theirs.zarr", zarr_format))
    url = f"s3://bucket/{path.name}" if scheme == "s3" else f"{s3.web}/bucket/{path.name}"
    assert_same(Store.open(url), EPISODES)


def test_a_web_server_that_does_not_list_needs_to_be_told_once(s3, moved):
    s3.lists = False
    url = f"{s3.web}/bucket/sub/d.zarr"
    with pytest.raises(DataError, match=r"does not say what lies under data/.*zarr.consolidate_metadata"):
        Store.open(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(moved)
    assert_same(Store.open(url), EPISODES)
    Store.open(moved, mode="a").append(EPISODES[0])  # shapes in the consolidated metadata are old now, names are not
    assert Store.open(url).episodes == 5


def test_fsspec_finds_the_rest(moved):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(moved), "/there/d.zarr", recursive=True)
    assert_same(Store.open("memory://there/d.zarr"), EPISODES)
    assert_same(Store.open(f"file://{moved}"), EPISODES)
    with pytest.raises(DataError, match="nothing lies under it"):
        Store.open("memory://elsewhere/d.zarr")
    with pytest.raises(DataError, match="nope://x is nothing that can be opened"):
        Store.open("nope://x")


@pytest.mark.parametrize("latency", [0, 0.02])
def test_streamed_from_s3(s3, moved, latency):
    s3.latency = latency
    here = TrajectoryDataset(Store.open(moved), OBS, "action", split="all", horizon=4)
    there = Streamed(Store.open("s3://bucket/sub/d.zarr"), OBS, "action", split="all", horizon=4, memory=10**6, stream=["image"])
    assert there.readers == 8
    epoch = there.epoch(0)
    for lo in range(0, len(epoch), 16):
        a, b = here.batch(epoch.order[lo:lo + 16]), epoch.batch(lo, min(lo + 16, len(epoch)))
        assert all(torch.equal(a.obs[k], b.obs[k]) for k in OBS) and torch.equal(a.action, b.action)
    epoch.close()


# ---------------------------------------------------------------- what goes wrong
def test_what_passes_is_tried_again(s3, moved):
    seen: dict[str, int] = {}

    def every_second(method, path):
        seen[path] = seen.get(path, 0) + 1
        return [503, "cut", None][seen[path] % 3]
    s3.fault = every_second
    assert_same(Store.open("s3://bucket/sub/d.zarr"), EPISODES)
    assert_same(Store.open(f"{s3.web}/bucket/sub/d.zarr"), EPISODES)


@pytest.mark.parametrize("fault, message", [
    (403, r"s3://bucket/sub/d.zarr.*refuses \(403\).*AWS_ACCESS_KEY_ID"), (401, r"refuses \(401\).*AWS_ACCESS_KEY_ID"),
    (500, r"cannot be read, 5 times.*AWS_ENDPOINT_URL="), ("cut", "cannot be read, 5 times"), ("hang", "cannot be read, 5 times.*DIPOLE_REMOTE_TIMEOUT")])
def test_what_stays_is_told(s3, moved, monkeypatch, fault, message):
    monkeypatch.setenv("DIPOLE_REMOTE_TIMEOUT", "0.2")
    store = Store.open("s3://bucket/sub/d.zarr")
    s3.fault = lambda method, path: fault
    for use in (lambda: Store.open("s3://bucket/sub/d.zarr"), lambda: store.read("pose"),
                lambda: TrajectoryDataset(store, OBS, "action")):
        with pytest.raises(DataError, match=message):
            use()


def test_lost_and_cut_files_are_told_as_on_disk(s3, moved):
    file = moved / "data/pose/c/0/0"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"s3://bucket/sub/d.zarr: data/pose cannot be decoded in the file data/pose/c/0/0.*episodes 0 to 3"):
        Store.open("s3://bucket/sub/d.zarr").read("pose")
    file.unlink()
    for url in ("s3://bucket/sub/d.zarr", f"{s3.web}/bucket/sub/d.zarr"):
        with pytest.raises(DataError, match="data/pose lacks the file data/pose/c/0/0, which holds frames"):
            Store.open(url).read("pose")


def test_nobody_there_and_nothing_there(s3, moved, monkeypatch):
    for url in ("s3://bucket/sub/other.zarr", "s3://nobody/d.zarr"):
        with pytest.raises(DataError, match="does not exist: nothing lies under it"):
            Store.open(url)
    with pytest.raises(DataError, match="not a zarr group"):
        Store.open("s3://bucket/sub")
    with pytest.raises(DataError, match=r"other.zarr is not a zarr group"):
        Store.open(f"{s3.web}/bucket/sub/other.zarr")
    with pytest.raises(DataError, match=r"other.zip does not exist \(404\)"):
        Store.open("s3://bucket/sub/other.zip")
    with pytest.raises(DataError, match=r"a URL, which is read but not written"):
        Store.open("s3://bucket/sub/d.zarr", mode="a")
    for bad in ("127.0.0.1:9000", "http://127.0.0.1:port", "http://"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", bad)
        with pytest.raises(DataError, match=f"AWS_ENDPOINT_URL={bad} is no address"):
            Store.open("s3://bucket/sub/d.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"cannot be read, 5 times.*Check the URL and the network \(AWS_ENDPOINT_URL=http://127.0.0.1:9\)"):
        Store.open("s3://bucket/sub/d.zarr")
    with pytest.raises(DataError, match="cannot be read, 5 times"):
        Store.open("http://127.0.0.1:9/d.zarr")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name, container, asked", [("d.zarr", lambda p: p, "zarr.json"), ("d.zarr.zip", zipped, "")], ids=["directory", "zip"])
def test_a_web_server_that_sends_files_whole_is_told_at_once(moved, name, container, asked):
    container(moved)
    seen = []

    class Python(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            seen.append((self.command, self.path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Python, directory=str(moved.parent)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    try:
        with pytest.raises(DataError, match=f"{url}.*: the server sends no parts of files .*nginx, caddy, npx http-server, S3.*or copy the dataset here"):
            Store.open(url)
    finally:
        server.shutdown()
        server.server_close()
    assert [path for method, path in seen if method == "GET"] == [f"/{name}/{asked}".rstrip("/")]  # once


def test_no_credentials(s3, moved, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(DataError, match=r"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.*AWS_SKIP_SIGNATURE=true"):
        Store.open("s3://bucket/sub/d.zarr")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert_same(Store.open("s3://bucket/sub/d.zarr"), EPISODES)


MOTO = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False); server.start()
import boto3, pathlib
host, port = server.get_host_and_port()
client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1")
client.create_bucket(Bucket="bucket")
root = pathlib.Path(sys.argv[1])
for file in root.rglob("*"):
    if file.is_file(): client.upload_file(str(file), "bucket", file.relative_to(root).as_posix())
print(port, flush=True); sys.stdin.read()
"""


def moto_python() -> Path:
    """The python of a venv with moto, whose S3 server is somebody else's, made on first use (320 MB in ~/.cache/dipole-tests, or DIPOLE_TEST_CACHE)."""
    folder = Path(os.environ.get("DIPOLE_TEST_CACHE") or Path.home() / ".cache/dipole-tests") / "moto-5"
    python, done = folder / "bin/python", folder / "complete"
    if not done.exists():
        made = subprocess.run(f"{sys.executable} -m venv --clear {folder} && {python} -m pip install -q 'moto[s3,server]>=5.1,<6'",
                              shell=True, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"pip has no moto here: {made.stderr.strip().splitlines()[-1]}")
        done.touch()
    return python


@pytest.mark.slow
def test_an_s3_server_of_somebody_else(moved, tmp_path, monkeypatch):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "AWS_"))}
    with subprocess.Popen([str(moto_python()), "-c", MOTO, str(tmp_path / "bucket")], env=clean, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None and server.stdin is not None
        port = server.stdout.readline().strip()
        for name, value in {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        assert_same(store := Store.open("s3://bucket/sub/d.zarr"), EPISODES)
        here = TrajectoryDataset(Store.open(moved), OBS, "action", split="all")
        epoch = Streamed(store, OBS, "action", split="all", memory=10**6, stream=["image"]).epoch(0)
        a, b = here.batch(epoch.order), epoch.batch(0, len(epoch))
        assert all(torch.equal(a.obs[k], b.obs[k]) for k in OBS)
        epoch.close()
        with pytest.raises(DataError, match="does not exist"):
            Store.open("s3://nobody/d.zarr")
        server.stdin.close()

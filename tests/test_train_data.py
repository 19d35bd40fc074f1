"""dipole train on data that is streamed, mixed, or behind a URL."""
import json
import os
import shutil

import numpy as np
import pytest
import yaml

from policy.data import Store
from policy.train import checkpoint
from tests.data.object_server import ObjectServer
from tests.shell import Shell, facts, refused

SMALL = ["recipe=own", "net=mlp", "net.width=16", "train.batch=8", "train.warmup=1", "train.precision=fp32", "log.wandb=disabled", "data.val_ratio=0.2",
         "horizon=4"]


def make(path, episodes, scale=1.0):
    """Images of 48 x 48 that tell the state; 20 steps an episode."""
    rng = np.random.default_rng(episodes)
    store = Store.create(path, {"image": ((48, 48, 3), "uint8"), "x": ((3,), "float32"), "action": ((2,), "float32")}, fps=10)
    for _ in range(episodes):
        x = np.sin(np.arange(20)[:, None] * 0.2 + rng.uniform(0, 6, 3)) * scale
        store.append({"image": (128 + 100 * x / scale)[:, None, None, :].repeat(48, 1).repeat(48, 2).astype("uint8"), "x": x.astype("float32"),
                      "action": x[:, :2].astype("float32")})


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    make(folder / "a.zarr", 9)
    make(folder / "b.zarr", 5, scale=100.0)
    (folder / "root/bucket").mkdir(parents=True)
    shutil.copytree(folder / "a.zarr", folder / "root/bucket/a.zarr")
    with ObjectServer(folder / "root") as server:
        clean = {k: "" for k in os.environ if k.startswith("AWS_")}
        shell = Shell(folder, **{**clean, **server.environment})
        shell.web = server.web
        yield shell
        shell.close()


def data_of(shell, run):
    return yaml.safe_load((shell.folder / run / "config.yaml").read_text())["data"]


def weights(shell, run):
    return checkpoint.read(shell.folder / run / "checkpoints/last.safetensors")[0]


def test_streamed_and_resumed(shell):
    """Images in a memory of a few blocks: two runs are equal bit for bit, and one that goes on with `auto` finds the memory, and so the order, of before."""
    image = ["encoder=image", "encoder.widths=[8]", "encoder.keypoints=8", "encoder.features=8", "data.memory=3e6"]
    one = shell("train", *SMALL, *image, "data.path=a.zarr", "train.steps=4", "run=whole")
    assert one.code == 0, one.err
    assert "data: streamed: image of a, " in one.out and " frames at a time" in one.out
    assert data_of(shell, "whole")["memory"] == 3_000_000 and facts(shell, "whole")["order"]["live"] > 1
    half = shell("train", *SMALL, *image, "data.path=a.zarr", "train.steps=4", "run=half")
    assert half.code == 0, half.err
    assert all((a == b).all() for a, b in zip(weights(shell, "half").values(), weights(shell, "whole").values(), strict=True))
    again = shell("train", "run=half", "resume=true", "data.path=a.zarr", "data.memory=auto", "train.steps=5")  # another step, the same order
    assert again.code == 0 and "order of the data" not in again.out, again.err + again.out
    assert data_of(shell, "half")["memory"] == 3_000_000
    small = shell("train", *SMALL, "data.path=a.zarr", "data.memory=1e5", "run=no")
    refused(small, "data.memory=1e+05 bytes are too few to stream image", "Give it")
    assert not (shell.folder / "no").exists()


def test_auto_is_written_down(shell):
    done = shell("train", *SMALL, "data.path=a.zarr", "train.steps=2", "run=auto")
    assert done.code == 0 and data_of(shell, "auto")["memory"] is None and "streamed" not in done.out


def test_mixtures(shell):
    done = shell("train", *SMALL, "data.path=[a.zarr,b.zarr]", "data.weights=[1,3]", "data.obs=[x]", "train.steps=3", "run=mix")
    assert done.code == 0, done.err
    assert "data: a 25%, b 75%" in done.out and facts(shell, "mix")["order"]["weights"] == [0.25, 0.75]
    nodes = shell("train", *SMALL, "data.path=[{path: a.zarr, weight: 1}, {path: b.zarr, weight: 1, name: big, obs: {x: x}}]", "data.obs=[x]",
                  "data.normalize_per=dataset", "train.steps=3", "run=per")
    assert nodes.code == 0 and "data: a 50%, big 50%" in nodes.out, nodes.err
    scale = {name: checkpoint.load(shell.folder / "per", f"policy@{name}")[0].normalizer.scale_x.mean() for name in ("a", "big")}
    assert 80 < scale["big"] / scale["a"] < 120
    resumed = shell("train", "run=per", "resume=true", "train.steps=5")
    assert resumed.code == 0 and "order of the data" not in resumed.out, resumed.err
    refused(shell("export", "run=per", "format=torch"), "statistics of several datasets", "checkpoint=policy@a or checkpoint=policy@big")
    refused(shell("train", *SMALL, "data.path=[a.zarr,b.zarr]", "data.weights=[1]"), "one number for each of the 2 datasets")
    refused(shell("train", *SMALL, "data.path=[a.zarr,c.zarr]"), "there is no dataset c.zarr")
    refused(shell("train", *SMALL, "data.path=[a.zarr,b.zarr]", "data.normalize_per=robot"), "must be all (one normaliser) or dataset")


def test_behind_urls(shell):
    for run, url in (("s3", "s3://bucket/a.zarr"), ("web", f"{shell.web}/bucket/a.zarr")):
        done = shell("train", *SMALL, f"data.path='{url}'", "train.steps=3", f"run={run}")
        assert done.code == 0, done.err
    here = shell("train", *SMALL, "data.path=a.zarr", "train.steps=3", "run=here")
    assert here.code == 0
    assert all((a == b).all() for a, b in zip(weights(shell, "s3").values(), weights(shell, "here").values(), strict=True))
    info = shell("data", "info", "path=s3://bucket/a.zarr")
    assert info.code == 0 and "9 episodes, 180 steps" in info.out and (shell.folder / "a.zarr.png").exists(), info.err
    refused(shell("train", *SMALL, "data.path=s3://bucket/nowhere.zarr"), "s3://bucket/nowhere.zarr does not exist: nothing lies under it")
    assert json.loads((shell.folder / "s3/checkpoints/policy.json").read_text())["spec"]["task"] == "a"

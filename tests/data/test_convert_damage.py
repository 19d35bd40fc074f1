"""Whatever happens to a file of another format, reading it ends in values or in one DataError: bytes cut, flipped, inserted; words of meta/ exchanged."""
import json
import shutil
import sys
from pathlib import Path

import bag_cases
import lerobot_cases
import numpy as np
import pytest
from mcap.writer import CompressionType

from policy.data import DataError
from policy.data.convert.core import open_source

WORDS = (None, 0, -1, 1e300, "x", [], {}, [1, 2], ["a"], {"a": 1}, True, float("nan"), "../x", "{x}")


def made(kind: str, folder: Path) -> Path:
    if kind.startswith("v"):
        return lerobot_cases.make(folder / "a", kind)
    if kind == "sqlite3":
        return bag_cases.write_bag(folder / "a", bag_cases.arm(0.4), "sqlite3")
    return bag_cases.lone(folder / "a.mcap", bag_cases.arm(0.4), CompressionType[kind.upper()])


def read_or_refuse(path: Path, what: str) -> bool:
    """True when it could be read; fails with `what` was done to it when neither."""
    try:
        for _ in open_source(path, "lerobot" if (path / "meta").exists() else "rosbag", fps=20).episodes():
            pass
        return True
    except DataError as e:
        assert str(path.parent) in str(e), f"{what}: {e}"
        return False
    except Exception as e:
        raise AssertionError(what) from e


@pytest.mark.parametrize("kind", ["v2.1", "v3.0", "none", "zstd", "lz4", "sqlite3"])
def test_damaged_bytes(tmp_path, kind):
    whole, rng = made(kind, tmp_path / "whole" if kind.startswith("v") else tmp_path), np.random.default_rng(0)
    refused = 0
    for k in range(15):
        path = tmp_path / "it" / whole.name
        shutil.rmtree(path.parent, ignore_errors=True)
        if whole.is_dir():
            shutil.copytree(whole, path)
        else:
            path.parent.mkdir()
            shutil.copy(whole, path)
        files = sorted(f for f in path.rglob("*") if f.is_file()) or [path]
        file = files[rng.integers(len(files))]
        raw, at = bytearray(file.read_bytes()), rng.integers(file.stat().st_size)
        if k % 3 == 0:
            raw = raw[:at]
        elif k % 3 == 1:
            raw[at] ^= 1 << rng.integers(8)
        else:
            raw[at:at + rng.integers(1, 30)] = rng.bytes(rng.integers(1, 30))
        file.write_bytes(raw)
        refused += not read_or_refuse(path, f"damage {k} of {file.name} at {at}")
    assert refused >= 5


@pytest.mark.parametrize("module,kind", [("pyarrow", "v3.0"), ("av", "v3.0"), ("mcap.stream_reader", "none"), ("rosbags.typesys", "none"),
                                         ("zstandard", "zstd"), ("lz4.frame", "lz4"), ("PIL.Image", "images")])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, module, kind):
    path = bag_cases.lone(tmp_path / "a.mcap", [("/c", i / 5, bag_cases.compressed(i / 5, bag_cases.pixels(0))) for i in range(3)]) if kind == "images" \
        else made(kind, tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dipole\[data\]'") as e:
        list(open_source(path, "lerobot" if kind.startswith("v") else "rosbag", fps=20).episodes())
    assert e.value.name in (module, module.partition(".")[0], "pillow")


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_exchanged_words_of_lerobot_s_meta(tmp_path, version):
    path, rng = lerobot_cases.make(tmp_path / "a", version), np.random.default_rng(1)
    files, refused = sorted((path / "meta").glob("*.json*")), 0
    for _ in range(40):
        file = files[rng.integers(len(files))]
        raw = file.read_text()
        content = json.loads(raw) if file.suffix == ".json" else [json.loads(line) for line in raw.splitlines()]
        places = list(_places(content))
        holder, key = places[rng.integers(len(places))]
        word = WORDS[rng.integers(len(WORDS))]
        holder[key] = word
        file.write_text(json.dumps(content) if file.suffix == ".json" else "".join(json.dumps(x) + "\n" for x in content))
        refused += not read_or_refuse(path, f"{key} of {file.name} = {word!r}")
        file.write_text(raw)
    assert refused >= 10


def _places(x):
    for key, value in x.items() if isinstance(x, dict) else enumerate(x):
        yield x, key
        if isinstance(value, dict | list):
            yield from _places(value)

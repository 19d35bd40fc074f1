"""Hugging Face's own lerobot 0.4.4 opens what is written here, and records what is read here: a venv of its own, 560 MB in ~/.cache/dipole-tests.

Made on first use (DIPOLE_TEST_CACHE: elsewhere); where pip cannot make it, skipped with pip's words. torch is that of the tests.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_cases import LENGTHS, columns, make

from policy.data.convert.core import convert, open_source

CAMERA = "observation.images.top"
PACKAGES = ["datasets>=4.0,<5", "jsonlines>=4,<5", "deepdiff>=7,<9", "av>=15,<16", "draccus==0.10.0", "huggingface-hub>=0.34.2,<0.36", "packaging<26", "einops",
            "pillow", "imageio", "termcolor"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> str:
    cache = Path(os.environ.get("DIPOLE_TEST_CACHE") or Path.home() / ".cache/dipole-tests")
    folder = cache / f"lerobot-0.4.4-py{sys.version_info.major}{sys.version_info.minor}"
    python, done = folder / "bin/python", folder / "done"
    if not done.exists():
        packages = Path(torch.__file__).parents[1]
        for command in ([sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", "-q", "--no-deps", "lerobot==0.4.4"],
                        [python, "-m", "pip", "install", "-q", *PACKAGES]):
            ran = subprocess.run(command, capture_output=True, text=True, timeout=1200)
            if ran.returncode:
                pytest.skip(f"lerobot cannot be installed: {ran.stderr.strip()[-300:]}")
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "zz_tests.pth").write_text(f"{packages}\n")  # comes last: torch is found there, all else here
        done.touch()
    return str(python)


def far_side(python: str, *words: object) -> dict:
    out = Path(str(words[1])).with_suffix(".json")
    command = [python, Path(__file__).with_name("lerobot_far_side.py"), *words, out]
    ran = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""})
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("version,images", [("v2.1", "video"), ("v2.1", "embed"), ("v3.0", "video")])
def test_lerobot_opens_what_is_written(tmp_path, python, version, images):
    convert(make(tmp_path / "a", version), tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "b", options={"version": "v3.0", "images": images})
    said = far_side(python, "open", tmp_path / "b", CAMERA)
    want = [columns(e, 0) for e in range(3)]
    assert (said["episodes"], said["frames"], said["fps"], said["robot"]) == (3, sum(LENGTHS), 30, "toy")
    assert said["tasks"] == [t for e, n in enumerate(LENGTHS) for t in [["push", "pull"][e % 2]] * n]
    assert said["numbers"] == [300 * e + i for e, n in enumerate(LENGTHS) for i in range(n)]
    np.testing.assert_array_equal(np.array(said["action"], np.float32), np.concatenate([w["action"] for w in want]))
    np.testing.assert_array_equal(np.array(said["state"], np.float32), np.concatenate([w["observation.state"] for w in want]))
    np.testing.assert_allclose(said["stats"]["mean"], np.concatenate([w["action"] for w in want]).mean(0), atol=1e-6)


def test_what_lerobot_records_is_read_and_comes_back(tmp_path, python):
    said = far_side(python, "record", tmp_path / "a")["frames"]
    source = open_source(tmp_path / "a")
    found = list(source.episodes())
    assert [len(e["action"]) for e in found] == [12, 7] and source.attrs["tasks"] == ["push", "pull"] and not source.notes
    for key in ("observation.state", "action", CAMERA, "next.done"):
        got = np.concatenate([e[key] for e in found])
        np.testing.assert_array_equal(got, np.array([f[key] for f in said], got.dtype).reshape(got.shape))
    convert(tmp_path / "a", tmp_path / "a.zarr")
    convert(tmp_path / "a.zarr", tmp_path / "b")
    a, b = (json.loads((tmp_path / d / "meta/info.json").read_text()) for d in "ab")
    assert a == b
    a, b = (json.loads((tmp_path / d / "meta/stats.json").read_text()) for d in "ab")
    assert set(a) == set(b)
    for key in set(a) - {CAMERA}:  # lerobot squares uint8 pixels in uint8, so that its std of images is 0
        assert set(a[key]) == set(b[key])
        for name in ("min", "max", "mean", "std", "count"):  # its quantiles are those of a histogram
            np.testing.assert_allclose(np.array(a[key][name], float), np.array(b[key][name], float), rtol=1e-5, atol=1e-6)

"""What is wrong with a dataset that looks like one of a format and is none: empty, cut off, or a pointer of Git LFS where the file should be."""
import json
from pathlib import Path

from policy.data.convert import h5
from policy.data.files import DataError
from policy.data.store import Store

SAID = ("meta/info.json", "data/metadata.json", "metadata.json")  # of LeRobot and Minari
HDF5 = (".hdf5", ".h5", ".hdf")
POINTER = b"version https://git-lfs"
AGAIN = "Copy it again from its source"


def why(path: Path) -> str:
    """One sentence or two, '' where nothing is known."""
    return _folder(path) if path.is_dir() else _file(path)


def _file(path: Path) -> str:
    if not path.stat().st_size:
        return f"{path} is empty (0 bytes). {AGAIN}"
    with open(path, "rb") as f:
        if f.read(len(POINTER)) == POINTER:
            return f"{path} is a pointer of Git LFS, not the file itself: git lfs pull"
    if path.suffix in HDF5:
        if not h5.is_hdf5(path):
            return f"{path} ends in {path.suffix} but is no HDF5 file: its first bytes are others. {AGAIN}"
        with h5.opened(path) as f:
            return (f"{path} is HDF5 with {', '.join(sorted(f)[:9]) or 'nothing'} at its top, which is no format known here: robomimic has data/demo_0, "
                    "D4RL actions and observations, ACT one file an episode in a folder (src is that folder)")
    return _store(path) if path.suffix == ".zip" else ""


def _folder(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    if not names:
        return f"{path} is an empty folder"
    for said in (path / s for s in SAID if (path / s).is_file()):
        try:
            found = json.loads(said.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as e:
            return f"{said} is {f'not JSON ({e})' if said.stat().st_size else 'empty (0 bytes)'}. {AGAIN}"
        if said.name == "info.json" and not (isinstance(found, dict) and "features" in found):
            return f"{said} has no features, by which LeRobot says what is in a dataset. {AGAIN}"
    if any(n in names for n in ("zarr.json", ".zgroup")) or path.suffix == ".zarr":
        return _store(path)
    for file in (path / n for n in names if (path / n).is_file() and (path / n).suffix in HDF5):
        return "" if h5.is_hdf5(file) else _file(file)
    return ""


def _store(path: Path) -> str:
    try:
        Store.open(path)
    except DataError as e:
        return str(e)
    return ""

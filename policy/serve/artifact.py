"""Load an exported policy: `load(folder)` is a policy.serve.card.Backend. Of ONNX and OpenVINO exports it needs numpy and their runtime, no torch.

A folder holds card.json (facts.files names every other file with its sha256, and it has its own), solver.json (what happens on the host: the sampler's
tables, the scaling of actions) and the graphs: encoder (observation -> condition), step (one denoising step), guided (one that is pulled towards what is
promised through its Jacobian) and, of a U-Net, time (noise time -> what it says to the blocks). Nothing is unpickled.
"""
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policy.serve.card import Backend, Card
from policy.serve.exported import Exported, Graph, Host, guidance
from policy.serve.runtimes import RUNTIMES, SUFFIXES, OnnxGraph, OpenVinoGraph, check_runtime

VERSION = 2  # of the folder's layout: 2 has graphs of guided steps, warm starts, and a card with its own sum
AGAIN = "Export again: dipole export run=… overwrite=true"


def load(folder: str | Path, *, threads: int = 1, trust: Sequence[str] = (), precision: str | None = None) -> Backend:
    """The policy of `dipole export`.   threads: that a plan may use.   trust: packages that a torch export may take code from, as everywhere.   precision:
    another one than it was exported for.

    FileNotFoundError, ValueError when files are missing, changed or of another version; ImportError with the pip line when the runtime is.
    """
    folder = Path(folder)
    card = read_card(folder)
    kind, precision = str(card.facts["format"]), precision or str(card.facts["precision"])
    check_runtime(kind, card.facts.get("versions", {}))
    if kind == "torch":
        return _torch(folder, card, threads, trust, precision)
    graphs: dict[str, Graph] = {}
    for name in card.facts["files"]:
        if (path := folder / name).suffix == SUFFIXES[kind]:
            try:
                graphs[path.stem] = OnnxGraph(path, threads) if kind == "onnx" else OpenVinoGraph(path, threads, precision, fuse=path.stem != "guided")
            except Exception as e:  # of the runtime's own kinds
                by = f"{RUNTIMES[kind]} {importlib.metadata.version(RUNTIMES[kind])}"
                raise ValueError(f"{path} cannot be read by {by}: {' '.join(str(e).split())[:300]}. {AGAIN}") from e
    try:
        return Exported(card, Host.from_json(json.loads((folder / "solver.json").read_text(encoding="utf-8"))), graphs)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{folder} does not hold a whole policy ({e!r}). {AGAIN}") from e


def write_card(folder: Path, card: Card) -> None:
    """card.json, with its own sum."""
    body = card.to_json()
    part = folder / "card.part"
    part.write_text(json.dumps({**body, "sha256": _sum(body)}, indent=1), encoding="utf-8")
    part.replace(folder / "card.json")


def read_card(folder: Path) -> Card:
    """card.json of an export, every file beside it verified."""
    path = folder / "card.json"
    if not path.is_file():
        run = (folder / "config.yaml").is_file()
        raise FileNotFoundError(f"{folder} is a training run, not an export: name it as run={folder}, or export it: dipole export run={folder}" if run else
                                f"{folder} is not an export: it has no card.json. Make one: dipole export run=… out={folder}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        said = body.pop("sha256", None) if isinstance(body, dict) else None
        card = Card.from_json(body)
    except ValueError as e:
        raise ValueError(f"{path} is not the card of an export: {e}. Copy the folder again, or export again: dipole export run=… overwrite=true") from e
    if said != _sum(body):
        raise ValueError(f"{path} is not the file that was exported: its own sum differs. Copy the folder again, or export again: "
                         "dipole export run=… overwrite=true")
    version, kind, files = card.facts.get("artifact"), card.facts.get("format"), card.facts.get("files")
    if version != VERSION or kind not in RUNTIMES or not isinstance(files, dict):
        raise ValueError(f"{path} is of a folder of layout {version} and format {kind}, this dipole reads layout {VERSION} of {', '.join(RUNTIMES)}. "
                         f"{AGAIN}, or pip install --upgrade dipole")
    for name, digest in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path} names the file {name!r}, which is outside {folder}. {AGAIN}")
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its card.json names. Copy the whole folder again, or export again: dipole export run=…")
        if sha256(file) != digest:
            raise ValueError(f"{file} is not the file that was exported: its sha256 differs from the one in card.json. Copy the folder again, or export again")
    return card


def _sum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _torch(folder: Path, card: Card, threads: int, trust: Sequence[str], precision: str) -> Backend:
    import torch

    from policy.nets.fast import quick
    from policy.serve.backend import PlannerBackend
    from policy.serve.fastplan import FastPlan
    from policy.train import checkpoint
    torch.set_num_threads(threads)
    planner, _ = checkpoint.load(folder, trust=trust)
    if precision == "bf16":
        planner.denoiser.net = quick(planner.denoiser.net)
    ordinary = PlannerBackend(planner, warm=card.facts.get("warm"), **guidance(card))
    ordinary.card = card
    return FastPlan(ordinary)

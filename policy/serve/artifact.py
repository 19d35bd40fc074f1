"""Load an exported policy: `load(folder)` is a policy.serve.card.Backend. Of ONNX and OpenVINO exports it needs numpy and their runtime, no torch.

A folder holds card.json (facts.files names every other file with its sha256), solver.json (the sampler's table, the scaling of actions) and the graphs:
encoder (observation -> condition), step (one denoising step) and, of a U-Net, time (noise time -> what it says to the blocks). Nothing is unpickled.
"""
import hashlib
import importlib
import importlib.metadata
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policy.serve.card import Backend, Card
from policy.serve.solver import Promised, Solver, check_prefix, kept, noises, promised

VERSION = 1  # of the folder's layout
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}
AGAIN = "Export again: dipole export run=…"


def load(folder: str | Path, *, threads: int = 1, trust: Sequence[str] = ()) -> Backend:
    """The policy of `dipole export`.   threads: that a plan may use.   trust: packages that a torch export may take code from, as everywhere.

    FileNotFoundError, ValueError when files are missing, changed or of a later version; ImportError with the pip line when the runtime is.
    """
    folder = Path(folder)
    card = read_card(folder)
    kind = str(card.facts["format"])
    _check_runtime(kind, card.facts.get("versions", {}))
    if kind == "torch":
        return _torch(folder, card, threads, trust)
    open_graph: Any = OnnxGraph if kind == "onnx" else OpenVinoGraph
    options = {} if kind == "onnx" else {"precision": {"fp32": "f32", "bf16": "bf16"}[card.facts["precision"]]}
    suffix = ".onnx" if kind == "onnx" else ".xml"
    graphs = {p: open_graph(folder / f"{p}{suffix}", threads, **options) for p in ("encoder", "step", "time") if f"{p}{suffix}" in card.facts["files"]}
    if missing := {"encoder", "step"} - set(graphs):
        raise ValueError(f"{folder} names no graph for {' and '.join(sorted(missing))}. {AGAIN}")
    try:
        host = json.loads((folder / "solver.json").read_text(encoding="utf-8"))
        solver, scaling = Solver.from_json(host["solver"]), {k: np.array(host["action"][k], np.float32) for k in ("shift", "scale")}
    except (KeyError, TypeError, ValueError, OSError) as e:
        raise ValueError(f"{folder}/solver.json does not hold a solver ({e!r}). {AGAIN}") from e
    return Exported(card, solver, scaling["shift"], scaling["scale"], int(host.get("rtc", 0)), **graphs)


def read_card(folder: Path) -> Card:
    """card.json of an export, every file beside it verified."""
    path = folder / "card.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not an export: it has no card.json. Make one: dipole export run=… out={folder}")
    try:
        card = Card.from_json(json.loads(path.read_text(encoding="utf-8")))
        version, kind, files = int(card.facts["artifact"]), card.facts["format"], dict(card.facts["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{path} is not the card of an export ({e!r}). {AGAIN}") from e
    if version > VERSION:
        raise ValueError(f"{folder} was written by a later dipole (layout {version}, this one reads up to {VERSION}): pip install --upgrade dipole")
    if kind not in RUNTIMES:
        raise ValueError(f"{path} names the format {kind!r}; known are {', '.join(RUNTIMES)}. {AGAIN}")
    if "solver.json" not in files and kind != "torch":
        raise ValueError(f"{path} does not vouch for solver.json. {AGAIN}")
    for name, digest in files.items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path} names the file {name!r}, which is outside {folder}. {AGAIN}")
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its card.json names. Copy the whole folder again, or export again: dipole export run=…")
        if sha256(file) != digest:
            raise ValueError(f"{file} is not the file that was exported: its sha256 differs from the one in card.json. Copy the folder again, or export again")
    return card


def guidance(card: Card) -> dict[str, float]:
    """limit and prior of merge=identity and guided."""
    return {k: float(v) for k, v in dict(card.facts.get("guidance", {})).items() if k in ("limit", "prior")}


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def runtime(kind: str) -> Any:
    """The module that runs a format. ImportError with the pip line."""
    try:
        return importlib.import_module(RUNTIMES[kind])
    except ImportError as e:
        extra = "policy" if kind == "torch" else kind
        raise ImportError(f"a format={kind} export runs in {RUNTIMES[kind]}, which is not installed: pip install 'dipole[{extra}]'", name=RUNTIMES[kind]) from e


def _check_runtime(kind: str, versions: Mapping[str, str]) -> None:
    """ImportError when the runtime is missing, ValueError when it is older than the one that the export was compared with."""
    name = RUNTIMES[kind]
    runtime(kind)
    have, need = importlib.metadata.version(name), versions.get(name)
    if need and _release(have) < _release(need):
        raise ValueError(f"the export was compared with {name} {need} and {have} is installed, which may not read it: pip install --upgrade '{name}>={need}'")


def _release(version: str) -> tuple[int, ...]:
    """1.32.0 -> (1, 32)."""
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2])


class OnnxGraph:
    """A graph in ONNX Runtime: {input: array} in, one array out. Inputs that the graph does not have are left out."""

    def __init__(self, path: Path, threads: int):
        ort = runtime("onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the robot's other processes want the cores between two plans
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names, self.out = [i.name for i in self.session.get_inputs()], [self.session.get_outputs()[0].name]

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        answer: np.ndarray = self.session.run(self.out, {name: arrays[name] for name in self.names})[0]
        return answer


class OpenVinoGraph:
    """A graph in OpenVINO on the CPU, as OnnxGraph; its answer is valid until the next call. For one thread at a time.

    precision: f32 or bf16; left to itself, OpenVINO takes bf16 where the CPU multiplies it.
    """

    def __init__(self, path: Path, threads: int, precision: str = "f32"):
        ov = runtime("openvino")
        core = ov.Core()
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                   "ENABLE_CPU_PINNING": False}
        compiled = core.compile_model(core.read_model(str(path)), "CPU", options)
        self.request = compiled.create_infer_request()
        self.inputs = {}
        for i, port in enumerate(compiled.inputs):
            tensor = ov.Tensor(port.get_element_type(), port.get_shape())
            self.request.set_input_tensor(i, tensor)
            self.inputs[port.get_node().get_friendly_name()] = tensor.data
        self.out = self.request.get_output_tensor(0).data

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        for name, mine in self.inputs.items():
            mine[...] = arrays[name]
        self.request.infer()
        return self.out


class Exported:
    """A Backend of graphs; the solver's loop, scaling and promises are on the host.   shift, scale: normalised actions are (actions - shift) / scale."""

    def __init__(self, card: Card, solver: Solver, shift: np.ndarray, scale: np.ndarray, rtc: int, *, encoder: Any, step: Any, time: Any = None):
        self.card, self.solver, self.shift, self.scale, self.rtc = card, solver, shift, scale, rtc
        self.encoder, self.step, self.time, self.lock = encoder, step, time, threading.Lock()
        self.size, self.guidance = (card.horizon, card.action_dim), guidance(card)
        self.taus = [np.full((1, card.horizon) if rtc else (1,), tau, np.float32) for tau in solver.taus]
        self.times = [{} if time is None else {"time": np.array(time({"tau": tau.ravel()[:1]}))} for tau in self.taus]

    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        """See Backend. noise may also be (1 + draws, horizon, d), when the sampler is stochastic and its draws are to be fixed one by one."""
        seen = self._observed(obs)
        known = check_prefix(prefix, committed, merge, size=self.size, merges=tuple(self.card.merges), rtc=self.rtc)
        near = None if known is None else (known - self.shift) / self.scale
        told = promised(self.solver, self.size, near, committed if known is not None else 0, merge, **self.guidance)
        start = noises(noise, self.size, self.solver.draws)
        with self.lock:
            cond = np.array(self.encoder(seen))
            x = self.solver.walk(lambda i, x: self._step(i, x, cond, told), start)
        return kept(x * self.scale + self.shift, known, committed, merge)

    def _step(self, i: int, x: np.ndarray, cond: np.ndarray, told: Promised) -> np.ndarray:
        tau = np.where(told.mask[:, 0], np.float32(0), self.taus[i]) if told.told else self.taus[i]
        inputs = {"x": x[None], "tau": tau, "cond": cond, "known": told.known[None], "mask": told.mask[None], "pull": told.pull[i: i + 1], **self.times[i]}
        answer: np.ndarray = self.step(inputs)
        return answer[0]

    def _observed(self, obs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        missing = [k for k in self.card.obs if k not in obs]
        if missing:
            raise KeyError(f"observation lacks {', '.join(missing)} (got {', '.join(obs) or 'nothing'})")
        seen = {}
        for key, size in self.card.obs.items():
            x = np.asarray(obs[key], np.float32)
            if x.shape != (self.card.t_obs, *size):
                raise ValueError(f"observation {key!r} must be ({', '.join(map(str, (self.card.t_obs, *size)))}), got {x.shape}")
            seen[f"obs_{key}"] = x[None]
        return seen


def _torch(folder: Path, card: Card, threads: int, trust: Sequence[str]) -> Backend:
    import torch

    from policy.nets.fast import quick
    from policy.serve.backend import PlannerBackend
    from policy.serve.fastplan import FastPlan
    from policy.train import checkpoint
    torch.set_num_threads(threads)
    planner, _ = checkpoint.load(folder, trust=trust)
    if card.facts["precision"] == "bf16":
        planner.denoiser.net = quick(planner.denoiser.net)
    told = guidance(card)
    ordinary = PlannerBackend(planner, limit=told.get("limit", 5.0), prior=told.get("prior", 1.0))
    ordinary.card = card
    return FastPlan(ordinary)

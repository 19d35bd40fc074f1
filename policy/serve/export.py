"""Write a planner as a folder that policy.serve.artifact.load reads: graphs for ONNX Runtime or OpenVINO, or weights for torch."""
import contextlib
import importlib.metadata
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policy.nets.steered import Films
from policy.planner import Planner
from policy.serve.artifact import RUNTIMES, VERSION, runtime, sha256
from policy.serve.backend import PlannerBackend
from policy.serve.card import Card
from policy.serve.probe import tabulate
from policy.serve.solver import OFFERED, Solver
from policy.serve.step import Encode, SteeredStep, Step, Time, limits, unet_of
from policy.train import checkpoint

PRECISIONS = {"onnx": ("fp32",), "openvino": ("fp32", "bf16"), "torch": ("fp32", "bf16")}


def export(policy: PlannerBackend, config: Mapping[str, Any], out: Path, *, format: str, precision: str = "fp32") -> Card:
    """Fill the folder `out` and return its card; noise and promised actions are inputs of what is written, nothing in it is random.

    config: what checkpoint.build makes the planner of, for format=torch.   ValueError names what cannot be exported, ImportError the package that is missing.
    """
    if format not in RUNTIMES:
        raise ValueError(f"format={format} is unknown; use one of {', '.join(RUNTIMES)}")
    if precision not in PRECISIONS[format]:
        raise ValueError(f"format={format} has precision={' or '.join(PRECISIONS[format])}, not {precision}"
                         + ("; bf16 is for format=openvino and torch" if precision == "bf16" else ""))
    planner = policy.planner
    limits(planner)
    if policy.warm is not None:
        raise ValueError(f"control.warm={policy.warm} starts from the promised plan, which an export cannot: export with control.warm=null, or serve the run")
    solver = tabulate(planner)
    out.mkdir(parents=True, exist_ok=True)
    merges: tuple[str, ...] = (*OFFERED, *(["prefix"] if planner.rtc else []))
    if format == "torch":
        files = _write_torch(planner, config, out)
        merges = (*merges, "guided")
    else:
        files = _write_graphs(planner, solver, out, format)
    about = {"artifact": VERSION, "format": format, "precision": precision, "files": {name: sha256(out / name) for name in files},
             "versions": _versions(format), "solver": {"taus": solver.taus.tolist(), "calls": solver.calls, "draws": solver.draws},
             "guidance": {"limit": policy.limit, "prior": policy.prior}, **policy.card.facts}
    card = replace(policy.card, merges=merges, facts=about)
    write_card(out, card)
    return card


def write_card(out: Path, card: Card) -> None:
    part = out / "card.part"
    part.write_text(json.dumps(card.to_json(), indent=1), encoding="utf-8")
    part.replace(out / "card.json")


def _versions(format: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in {"torch", "numpy", RUNTIMES[format], *(() if format == "torch" else ("onnx",))}}


def _write_torch(planner: Planner, config: Mapping[str, Any], out: Path) -> list[str]:
    facts = {"spec": planner.spec.to_json(), "planner": dict(config)}
    checkpoint.write(out / "checkpoints" / "policy.safetensors", {f"model/{k}": v for k, v in planner.state_dict().items()}, facts)
    return ["checkpoints/policy.safetensors", "checkpoints/policy.json"]


def _write_graphs(planner: Planner, solver: Solver, out: Path, format: str) -> list[str]:
    runtime(format)
    shift, scale = (getattr(planner.normalizer, f"{part}_action").flatten().tolist() for part in ("shift", "scale"))
    (out / "solver.json").write_text(json.dumps({"solver": solver.to_json(), "action": {"shift": shift, "scale": scale}, "rtc": planner.rtc}))
    files = ["solver.json"]
    for name, (module, example) in graphs(planner).items():
        path = out / f"{name}.onnx"
        write_onnx(module, example, path)
        if format == "openvino":
            files += _to_openvino(path)
        else:
            files.append(path.name)
    return files


def graphs(planner: Planner) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """{name: (module, {input: example})} of everything that an exported plan calls, on the CPU."""
    spec, like = planner.spec, torch.zeros(1, planner.spec.horizon, planner.spec.action_dim)
    net = unet_of(planner)
    films = None if net is None else Films(net)
    obs = {f"obs_{k}": torch.zeros(1, spec.t_obs, *size) for k, size in spec.obs.items()}
    tokens = planner.encoder(planner.normalizer.encode({k: v for k, v in zip(spec.obs, obs.values(), strict=True)}))
    if tokens.mask is not None:
        raise ValueError("an encoder that leaves out tokens (Cond.mask) cannot be exported yet: serve the run, dipole serve run=…")
    encode = Encode(planner, films)
    steps: dict[str, Tensor] = {"x": like, "tau": torch.full((1, spec.horizon) if planner.rtc else (1,), 0.5), "cond": encode(*obs.values()), "known": like,
                                "mask": torch.zeros(1, spec.horizon, 1, dtype=torch.bool), "pull": torch.zeros(1, spec.horizon, 1)}
    if films is None:
        return {"encoder": (encode, obs), "step": (Step(planner), steps)}
    time = Time(films)
    steps["time"] = time(torch.full((1,), 0.5))
    return {"encoder": (encode, obs), "time": (time, {"tau": torch.full((1,), 0.5)}), "step": (SteeredStep(planner), steps)}


def write_onnx(module: nn.Module, example: Mapping[str, Tensor], path: Path) -> None:
    """ImportError with the pip line when the exporter's packages are missing."""
    with _quiet():
        try:
            torch.onnx.export(module.eval(), tuple(t.detach() for t in example.values()), str(path), input_names=list(example), output_names=["out"],
                              dynamo=True, external_data=False, verbose=False)
        except ImportError as e:
            raise ImportError(f"exporting needs {e.name or 'onnx and onnxscript'}, which is not installed: pip install 'dipole[export]'", name=e.name) from e


def _to_openvino(path: Path) -> list[str]:
    """The ONNX file replaced by OpenVINO's two, weights in full precision."""
    ov = runtime("openvino")
    ov.save_model(ov.Core().read_model(str(path)), str(path.with_suffix(".xml")), compress_to_fp16=False)  # convert_model would tell Intel about it
    path.unlink()
    return [path.with_suffix(s).name for s in (".xml", ".bin")]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its hints at packages that are not needed."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

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
from policy.serve.artifact import VERSION, sha256, write_card
from policy.serve.backend import PlannerBackend
from policy.serve.card import Card
from policy.serve.exported import Host
from policy.serve.gradient import traced
from policy.serve.probe import tabulate
from policy.serve.runtimes import RUNTIMES, runtime
from policy.serve.step import Encode, SteeredStep, Step, Time, limits, unet_of
from policy.train import checkpoint

log = logging.getLogger("dipole.export")
PRECISIONS = {"onnx": ("fp32",), "openvino": ("fp32", "bf16"), "torch": ("fp32", "bf16")}


def export(policy: PlannerBackend, config: Mapping[str, Any], out: Path, *, format: str, precision: str = "fp32") -> Card:
    """Fill the folder `out` and return its card; noise and promised actions are inputs of what is written, nothing in it is random.

    config: what checkpoint.build makes the planner of, for format=torch.   ValueError names what cannot be exported, the merge that policy.card.facts
    advises included; ImportError the package that is missing.
    """
    if format not in RUNTIMES:
        raise ValueError(f"format={format} is unknown; use one of {', '.join(RUNTIMES)}")
    if precision not in PRECISIONS[format]:
        raise ValueError(f"format={format} has precision={' or '.join(PRECISIONS[format])}, not {precision}"
                         + ("; bf16 is for format=openvino and torch" if precision == "bf16" else ""))
    planner = policy.planner
    limits(planner)
    host = host_of(policy)
    out.mkdir(parents=True, exist_ok=True)
    files, without = (_write_torch(planner, config, out), {}) if format == "torch" else _write_graphs(planner, host, out, format)
    merges = tuple(m for m in policy.card.merges if m not in without)
    advised = (policy.card.facts.get("control") or {}).get("merge", merges[0])
    if advised not in merges:
        why = without.get(advised) or "this policy was not trained for it"
        raise ValueError(f"control.merge={advised} is how this policy is to go on from what is promised, and the export cannot ({why}): "
                         f"export with control.merge={' or '.join(m for m in ('frozen', 'identity') if m in merges)}"
                         + (", or format=torch" if advised in policy.card.merges else ""))
    about = {"artifact": VERSION, "format": format, "precision": precision, "files": {name: sha256(out / name) for name in files},
             "versions": _versions(format), "solver": {"taus": host.solver.taus.tolist(), "calls": host.solver.calls, "draws": host.solver.draws},
             "guidance": {"limit": policy.limit, "prior": policy.prior}, "warm": policy.warm, "without": without, **policy.card.facts}
    card = replace(policy.card, merges=merges, facts=about)
    write_card(out, card)
    return card


def host_of(policy: PlannerBackend) -> Host:
    """ValueError when the sampler is no table of coefficients."""
    planner = policy.planner
    shift, scale = (getattr(planner.normalizer, f"{part}_action").cpu().numpy() for part in ("shift", "scale"))
    return Host(tabulate(planner), None if policy.warm is None else tabulate(planner, policy.warm), shift, scale, planner.transform, planner.rtc)


def _versions(format: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in {"torch", "numpy", RUNTIMES[format], *(() if format == "torch" else ("onnx",))}}


def _write_torch(planner: Planner, config: Mapping[str, Any], out: Path) -> list[str]:
    facts = {"spec": planner.spec.to_json(), "planner": dict(config)}
    checkpoint.write(out / "checkpoints" / "policy.safetensors", {f"model/{k}": v for k, v in planner.state_dict().items()}, facts)
    return ["checkpoints/policy.safetensors", "checkpoints/policy.json"]


def _write_graphs(planner: Planner, host: Host, out: Path, format: str) -> tuple[list[str], dict[str, str]]:
    """The files, and why which merges cannot be had."""
    runtime(format)
    (out / "solver.json").write_text(json.dumps(host.to_json()))
    files, without = ["solver.json"], {}
    parts = graphs(planner)
    step, example = parts["step"]
    assert isinstance(step, Step)
    try:
        example = {name: x for name, x in example.items() if name != "mask"}
        files += _write_graph("guided", traced(step.guided, list(example.values())), example, out, format)
    except ImportError:
        raise
    except Exception as e:  # of torch's and onnx's own kinds, for networks with operators whose gradient cannot be written
        without["guided"] = f"its gradient cannot be written: {type(e).__name__}"
        log.info("merge=guided is left out", exc_info=e)
    for name, (module, example) in parts.items():
        files += _write_graph(name, module, example, out, format)
    return files, without


def _write_graph(name: str, module: nn.Module, example: Mapping[str, Tensor], out: Path, format: str) -> list[str]:
    path = out / f"{name}.onnx"
    write_onnx(module, example, path)
    return _to_openvino(path) if format == "openvino" else [path.name]


def graphs(planner: Planner) -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """{name: (module, {input: example})} of everything that an exported plan calls, on the CPU."""
    spec, like = planner.spec, torch.zeros(1, *planner.size)
    net = unet_of(planner)
    films = None if net is None else Films(net)
    obs = {f"obs_{k}": torch.zeros(1, spec.t_obs, *size) for k, size in spec.obs.items()}
    tokens = planner.encode(dict(zip(spec.obs, obs.values(), strict=True)))
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
    theirs = logging.getLogger("torch.onnx")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.setLevel(level)

"""What runs an exported graph: ONNX Runtime or OpenVINO, on the CPU. Neither they nor torch are imported before they are asked for."""
import importlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "torch": "torch"}
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}


def runtime(kind: str) -> Any:
    """The module that runs a format. ImportError with the pip line."""
    try:
        return importlib.import_module(RUNTIMES[kind])
    except ImportError as e:
        extra = "policy" if kind == "torch" else kind
        raise ImportError(f"a format={kind} export runs in {RUNTIMES[kind]}, which is not installed: pip install 'dipole[{extra}]'", name=RUNTIMES[kind]) from e


def check_runtime(kind: str, versions: Mapping[str, str]) -> None:
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

    precision: fp32 or bf16; left to itself, OpenVINO takes bf16 where the CPU multiplies it.   fuse: whether it may make new operators of several: of those
    in a gradient it makes one, for a single thread, that ends in a segmentation fault (2026.4), and no plan is quicker for it.
    """

    def __init__(self, path: Path, threads: int, precision: str, *, fuse: bool = True):
        ov = runtime("openvino")
        core = ov.Core()
        options = {"INFERENCE_PRECISION_HINT": precision.replace("fp32", "f32"), "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                   "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False, **({} if fuse else {"SNIPPETS_MODE": "DISABLE"})}
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

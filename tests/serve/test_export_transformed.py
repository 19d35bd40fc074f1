"""Exports of policies with transforms: observations are turned inside the graph, actions by numpy, and the plans are the planner's."""
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from policy.diffusion.samplers import first_order
from policy.serve.artifact import load
from policy.serve.backend import PlannerBackend
from policy.serve.export import export
from policy.serve.measure import parity
from tests.serve.test_transformed import agree, asked, small
from tests.test_transformed_plans import CHAINS

pytest.importorskip("onnxscript", reason="pip install 'dipole[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'dipole[onnx]'")

pytestmark = pytest.mark.slow  # as test_export.py, in the same process of its own


@pytest.mark.parametrize("format, name, per_step, options", [
    ("onnx", "umi", False, {"net": "mlp"}), ("openvino", "umi", False, {"net": "mlp"}), ("onnx", "delta", True, {"rtc": 3}),
    ("onnx", "summed", False, {"net": "dit"}), ("onnx", "umi", True, {"net": "mlp", "sampler": partial(first_order, eta=1.0)})])
def test_an_export_plans_as_its_planner_does(tmp_path, format, name, per_step, options):
    """With every merge, from a promise and a warm start; observations are turned inside its graph, actions by numpy."""
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    policy = PlannerBackend(small(CHAINS[name], per_step=per_step, **options), warm=0.6 if name == "delta" else None)
    export(policy, {}, tmp_path, format=format)
    backend = load(tmp_path)
    found = parity(policy, backend, [asked(policy.planner, seed)[0] for seed in range(6)], draws=backend.card.facts["solver"]["draws"])
    assert {"frozen", "guided", "identity"} <= set(found) and max(np.median(one.normalised) for one in found.values()) < 2e-5
    obs, told = asked(policy.planner)
    if "sampler" not in options:
        for merge in found:
            agree(backend.plan(obs, **told, merge=merge), policy.plan(obs, **told, merge=merge), 1e-4)


def test_an_export_needs_no_torch(tmp_path):
    policy = PlannerBackend(small(CHAINS["umi"], net="mlp"))
    export(policy, {}, tmp_path / "out", format="onnx")
    obs, told = asked(policy.planner)
    np.savez(tmp_path / "asked.npz", noise=told["noise"], prefix=told["prefix"], **obs)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from policy.serve.artifact import load
z = np.load({str(tmp_path / 'asked.npz')!r})
obs = {{k: z[k] for k in {list(obs)!r}}}
np.save({str(tmp_path / 'plan.npy')!r}, load({str(tmp_path / 'out')!r}).plan(obs, noise=z["noise"], prefix=z["prefix"], committed=2, merge="frozen"))
assert not [m for m in sys.modules if m.split(".")[0] in ("torch", "hydra", "zarr", "onnx") and sys.modules[m]]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    agree(np.load(tmp_path / "plan.npy"), policy.plan(obs, **told, merge="frozen"))

"""An export plans as its planner does, with every network, runtime, sampler and merge; it needs no torch, and what is not right is told."""
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from policy.diffusion import samplers as S
from policy.diffusion.from_diffusers import scheduler
from policy.diffusion.guides import smooth, tilt
from policy.diffusion.path import VP, Linear, Table
from policy.serve.artifact import load, write_card
from policy.serve.backend import PlannerBackend
from policy.serve.card import Card
from policy.serve.client import PlannerClient
from policy.serve.export import export, host_of
from policy.serve.exported import Exported
from policy.serve.measure import PARITY, SENSITIVE, Difference, eager, exactly, parity
from policy.serve.probe import tabulate
from policy.types import Cond
from tests.serve.far import Far
from tests.serve.small import ACTIONS, asked, small

pytest.importorskip("onnxscript", reason="pip install 'dipole[export]'")
pytest.importorskip("onnxruntime", reason="pip install 'dipole[onnx]'")

pytestmark = pytest.mark.slow  # OpenVINO's threads and a training in the same process end in a segmentation fault; make realtime and make all give it its own
ROOT = Path(__file__).parents[2]
CASES = {  # an odd horizon each; what a path, a target or an encoder brings into the graphs
    "unet1d": {"net": "unet1d", "horizon": 7, "width": 5}, "told": {"net": "unet1d", "horizon": 6, "rtc": 3, "path": Linear(), "target": "flow"},
    "dit": {"net": "dit", "horizon": 5, "path": Table.named("squaredcos_cap_v2", 20)}, "mlp": {"net": "mlp", "horizon": 3, "path": VP(), "limits": (1.5, 0.9)}}
SAMPLERS = {"heun": (S.heun, 3), "dpmpp_2m": (S.dpmpp_2m, 4), "jump": (S.consistency, 1), "ddpm": (partial(S.first_order, eta=1.0), 4),
            "UniPC": (scheduler("UniPCMultistep"), 4)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(case, format) -> (its planner, the folder of its export, the loaded export), each made once."""
    @lru_cache
    def make(case: str, format: str):
        if format == "openvino":
            pytest.importorskip("openvino", reason="pip install 'dipole[openvino]'")
        folder = tmp_path_factory.mktemp(f"{case}-{format}") / "export"
        policy = PlannerBackend(small(**CASES[case]), facts={"run": "toy"})
        export(policy, {}, folder, format=format)
        return policy, folder, load(folder)
    return make


@pytest.mark.parametrize("case, format", [pytest.param(c, f, marks=[pytest.mark.slow] if (f == "openvino") == (c != "told") else [])
                                          for c in CASES for f in ("onnx", "openvino")])
def test_plans_as_the_planner_does_with_every_merge(made, case, format):
    policy, _, backend = made(case, format)
    horizon = policy.card.horizon
    found = parity(policy, backend, [asked(horizon, seed)[0] for seed in range(8)])
    assert set(found) == {"naive", "ensemble", "frozen", "guided", "identity"} | ({"prefix"} if case == "told" else set())
    assert max(max(one.normalised) for one in found.values()) < 2e-5, {m: max(one.normalised) for m, one in found.items()}
    obs, noise, prefix = asked(horizon, known=3)
    told = {merge: backend.plan(obs, noise=noise, prefix=prefix, committed=2, merge=merge) for merge in found}
    assert all(np.array_equal(told[m][:2], prefix[:2]) for m in found if m not in ("naive", "ensemble"))
    assert np.array_equal(told["naive"], backend.plan(obs, noise=noise)) and np.abs(told["frozen"] - told["naive"])[2:].max() > 1e-4
    assert np.array_equal(backend.plan(obs, noise=noise, merge="guided"), told["naive"])  # nothing is promised
    assert min(np.abs(told["guided"] - told[other])[2:].max() for other in ("naive", "identity")) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_every_sampler(made, sampler):
    policy, _, backend = made("mlp", "onnx")  # the graphs know no sampler
    planner = small(**CASES["mlp"])
    planner.set_sampler(*SAMPLERS[sampler])
    other = PlannerBackend(planner)
    again = Exported(backend.card, host_of(other), backend.graphs)
    found = parity(other, again, [asked(3, seed)[0] for seed in range(4)], draws=again.host.solver.draws)
    assert max(max(one.normalised) for one in found.values()) < 5e-5
    obs, noise, _ = asked(3)
    assert np.array_equal(again.plan(obs, noise=noise), again.plan(obs, noise=noise))
    assert np.abs(again.plan(obs, noise=noise) - policy.plan(obs, noise=noise)).max() > 1e-3


def test_no_torch_is_needed(made, tmp_path):
    """In a process that cannot import it; the plan is the one made here."""
    policy, folder, _ = made("unet1d", "onnx")
    obs, noise, prefix = asked()
    np.savez(tmp_path / "asked.npz", noise=noise, prefix=prefix, **obs)
    code = f"""
import sys
sys.modules["torch"] = None
import numpy as np
from policy.serve.artifact import load
z = np.load({str(tmp_path / 'asked.npz')!r})
obs = {{k: z[k] for k in {list(obs)!r}}}
np.save({str(tmp_path / 'plan.npy')!r}, load({str(folder)!r}).plan(obs, noise=z["noise"], prefix=z["prefix"], committed=2, merge="frozen"))
assert not [m for m in sys.modules if m.split(".")[0] in ("torch", "diffusers", "hydra", "zarr", "onnx") and sys.modules[m]]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "plan.npy"), policy.plan(obs, noise=noise, prefix=prefix, committed=2, merge="frozen"), atol=1e-5)


def test_dipole_serve_needs_no_torch_for_an_export(made):
    """As dipole[deploy,onnx] has it: the command in a process that cannot import what only planners need."""
    pytest.importorskip("prometheus_client", reason="pip install 'dipole[deploy]'")
    policy, folder, _ = made("unet1d", "onnx")
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "diffusers", "safetensors", "gymnasium", "mujoco"]))
sys.argv = ["dipole", "serve", "artifact={folder}", "port=0"]
from scripts.cli import main
main()"""
    far = Far([sys.executable, "-c", code])
    try:
        obs, noise, _ = asked()
        with PlannerClient(far.url) as client:
            np.testing.assert_allclose(client.plan(obs, noise=noise, timeout=30).actions, policy.plan(obs, noise=noise), atol=1e-5)
            assert client.wait_ready(1).facts["format"] == "onnx"
        assert far.end() == 0
    finally:
        far.process.kill()
        far.process.stdout.close()


def test_torch_keeps_everything(tmp_path):
    from policy.data.normalize import Normalizer
    from policy.train import checkpoint
    from policy.types import Spec
    from tests.helpers import CONFIG
    spec = Spec({"x": (4,), "wrist.force": (2, 1)}, ACTIONS, 2, 7, 10.0)
    torch.manual_seed(0)
    planner = checkpoint.build(CONFIG, spec, Normalizer({**spec.obs, "action": (ACTIONS,)}))
    policy = PlannerBackend(planner, limit=50.0, prior=0.3, warm=0.7)
    export(policy, CONFIG, tmp_path, format="torch")
    backend = load(tmp_path)
    found = parity(policy, backend, [asked(seed=s)[0] for s in range(4)])
    assert "guided" in found and max(max(one.normalised) for one in found.values()) < 1e-5
    assert backend.card.model_id == policy.card.model_id


@pytest.mark.slow
def test_bf16_is_within_a_few_percent(tmp_path):
    pytest.importorskip("openvino", reason="pip install 'dipole[openvino]'")
    policy = PlannerBackend(small())
    export(policy, {}, tmp_path, format="openvino", precision="bf16")
    obs, noise, _ = asked()
    difference = np.abs(load(tmp_path).plan(obs, noise=noise) - policy.plan(obs, noise=noise)).max()
    assert difference < 0.2


def test_the_card_says_what_it_is(made):
    policy, folder, backend = made("unet1d", "onnx")
    card = backend.card
    assert (card.model_id, card.task, card.units, card.dt, tuple(card.seen_low)) == (policy.card.model_id, "toy", {"action": "rad"}, 0.1, policy.card.seen_low)
    assert card.facts["run"] == "toy" and card.facts["solver"]["taus"] == tabulate(policy.planner).taus.tolist()
    assert {p.name for p in folder.iterdir()} == {*card.facts["files"], "card.json"} and "onnxruntime" in card.facts["versions"]


@pytest.fixture
def copied(made, tmp_path):
    return Path(shutil.copytree(made("mlp", "onnx")[1], tmp_path / "copy"))


def edit(folder: Path, **facts) -> None:
    """A card that is whole and says something else."""
    card = Card.from_json(json.loads((folder / "card.json").read_text()))
    write_card(folder, replace(card, facts={**card.facts, **facts}))


@pytest.mark.parametrize("file", ["step.onnx", "encoder.onnx", "solver.json"])
def test_a_changed_file_is_found(copied, file):
    whole = bytearray((copied / file).read_bytes())
    whole[len(whole) // 2] ^= 1
    (copied / file).write_bytes(whole)
    with pytest.raises(ValueError, match=f"{file} is not the file that was exported"):
        load(copied)


def test_what_is_missing_or_foreign_is_told(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not an export: it has no card\.json.*dipole export run="):
        load(tmp_path / "nothing")
    whole = (copied / "card.json").read_text()
    facts = json.loads(whole)["facts"]
    for change, words in (({"artifact": 99}, "layout 99.*pip install --upgrade dipole"), ({"artifact": 1}, "layout 1.*Export again"),
                          ({"format": "tflite"}, "format tflite"), ({"files": {**facts["files"], "../card.json": "0"}}, "outside"),
                          ({"files": {**facts["files"], "/etc/passwd": "0"}}, "outside"), ({"files": 3}, "layout"),
                          ({"files": {}}, "does not hold a whole policy"),
                          ({"versions": {"onnxruntime": "999.1"}}, "pip install --upgrade 'onnxruntime>=999.1'")):
        edit(copied, **{**facts, **change})
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            load(copied)
    (copied / "card.json").write_text(whole)
    load(copied)
    (copied / "step.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks step\.onnx"):
        load(copied)


@pytest.mark.parametrize("damage", [lambda t: "{", lambda t: "", lambda t: "[1]", lambda t: t[: len(t) // 2], lambda t: t.replace('"dt": 0.1', '"dt": 0.5'),
                                    lambda t: t.replace('"horizon": 3', '"horizon": "3"'), lambda t: t.replace("sha256", "sha"), lambda t: "\x00" * len(t),
                                    lambda t: t.replace('"version": 2', '"version": 1')])
def test_a_damaged_card_is_one_line_that_names_it(copied, damage):
    path = copied / "card.json"
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=r"card\.json is not the .*[Cc]opy the folder again, or export again: dipole export") as e:
        load(copied)
    assert "\n" not in str(e.value)


def test_what_the_runtime_cannot_read_is_one_line(copied):
    """A whole file of another kind: its sum is right, the runtime's own error is told with the file's name."""
    (copied / "step.onnx").write_bytes(b"no graph")
    facts = json.loads((copied / "card.json").read_text())["facts"]
    edit(copied, files={**facts["files"], "step.onnx": hashlib.sha256(b"no graph").hexdigest()})
    with pytest.raises(ValueError, match=r"step\.onnx cannot be read by onnxruntime .*dipole export run=") as e:
        load(copied)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("case, sampler", [("told", "ddim"), ("mlp", "heun"), ("mlp", "ddpm")])
def test_a_warm_start_leaves_torch_too(made, case, sampler):
    _, _, cold = made(case, "onnx")  # the graphs know no sampler
    planner = small(**CASES[case])
    planner.set_sampler(*{**SAMPLERS, "ddim": (S.first_order, 6)}[sampler])
    policy = PlannerBackend(planner, warm=0.6)
    backend = Exported(cold.card, host_of(policy), cold.graphs)
    horizon = planner.spec.horizon
    found = parity(policy, backend, [asked(horizon, seed)[0] for seed in range(4)], draws=backend.host.solver.draws)
    assert max(max(one.normalised) for one in found.values()) < 5e-5
    assert backend.host.warm is not None and backend.host.warm.calls < backend.host.solver.calls
    obs, noise, prefix = asked(horizon, known=3)
    assert np.abs(backend.plan(obs, noise=noise, prefix=prefix) - backend.plan(obs, noise=noise)).max() > 1e-3


def test_a_missing_runtime_names_its_pip_line(copied, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"pip install 'dipole\[onnx\]'"):
        load(copied)


@pytest.mark.parametrize("policy, options, words", [
    (lambda: tilted(), {}, "guide tilt cannot leave torch.*guide=clip"), (lambda: PlannerBackend(small(), warm=0.01), {}, "control.warm=0.01 lies below"),
    (lambda: PlannerBackend(small()), {"precision": "bf16"}, "bf16 is for format=openvino and torch"),
    (lambda: PlannerBackend(small()), {"format": "tflite"}, "use one of onnx, openvino, torch"), (lambda: half_seen(), {}, "leaves out tokens")])
def test_what_cannot_be_exported_is_told(policy, options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(policy(), {}, tmp_path / "out", **{"format": "onnx", **options})


def tilted() -> PlannerBackend:
    planner = small()
    planner.set_guides([partial(tilt, value=smooth, scale=0.1), *planner.guides])
    return PlannerBackend(planner)


def half_seen() -> PlannerBackend:
    planner = small()
    encoder = planner.encoder.forward
    planner.encoder.forward = lambda obs: Cond((c := encoder(obs)).tokens, torch.ones(c.tokens.shape[:2], dtype=torch.bool))
    return PlannerBackend(planner)


def test_wrong_observations_are_told(made):
    _, _, backend = made("unet1d", "onnx")
    obs, noise, prefix = asked()
    with pytest.raises(KeyError, match=r"lacks wrist\.force"):
        backend.plan({"x": obs["x"]}, noise=noise)
    with pytest.raises(ValueError, match=r"'x' must be \(2, 4\), got \(4, 2\)"):
        backend.plan({**obs, "x": obs["x"].T}, noise=noise)
    with pytest.raises(ValueError, match=r"needs a policy trained with train\.rtc"):
        backend.plan(obs, noise=noise, prefix=prefix, merge="prefix")


def test_parity_finds_a_wrong_export(made):
    policy, _, backend = made("mlp", "onnx")
    wrong = Exported(backend.card, replace(backend.host, scale=backend.host.scale * 1.001), backend.graphs)
    found = parity(policy, wrong, [asked(3, seed)[0] for seed in range(4)])
    assert min(one.excess for one in found.values()) > 1
    assert max(one.excess for one in parity(policy, backend, [asked(3)[0]]).values()) < 0.3


def test_rounding_of_a_sensitive_policy_is_no_difference():
    """excess: one plan far off is explained by the planner's own rounding there, many plans off or a planner that is sure of itself are not."""
    assert Difference([1e-6, 1e-6, 5 * PARITY], np.zeros(1), PARITY).excess <= 0.5
    assert Difference([1e-6, 1e-6, 5 * PARITY], np.zeros(1), 0.1 * PARITY).excess == pytest.approx(5)
    assert Difference([5 * PARITY] * 3, np.zeros(1), PARITY).excess > 1 and Difference([0.5 * PARITY], np.zeros(1)).excess < 1
    assert SENSITIVE * PARITY < 0.01


@pytest.mark.parametrize("net", ["unet1d", "dit", "mlp"])
def test_exact_arithmetic_is_the_planners_own_in_double(net):
    policy = PlannerBackend(small(net, width=5))
    exact = exactly(policy.planner)
    obs, noise, prefix = asked()
    told = {"prefix": prefix, "committed": 2, "merge": "guided"}
    want, got = (eager(policy, planner, obs, noise[None], **told) for planner in (policy.planner, exact))
    assert got.dtype == np.float64 and 0 < np.abs(got - want).max() < 1e-5
    with torch.no_grad():
        seen = exact.denoiser.net(torch.randn(1, 7, 3, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64),
                                  exact.encode({k: torch.from_numpy(v)[None].double() for k, v in obs.items()}))
    assert seen.dtype == torch.float64 and not torch.equal(seen, seen.float().double())

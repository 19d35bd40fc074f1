"""Who may import whom (the arrows of the design), read from the sources with ast, so lazy imports count too."""
import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("policy", "envs", "scripts")
# A layer may import itself, the layers named here, and what those may import. A file belongs to the longest name it starts with.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "policy.types": (),
    "policy.timeline": (),
    "policy.data": ("policy.types", "policy.page"),  # validate and view draw pages
    "policy.nets": ("policy.types",),
    "policy.diffusion": ("policy.types",),
    "policy.planner": ("policy.data", "policy.nets", "policy.diffusion", "policy.timeline"),
    "policy.ood": ("policy.planner",),
    "policy.control": ("policy.planner",),
    "policy.stats": (),
    "policy.episodes": ("policy.stats",),
    "policy.rollout": ("policy.control", "policy.episodes"),
    "policy.lanes": ("policy.rollout",),
    "policy.serve": ("policy.control", "policy.train", "policy.page"),
    "policy.train": ("policy.planner", "policy.rollout"),
    "policy.rl": ("policy.planner", "policy.rollout", "policy.train"),
    "policy.svg": (),
    "policy.page": ("policy.svg",),
    "policy.report": ("policy.page", "policy.train"),
    "policy.compare": ("policy.report", "policy.stats"),
    "policy": (),
    "envs": (),
    "scripts": ("policy.compare", "policy.lanes", "policy.ood", "policy.rl", "policy.serve", "envs"),
}
SIMULATORS = ("gymnasium", "mujoco", "mujoco_warp")
CONFIG = ("hydra", "omegaconf")
KNOWS_CONFIG = ("scripts", "policy.train.checkpoint")  # the second builds a planner from the config it saved


@dataclass(frozen=True)
class Import:
    module: str   # who imports
    target: str   # what, with the name: policy.data.store.Store
    line: int
    eager: bool   # at the top of the file, not under TYPE_CHECKING


def imports(path: Path, module: str) -> Iterator[Import]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[:len(package.split(".")) - node.level + 1], *filter(None, [node.module])]) if node.level \
                else node.module or ""
            yield from (Import(module, f"{base}.{alias.name}", node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, eager)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, eager and not inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def layer(name: str) -> str:
    return max((known for known in MAY_IMPORT if name == known or name.startswith(f"{known}.")), key=len, default="")


def below(name: str) -> set[str]:
    return {name}.union(*(below(under) for under in MAY_IMPORT[name]))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def complaint(found: Import) -> str:
    """Why this import is against the design, or ''."""
    if within(found.target, *PACKAGES):
        mine, other = layer(found.module), layer(found.target)
        return "" if other in below(mine) else f"{mine} may not import {other}"
    if within(found.module, "policy") and within(found.target, *SIMULATORS):
        lazy = within(found.module, "policy.control", "policy.rollout") and within(found.target, "gymnasium") and not found.eager
        return "" if lazy else "policy/ imports no simulator (control and rollout may take gymnasium's types under TYPE_CHECKING)"
    if within(found.target, *CONFIG) and not within(found.module, *KNOWS_CONFIG):
        return f"configuration stays in {' and '.join(KNOWS_CONFIG)}: pass arguments"
    return ""


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if layer(module) == "policy" and module != "policy":
            found.append(f"{path.relative_to(root)}: belongs to no layer; say in MAY_IMPORT of tests/test_layers.py what it may import")
        found += [f"{path.relative_to(root)}:{one.line} imports {one.target}: {why}"
                  for one in imports(path, module) if (why := complaint(one))]
        if not within(module, *KNOWS_CONFIG):
            found += [f"{path.relative_to(root)}:{node.lineno} takes an argument cfg: name the settings it needs"
                      for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.arg) and node.arg == "cfg"]
    return found


def test_the_code_keeps_to_its_layers():
    assert list((ROOT / "policy").rglob("*.py")), "nothing was looked at"
    assert not (found := violations(ROOT)), "\n" + "\n".join(found)


def test_the_table_has_no_circle_and_knows_its_own_names():
    assert all(under in MAY_IMPORT for unders in MAY_IMPORT.values() for under in unders)
    assert all(name not in below(under) for name, unders in MAY_IMPORT.items() for under in unders)  # a circle would not even return


@pytest.mark.parametrize("file, line, why", [
    ("policy/nets/net.py", "from policy.diffusion.path import Path", "policy.nets may not import policy.diffusion"),
    ("policy/diffusion/new.py", "import policy.nets.unet1d", "policy.diffusion may not import policy.nets"),
    ("policy/diffusion/new.py", "from ..nets import unet1d", "policy.diffusion may not import policy.nets"),
    ("policy/diffusion/__init__.py", "from .. import planner", "policy.diffusion may not import policy.planner"),
    ("policy/data/store.py", "from policy import planner", "policy.data may not import policy.planner"),
    ("policy/data/store.py", "def f():\n    from policy.nets import blocks", "policy.data may not import policy.nets"),
    ("policy/types.py", "from policy.data import Store", "policy.types may not import policy.data"),
    ("policy/planner.py", "from policy.control import Controller", "policy.planner may not import policy.control"),
    ("policy/control.py", "from policy.rollout import evaluate", "policy.control may not import policy.rollout"),
    ("policy/rollout.py", "from policy.train import loop", "policy.rollout may not import policy.train"),
    ("policy/train/loop.py", "import envs.gantry", "policy.train may not import envs"),
    ("policy/train/loop.py", "from scripts.common import plain", "policy.train may not import scripts"),
    ("policy/train/loop.py", "import hydra.utils", "configuration stays"),
    ("policy/train/loop.py", "def train(cfg): ...", "takes an argument cfg"),
    ("policy/rollout.py", "import gymnasium", "no simulator"),
    ("policy/rollout.py", "def f():\n    import mujoco", "no simulator"),
    ("policy/data/store.py", "def f():\n    import gymnasium", "no simulator"),
    ("envs/gantry.py", "from policy.types import Spec", "envs may not import policy.types"),
    ("envs/gantry.py", "import omegaconf", "configuration stays"),
    ("envs/gantry.py", "from scripts import cli", "envs may not import scripts"),
    ("policy/robot.py", "", "belongs to no layer"),
])
def test_a_planted_violation_is_found(tmp_path, file, line, why):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and why in found[0] and file in found[0]


@pytest.mark.parametrize("file, line", [
    ("policy/nets/net.py", "from policy.types import Cond\nfrom .blocks import ConvBlock\nimport torch"),
    ("policy/planner.py", "from policy.data import Normalizer\nfrom policy.nets import unet1d\nfrom policy.diffusion import path"),
    ("policy/control.py", "from policy.types import Obs"),  # through the planner
    ("policy/rollout.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gymnasium.vector import VectorEnv"),
    ("policy/control.py", "def f():\n    import gymnasium"),
    ("policy/train/checkpoint.py", "from hydra.utils import instantiate"),
    ("policy/__init__.py", "from importlib import metadata"),
    ("policy/diffusion/guides.py", "def cfg(denoise, null, scale): ..."),  # classifier-free guidance, not configuration
    ("scripts/train.py", "import hydra\nimport envs.gantry\nfrom policy.report import write_report\nfrom scripts.cli import verbs"),
    ("envs/gantry.py", "import gymnasium\nimport mujoco\nfrom envs.task import Task"),
])
def test_what_the_design_allows_passes(tmp_path, file, line):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize("module, unwanted", [("policy.rollout", SIMULATORS), ("policy.report", ("torch", "matplotlib", *SIMULATORS)),
                                              ("policy.serve.client", ("torch", "zarr", "hydra", "rich", "ruckig", *SIMULATORS)),
                                              ("policy.serve.bridge", ("torch", "zarr", "hydra", "rich", *SIMULATORS)),
                                              ("envs", ("torch",))])
def test_importing_really_leaves_out(module, unwanted):
    """What ast cannot see: imports through third parties."""
    code = f"import sys; import {module}; print(sorted(set({unwanted!r}) & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

"""Everything under conf/ composes, every _target_ exists and takes the arguments it is given. A new file is tested unasked."""
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

CONF = Path(__file__).parent.parent / "conf"
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml"))
OPTIONS = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/**/*.yaml"))
HYDRA_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, list(overrides))


@functools.cache
def groups(name: str) -> set[str]:
    """Groups that a primary config chooses from, its parents' too."""
    found: set[str] = set()
    for entry in OmegaConf.load(CONF / f"{name}.yaml").get("defaults", []):  # type: ignore[union-attr]
        if isinstance(entry, str):
            found |= groups(entry) if entry != "_self_" else set()
        else:
            found |= {str(key).removeprefix("optional ").partition("@")[0] for key in entry if not str(key).startswith("override ")}
    return found


def targets(node: Any, where: str) -> Iterator[tuple[str, dict]]:
    """(where, node) for every node with a _target_."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from targets(value, f"{where}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from targets(value, f"{where}[{i}]")


def wrong(node: dict) -> str:
    """What is wrong with a node's _target_ and its arguments, or ''."""
    try:
        target = get_object(node["_target_"])
    except Exception as error:
        return f"_target_ {node['_target_']} does not import: {error}"
    taken = inspect.signature(target).parameters
    if any(p.kind == p.VAR_KEYWORD for p in taken.values()):
        return ""
    unknown = node.keys() - HYDRA_KEYS - taken.keys()
    return f"{node['_target_']} has no argument {', '.join(sorted(unknown))} (it takes {', '.join(taken)})" if unknown else ""


def files() -> list[str]:
    return sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))


def test_conf_is_a_package_that_hydra_finds_from_the_installed_command():
    assert (CONF / "__init__.py").exists() and PRIMARY


@pytest.mark.parametrize("name", PRIMARY)
def test_every_primary_config_composes(name):
    assert composed(name)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_with_each_config_that_offers_its_group(option):
    group, _, choice = option.rpartition("/")
    offered_by = [name for name in PRIMARY if group in groups(name)]
    assert offered_by, f"no primary config has {group} in its defaults: conf/{option}.yaml can never be chosen"
    unlike = {frozenset(groups(name)): name for name in offered_by}  # configs with the same groups take the same options
    chooses = "defaults" in OmegaConf.load(CONF / f"{option}.yaml")  # and only an option that chooses others needs them
    for name in unlike.values() if chooses else offered_by[:1]:
        assert composed(name, f"{group}={choice}")


@pytest.mark.parametrize("file", files())
def test_every_target_imports_and_takes_its_arguments(file):
    content = OmegaConf.to_container(OmegaConf.load(CONF / file), resolve=False)
    found = [f"{where}: {why}" for where, node in targets(content, file) if "${" not in node["_target_"] and (why := wrong(node))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", PRIMARY)
def test_targets_take_what_the_composed_config_gives_them(name):
    """A primary config may add arguments to the option it chose."""
    found = [f"{where}: {why}" for where, node in targets(OmegaConf.to_container(composed(name), resolve=False), name)
             if "${" not in node["_target_"] and (why := wrong(node))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("net", sorted(o.partition("/")[2] for o in OPTIONS if o.startswith("net/")))
@pytest.mark.parametrize("recipe", sorted(o.partition("/")[2] for o in OPTIONS if o.startswith("recipe/")))
def test_every_recipe_takes_every_net(recipe, net):
    config = OmegaConf.to_container(composed("train", f"recipe={recipe}", f"net={net}"), resolve=False)
    assert not [why for _, node in targets(config, "train") if "${" not in node["_target_"] and (why := wrong(node))]


@pytest.mark.parametrize("density", ["uniform", "lognormal", "beta"])
@pytest.mark.parametrize("formalism", ["ddpm", "vp_sde", "pf_ode", "edm", "flow", "consistency"])
def test_every_denoising_formalism_takes_every_density(formalism, density):
    config = OmegaConf.to_container(composed("train", f"formalism={formalism}", f"density={density}"), resolve=False)
    assert not [why for _, node in targets(config, "train") if "${" not in node["_target_"] and (why := wrong(node))]


@pytest.mark.parametrize("node, why", [
    ({"_target_": "policy.nets.absent.Net"}, "does not import"),
    ({"_target_": "math.hypo"}, "does not import"),
    ({"_target_": "fractions.Fraction", "numerator": 1, "denominater": 2}, "no argument denominater"),
    ({"_target_": "fractions.Fraction", "_partial_": True, "numerator": 1}, ""),
    ({"_target_": "json.dumps", "anything": 1}, ""),  # **kw
])
def test_a_wrong_target_is_told(node, why):
    assert (why in wrong(node)) if why else wrong(node) == ""

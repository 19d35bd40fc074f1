"""Commands people copy: those of README.md and of every --help name real verbs, make targets and files, and their overrides compose."""
import importlib
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from scripts import cli, data, doctor

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
README = ROOT / "README.md"
VERBS = cli.verbs()
HELPED = [*(verb for verb in VERBS if verb != "data"), *(f"data {task}" for task in data.TASKS)]
PASSES_TO = {"demo": "train"}  # verbs without a config of their own whose overrides belong to another one


def fenced(markdown: str) -> list[str]:
    """Lines of the ```bash blocks, continued ones joined, prompts and comments removed."""
    text = "\n".join(re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [line.removeprefix("$ ").strip() for line in text.splitlines() if shlex.split(line, comments=True)]


def helped(verb: str) -> list[str]:
    """The commands that `dipole <verb> --help` shows."""
    config = CONF / f"{verb.replace(' ', '_')}.yaml"
    text = (yaml.safe_load(config.read_text())["hydra"]["help"]["template"] if config.exists()
            else importlib.import_module(f"scripts.{verb}").HELP)
    return [line.strip() for line in text.splitlines() if line.startswith("  dipole ")]


def wrong(line: str) -> str:
    """Why a command cannot work, or ''. Programs that are not ours are not looked at."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # MUJOCO_GL=egl dipole …
        words = words[1:]
    program, rest = (words[0].removeprefix(".venv/bin/"), words[1:]) if words else ("", [])
    if program == "make":
        known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return "".join(f"make has no target {word}" for word in rest if "=" not in word and not word.startswith("-") and word not in known)
    if program in ("python", "python3") and rest and rest[0].startswith("scripts/"):
        program, rest = "dipole", [Path(rest[0]).stem, *rest[1:]]
    if program != "dipole" or not rest or rest[0].startswith("-"):
        return ""
    verb, flags = rest[0], {word for word in rest[1:] if word.startswith("-")}
    if verb not in VERBS:
        return f"dipole has no verb {verb} (known: {', '.join(VERBS)})"
    try:
        overrides = [word for word in cli.words_to_overrides(rest[1:]) if word not in flags]
    except SystemExit as error:
        return str(error)
    if verb == "data":
        task = next((word[3:] for word in overrides if word.startswith("do=")), "info")
        if task not in data.TASKS:
            return f"dipole data has no task {task} (known: {', '.join(data.TASKS)})"
        verb, overrides = f"data_{task}", [word for word in overrides if not word.startswith("do=")]
    if verb == "doctor":
        return "".join(f"dipole doctor has no setting {word}" for word in overrides if word.partition("=")[0] not in doctor.SETTINGS)
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        single = [f"{one.get_key_element()}={next(one.sweep_string_iterator())}" if one.is_sweep_override() else one.input_line  # type: ignore[misc]
                  for one in parsed]
        if len(single) and any(one.is_sweep_override() for one in parsed) and not flags & {"-m", "--multirun"}:
            return "several values need -m"
        with initialize_config_dir(str(CONF), version_base=None):
            compose(PASSES_TO.get(verb, verb), single)  # type: ignore[arg-type]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")
def test_the_commands_of_the_readme_would_run():
    lines = fenced(README.read_text(encoding="utf-8"))
    assert lines, "README.md shows no command in a ```bash block"
    assert not (found := [f"{line}\n  {why}" for line in lines if (why := wrong(line))]), "\n".join(found)


@pytest.mark.skipif(not README.exists(), reason="there is no README.md yet")
def test_the_readme_says_how_to_start_and_its_local_links_exist():
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", link)]
    assert not (gone := [link for link in links if not os.path.exists(ROOT / link)]), gone


@pytest.mark.parametrize("verb", HELPED)
def test_every_help_shows_three_commands_that_would_run(verb):
    lines = helped(verb)
    assert len(lines) >= 3, f"dipole {verb} --help shows {len(lines)} commands, three are wanted"
    assert all(f"{line} ".startswith(f"dipole {verb} ") for line in lines)
    assert not (found := [f"{line}\n  {why}" for line in lines if (why := wrong(line))]), "\n".join(found)


@pytest.mark.parametrize("line, why", [
    ("make demmo", "no target demmo"),
    ("make install PYTHON=python3.12", ""),
    ("dipole trian", "no verb trian"),
    ("dipole train trian.steps=1", "trian"),
    ("dipole train train.steps=1 # short", ""),
    ("dipole train net=unet9d", "unet9d"),
    ("dipole train train.seed=0,1", "need -m"),
    ("dipole train -m train.seed=0,1,2", ""),
    ("MUJOCO_GL=egl .venv/bin/dipole doctor timeout=60", ""),
    ("dipole doctor pth=x", "no setting pth"),
    ("python scripts/data.py info path=x.zarr", ""),
    ("python scripts/data.py inspect path=x.zarr", "no task inspect"),
    ("dipole data info pth=x.zarr", "pth"),
    ("dipole data info prints a table", "one bare word"),
    ("git clone somewhere", ""),
])
def test_a_wrong_command_is_told(line, why):
    assert (why in wrong(line)) if why else wrong(line) == ""


def test_only_shell_blocks_are_read_and_continued_lines_joined():
    text = "```bash\n$ dipole train \\\n    run=x\n# a comment\n\nmake demo\n```\n```python\nimport policy\n```\n"
    assert [line.split() for line in fenced(text)] == [["dipole", "train", "run=x"], ["make", "demo"]]

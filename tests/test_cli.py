"""`dipole`: the list costs nothing, words become overrides, and a slip is answered with what was meant."""
import subprocess
import sys
import time

import pytest

from scripts import cli


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "scripts.cli", *argv], capture_output=True, text=True)


def test_verbs_are_files_with_a_main_and_are_not_imported(tmp_path):
    (tmp_path / "fly.py").write_text('"""Take off.\n\nMore."""\nraise RuntimeError("imported")\ndef main(): ...\n')
    (tmp_path / "cli.py").write_text('"""The list itself."""\ndef main(): ...\n')
    (tmp_path / "shared.py").write_text('"""A helper, no verb."""\n')
    assert cli.verbs(tmp_path) == {"fly": "Take off."}


def test_every_verb_says_what_it_does():
    known = cli.verbs()
    assert "doctor" in known and all(known.values()), known


def test_help_is_instant_and_lists_every_verb():
    start = time.perf_counter()
    done = run("--help")
    took = time.perf_counter() - start
    assert done.returncode == 0 and all(verb in done.stdout for verb in cli.verbs())
    assert took < 1.0, f"{took:.2f} s; 0.06 s alone on a machine: something heavy is imported"
    assert run().stdout == done.stdout


def test_the_list_imports_neither_torch_nor_hydra():
    done = subprocess.run([sys.executable, "-c", "import sys; sys.argv = ['dipole']; from scripts import cli; cli.main(); "
                           "assert not {'torch', 'hydra', 'numpy', 'rich'} & set(sys.modules)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_verb_names_the_closest_one():
    done = run("docter")
    assert done.returncode == 2 and "dipole doctor" in done.stderr and not done.stdout


@pytest.mark.parametrize("argv, expected", [
    (["info", "path=x"], ["do=info", "path=x"]),
    (["path=x", "info"], ["path=x", "do=info"]),
    (["env=maze", "+a.b=1", "~data", "-m", "--help"], ["env=maze", "+a.b=1", "~data", "-m", "--help"]),
    (["--cfg", "job", "train"], ["--cfg", "job", "do=train"]),  # hydra's options keep their words
    (["--config-name", "other", "-cd", "folder"], ["--config-name", "other", "-cd", "folder"]),
    ([], []),
    (["compare", "a b", "out=c", "it's"], ["do=compare", "out=c", "runs=['a b','it\\'s']"]),
    (["data=[{path: a.zarr, weight: 3}, b.zarr]"], ["data.path=[{path: a.zarr, weight: 3}, b.zarr]"]), (["data=own"], ["data=own"]),
    (["compare", "a/eval/policy", "a/eval/policy-sampler=heun", "hydra/launcher=joblib"],  # evaluations are called so
     ["do=compare", "hydra/launcher=joblib", "runs=['a/eval/policy','a/eval/policy-sampler=heun']"]),
])
def test_a_bare_word_becomes_do(argv, expected):
    assert cli.words_to_overrides(argv) == expected
    assert cli.words_to_overrides(expected) == expected  # so both ways in may apply it


def test_two_bare_words_are_refused_with_both_named():
    with pytest.raises(SystemExit, match="'info' and 'size'"):
        cli.words_to_overrides(["info", "size"])


def test_a_missing_extra_names_its_pip_line(monkeypatch):
    requires = ["rich<16,>=13", 'mujoco<4,>=3.3; extra == "sim"', 'imageio-ffmpeg<1,>=0.6; extra == "train"']
    monkeypatch.setattr(cli.importlib.metadata, "requires", lambda name: requires)
    assert cli.missing("mujoco") == "pip install 'dipole[sim]'"
    assert cli.missing("imageio_ffmpeg._io") == "pip install 'dipole[train]'"
    assert cli.missing("rich.table") == "pip install --upgrade dipole"
    assert cli.missing("a_typo_of_ours") == "" and cli.missing(None) == ""


def test_of_the_extras_that_have_a_module_the_verbs_own_is_named(monkeypatch):
    """An installed package lists an extra's extras one by one; hydra is hydra-core on PyPI."""
    extras = {"all": ["hydra-core", "msgpack", "mujoco", "ruckig"], "client": ["msgpack"], "command": ["hydra-core"],
              "deploy": ["hydra-core", "msgpack", "ruckig"], "sim": ["hydra-core", "msgpack", "mujoco"]}
    requires = [f'{need}>=1; extra == "{extra}"' for extra, needs in extras.items() for need in needs]
    monkeypatch.setattr(cli.importlib.metadata, "requires", lambda name: requires)
    lines = {module: (cli.missing(module, "deploy"), cli.missing(module, "train")) for module in ("hydra.utils", "msgpack", "ruckig", "mujoco")}
    deploy, everything, sim = (f"pip install 'dipole[{extra}]'" for extra in ("deploy", "all", "sim"))
    assert lines == {"hydra.utils": (deploy, everything), "msgpack": (deploy, everything), "ruckig": (deploy, everything), "mujoco": (sim, sim)}


@pytest.mark.parametrize("module", ["hydra", "ruckig"])
def test_a_verb_without_its_extra_ends_in_one_line(module):
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv = ['dipole', 'deploy', 'robot=gantry']; from scripts import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"dipole deploy needs {module}, which is not installed: pip install 'dipole[deploy]'\n"


def test_a_driver_without_its_extra_ends_in_one_line():
    """Two imports deep: hydra's own words for it are three lines and no advice."""
    code = ("import sys; sys.modules['franky'] = None; sys.argv = ['dipole', 'deploy', 'robot=franka', 'robot.driver.host=127.0.0.1', 'url=ws://127.0.0.1:1']; "
            "from scripts import cli; cli.main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: the Franka driver needs franky: pip install 'dipole[franka]'\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    """`dipole serve --help | head -1`: the pipe is closed before anything is written."""
    ours = subprocess.Popen([sys.executable, "-m", "scripts.cli", "serve", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ours.stdout.close()
    said = ours.stderr.read()
    assert ours.wait() == 141 and not said

"""How a verb starts: hydra composes its configuration, and what the user got wrong ends in one line that says what to do.

A mistake is an exception our code raises on purpose (ValueError, KeyError, OSError, …) or one of hydra's. Anything else is a bug and keeps
its traceback; HYDRA_FULL_ERROR=1 shows the traceback of mistakes too.
"""
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from policy.serve.robot import DriverError
from scripts import sweep
from scripts.cli import ends_at_once, missing

FULL = "HYDRA_FULL_ERROR"
EXTRAS = {"joblib": "sweep", "submitit": "slurm", "ray": "ray"}  # of pyproject.toml, by hydra's launcher
MISTAKES = (DriverError, ValueError, KeyError, OSError, NotImplementedError, HydraException, OmegaConfBaseException)


def verb(name: str, of_run: Sequence[str] = ()) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`@verb("train")` makes main(cfg) a command configured by conf/train.yaml. A mistake: `error: …` on stderr, exit code 1.

    of_run: nodes whose settings are known only with the run's own configuration, which main (common.of_run) holds them to; hydra lets them pass.

    With -m it is a sweep (scripts/sweep.py): what main returns, a dict or None, is the job's row in the table.
    """
    def wrap(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        compose = hydra.main(version_base=None, config_path="pkg://conf", config_name=name)
        composing = ExitStack()

        @functools.wraps(main)
        def quiet(cfg: DictConfig) -> None:
            composing.close()
            try:
                main(cfg)
            except Exception as e:
                if not (text := said(e, name)):
                    raise
                raise SystemExit(text) from None

        @functools.wraps(main)
        def job(cfg: DictConfig) -> None:
            sweep.recorded(lambda: main(cfg), lambda e: said(e, name), resume=bool(cfg.get("resume")))

        @functools.wraps(main)
        def start() -> None:
            full = os.environ.get(FULL) == "1"
            os.environ[FULL] = "1"  # hydra raises; otherwise it prints, and its advice on a misspelt key is to add it
            sys.argv[1:] = [f"++{arg}" if arg.startswith(tuple(f"{node}." for node in of_run)) else arg for arg in sys.argv[1:]]
            with sweep.table(folder := sweep.asked(name, sys.argv[1:])):
                try:
                    if not folder and not full:
                        composing.enter_context(ends_at_once())
                    compose(job if folder else main if full else quiet)()
                except HydraException as e:
                    if full or not (text := told(e, name)):
                        raise
                    raise SystemExit(f"error: {text}") from None
                except KeyboardInterrupt:
                    raise SystemExit(130) from None
                except Exception as e:
                    if full or not folder:  # the jobs of a sweep record theirs
                        raise
                    raise SystemExit(f"error: the launcher gave up: {first_lines(e)}. {FULL}=1 shows where") from None
                finally:
                    if not full:
                        del os.environ[FULL]
        return start
    return wrap


def said(e: Exception, name: str) -> str:
    """The last line of a command that ends with this exception; '' when it is a bug."""
    if isinstance(e, ImportError):
        line = missing(e.name, name)
        return f"dipole {shown(name)} needs {e.name}, which is not installed: {line}" if line else f"error: {e}" if "pip install" in str(e) else ""
    return f"error: {text}" if isinstance(e, MISTAKES) and (text := told(e, name)) else ""


def told(e: BaseException, name: str) -> str:
    """What to tell the user of verb `name` about a mistake; '' when it is a bug after all."""
    if isinstance(e, InstantiationException) and e.__cause__ is not None:  # a class refused its arguments
        cause = e.__cause__
        for reason in reversed(list(causes(e))):  # the innermost knows what is missing, the one around it perhaps which extra has it
            if isinstance(reason, ImportError) and (line := missing(reason.name, name)):
                return f"{reason.name} is not installed: {line}"
            if isinstance(reason, ImportError) and "pip install" in str(reason):
                return str(reason)
        if isinstance(cause, MISTAKES):
            return told(cause, name)
        return " ".join(first_lines(e).split()) if isinstance(cause, TypeError | ImportError | AttributeError) else ""
    if isinstance(e, MissingMandatoryValue):
        return f"{e.full_key} has no value: add {e.full_key}=…; `dipole {shown(name)} --help` shows commands"
    if launcher := re.search(r"Could not find 'hydra/launcher/(joblib|submitit|ray)", str(e)):
        return f"there is no launcher {launcher[1]} yet: pip install 'dipole[{EXTRAS[launcher[1]]}]'"
    if absent := re.search(r"Could not find '([\w/]+)/([^/']+)'\s+Available options in '.*?':\s*(.*)", str(e), re.DOTALL):
        return no_choice(absent[1], absent[2], absent[3].split("\nConfig search path")[0].split())
    if unknown := re.match(r"Could not override '([^']+)'", str(e)):
        return no_setting(unknown[1], name)
    if isinstance(e, KeyError) and not isinstance(e, OmegaConfBaseException) and e.args:
        return str(e.args[0])  # str() of a KeyError is quoted
    return first_lines(e)


def causes(e: BaseException) -> Iterator[BaseException]:
    while e.__cause__ is not None:
        yield (e := e.__cause__)


def shown(name: str) -> str:
    """A configuration's name as its command is typed: data_convert -> data convert."""
    return name.replace("data_", "data ")


def first_lines(e: BaseException) -> str:
    """The message without what hydra and omegaconf add about themselves."""
    return re.split(r"\n(?:Config search path:|\s*full_key: |See https://hydra)", str(e))[0].strip() or type(e).__name__


def no_choice(group: str, choice: str, known: Sequence[str]) -> str:
    """What a group has instead of a misspelt choice."""
    close = difflib.get_close_matches(choice, known, n=1)
    return f"there is no {group}={choice}. " + (f"Did you mean {group}={close[0]}? " if close else "") + f"Known: {', '.join(known)}"


def no_setting(key: str, name: str) -> str:
    """The settings closest to a misspelt one."""
    if key == "do":
        return f"`dipole {name}` takes settings only, written key=value; `dipole {name} --help` shows commands"
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("conf", version_base=None):
        plain: Any = OmegaConf.to_container(hydra.compose(name, return_hydra_config=True))
    known = [*settings({k: v for k, v in plain.items() if k != "hydra"}), *plain["hydra"]["runtime"]["choices"]]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.9) or difflib.get_close_matches(key, known, n=2)  # a slip of one letter is no riddle
    parent = OmegaConf.select(OmegaConf.create(plain), key.rpartition(".")[0]) if "." in key else None
    return (f"there is no setting {key!r}. " + (f"Did you mean {' or '.join(close)}? " if close else "") +
            (f"An argument of its class that conf/ leaves out is added with +{key}=…. " if isinstance(parent, DictConfig) and "_target_" in parent else "") +
            f"`dipole {shown(name)} --help` lists all")


def settings(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below node."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield prefix + key
        yield from settings(value, f"{prefix}{key}.")

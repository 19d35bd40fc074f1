"""What was typed, and whether it can be: no torch here, for verbs that do without."""
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def overrides() -> list[str]:
    """What was typed; scripts.verb lets hydra take a setting that only the run's own configuration has, by ++."""
    return [o.removeprefix("++") for o in HydraConfig.get().overrides.task]


def key_of(override: str) -> str:
    """The configuration's node an override is about: `+net.widths=[8]` -> net."""
    return override.lstrip("+~").split("=")[0].split(".")[0].split("/")[0].split("@")[0]


def command() -> str:
    """What to type to do this again, from the same folder; `dipole eval` and `python scripts/eval.py` are the same."""
    return shlex.join(["dipole", str(HydraConfig.get().job.config_name), *(re.sub(r"='([\w./+-]+)'$", r"=\1", o) for o in overrides())])


def whole(least: int, **settings: Any) -> None:
    """ValueError when one of the settings {name: value} is no whole number from `least`."""
    if wrong := [f"{name}={value!r}" for name, value in settings.items() if type(value) is not int or value < least]:
        raise ValueError(f"{wrong[0]} must be a whole number from {least}")


def number(least: float, **settings: Any) -> None:
    """ValueError when one of the settings is no finite number from `least`."""
    if wrong := [f"{name}={value!r}" for name, value in settings.items() if type(value) not in (int, float) or not least <= value < math.inf]:
        raise ValueError(f"{wrong[0]} must be a number from {least:g}")


def listed(value: Any) -> list[Any]:
    """A bare word or number is a list of one: `drop=3` is `drop=[3]`; nothing is none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def truth(**settings: Any) -> None:
    """ValueError when one of the settings is neither true nor false: hydra makes text of `no`, which counts as true."""
    if wrong := [f"{name}={value}" for name, value in settings.items() if type(value) is not bool]:
        raise ValueError(f"{wrong[0]} must be true or false")


@contextmanager
def stopped(say: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM inside, where it is a SystemExit, end with one line on stderr: what was kept."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(say(), file=sys.stderr)
        raise

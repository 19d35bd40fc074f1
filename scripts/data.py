"""Look after a dataset: dipole data info, convert, validate, merge, split, trim, stats, view."""
import ast
import importlib
import sys
from pathlib import Path

from scripts.cli import words_to_overrides

# Each is scripts/data_<task>.py, a function `start` configured by conf/data_<task>.yaml, and is imported when it is asked for.
TASKS = ("info", "convert", "merge", "split", "trim", "stats", "validate", "view")


def main() -> None:
    if sys.argv[1:] in (["--help"], ["-h"], []):
        return print(usage(), end="")
    asked = [arg[3:] for arg in sys.argv[1:] if arg.startswith("do=")]
    task = asked[-1] if asked else "info"
    if task not in TASKS:
        raise SystemExit(f"error: dipole data {task} is unknown; use one of: {', '.join(f'dipole data {t}' for t in TASKS)}")
    sys.argv[1:] = [arg for arg in sys.argv[1:] if not arg.startswith("do=")]
    sys.argv[0] = f"dipole data {task}" if asked else "dipole data"
    importlib.import_module(f"scripts.data_{task}").start()


def usage() -> str:
    """The tasks, each with the first line of its module, which is read and not imported."""
    said = {t: ast.get_docstring(ast.parse(Path(__file__).with_name(f"data_{t}.py").read_text(encoding="utf-8"))) or "" for t in TASKS}
    return "dipole data <task> [key=value ...]\n\n" + "".join(f"  dipole data {t:<9} {text.partition(chr(10))[0]}\n" for t, text in said.items()) \
        + "\n  dipole data <task> --help   its settings and three commands to copy\n"


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

"""`dipole <verb> [key=value ...]`: runs scripts/<verb>.py.

A verb is a file in this folder with a function `main`; its line in the list is the first line of its docstring. Both are read with ast,
so the list costs no torch import and a new verb is one new file.
"""
import ast
import difflib
import importlib
import importlib.metadata
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).parent
TAKES_VALUE = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
               "--experimental-rerun", "--info", "-i"}  # hydra's options whose next word is not ours
TAKES_FOLDERS = {"compare": "runs"}  # tasks whose further bare words are this list
PARTS = ("command", "policy", "client")  # extras that others are made of
OWN_EXTRA = ("serve", "deploy", "export")  # verbs with an extra of their own in pyproject.toml; the others want all
IMPORTED_AS = {"hydra": "hydra-core", "omegaconf": "hydra-core"}  # modules of packages with another name
LAUNCHERS = {"slurm": "submitit_slurm", "local": "submitit_local"}


def verbs(folder: Path = HERE) -> dict[str, str]:
    """{verb: what it does in one line}, without importing any of them."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.stem != "cli" and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def words_to_overrides(argv: list[str]) -> list[str]:
    """`info path=x` -> `do=info path=x`: a bare word names the task within the verb. `compare a b` -> `do=compare runs=['a','b']`.

    `dipole` does it to sys.argv, and so does each verb's `__main__` block, so that `python scripts/data.py info` is the same command:
    `sys.argv[1:] = words_to_overrides(sys.argv[1:])`. Raises SystemExit on a second bare word, which hydra would refuse with a riddle.
    """
    out: list[str] = []
    words: list[str] = []
    for i, arg in enumerate(argv):
        folders = bool(words) and words[0] in TAKES_FOLDERS
        bare = arg and not arg.startswith(("-", "~")) and (i == 0 or argv[i - 1] not in TAKES_VALUE) \
            and ("=" not in arg or (folders and is_path(arg)))
        if bare:
            words.append(arg)
        if not (bare and folders):
            out.append(f"do={arg}" if bare else quoted(arg))
    if words and words[0] in TAKES_FOLDERS:
        return [*out, f"{TAKES_FOLDERS[words[0]]}=[{','.join(map(in_quotes, words[1:]))}]"]
    if len(words) > 1:
        raise SystemExit(f"dipole: one bare word at most, got {' and '.join(map(repr, words))}. "
                         f"Settings are written key=value, like {words[-1]}=…")
    return out


def is_path(arg: str) -> bool:
    """Whether `a/policy-sampler=heun` is the folder of an evaluation, not a setting."""
    before = arg.partition("=")[0]
    return Path(arg).exists() or ("/" in before and not before.startswith("hydra/"))


def quoted(arg: str) -> str:
    """`path=rün` -> `path='rün'`: hydra's grammar of plain values knows ASCII only. `hydra.launcher=slurm` -> `hydra/launcher=submitit_slurm`.
    `data=[{path: a.zarr, weight: 3}]` -> `data.path=[…]`.
    """
    key, equals, value = arg.partition("=")
    if key == "data" and value.startswith("["):  # of datasets; hydra would look for several files in conf/data
        key, arg = "data.path", f"data.path={value}"
    if key in ("hydra.launcher", "hydra/launcher"):
        return f"hydra/launcher={LAUNCHERS.get(value, value)}"
    plain = value.isascii() or arg.startswith("-") or value[:1] in "'\"[{"
    return arg if plain else key + equals + in_quotes(value)


def in_quotes(value: str) -> str:
    return "'" + value.replace("'", "\\'") + "'"


def usage() -> str:
    known = verbs()
    width = max(map(len, known), default=0)
    lines = "\n".join(f"  {verb:<{width}}  {line}" for verb, line in known.items())
    return f"""dipole <verb> [key=value ...]

{lines}

  dipole demo              from nothing to a moving robot and a report
  dipole <verb> --help     its settings and three commands to copy
  dipole --version
"""


def missing(module: str | None, verb: str = "") -> str:
    """The pip line for a module that a verb could not import, or '' when it is none of ours."""
    name = re.sub(r"[-_.]+", "-", (module or "").partition(".")[0]).lower()
    name, extras = IMPORTED_AS.get(name, name), dict[str, set[str]]()
    for need in importlib.metadata.requires("dipole") or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", need)
        extras.setdefault(extra[1] if extra else "", set()).add(re.match(r"[\w-]+", need)[0].lower())  # type: ignore[index]
    found = [extra for extra, needs in extras.items() if name in needs]
    if "" in found or not found:
        return "pip install --upgrade dipole" if found else ""
    own = min(found, key=lambda extra: len(extras[extra]))  # the one that is meant; others include it
    return f"pip install 'dipole[{verb if verb in OWN_EXTRA and verb in found else 'all' if own in (*PARTS, *OWN_EXTRA) else own}]'"


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Ctrl-C inside ends the process quietly: where there is nothing to clean up yet, and libraries make riddles of a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    verb, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb in ("--help", "-h", "help"):
        return print(usage(), end="")
    if verb == "--version":
        return print("dipole", importlib.metadata.version("dipole"))
    with ends_at_once():
        known = verbs()
    if verb not in known:
        close = difflib.get_close_matches(verb, known, n=1)
        hint = f"Did you mean `dipole {close[0]}`?" if close else f"Known: {', '.join(known)}."
        print(f"dipole: no verb {verb!r}. {hint} `dipole --help` explains them.", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"dipole {verb}", *words_to_overrides(rest)]
    sys.path.append(str(Path.cwd()))  # last, so that it hides nothing: modules of one's own that trust=[…] names
    try:
        with ends_at_once():
            module = importlib.import_module(f"scripts.{verb}")
    except ImportError as error:
        if not (line := missing(error.name, verb)):
            raise
        raise SystemExit(f"dipole {verb} needs {(error.name or '').partition('.')[0]}, which is not installed: {line}") from error
    try:
        module.main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        if not closed(sys.stdout):
            raise
        raise SystemExit(141) from None  # what a shell makes of SIGPIPE


def closed(out: TextIO) -> bool:
    """Whether nobody reads this pipe any more; then it leads to nowhere from now on, so that the interpreter's own last flush says nothing."""
    poll = select.poll()
    poll.register(out.fileno(), 0)
    if gone := any(event & select.POLLERR for _, event in poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return gone


if __name__ == "__main__":
    main()

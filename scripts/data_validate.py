"""What is wrong with a dataset, before training finds out: dipole data validate path=demos/gantry.zarr."""
import json
import math
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policy.data.checks.finding import SEVERITIES, Finding, some
from policy.data.convert import convert, detect
from policy.data.files import DataError, Files, Url, where
from policy.data.validate import Report, validate
from policy.data.validate_page import write_page
from policy.page import counted, save_json
from policy.train.log import bar, console
from scripts.settings import number, plain, truth, whole
from scripts.verb import verb

PATIENCE = 2.0  # seconds after which a bar shows


@verb("data_validate")
def start(cfg: DictConfig) -> None:
    d = plain(cfg)
    possible(d)
    path, out, strict = where(d.pop("path")), d.pop("out"), d.pop("strict")
    with ExitStack() as stack:
        store = opened(path, d.pop("format"), d.pop("mapping"), d["fps"], stack, d["missing"])
        called = "" if store == path else str(path.with_suffix(".zarr"))
        report = checked(store, image_bytes=1e9 * d.pop("images"), called=called, **d)
        folder = Path(out or f"{beside(path)}.validate")
        folder.mkdir(parents=True, exist_ok=True)
        page = write_page(report, folder / "validate.html")
        save_json(folder / "findings.json", json.loads(json.dumps(report.to_json(), default=float)))
    console.print("\n".join([*told(report), f"report: {page}"]), highlight=False, soft_wrap=True, markup=False)
    raise SystemExit(report.exit_code(strict=strict))


def possible(d: dict[str, Any]) -> None:
    """ValueError names the setting that cannot be."""
    truth(strict=d["strict"])
    whole(1, horizon=d["horizon"])
    whole(0, seed=d["seed"])
    number(0, val_ratio=d["val_ratio"], **{} if d["images"] == math.inf else {"images": d["images"]})
    if d["val_ratio"] >= 1:
        raise ValueError(f"val_ratio={d['val_ratio']} is a share of the episodes: from 0, below 1")
    if d["fps"] is not None:
        number(0, fps=d["fps"])
        if not d["fps"]:
            raise ValueError("fps=0 is no rate; say it in Hz, or leave it out")
    if not isinstance(d["skip"], list):
        raise ValueError(f"skip={d['skip']} must be a list: skip=[{d['skip']}]")


def opened(path: Path, format: str | None, mapping: str | None, fps: float | None, stack: ExitStack, missing: str = "error") -> Path:
    """A store: path itself, or a copy of another format that lives until the stack is closed."""
    if isinstance(path, Url):
        return path
    if not path.exists():
        raise DataError(f"{path} does not exist. Check path=…")
    if not format and is_zarr(path):
        return path
    name = format or detect(path)
    dst = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dipole-validate-"))) / path.with_suffix(".zarr").name
    done = convert(path, dst, format=name, mapping=mapping, fps=fps, missing=missing)
    console.print("\n".join([f"{name}, looked at as dipole data convert src={path} dst={path.with_suffix('.zarr')} would make it",
                             *(f"note: {note}" for note in done.notes)]), highlight=False, soft_wrap=True, markup=False)
    return dst


def beside(path: Path) -> str:
    """What a file that is written about a dataset is called, without its ending: next to it, or here when it is behind a URL."""
    return path.name if isinstance(path, Url) else str(path)


def is_zarr(path: Path) -> bool:
    try:
        return bool(Files(path).format)
    except DataError:
        return False


def checked(path: Path, **how: Any) -> Report:
    """With a bar where it takes long."""
    begin, progress = time.perf_counter(), bar()
    progress.live.transient = True
    task = progress.add_task("check", total=None, note="")

    def tell(name: str, done: int, of: int) -> None:
        progress.update(task, completed=done, total=of, note=name)
        if time.perf_counter() - begin > PATIENCE:
            progress.start()
    try:
        return validate(path, progress=tell, **how)
    finally:
        progress.stop()


def told(report: Report) -> list[str]:
    """What to print: each finding with where, why and what to do; a line of totals."""
    facts = report.facts
    looked = "".join(f"; {100 * share:.0f} % of {key} looked at" for key, share in facts.get("images_looked_at", {}).items() if share < 1)
    size = f"{counted(facts['episodes'], 'episode')}, {counted(facts['steps'], 'step')}" if facts else "cannot be read"
    head = [f"{report.path}: {size}, checked in {report.seconds:.1f} s{looked}"]
    if action := facts.get("action"):
        head.append(f"actions look {action['looks']} (declared: {action['declared']}) and go best with the state {counted(action['lag'], 'step')} later, "
                    f"correlation {action['correlation']:.2f}")
    totals = ", ".join(counted(report.count(s), s) for s in SEVERITIES)
    return [*head, *(line for f in report.findings for line in ["", *lines(f)]), "", totals]


def lines(f: Finding) -> list[str]:
    out = [f"{f.severity:<8} {f.code}  {f.where}".rstrip(), f"         {f.text}"]
    out += [f"    at   {some(f.places, 3)}"] if f.places else []
    return [*out, f"    why  {f.why}", f"    fix  {f.fix}"]

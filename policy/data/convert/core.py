"""Another format into the store, episode by episode, and a store into another format. `dipole data convert` is this on the command line."""
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from policy.data.building import Filler, beside, free
from policy.data.convert.keep import write_keep
from policy.data.convert.mapping import Rules
from policy.data.convert.plan import Plan
from policy.data.convert.source import Source
from policy.data.convert.store import detects as is_store
from policy.data.convert.unknown import why
from policy.data.files import DataError, Url, where
from policy.data.store import Store

FORMATS = ("robomimic", "aloha", "d4rl", "minari", "npz", "store", "lerobot", "rosbag", "diffusion_policy")
# Modules of this package; the first line of each says what it looks for.
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".joblib")
Progress = Callable[[int, int, int], None]  # episodes done, of how many, steps done


@dataclass(frozen=True)
class Converted:
    """What convert did.   keys {source name: stored name}; notes: what was left out and why."""
    path: Path
    format: str
    episodes: int
    steps: int
    keys: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def module(name: str) -> ModuleType:
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        raise ValueError(f"format={name!r} is unknown. " + (f"Did you mean {close[0]}? " if close else "") + f"Known: {', '.join(FORMATS)}")
    return importlib.import_module(f"policy.data.convert.{name}")


def detect(path: Path | str) -> str:
    """The one format that path is.   DataError says what was looked for when there is none, and which when there are several."""
    path = _here(path)
    if path.suffix in PICKLED:
        raise DataError(f"{path} is pickled, and unpickling a file runs whatever program it holds, so dipole does not. Load it where you trust it and save "
                        "its arrays with numpy.savez (observations, actions, episode_ends), then convert that")
    if path.is_file() and not path.stat().st_size:
        raise DataError(why(path))
    found = [name for name in FORMATS if module(name).detects(path)]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{path} can be read as {' and as '.join(found)}: say which with format=…")
    if known := why(path):
        raise DataError(known)
    looked = "".join(f"\n  {name}: {(module(name).__doc__ or '').partition(chr(10))[0]}" for name in FORMATS)
    raise DataError(f"{path} is no format that is known here. Looked for:{looked}")


def open_source(path: Path | str, format: str | None = None, *, fps: float | None = None, missing: str = "error", skip: Sequence[str] = (),
                **options: Any) -> Source:
    """A foreign dataset, read only as far as to know what is in it.   options: of the format's `read`, ValueError for others.

    fps: the rate to lay it on [Hz], for a format without steps of its own.   missing: error or zeros, for zarr, see Store.open.
    skip: patterns of names that will not be used, which a format may then have with other numbers of rows.
    """
    name = format or detect(path)
    reader, path = module(name), _here(path)
    if fps and "fps" in inspect.signature(reader.read).parameters:
        options = {"fps": fps, **options}
    if skip and "skip" in inspect.signature(reader.read).parameters:
        options = {"skip": skip, **options}
    if missing != "error":
        options = {"missing": missing, **options}
    return reader.read(path, **_allowed(name, reader.read, options))


def _here(path: Path | str) -> Path:
    """The path, when there is something at it. Of what lies behind a URL only a store can be read."""
    path = where(path)
    if isinstance(path, Url) and not is_store(path):
        raise DataError(f"{path} is not a store of dipole; other formats are read from this computer's disk. Download it first")
    if not isinstance(path, Url) and not path.exists():
        raise DataError(f"{path} does not exist. Check src=…")
    return path


def _allowed(name: str, function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """options, or ValueError for one that function does not take."""
    known = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"format {name} has no option {unknown[0]!r}" + (f"; it has {', '.join(known)}" if known else "; it has none"))
    return dict(options)


def convert(src: Path | str, dst: Path | str, *, mapping: Rules | Mapping[str, Any] | Path | str | None = None, missing: str = "error",
            progress: Progress | None = None, **entries: Any) -> Converted:
    """src in another format -> a store at dst; or, where src is a store, dst in another format (`format`, by default the one it came from).

    mapping and entries: see policy.data.convert.mapping; entries (fps=20, keys={…}) win.   missing: zeros reads the
    chunks of zeros that a zarr writer left out, see Store.open.   dst appears when it is complete, and is never overwritten.
    """
    src, dst, rules = where(src), free(dst, src), Rules.of(mapping).but(**entries)
    if is_store(src) and not (rules.format and module(rules.format).detects(src)):
        return _back(src, dst, rules, missing)
    source = open_source(src, rules.format, **{"fps": rules.fps, "missing": missing, "skip": rules.skip, **rules.options})
    plan = Plan.of(source, rules)
    with beside(dst) as part:
        store = Store.create(part, plan.schema, fps=plan.fps, units=plan.units, action_semantics=plan.semantics.text or None, attrs=plan.attrs,
                             video=rules.video)
        _fill(store, source, plan, progress)
        write_keep(part, plan.keep())
        return Converted(dst, source.format, store.episodes, store.steps, plan.names, tuple([*source.notes, *plan.notes]))


def _back(src: Path, dst: Path, rules: Rules, missing: str) -> Converted:
    store = Store.open(src, missing=missing)
    name = rules.format or (store.attrs.get("source") or {}).get("format")
    if not name:
        raise DataError(f"{src} is a store of dipole already. To write it in another format name that: format=… ({', '.join(writers())}); "
                        "format=store makes a new one with other names or another rate")
    if name not in writers():
        raise DataError(f"{name} is read but not written. Write one of: format=… ({', '.join(writers())})")
    with beside(dst) as part:
        notes = module(name).write(store, part, **_allowed(name, module(name).write, rules.options)) or ()
    return Converted(dst, name, store.episodes, store.steps, {}, tuple(notes))


def writers() -> list[str]:
    return [name for name in FORMATS if hasattr(module(name), "write")]


def _fill(store: Store, source: Source, plan: Plan, progress: Progress | None) -> None:
    filler = Filler(store)
    for i, episode in enumerate(source.episodes()):
        stored = plan.episode(episode, i)
        if stored is not None:
            filler.add(stored)
        if progress:
            progress(i + 1, source.count, filler.steps)
    filler.flush()
    if not store.episodes:
        raise DataError(f"{source.path} holds no episode with a step in it, so there is nothing to convert")

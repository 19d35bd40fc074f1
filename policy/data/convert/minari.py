"""Minari: a local dataset's folder, with data/metadata.json and data/main_data.hdf5 (or these two themselves).

Observations have one frame more than there are actions: the store has those a policy acts on, the last of each episode is kept. Dictionary and tuple
spaces become one key for each leaf, discrete ones whole numbers. JPEG images are decoded, and written back as plain arrays. Text is kept, not stored.
What only a store says is written into the attribute `dipole` of the HDF5 file, see own.py.
"""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import h5
from policy.data.convert.back import Origin, observed
from policy.data.convert.own import NAME, dump, load
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.store import Schema, Store

FILE, META = "main_data.hdf5", "metadata.json"
LAYOUT = "0.5.4"  # of the Minari whose files ours look like
OUTCOMES = ("rewards", "terminations", "truncations")


def detects(path: Path) -> bool:
    folder = _folder(path)
    return folder is not None and (folder / META).is_file()


def read(path: Path) -> Source:
    folder = _folder(path)
    if folder is None:
        raise DataError(f"{path} is no Minari dataset: it has no data/{META}. Point src=… at the folder of one version, "
                        "such as ~/.minari/datasets/D4RL/door/human-v2")
    try:
        meta = json.loads(text := (folder / META).read_text(encoding="utf-8"))
        if not isinstance(meta, dict):
            raise ValueError(f"it holds a {type(meta).__name__}, not {{name: value}}")
    except (ValueError, RecursionError) as e:
        raise DataError(f"{folder / META} is not JSON as Minari writes it ({e}). Copy it again from its source") from e
    if meta.get("data_format", "hdf5") != "hdf5" or not (folder / FILE).is_file():
        raise DataError(f"{folder} is in Minari's format {meta.get('data_format')!r}; hdf5 is read. "
                        "Copy it into one with minari.create_dataset_from_buffers(…, data_format='hdf5')")
    with h5.opened(folder / FILE) as f:
        names = sorted(f, key=lambda n: int(n.rpartition("_")[2]) if n.rpartition("_")[2].isdigit() else -1)
        if not names:
            raise DataError(f"{folder / FILE} holds no episode")
        schema, longer, each = _episodes(f, names)
        first = f[names[0]]
        keep = {"metadata": text, "longer": longer, "episodes": each, "attrs": (said := h5.attrs_of(f)), "jpeg": [k for k in schema if h5.jpeg(first[k])],
                "filters": {k: how for k in schema if (how := h5.filters(first[k]))}}
    acting = [k for k in schema if k == "actions" or k.startswith("actions/")]
    one = acting[0] if acting == ["actions"] else None
    left = sorted({k for e in each for k in e["arrays"]})
    notes = [f"not one row a step, so kept but no keys: {', '.join(left)}"] if left else []
    own = load(said.get(NAME), notes)
    return Source(path, "minari", schema, lambda: _stream(folder / FILE, names, list(schema)), len(names), fps=own.fps, units=own.units, action=one,
                  action_from=None if one else acting or None, semantics=own.semantics, attrs=own.attrs(meta.get("dataset_id") or path.name), obs=own.obs,
                  beside=left, names=own.keys, notes=notes, keep=keep)


def write(store: Store, path: Path) -> list[str]:
    origin = Origin.of(store, "minari", obs="infos/", action="actions")
    if not origin.came:
        _named(origin)
    longer = set(origin.keep.get("longer", [k for k in origin.schema if k.split("/")[0] == "observations"]))
    data, repeated = path / "data", 0
    data.mkdir(parents=True)
    with h5.h5py().File(data / FILE, "w", track_order=True) as f:
        h5.set_attrs(f, origin.keep.get("attrs", {}) if origin.came else {NAME: dump(origin, made=OUTCOMES)})
        for i in range(store.episodes):
            said, group = origin.of_episode(i), f.create_group(f"episode_{i}")
            last = said.get("final", {})
            repeated += bool(longer - set(last))
            episode = origin.episode(i)
            n = len(next(iter(episode.values())))
            for key, x in {**episode, **({} if origin.came else _outcomes(episode, n))}.items():
                full = np.concatenate([x, np.asarray(last.get(key, x[-1]))[None]]) if key in longer else x
                group.create_dataset(key, data=full, chunks=True, maxshape=(None, *full.shape[1:]), **origin.keep.get("filters", {}).get(key, {}))
            attrs = said.get("attrs", {"total_steps": np.int64(n), "id": np.int64(i)})
            h5.write_rest(group, {**said, "attrs": {**attrs, **{k: type(attrs[k])(v) for k, v in (("id", i), ("total_steps", n)) if k in attrs}}})
    (data / META).write_text(_metadata(origin), encoding="utf-8")
    notes = [f"{repeated} episodes have no last observation: their last is repeated"] if repeated else []
    return origin.notes + notes + ([f"{', '.join(jpeg)}: JPEG in the source, plain arrays now"] if (jpeg := origin.keep.get("jpeg")) else [])


def _folder(path: Path) -> Path | None:
    places = [path.parent if path.name == FILE else path, path / "data"]
    return next((p for p in places if p.is_dir() and ((p / FILE).is_file() or _json_of(p / META).get("data_format"))), None)


def _json_of(file: Path) -> dict[str, Any]:
    return h5.said(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else {}


def _episodes(f: Any, names: list[str]) -> tuple[Schema, list[str], list[dict[str, Any]]]:
    """Keys with one row an action; those of them with one row more; what else each episode says."""
    schema: Schema = {}
    longer: list[str] = []
    each = []
    for name in names:
        found = dict(h5.leaves(f[name]))
        if "rewards" not in found:
            raise DataError(f"{f.filename}: {name} has no rewards, so its steps cannot be counted. Is it an episode?")
        n = len(found["rewards"])
        rows: Schema = {k: h5.frame(d) for k, d in found.items() if (h5.jpeg(d) or h5.numbers(d)) and d.shape[:1] in ((n,), (n + 1,))}
        more = [k for k in rows if len(found[k]) == n + 1]
        schema, longer = schema or rows, longer if schema else more
        if (rows, more) != (schema, longer):
            mine, theirs = ({k: (*v, "and a last one" if k in m else "") for k, v in r.items()} for r, m in ((rows, more), (schema, longer)))
            raise h5.differs(f.filename, mine, name, theirs, names[0])
        each.append({"final": {k: h5.rows(found[k], n, n + 1)[0] for k in more}, **h5.rest(f[name], found, rows)})
    return schema, longer, each


def _stream(file: Path, names: list[str], keys: list[str]) -> Iterator[Episode]:
    with h5.opened(file) as f:
        for name in names:
            n = len(f[name]["rewards"])
            yield {k: h5.rows(f[name][k], 0, n) for k in keys}


def _named(origin: Origin) -> None:
    """A store from elsewhere: what a policy observes are its observations, the rest infos."""
    seen, names = [k for k in observed(origin.store) if k != "action"], origin.names
    for key in list(names):
        if key in seen:
            names[key] = "observations" if len(seen) == 1 else f"observations/{key}"
        elif key in ("reward", "rewards"):
            names[key] = "rewards"
    origin.schema = {names[k]: v for k, v in origin.store.schema.items() if k in names}


def _outcomes(episode: Episode, n: int) -> Episode:
    """Rewards and ends where the store has none: an episode is cut off after its last step."""
    last = np.arange(n) == n - 1
    return {k: v for k, v in {"rewards": np.zeros(n, np.float32), "terminations": np.zeros(n, bool), "truncations": last}.items() if k not in episode}


def _metadata(origin: Origin) -> str:
    counts = {"total_episodes": origin.store.episodes, "total_steps": origin.store.steps}
    if origin.came:
        text = str(origin.keep["metadata"])
        meta = json.loads(text)
        changed = {**counts, **({"jpeg_encoding": False} if origin.keep.get("jpeg") else {})}
        return text if all(meta.get(k) == v for k, v in changed.items()) else json.dumps({**meta, **changed})
    seen = {k: _space(*v) for k, v in origin.schema.items() if k.split("/")[0] == "observations"}
    spaces = seen.get("observations") or {"type": "Dict", "subspaces": {k.partition("/")[2]: v for k, v in seen.items()}}
    return json.dumps({**counts, "data_format": "hdf5", "jpeg_encoding": False, "minari_version": LAYOUT, "dataset_id": f"{_slug(origin.store)}-v0",
                       "observation_space": json.dumps(spaces), "action_space": json.dumps(_space(*origin.schema["actions"]))})


def _slug(store: Store) -> str:
    return "".join(c if c.isalnum() else "-" for c in str(store.attrs.get("task") or store.path.stem)).strip("-").lower() or "dataset"


def _space(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """A Box without bounds, or of all the numbers there are."""
    lo, hi = (-np.inf, np.inf) if dtype.kind == "f" else (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return {"type": "Box", "dtype": str(dtype), "shape": list(shape), "low": np.full(shape, lo).tolist(), "high": np.full(shape, hi).tolist()}

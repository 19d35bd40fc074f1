"""robomimic and robosuite: an HDF5 file (or the folder of a demo.hdf5) with data/demo_1/{states, actions, obs/…}.

Read: robomimic (obs/…, next_obs/…, actions, rewards, dones, states; masks; env_args), robosuite 1.0 (states, actions, joint_torques) and robosuite 0.3
(states; joint_velocities, gripper_actuations, right_dpos, right_dquat: there the action is joint velocities and gripper, the one that can be resampled).
robosuite's states are [time, qpos, qvel]; a policy observes all but the time. What has not one row a step (model_file, masks, attributes) is kept.
"""
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import h5
from policy.data.convert.back import Origin
from policy.data.convert.own import NAME, dump, load
from policy.data.convert.rows import Rows
from policy.data.convert.source import Episode, Source
from policy.data.files import DataError
from policy.data.semantics import Semantics
from policy.data.store import Schema, Store

COUNTS = ("actions", "states")  # keys with one row a step, by which an episode's length is told
PARTS = ("joint_velocities", "gripper_actuations")  # of robosuite 0.3


def detects(path: Path) -> bool:
    file = _file(path)
    if not h5.is_hdf5(file):
        return False
    with h5.opened(file) as f:
        return "data" in f and isinstance(f["data"], h5.h5py().Group) and any(re.match(r"demo_?\d", name) for name in f["data"])


def read(path: Path, *, mask: str | None = None, skip: Sequence[str] = ()) -> Source:
    """mask: name of a list of episodes below mask/, such as train; None reads all."""
    file = _file(path)
    notes: list[str] = []
    with h5.opened(file) as f:
        names = _named(f, mask)
        each, rows, said = _episodes(f, names, skip)
        schema = rows.schemas[0]
        head = h5.attrs_of(f["data"])
        others = [top for top in sorted(f) if top != "data"]
        keep = {"attrs": {"/": h5.attrs_of(f), "data": head, **{top: h5.attrs_of(f[top]) for top in others}}, "filters": _filters(f["data"][names[0]], schema),
                "arrays": {k: h5.whole(d) for top in others for k, d in _below(f, top)}, "episodes": each}
        notes += said + h5.left_out(each)
        own = load(head.get(NAME), notes)
        env = h5.said(head.get("env_args")) or h5.said(head.get("env_info"))
        clock = "states[0]" if "repository_version" in head and "states" in schema else None  # robosuite's own collector: [time, qpos, qvel]
        fps = _rate(env, f["data"][names[0]]["states"][:, 0] if clock else None)
    action, parts = ("actions", None) if "actions" in schema else (None, [p for p in PARTS if p in schema] or None)
    semantics = _semantics(env, schema["actions"][0]) if action else _old(schema, parts) if parts else Semantics()
    bare = clock and not any(k.startswith("obs/") for k in schema)
    return Source(file, "robomimic", schema, lambda: _stream(file, names, list(schema)), len(names), fps=own.fps or fps, units=own.units, action=action,
                  action_from=parts, semantics=own.semantics if own.said else semantics, clock=clock, keep=keep, notes=notes, beside=rows.beside,
                  attrs={"task": own.task or str(head.get("env") or env.get("env_name") or file.stem)},
                  obs={"states": {"key": "states", "take": list(range(1, schema["states"][0][0]))}} if bare else own.obs)


def write(store: Store, path: Path) -> list[str]:
    """As it came; a store from elsewhere as robomimic has it: data/demo_0/{actions, obs/…}, num_samples, total; and what only we say, see own.py."""
    origin = Origin.of(store, "robomimic", obs="obs/", action="actions")
    keep, how = origin.keep, origin.keep.get("filters", {})
    with h5.h5py().File(path, "w") as f:
        data = f.create_group("data")
        names, taken = [], set[str]()
        for i in range(store.episodes):
            said = origin.of_episode(i)
            name = said.get("name") or f"demo_{i}"
            while name in taken:
                name = f"demo_{int(name.rpartition('_')[2]) + store.episodes}"
            names.append(name)
            taken.add(name)
            demo = data.create_group(name)
            for key, x in origin.episode(i).items():
                last = said.get("final", {})
                demo.create_dataset(key, data=np.concatenate([x, last[key][None]]) if key in last else x, **how.get(key, {}))
            attrs = said.get("attrs", {"num_samples": np.int64(0)})
            counted = {"num_samples": type(attrs["num_samples"])(np.diff(store.span(i))[0])} if "num_samples" in attrs else {}
            h5.write_rest(demo, {**said, "attrs": {**attrs, **counted}})
        for where, value in keep.get("arrays", {}).items():
            h5.write_whole(f, where, _remaining(value, names) if where.startswith("mask/") else value)
        for where, attrs in keep.get("attrs", {}).items():
            h5.set_attrs(f.require_group(where), attrs)
        if "total" in data.attrs or not origin.came:
            data.attrs["total"] = np.int64(store.steps)
        if not origin.came:
            data.attrs["env_args"] = json.dumps({"env_name": str(store.attrs.get("task") or ""), "type": 2, "env_kwargs": {"control_freq": store.fps}})
            data.attrs[NAME] = dump(origin)
    return origin.notes


def _file(path: Path) -> Path:
    return path / "demo.hdf5" if path.is_dir() and (path / "demo.hdf5").is_file() else path


def _named(f: Any, mask: str | None) -> list[str]:
    names = sorted(f["data"], key=lambda n: (int(re.sub(r"\D", "", n) or -1), n))
    if mask is None:
        return names
    if "mask" not in f or mask not in f["mask"]:
        raise ValueError(f"{f.filename} has no mask {mask!r} (known: {', '.join(f['mask']) if 'mask' in f else 'none'})")
    chosen = {n.decode() if isinstance(n, bytes) else str(n) for n in f["mask"][mask][()].tolist()}
    return [n for n in names if n in chosen]


def _episodes(f: Any, names: list[str], skip: Sequence[str]) -> tuple[list[dict[str, Any]], Rows, list[str]]:
    """What each episode says beside its rows; the keys with one row a step, which every episode must have alike; notes."""
    rows, each = Rows(skip), []
    for name in names:
        demo = f["data"][name]
        found = dict(h5.leaves(demo))
        count = next((found[k].shape[0] for k in COUNTS if k in found), None)
        if count is None:
            raise DataError(f"{f.filename}: data/{name} has neither {' nor '.join(COUNTS)}, so its steps cannot be counted. Is it an episode?")
        _, more, rest = rows.add(demo, found, count, f"{f.filename}: data/{name}")
        each.append({"name": name, **({"final": {k: found[k][count] for k in more}} if more else {}), **rest})
    notes = rows.settle(each, lambda i, keys: {k: h5.whole(f["data"][names[i]][k]) for k in keys})
    for name, schema in zip(names, rows.schemas, strict=True):
        if schema != rows.schemas[0]:
            raise h5.differs(f.filename, schema, f"data/{name}", rows.schemas[0], f"data/{names[0]}")
    return each, rows, notes


def _stream(file: Path, names: list[str], keys: list[str]) -> Iterator[Episode]:
    with h5.opened(file) as f:
        for name in names:
            demo = f["data"][name]
            n = min(len(demo[k]) for k in keys)  # observations may have a last one beside
            yield {k: demo[k][:n] for k in keys}


def _filters(demo: Any, schema: Schema) -> dict[str, Any]:
    return {k: how for k in schema if (how := h5.filters(demo[k]))}


def _below(f: Any, top: str) -> Iterator[tuple[str, Any]]:
    if isinstance(f[top], h5.h5py().Group):
        yield from ((f"{top}/{k}", d) for k, d in h5.leaves(f[top]))
    else:
        yield top, f[top]


def _remaining(mask: Any, names: list[str]) -> Any:
    """A mask without the episodes that are gone."""
    if isinstance(mask, np.ndarray) and mask.dtype.kind == "S":
        return mask[[n.decode() in names for n in mask.tolist()]]
    return {**mask, "__text__": [n for n in mask["__text__"] if n in names]} if isinstance(mask, dict) and "__text__" in mask else mask


def _rate(env: Mapping[str, Any], times: np.ndarray | None) -> float | None:
    """Hz: what the environment was made with, else by the median of the time stamps."""
    said = (env.get("env_kwargs") or env).get("control_freq")
    if said:
        return float(said)
    step = float(np.median(np.diff(times))) if times is not None and len(times) > 1 else 0
    return float(f"{1 / step:.4g}") if step > 0 else None


def _semantics(env: Mapping[str, Any], shape: tuple[int, ...]) -> Semantics:
    """Of robosuite's controllers; a gripper is the last channel."""
    kwargs = env.get("env_kwargs") or env
    given = kwargs.get("controller_configs")
    control = given if isinstance(given, dict) else given[0] if isinstance(given, list) and given and isinstance(given[0], dict) else {}
    kind, delta = str(control.get("type", "")), control.get("control_delta", True)
    d = shape[0]
    if kind == "OSC_POSE" and d == 7:
        return Semantics("delta" if delta else "absolute", "ee", rotation="axis_angle", parts={"position": (0, 1, 2), "rotation": (3, 4, 5), "gripper": (6,)},
                         text=f"{kind}: {'change' if delta else 'target'} of position and rotation (axis-angle), as the controller scales it; gripper")
    if kind == "OSC_POSITION" and d == 4:
        return Semantics("delta" if delta else "absolute", "ee", parts={"position": (0, 1, 2), "gripper": (3,)},
                         text=f"{kind}, as the controller scales it; gripper")
    if kind in ("JOINT_VELOCITY", "JOINT_POSITION", "JOINT_TORQUE"):
        how = {"JOINT_VELOCITY": "velocity", "JOINT_TORQUE": "effort", "JOINT_POSITION": "delta" if delta else "absolute"}[kind]
        return Semantics(how, "joint", parts={"joints": tuple(range(d - 1)), "gripper": (d - 1,)}, text=f"{kind}, as the controller scales it; gripper")
    return Semantics(text=kind)


def _old(schema: Schema, parts: list[str]) -> Semantics:
    widths = [schema[p][0][0] for p in parts]
    joints = widths[0] if parts[0] == PARTS[0] else 0
    return Semantics("velocity", "joint", parts={"joints": tuple(range(joints)), "gripper": tuple(range(joints, sum(widths)))},
                     text=f"{' and '.join(parts)} side by side")

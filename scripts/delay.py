"""`dipole eval delay run=…`: success against simulated latency, every delay on the same seeds; and which way of merging plans to use."""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from policy import compare as paired
from policy.episodes import smoothness
from policy.stats import Paired
from policy.svg import Series, plot
from policy.timeline import MERGES
from policy.train import checkpoint
from policy.train.log import console
from scripts import common
from scripts.compare import Evaluate

KEEPS = 0.98  # of the success without delay: what a merge must keep to be chosen
ALIKE = ("frozen", "prefix")  # without delay they are naive: nothing is committed
Found = dict[str, Any]


@dataclass(frozen=True)
class Point:
    curve: str
    delay: int
    control: dict[str, Any]
    name: str


def delay(cfg: DictConfig, folder: Path, out: Path, evaluate: Evaluate) -> Found:
    """Evaluate under each of cfg.delays, write delay.json, delay.png and report.html into out, print the differences to the first."""
    delays, execute = list(dict.fromkeys(cfg.delays)), cfg.control.get("execute", 8)
    if len(delays) < 2 or not all(isinstance(d, int) and d >= 0 for d in delays):
        raise ValueError(f"delays={delays} must be two whole numbers of control steps or more, like [0,2,4]")
    if max(delays) + execute > cfg.horizon:
        raise ValueError(f"a delay of {max(delays)} steps needs plans of {max(delays) + execute}, the run's have {cfg.horizon}: leave out the longest, "
                         f"or execute less of a plan, like control.execute={max(1, cfg.horizon - max(delays))}")
    merges = chosen(cfg, folder, delays)
    if (at := max(delays) if cfg.gate is None else cfg.gate) not in delays:
        raise ValueError(f"gate={at} must be one of delays={delays}")
    points = by_merge(delays, merges) if merges else by_alignment(delays, cfg.control.get("align", True), cfg.naive)
    met: dict[str, Found] = {}
    for point in points:
        if point.name not in met:
            console.print(f"[bold]{point.name}[/]")
            one = cfg.copy()
            one.control = {**common.plain(cfg.control), **point.control}
            one.out, one.videos = str(out / point.name.replace(", ", "-").replace(" ", "_")), 0
            met[point.name] = evaluate(one, folder)
            if cfg.dims:
                met[point.name]["smoothness"] = of_dims(met[point.name], Path(one.out) / "actions.npz", list(cfg.dims))
    found = paired.compare(met, next(iter(met.values()))["seeds"])
    by_name = {run["name"]: run for run in found["runs"]}
    curves: dict[str, list[Found]] = {}
    for point in points:
        curves.setdefault(point.curve, []).append({"delay": point.delay, **numbers(by_name[point.name])})
    fps = met[points[0].name]["fps"]
    found |= {"command": common.command(), "fps": fps, "curves": curves}
    if merges:
        found["gate"] = gate({m: by_name[named(at, m)] for m in merges}, by_name[points[0].name], at, fps)
    common.save_json(out / "delay.json", found)
    unit = "control steps" + (f" of {1000 / fps:.0f} ms" if fps else "")
    draw(curves, out / "delay.png", unit, found["task"], smooth=bool(merges))
    for pair in found["differences"]:
        console.print(escape(paired.sentence(pair)), highlight=False, soft_wrap=True)
    page = write_page(found, out, unit)
    if merges:
        console.print(table(curves, fps))
        console.print(f"[bold]{escape(found['gate']['line'])}[/]", highlight=False, soft_wrap=True)
        if cfg.adopt:
            adopt(folder, found["gate"]["merge"])
    line = ", ".join(f"{name.removeprefix('delay ')}: {by_name[name]['success']:.0%}" for name in by_name)
    console.print(f"[bold]success by delay: {line}[/]: {out / 'delay.png'}\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(out), "curves": curves, **({"gate": found["gate"]} if merges else {})}


def chosen(cfg: DictConfig, folder: Path, delays: list[int]) -> list[str]:
    """cfg.merges that this run can plan with, naive first; [] where none are named."""
    merges = list(dict.fromkeys(cfg.merges or ()))
    if unknown := [m for m in merges if m.partition("@")[0] not in MERGES or not re.fullmatch(r"\w+(@[\d.]+)?", m)]:
        raise ValueError(f"merges={merges}: {unknown[0]!r} is unknown; use some of {', '.join(MERGES)}, with a warm start at a noise time as guided@0.8")
    if not merges:
        return []
    rtc = checkpoint.read(folder / "checkpoints" / f"{cfg.checkpoint.partition('@')[0]}.safetensors")[1]["planner"].get("rtc", 0)
    if rtc < max(delays) and (told := [m for m in merges if m.startswith("prefix")]):
        console.print(f"prefix is left out: it needs a run trained with train.rtc={max(delays)} or more, and this one has {rtc or 'none'}", highlight=False)
        merges = [m for m in merges if m not in told]
    return ["naive", *(m for m in merges if m != "naive")]


def of_dims(metrics: Found, actions: Path, dims: list[int]) -> Found:
    """The smoothness of some action dimensions alone."""
    wide, control = np.array(metrics["smoothness"]["range"]), metrics["control"]
    if wrong := [d for d in dims if not 0 <= d < wide.size]:
        raise ValueError(f"dims={dims}: there is no action dimension {wrong[0]}, they are 0 to {wide.size - 1}")
    acted = [a[:, dims] for a in common.load_actions(actions).values()]
    return smoothness(acted, control["execute"], control["delay"], wide[dims], metrics["fps"])


def by_alignment(delays: list[int], align: bool, naive: bool) -> list[Point]:
    points = []
    for aligned in (align, False) if naive and align else (align,):
        for steps in delays:
            name = f"delay {steps}" + ("" if aligned or (not steps and align) else ", not aligned")  # no delay is the same either way
            points.append(Point("aligned" if aligned else "not aligned", steps, {"delay": steps, "align": aligned}, name))
    return points


def by_merge(delays: list[int], merges: list[str]) -> list[Point]:
    return [Point(merge, steps, {"delay": steps, "align": True, **control_of(merge)}, named(steps, merge)) for steps in sorted(delays) for merge in merges]


def control_of(merge: str) -> dict[str, Any]:
    """guided@0.8: merge guided, with a warm start at noise time .8."""
    name, _, warm = merge.partition("@")
    return {"merge": name, "warm": float(warm) if warm else None}


def named(steps: int, merge: str) -> str:
    return f"delay {steps}, {'naive' if merge in ALIKE and not steps else merge}"


def numbers(run: Found) -> Found:
    """What is kept of one evaluation."""
    smooth = run["metrics"]["smoothness"]
    return {**{key: run[key] for key in ("success", "success_ci", "score", "score_ci")},
            **{key: smooth.get(key) for key in ("seam", "seam_ratio", "accel_peak", "accel_peak_normalised")}}


def gate(late: dict[str, Found], base: Found, steps: int, fps: float) -> Found:
    """Which merge to use with a delay of so many steps: among those that keep KEEPS of the success of `base`, the one of least peak acceleration.

    late {merge: evaluation with that delay}, naive among them.   base: without delay.
    """
    kept, peak = {}, {}
    for merge, run in late.items():
        pair: Any = Paired.of(base["per_seed"]["success"], run["per_seed"]["success"]).summary()
        share = base["success"] or 1.0
        kept[merge] = [1 + d / share for d in (pair["difference"], *pair["difference_ci"])]
        peak[merge] = run["metrics"]["smoothness"]["accel_peak_normalised"]
    passed = [m for m in late if base["success"] and kept[m][0] >= KEEPS and peak[m] is not None]
    best = min(passed, key=lambda m: peak[m]) if passed else "naive"
    n, when = len(base["per_seed"]["success"]), f"{steps} steps" + (f" ({1000 * steps / fps:.0f} ms)" if fps else "")
    share, lo, hi = kept[best]
    said = f"{best} keeps {share:.0%} [{lo:.0%}, {hi:.0%}] of the success without delay"
    if not base["success"]:
        line = f"gate at {when}: nothing to choose, as the policy has no success without delay either: control.merge=naive"
    elif not passed:
        line = f"gate at {when}: no merge keeps {KEEPS:.0%} of the success without delay; {said}: control.merge=naive, and plan faster"
    else:
        sure = "" if lo >= KEEPS else f" (that it is {KEEPS:.0%} or more, {n} seeds do not prove)"
        less = f", {peak[best] / peak['naive']:.0%} of naive's" if best != "naive" and peak.get("naive") else ""
        line = f"gate at {when}: {said}{sure}, with the least peak acceleration of the {len(passed)} that do, {peak[best]:.3g} ranges/s²{less}: " + \
               " ".join(o for o in setting(best) if not o.endswith("=null"))
    return {"merge": best, "delay": steps, "kept": kept, "accel_peak_normalised": peak, "passed": passed, "line": line}


def adopt(folder: Path, merge: str) -> None:
    """From now on the run is evaluated, served and exported with this merge."""
    path, said = folder / "config.yaml", folder / "overrides.json"
    saved, now = OmegaConf.load(path), {f"control.{key}": value for key, value in control_of(merge).items()}
    for key, value in now.items():
        OmegaConf.update(saved, key, value)
    before = [o for o in (json.loads(said.read_text()) if said.exists() else []) if o.split("=")[0].lstrip("+") not in now]
    said.write_text(json.dumps([*before, *setting(merge)]))
    path.write_text(OmegaConf.to_yaml(saved))
    console.print(f"{path} now has {' '.join(setting(merge))}", highlight=False, soft_wrap=True)


def setting(merge: str) -> list[str]:
    """What to type for it."""
    return [f"control.{key}={'null' if value is None else value}" for key, value in control_of(merge).items()]


def table(curves: dict[str, list[Found]], fps: float) -> Table:
    """A row for each merge, a column for each delay: success, peak acceleration, seam."""
    first = next(iter(curves.values()))
    heads = [f"{row['delay']} steps" + (f" ({1000 * row['delay'] / fps:.0f} ms)" if fps else "") for row in first]
    shown = Table("success, peak acceleration (ranges/s²), seam (% of range)", *heads, box=SIMPLE_HEAD, pad_edge=False)
    for label, rows in curves.items():
        shown.add_row(label, *(f"{r['success']:.0%}  {_figure(r['accel_peak_normalised'])}  {_figure(r['seam'], 100)}" for r in rows))
    return shown


def _figure(value: float | None, scale: float = 1) -> str:
    return "–" if value is None else f"{scale * value:.3g}"


def write_page(found: Found, out: Path, unit: str) -> Path:
    keys = [key for key in ("success", "score") if key == "success" or any(run["score"] not in (None, run["success"]) for run in found["runs"])]
    cards = "".join(card(found["curves"], key, unit) for key in keys)
    return paired.write_page(out, found, title=f"{found['task']}: success when plans come late", plots=[f'<section class="plots">{cards}</section>'])


def card(curves: dict[str, list[Found]], key: str, unit: str) -> str:
    series = []
    for (label, every), colour in zip(curves.items(), paired.COLOURS, strict=False):
        rows = [r for r in every if r[key] is not None]
        lo, hi = [r[f"{key}_ci"][0] for r in rows], [r[f"{key}_ci"][1] for r in rows]
        series.append(Series(label, colour, [r["delay"] for r in rows], [r[key] for r in rows], lo, hi, dots=True))
    return plot(f"{key.capitalize()} against delay", series, x=unit, unit=True, note="95 % intervals, each of its own; differences below are paired")


def draw(curves: dict[str, list[Found]], out: Path, unit: str, task: str, smooth: bool = False) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    more = (("accel_peak_normalised", "peak commanded acceleration, ranges/s²", 1), ("seam", "step where plans join, % of range", 100)) if smooth else ()
    fig, axes = plt.subplots(1, 1 + len(more), figsize=(13 if more else 6, 3.6), dpi=130, squeeze=False)
    ax, *others = axes[0]
    for i, (label, rows) in enumerate(curves.items()):
        x, y = [r["delay"] for r in rows], [r["success"] for r in rows]
        ends = [[v - r["success_ci"][0] for v, r in zip(y, rows, strict=True)], [r["success_ci"][1] - v for v, r in zip(y, rows, strict=True)]]
        ax.errorbar(x, y, yerr=ends, fmt="-o", ms=4, capsize=2, color=f"C{i}", label=label)
        for (key, _, scale), other in zip(more, others, strict=True):
            other.plot(x, [float("nan") if r[key] is None else scale * r[key] for r in rows], "-o", ms=4, color=f"C{i}", label=label)
    ax.set(xlabel=f"delay, {unit}", ylabel="success, 95 % interval", ylim=(0, 1.02), title=task)
    for (_, name, _), other in zip(more, others, strict=True):
        other.set(xlabel=f"delay, {unit}", ylabel=name)
        other.set_ylim(bottom=0)
    for each in (ax, *others):
        each.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(out)
    plt.close(fig)

"""`dipole eval delay run=…`: success against simulated latency, every delay on the same seeds."""
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape

from policy import compare as paired
from policy.svg import Series, plot
from policy.train.log import console
from scripts import common
from scripts.compare import Evaluate


def delay(cfg: DictConfig, folder: Path, out: Path, evaluate: Evaluate) -> dict[str, Any]:
    """Evaluate under each of cfg.delays, write delay.json, delay.png and report.html into out, print the differences to the first."""
    delays, execute = list(dict.fromkeys(cfg.delays)), cfg.control.get("execute", 8)
    if len(delays) < 2 or not all(isinstance(d, int) and d >= 0 for d in delays):
        raise ValueError(f"delays={delays} must be two whole numbers of control steps or more, like [0,2,4]")
    if max(delays) + execute > cfg.horizon:
        raise ValueError(f"a delay of {max(delays)} steps needs plans of {max(delays) + execute}, the run's have {cfg.horizon}: leave out the longest, "
                         f"or execute less of a plan, like control.execute={max(1, cfg.horizon - max(delays))}")
    aligned = [cfg.control.get("align", True), *([False] if cfg.naive and cfg.control.get("align", True) else [])]
    met: dict[str, dict[str, Any]] = {}
    points: list[tuple[int, bool, str]] = []
    for align in aligned:
        for steps in delays:
            name = f"delay {steps}" + ("" if align else ", not aligned")
            points.append((steps, align, name if steps or align == aligned[0] else f"delay {steps}"))
            if points[-1][2] not in met:  # no delay is the same either way
                console.print(f"[bold]{name}[/]")
                one = cfg.copy()
                one.control = {**common.plain(cfg.control), "delay": steps, "align": align}
                one.out, one.videos = str(out / name.replace(", ", "-").replace(" ", "_")), 0
                met[name] = evaluate(one, folder)
    found = paired.compare(met, next(iter(met.values()))["seeds"])
    by_name = {run["name"]: run for run in found["runs"]}
    curves = {("aligned" if align else "not aligned"): [(steps, by_name[name]) for steps, a, name in points if a == align] for align in aligned}
    found |= {"command": common.command(), "curves": {label: [{"delay": d, "success": r["success"], "success_ci": r["success_ci"], "score": r["score"],
                                                               "score_ci": r["score_ci"]} for d, r in rows] for label, rows in curves.items()}}
    common.save_json(out / "delay.json", found)
    fps = met[points[0][2]]["fps"]
    unit = "control steps" + (f" of {1000 / fps:.0f} ms" if fps else "")
    draw(found["curves"], out / "delay.png", unit, found["task"])
    for pair in found["differences"]:
        console.print(escape(paired.sentence(pair)), highlight=False, soft_wrap=True)
    title = f"{found['task']}: success when plans come late"
    shown = [key for key in ("success", "score") if key == "success" or any(run["score"] not in (None, run["success"]) for run in found["runs"])]
    cards = "".join(card(found["curves"], key, unit) for key in shown)
    page = paired.write_page(out, found, title=title, plots=[f'<section class="plots">{cards}</section>'])
    line = ", ".join(f"{name.removeprefix('delay ')}: {by_name[name]['success']:.0%}" for name in by_name)
    console.print(f"[bold]success by delay: {line}[/]: {out / 'delay.png'}\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(out), "curves": found["curves"]}


def card(curves: dict[str, list[dict[str, Any]]], key: str, unit: str) -> str:
    series = []
    for (label, every), colour in zip(curves.items(), ("c1", "c2"), strict=False):
        rows = [r for r in every if r[key] is not None]
        lo, hi = [r[f"{key}_ci"][0] for r in rows], [r[f"{key}_ci"][1] for r in rows]
        series.append(Series(label, colour, [r["delay"] for r in rows], [r[key] for r in rows], lo, hi, dots=True))
    return plot(f"{key.capitalize()} against delay", series, x=unit, unit=True, note="95 % intervals, each of its own; differences below are paired")


def draw(curves: dict[str, list[dict[str, Any]]], out: Path, unit: str, task: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 3.6), dpi=130)
    for i, (label, rows) in enumerate(curves.items()):
        x, y = [r["delay"] for r in rows], [r["success"] for r in rows]
        ends = [[v - r["success_ci"][0] for v, r in zip(y, rows, strict=True)], [r["success_ci"][1] - v for v, r in zip(y, rows, strict=True)]]
        ax.errorbar(x, y, yerr=ends, fmt="-o", ms=4, capsize=2, color=f"C{i}", label=label)
    ax.set(xlabel=f"delay, {unit}", ylabel="success, 95 % interval", ylim=(0, 1.02), title=task)
    ax.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(out)
    plt.close(fig)

"""One page about a run: `report.html` opens from disk, carries its own style and curves and asks nothing of the network.

Curves are SVG written here: they follow light and dark mode, stay sharp, tell their numbers on hover, and a robot needs no matplotlib.
Everything that comes from a run is escaped. Every input is optional, because a report is wanted most when a run broke off.
"""
import json
from html import escape
from pathlib import Path
from typing import Any

from policy.episodes import reason
from policy.page import command, counted, duration, interval, percent, read_json, seed_range, videos, with_cost, write
from policy.svg import Series, curve, finite, number, plot, tiles
from policy.train.log import read_rows

ENDS = {"success": "succeeded", "terminated": "ended without success", "truncated": "ran out of time", "fault": "broke off"}


def write_report(folder: Path | str) -> Path:
    """Writes <folder>/report.html from whatever a run left there, and returns its path.

    Reads config.yaml, versions.json, train.jsonl, metrics.json, videos/*.mp4, each optional. FileNotFoundError when there is no folder,
    ValueError naming the file when metrics.json or versions.json is not JSON. A line that a killed run left half in train.jsonl is skipped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. A report is written about a run: give the folder that `dipole train` or "
                                "`dipole eval` printed last")
    log = read_rows(folder / "train.jsonl")
    evals = with_cost(log)
    metrics = read_json(folder / "metrics.json")
    shown = metrics or (evals[-1]["eval"] if evals else {})
    parts = [header(folder, shown, log, from_log=bool(evals) and not metrics), warning(log), faults(shown.get("faults") or []), cards(shown, log),
             command(shown), training(log, evals), episodes(shown), measures(shown.get("measures") or {}), videos(folder, shown),
             appendix(folder, metrics)]
    return write(folder / "report.html", f"{shown.get('task') or folder.name} · dipole", parts)


# ---------------------------------------------------------------- the page, top to bottom
def header(folder: Path, metrics: dict[str, Any], log: list[dict[str, Any]], *, from_log: bool) -> str:
    name, facts = folder.resolve().name, []
    if metrics.get("episodes"):
        facts.append(counted(metrics["episodes"], "episode"))
    if metrics.get("seeds") not in (None, []):
        facts.append(f"seeds {seed_range(metrics['seeds'])}")
    if log:
        last = {key: value for row in log for key, value in row.items()}
        facts.append(f"trained {counted(last['step'], 'step')}")
        facts += [f"{duration(last[key])} {of}" for key, of in (("cpu_s", "of CPU"), ("wall_s", "on the clock")) if finite(last.get(key))]
    if from_log:
        facts.append("numbers of the last evaluation during training")
    if not metrics and not log:
        facts.append("nothing was measured here yet: dipole eval writes metrics.json, dipole train writes train.jsonl")
    return (f'<header><div class="over">dipole · {escape(name)}</div><h1>{escape(str(metrics.get("task") or name))}</h1>'
            f'<div class="soft">{escape(" · ".join(facts))}</div></header>')


def warning(log: list[dict[str, Any]]) -> str:
    broken = next((row for row in log if "loss" in row and not finite(row["loss"])), None)
    if broken is None:
        return ""
    step = escape(str(broken.get("step", "?")))
    return (f'<p class="note"><strong>The loss is not finite from step {step} on.</strong> Halve the learning rate, '
            "or look for NaN in the data: <code>dipole data validate path=…</code></p>")


def faults(rows: list[dict[str, Any]]) -> str:
    """Which episodes broke off, where, why, and how to see one again."""
    if not rows:
        return ""
    told = "".join(f"<details><summary>seed {escape(str(row.get('seed')))} after {escape(str(row.get('step')))} steps: "
                   f"{escape(reason(str(row.get('error', '')))[:160])}</summary>"
                   f"<pre>{escape(str(row.get('error', '')).strip())}\n\n{escape(str(row.get('replay', '')))}</pre></details>" for row in rows[:20])
    more = f"<small>and {len(rows) - 20} more</small>" if len(rows) > 20 else ""
    return (f'<div class="note"><strong>{counted(len(rows), "episode")} broke off and count as {"failures" if len(rows) > 1 else "a failure"}.</strong> '
            f"The other numbers are of those that did not.{told}{more}</div>")


def cards(metrics: dict[str, Any], log: list[dict[str, Any]]) -> str:
    def card(name: str, value: str, below: str) -> str:
        return f'<div class="card"><span class="soft">{name}</span><b>{value}</b><small>{below}</small></div>'

    first = [f'<div class="card"><span class="soft">{name}</span><b>{show(metrics[key])}</b>{interval(metrics[key], metrics.get(f"{key}_ci"), show)}</div>'
             for name, key, show in (("Success", "success", percent), ("Score", "score", number)) if finite(metrics.get(key))]
    out = []
    if finite(metrics.get("return")):
        out.append(card("Return", number(metrics["return"]), "mean per episode"))
    length, smooth, plan = (metrics.get(key) or {} for key in ("length", "smoothness", "plan_ms"))
    if finite(length.get("mean")):
        out.append(card("Length", number(length["mean"]), f"steps; of a success {number(length.get('success'))}"))
    if finite(smooth.get("seam_ratio")):
        jerk = f"jerk {number(smooth.get('jerk_normalised'))} ranges/s³"
        out.append(card("Seams", f"{number(smooth['seam_ratio'], 2)} ×", f"jump between plans over steps within; {jerk}"))
    if finite(plan.get("p50")):
        out.append(card("Plan", f"{number(plan['p50'])} ms", f"median; p99 {number(plan.get('p99'))} ms"))
    if finite(metrics.get("env_steps_per_s")):
        out.append(card("Simulation", number(metrics["env_steps_per_s"]), "environment steps/s"))
    if finite(metrics.get("wall_s")):
        share = metrics.get("share") or {}
        spent = ", ".join(f"{name} {percent(share.get(key))}" for name, key in (("plans", "plan"), ("simulation", "env")) if finite(share.get(key)))
        out.append(card("Evaluation", duration(metrics["wall_s"]), spent or "on the clock"))
    losses = [row["loss"] for row in log if finite(row.get("loss"))]
    if losses:
        last = losses[-max(1, len(losses) // 20):]
        out.append(card("Loss", number(sum(last) / len(last)), "mean of the last 5 %"))
    return "".join(f'<section class="{kind}">{"".join(row)}</section>' for kind, row in (("cards big", first), ("cards", out)) if row)


def training(log: list[dict[str, Any]], evals: list[dict[str, Any]]) -> str:
    def column(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in log if finite(row.get("step")) and finite(row.get(key))]

    def graded(key: str, colour: str) -> Series:
        rows = [row for row in evals if finite(row["eval"].get(key))]
        y = [row["eval"][key] for row in rows]
        ranges = [row["eval"].get(f"{key}_ci") or [value, value] for row, value in zip(rows, y, strict=True)]
        return Series(key, colour, [row["cpu_s"] / 60 for row in rows], y, [lo for lo, _ in ranges], [hi for _, hi in ranges], dots=True)

    held_out = curve(column("val_loss"), "held out", "c2")
    waits = [wait for _, wait in column("data_wait")]
    wait = f"waiting for data {percent(sum(waits) / len(waits))} of the time" if waits and max(waits) <= 1 else ""
    plots = [plot("Score against CPU time", [graded("score", "c1"), graded("success", "c2")], x="CPU-minutes", unit=True,
                  note="95 % intervals"),
             plot("Loss", [curve(column("loss"), "training" if held_out.x else ""), held_out], x="step", log=True),
             plot("Samples per second", [curve(column("samples_per_s"))], x="step", note=wait, zero=True),
             plot("Learning rate", [curve(column("lr"))], x="step", zero=True)]
    return f'<h2>Training</h2><section class="plots">{"".join(plots)}</section>' if any(plots) else ""


def episodes(metrics: dict[str, Any]) -> str:
    """Scores as a histogram built of its episodes: green or red, named on hover; the worst seeds in words."""
    rows = metrics.get("per_episode") or []
    key = "score" if any(finite(row.get("score")) for row in rows) else "return"
    rows = sorted((row for row in rows if finite(row.get(key))), key=lambda row: row[key])
    if not rows:
        return ""

    def hover(row: dict[str, Any]) -> str:
        steps = f", {row['steps']} steps" if row.get("steps") else ""
        return f"seed {row.get('seed', '?')}: {'success' if row.get('success') else 'failure'}, {key} {number(row[key])}{steps}"

    won = sum(bool(row.get("success")) for row in rows)
    ends = metrics.get("ended") or {"success": won, "": len(rows) - won}
    keys = "".join(f'<span class="key {"good" if end == "success" else "bad"}"><small>{number(n)} {ENDS.get(end, "failed")}</small></span>'
                   for end, n in ends.items() if n or end in ("success", ""))
    worst = ", ".join(f"{row.get('seed', '?')} ({number(row[key])})" for row in rows[:5])
    green_first = sorted(rows, key=lambda row: not row.get("success"))
    drawn = tiles([(row[key], "good" if row.get("success") else "bad", hover(row)) for row in green_first], x=key)
    return (f'<h2>Episodes</h2><div class="card"><h3>{key.capitalize()} of each episode{keys}</h3>{drawn}'
            f"<small>One tile is one episode. Lowest: {'seed' if len(rows) == 1 else 'seeds'} {escape(worst)}</small></div>")


def measures(found: dict[str, Any]) -> str:
    """The task's own metrics, as means over episodes."""
    if not found:
        return ""
    rows = "".join(f"<tr><td>{escape(str(name))}</td>{''.join(f'<td>{number(row.get(key))}</td>' for key in ('max', 'min', 'last'))}</tr>"
                   for name, row in found.items())
    return (f'<h2>Task</h2><div class="card wide"><table><tr><th>mean over episodes of</th><th>its greatest</th><th>least</th><th>last value</th></tr>'
            f"{rows}</table></div>")


def appendix(folder: Path, metrics: dict[str, Any]) -> str:
    config = folder / "config.yaml"
    versions = read_json(folder / "versions.json")
    few = {key: value for key, value in metrics.items() if key not in ("per_episode", "videos")}
    parts = [("Configuration", config.read_text(encoding="utf-8") if config.exists() else ""),
             ("Versions", "\n".join(f"{name:<16} {value}" for name, value in versions.items())),
             ("All numbers", json.dumps(few, indent=2, ensure_ascii=False) if few else "")]
    shown = "".join(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in parts if text)
    return f"<h2>Behind it</h2>{shown}" if shown else ""

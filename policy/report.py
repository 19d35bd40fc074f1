"""One page about a run: `report.html` opens from disk, carries its own style and curves and asks nothing of the network.

Curves are SVG written here: they follow light and dark mode, stay sharp, tell their numbers on hover, and a robot needs no matplotlib.
Everything that comes from a run is escaped. Every input is optional, because a report is wanted most when a run broke off.
"""
import json
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from policy.svg import Series, curve, finite, number, plot, tiles
from policy.train.log import read_rows

STYLE = """
:root{--bg:#f7f7f5;--card:#fff;--ink:#1b1f24;--soft:#667079;--line:#e3e5e4;--one:#2563eb;--two:#d97706;--good:#15935a;--bad:#d33c3c}
@media(prefers-color-scheme:dark){:root{--bg:#0f1216;--card:#181d23;--ink:#e8ebee;--soft:#95a1ac;--line:#2b323a;--one:#6ea8fe;--two:#f5b45c;
--good:#3fcf8e;--bad:#ff7b72}}
*{box-sizing:border-box}html{color-scheme:light dark}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em}h2{font-size:18px;margin:40px 0 12px;letter-spacing:-.01em}
h3{font-size:14px;margin:0 0 6px;display:flex;gap:14px;align-items:baseline;flex-wrap:wrap}
small,.soft{color:var(--soft);font-size:13px;font-weight:400}p{margin:0 0 12px}.over{color:var(--soft);font-size:12px;letter-spacing:.09em;
text-transform:uppercase;margin-bottom:6px}
.cards,.plots,.videos{display:grid;gap:14px}.cards{grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin-top:14px}
.cards.big{grid-template-columns:repeat(auto-fit,minmax(260px,1fr));margin-top:24px}
.plots{grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr))}.videos{grid-template-columns:repeat(auto-fill,minmax(200px,1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;min-width:0}
.card b{display:block;font-size:28px;line-height:1.25;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.big b{font-size:44px;line-height:1.15}.cards .card:only-child{max-width:360px}
.range{position:relative;height:8px;border-radius:4px;background:var(--line);margin:8px 0 6px}
.range i{position:absolute;top:0;bottom:0;border-radius:4px;background:var(--one);opacity:.45;min-width:2px}
.range u{position:absolute;top:-3px;bottom:-3px;width:3px;margin-left:-1.5px;border-radius:2px;background:var(--one)}
.note{border-left:4px solid var(--bad);background:var(--card);border-radius:6px;padding:10px 14px;margin-top:20px}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.c1{--c:var(--one)}.c2{--c:var(--two)}.good{--c:var(--good)}.bad{--c:var(--bad)}.none{--c:var(--soft)}
.curve{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}.band{fill:var(--c);opacity:.16}.whisker{stroke:var(--c);stroke-width:1.5}
.dot{fill:var(--c)}.unit{fill:var(--c);stroke:var(--card);stroke-width:.7}.unit:hover,.dot:hover{fill:var(--ink)}
.key::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:6px}
figure{margin:0;background:var(--card);border:2px solid var(--c);border-radius:12px;overflow:hidden}
video{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#000}figcaption{padding:8px 12px;font-size:13px}
figcaption strong{color:var(--c)}.gone{display:grid;place-items:center;aspect-ratio:1;color:var(--soft);font-size:13px}
pre{margin:0;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:auto;
font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.run{position:relative}.run pre{padding-right:76px;white-space:pre-wrap;overflow-wrap:anywhere}
button{position:absolute;top:8px;right:8px;font:inherit;font-size:12px;padding:3px 10px;border-radius:7px;border:1px solid var(--line);
background:var(--bg);color:var(--ink);cursor:pointer}button:hover{border-color:var(--one)}
details{margin-bottom:10px}summary{cursor:pointer;padding:6px 0;font-weight:600}
"""
COPY = "navigator.clipboard.writeText(this.previousElementSibling.textContent).then(()=>{this.textContent='copied'})"


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
    parts = [header(folder, shown, log, from_log=bool(evals) and not metrics), warning(log), cards(shown, log),
             command(shown), training(log, evals), episodes(shown.get("per_episode") or []), videos(folder, shown),
             appendix(folder, metrics)]
    title = escape(f"{shown.get('task') or folder.name} · dipole")
    body = "\n".join(part for part in parts if part)
    path = folder / "report.html"
    path.write_text(f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
                    f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>\n'
                    f"<body><main>\n{body}\n</main></body></html>\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- what a run left behind
def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Run `dipole eval` again, or remove the file") from error


def with_cost(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluation rows, each with the CPU-seconds spent so far: its own, or those of the training row before it."""
    spent, rows = 0.0, []
    for row in log:
        spent = row.get("cpu_s") or spent
        if "eval" in row:
            rows.append({**row, "cpu_s": spent})
    return rows


# ---------------------------------------------------------------- words and numbers
def percent(x: Any) -> str:
    return f"{100 * x:.1f}".removesuffix(".0") + " %" if finite(x) else "–"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def counted(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def seed_range(seeds: Any) -> str:
    if not isinstance(seeds, list) or not all(isinstance(s, int) for s in seeds) or len(seeds) < 2:
        return str(seeds if not isinstance(seeds, list) else ", ".join(map(str, seeds)))
    if seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}–{seeds[-1]}"
    return f"{len(seeds)} of {min(seeds)}–{max(seeds)}"


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


def interval(value: float, ends: Any, show: Callable[[Any], str]) -> str:
    """A bar from 0 to 1 with the interval and the value on it; only words where the scale is another one."""
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends))):
        return ""
    words = f"<small>95 % interval {show(ends[0]).removesuffix(' %')} – {show(ends[1])}</small>"
    if min(value, *ends) < 0 or max(value, *ends) > 1:
        return words
    lo, hi = ends
    return (f'<div class="range"><i style="left:{100 * lo:.1f}%;width:{100 * (hi - lo):.1f}%"></i>'
            f'<u style="left:{100 * value:.1f}%"></u></div>{words}')


def cards(metrics: dict[str, Any], log: list[dict[str, Any]]) -> str:
    def card(name: str, value: str, below: str) -> str:
        return f'<div class="card"><span class="soft">{name}</span><b>{value}</b>{below}</div>'

    first, out = [], []
    for name, key, show in (("Success", "success", percent), ("Score", "score", number)):
        if finite(metrics.get(key)):
            first.append(card(name, show(metrics[key]), interval(metrics[key], metrics.get(f"{key}_ci"), show)))
    if finite(metrics.get("return")):
        out.append(card("Return", number(metrics["return"]), "<small>mean per episode</small>"))
    plan = metrics.get("plan_ms") or {}
    if finite(plan.get("p50")):
        out.append(card("Plan", f"{number(plan['p50'])} ms", f"<small>median; p99 {number(plan.get('p99'))} ms</small>"))
    if finite(metrics.get("env_steps_per_s")):
        out.append(card("Simulation", number(metrics["env_steps_per_s"]), "<small>environment steps/s</small>"))
    if finite(metrics.get("wall_s")):
        out.append(card("Evaluation", duration(metrics["wall_s"]), "<small>on the clock</small>"))
    losses = [row["loss"] for row in log if finite(row.get("loss"))]
    if losses:
        last = losses[-max(1, len(losses) // 20):]
        out.append(card("Loss", number(sum(last) / len(last)), "<small>mean of the last 5 %</small>"))
    return "".join(f'<section class="{kind}">{"".join(row)}</section>' for kind, row in (("cards big", first), ("cards", out)) if row)


def command(metrics: dict[str, Any]) -> str:
    if not metrics.get("command"):
        return ""
    text = escape(str(metrics["command"]))
    return f'<h2>Reproduce</h2><div class="run"><pre>{text}</pre><button type="button" onclick="{escape(COPY)}">copy</button></div>'


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


def episodes(rows: list[dict[str, Any]]) -> str:
    """Scores as a histogram built of its episodes: green or red, named on hover; the worst seeds in words."""
    key = "score" if any(finite(row.get("score")) for row in rows) else "return"
    rows = sorted((row for row in rows if finite(row.get(key))), key=lambda row: row[key])
    if not rows:
        return ""

    def hover(row: dict[str, Any]) -> str:
        steps = f", {row['steps']} steps" if row.get("steps") else ""
        return f"seed {row.get('seed', '?')}: {'success' if row.get('success') else 'failure'}, {key} {number(row[key])}{steps}"

    won = sum(bool(row.get("success")) for row in rows)
    worst = ", ".join(f"{row.get('seed', '?')} ({number(row[key])})" for row in rows[:5])
    green_first = sorted(rows, key=lambda row: not row.get("success"))
    drawn = tiles([(row[key], mark(bool(row.get("success"))), hover(row)) for row in green_first], x=key)
    return (f'<h2>Episodes</h2><div class="card"><h3>{key.capitalize()} of each episode'
            f'<span class="key good"><small>{won} succeeded</small></span>'
            f'<span class="key bad"><small>{len(rows) - won} failed</small></span></h3>{drawn}'
            f"<small>One tile is one episode. Lowest: {'seed' if len(rows) == 1 else 'seeds'} {escape(worst)}</small></div>")


def videos(folder: Path, metrics: dict[str, Any]) -> str:
    films = metrics.get("videos") or [{"file": p.relative_to(folder).as_posix()} for p in sorted(folder.glob("videos/*.mp4"))]
    figures = []
    for film in films:
        facts = [f"seed {film['seed']}"] if film.get("seed") is not None else []
        facts += [f"score {number(film['score'])}"] if finite(film.get("score")) else []
        verdict = {True: "✓ success", False: "✗ failure"}.get(film.get("success"), "")  # words too: not everyone sees red and green
        picture = f'<div class="gone">{escape(film["file"])} is gone</div>'
        if (folder / film["file"]).is_file():
            picture = f'<video controls loop muted playsinline preload="metadata" src="{quote(film["file"])}"></video>'
        figures.append(f'<figure class="{mark(film.get("success"))}">{picture}<figcaption><strong>{verdict}</strong> '
                       f'<span class="soft">{escape(" · ".join(facts) or Path(film["file"]).stem)}</span></figcaption></figure>')
    return f'<h2>Videos</h2><section class="videos">{"".join(figures)}</section>' if figures else ""


def mark(success: Any) -> str:
    return "none" if success is None else "good" if success else "bad"


def appendix(folder: Path, metrics: dict[str, Any]) -> str:
    config = folder / "config.yaml"
    versions = read_json(folder / "versions.json")
    few = {key: value for key, value in metrics.items() if key not in ("per_episode", "videos")}
    parts = [("Configuration", config.read_text(encoding="utf-8") if config.exists() else ""),
             ("Versions", "\n".join(f"{name:<16} {value}" for name, value in versions.items())),
             ("All numbers", json.dumps(few, indent=2, ensure_ascii=False) if few else "")]
    shown = "".join(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>" for name, text in parts if text)
    return f"<h2>Behind it</h2>{shown}" if shown else ""

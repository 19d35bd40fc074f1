"""The report of a validation as one page: findings first, then what they were found in. It opens from disk and asks nothing of the network."""
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.actions import lag_curve
from policy.data.checks.finding import SEVERITIES, Finding, some
from policy.data.checks.look import Data
from policy.data.validate import Report
from policy.page import counted, write
from policy.svg import LEFT, RIGHT, Series, W, number, padded, plot, ticks

STRIPS, LINES, POINTS, CHANNELS, BINS = 50, 24, 70, 32, 40  # episodes in the strips; episodes and points of a drawing; channels of a key; bars
PLACES = 12  # of a finding, in words
COLOUR = {"error": "bad", "warning": "c2", "note": "c1"}
STYLE = """<style>
.found{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--c);border-radius:10px;padding:12px 16px;margin-bottom:12px}
.found h3{font-size:15px;margin:0 0 4px}.found p{margin:0 0 4px}.found code,.tag{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.found code{overflow-wrap:anywhere}.tag{color:var(--card);background:var(--c);border-radius:5px;padding:0 7px;font-weight:600}
.found dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;margin:6px 0 0}.found dt{color:var(--soft)}.found dd{margin:0}
.small{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(200px,1fr))}.small .card{padding:8px 10px;margin:0}
.small h3{font-size:12px;margin:0 0 2px;justify-content:space-between;gap:6px}.small small{font-size:11px}.strip{fill:var(--line)}.mark{fill:var(--c)}
.pale{fill:none;stroke:var(--one);stroke-width:.8;opacity:.28}.strong{fill:none;stroke:var(--two);stroke-width:1.6}.bars{fill:var(--one);opacity:.75}
.planes{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));margin-bottom:14px}.planes .card{margin:0}
summary small{margin-left:8px}.dot{fill:var(--one);opacity:.55}
</style>"""


def write_page(report: Report, path: Path) -> Path:
    """Writes the page and returns its path."""
    data = report.data
    parts = [STYLE, header(report), cards(report), found(report.findings)]
    if data is not None:
        curve = lag_curve(data)
        parts += [strips(data, report.findings), lengths(data, curve), *(motion(data, key) for key in data.motion), keys(data, report)]
    return write(path, f"{report.name} · dipole data validate", parts)


def header(report: Report) -> str:
    facts = report.facts
    said = [counted(facts[k], word) for k, word in (("episodes", "episode"), ("steps", "step")) if k in facts]
    said += [f"{facts['fps']:g} Hz" if facts.get("fps") else "rate not recorded"] if facts else []
    return (f'<header><div class="over">dipole data validate</div><h1>{escape(report.name)}</h1><div class="soft">{escape(" · ".join(said))}'
            f'<br>{escape(report.path)} · looked at for {report.seconds:.1f} s</div></header>')


def cards(report: Report) -> str:
    def card(name: str, value: str, below: str = "", colour: str = "") -> str:
        paint = f' style="color:var(--{colour})"' if colour else ""
        return f'<div class="card"><span class="soft">{escape(name)}</span><b{paint}>{escape(value)}</b><small>{escape(below)}</small></div>'

    means = {"error": "do not train on this", "warning": "costs success", "note": "true, and often meant"}
    paint = {"error": "bad", "warning": "two", "note": "one"}
    out = [card(s.capitalize() + "s", str(n := report.count(s)), means[s], paint[s] if n else "") for s in SEVERITIES]
    if action := report.facts.get("action"):
        declared = action["declared"] if action["declared"] != "unknown" else "not declared"
        out.append(card("Actions look", action["looks"], f"{declared}; they "
                        f"go best with the state {action['lag']} steps later (correlation {action['correlation']})"))
    if length := report.facts.get("length"):
        out.append(card("Length", str(length[1]), f"steps, median; {length[0]} to {length[2]}"))
    return f'<section class="cards">{"".join(out)}</section>'


def found(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<h2>Findings</h2><p>None: every check passed.</p>'
    return f'<h2>Findings</h2>{"".join(map(one, findings))}'


def one(f: Finding) -> str:
    places = "".join(f"<li>{escape(str(p))}</li>" for p in f.places[:PLACES])
    more = f.count - min(len(f.places), PLACES)
    rest = f"<small>and {more:,} more, in findings.json</small>" if more > 0 else ""
    at = f"<dt>at</dt><dd>{escape(some(f.places, 3))}</dd>" if f.places else ""
    seen = f"<details><summary>{counted(f.count, 'place')}</summary><ul>{places}</ul>{rest}</details>" if len(f.places) > 3 else ""
    return (f'<div class="found {COLOUR[f.severity]}"><h3><span class="tag">{f.severity}</span>{escape(f.code)}<small>{escape(f.where)}</small></h3>'
            f"<p>{escape(f.text)}</p><dl><dt>why</dt><dd>{escape(f.why)}</dd><dt>fix</dt><dd>{with_code(f.fix)}</dd>{at}</dl>{seen}</div>")


def with_code(text: str) -> str:
    """Commands and settings in a typewriter's face."""
    return re.sub(r"(dipole data .*?)(?=$|; |, or )", r"<code>\1</code>", escape(text))


# ---------------------------------------------------------------- where
def strips(data: Data, findings: Sequence[Finding]) -> str:
    """One bar for each episode that has findings, as long as it is, with them on it; those with most where there are too many."""
    marks: dict[int, list[tuple[int, int, Finding, str]]] = {}
    for f in reversed(findings):  # the worst is drawn last
        for p in f.places:
            if p.hi > p.lo:
                marks.setdefault(p.episode, []).append((p.lo, p.hi, f, str(p)))
    if not marks:
        return ""
    shown = sorted(sorted(marks, key=lambda e: -len(marks[e]))[:STRIPS])
    left, w, each = 46, 2 * W, 11 if len(shown) > 30 else 16
    longest, h = int(data.lengths[shown].max()), each * len(shown) + 24

    def at(step: float) -> float:
        return left + (w - left - RIGHT) * step / longest

    drawn = []
    for row, e in enumerate(shown):
        y = row * each
        drawn.append(f'<rect class="strip" x="{left}" y="{y}" width="{at(int(data.lengths[e])) - left:.1f}" height="{each - 3}" rx="2"/>')
        if len(shown) <= 30 or row % 5 == 0:
            drawn.append(f'<text x="{left - 7}" y="{y + each - 4}" text-anchor="end">{e}</text>')
        for lo, hi, f, said in marks.get(e, ()):
            drawn.append(f'<rect class="mark {COLOUR[f.severity]}" x="{at(lo):.1f}" y="{y}" width="{max(2.0, at(hi) - at(lo)):.1f}" height="{each - 3}" '
                         f'opacity="{0.45 if hi - lo > longest / 4 else 0.9}"><title>{escape(f"{f.code} {f.where}: {said}")}</title></rect>')
    axis = "".join(f'<text x="{at(v):.1f}" y="{h - 6}" text-anchor="middle">{number(v)}</text>' for v in ticks(0, longest, 10))
    note = f"each bar is an episode; findings in {len(marks)} of {len(data.ends)}" + \
        (f", drawn: the {len(shown)} with most" if len(marks) > len(shown) else "")
    legend = "".join(f'<span class="key {COLOUR[s]}"><small>{s}</small></span>' for s in SEVERITIES)
    return (f'<h2>Where</h2><div class="card"><h3>Findings over the steps of the episodes{legend}<small>{note}</small></h3>'
            f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="findings by episode">{"".join(drawn)}{axis}</svg></div>')


def lengths(data: Data, curve: tuple[str, NDArray[np.int64], NDArray[np.float64]] | None) -> str:
    n = data.lengths
    bars = np.histogram(n, bins=min(BINS, max(5, kinds))) if (kinds := len(np.unique(n))) > 1 else (np.array([len(n)]), n[0] + np.array([-0.5, 0.5]))
    out = [histogram("Length of the episodes", bars[0], bars[1], "steps", note=f"median {np.median(n):.0f}", w=W, h=230)]
    if curve is not None:
        kind, lags, mean = curve
        what = {"target": "the state's change goes with the action's change", "level": "the state goes with the action",
                "change": "the state's change goes with the action"}[kind]
        best = int(lags[mean.argmax()])
        x, y = [float(v) for v in lags], [float(v) for v in mean]
        ends = [min(0.0, *y), max(y)]
        curves = [Series("", "c1", x, y, y, y), Series("same frame", "none", [0.0, 0.0], ends, ends, ends),
                  Series(f"best: {best}", "c2", [float(best)], [max(y)], [max(y)], [max(y)], dots=True)]
        out.append(plot("When the state follows the action", curves, x="steps from the action to the state", note=what))
    return f'<h2>Time</h2><section class="plots">{"".join(out)}</section>'


# ---------------------------------------------------------------- what
def motion(data: Data, key: str) -> str:
    """A key's planes, its channels over the steps of some episodes, and a histogram of each."""
    episodes = np.unique(np.linspace(0, len(data.ends) - 1, LINES).round().astype(int)).tolist()
    lines = [thin(data, key, e) for e in episodes]
    scales, width = data.scales(key), data.width(key)
    unit = data.units.get(key, "")
    drawn = []
    for c in range(min(width, CHANNELS)):
        x = data.sample(key).values[:, c]
        x = x[np.isfinite(x)].astype(np.float64)
        bars = np.histogram(x, BINS, padded([float(x.min()), float(x.max())])) if len(x) else (np.zeros(1), np.zeros(2))
        flag = "switch" if scales.few[c] and scales.moves[c] else "clock" if scales.clock[c] else "" if scales.moves[c] else "constant"
        span = flag or f"{number(float(bars[1][0]))} … {number(float(bars[1][-1]))}"
        drawn.append(f'<div class="card"><h3>{escape(data.short(key, c))}<small>{span}</small></h3>'
                     f"{over_time([(t, x[:, c]) for t, x in lines])}{small_bars(bars[0].tolist())}</div>")
    more = f"<p><small>and {width - CHANNELS} more channels</small></p>" if width > CHANNELS else ""
    planes = "".join(plane(key, [x.reshape(len(x), -1, 2) for _, x in lines], data.down(key)) for _ in range(data.schema[key][0][-1:] == (2,)))
    shape = " × ".join(map(str, data.schema[key][0])) or "1"
    return (f'<h2>{escape(key)}</h2><p><small>{shape} {data.schema[key][1]}{escape(f", {unit}" if unit else "")}; {len(lines)} episodes over their steps, '
            f'the first of them strong, and the histogram of the values below</small></p>' + (f'<section class="planes">{planes}</section>' if planes else "") +
            f'<section class="small">{"".join(drawn)}</section>{more}')


def thin(data: Data, key: str, e: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps (p,) and values (p, c) of an episode: its least and greatest value in each of POINTS / 2 pieces are kept by taking both ends of a piece."""
    lo, n = int(data.starts[e]), int(data.lengths[e])
    take = np.unique(np.linspace(0, max(0, n - 1), POINTS).round().astype(int))
    x = data.store.read(key, lo, lo + n).reshape(n, -1)[take].astype(np.float64)
    return take, np.where(np.isfinite(x), x, np.nan)


def path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.0f},{y:.1f}" for x, y in points)


def over_time(lines: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], w: int = 200, h: int = 74) -> str:
    every = np.concatenate([y for _, y in lines])
    every = every[np.isfinite(every)]
    lo, hi = padded([float(every.min()), float(every.max())]) if len(every) else (0.0, 1.0)
    last = max(1, max(int(t[-1]) for t, _ in lines))
    drawn = "".join(f'<polyline class="{"strong" if i == 0 else "pale"}" points="'
                    f'{path((w * a / last, h - 2 - (h - 4) * (b - lo) / (hi - lo)) for a, b in zip(t, y, strict=True) if np.isfinite(b))}"/>'
                    for i, (t, y) in reversed(list(enumerate(lines))))
    return f'<svg viewBox="0 0 {w} {h}">{drawn}</svg>'


def small_bars(counts: Sequence[float], w: int = 200, h: int = 30) -> str:
    top, each = max(1, *counts), w / len(counts)
    drawn = "".join(f'<rect class="bars" x="{i * each:.1f}" y="{h - h * (n / top) ** 0.5:.1f}" width="{each * 0.9:.1f}" height="{h * (n / top) ** 0.5:.1f}"/>'
                    for i, n in enumerate(counts) if n)
    return f'<svg viewBox="0 0 {w} {h + 1}"><title>how often each value is taken (heights: square root)</title>{drawn}</svg>'


def plane(key: str, lines: Sequence[NDArray[np.float64]], down: bool, size: int = 300) -> str:
    """y over x of a key of points, in equal scales; y downwards where it counts so."""
    every = np.concatenate([x.reshape(-1, 2) for x in lines])
    every = every[np.isfinite(every).all(axis=1)]
    if not len(every):
        return ""
    lo, hi = every.min(axis=0), every.max(axis=0)
    scale = (size - 8) / max(1e-9, float((hi - lo).max()))
    drawn = ""
    for i, x in reversed(list(enumerate(lines))):
        for point in range(x.shape[1]):
            y = 4 + (x[:, point] - lo) * scale
            y = y[np.isfinite(y).all(axis=1)]
            if len(y) and np.ptp(y, axis=0).max() < 1:  # it rests, as a goal does: a line would show nothing
                drawn += f'<circle class="dot" cx="{y[0, 0]:.1f}" cy="{y[0, 1] if down else size - y[0, 1]:.1f}" r="4"/>'
                continue
            drawn += f'<polyline class="{"strong" if i == 0 else "pale"}" points="{path((a, b if down else size - b) for a, b in y)}"/>'
    return f'<div class="card"><h3>{escape(key)}<small>second over first component</small></h3><svg viewBox="0 0 {size} {size}">{drawn}</svg></div>'


def histogram(title: str, counts: NDArray[np.int64], edges: NDArray[np.float64], x: str, *, note: str, w: int, h: int) -> str:
    lo, hi = float(edges[0]), float(edges[-1])
    top, bottom = max(1, int(counts.max())), h - 34

    def at(v: float) -> float:
        return LEFT + (w - LEFT - RIGHT) * (v - lo) / (hi - lo)

    drawn = "".join(f'<rect class="bars" x="{at(a):.1f}" y="{bottom - (bottom - 10) * n / top:.1f}" width="{max(1.0, at(b) - at(a) - 1):.1f}" '
                    f'height="{(bottom - 10) * n / top:.1f}"><title>{n} from {number(a)} to {number(b)}</title></rect>'
                    for n, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True) if n)
    whole = [v for v in ticks(lo, hi) if v == round(v)]
    short = [number(v) for v in whole]
    said = short if len(set(short)) == len(short) > 1 else [f"{v:.0f}" for v in whole]
    marks = "".join(f'<text x="{at(v):.1f}" y="{bottom + 15}" text-anchor="middle">{label}</text>' for v, label in zip(whole, said, strict=True))
    scale = f'<text x="{LEFT - 7}" y="14" text-anchor="end">{top}</text><text x="{LEFT - 7}" y="{bottom + 4}" text-anchor="end">0</text>'
    return (f'<div class="card"><h3>{escape(title)}<small>{escape(note)}</small></h3><svg viewBox="0 0 {w} {h}">'
            f'<line class="grid" x1="{LEFT}" x2="{w - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
            f'{drawn}{marks}{scale}<text x="{w - RIGHT}" y="{h - 3}" text-anchor="end">{escape(x)}</text></svg></div>')


def keys(data: Data, report: Report) -> str:
    looked = report.facts.get("images_looked_at", {})
    rows = "".join(f"<tr><td><code>{escape(key)}</code></td><td>{escape(str(shape))}</td><td>{dtype}</td><td>{data.roles[key]}</td><td>"
                   f"{escape(data.units.get(key, ''))}</td><td>{f'{100 * looked[key]:.0f} % of the frames' if key in looked else ''}</td></tr>"
                   for key, (shape, dtype) in data.schema.items())
    head = "".join(f"<th>{name}</th>" for name in ("key", "one frame", "dtype", "taken for", "unit", "images looked at"))
    return (f'<h2>Keys</h2><div class="card wide"><table><tr>{head}</tr>'
            f"{rows}</table></div>")

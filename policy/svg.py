"""Plots as SVG text, for pages that open from disk: no matplotlib, light and dark by the page's style, numbers on hover.

Classes the page's style gives a look: grid, curve, band, whisker, dot, unit, key; a colour class (c1 to c6, good, bad, none) sets --c.
"""
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

W, H, LEFT, RIGHT, TOP, BOTTOM = 520, 230, 46, 12, 10, 34  # a plot and its margins [px of the viewBox]
BUCKETS = 120  # points per curve; each is a mean, with the range of what it stands for behind it


def number(x: Any, digits: int = 3) -> str:
    """Short and readable: 0.934, 12.3k, 2.1M, – for what is missing or not finite."""
    if not isinstance(x, int | float) or not math.isfinite(x):
        return "–"
    x = float(f"{x:.{digits}g}")  # first, so that 999.9 becomes 1k and not 1e+03
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.{digits}g}{suffix}"
    return f"{x:.{digits}g}"


def finite(x: Any) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


@dataclass
class Series:
    """One line: y over x with the range lo..hi, drawn as a band, or as whiskers where there are dots."""
    name: str
    colour: str
    x: list[float]
    y: list[float]
    lo: list[float] = field(default_factory=list)
    hi: list[float] = field(default_factory=list)
    dots: bool = False


def curve(points: list[tuple[float, float]], name: str = "", colour: str = "c1") -> Series:
    """At most BUCKETS means with their ranges, so a run of any length is one readable line."""
    groups = [points[i * len(points) // BUCKETS:(i + 1) * len(points) // BUCKETS] for i in range(BUCKETS)]
    groups = [g for g in groups if g]
    ys = [[y for _, y in g] for g in groups]
    return Series(name, colour, [g[-1][0] for g in groups], [sum(y) / len(y) for y in ys], [min(y) for y in ys], [max(y) for y in ys])


def padded(values: Sequence[float]) -> tuple[float, float]:
    lo, hi = min(values), max(values)
    return (lo, hi) if hi > lo else (lo - 0.5 * (abs(lo) or 1), hi + 0.5 * (abs(hi) or 1))


def ticks(lo: float, hi: float, most: int = 6) -> list[float]:
    """Round numbers within [lo, hi], at most `most`."""
    raw = (hi - lo) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10, 20) if size * m >= raw and (hi - lo) / (size * m) <= most)
    return [i * step for i in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]


@dataclass
class Frame:
    """Axes: data coordinates to pixels of a w x h picture. With log, y0 and y1 are exponents of ten."""
    x0: float
    x1: float
    y0: float
    y1: float
    log: bool = False
    w: float = W
    h: float = H

    def x(self, value: float) -> float:
        return LEFT + (self.w - LEFT - RIGHT) * (value - self.x0) / (self.x1 - self.x0)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.h - BOTTOM - (self.h - TOP - BOTTOM) * (value - self.y0) / (self.y1 - self.y0)

    def x_axis(self, label: str) -> str:
        marks = "".join(f'<text x="{self.x(v):.1f}" y="{self.h - BOTTOM + 15}" text-anchor="middle">{number(v)}</text>'
                        for v in ticks(self.x0, self.x1))
        return (f'<line class="grid" x1="{LEFT}" x2="{self.w - RIGHT}" y1="{self.h - BOTTOM}" y2="{self.h - BOTTOM}"/>{marks}'
                f'<text x="{self.w - RIGHT}" y="{self.h - 3}" text-anchor="end">{escape(label)}</text>')

    def y_axis(self) -> str:
        if self.log:
            multiples = (1,) if self.y1 - self.y0 > 2 else (1, 2, 5)
            every = [m * 10.0**e for e in range(math.floor(self.y0), math.ceil(self.y1) + 1) for m in multiples]
            values = [v for v in every if self.y0 - 1e-9 <= math.log10(v) <= self.y1 + 1e-9]
            if len(values) < 3:  # less than a decade
                values = [v for v in ticks(10**self.y0, 10**self.y1, 5) if v > 0]
        else:
            values = ticks(self.y0, self.y1, 5)
        return "".join(f'<line class="grid" x1="{LEFT}" x2="{self.w - RIGHT}" y1="{self.y(v):.1f}" y2="{self.y(v):.1f}"/>'
                       f'<text x="{LEFT - 7}" y="{self.y(v) + 4:.1f}" text-anchor="end">{number(v)}</text>' for v in values)


def plot(title: str, series: Iterable[Series], *, x: str, log: bool = False, unit: bool = False, zero: bool = False, note: str = "") -> str:
    """A card with one plot, or '' when there is nothing to draw.

    log: y in decades, where every value allows it.   unit: y from 0 to 1, where that holds every value, x from 0.   zero: y from 0.
    """
    series = [s for s in series if s.x]
    if not series:
        return ""
    every = [v for s in series for v in (*s.y, *s.lo, *s.hi)]
    log = log and min(every) > 0
    y0, y1 = padded([math.log10(v) for v in every] if log else every)
    if unit and y0 >= 0 and y1 <= 1:
        y0, y1 = 0.0, 1.0
    elif zero and y0 > 0:
        y0, y1 = 0.0, 1.05 * max(every)
    across = [v for s in series for v in s.x]
    frame = Frame(*((0.0, max(across)) if unit and max(across) > 0 else padded(across)), y0, y1, log)
    keys = "".join(f'<span class="key {s.colour}"><small>{escape(s.name)}</small></span>' for s in series if s.name)
    drawn = "".join(draw(frame, s, x) for s in series)
    return (f'<div class="card"><h3>{escape(title)}{keys}<small>{escape(note)}</small></h3><svg viewBox="0 0 {W} {H}" role="img" '
            f'aria-label="{escape(title)}">{frame.y_axis()}{frame.x_axis(x)}{drawn}</svg></div>')


def draw(frame: Frame, s: Series, x: str) -> str:
    def path(points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in points)

    line = f'<polyline class="curve" points="{path(zip(s.x, s.y, strict=True))}"/>'
    if not s.dots:
        band = [*zip(s.x, s.hi, strict=True), *reversed(list(zip(s.x, s.lo, strict=True)))]
        return f'<g class="{s.colour}"><polygon class="band" points="{path(band)}"/>{line}</g>'
    dots = "".join(
        f'<line class="whisker" x1="{frame.x(px):.1f}" x2="{frame.x(px):.1f}" y1="{frame.y(lo):.1f}" y2="{frame.y(hi):.1f}"/>'
        f'<circle class="dot" cx="{frame.x(px):.1f}" cy="{frame.y(py):.1f}" r="4"><title>{escape(s.name)} {number(py)} '
        f'({number(lo)} – {number(hi)}) at {number(px)} {escape(x)}</title></circle>'
        for px, py, lo, hi in zip(s.x, s.y, s.lo, s.hi, strict=True))
    return f'<g class="{s.colour}">{line}{dots}</g>'


def tiles(items: Sequence[tuple[float, str, str]], *, x: str, bins: int = 25) -> str:
    """A histogram that keeps its items apart: each (value, colour, hover text) is one tile, stacked in the order given."""
    values = [value for value, *_ in items]
    lo, hi = (0.0, 1.0) if min(values) >= 0 and max(values) <= 1 else padded(values)
    stacks: list[list[tuple[float, str, str]]] = [[] for _ in range(bins)]
    for item in items:
        stacks[min(bins - 1, int(bins * (item[0] - lo) / (hi - lo)))].append(item)
    frame = Frame(lo, hi, 0, max(10, *map(len, stacks)), w=2 * W, h=H)
    width, height = (frame.x(hi) - frame.x(lo)) / bins, frame.y(0) - frame.y(1)
    drawn = "".join(
        f'<rect class="unit {colour}" x="{LEFT + i * width:.1f}" y="{frame.y(j + 1):.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(hover)}</title></rect>" for i, stack in enumerate(stacks) for j, (_, colour, hover) in enumerate(stack))
    return f'<svg viewBox="0 0 {frame.w} {frame.h}" role="img" aria-label="{escape(x)}">{frame.y_axis()}{frame.x_axis(x)}{drawn}</svg>'


def forest(rows: Sequence[tuple[str, float, float, float, str]], *, x: str) -> str:
    """Differences (name, value, lo, hi, words) below each other, with their intervals, about a line at 0."""
    reach = max(0.02, *(1.05 * abs(v) for _, *values, _ in rows for v in values))
    left, right, each, w = 230, 210, 34, 2 * W
    h = each * len(rows) + TOP + BOTTOM

    def at(value: float) -> float:
        return left + (w - left - right) * (value + reach) / (2 * reach)

    lines = "".join(f'<line class="grid" x1="{at(v):.1f}" x2="{at(v):.1f}" y1="{TOP}" y2="{h - BOTTOM}"/>'
                    f'<text x="{at(v):.1f}" y="{h - BOTTOM + 15}" text-anchor="middle">{number(v)}</text>' for v in ticks(-reach, reach, 8))
    zero = f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{TOP}" y2="{h - BOTTOM}"/>'
    drawn = ""
    for i, (name, value, lo, hi, words) in enumerate(rows):
        y, colour = TOP + each * (i + 0.5), "good" if lo > 0 else "bad" if hi < 0 else "none"
        drawn += (f'<g class="{colour}"><text x="{left - 14}" y="{y + 4}" text-anchor="end">{escape(last(name, 31))}</text>'
                  f'<line class="whisker" x1="{at(lo):.1f}" x2="{at(hi):.1f}" y1="{y}" y2="{y}"/><circle class="dot" cx="{at(value):.1f}" cy="{y}" r="5"/>'
                  f'<text x="{w - right + 14}" y="{y + 4}">{escape(words)}</text></g>')
    return (f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{escape(x)}">{lines}{zero}{drawn}'
            f'<text x="{w - right}" y="{h - 3}" text-anchor="end">{escape(x)}</text></svg>')


def last(name: str, n: int) -> str:
    """A name of n characters at most, its end, which tells it from others."""
    return name if len(name) <= n else "…" + name[1 - n:]


def matrix(rows: Sequence[tuple[str, Sequence[bool]]], columns: Sequence[object]) -> str:
    """Who succeeded (name, (n,)) on which of the columns (n,): green or red, columns named on hover."""
    left, each, w = min(400, max(160, 7 * max((len(name) for name, _ in rows), default=0) + 12)), 26, 2 * W
    width = (w - left - RIGHT) / max(1, len(columns))
    drawn = ""
    for j, column in enumerate(columns):
        cells = "".join(f'<rect class="unit {"good" if won[j] else "bad"}" x="{left + j * width:.2f}" y="{TOP + i * each}" width="{width:.2f}" '
                        f'height="{each - 4}"/>' for i, (_, won) in enumerate(rows))
        said = ", ".join(f"{name} {'success' if won[j] else 'failure'}" for name, won in rows)
        drawn += f"<g><title>{escape(f'seed {column}: {said}')}</title>{cells}</g>"
    names = "".join(f'<text x="{left - 12}" y="{TOP + i * each + 15}" text-anchor="end">{escape(last(name, 55))}</text>' for i, (name, _) in enumerate(rows))
    return f'<svg viewBox="0 0 {w} {TOP + each * len(rows)}" role="img" aria-label="successes by seed">{names}{drawn}</svg>'

"""What every page is made of: one style, numbers in words, a page that opens from disk and asks nothing of the network.

Whatever comes from a run is escaped where it enters.
"""
import json
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from policy.svg import finite, number

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
.big b{font-size:44px;line-height:1.15}.cards .card:only-child{max-width:360px}.plots .card:only-child{max-width:640px}
.card+.card,p+.card,.card+p{margin-top:14px}
.plots .card,.cards .card{margin-top:0}header{margin-bottom:24px}
.range{position:relative;height:8px;border-radius:4px;background:var(--line);margin:8px 0 6px}
.range i{position:absolute;top:0;bottom:0;border-radius:4px;background:var(--one);opacity:.45;min-width:2px}
.range u{position:absolute;top:-3px;bottom:-3px;width:3px;margin-left:-1.5px;border-radius:2px;background:var(--one)}
.note{border-left:4px solid var(--bad);background:var(--card);border-radius:6px;padding:10px 14px;margin-top:20px}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.grid{stroke:var(--line)}.zero{stroke:var(--soft)}.c1{--c:var(--one)}.c2{--c:var(--two)}.c3{--c:var(--good)}.c4{--c:#a855f7}.c5{--c:#0d9488}.c6{--c:#db2777}
.good{--c:var(--good)}.bad{--c:var(--bad)}.none{--c:var(--soft)}
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
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:6px 12px 6px 0;text-align:left;border-bottom:1px solid var(--line);
vertical-align:top}th{font-weight:600}td small{display:block;white-space:nowrap}td code{overflow-wrap:anywhere}
.wide{overflow-x:auto}.whole{grid-column:1/-1}.whole video,
figure.wide video{aspect-ratio:auto;max-height:80vh}
.videos.broad{grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr))}
details{margin-bottom:10px}summary{cursor:pointer;padding:6px 0;font-weight:600}
"""
COPY = "navigator.clipboard.writeText(this.previousElementSibling.textContent).then(()=>{this.textContent='copied'})"


def write(path: Path, title: str, parts: Iterable[str]) -> Path:
    """A page of these parts, empty ones left out."""
    body = "\n".join(part for part in parts if part)
    path.write_text(f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
                    f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>\n'
                    f"<body><main>\n{body}\n</main></body></html>\n", encoding="utf-8")
    return path


def read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}). Run `dipole eval` again, or remove the file") from error


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Replace the file, or leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(path)


def with_cost(log: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluation rows, each with the CPU-seconds spent so far: its own, or those of the training row before it."""
    spent, rows = 0.0, []
    for row in log:
        spent = row.get("cpu_s") or spent
        if "eval" in row:
            rows.append({**row, "cpu_s": spent})
    return rows


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


def command(metrics: dict[str, Any]) -> str:
    if not metrics.get("command"):
        return ""
    text = escape(str(metrics["command"]))
    return f'<h2>Reproduce</h2><div class="run"><pre>{text}</pre><button type="button" onclick="{escape(COPY)}">copy</button></div>'


def videos(folder: Path, metrics: dict[str, Any]) -> str:
    """The grid across the page, then each episode; videos that nobody listed where there is no list."""
    grid = metrics.get("video_grid")
    films = metrics.get("videos") or [{"file": p.relative_to(folder).as_posix()} for p in sorted(folder.glob("videos/*.mp4")) if p.name != "grid.mp4"]
    figures = []
    if grid and (folder / grid).is_file():
        figures.append(f'<figure class="none whole">{player(folder, grid)}<figcaption class="soft">all of them at once</figcaption></figure>')
    for film in films:
        facts = [str(film["caption"])] if film.get("caption") else []
        facts += [f"seed {film['seed']}"] if film.get("seed") is not None else []
        facts += [f"score {number(film['score'])}"] if finite(film.get("score")) else []
        verdict = {True: "✓ success", False: "✗ failure"}.get(film.get("success"), "")  # words too: not everyone sees red and green
        wide = " wide" if film.get("wide") else ""
        figures.append(f'<figure class="{mark(film.get("success"))}{wide}">{player(folder, film["file"])}<figcaption><strong>{verdict}</strong> '
                       f'<span class="soft">{escape(" · ".join(facts) or Path(film["file"]).stem)}</span></figcaption></figure>')
    kind = "videos broad" if any(film.get("wide") for film in films) else "videos"
    return f'<h2>Videos</h2><section class="{kind}">{"".join(figures)}</section>' if figures else ""


def player(folder: Path, file: str) -> str:
    if not (folder / file).is_file():
        return f'<div class="gone">{escape(file)} is gone</div>'
    return f'<video controls loop muted playsinline preload="metadata" src="{quote(file)}"></video>'


def mark(success: Any) -> str:
    return "none" if success is None else "good" if success else "bad"

"""The suite's table as text, as json, as markdown for the README, and as a page with bars."""
import json
import os
import subprocess
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.markup import escape as plainly
from rich.table import Table

from policy.page import STYLE
from policy.train import checkpoint
from policy.train.log import console

Facts = dict[str, Any]
MORE = """
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:8px 12px 8px 0;vertical-align:top;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:400;font-size:13px}.range{min-width:220px}.range a{position:absolute;top:-4px;width:5px;height:16px;margin-left:-2.5px;
border-radius:3px;background:var(--ink);opacity:.5}.range a:hover{opacity:1}td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
"""


def write(folder: Path, rows: Facts) -> None:
    """suite.json, suite.md and suite.html, each replaced as a whole."""
    machine = {"cores": os.cpu_count(), "versions": checkpoint.versions()}
    for name, text in {"suite.json": json.dumps({"rows": rows, "machine": machine}, indent=1), "suite.md": markdown(rows), "suite.html": page(rows)}.items():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def show(rows: Facts) -> None:
    table = Table("row", "train, CPU-s", "success, 95 %", "score, 95 %", "by seed", box=SIMPLE_HEAD, pad_edge=False)
    for r in rows.values():
        if "success" in r:
            table.add_row(r["name"], f"{spent(r)} of {r['budget_cpu_s']:g}", rate(r), score(r), by_seed(r))
    console.print(table)
    for r in rows.values():
        if why := why_not(r):
            console.print(f"[yellow]{r['name']}[/] {plainly(why)}", highlight=False)


def where(cfg: Any) -> Path:
    """The page of `dipole bench suite`."""
    return Path(cfg.run) / "suite" / "suite.html"


def headline(rows: Facts) -> str:
    done = [r for r in rows.values() if "success" in r]
    return f"{len(done)} of {len(rows)} rows done" + (": " + ", ".join(f"{r['name']} {r['success']:.0%}" for r in done) if done else "")


def markdown(rows: Facts) -> str:
    """A table ready for the README: each number beside its commit; the commands are in suite.json."""
    lines = ["| task | demonstrations | recipe | training, CPU-s | success over distinct seeds | by training seed | commit |", "|---|---|---|---|---|---|---|"]
    for r in rows.values():
        over = sorted({c["episodes"] for c in r["cells"] if c["status"] == "done"})
        bounds = ", ".join(f"{100 * x:.1f}" for x in r["success_ci"]) if over else ""
        result = f"**{r['success']:.1%}** [{bounds}] of {'/'.join(map(str, over))}" if over else why_not(r)
        commits = ", ".join(f"`{c}`" for c in sorted({c["commit"] for c in r["cells"] if c.get("commit")}))
        cells = [r["name"], str(r.get("demonstrations", "recorded")), f"`{r['recipe']}`", f"{spent(r)}", result, by_seed(r), commits]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Facts) -> str:
    said = ("Success over distinct seeds; the band is the 95 % interval of the mean over training seeds, a mark is one training "
            "and leads to its report.")
    return document("suite", "Suite", said, ("task", "success", "", "training, CPU-s", "recipe"), "".join(line(r) for r in rows.values()))


def document(title: str, heading: str, said: str, columns: Sequence[str], body: str) -> str:
    """A page that is one table; body: its rows as html."""
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title} · dipole</title><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><style>{STYLE}{MORE}</style></head>\n<body><main><h1>{heading}</h1>'
            f'<p class="soft">{said}</p><div class="card"><table><tr>{head}</tr>{body}</table></div></main></body></html>\n')


def line(r: Facts) -> str:
    if "success" not in r:
        return f'<tr class="soft"><td>{escape(r["name"])}</td><td colspan="4">{escape(why_not(r))}</td></tr>\n'
    lo, hi = r["success_ci"]
    marks = "".join(f'<a href="{escape(quote(c["report"]), quote=True)}" style="left:{100 * c["success"]:.2f}%" '
                    f'title="training seed {c["seed"]}: {c["success"]:.1%} of {c["episodes"]}"></a>' for c in r["cells"] if c["status"] == "done")
    lost = f'<br><small>{escape(why_not(r))}</small>' if any(c["status"] == "failed" for c in r["cells"]) else ""
    return (f'<tr><td>{escape(r["name"])}{lost}</td><td class="n">{rate(r)}</td><td><div class="range">'
            f'<i style="left:{100 * lo:.2f}%;width:{100 * (hi - lo):.2f}%"></i><u style="left:{100 * r["success"]:.2f}%"></u>{marks}</div></td>'
            f'<td class="n">{spent(r)} of {r["budget_cpu_s"]:g}</td><td><code>{escape(r["recipe"])}</code></td></tr>\n')


def rate(r: Facts) -> str:
    return f"{r['success']:.1%} [{r['success_ci'][0]:.1%}, {r['success_ci'][1]:.1%}]" if "success" in r else ""


def score(r: Facts) -> str:
    return f"{r['score']:.3f} [{r['score_ci'][0]:.3f}, {r['score_ci'][1]:.3f}]" if "score" in r else ""


def by_seed(r: Facts) -> str:
    return ", ".join(f"{c['success']:.0%}" if c["status"] == "done" else "failed" for c in r["cells"]) if r["cells"] else ""


def spent(r: Facts) -> str:
    """CPU-seconds of training, of all its seeds: 118 or 112-121."""
    each = sorted(c["train_cpu_s"] for c in r["cells"] if c["status"] == "done")
    return "" if not each else f"{each[0]:.0f}" if round(each[0]) == round(each[-1]) else f"{each[0]:.0f}-{each[-1]:.0f}"


def why_not(r: Facts) -> str:
    bad = [c for c in r["cells"] if c["status"] == "failed"]
    return f"skipped: {r['skipped']}" if r.get("skipped") else f"seed {bad[0]['seed']} failed: {bad[0]['reason']}" if bad else ""


def commit() -> str:
    """The commit of this code, with + when it has been changed since; '' outside of a repository."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""
    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")

"""The table of formalisms as text, json, markdown for the README, and a page with bars."""
import json
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.box import SIMPLE_HEAD
from rich.table import Table

from policy.train.log import console
from scripts.suite_page import document, why_not

Facts = dict[str, Any]
HEAD = ("row", "backbone", "training, CPU-s", "score over distinct seeds, 95 %", "difference to the first, paired", "network calls", "one plan, ms",
        "bound, nats/dim", "exact, nats/dim")


def write(folder: Path, rows: Facts) -> None:
    """family.json, family.md and family.html, each replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"family.json": json.dumps(rows, indent=1), "family.md": markdown(rows), "family.html": page(rows)}.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def cells(r: Facts) -> list[str]:
    """The texts of one finished row, under HEAD."""
    each = sorted(round(c["train_cpu_s"]) for c in r["cells"] if c["status"] == "done")
    spent = "" if not each else f"{each[0]}" if each[0] == each[-1] else f"{each[0]}-{each[-1]}"
    lo, hi = r["score_ci"]
    apart = "" if "difference" not in r else f"{r['difference']:+.3f} [{r['difference_ci'][0]:+.3f}, {r['difference_ci'][1]:+.3f}]"
    return [r["name"], r["net"], spent, f"{r['score']:.3f} [{lo:.3f}, {hi:.3f}]", apart, str(r.get("calls") or ""),
            f"{r['plan_ms']:.1f}" if r.get("plan_ms") else "", nats(r, "bound"), nats(r, "exact")]


def nats(r: Facts, which: str) -> str:
    found = (r.get("nats") or {}).get(which)
    return f"{found:.2f}" if isinstance(found, int | float) else ""


def show(rows: Facts) -> None:
    table = Table(*HEAD, box=SIMPLE_HEAD, pad_edge=False)
    for r in rows.values():
        if "score" in r:
            table.add_row(*cells(r))
    console.print(table)
    for r in rows.values():
        if why := why_not(r):
            console.print(f"[yellow]{r['name']}[/] {why}", highlight=False)


def headline(rows: Facts) -> str:
    done = [r for r in rows.values() if "score" in r]
    best = max(done, key=lambda r: r["score"], default=None)
    return f"{len(done)} of {len(rows)} rows done" + (f"; best {best['name']} {best['score']:.3f}" if best else "")


def markdown(rows: Facts) -> str:
    lines = ["| " + " | ".join(HEAD) + " | commit |", "|" + "---|" * (len(HEAD) + 1)]
    for r in rows.values():
        commits = ", ".join(f"`{c}`" for c in sorted({c["commit"] for c in r["cells"] if c.get("commit")}))
        lines.append("| " + " | ".join([*cells(r), commits] if "score" in r else [r["name"], why_not(r), *[""] * (len(HEAD) - 1)]) + " |")
    return "\n".join(lines) + "\n"


def page(rows: Facts) -> str:
    said = "Score over distinct seeds with its 95 % interval; the mark leads to the evaluation."
    return document("formalisms", "One algebra, every formalism", said, ("row", "score", "", *HEAD[4:]), "".join(line(r) for r in rows.values()))


def line(r: Facts) -> str:
    if "score" not in r:
        return f'<tr class="soft"><td>{escape(r["name"])}</td><td colspan="{len(HEAD)}">{escape(why_not(r))}</td></tr>\n'
    name, net, spent, score, *rest = cells(r)
    lo, hi = r["score_ci"]
    marks = "".join(f'<a href="{escape(quote(c["report"]), quote=True)}" style="left:{100 * c["score"]:.2f}%" title="training seed {c["seed"]}"></a>'
                    for c in r["cells"] if c["status"] == "done")
    return (f'<tr><td>{escape(name)}<br><small>{escape(net)}, {spent} CPU-s</small></td><td class="n">{score}</td><td><div class="range">'
            f'<i style="left:{100 * lo:.2f}%;width:{100 * (hi - lo):.2f}%"></i><u style="left:{100 * r["score"]:.2f}%"></u>{marks}</div></td>'
            + "".join(f'<td class="n">{escape(text)}</td>' for text in rest) + "</tr>\n")

"""What `dipole export` found, as tables in the terminal and as a page."""
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from policy import page
from policy.serve.card import Card
from policy.train.log import console

SAME = ("merge", "median", "largest", "planner's own", "largest physical, per dimension")
SPEED = ("one plan", "CPU ms", "wall p50, ms", "wall p99, ms", "times faster")


def same(card: Card) -> list[list[str]]:
    """Texts under SAME. The planner's own is its distance in fp32 from itself in double precision, where that was asked."""
    return [[merge, f"{row['median']:.1e}", f"{row['normalised']:.1e}", f"{row['own']:.1e}" if row["own"] else "",
             " ".join(f"{v:.1e}" for v in row["physical"])] for merge, row in card.facts["parity"]["merges"].items()]


def speed(card: Card) -> list[list[str]]:
    """Texts under SPEED; a guided plan is compared with the planner's guided one."""
    rows: Mapping[str, Any] = card.facts["latency"]
    first = {name: rows["eager, guided" if name.endswith(", guided") else "eager"]["cpu_ms"] for name in rows}
    return [[name, *(f"{row[k]:.1f}" for k in ("cpu_ms", "wall_p50_ms", "wall_p99_ms")), f"{first[name] / row['cpu_ms']:.1f}"] for name, row in rows.items()]


def show(card: Card) -> None:
    titles = (f"normalised difference to the planner over {card.facts['parity']['observations']}", f"threads: {card.facts['threads']}")
    for head, rows, title in ((SAME, same(card), titles[0]), (SPEED, speed(card), titles[1])):
        table = Table(*head, title=title, box=SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_page(out: Path, card: Card) -> Path:
    facts = card.facts
    about = {"model": card.model_id, "task": card.task, "observations": ", ".join(f"{k} {tuple(v)}" for k, v in card.obs.items()),
             "actions": f"{card.horizon} × {card.action_dim}, every {card.dt:g} s", "meaning": card.action_semantics, "units": card.units,
             "joints": ", ".join(f"{name} [{unit}]" for name, unit in zip(card.joints, card.joint_units, strict=True)),
             "range of the demonstrations": ", ".join(f"{a:.3g} … {b:.3g}" for a, b in zip(card.seen_low, card.seen_high, strict=True)),
             "merges": ", ".join(card.merges), "warm start": facts["warm"], "network calls": facts["solver"]["calls"],
             "from": f"{facts['run']}/{facts['checkpoint']}, step {facts['step']}"}
    return page.write(out / "report.html", f"export of {card.task}", [
        f"<header><div class='over'>export</div><h1>{escape(card.task or 'policy')} as {escape(facts['format'])}, {escape(facts['precision'])}</h1></header>",
        _table((), [[k, str(v)] for k, v in about.items() if v]),
        f"<h2>Differences to the planner</h2><p class='soft'>in half ranges of the training data, over {escape(facts['parity']['observations'])}</p>",
        _table(SAME, same(card)), f"<h2>One plan, threads: {facts['threads']}</h2>", _table(SPEED, speed(card)), page.command(dict(facts))])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>" if head else ""
    return f"<div class='wide'><table>{top}{''.join('<tr>' + ''.join(f'<td>{escape(c)}</td>' for c in row) + '</tr>' for row in rows)}</table></div>"

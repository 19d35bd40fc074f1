"""`dipole bench seams`: how plans join when they come late: success, peak commanded acceleration and seam of every merge, delay and training seed.

Training and evaluation are the suite's stages (scripts/suite.py), so the same command goes on where it stopped.
"""
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from policy.stats import Interval, Paired, Z, wilson
from policy.train.log import console
from scripts import common, suite
from scripts.delay import named

MERGES = ("naive", "ensemble", "frozen", "guided", "identity", "frozen@0.8", "guided@0.8")  # @: with a warm start at that noise time
Facts = dict[str, Any]


def measure(cfg: DictConfig) -> Facts:
    """Train what is not trained yet, evaluate it late, in <run>/seams: {row: {seed: the contents of delay.json}}."""
    folder, rows = Path(cfg.run) / "seams", {}
    for name, row in common.plain(cfg.seams.rows).items():
        merges, said = row.pop("merges", MERGES), row.pop("control", [])
        rows[name] = {"eval": ["videos=0", *said, "episodes=1"], **row, "after": [[*asked(cfg, merges), *said]]}
    told = OmegaConf.merge(cfg, {"rows": None})
    told.rows = rows
    assert isinstance(told, DictConfig)
    found = {}
    for name, row in suite.measure(told, "seams").items():
        seeds = {c["seed"]: suite.read(folder / name / f"seed{c['seed']}" / "eval" / "delay" / "delay.json") for c in row["cells"] if c["status"] == "done"}
        found[name] = {"recipe": row["recipe"], "seeds": {seed: kept for seed, kept in seeds.items() if kept}}
    (folder / "seams.md").write_text(markdown(found), encoding="utf-8")
    return found


def asked(cfg: DictConfig, merges: list[str] | tuple[str, ...]) -> list[str]:
    """What `dipole eval` is told of a trained run."""
    lists = {"merges": merges, "delays": cfg.seams.delays, "dims": cfg.seams.dims}
    said = [f"{key}=[{','.join(map(str, value))}]" for key, value in lists.items() if value is not None]
    return ["eval", "do=delay", *said, f"gate={cfg.seams.gate}", f"episodes={cfg.episodes}", f"seed={cfg.seed}"]


def cells(found: Facts) -> list[tuple[str, int, str, list[Facts]]]:
    """(row, training seed, merge, its points by delay)."""
    return [(name, seed, merge, points) for name, row in found.items() for seed, kept in row["seeds"].items() for merge, points in kept["curves"].items()]


def ratio(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, Interval]:
    """Success after / before on the same seeds, with its 95 % interval (Bonett and Price 2006: Wilson's intervals, narrowed by what the pairs share)."""
    pairs = Paired.of(before, after)
    n, was, now = pairs.n - pairs.neither, pairs.both + pairs.only_a, pairs.both + pairs.only_b
    if not was:
        return math.nan, (0.0, math.inf)
    widths = [math.sqrt((1 - (won + 1) / (n + 2)) / (won + 1)) for won in (was, now)]
    z = Z * math.sqrt((pairs.only_a + pairs.only_b + 2) / ((was + 1) * (now + 1))) / sum(widths)
    (lo_was, hi_was), (lo_now, hi_now) = wilson(was, n, z), wilson(now, n, z)
    return now / was, (lo_now / hi_was, hi_now / lo_was)


def keeps(kept: Facts, merge: str) -> list[str]:
    """With the gate's delay, in words: success over that without delay, of the same merge and of naive; peak acceleration over naive's with that delay."""
    late, won = kept["gate"]["delay"], {run["name"]: run["per_seed"]["success"] for run in kept["runs"]}
    shares = [ratio(won[named(0, other)], won[named(late, merge)]) for other in (merge, "naive")]
    peak = {m: next(p["accel_peak"] for p in kept["curves"][m] if p["delay"] == late) for m in (merge, "naive")}
    less = [f"{peak[merge] / peak['naive']:.0%}"] if peak[merge] is not None and peak["naive"] else ["–"]
    return [f"{share:.1%} [{lo:.1%}, {hi:.1%}]" for share, (lo, hi) in shares] + less


def figures(point: Facts, naive: Facts) -> str:
    """Success, peak acceleration with its share of naive's, seam."""
    peak, most, seam = point["accel_peak"], naive["accel_peak"], point["seam"]
    if peak is None or seam is None or not most:
        return f"{point['success']:.0%}"
    return f"{point['success']:.0%} · {peak:.3g} ({peak / most:.0%}) · {100 * seam:.1f}"


def lines(found: Facts) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table."""
    every = cells(found)
    delays = [p["delay"] for p in every[0][3]] if every else []
    fps = next((kept["fps"] for row in found.values() for kept in row["seeds"].values()), 0)
    heads = ["row", "seed", "merge", *(f"{d} steps" + (f" ({1000 * d / fps:.0f} ms)" if fps else "") for d in delays)]
    body = []
    for name, seed, merge, points in every:
        naive = found[name]["seeds"][seed]["curves"]["naive"]
        body.append([name, str(seed), merge, *(figures(p, n) for p, n in zip(points, naive, strict=True))])
    return heads, body


def markdown(found: Facts) -> str:
    heads, body = lines(found)
    said = [f"- {name}, seed {seed}: {kept['gate']['line']}" for name, row in found.items() for seed, kept in row["seeds"].items()]
    late = [[name, str(seed), merge, *keeps(found[name]["seeds"][seed], merge)] for name, seed, merge, points in cells(found) if points[0]["delay"] == 0]
    more = ["row", "seed", "merge", "of its own success without delay", "of naive's", "peak acceleration, of naive's"]
    return "\n".join(["Success · peak commanded acceleration in action units / s² (share of naive's) · step where plans join, % of range.", "",
                      *piped([heads, *body]), "", "What is kept at the gate's delay, on the same seeds, with 95 % intervals.", "",
                      *piped([more, *late]), "", *said, ""])


def piped(table: list[list[str]]) -> list[str]:
    """Lines of a markdown table, heads first."""
    return ["| " + " | ".join(row) + " |" for row in (table[0], ["---"] * len(table[0]), *table[1:])]


def show(found: Facts) -> None:
    heads, body = lines(found)
    table = Table(*heads, box=SIMPLE_HEAD, pad_edge=False, title="success · peak acceleration (share of naive's) · seam, % of range")
    for row in body:
        table.add_row(*row)
    console.print(table)


def headline(found: Facts) -> str:
    gates = [(name, seed, kept["gate"]) for name, row in found.items() for seed, kept in row["seeds"].items()]
    return "; ".join(f"{name} seed {seed}: {g['merge']} keeps {g['kept'][g['merge']][0]:.0%} of the success at "
                     f"{share(g):.0%} of naive's peak acceleration" for name, seed, g in gates)


def share(gate: Facts) -> float:
    peak = gate["accel_peak_normalised"]
    return float(peak[gate["merge"]] / (peak["naive"] or 1))


def page(cfg: DictConfig) -> Path:
    return Path(cfg.run) / "seams" / "seams.md"

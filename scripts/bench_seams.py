"""`dipole bench seams`: how plans join when they come late: success, peak commanded acceleration and seam of every merge, delay and training seed.

Training and evaluation are the suite's stages (scripts/suite.py), so the same command goes on where it stopped.
"""
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE_HEAD
from rich.table import Table

from policy.train.log import console
from scripts import common, suite

MERGES = ("naive", "ensemble", "frozen", "guided", "identity", "frozen@0.8", "guided@0.8")  # @: with a warm start at that noise time
Facts = dict[str, Any]


def measure(cfg: DictConfig) -> Facts:
    """Train what is not trained yet, evaluate it late, in <run>/seams: {row: {seed: the contents of delay.json}}."""
    folder, rows = Path(cfg.run) / "seams", {}
    for name, row in common.plain(cfg.seams.rows).items():
        merges = row.pop("merges", MERGES)
        rows[name] = {"eval": ["videos=0"], **row, "after": [asked(cfg, merges)]}
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
    table = [heads, ["---"] * len(heads), *body]
    return "\n".join(["Success · peak commanded acceleration in action units / s² (share of naive's) · step where plans join, % of range.", "",
                      *("| " + " | ".join(row) + " |" for row in table), "", *said, ""])


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

"""Policies on the same seeds: paired differences with their intervals, and the page that shows them.

`compare` makes the contents of compare.json from evaluations, `write_page` a page from those alone.
"""
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from policy.page import command, counted, duration, interval, percent, seed_range, videos, write
from policy.stats import Paired, bootstrap, holm, mean_interval
from policy.svg import Series, finite, forest, matrix, number, plot

COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")


def compare(evaluations: dict[str, dict[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Differences of each evaluation {name: metrics} to the first over `seeds`, which all of them hold. p of success is corrected for their number."""
    runs = [_over(name, metrics, seeds) for name, metrics in evaluations.items()]
    first, *others = runs
    pairs = []
    for other in others:
        success = Paired.of(first["per_seed"]["success"], other["per_seed"]["success"]).summary()
        scores = [(a, b) for a, b in zip(first["per_seed"]["score"], other["per_seed"]["score"], strict=True) if a is not None and b is not None]
        pairs.append({"first": first["name"], "second": other["name"], "success": success, "score": _score(scores, success)})
    for pair, p in zip(pairs, holm([pair["success"]["p"] for pair in pairs]), strict=True):
        pair["success"]["p_holm"] = p
    return {"task": first["metrics"].get("task", ""), "seeds": list(seeds), "runs": runs, "differences": pairs}


def _over(name: str, metrics: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """An evaluation, its success and score taken over these seeds alone."""
    by_seed = {e["seed"]: e for e in metrics["per_episode"]}
    mine = [by_seed[s] for s in seeds]
    won, score = [bool(e["success"]) for e in mine], [e["score"] for e in mine]
    sound = [s for s in score if s is not None]
    kept = {k: v for k, v in metrics.items() if k not in ("per_episode", "seeds", "videos", "success", "success_ci", "score", "score_ci")}
    return {"name": name, "success": float(np.mean(won)), "success_ci": list(mean_interval(won)),
            "score": float(np.mean(sound)) if sound else None, "score_ci": list(mean_interval(sound)) if sound else None,
            "per_seed": {"success": won, "score": score}, "metrics": kept}


def _score(pairs: Sequence[tuple[float, float]], success: dict[str, Any]) -> dict[str, Any] | None:
    """Mean difference of the scores (first, second), seed by seed, so that what makes a seed hard for both falls out."""
    if not pairs:
        return None
    difference = np.array([b - a for a, b in pairs])
    zero_one = np.isin(np.array(pairs), (0, 1)).all() and len(pairs) == success["n"]
    return {"difference": float(difference.mean()), "difference_ci": success["difference_ci"] if zero_one else list(bootstrap(difference))}


def sentence(pair: dict[str, Any]) -> str:
    """The difference of success in words: b - a, its interval, p (corrected for the number of comparisons), and the seeds that would settle it."""
    s = pair["success"]
    lo, hi = s["difference_ci"]
    p, need = s.get("p_holm", s["p"]), s["episodes_needed"]
    known = "p < .001" if p < 0.001 else f"p = {p:.3f}"
    more = "" if p < 0.05 else "; they won equally often" if need is None else f"; to tell such a difference apart takes about {need:,} seeds"
    return (f"{pair['second']} - {pair['first']}: success {100 * s['difference']:+.1f} points [{100 * lo:+.1f}, {100 * hi:+.1f}], {known} "
            f"(only {pair['first']} wins {s['only_first']}, only {pair['second']} {s['only_second']} of {s['n']} seeds){more}")


# ---------------------------------------------------------------- the page
def write_page(folder: Path, found: dict[str, Any], *, title: str = "", plots: Sequence[str] = ()) -> Path:
    """<folder>/report.html from the contents of compare.json. plots: cards shown first."""
    names = [run["name"] for run in found["runs"]]
    title = title or " · ".join(names)
    head = (f'<header><div class="over">dipole · {escape(str(found["task"]))}</div><h1>{escape(title)}</h1><div class="soft">'
            f'{escape(counted(len(found["seeds"]), "seed"))}, the same for all: {escape(seed_range(found["seeds"]))}</div></header>')
    parts = [head, *plots, _differences(found["differences"]), _table(found["runs"]), _seeds(found), _curves(found["runs"]),
             videos(folder, found), command(found)]
    return write(folder / "report.html", f"{title} · dipole", parts)


def _differences(pairs: Sequence[dict[str, Any]]) -> str:
    out = ""
    for key, name, scale, form in (("success", "Success", 100, "+.1f"), ("score", "Score", 1, "+.3f")):
        shown = [(pair["second"], pair[key]) for pair in pairs if pair[key]]
        if key == "score" and all(d["difference_ci"] == pair["success"]["difference_ci"] for pair in pairs if (d := pair[key])):
            continue  # the score is success
        values = [(other, [scale * v for v in (d["difference"], *d["difference_ci"])]) for other, d in shown]
        rows = [(other, *each, "{} [{}, {}]".format(*(format(v, form) for v in each))) for other, each in values]
        if rows:
            note = "95 % intervals, paired by seed" + (", in points" if scale > 1 else "")
            out += (f'<div class="card"><h3>{name}: difference to {escape(pairs[0]["first"])}<small>{note}</small></h3>'
                    f"{forest(rows, x='difference')}</div>")
    words = "".join(f"<p>{escape(sentence(pair))}</p>" for pair in pairs)
    several = f"<p class='soft'>p is corrected for {len(pairs)} comparisons (Holm).</p>" if len(pairs) > 1 else ""
    return f"<h2>Differences</h2>{words}{several}{out}"


def _table(runs: Sequence[dict[str, Any]]) -> str:
    """One column per run, one row per number that any of them has."""
    def get(run: dict[str, Any], *path: str) -> Any:
        node: Any = run
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def numbers(*path: str, scale: float = 1) -> list[str]:
        return [number(scale * v) if finite(v := get(run, "metrics", *path)) else "–" for run in runs]

    names = dict.fromkeys(name for run in runs for name in get(run, "metrics", "measures") or {})
    sampler = [str(get(run, "metrics", "sampler", "fn", "_target_") or "–").rsplit(".", 1)[-1] for run in runs]
    control = [", ".join(f"{k} {v}" for k, v in (get(run, "metrics", "control") or {}).items()) or "–" for run in runs]
    rows = [("success", [percent(run["success"]) + interval(run["success"], run["success_ci"], percent) for run in runs]),
            ("score", [number(run["score"]) + (interval(run["score"], run["score_ci"], number) if finite(run["score"]) else "") for run in runs]),
            ("return", numbers("return")), ("steps of an episode", numbers("length", "mean")), ("steps of a success", numbers("length", "success")),
            *((f"{name}, greatest / last", [f"{a} / {b}" for a, b in zip(numbers("measures", name, "max"), numbers("measures", name, "last"), strict=True)])
              for name in names),
            ("ran out of time", numbers("ended", "truncated")), ("broke off", numbers("ended", "fault")),
            ("seam over inner steps", numbers("smoothness", "seam_ratio")), ("jerk, ranges/s³", numbers("smoothness", "jerk_normalised")),
            ("one plan, ms (p50)", numbers("plan_ms", "p50")), ("one plan, ms (p99)", numbers("plan_ms", "p99")),
            ("sampler", [f"{a}, {b} steps" for a, b in zip(sampler, numbers("sampler", "steps"), strict=True)]), ("control", control),
            ("checkpoint", [str(get(run, "metrics", "checkpoint") or "–") for run in runs]), ("training steps", numbers("step")),
            ("training", [f"{duration(v)} of CPU" if finite(v := get(run, "metrics", "cpu_s")) else "–" for run in runs])]
    safe = {"success", "score"}  # these cells are pictures made here
    body = "".join(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{c if name in safe else escape(c)}</td>' for c in cells)}</tr>"
                   for name, cells in rows if set(cells) - {"–", "– / –", "–, – steps"})
    heads = "".join(f"<th>{escape(run['name'])}</th>" for run in runs)
    return (f'<h2>Side by side</h2><div class="card wide"><table><tr><th></th>{heads}</tr>{body}</table>'
            "<small>Success and score over the common seeds, the rest over all that each was evaluated on.</small></div>")


def _seeds(found: dict[str, Any]) -> str:
    """Who wins where: seeds sorted by outcome, those that only one wins by name."""
    runs, seeds = found["runs"], found["seeds"]
    won = [run["per_seed"]["success"] for run in runs]
    order = sorted(range(len(seeds)), key=lambda j: [not w[j] for w in won])
    drawn = matrix([(run["name"], [w[j] for j in order]) for run, w in zip(runs, won, strict=True)], [seeds[j] for j in order])
    words = ""
    for i, run in enumerate(runs):
        alone = [s for j, s in enumerate(seeds) if won[i][j] and not any(w[j] for k, w in enumerate(won) if k != i)]
        if alone:
            listed = ", ".join(map(str, alone[:40])) + (" …" if len(alone) > 40 else "")
            words += f"<p><strong>Only {escape(run['name'])} wins {len(alone)}:</strong> <span class='soft'>{escape(listed)}</span></p>"
    return f'<h2>Seeds</h2><div class="card"><h3>Success by seed<small>sorted; hover names the seed</small></h3>{drawn}</div>{words}'


def _curves(runs: Sequence[dict[str, Any]]) -> str:
    """Score while training, where the runs were rolled out then."""
    series = []
    for run, colour in zip(runs, COLOURS, strict=False):
        rows = [row for row in run.get("curve") or [] if finite(row.get("score")) and finite(row.get("cpu_s"))]
        y = [row["score"] for row in rows]
        ends = [row.get("score_ci") or [v, v] for row, v in zip(rows, y, strict=True)]
        series.append(Series(run["name"], colour, [row["cpu_s"] / 60 for row in rows], y, [lo for lo, _ in ends], [hi for _, hi in ends], dots=True))
    drawn = plot("Score against CPU time", series, x="CPU-minutes", unit=True, note="while training, 95 % intervals")
    return f'<h2>Training</h2><section class="plots">{drawn}</section>' if drawn else ""

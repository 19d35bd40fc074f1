"""The page of `dipole eval likelihood`."""
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from policy.page import command, counted, write
from policy.svg import Series, padded, plot

COLOURS = {"held out": "c1", "training": "c2", "loss": "c1", "likelihood": "c2"}
NAMES = {"loss": "denoising loss of its plan", "likelihood": "-log p of its plan"}


def write_page(folder: Path, found: dict[str, Any]) -> Path:
    """<folder>/report.html from the contents of likelihood.json."""
    title = f"{found['task'] or 'policy'}: likelihood of demonstrations"
    held = found["splits"]["held out"]
    head = (f'<header><div class="over">dipole · {escape(found["run"])}</div><h1>{escape(title)}</h1><div class="soft">'
            f"{counted(held['windows'], 'window')} of {counted(held['episodes'], 'held-out episode')}, {found['dims']} action dimensions each, noise floor "
            f"{found['floor']:.3g} of normalised units, {escape(found['path'])} path</div></header>")
    plots = f'<section class="plots">{_spread(found)}{_noise(found)}</section>'
    return write(folder / "report.html", f"{title} · dipole", [head, plots, _nats(found), _ood(found), command(found)])


def _spread(found: dict[str, Any]) -> str:
    values = {name: np.asarray(split["exact"]["per_window"]) for name, split in found["splits"].items()}
    lo, hi = padded(np.quantile(np.concatenate(list(values.values())), [0.005, 0.995]).tolist())
    edges = np.linspace(lo, hi, 21)
    series = []
    for name, x in values.items():
        share = np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] / len(x)
        series.append(Series(name, COLOURS[name], ((edges[1:] + edges[:-1]) / 2).tolist(), share.tolist(), [0.0] * len(share), share.tolist()))
    return plot("Windows by -log p", series, x="-log p, nats per dimension", zero=True, note="share; lower is likelier, ends hold what is beyond")


def _noise(found: dict[str, Any]) -> str:
    rows = [row for row in found["ood"]["changes"] if row["change"].startswith("noise ")]
    x = [float(row["change"].split()[1]) for row in rows]
    series = [Series(NAMES[kind], COLOURS[kind], x, [row[kind]["auroc"] for row in rows], [_ends(row[kind])[0] for row in rows],
                     [_ends(row[kind])[1] for row in rows], dots=True) for kind in NAMES]
    return plot("Noisy observations told apart", series, x="noise on normalised observations", unit=True, note="AUROC, 95 % intervals over episodes")


def _ends(value: dict[str, Any]) -> tuple[float, float]:
    return tuple(value["ci"]) if value["ci"] else (value["auroc"], value["auroc"])


def _cell(value: float, ci: list[float] | None, digits: int = 3) -> str:
    return f"{value:.{digits}f}" + (f" <small>{ci[0]:.{digits}f} – {ci[1]:.{digits}f}</small>" if ci else "")


def _nats(found: dict[str, Any]) -> str:
    splits, add, unit = found["splits"], found["physical"]["add_nats_per_dim"], found["physical"]["unit"]
    rows = ""
    for kind, words in (("exact", "-log p by the probability-flow ODE"), ("bound", "variational bound on it")):
        for plus, where in ((0.0, "normalised actions"), *([] if add is None else [(add, f"actions in {unit or 'the units of the data'}")])):
            cells = "".join(f"<td>{_cell(s[kind]['mean'] + plus, [v + plus for v in s[kind]['ci']] if s[kind]['ci'] else None)}</td>" for s in splits.values())
            rows += f"<tr><th>{words} <small>{escape(where)}</small></th>{cells}</tr>"
    totals = "".join(f"<td>{s['exact']['mean'] * found['dims']:.1f}</td>" for s in splits.values())
    heads = "".join(f"<th>{escape(name)} <small>{counted(s['windows'], 'window')}, {counted(s['episodes'], 'episode')}</small></th>"
                    for name, s in splits.items())
    how = "exact trace" if found["trace"] == "exact" else f"{counted(found['trace'], 'random probe')} for the trace"
    return (f'<h2>Nats per dimension, lower is likelier</h2><div class="card wide"><table><tr><th></th>{heads}</tr>{rows}'
            f"<tr><th>-log p of a whole plan <small>nats, normalised actions</small></th>{totals}</tr></table></div>"
            f'<p class="soft">Of actions with noise of the floor, which bounds the -log p of the actions themselves from above. {how}; '
            f"95 % intervals resample episodes, optimistic where there are few. "
            "The bound is that of stochastic sampling with all noise levels (on a table, all its entries): loose where a table is coarse, and a poor network's "
            "may be below its ODE's. What the training episodes are likelier by is learned by heart.</p>")


def _ood(found: dict[str, Any]) -> str:
    ood = found["ood"]
    rows = "".join(f"<tr><th>{escape(row['change'])}</th>" + "".join(f"<td>{_cell(row[k]['auroc'], row[k]['ci'])}</td>" for k in NAMES) + "</tr>"
                   for row in ood["changes"])
    means = "".join(f"<td>{ood['mean'][k]:.3f}</td>" for k in NAMES)
    return (f'<h2>Strange observations</h2><div class="card wide"><table><tr><th></th>{"".join(f"<th>{n}</th>" for n in NAMES.values())}</tr>{rows}'
            f"<tr><th>mean</th>{means}</tr></table></div>"
            f'<p class="soft">AUROC: how often a perturbed observation scores higher than a held-out one ({counted(ood["windows"], "window")} of '
            f'{counted(ood["episodes"], "episode")}), 0.5 by chance. Windows of one '
            'episode resemble each other: with few episodes the intervals are wide, and a difference of the two scores within them says nothing.</p>')

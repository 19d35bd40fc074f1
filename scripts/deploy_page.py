"""What a deployment leaves to look at: the timeline of chunks, modes, joints and lateness, the video of the simulated robot, the page."""
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from policy import page
from policy.serve.journal import Journal
from policy.serve.robot import RobotSpec
from policy.train.log import console

COLOURS = {"RUN": "#15935a", "DEGRADED": "#d97706", "BRAKE": "#d33c3c", "HOLD": "#2563eb", "STOP": "#1b1f24"}
FPS = 25
SHOWN = 12.0  # s of the timeline that are drawn: the first of episodes, else the last
FILMED = 30.0  # s of the video, likewise: drawing takes longer than playing


def write(folder: Path, facts: dict[str, Any], journal: Journal, robot: RobotSpec, node: DictConfig) -> Path:
    """deploy.json, timeline.png, video.mp4 where there is a simulated robot's log, report.html."""
    page.save_json(folder / "deploy.json", facts)
    timeline(folder / "timeline.png", journal, robot, last=not facts["episodes"])
    films = film(folder, node, last=not facts["episodes"]) if (folder / "robot.npz").exists() else {}
    parts = [head(facts, robot), note(facts), cards(facts), '<h2>What happened</h2><div class="card"><img src="timeline.png" style="width:100%"></div>',
             page.videos(folder, films), events(journal), numbers(facts)]
    return page.write(folder / "report.html", f"{robot.name} · deployment", parts)


def head(facts: dict[str, Any], robot: RobotSpec) -> str:
    rows = facts.get("episodes") or []
    wins = sum(r["success"] for r in rows)
    said = f"{wins} of {page.counted(len(rows), 'episode')} succeeded; " if rows else ""
    return (f'<header><div class="over">deployment</div><h1>{escape(robot.name)}</h1><p class="soft">{said}server, bridge and robot in processes of their own; '
            f'merge {escape(str(facts.get("merge")))}, {1e3 * facts.get("delay", 0):.0f} ms added to every plan, control at {robot.rate:g} Hz, '
            f'{escape(str(facts["obtained"].get("scheduler")))}</p></header>')


def note(facts: dict[str, Any]) -> str:
    """Why it is not whole."""
    why = facts.get("trouble") or (f"ended by {facts['ended']}" if facts.get("ended") else "")
    return f'<p class="note">{escape(why)}</p>' if why else ""


def pace(facts: dict[str, Any]) -> str:
    """Lateness and planning in a few words, as far as there are any."""
    late, plan = facts.get("late_ms"), facts.get("plan_ms")
    return (f", control late p99 {late['p99']:.2f} ms ({facts['obtained']['scheduler']})" if late else "") + (f", plan {plan['p50']:.1f} ms" if plan else "")


def cards(facts: dict[str, Any]) -> str:
    def card(name: str, value: str, note: str = "") -> str:
        return f'<div class="card"><span class="soft">{name}</span><b>{value}</b><small>{note}</small></div>'
    late, plan, rtt, delay = (facts.get(k) or {} for k in ("late_ms", "plan_ms", "rtt_ms", "delay_steps"))
    shown = [card("control lateness p99", f"{late['p99']:.2f} ms",
                  f"median {late['p50']:.2f}, most {late['max']:.2f}; {facts.get('missed')} periods missed") if late else "",
             card("plan", f"{plan['p50']:.1f} ms", f"p99 {plan['p99']:.1f}") if plan else "",
             card("round trip", f"{rtt['p50']:.1f} ms", f"p99 {rtt['p99']:.1f}") if rtt else "",
             card("delay", f"{delay['p50']:.1f} steps", f"most {delay['max']:.1f}") if delay else "",
             card("chunks", f"{facts['counts'].get('chunks', 0)}", ", ".join(f"{k} {v}" for k, v in facts["counts"].items() if k not in ("chunks", "asked"))),
             card("running", f"{100 * sum(facts.get('modes', {}).get(m, 0) for m in ('RUN', 'DEGRADED')):.0f} %", "of the control periods")]
    return f'<section class="cards">{"".join(shown)}</section>'


def numbers(facts: dict[str, Any]) -> str:
    import json
    return f"<details><summary>All numbers</summary><pre>{escape(json.dumps(facts, indent=1, default=str))}</pre></details>"


def events(journal: Journal) -> str:
    rows = [e for e in journal.events if e["event"] in ("mode", "refused", "lost", "slow", "rearmed", "moving", "stop_failed", "unwritten")][-200:]
    rows = sorted([*rows, *journal.late], key=lambda e: float(e["t"]))
    start = journal.events[0]["t"] if journal.events else 0.0
    cells = ([f"{e['t'] - start:.2f} s", e["event"], str(e.get("mode", "")), str(e.get("why", ""))] for e in rows)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in cells)
    return f'<h2>Events</h2><div class="card wide"><table><tr><th>time</th><th>event</th><th>mode</th><th>why</th></tr>{body}</table></div>' if body else ""


def timeline(out: Path, journal: Journal, robot: RobotSpec, *, last: bool = False) -> None:
    """Chunks from observation to end with the moment they landed; modes; every joint commanded and measured; lateness; of SHOWN s, the first or the last."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    a = journal.arrays()
    if not len(a["t"]):
        return
    t0 = max(float(a["t"][0]), float(a["t"][-1]) - SHOWN if last else -np.inf)
    t, keep = a["t"] - t0, (a["t"] >= t0) & (a["t"] - t0 <= SHOWN)
    joints = min(robot.dof, 8)
    fig, axes = plt.subplots(joints + 3, 1, figsize=(12, 4.5 + 1.05 * joints), dpi=110, sharex=True,
                             gridspec_kw={"height_ratios": [1.7, 0.35, *([1] * joints), 0.8]})
    for i, c in enumerate(journal.chunks):
        start, landed, end = c["t0"] - t0, c["landed"] - t0, c["end"] - t0
        if end < 0 or start > SHOWN:
            continue
        y = -(i % 6)
        axes[0].plot([start, landed], [y, y], color="#c6ccd2", lw=5, solid_capstyle="butt")
        axes[0].plot([landed, end], [y, y], color="#2563eb", lw=5, alpha=0.75, solid_capstyle="butt")
        axes[0].plot([start], [y], "|", color="#1b1f24", ms=9)
    axes[0].set(yticks=[], ylabel="chunks", title="observed |, planned and sent (grey), then as far as it reaches (blue)")
    jumps = np.r_[False, np.diff(t) - a["late"][1:] > 1.5 / robot.rate]  # between episodes; a loop that was late is no gap
    for mode, colour in COLOURS.items():
        here = a["mode"] == mode
        axes[1].fill_between(t[keep], 0, 1, where=(here | np.r_[False, here[:-1]] & ~jumps)[keep], step="post", color=colour, label=mode, lw=0)
    axes[1].set(yticks=[], ylabel="mode", ylim=(0, 1))
    axes[1].legend(ncol=5, fontsize=7, loc="upper left", bbox_to_anchor=(0, 2.3), frameon=False)

    def line(ax: Any, x: np.ndarray, **style: Any) -> None:
        ax.plot(t[keep], np.where(jumps, np.nan, x)[keep], **style)

    for j in range(joints):
        ax = axes[2 + j]
        line(ax, a["measured"][:, j], color="#d97706", lw=1.6, label="measured")
        line(ax, a["q"][:, j], color="#1b1f24", lw=0.9, label="commanded")
        ax.set_ylabel(f"{robot.joints[j]}\n{robot.units[j]}", fontsize=8)
        ax.tick_params(labelsize=7)
        if j == 0:
            ax.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 0.95), ncol=2, frameon=False)
    line(axes[-1], 1e3 * a["late"], color="#667079", lw=0.8)
    for stop in (e["t"] - t0 for e in journal.events if e["event"] == "mode" and e.get("mode") == "STOP"):
        if -0.1 <= stop <= SHOWN:  # a moment, after which nothing is commanded
            for ax in axes[1:]:
                ax.axvline(stop, color=COLOURS["STOP"], lw=1.4)
            axes[1].annotate("STOP", (stop, 0.5), xytext=(4, 0), textcoords="offset points", fontsize=8, color=COLOURS["STOP"], va="center", fontweight="bold")
    axes[-1].set(ylabel="late, ms", xlabel="s")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout(h_pad=0.2)
    fig.savefig(out)
    plt.close(fig)


def film(folder: Path, node: DictConfig, *, last: bool = False) -> dict[str, Any]:
    """video.mp4 of what the simulated robot recorded, {} where it cannot be drawn."""
    try:
        import imageio

        from envs import render
        from envs.task import Task
        options: Any = OmegaConf.to_container(node.driver).get("options")  # type: ignore[union-attr]
        task: Task = get_class(node.driver.task.replace(":", "."))(**(options or {}))
        qpos, mocap, count = states(folder / "robot.npz", last=last)
        frames = render.frames(task.model, qpos, mocap, camera=task.camera, size=384)
        imageio.mimwrite(folder / "video.mp4", list(frames), fps=FPS, codec="libx264", quality=7)
    except (Exception, KeyboardInterrupt) as e:  # of whatever kind, and who has no time to wait: the numbers are worth more than the pictures
        console.print(f"[yellow]no video: {str(e) or 'interrupted'}. The numbers are saved; `dipole doctor` says how to get a GL backend[/]", highlight=False)
        return {}
    return {"videos": [{"file": "video.mp4", "caption": f"the simulated robot in real time, {page.counted(count, 'episode')}", "wide": True}]}


def states(path: Path, *, last: bool = False) -> tuple[np.ndarray, np.ndarray, int]:
    """qpos (t, nq) and mocap_pos (t, nmocap, 3), FPS a second, of the steps in which the robot had been told to move, the first or last FILMED s; how many
    episodes these are.
    """
    with np.load(path) as log:
        commanded, episode, qpos, number, mocap, dt = (log[k] for k in ("commanded", "episode", "qpos", "number", "mocap", "dt"))
    moves = np.r_[False, np.abs(np.diff(commanded, axis=0)).max(1) > 0] & (np.r_[-1, episode[:-1]] == episode)
    every = max(1, round(1 / (FPS * float(dt))))
    half = every * FPS // 4  # a quarter of a second around
    near = np.convolve(moves, np.ones(2 * half + 1))[half: half + len(moves)] > 0
    kept = np.flatnonzero(near & np.isin(episode, episode[moves]))[::every]
    kept = kept[-round(FILMED * FPS):] if last else kept[:round(FILMED * FPS)]
    where = {int(n): i for i, n in enumerate(number)}
    return qpos[kept], mocap[[where[int(n)] for n in episode[kept]]], len(np.unique(episode[kept]))


def write_evaluation(folder: Path, result: dict[str, Any]) -> Path:
    page.save_json(folder / "deploy.json", result)
    body = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in lines(result))
    names = "".join(f"<th>{n}</th>" for n in COLUMNS)
    parts = [f'<header><div class="over">deployment</div><h1>{escape(result["robot"])}</h1><p class="soft">success through server, bridge and robot in three '
             "processes, in real time, beside the simulator's own loop on the same seeds at the next whole delay</p></header>",
             note(result), f'<div class="card wide"><table><tr>{names}</tr>{body}</table></div>', numbers(result)]
    return page.write(folder / "report.html", f"{result['robot']} · deployment", parts)


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """MB an hour by which a process grew in the last two thirds of the time, by least squares; NaN where there are too few measurements."""
    kept = rows[len(rows) // 3:]
    return 3600 * float(np.polyfit([r["s"] for r in kept], [r[name] for r in kept], 1)[0]) if len(kept) > 2 else float("nan")


def draw_memory(out: Path, rows: list[dict[str, Any]]) -> None:
    """Resident memory of the three processes against time."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 3.4), dpi=120)
    for name in ("bridge", "server", "robot"):
        ax.plot([r["s"] / 60 for r in rows], [r[name] for r in rows], label=name)
    ax.set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))
    ax.legend(frameon=False, ncol=3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(out)
    plt.close(fig)


COLUMNS = ("planning delay", "success", "in process, same delay", "delay, steps", "s", "late p99, ms", "seam p99")


def lines(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for r in result["rows"]:
        inside = r["in_process"]
        beside = f"{inside['success']:.0%} {span(inside['success_ci'])}" if inside else ""
        late, steps, seam = ((r.get(k) or {}).get(p, math.nan) for k, p in (("late_ms", "p99"), ("delay_steps", "p50"), ("seam", "p99")))
        rows.append((f"{1e3 * r['delay']:.0f} ms" + ("" if r["aligned"] else ", not aligned"), f"{r['success']:.0%} {span(r['success_ci'])}", beside,
                     f"{steps:.1f}" + (f" ({inside['delay']})" if inside else ""), f"{r['seconds']:.1f}", f"{late:.2f}", f"{seam:.2f}"))
    return rows


def span(ci: Any) -> str:
    return f"[{100 * ci[0]:.1f}, {100 * ci[1]:.1f}]"


def table(result: dict[str, Any]) -> Table:
    found = Table(title=result["robot"])
    for name in COLUMNS:
        found.add_column(name)
    for row in lines(result):
        found.add_row(*row)
    return found

"""Drive a robot by a trained policy, server, bridge and robot in three processes: dipole deploy demo run=outputs/gantry."""
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from policy.page import counted, save_json
from policy.serve.bridge import Bridge
from policy.serve.robot import DriverError
from policy.stats import wilson
from policy.train.log import console
from scripts import deploy_page, serving
from scripts.cli import words_to_overrides
from scripts.driving import FAILURES, Ended, episodes, folder_of, opened, options_of, over, quiet_bar, run, view
from scripts.settings import whole
from scripts.verb import verb


def demo(cfg: DictConfig) -> dict[str, Any]:
    """Episodes on the simulated robot, then the picture of what happened, the video and the page."""
    folder = folder_of(cfg)
    with Ended() as ended, opened(cfg, ended, folder, cfg.delay) as (bridge, _):
        with view(bridge, cfg):
            rows, trouble = episodes(bridge, cfg, range(cfg.seed, cfg.seed + cfg.episodes), ended)
        facts = bridge.facts()
    wins, planner = sum(r["success"] for r in rows), bridge.client.card.model_id  # type: ignore[attr-defined]
    facts |= {"model_id": planner, "episodes": rows, "merge": bridge.execution.merge, "delay": cfg.delay, "ended": ended.name, "trouble": trouble}
    page = deploy_page.write(folder, facts, bridge.journal, bridge.robot, cfg.robot)
    warn(bridge, [f"seed {row['seed']}: STOP, {row['stop']}; re-armed for the next" for row in rows if "stop" in row])
    console.print(f"[bold]{wins} of {counted(len(rows), 'episode')} succeeded{deploy_page.pace(facts)}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    over(ended, trouble, page)
    return {"folder": str(folder), "success": wins / len(rows)}


def warn(bridge: Bridge, said: Sequence[str] = ()) -> None:
    """What people should know of a run, once it is over: beside it the view would be torn."""
    for line in [*said, *(e["why"] for e in bridge.journal.events if e["event"] in ("slow", "moving", "unwritten"))]:
        console.print(f"[yellow]{escape(line)}[/]", highlight=False, soft_wrap=True)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Closed-loop success through the three processes at several planning delays, beside the in-process evaluation of the same seeds."""
    folder, ended, trouble = folder_of(cfg), Ended(), ""
    table: list[dict[str, Any]] = []
    plans: list[tuple[float, dict[str, Any]]] = [(d, {}) for d in cfg.delays]
    plans += [(max(cfg.delays), {"align": False, "merge": "naive"})] if cfg.unaligned else []
    for delay, control in plans:
        try:
            row, trouble = measured(cfg, ended, folder, delay, control)
        except SystemExit:
            if not table:
                raise
            break
        except FAILURES as e:
            if not table:
                raise
            trouble = f"at {1e3 * delay:.0f} ms: {e}"
            break
        table += [row] if row["episodes"] else []
        if trouble or ended:
            break
    result = {"robot": cfg.robot.spec.name, "rows": table, "ended": ended.name, "trouble": trouble}
    page = deploy_page.write_evaluation(folder, result)
    console.print(deploy_page.table(result))
    for r in table:
        if stopped := [e["stop"] for e in r["per_episode"] if "stop" in e]:
            console.print(f"[yellow]{1e3 * r['delay']:.0f} ms: {counted(len(stopped), 'episode')} ended in STOP and count as failures[/], the first: "
                          f"{escape(stopped[0])}", highlight=False, soft_wrap=True)
    line = ", ".join(f"{1e3 * r['delay']:.0f} ms{'' if r['aligned'] else ' not aligned'}: {r['success']:.0%}" for r in table)
    console.print(f"[bold]success through three processes, planning delay {line or '–'}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    over(ended, trouble, page)
    return {"folder": str(folder), **{f"{r['delay']}{'' if r['aligned'] else 'u'}": r["success"] for r in table}}


def measured(cfg: DictConfig, ended: Ended, folder: Path, delay: float, control: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """One row of evaluate's table, and why it is not whole."""
    name = f"{1e3 * delay:.0f} ms{', not aligned' if control else ''}"
    sub = folder / name.replace(", ", "-").replace(" ", "_")
    with ended, opened(cfg, ended, sub, delay, **control) as (bridge, _), quiet_bar() as progress:
        task = progress.add_task(name, total=cfg.episodes, note="")

        def show(rows: list[dict[str, Any]]) -> None:
            progress.update(task, completed=len(rows), note=f"{sum(r['success'] for r in rows)} won", refresh=True)

        rows, trouble = episodes(bridge, cfg, range(cfg.seed, cfg.seed + cfg.episodes), ended, show)
        facts, e = bridge.facts(), bridge.execution
    inside: dict[str, Any] = {}
    if not (trouble or ended):
        try:
            with ended:
                inside = serving.in_process(cfg, sub, {"delay": math.ceil(delay / e.dt - 1e-9), "merge": e.merge, "execute": e.execute, "align": e.align})
        except OSError as error:
            trouble = str(error)
        except SystemExit:  # ended
            pass
    wins = sum(r["success"] for r in rows)
    return {"delay": delay, "aligned": not control, "merge": e.merge, "episodes": len(rows), "success": wins / max(1, len(rows)),
            "success_ci": list(wilson(wins, max(1, len(rows)))), "in_process": inside,
            "seconds": sum(r["seconds"] for r in rows if r["success"]) / max(1, wins), **facts, "per_episode": rows}, trouble


def soak(cfg: DictConfig) -> dict[str, Any]:
    """Episode after episode for cfg.minutes, and what memory the three processes keep meanwhile."""
    folder, trouble = folder_of(cfg), ""
    memory: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with Ended() as ended, opened(cfg, ended, folder, cfg.delay) as (bridge, server), quiet_bar() as progress:
        pids = {"bridge": os.getpid(), "server": server, "robot": bridge.driver.process.pid}  # type: ignore[attr-defined]
        task, start = progress.add_task("soak", total=60 * cfg.minutes, note=""), time.monotonic()
        while (spent := time.monotonic() - start) < 60 * cfg.minutes and not trouble and not ended:
            row, trouble = episodes(bridge, cfg, [cfg.seed + len(rows)], ended)
            rows += row
            memory.append({"s": round(spent, 1), **{name: serving.resident(pid) for name, pid in pids.items()}})
            progress.update(task, completed=int(spent), note=f"{sum(r['success'] for r in rows)} of {len(rows)} won", refresh=True)
        facts = bridge.facts()
    third, wins = max(1, len(memory) // 3), sum(r["success"] for r in rows)
    growth = {name: float(np.median([m[name] for m in memory[-third:]]) - np.median([m[name] for m in memory[-2 * third:-third] or memory])) for name in pids}
    slope = {name: deploy_page.slope(memory, name) for name in pids}
    save_json(folder / "soak.json", {"minutes": cfg.minutes, "episodes": len(rows), "success": wins / max(1, len(rows)), "growth_mb": growth,
                                     "slope_mb_per_hour": slope, "ended": ended.name, "trouble": trouble, "memory": memory, **facts})
    deploy_page.draw_memory(folder / "memory.png", memory)
    words = ", ".join(f"{name} {memory[-1][name]:.0f} MB ({mb:+.1f}; {slope[name]:+.1f} MB/h)" for name, mb in growth.items())
    console.print(f"[bold]{cfg.minutes:g} minutes, {wins} of {counted(len(rows), 'episode')} succeeded; memory, the last third against the one before and the "
                  f"slope of the last two: {words}[/]: {folder / 'soak.json'}", highlight=False, soft_wrap=True)
    over(ended, trouble, folder / "soak.json")
    return {"folder": str(folder), **growth}


def drive(cfg: DictConfig) -> dict[str, Any]:
    """Drive the robot until ctrl-C or the time limit; a robot that stopped asks to be re-armed."""
    folder = folder_of(cfg)
    with Ended() as ended, opened(cfg, ended, folder, cfg.delay) as (bridge, _):
        while True:
            with view(bridge, cfg):
                facts = run(bridge, cfg, cfg.seconds or math.inf, lambda state: bool(ended))
            if bridge.supervisor.mode != "STOP" or ended or not console.is_terminal or not rearmed(bridge, ended):
                break
    facts |= {"episodes": [], "merge": bridge.execution.merge, "delay": cfg.delay}
    page = deploy_page.write(folder, facts, bridge.journal, bridge.robot, cfg.robot)
    stopped = bridge.supervisor.mode == "STOP"
    said = f"STOP: {bridge.supervisor.reason}" if stopped else "at rest, the run is over"
    warn(bridge)
    console.print(f"[bold]{escape(said)}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    if stopped:
        raise SystemExit(1)
    return {"folder": str(folder)}


def rearmed(bridge: Bridge, ended: Ended) -> bool:
    """Ask whoever looks at the robot whether it may go on, until it does or they want no more; ctrl-C is a no."""
    console.print(f"[bold red]STOP[/]: {escape(bridge.supervisor.reason)}", highlight=False, soft_wrap=True)
    while True:
        ended.moving = False  # so that a signal ends the waiting
        try:
            if console.input("Look at the robot. Enter re-arms, anything else ends: ").strip():
                return False
            ended.moving = True
            bridge.rearm()
            return True
        except (SystemExit, EOFError):
            return False
        except DriverError as e:
            console.print(f"[bold red]not re-armed[/]: {escape(str(e))}", highlight=False, soft_wrap=True)
        finally:
            ended.moving = True


@verb("deploy", of_run=("robot",))
def main(cfg: DictConfig) -> dict[str, Any]:
    known = {"demo": demo, "eval": evaluate, "soak": soak, None: drive}
    if cfg.do not in known:
        raise ValueError(f"dipole deploy {cfg.do} is unknown; use dipole deploy demo run=FOLDER, dipole deploy eval run=FOLDER, "
                         "or dipole deploy robot=NAME url=…")
    if sum(bool(cfg[k]) for k in ("run", "artifact", "url")) != 1:
        raise ValueError("which policy? Name one of run=FOLDER (a training run), artifact=FOLDER (an export) or url=ws://host:port (a running dipole serve)")
    if wrong := [f"{k}={cfg[k]}" for k in ("seconds", "minutes", "episodes") if cfg[k] is not None and not cfg[k] > 0]:
        raise ValueError(f"{wrong[0]} must be above 0")
    whole(0, seed=cfg.seed)
    whole(1, episodes=cfg.episodes)
    for name in ("delay", "delays") if cfg.do == "eval" else ("delay",):
        values = [cfg.delay] if name == "delay" else list(cfg.delays) if isinstance(cfg.delays, Sequence) and len(cfg.delays) else [None]
        if not all(isinstance(d, int | float) and not isinstance(d, bool) and 0 <= d < math.inf for d in values):
            raise ValueError(f"{name}={cfg[name]} must be {'a list of seconds from 0, such as [0,0.04]' if name == 'delays' else 'seconds from 0'}")
    if options := {**options_of(cfg), **(cfg.robot.driver.get("options") or {})}:
        OmegaConf.update(cfg, "robot.driver.options", options, force_add=True)
    if cfg.do and not hasattr(get_class(cfg.robot.driver._target_), "reset"):
        raise ValueError(f"robot={cfg.robot.spec.name} is no simulated one, it has no episodes: run dipole deploy without {cfg.do}")
    return known[cfg.do](cfg)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

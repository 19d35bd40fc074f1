"""Drive a robot by a trained policy, server, bridge and robot in three processes: dipole deploy demo run=outputs/gantry."""
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

from policy.page import counted, save_json
from policy.serve.bridge import Bridge, Settings
from policy.serve.client import PlannerClient
from policy.serve.execution import Execution
from policy.serve.expect import Expect
from policy.serve.journal import Journal
from policy.serve.robot import RobotSpec, RobotState
from policy.serve.view import View
from policy.stats import wilson
from policy.train.log import bar, console
from scripts import deploy_page, serving
from scripts.cli import words_to_overrides
from scripts.verb import verb

SIMULATED = 10.0  # s an episode of a simulated robot may take


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def robot_of(cfg: DictConfig) -> RobotSpec:
    return instantiate(plain(cfg.robot)["spec"], _convert_="all")


def folder_of(cfg: DictConfig, robot: RobotSpec) -> Path:
    return Path(cfg.out) if cfg.out else Path("outputs/deploy") / robot.name / time.strftime("%Y-%m-%d_%H-%M-%S")


def make_bridge(cfg: DictConfig, robot: RobotSpec, driver: Any, client: PlannerClient, journal: Journal, **control: Any) -> Bridge:
    """A bridge as cfg says; control: what this call wants otherwise."""
    card = client.wait_ready()
    asked = {**plain(cfg.control), **control}
    advice: Any = card.facts.get("control") or {}  # what the run was evaluated with, or adopted after dipole eval delay
    asked["execute"] = asked["execute"] or advice.get("execute") or max(1, card.horizon // 2)
    asked["merge"] = asked["merge"] or advice.get("merge") or "naive"
    safety = plain(cfg.safety)
    settings = Settings(**{**safety, "patience": math.inf if safety["patience"] is None else safety["patience"]})
    if asked["merge"] not in card.merges:
        raise ValueError(f"control.merge={asked['merge']} is not offered by this policy; it has {', '.join(card.merges)}"
                         + (". Train with train.rtc=true for prefix" if asked["merge"] == "prefix" else ""))
    execution = Execution(robot, card.horizon, card.dt, most=card.committed, **asked)
    return Bridge(driver, client, robot, execution, obs=card.obs, history=card.t_obs, settings=settings, journal=journal)


def episodes(bridge: Bridge, cfg: DictConfig, count: int, on_done: Any = lambda won: None) -> list[dict[str, Any]]:
    """Run `count` episodes of a simulated robot, seeds cfg.seed, …: [{seed, success, seconds, …}]."""
    if not hasattr(bridge.driver, "reset"):
        raise ValueError(f"robot={bridge.robot.name} is no simulated one, it has no episodes: run dipole deploy without demo or eval")
    rows = []
    for seed in range(cfg.seed, cfg.seed + count):
        bridge.connect()  # its watchdog has tripped since the last one
        bridge.begin(bridge.driver.reset(seed))
        start, events = time.monotonic(), len(bridge.journal.events)
        bridge.run(cfg.seconds or SIMULATED, until=won, priority=cfg.realtime.priority, cpu=cfg.realtime.cpu)
        success = bridge.state is not None and won(bridge.state)
        rows.append({"seed": seed, "success": success, "seconds": round(time.monotonic() - start, 2),
                     "modes": sorted({e["mode"] for e in list(bridge.journal.events)[events:] if e["event"] == "mode"})})
        on_done(rows)
        if bridge.supervisor.mode == "STOP":
            console.print(f"[yellow]seed {seed}: STOP, {bridge.supervisor.reason}; re-armed for the next[/]", highlight=False, soft_wrap=True)
            bridge.rearm()
    return rows


def won(state: RobotState) -> bool:
    return bool(state.info.get("success"))


def session(cfg: DictConfig, stack: ExitStack, folder: Path, delay: float = 0.0, record: bool = True) -> tuple[RobotSpec, Any, PlannerClient, int]:
    """Robot, driver, connected client and the server's process (0: not ours), closed by the stack; the server is started when no url is given."""
    pid, node = 0, plain(cfg.robot)
    robot = robot_of(cfg)
    url, token = cfg.url, serving.token(cfg.token_file)
    if not url:
        url, pid = stack.enter_context(serving.server(cfg, delay, folder / "server.log"))
    client = PlannerClient(url, token=token, tls_ca=cfg.tls_ca)
    stack.callback(client.close)
    try:
        card = client.wait_ready(10.0)
    except TimeoutError as e:
        raise TimeoutError(f"{e}. Is `dipole serve` running there?") from e
    if wrong := serving.misfit(card, robot):
        raise ValueError(f"the policy at {url} does not fit robot={robot.name}: {wrong}. Choose the robot with robot=…, or serve the run trained for it")
    client.expect = Expect(dof=robot.dof, dt=card.dt, task=card.task, model_id=card.model_id)  # whatever takes the server's place has to be the same
    extra = {"log": str(folder / "robot.npz")} if record and str(node["driver"]["_target_"]).endswith("MujocoDriver") else {}
    driver = instantiate(node["driver"], **extra, _convert_="all")
    stack.callback(driver.close)
    return robot, driver, client, pid


def demo(cfg: DictConfig) -> dict[str, Any]:
    """Episodes on the simulated robot, then the picture of what happened, the video and the page."""
    folder = folder_of(cfg, robot_of(cfg))
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "bridge.jsonl")
    with ExitStack() as stack:
        stack.callback(journal.close)
        robot, driver, client, _ = session(cfg, stack, folder, cfg.delay)
        bridge = make_bridge(cfg, robot, driver, client, journal)
        bridge.connect()
        with View(bridge, console=console) if cfg.view and console.is_terminal else nullcontext():
            rows = episodes(bridge, cfg, cfg.episodes)
        facts = bridge.facts()
        model = client.wait_ready().model_id
    facts |= {"robot": robot.name, "model_id": model, "episodes": rows, "merge": bridge.execution.merge, "delay": cfg.delay}
    page = deploy_page.write(folder, facts, journal, robot, cfg.robot)
    wins = sum(r["success"] for r in rows)
    console.print(f"[bold]{wins} of {counted(len(rows), 'episode')} succeeded, control late p99 {facts['late_ms']['p99']:.2f} ms "
                  f"({facts['obtained']['scheduler']}), plan {facts['plan_ms']['p50']:.1f} ms[/]\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(folder), "success": wins / len(rows)}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Closed-loop success through the three processes at several planning delays, beside the in-process evaluation of the same seeds."""
    folder = folder_of(cfg, robot_of(cfg))
    folder.mkdir(parents=True, exist_ok=True)
    plans: list[tuple[float, dict[str, Any]]] = [(d, {}) for d in cfg.delays]
    plans += [(max(cfg.delays), {"align": False, "merge": "naive"})] if cfg.unaligned else []
    table = []
    for delay, control in plans:
        name = f"{1e3 * delay:.0f} ms{', not aligned' if control else ''}"
        with ExitStack() as stack:
            sub = folder / name.replace(", ", "-").replace(" ", "_")
            journal = Journal(sub / "bridge.jsonl")
            stack.callback(journal.close)
            robot, driver, client, _ = session(cfg, stack, sub, delay)
            bridge = make_bridge(cfg, robot, driver, client, journal, **control)
            inside = serving.in_process(cfg, sub, {"delay": math.ceil(delay / bridge.execution.dt - 1e-9), "merge": bridge.execution.merge,
                                                   "execute": bridge.execution.execute, "align": bridge.execution.align})
            bridge.connect()
            with bar() as progress:
                task = progress.add_task(name, total=cfg.episodes, note="")
                rows = episodes(bridge, cfg, cfg.episodes, lambda rows: progress.update(task, completed=len(rows),  # noqa: B023
                                                                                        note=f"{sum(r['success'] for r in rows)} won"))
            facts = bridge.facts()
        wins = sum(r["success"] for r in rows)
        taken = sum(r["seconds"] for r in rows if r["success"]) / max(1, wins)
        table.append({"delay": delay, "aligned": not control, "merge": bridge.execution.merge, "episodes": len(rows), "success": wins / len(rows),
                      "success_ci": list(wilson(wins, len(rows))), "in_process": inside, "seconds": taken, **facts, "per_episode": rows})
    result = {"robot": robot.name, "rows": table}
    page = deploy_page.write_evaluation(folder, result)
    console.print(deploy_page.table(result))
    line = ", ".join(f"{1e3 * r['delay']:.0f} ms{'' if r['aligned'] else ' not aligned'}: {r['success']:.0%}" for r in table)
    console.print(f"[bold]success through three processes, planning delay {line}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(folder), **{f"{r['delay']}{'' if r['aligned'] else 'u'}": r["success"] for r in table}}


def soak(cfg: DictConfig) -> dict[str, Any]:
    """Episode after episode for cfg.minutes, and what memory the three processes keep meanwhile."""
    folder = folder_of(cfg, robot_of(cfg))
    folder.mkdir(parents=True, exist_ok=True)
    journal, start, memory = Journal(folder / "bridge.jsonl", keep=30.0), time.monotonic(), []
    with ExitStack() as stack, bar() as progress:
        stack.callback(journal.close)
        _, driver, client, server = session(cfg, stack, folder, cfg.delay, record=False)
        bridge = make_bridge(cfg, robot_of(cfg), driver, client, journal)
        bridge.connect()
        pids = {"bridge": os.getpid(), "server": server, "robot": driver.process.pid}
        task, wins, count = progress.add_task("soak", total=60 * cfg.minutes, note=""), 0, 0
        while (spent := time.monotonic() - start) < 60 * cfg.minutes:
            one = cfg.copy()
            one.seed = cfg.seed + count
            row = episodes(bridge, one, 1)[0]
            wins, count = wins + row["success"], count + 1
            memory.append({"s": round(spent, 1), **{name: serving.resident(pid) for name, pid in pids.items()}})
            progress.update(task, completed=int(spent), note=f"{wins} of {count} won")
        facts = bridge.facts()
    third = max(1, len(memory) // 3)
    growth = {name: float(np.median([m[name] for m in memory[-third:]]) - np.median([m[name] for m in memory[third: 2 * third]])) for name in pids}
    save_json(folder / "soak.json", {"minutes": cfg.minutes, "episodes": count, "success": wins / count, "growth_mb": growth, "memory": memory, **facts})
    deploy_page.draw_memory(folder / "memory.png", memory)
    words = ", ".join(f"{name} {memory[-1][name]:.0f} MB ({mb:+.1f})" for name, mb in growth.items())
    console.print(f"[bold]{cfg.minutes:g} minutes, {wins} of {counted(count, 'episode')} succeeded; memory, and the last third against the one before: "
                  f"{words}[/]: {folder / 'soak.json'}", highlight=False, soft_wrap=True)
    return {"folder": str(folder), **growth}


def drive(cfg: DictConfig) -> dict[str, Any]:
    """Drive the robot until ctrl-C or the time limit; a robot that stopped asks to be re-armed."""
    folder = folder_of(cfg, robot_of(cfg))
    folder.mkdir(parents=True, exist_ok=True)
    journal, ended = Journal(folder / "bridge.jsonl"), []
    with ExitStack() as stack:
        stack.callback(journal.close)
        robot, driver, client, _ = session(cfg, stack, folder, cfg.delay)
        bridge = make_bridge(cfg, robot, driver, client, journal)
        bridge.connect()
        previous = {s: signal.signal(s, lambda *_: ended.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
        stack.callback(lambda: [signal.signal(s, h) for s, h in previous.items()])
        while not ended:
            with View(bridge, console=console) if cfg.view and console.is_terminal else nullcontext():
                facts = bridge.run(cfg.seconds or math.inf, until=lambda state: bool(ended), priority=cfg.realtime.priority, cpu=cfg.realtime.cpu)
            if bridge.supervisor.mode != "STOP":
                break
            if not console.is_terminal or not rearm_wanted(bridge.supervisor.reason):
                break
            bridge.rearm()
    facts |= {"robot": robot.name, "episodes": [], "merge": bridge.execution.merge, "delay": cfg.delay}
    page = deploy_page.write(folder, facts, journal, robot, cfg.robot)
    stopped = bridge.supervisor.mode == "STOP"
    said = f"STOP: {bridge.supervisor.reason}" if stopped else "at rest, the run is over"
    console.print(f"[bold]{escape(said)}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    if stopped:
        raise SystemExit(1)
    return {"folder": str(folder)}


def rearm_wanted(reason: str) -> bool:
    """Ask whoever looks at the robot; ctrl-C is a no."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    console.print(f"[bold red]STOP[/]: {escape(reason)}", highlight=False, soft_wrap=True)
    try:
        return not console.input("Look at the robot. Enter re-arms, anything else ends: ").strip()
    except (KeyboardInterrupt, EOFError):
        return False
    finally:
        signal.signal(signal.SIGINT, before)


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
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here ends too
    try:
        return known[cfg.do](cfg)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

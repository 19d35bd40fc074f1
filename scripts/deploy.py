"""Drive a robot by a trained policy, server, bridge and robot in three processes: dipole deploy demo run=outputs/gantry."""
import math
import signal
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from policy.page import counted
from policy.serve.bridge import Bridge, Settings
from policy.serve.client import PlannerClient
from policy.serve.execution import Execution
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


def folder_of(cfg: DictConfig, robot: RobotSpec) -> Path:
    return Path(cfg.out) if cfg.out else Path("outputs/deploy") / robot.name / time.strftime("%Y-%m-%d_%H-%M-%S")


def make_bridge(cfg: DictConfig, robot: RobotSpec, driver: Any, client: PlannerClient, journal: Journal, **control: Any) -> Bridge:
    """A bridge as cfg says; control: what this call wants otherwise."""
    card = client.wait_ready()
    asked = {**plain(cfg.control), **control}
    asked["execute"] = asked["execute"] or serving.executed(cfg.run) or max(1, card.horizon // 2)
    safety = plain(cfg.safety)
    settings = Settings(**{**safety, "patience": math.inf if safety["patience"] is None else safety["patience"]})
    if asked["merge"] not in card.merges:
        raise ValueError(f"control.merge={asked['merge']} is not offered by this policy; it has {', '.join(card.merges)}"
                         + (". Train with train.rtc=true for prefix" if asked["merge"] == "prefix" else ""))
    execution = Execution(robot, card.horizon, card.dt, most=card.committed or None, **asked)
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
        found = bridge.run(cfg.seconds or SIMULATED, until=won, priority=cfg.realtime.priority, cpu=cfg.realtime.cpu)
        success = bridge.state is not None and won(bridge.state)
        rows.append({"seed": seed, "success": success, "seconds": round(time.monotonic() - start, 2), "missed": found.get("missed"),
                     "modes": sorted({e["mode"] for e in list(bridge.journal.events)[events:] if e["event"] == "mode"})})
        on_done(rows)
        if bridge.supervisor.mode == "STOP":
            console.print(f"[yellow]seed {seed}: STOP, {bridge.supervisor.reason}; re-armed for the next[/]", highlight=False, soft_wrap=True)
            bridge.rearm()
    return rows


def won(state: RobotState) -> bool:
    return bool(state.info.get("success"))


def session(cfg: DictConfig, stack: ExitStack, folder: Path, delay: float = 0.0) -> tuple[RobotSpec, Any, PlannerClient]:
    """Robot, connected driver and connected client, closed by the stack; the server is started when no url is given."""
    node = plain(cfg.robot)
    robot = instantiate(node["spec"])
    url, token = cfg.url, serving.token(cfg.token_file)
    if not url:
        url = stack.enter_context(serving.server(cfg, delay, folder / "server.log"))
    client = PlannerClient(url, token=token, tls_ca=cfg.tls_ca)
    stack.callback(client.close)
    if wrong := serving.misfit(client.wait_ready(30.0), robot):
        raise ValueError(f"the policy at {url} does not fit robot={robot.name}: {wrong}")
    extra = {"log": str(folder / "robot.npz")} if str(node["driver"]["_target_"]).endswith("MujocoDriver") else {}
    driver = instantiate(node["driver"], **extra, _convert_="all")
    stack.callback(driver.close)
    return robot, driver, client


def demo(cfg: DictConfig) -> dict[str, Any]:
    """Episodes on the simulated robot, then the picture of what happened, the video and the page."""
    folder = folder_of(cfg, instantiate(cfg.robot.spec))
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "bridge.jsonl")
    with ExitStack() as stack:
        stack.callback(journal.close)
        robot, driver, client = session(cfg, stack, folder, cfg.delay)
        bridge = make_bridge(cfg, robot, driver, client, journal)
        bridge.connect()
        with View(bridge, console=console) if cfg.view and console.is_terminal else nullcontext():
            rows = episodes(bridge, cfg, cfg.episodes)
        facts = journal.finish({**bridge.counts, **bridge.execution.counts}, bridge.limiter)
        model = client.wait_ready().model_id
    facts |= {"robot": robot.name, "model_id": model, "episodes": rows, "merge": bridge.execution.merge, "delay": cfg.delay}
    page = deploy_page.write(folder, facts, journal, robot, cfg.robot)
    wins = sum(r["success"] for r in rows)
    console.print(f"[bold]{wins} of {counted(len(rows), 'episode')} succeeded, control late p99 {facts['late_ms']['p99']:.2f} ms "
                  f"({facts['obtained']['scheduler']}), plan {facts['plan_ms']['p50']:.1f} ms[/]\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(folder), "success": wins / len(rows)}


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Closed-loop success through the three processes at several planning delays, beside the in-process evaluation of the same seeds."""
    folder = folder_of(cfg, instantiate(cfg.robot.spec))
    folder.mkdir(parents=True, exist_ok=True)
    inside = serving.in_process(cfg, folder)
    plans: list[tuple[float, dict[str, Any]]] = [(d, {}) for d in cfg.delays]
    plans += [(max(cfg.delays), {"align": False, "merge": "naive"})] if cfg.unaligned else []
    table = []
    for delay, control in plans:
        name = f"{1e3 * delay:.0f} ms{', not aligned' if control else ''}"
        with ExitStack() as stack:
            sub = folder / name.replace(", ", "-").replace(" ", "_")
            journal = Journal(sub / "bridge.jsonl")
            stack.callback(journal.close)
            robot, driver, client = session(cfg, stack, sub, delay)
            bridge = make_bridge(cfg, robot, driver, client, journal, **control)
            bridge.connect()
            with bar() as progress:
                task = progress.add_task(name, total=cfg.episodes, note="")
                rows = episodes(bridge, cfg, cfg.episodes, lambda rows: progress.update(task, completed=len(rows),  # noqa: B023
                                                                                        note=f"{sum(r['success'] for r in rows)} won"))
            facts = journal.finish({**bridge.counts, **bridge.execution.counts}, bridge.limiter)
        wins = sum(r["success"] for r in rows)
        taken = sum(r["seconds"] for r in rows if r["success"]) / max(1, wins)
        table.append({"delay": delay, "aligned": not control, "merge": bridge.execution.merge, "episodes": len(rows), "success": wins / len(rows),
                      "success_ci": list(wilson(wins, len(rows))), "seconds": taken, **facts, "per_episode": rows})
    result = {"robot": robot.name, "in_process": inside, "rows": table}
    page = deploy_page.write_evaluation(folder, result)
    console.print(deploy_page.table(result))
    line = ", ".join(f"{1e3 * r['delay']:.0f} ms{'' if r['aligned'] else ' not aligned'}: {r['success']:.0%}" for r in table)
    console.print(f"[bold]in process {inside['success']:.0%}; three processes {line}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(folder), **{f"{r['delay']}{'' if r['aligned'] else 'u'}": r["success"] for r in table}}


def drive(cfg: DictConfig) -> dict[str, Any]:
    """Drive the robot until ctrl-C or the time limit; a robot that stopped asks to be re-armed."""
    folder = folder_of(cfg, instantiate(cfg.robot.spec))
    folder.mkdir(parents=True, exist_ok=True)
    journal, ended = Journal(folder / "bridge.jsonl"), []
    with ExitStack() as stack:
        stack.callback(journal.close)
        robot, driver, client = session(cfg, stack, folder, cfg.delay)
        bridge = make_bridge(cfg, robot, driver, client, journal)
        bridge.connect()
        previous = {s: signal.signal(s, lambda *_: ended.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
        stack.callback(lambda: [signal.signal(s, h) for s, h in previous.items()])
        while not ended:
            with View(bridge, console=console) if cfg.view and console.is_terminal else nullcontext():
                facts = bridge.run(cfg.seconds or math.inf, until=lambda state: bool(ended), priority=cfg.realtime.priority, cpu=cfg.realtime.cpu)
            if bridge.supervisor.mode != "STOP":
                break
            console.print(f"[bold red]STOP[/]: {bridge.supervisor.reason}", highlight=False, soft_wrap=True)
            if not console.is_terminal or console.input("Look at the robot. Enter re-arms, anything else ends: ").strip():
                break
            bridge.rearm()
    facts |= {"robot": robot.name, "episodes": [], "merge": bridge.execution.merge, "delay": cfg.delay}
    page = deploy_page.write(folder, facts, journal, robot, cfg.robot)
    console.print(f"[bold]{bridge.supervisor.mode}: {bridge.supervisor.reason}[/]\nreport: {page}", highlight=False, soft_wrap=True)
    return {"folder": str(folder)}


@verb("deploy", of_run=("robot",))
def main(cfg: DictConfig) -> dict[str, Any]:
    known = {"demo": demo, "eval": evaluate, None: drive}
    if cfg.do not in known:
        raise ValueError(f"dipole deploy {cfg.do} is unknown; use dipole deploy demo run=FOLDER, dipole deploy eval run=FOLDER, "
                         "or dipole deploy robot=NAME url=…")
    if sum(bool(cfg[k]) for k in ("run", "artifact", "url")) != 1:
        raise ValueError("which policy? Name one of run=FOLDER (a training run), artifact=FOLDER (an export) or url=ws://host:port (a running dipole serve)")
    return known[cfg.do](cfg)


if __name__ == "__main__":
    sys.argv[1:] = words_to_overrides(sys.argv[1:])
    main()

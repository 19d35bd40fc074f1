"""What the ways to deploy share: a signal that brakes first, a bridge with planner and robot connected, episodes of a simulated robot."""
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.markup import escape

import conf
from policy.data.semantics import Semantics
from policy.page import counted
from policy.serve.bridge import Bridge, Settings
from policy.serve.card import Card
from policy.serve.client import PlannerClient
from policy.serve.execution import Execution
from policy.serve.expect import Expect, WrongRobot
from policy.serve.journal import Journal
from policy.serve.recording import Recording
from policy.serve.robot import DriverError, RobotSpec, RobotState
from policy.serve.view import View
from policy.train.log import bar, console
from scripts import serving
from scripts.settings import plain

SIMULATED = 10.0  # s an episode of a simulated robot may take
GONE = 5.0        # s between two episodes in which a planner that is gone may come back
FAILURES = (DriverError, WrongRobot, OSError)  # of robot, planner or network, on the way


class Ended:
    """`with Ended() as ended`: ctrl-C, SIGTERM and a terminal that closes end this process at once, or, once the robot may move, only say so in `signal`."""

    def __init__(self) -> None:
        self.signal, self.moving = 0, False

    def __enter__(self) -> "Ended":
        self.moving = False
        self._before = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str:
        """Of the signal, '' without one."""
        return signal.Signals(self.signal).name if self.signal else ""

    def __bool__(self) -> bool:
        return self.signal > 0

    def _heard(self, number: int, frame: Any) -> None:
        self.signal = number
        if not self.moving:
            raise SystemExit(128 + number)


@contextmanager
def opened(cfg: DictConfig, ended: Ended, folder: Path, delay: float = 0.0, **control: Any) -> Iterator[tuple[Bridge, int]]:
    """A bridge with planner and robot connected, and the server's process (0: not ours). The server is started when no url is given.

    control: what this call wants otherwise than cfg.
    """
    if absent := sorted(OmegaConf.missing_keys(cfg.robot)):
        raise ValueError(f"{absent[0]} has no value: add {absent[0]}=…; conf/robot/{cfg.robot.spec.name}.yaml says what it is")
    if cfg.control.warm is not None and not cfg.run:
        raise ValueError(f"control.warm={cfg.control.warm} belongs to the planner: dipole serve run=… control.warm={cfg.control.warm}, "
                         f"or dipole export run=… control.warm={cfg.control.warm}")
    node, pid = plain(cfg.robot), 0
    robot: RobotSpec = instantiate(node["spec"], _convert_="all")
    folder.mkdir(parents=True, exist_ok=True)
    recording = {"log": str(folder / "robot.npz")} if str(node["driver"]["_target_"]).endswith("MujocoDriver") else {}
    driver = instantiate(node["driver"], **recording, _convert_="all")
    with ExitStack() as stack:
        journal = Journal(folder / "bridge.jsonl")
        stack.callback(journal.close)
        url, token = cfg.url, serving.token(cfg.token_file)
        if not url:
            url, pid = stack.enter_context(serving.server(cfg, delay, folder / "server.log"))
        client = PlannerClient(url, token=token, tls_ca=cfg.tls_ca)
        stack.callback(client.close)
        try:
            card = client.wait_ready(10.0)
        except TimeoutError as e:
            raise TimeoutError(f"{e}. Is `dipole serve` running there?") from e
        if wrong := Expect.of(robot).differences(card):
            fits = " or ".join(f"robot={name}" for name in robots_of(card.task)) or "robot=…"
            raise ValueError(f"the policy at {url} does not fit robot={robot.name}: {wrong}. Choose the robot with {fits}, or serve the run trained for it")
        client.expect = replace(Expect.of(robot), dt=card.dt, model_id=card.model_id)  # whatever takes the server's place has to be the same
        stack.callback(driver.close)
        safety = plain(cfg.safety)
        settings = Settings(**{**safety, "patience": math.inf if safety["patience"] is None else safety["patience"]})
        bridge = Bridge(driver, client, robot, execution_of(cfg, card, robot, control), obs=card.obs, history=card.t_obs, settings=settings, journal=journal)
        if cfg.record:
            bridge.watchers.append(stack.enter_context(kept(cfg, bridge, card)).watch)
        ended.moving = True
        bridge.connect()
        yield bridge, pid


def options_of(cfg: DictConfig) -> dict[str, Any]:
    """The task's own arguments that the run was trained with (a pillar, a belt), so that the simulated robot plays the same; {} without such a run."""
    path = Path(cfg.run or "") / "config.yaml"
    env = plain(OmegaConf.load(path)).get("env") if cfg.run and path.is_file() else None
    module, _, name = str(cfg.robot.driver.get("task", "")).partition(":")
    if not isinstance(env, dict) or env.get("_target_") != f"{module}.{name}":
        return {}
    return {k: v for k, v in env.items() if not k.startswith("_")}


def robots_of(task: str) -> list[str]:
    """Names in conf/robot of those whose task this is."""
    return [path.stem for path in sorted((Path(conf.__file__).parent / "robot").glob("*.yaml")) if task and OmegaConf.load(path).spec.get("task") == task]


@contextmanager
def kept(cfg: DictConfig, bridge: Bridge, card: Card) -> Iterator[Recording]:
    """Recording into the dataset cfg.record, which is made or appended to."""
    if cfg.record_only not in ("all", "success"):
        raise ValueError(f"record_only={cfg.record_only!r} is unknown; use all or success")
    try:
        from policy.data.record import Recorder
    except ImportError as e:
        raise ImportError(f"record=… writes a zarr store and needs {e.name}: pip install 'dipole[deploy]'") from e
    robot, dt = bridge.robot, bridge.execution.dt
    text = f"where {', '.join(robot.joints)} are commanded to be {bridge.execution.knot:g} steps later"
    action = Semantics("absolute", "joint", parts={"joints": tuple(range(robot.dof))}, text=text)
    with Recorder(Path(cfg.record), fps=1 / dt, units={**card.units, "action": ", ".join(robot.units)}, action_semantics=action.text,
                  attrs={"task": card.task, "robot": robot.name, "joints": list(robot.joints), "obs": list(bridge.obs), "policy": card.model_id,
                         "action": action.to_json()}) as recorder:
        recording = Recording(recorder, bridge, keep=won if cfg.record_only == "success" else lambda state: True)
        try:
            yield recording
        finally:
            if recording.trouble:
                console.print(f"[yellow]not all was recorded[/]: {escape(recording.trouble)}", highlight=False, soft_wrap=True)
    console.print(f"recorded: {recorder.path}, {recorder.episodes} episodes", highlight=False, soft_wrap=True)


def execution_of(cfg: DictConfig, card: Card, robot: RobotSpec, control: dict[str, Any]) -> Execution:
    """How chunks are followed: as `control` says, then cfg, then the policy's own advice. ValueError for a merge that the policy has not."""
    asked = {**plain(cfg.control), **control}
    del asked["warm"]  # the server's
    advice: Any = card.facts.get("control") or {}  # what the run was evaluated with, or adopted after dipole eval delay
    asked["execute"] = asked["execute"] or advice.get("execute") or max(1, card.horizon // 2)
    asked["merge"] = asked["merge"] or advice.get("merge") or "naive"
    if asked["merge"] not in card.merges:
        raise ValueError(f"control.merge={asked['merge']} is not offered by this policy; it has {', '.join(card.merges)}"
                         + (". Train with train.rtc=true for prefix" if asked["merge"] == "prefix" else ""))
    return Execution(robot, card.horizon, card.dt, most=card.committed, **asked)


def folder_of(cfg: DictConfig) -> Path:
    """cfg.out, or a new folder: two that start in one second get one each."""
    if cfg.out:
        return Path(cfg.out)
    first = Path("outputs/deploy") / cfg.robot.spec.name / time.strftime("%Y-%m-%d_%H-%M-%S")
    for folder in (first, *(first.with_name(f"{first.name}_{i}") for i in range(2, 100))):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{first} and 98 more are there: name a folder, out=…")


def run(bridge: Bridge, cfg: DictConfig, seconds: float, until: Callable[[RobotState], bool]) -> dict[str, Any]:
    return bridge.run(seconds, until=until, priority=cfg.realtime.priority, cpu=cfg.realtime.cpu)


def view(bridge: Bridge, cfg: DictConfig) -> Any:
    return View(bridge) if cfg.view and console.is_terminal else nullcontext()


def won(state: RobotState | None) -> bool:
    return state is not None and bool(state.info.get("success"))


def episodes(bridge: Bridge, cfg: DictConfig, seeds: Sequence[int], ended: Ended, on_done: Any = lambda rows: None) -> tuple[list[dict[str, Any]], str]:
    """Episodes of a simulated robot: [{seed, success, seconds, …}], and why they are not all, '' when they are or somebody ended them."""
    driver: Any = bridge.driver
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        try:
            bridge.client.wait_ready(GONE)  # type: ignore[attr-defined]
            bridge.rearm() if bridge.supervisor.mode == "STOP" else bridge.connect()  # its watchdog has tripped since the last one
            bridge.begin(driver.reset(seed))
        except FAILURES as e:
            return rows, f"before seed {seed}: {e}"
        start = time.monotonic()
        run(bridge, cfg, cfg.seconds or SIMULATED, lambda state: bool(ended) or won(state))
        success = bridge.state is not None and won(bridge.state) and bridge.supervisor.mode != "STOP"
        if ended and not success:
            break
        rows.append({"seed": seed, "success": success, "seconds": round(time.monotonic() - start, 2),
                     "modes": sorted({e["mode"] for e in bridge.journal.events if e["event"] == "mode" and e["t"] >= start})})
        if bridge.supervisor.mode == "STOP":
            rows[-1]["stop"] = bridge.supervisor.reason + lateness(bridge, start)
        on_done(rows)
        if ended:
            break
    return rows, ""


def lateness(bridge: Bridge, since: float) -> str:
    """How late the loop was at worst since then, and what the system took meanwhile; '' when it missed no period."""
    if not (missed := [e for e in bridge.journal.late if e["t"] >= since]):
        return ""
    worst = max(missed, key=lambda e: e["late_ms"])
    taken = [f"in the 2 s before {worst['stolen_ms']} ms of its cores were taken by the host of this virtual machine"] if worst.get("stolen_ms") else []
    taken += [f"{counted(worst['disk_faults'], 'page')} had to be read from a disk"] if worst.get("disk_faults") else []
    return f" (the loop was {worst['late_ms']:.0f} ms late{', ' + ' and '.join(taken) if taken else ''})"


def over(ended: Ended, trouble: str, page: Path) -> None:
    """End the command as it ended: 1 when something failed on the way, 128 and the signal's number when somebody ended it."""
    if trouble:
        raise DriverError(f"{trouble}. What happened until then: {page}")
    if ended:
        raise SystemExit(128 + ended.signal)


def quiet_bar() -> Any:
    """A progress bar that is drawn when it is told something, not by a thread beside the control loop."""
    progress = bar()
    progress.live.auto_refresh = False
    return progress

"""Write demonstrations of a task's scripted expert to zarr: dipole collect env=gantry path=demos/gantry.zarr."""
import math
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from policy.data.record import Recorder
from policy.data.store import DataError, Store
from policy.page import counted
from policy.train.log import bar, console
from scripts.recording import meaning
from scripts.settings import plain, stopped, whole
from scripts.verb import verb


def collect(task: Any, path: Path, *, episodes: int, seed: int, noise: Any, workers: int | None = None, ray: str | None = None,
            recording: str | None = None, env: dict[str, Any] | None = None, data: dict[str, Any] | None = None) -> Store:
    """task: an envs.task.Task, or a function without arguments that makes one environment with an expert (envs.adapter.Adapter).

    recording: a file of human demonstrations that the environment can read (`recorded`), taken as it is instead of the expert.
    workers, ray: who does it, see envs.crew.crew_of; the episodes are the same. A task of ours is simulated by threads of this process when neither is said.
    data: conf/data of the task, whose semantics are kept.
    env: the task's settings, kept in the store so that training on them for another is refused (common.check_settings).
    Append-safe: an interrupted run leaves a store that opens with the episodes written so far.
    """
    from envs.collect import demonstrations, from_env
    from envs.crew import crew_of
    from envs.task import Task
    found: Iterator[dict[str, Any]]
    if recording is not None and not hasattr(getattr(task, "func", task), "recorded"):
        raise ValueError("this environment reads no recordings; env=adroit does. Leave out recording=…")
    if isinstance(task, Task):
        facts, fps = task, task.fps
        task.expert(1, seed)  # a task without one says so before anything is written
        found = demonstrations(task, None, episodes, seed=seed, noise=noise, crew=None if workers is None and ray is None else crew_of(workers, ray))
    else:
        facts = task()
        fps = facts.metadata["render_fps"]
        facts.close()
        if recording is None:
            facts.expert(seed)
            found = from_env(task, episodes, seed=seed, noise=noise, crew=crew_of(workers, ray))
        else:
            found = islice(facts.recorded(recording), episodes)
    schema: dict[str, Any] = {**{k: (v.shape, v.dtype) for k, v in facts.observation_space.spaces.items()}, "action": (facts.action_space.shape, "float32")}
    check_noise(noise, facts.action_space.shape[0])
    if path.exists():
        raise DataError(f"{path} already holds data and is not overwritten. Choose another path, or remove it yourself; dipole data merge joins datasets")
    shown = {"expert": "scripted", "first_seed": seed} if recording is None else {"expert": "recorded"}
    meant = meaning(data or {})
    attrs = {"task": facts.name, **({"env": env} if env else {}), **({"action": meant.to_json()} if meant else {}), **shown}
    with Recorder(path, fps=fps, schema=schema, units=facts.units, action_semantics=facts.action_semantics, attrs=attrs) as recorder, bar() as progress:
        bar_task, steps = progress.add_task("collect", total=episodes if recording is None else None, note=""), 0
        while chunk := [{k: v for k, v in e.items() if k != "seed"} for e in islice(found, 25)]:
            recorder.extend(chunk)
            steps += sum(len(e["action"]) for e in chunk)
            progress.update(bar_task, completed=recorder.episodes, note=f"{steps} steps")
    return Store.open(path)


def kept(path: Path) -> int:
    """Whole episodes that are in the dataset at path, if there is one."""
    try:
        return Store.open(path).episodes
    except DataError:
        return 0


def check_noise(noise: Any, dims: int) -> None:
    """ValueError when it is no standard deviation, nor one for each of the action's dimensions."""
    each = noise if isinstance(noise, list) else [] if noise is None else [noise]
    if not all(isinstance(v, int | float) and 0 <= v < math.inf for v in each) or (isinstance(noise, list) and len(noise) != dims):
        raise ValueError(f"noise={noise!r} must be a standard deviation in the action's unit, like noise=0.01, or {dims} numbers, one for each dimension")


def known(env: str | None) -> dict[str, Any]:
    """Node data that belongs to an environment, conf/data/<env>.yaml; nothing where there is none."""
    file = files("conf") / "data" / f"{env}.yaml"
    return plain(OmegaConf.create(file.read_text(encoding="utf-8"))) if file.is_file() else {}


@verb("collect")
def main(cfg: DictConfig) -> None:
    if "_target_" not in cfg.env:
        raise ValueError("env=none has no expert; name a task that has one: env=gantry, env=maze, env=metaworld")
    whole(1, episodes=cfg.episodes)
    whole(0, seed=cfg.seed, **({} if cfg.workers is None else {"workers": cfg.workers}))
    noise = plain(cfg.noise) if OmegaConf.is_config(cfg.noise) else cfg.noise
    task, path, tick = instantiate(cfg.env), Path(cfg.path), time.perf_counter()
    with stopped(lambda: f"stopped: {counted(kept(path), 'episode')} in {path}"):
        store = collect(task, path, episodes=cfg.episodes, seed=cfg.seed, noise=noise, workers=cfg.workers, ray=cfg.ray, recording=cfg.recording,
                        env=plain(cfg.env), data=known(HydraConfig.get().runtime.choices.get("env")))
    line = f"[bold]{store.episodes} demonstrations, {store.steps} steps in {time.perf_counter() - tick:.1f} s[/]"
    console.print(f"{line}: {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

"""Write demonstrations of a task's scripted expert to zarr: dipole collect env=gantry path=demos/gantry.zarr."""
import time
from itertools import islice
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from policy.data.store import Store
from policy.train.log import bar, console
from scripts.verb import verb


def collect(task, path: Path, *, episodes: int, seed: int, noise: float | None) -> Store:
    """Append-safe: an interrupted run leaves a store that opens with the episodes written so far."""
    from envs.collect import demonstrations
    task.expert(1, seed)  # a task without one says so before anything is written
    schema = {**{k: (v.shape, v.dtype) for k, v in task.observation_space.spaces.items()}, "action": (task.action_space.shape, "float32")}
    store = Store.create(path, schema, fps=task.fps, units=task.units, action_semantics=task.action_semantics,
                         attrs={"task": task.name, "expert": "scripted", "first_seed": seed})
    with bar() as progress:
        bar_task = progress.add_task("collect", total=episodes, note="")
        found = demonstrations(task, task.expert, episodes, seed=seed, noise=noise)
        while chunk := [{k: v for k, v in e.items() if k != "seed"} for e in islice(found, 25)]:
            store.extend(chunk)
            progress.update(bar_task, completed=store.episodes, note=f"{store.steps} steps")
    return store


@verb("collect")
def main(cfg: DictConfig) -> None:
    task, path, tick = instantiate(cfg.env), Path(cfg.path), time.perf_counter()
    store = collect(task, path, episodes=cfg.episodes, seed=cfg.seed, noise=cfg.noise)
    console.print(f"[bold]{store.episodes} demonstrations, {store.steps} steps in {time.perf_counter() - tick:.1f} s[/]: {path}", highlight=False)


if __name__ == "__main__":
    main()

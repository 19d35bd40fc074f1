"""Another format into a store, and back: dipole data convert src=demo.hdf5 dst=demos/lift.zarr."""
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig
from rich.progress import Progress, TaskID

from policy.data.convert import Converted, convert
from policy.data.store import Store
from policy.page import counted
from policy.train.log import bar, console
from scripts.settings import plain, stopped
from scripts.verb import verb


def told(done: Converted, src: str) -> list[str]:
    """What to print about it; the last line says episodes, steps and where."""
    lines = [f"note: {note}" for note in done.notes]
    if done.keys:
        renamed = {k: v for k, v in done.keys.items() if k != v}
        obs = Store.open(done.path).attrs["obs"]
        lines += [f"renamed: {', '.join(f'{k} -> {v}' for k, v in renamed.items())}"] if renamed else []
        lines += [f"observed by default: {', '.join(obs) or 'nothing; say data.obs=… when training'}"]
    return [*lines, f"{src} ({done.format}): {counted(done.episodes, 'episode')}, {counted(done.steps, 'step')} -> {done.path}"]


@verb("data_convert")
def start(cfg: DictConfig) -> None:
    d = plain(cfg)
    src, dst, mapping = d.pop("src"), d.pop("dst"), d.pop("mapping")
    with stopped(lambda: f"stopped: {dst} is whole" if Path(dst).exists() else f"stopped: nothing is kept, {dst} was not made"), ExitStack() as stack:
        shown: list[tuple[Progress, TaskID]] = []

        def tell(i: int, n: int, steps: int) -> None:
            if not shown:  # a refused dataset shows no bar
                progress = stack.enter_context(bar())
                shown.append((progress, progress.add_task("convert", total=n, note="")))
            progress, task = shown[0]
            progress.update(task, completed=i, total=n, note=f"{steps} steps")
        done = convert(src, dst, mapping=mapping, progress=tell, **d)
    console.print("\n".join(told(done, src)), highlight=False, soft_wrap=True, markup=False)

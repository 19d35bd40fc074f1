"""Where numbers go while training: a json line per row in the run folder, wandb, and a progress bar with the time left."""
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


class Log:
    """Use as a context manager. wandb: offline (default; `wandb sync` uploads later), online, or disabled."""

    def __init__(self, folder: Path, *, wandb: str = "offline", project: str = "dipole", config: dict[str, Any] | None = None, resume_at: int = 0):
        if wandb not in ("offline", "online", "disabled"):
            raise ValueError(f"log.wandb={wandb!r} is unknown; use offline, online or disabled")
        self.folder, self.mode, self.project, self.config = folder, wandb, project, config or {}
        self.path = folder / "train.jsonl"
        rows = [r for r in read_rows(self.path) if r["step"] <= resume_at]  # rows after the checkpoint are about to be repeated
        self.path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        self.run: Any = None

    def __enter__(self) -> "Log":
        if self.mode != "disabled":
            import wandb
            self.run = wandb.init(project=self.project, dir=self.folder, mode=self.mode,  # type: ignore[arg-type]
                                  config=self.config, name=self.folder.name,
                                  settings=wandb.Settings(silent=True, console="off"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if error is None else 1)

    def row(self, step: int, **numbers: Any) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **numbers}) + "\n")
        if self.run is not None:
            self.run.log(_flat(numbers), step=step)

    def videos(self, step: int, files: list[Path]) -> None:
        if self.run is not None and files:
            import wandb
            self.run.log({"rollouts": [wandb.Video(str(f), format="mp4") for f in files]}, step=step)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a train.jsonl; a line cut off by a killed process is dropped."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def bar() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"), console=console, refresh_per_second=2)


def _flat(numbers: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for k, v in numbers.items():
        if isinstance(v, dict):
            flat |= _flat(v, f"{prefix}{k}/")
        elif isinstance(v, int | float):
            flat[prefix + k] = v
    return flat

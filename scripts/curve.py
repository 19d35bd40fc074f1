"""Draw learning curves of several runs, score against CPU-minutes: dipole curve runs=[outputs/a,outputs/b]."""
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policy.train.log import console, read_rows
from scripts.verb import verb


def points(folder: Path) -> list[dict[str, Any]]:
    """The rollouts of a run: [{cpu_s, score, score_ci, success, success_ci, episodes}]."""
    rows = [{"cpu_s": r["cpu_s"], **r["eval"]} for r in read_rows(folder / "train.jsonl") if "eval" in r]
    if not rows:
        raise ValueError(f"{folder} has no rollouts in train.jsonl; train with train.eval=1000")
    return rows


def draw(runs: dict[str, list[dict[str, Any]]], out: Path, *, target: float | None, title: str) -> Path:
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), dpi=130)
    for i, (name, rows) in enumerate(runs.items()):
        x = [r["cpu_s"] / 60 for r in rows]
        ax.plot(x, [r["score"] for r in rows], "-o", ms=4, color=f"C{i}", label=name)
        ax.fill_between(x, [r["score_ci"][0] for r in rows], [r["score_ci"][1] for r in rows], color=f"C{i}", alpha=0.15, lw=0)
    if target is not None:
        ax.axhline(target, color="0.6", lw=1, ls="--")
        ax.annotate(f"{target:g}", (0, target), xytext=(3, 3), textcoords="offset points", color="0.4", fontsize=8)
    episodes = {r["episodes"] for rows in runs.values() for r in rows}
    ax.set(xlabel="training, CPU-minutes of one thread", ylabel=f"score over {'/'.join(map(str, sorted(episodes)))} seeds, 95 % interval", ylim=(0, 1.02),
           title=title)
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(out)
    plt.close(fig)
    return out


@verb("curve")
def main(cfg: DictConfig) -> None:
    names = list(cfg.names or [])
    runs = {(names[i] if i < len(names) else Path(r).name): points(Path(r)) for i, r in enumerate(cfg.runs)}
    for name, rows in runs.items():
        lo, hi = rows[-1]["score_ci"]
        console.print(f"{name}: {rows[-1]['score']:.3f} [{lo:.3f}, {hi:.3f}] after {rows[-1]['cpu_s'] / 60:.1f} CPU-minutes", highlight=False, soft_wrap=True)
    console.print(f"[bold]{draw(runs, Path(cfg.out), target=cfg.target, title=cfg.title)}[/]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

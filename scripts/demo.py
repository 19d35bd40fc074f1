"""From nothing to a moving robot: collect, train, roll out 100 seeds; dipole demo [run=FOLDER]."""
import subprocess
import sys
import time
from pathlib import Path

from policy.train.log import console

HELP = """Collect demonstrations with a scripted expert, train on them, roll out 100 distinct seeds: about 2 minutes on 2 CPU cores.

  dipole demo
  dipole demo run=outputs/mine
  dipole demo env.pillar=true       # demonstrations with two modes

Further overrides go to `dipole train`; those of env. also to `dipole collect`."""


def main() -> None:
    args = sys.argv[1:]
    if {"-h", "--help"} & set(args):
        print(HELP)
        return
    run = next((a.removeprefix("run=") for a in args if a.startswith("run=")), f"outputs/demo/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    rest = [a for a in args if not a.startswith("run=")]
    env, demos = [a for a in rest if a.startswith("env.")], Path(run) / "demos.zarr"
    tick = time.perf_counter()
    step("collect", "env=gantry", f"path={demos}", *env)
    step("train", "recipe=gantry", f"data.path={demos}", f"run={run}", *rest)
    step("eval", f"run={run}", "episodes=100", f"out={run}/eval")
    console.print(f"{time.perf_counter() - tick:.0f} s in all. Now look: {run}/eval/report.html, {run}/eval/videos; "
                  "then try: dipole eval --help", highlight=False)


def step(verb: str, *overrides: str) -> None:
    """The same command a user would type, shown before it runs."""
    console.print(f"\n[bold cyan]$ dipole {verb} {' '.join(overrides)}[/]", highlight=False)
    process = subprocess.Popen([sys.executable, "-m", "scripts.cli", verb, *overrides])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the verb got it too, and may be saving
        process.wait()
        code = 130
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()

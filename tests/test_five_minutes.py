"""The README's page "your data in five minutes", typed line by line: every command works, in order, in five minutes."""
import re
import shlex
import time
from pathlib import Path

import pytest

from policy.data import Store
from tests.shell import Shell

README = Path(__file__).parent.parent / "README.md"


def page() -> str:
    return re.search(r"## Your data in five minutes\n(.*?)(?=\n\*\*|\n## )", README.read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]


def learns() -> list[str]:
    """The commands of "What the policy learns" on this page's datasets."""
    text = re.search(r"\*\*What the policy learns.*?```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]
    return [f"{line.partition(' #')[0]} train.steps=5" for line in text.splitlines() if "umi" not in line]


@pytest.mark.slow
def test_the_page_works_as_it_stands(tmp_path_factory):
    shell, start = Shell(tmp_path_factory.mktemp("five")), time.monotonic()
    text = page()
    mapping, = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (shell.folder / "mine.yaml").write_text(mapping, encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines() if line]
    assert len(learns()) == 2
    try:
        for line in [*lines, *learns()]:
            program, *words = shlex.split(line, comments=True)
            assert program == "dipole"
            done = shell(*words)
            assert done.code == 0, f"{line}\n{done.err}"
    finally:
        shell.close()
    assert len(lines) >= 12 and time.monotonic() - start < 300
    assert (shell.folder / "mine.hdf5").exists() and (shell.folder / "outputs/mine/report.html").exists()
    assert (shell.folder / "demos/mine.zarr.validate/validate.html").stat().st_size > 10_000 and (shell.folder / "demos/mine.zarr.episode3.html").exists()
    said = Store.open(shell.folder / "demos/said.zarr")
    assert said.units["hand"] == "m" and said.attrs["action"]["kind"] == "absolute" and set(said.keys) >= {"hand", "opening", "cube", "goal", "action"}
    assert not {"cube_from_hand", "goal_from_cube"} & set(said.keys) and said.episodes == 30
    assert Store.open(shell.folder / "demos/all.zarr").episodes == 29

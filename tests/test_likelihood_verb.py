"""`dipole eval likelihood` as a user types it."""
import json

import numpy as np
import pytest
import torch

from scripts.likelihood import over_episodes, spread
from tests.shell import TINY, refused

FEW = ["likelihood.windows=6", "likelihood.scored=4", "likelihood.steps=4", "likelihood.draws=4", "likelihood.noise=[0.1,0.5]"]


def test_it_leaves_numbers_and_a_page(shell, run):
    done = shell("eval", "likelihood", "run=run", "out=nats", *FEW)
    assert done.code == 0, done.err
    found = json.loads((shell.folder / "nats" / "likelihood.json").read_text())
    assert found["floor"] == 0.01 and found["dims"] % 16 == 0 and found["command"].startswith("dipole eval do=likelihood")
    assert found["exact"] == found["splits"]["held out"]["exact"]["mean"] and found["bound"] == found["splits"]["held out"]["bound"]["mean"]
    for name, episodes in (("held out", 1), ("training", 4)):
        split = found["splits"][name]
        assert split["episodes"] == episodes and len(split["exact"]["per_window"]) == split["windows"] >= 6
        assert split["exact"]["mean"] == pytest.approx(np.mean(split["exact"]["per_window"])) and (split["bound"]["ci"] is None) == (episodes == 1)
    assert [row["change"] for row in found["ood"]["changes"]] == ["noise 0.1", "noise 0.5", "shift 0.2"]  # one episode: nothing to mix
    assert all(0 <= row[kind]["auroc"] <= 1 for row in found["ood"]["changes"] for kind in ("loss", "likelihood"))
    page = (shell.folder / "nats" / "report.html").read_text()
    assert "Nats per dimension" in page and ">nan" not in page
    last = done.out.splitlines()[-2:]
    assert last[0].startswith("Gantry: -log p in nats/dim ") and last[1] == "report: nats/report.html"


def test_what_has_no_likelihood_says_why(shell, run):
    trained = shell("train", "recipe=gantry", "formalism=regression", "data.path=demos.zarr", "run=mean", "train.steps=1", *TINY)
    assert trained.code == 0, trained.err
    refused(shell("eval", "likelihood", "run=mean", *FEW), "no likelihood", "formalism")
    refused(shell("eval", "likelihood", "run=run", "likelihood.windows=0"), "likelihood.windows")
    refused(shell("eval", "likelihood", "run=run", "likelihood.floor=-1"), "floor")
    (shell.folder / "demos.zarr").rename(shell.folder / "moved.zarr")
    try:
        refused(shell("eval", "likelihood", "run=run", *FEW), "demos.zarr")
    finally:
        (shell.folder / "moved.zarr").rename(shell.folder / "demos.zarr")


def test_windows_are_spread_over_episodes():
    whole = [torch.arange(0, 10), torch.arange(0), torch.arange(20, 23), torch.arange(30, 50)]
    index, episodes = spread(whole, 12, "held out", 16)
    assert episodes == [0] * 4 + [2] * 3 + [3] * 4 and index.tolist() == [1, 3, 6, 8, 20, 21, 22, 33, 38, 43, 48]
    assert spread(whole, 2, "held out", 16)[1] == [0, 2]
    where = spread([torch.arange(1000)] * 50, 50, "training", 16)[0]
    assert np.histogram(where, 5, (0, 1000))[0].tolist() == pytest.approx([10] * 5, abs=1)  # one each, yet from beginnings to ends
    with pytest.raises(ValueError, match="as long as a plan, 16 steps"):
        spread([torch.arange(0)], 5, "held out", 16)


def test_intervals_resample_episodes():
    lo, hi = over_episodes(np.repeat([0.0, 1.0, 2.0, 3.0], 50), sorted([0, 1, 2, 3] * 50))
    assert hi - lo > 1.5  # over windows it would be .3
    assert over_episodes(np.arange(3.0), [7, 7, 7]) is None

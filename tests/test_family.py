"""The table of formalisms: rows that share or distil a training, paired differences, calls and latency; the sides of a pillar."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from scripts import bench_family, bench_modes, family_page, suite
from tests.shell import SHORT
from tests.test_conf import composed
from tests.test_suite import Verbs, settings

ROWS = {"a": {"train": ["formalism=ddpm"], "cpu_s": 10}, "b": {"of": "a", "eval": ["sampler=ddim"], "cpu_s": 10},
        "c": {"teacher": "a", "train": ["train.steps=5"], "cpu_s": 10, "after": [["eval", "do=likelihood"]]}}


def test_a_row_trains_what_it_builds_on_first_and_once(tmp_path, monkeypatch):
    verbs = Verbs()

    def call(argv, log, lock, watch):
        argv = list(argv)
        if argv[0] == "distill":  # leaves what train does, in out
            verbs.asked.append(argv)
            return made(argv, log, lock, watch)
        if "do=likelihood" in argv:
            verbs.asked.append(argv)
            return 0, 1.0
        if argv[0] == "eval":
            argv = [*(a for a in argv if not a.startswith("run=")), f"run='{tmp_path}/suite/a/seed0'"]
        return verbs(argv, log, lock, watch)

    def made(argv, log, lock, watch):
        out = Path(next(a for a in argv if a.startswith("out=")).split("=", 1)[1].strip("'"))
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / "last.safetensors").touch()
        (out / "checkpoints" / "policy.json").write_text(json.dumps({"step": 10, "settings": {"steps": 10}, "cpu_s": 3.0}))
        return 0, 1.0

    monkeypatch.setattr(suite, "call", call)
    rows = suite.measure(settings(tmp_path, rows=ROWS, only=["c", "b"], seeds=[0]))
    asked = [a[0] + ("" if "do=likelihood" not in a else " likelihood") for a in verbs.asked]
    assert asked == ["train", "distill", "eval", "eval likelihood", "eval"]
    teach = verbs.asked[1]
    assert f"run='{tmp_path}/suite/a/seed0'" in teach and f"out='{tmp_path}/suite/c/seed0'" in teach and "train.steps=5" in teach
    assert rows["b"]["recipe"] == "formalism=ddpm" and rows["b"]["cells"][0]["train_cpu_s"] == 70 and rows["c"]["cells"][0]["train_cpu_s"] == 3
    verbs.asked.clear()
    suite.measure(settings(tmp_path, rows=ROWS, only=["c", "b"], seeds=[0]))
    assert not verbs.asked


@pytest.mark.parametrize("table", ["family", "modes"])
def test_every_row_of_the_tables_composes(table):
    """Each is a training that hydra accepts, or leans on one that is; each evaluation chooses a sampler that there is."""
    cfg = composed("bench")
    node = OmegaConf.to_container(cfg[table], resolve=False)
    for name, row in node["rows"].items():
        if "of" in row or "teacher" in row:
            assert row.get("of", row.get("teacher")) in node["rows"], name
            composed("train" if "of" in row else "distill", *row.get("eval", []), *row.get("train", []))
        else:
            composed("train", *(o for o in node["train"] if "data.path" not in o), "data.path=x", *row["train"])


def test_differences_are_paired_with_the_first_row(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1, 50)
    found = {}
    for name, extra in (("ddpm", 0.0), ("flow", 0.1)):
        out = tmp_path / name / "seed0" / "eval" / "suite"
        out.mkdir(parents=True)
        (out / "metrics.json").write_text(json.dumps({"calls": 7, "per_episode": [{"score": float(x)} for x in base + extra]}))
        cell = {"seed": 0, "status": "done", "train_cpu_s": 400.0, "commit": "abc", "score": float(base.mean() + extra), "report": "x.html"}
        found[name] = {"name": name, "recipe": f"formalism={name} net=dit", "cells": [cell], "skipped": None, "score": cell["score"], "score_ci": [0.4, 0.6]}
    nats = tmp_path / "flow" / "seed0" / "eval" / "likelihood"
    nats.mkdir()
    (nats / "likelihood.json").write_text(json.dumps({"bound": -1.5, "exact": -1.7}))
    rows = bench_family.known(found, tmp_path, OmegaConf.create({"family": {"first": "ddpm"}}))
    assert "difference" not in rows["ddpm"] and rows["flow"]["difference"] == pytest.approx(0.1)
    assert rows["flow"]["difference_ci"] == pytest.approx([0.1, 0.1]) and rows["flow"]["net"] == "dit" and rows["flow"]["calls"] == 7
    text = family_page.markdown(rows)
    assert "| flow | dit | 400 |" in text and "+0.100 [+0.100, +0.100]" in text and "`abc`" in text
    family_page.write(tmp_path, rows)
    family_page.show(rows)
    assert "flow" in (tmp_path / "family.html").read_text() and family_page.headline(rows).startswith("2 of 2 rows done; best flow")


def test_latency_takes_the_sampler_of_the_evaluation(shell, run):
    for name, words in (("slow", ["sampler.steps=40"]), ("quick", ["sampler=consistency"])):
        assert shell("eval", f"run={shell.folder}/run", f"out={shell.folder}/fam/{name}/seed0/eval/suite", *words, *SHORT).code == 0
    cells = [{"seed": 0, "status": "done"}]
    bench_family.latency({"slow": {"cells": cells}, "quick": {"cells": cells}}, shell.folder / "fam", OmegaConf.create({"rounds": 9}))
    times = json.loads((shell.folder / "fam" / "latency.json").read_text())
    assert 5 < times["slow"] / times["quick"] < 60  # 40 calls and one


def test_sides_are_those_of_the_line_to_the_disc():
    obs = {"pillar": torch.zeros(1, 2, 2), "goal": torch.tensor([[[0.2, 0.0]] * 2]), "cube": torch.tensor([[[-0.2, 0.0, 0.1]] * 2])}
    x = np.linspace(-0.2, 0.2, 16)
    bow = 0.15 * np.cos(x / 0.2 * np.pi / 2)
    plans = np.stack([np.stack([x, side * bow, 0 * x, 0 * x], -1) for side in (1, 1, -1, 0)])
    assert bench_modes.sides(plans, obs) == (2, 1, 1)


def test_the_expert_has_lifted_and_not_yet_chosen():
    obs = bench_modes.decision(300000)
    hand = obs["hand"][0].numpy()
    assert hand[-1, 2] > 0.075 and np.abs(np.diff(hand[:, :2], axis=0)).max() < 0.003 and np.linalg.norm(obs["cube_from_hand"][0, -1]) < 0.02

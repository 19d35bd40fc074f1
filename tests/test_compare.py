"""Comparing: paired on the seeds, found where it is held and made where it is not; late plans; faults with the command that replays them."""
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from policy.compare import compare, sentence, write_page
from policy.stats import Paired, bootstrap, episodes_needed, holm, wilson
from policy.svg import matrix
from scripts import films
from scripts.common import load_actions
from scripts.compare import names
from tests.shell import SHORT, metrics, refused
from tests.test_report import Page


def evaluation(won: str, score: list[float | None] | None = None, first: int = 10) -> dict:
    """Metrics of the seeds first, first + 1, …: "+" is a success."""
    rows = [{"seed": first + i, "success": w == "+", "score": float(w == "+") if score is None else score[i]} for i, w in enumerate(won)]
    return {"task": "toy", "seeds": [r["seed"] for r in rows], "per_episode": rows, "length": {"mean": 12.0, "success": None}, "step": 500}


def test_differences_are_those_of_the_common_seeds():
    a, b = evaluation("++--+++-"), evaluation("+-+++", first=12)  # b on seeds 12 to 16, of which the last only a misses
    found = compare({"a": a, "b": b}, range(12, 17))
    (pair,) = found["differences"]
    want = Paired.of([False, False, True, True, True], [True, False, True, True, True])
    assert pair["success"] == {**want.summary(), "p_holm": want.summary()["p"]} and pair["success"]["only_second"] == 1
    assert pair["score"]["difference"] == pytest.approx(0.2) and pair["score"]["difference_ci"] == pair["success"]["difference_ci"]  # score is success here
    assert [(r["name"], r["success"], r["success_ci"]) for r in found["runs"]] == [("a", 0.6, list(wilson(3, 5))), ("b", 0.8, list(wilson(4, 5)))]


def test_scores_are_paired_and_a_lost_one_leaves_its_pair_out():
    rng = np.random.default_rng(0)
    hard = rng.random(40)
    a, b = hard + 0.01 * rng.random(40), hard + 0.05 + 0.01 * rng.random(40)
    score = [None, *b[1:].tolist()]
    found = compare({"a": evaluation("+" * 40, a.tolist()), "b": evaluation("-" + "+" * 39, score)}, range(10, 50))["differences"][0]
    assert found["score"]["difference"] == pytest.approx(np.mean(b[1:] - a[1:])) and found["score"]["difference_ci"] == list(bootstrap(b[1:] - a[1:]))
    lo, hi = found["score"]["difference_ci"]
    assert 0.045 < lo < 0.05 < hi < 0.055  # the seeds' own spread, .3, has fallen out


def test_several_are_compared_with_the_first_and_their_number_counts():
    found = compare({"a": evaluation("-" * 20), "b": evaluation("+" * 6 + "-" * 14), "c": evaluation("+" * 9 + "-" * 11)}, range(10, 30))
    p = [pair["success"]["p"] for pair in found["differences"]]
    assert [pair["first"] for pair in found["differences"]] == ["a", "a"] and [pair["success"]["p_holm"] for pair in found["differences"]] == holm(p)


def test_what_is_said_of_a_difference():
    def said(a: str, b: str) -> str:
        return sentence(compare({"a": evaluation(a), "b": evaluation(b)}, range(10, 10 + len(a)))["differences"][0])

    unsure, sure = said("+" * 60 + "-" * 40, "-" * 30 + "+" * 70), said("-" * 100, "+" * 30 + "-" * 70)
    assert unsure.startswith("b - a: success +10.0 points [") and unsure.endswith(f"takes about {episodes_needed(0.6, 0.7, 0.7)} seeds")
    assert "p < .001 (only a wins 0, only b 30 of 100 seeds)" in sure and "takes" not in sure
    assert said("+-+", "++-").endswith("they won equally often")


def test_the_page_shows_everything_and_fetches_nothing(tmp_path):
    evil = "<b>&'\""
    a = {**evaluation("++--+"), "measures": {evil: {"max": 0.5, "last": 0.25}}, "control": {"execute": 8, evil: evil}, "cpu_s": 90,
         "smoothness": {"seam_ratio": 2.5}, "plan_ms": {"p50": 4.0, "p99": 6.0}}
    found = compare({f"a{evil}": a, "b": evaluation("++++-", [0.2, 0.4, 0.6, 0.8, None])}, range(10, 15))
    found["runs"][0]["curve"] = [{"cpu_s": 60, "score": 0.5, "score_ci": [0.4, 0.6]}]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "seed_12.mp4").write_bytes(b"")
    found |= {"videos": [{"file": "videos/seed_12.mp4", "seed": 12, "caption": f"b{evil} wins"}], "command": f"dipole eval compare {evil}"}
    html = write_page(tmp_path, json.loads(json.dumps(found))).read_text()
    page = Page(html)
    assert page.sources == ["videos/seed_12.mp4"] and "b" not in page.tags and "http" not in html
    for text in (f"a{evil}", "seeds, the same for all: 10–14", "Only b wins 2:", "12, 13", f"b{evil} wins", "0.5 / 0.25", "90 s of CPU", "2.5",
                 "Score against CPU time"):
        assert text in page.text, text
    assert html.count('<rect class="unit good"') == 7 and html.count('<rect class="unit bad"') == 3
    assert "seed 14: " in html and "b failure" in html


def test_the_axis_is_in_the_unit_of_its_labels(tmp_path):
    """Points, as the numbers beside the bars."""
    found = compare({"a": evaluation("+" * 20), "b": evaluation("+" * 10 + "-" * 10)}, range(10, 30))
    page = Page(write_page(tmp_path, found).read_text())
    html = (tmp_path / "report.html").read_text()
    drawn = re.search(r'aria-label="difference">.*?</svg>', html, re.DOTALL)[0]
    assert "-50.0 [" in page.text and re.findall(r'text-anchor="middle">([^<]*)<', drawn)[0] in ("-60", "-80") and "-0.6" not in drawn


def test_the_matrix_shows_the_ends_of_long_names():
    drawn = matrix([("x" * 40 + "seed0", [True]), ("y" * 90 + "seed1", [False])], [1])
    assert "x" * 40 + "seed0<" in drawn and "…" + "y" * 49 + "seed1<" in drawn
    starts = [float(x) for x in re.findall(r'<rect[^>]* x="([\d.]+)"', drawn)]
    assert min(starts) >= 12 + 6.5 * 55  # room for the letters


@pytest.mark.parametrize("folders, want", [
    (["outputs/a", "outputs/b"], ["a", "b"]), (["x/a/eval/policy", "x/b/eval/policy"], ["a", "b"]), (["x/a", "x/b/eval/policy"], ["a", "b/eval/policy"]),
    (["/tmp/review/outputs/rv/suite/gantry/seed0/eval/suite", "outputs/a"], ["seed0", "a"]),
    (["/tmp/review/outputs/rv/suite/gantry/seed0", "outputs/seed0"], ["gantry/seed0", "outputs/seed0"]),
    (["x/eval/policy", "x/eval/policy-sampler=heun"], ["policy", "policy-sampler=heun"]), (["x/a", "x/a/eval/p"], ["a", "a/eval/p"])])
def test_names_are_what_tells_folders_apart(folders, want):
    assert names([Path(f) for f in folders]) == want


def test_a_grid_shows_every_film_until_the_longest_ends():
    def film(steps: int, grey: int, ok: bool) -> films.Film:
        return films.Film(np.full((steps, films.SIZE, films.SIZE, 3), grey, np.uint8) + np.arange(steps, dtype=np.uint8)[:, None, None, None], "seed 1 x", ok)

    picture = films.grid([film(2, 10, True), film(4, 100, False), film(3, 50, True)])
    tall, wide = films.SIZE + films.CAPTION + films.BORDER, films.SIZE + 2 * films.BORDER
    assert picture.shape == (4, 2 * tall, 2 * wide, 3) and not picture[:, tall:, wide:].any()
    for k, (y, x, start, steps, colour) in enumerate([(0, 0, 10, 2, films.GOOD), (0, wide, 100, 4, films.BAD), (tall, 0, 50, 3, films.GOOD)]):
        middle = picture[:, y + films.CAPTION + 9, x + films.BORDER + 9, 0]
        assert middle.tolist() == [start + min(t, steps - 1) for t in range(4)], k
        assert (picture[:, y + tall - 1, x] == colour).all() and (picture[0, y: y + films.CAPTION, x: x + wide] == 255).any()  # border, letters
    assert films.grid([film(1, 0, True)] * 3, columns=3).shape[2] == 3 * wide
    assert films.label("x" * 99, 80, films.GOOD).shape == (films.CAPTION, 80, 3)


# ---------------------------------------------------------------- as typed
def test_eval_until_says_what_it_did(shell, run):
    done = shell("eval", "run=run", "+env.max_steps=16", "until=0.2", "copies=5", "videos=0", "out=until")
    assert done.code == 0, done.err
    found = metrics(shell, "until")
    assert found["episodes"] == 10 and found["until"]["reached"] and "over 10 distinct seeds, enough for ± 20.0%" in " ".join(done.out.split())
    done = shell("eval", "run=run", "+env.max_steps=16", "until=0.01", "episodes=6", "copies=5", "videos=0", "out=until")
    assert metrics(shell, "until")["episodes"] == 6 and "not yet ± 1.0%" in " ".join(done.out.split())


def test_what_was_sent_can_be_played_again(shell, run):
    """actions.npz holds what moved the worlds: the same rewards come of it in a fresh environment."""
    from envs.batch import BatchEnv
    from envs.gantry import Gantry
    assert shell("eval", "run=run", "out=sent", *SHORT).code == 0
    acted = load_actions(shell.folder / "sent" / "actions.npz")
    assert list(acted) == metrics(shell, "sent")["seeds"] and all(a.shape == (16, 4) for a in acted.values())
    envs = BatchEnv(Gantry(max_steps=16), 3, threads=1)
    envs.reset(seed=list(acted))
    distance = envs.step_chunk(np.stack(list(acted.values())))[-1]["distance"]
    assert distance[:, -1].mean() == pytest.approx(metrics(shell, "sent")["measures"]["distance"]["last"])
    envs.close()


def test_a_delay_curve(shell, run):
    done = shell("eval", "delay", "run=run", "delays=[0,3]", "naive=true", "out=late", "control.execute=4", *SHORT)
    assert done.code == 0, done.err
    found = json.loads((shell.folder / "late" / "delay.json").read_text())
    assert {label: [p["delay"] for p in rows] for label, rows in found["curves"].items()} == {"aligned": [0, 3], "not aligned": [0, 3]}
    assert [r["name"] for r in found["runs"]] == ["delay 0", "delay 3", "delay 3, not aligned"] and len(found["differences"]) == 2
    assert (shell.folder / "late" / "delay.png").stat().st_size > 5000
    Page((shell.folder / "late" / "report.html").read_text())
    acted = [load_actions(shell.folder / "late" / d / "actions.npz")[100000] for d in ("delay_0", "delay_3", "delay_3-not_aligned")]
    assert np.array_equal(acted[0][:4], acted[1][:4]) and np.array_equal(acted[1][:7], acted[2][:7])  # the first plan is in time, and acts for 4 + 3 steps
    assert not np.allclose(acted[0][4:7], acted[1][4:7]) and not np.allclose(acted[1][7:], acted[2][7:])
    assert metrics(shell, "late/delay_3")["control"].items() >= {"execute": 4, "delay": 3, "align": True, "merge": "naive"}.items()
    refused(shell("eval", "delay", "run=run", "delays=[0,9]"), "needs plans of 17", "control.execute=7")
    refused(shell("eval", "delay", "run=run", "delays=[3]"), "two whole numbers")


@pytest.mark.slow
def test_compare_uses_what_is_held_and_runs_what_is_missing(shell, run):
    assert shell("eval", "run=run", *SHORT).code == 0
    assert shell("eval", "run=run", "sampler=heun", *SHORT).code == 0
    evals = {p.name: p for p in (shell.folder / "run" / "eval").glob("*max_steps=16*") if "heun" in p.name or "sampler" not in p.name}
    plain = min(evals, key=len)
    heun, = (name for name in evals if name.endswith("sampler=heun"))
    before = {name: (path / "metrics.json").stat().st_mtime_ns for name, path in evals.items()}

    done = shell("eval", "compare", f"run/eval/{plain}", f"run/eval/{heun}", "out=two", "videos=0")
    assert done.code == 0, done.err
    found = json.loads((shell.folder / "two" / "compare.json").read_text())
    assert found["seeds"] == [100000, 100001, 100002] and found["differences"][0]["success"]["n"] == 3 and "they won equally often" in done.out
    Page((shell.folder / "two" / "report.html").read_text())

    done = shell("eval", "compare", "run", f"run/eval/{heun}", "+env.max_steps=16", "out=again", "videos=0")  # the run holds the evaluation that fits
    assert done.code == 0, done.err
    assert json.loads((shell.folder / "again" / "compare.json").read_text())["runs"][0]["folder"] == f"run/eval/{plain}"
    assert {name: (path / "metrics.json").stat().st_mtime_ns for name, path in evals.items()} == before  # nothing was evaluated again

    done = shell("eval", "compare", "run", f"run/eval/{heun}", "+env.max_steps=16", "control.execute=4", "out=made", "videos=0")
    assert done.code == 0, done.err
    made = json.loads((shell.folder / "made" / "compare.json").read_text())
    assert made["seeds"] == found["seeds"] and made["runs"][0]["metrics"]["control"]["execute"] == 4  # made now, on the seeds the other holds
    assert made["command"] == f"dipole eval compare run run/eval/{heun} +env.max_steps=16 control.execute=4 out=made videos=0"

    evaluated = sorted((shell.folder / "run" / "eval").iterdir())
    refused(shell("eval", "compare", "run", f"run/eval/{heun}", "+env.max_steps=12", "out=bad"), "different environments", "max_steps=12", "max_steps=16")
    refused(shell("eval", "compare", "run", f"run/eval/{heun}", "env=maze", "out=bad"), "different environments", "env=…")
    assert sorted((shell.folder / "run" / "eval").iterdir()) == evaluated  # before anything was evaluated
    refused(shell("eval", "compare", f"run/eval/{plain}", f"run/eval/{heun}", "seed=5"), "holds 100000–100002", "Name run folders")
    refused(shell("eval", "compare", "run"), "compare what with what")
    refused(shell("eval", "compare", "run", "demos.zarr"), "demos.zarr is neither a run")
    refused(shell("eval", "fly", "run=run"), "dipole eval fly is unknown", "dipole eval compare")


FALLIBLE = """
import numpy as np
from envs.gantry import Gantry


class Fallible(Gantry):
    def observe(self, state):
        bad = self.reset(100001)
        moved = np.abs(state.qpos[..., :3] - bad.qpos[:3]).max(-1) > 0.01
        if (moved & (state.mocap_pos[..., 0, :] == bad.mocap_pos[0]).all(-1)).any():
            raise RuntimeError("the camera fell off")
        return super().observe(state)
"""


@pytest.mark.slow
def test_a_fault_names_its_seed_and_the_command_that_replays_it(shell, run):
    (shell.folder / "fallible.py").write_text(FALLIBLE)
    done = shell("eval", "run=run", "env._target_=fallible.Fallible", "trust=[fallible]", "out=fault", *SHORT)
    assert done.code == 0, done.err
    found = metrics(shell, "fault")
    (fault,) = found["faults"]
    assert found["ended"]["fault"] == 1 and fault["seed"] == 100001 and "the camera fell off" in fault["error"]
    said = " ".join(done.out.split())
    assert f"seed 100001 broke off after {fault['step']} steps: RuntimeError: the camera fell off" in said and "3 distinct seeds, 1 of them broke off" in said
    assert fault["replay"] in said
    page = Page((shell.folder / "fault" / "report.html").read_text())
    assert "1 episode broke off and count as a failure" in page.text and fault["replay"] in page.text and "Traceback" in page.text
    words = shlex.split(fault["replay"])
    assert words[:2] == ["dipole", "eval"] and "+env.max_steps=16" in words
    assert shell(*words[1:], "out=replay").code == 0
    again = metrics(shell, "replay")
    assert again["seeds"] == [100001] and again["faults"][0]["step"] == fault["step"] and again["score"] is None


@pytest.mark.slow
@pytest.mark.gl
def test_chosen_seeds_are_filmed_and_differences_side_by_side(shell, run):
    """A checkpoint that was hardly trained wins nowhere: the films of a comparison need an evaluation that says otherwise."""
    done = shell("eval", "run=run", "out=films", "+env.max_steps=3", "episodes=3", "video_seeds=[100002,100000]")
    assert done.code == 0, done.err
    if "no videos" in done.out:
        pytest.skip(done.out)
    found = metrics(shell, "films")
    assert [v["seed"] for v in found["videos"]] == [100002, 100000] and (shell.folder / "films" / found["video_grid"]).stat().st_size > 1000
    refused(shell("eval", "run=run", "out=films", "episodes=3", "video_seeds=[7]"), "video_seeds=[7]", "100000 to 100002")
    assert shell("eval", "run=run", "out=other", "+env.max_steps=3", "episodes=3", "videos=0", "sampler=heun").code == 0
    path = shell.folder / "other" / "metrics.json"
    other = json.loads(path.read_text())
    other["per_episode"][1]["success"] = True
    path.write_text(json.dumps(other))
    assert shell("eval", "compare", "films", "other", "out=both").code == 0
    video, = json.loads((shell.folder / "both" / "compare.json").read_text())["videos"]
    assert (video["seed"], video["caption"]) == (100001, "other wins") and (shell.folder / "both" / video["file"]).stat().st_size > 1000

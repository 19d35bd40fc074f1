"""Which merge to use at a delay: the gate, by hand and by the verb; what a run keeps of it."""
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from policy.episodes import smoothness
from policy.train import checkpoint
from scripts import bench_seams
from scripts.common import load_actions
from scripts.delay import adopt, gate
from tests.shell import SHORT, TINY, metrics, refused


def evaluation(won: int, of: int, peak: float | None) -> dict:
    success = [i < won for i in range(of)]
    return {"success": won / of, "per_seed": {"success": success}, "metrics": {"smoothness": {"accel_peak_normalised": peak}}}


def test_the_gate_takes_the_calmest_of_those_that_keep_success():
    base = evaluation(200, 200, 5.0)
    late = {"naive": evaluation(198, 200, 10.0), "ensemble": evaluation(180, 200, 1.0), "guided": evaluation(197, 200, 4.0),
            "frozen": evaluation(200, 200, 8.0)}
    found = gate(late, base, 3, 20)
    assert found["merge"] == "guided" and found["passed"] == ["naive", "guided", "frozen"]  # ensemble is calmer and loses a tenth
    assert found["kept"]["ensemble"][0] == pytest.approx(0.9) and found["kept"]["guided"][1] < 0.98 < found["kept"]["guided"][0]
    assert "gate at 3 steps (150 ms): guided keeps 98%" in found["line"] and "200 seeds do not prove" in found["line"] and "40% of naive's" in found["line"]
    sure = gate({"naive": evaluation(1000, 1000, 10.0), "frozen": evaluation(1000, 1000, 8.0)}, evaluation(1000, 1000, 5.0), 3, 0)
    assert sure["merge"] == "frozen" and "prove" not in sure["line"] and "(ms)" not in sure["line"]


def test_where_no_merge_keeps_success_it_stays_naive():
    late = {"naive": evaluation(50, 100, 10.0), "guided": evaluation(60, 100, 4.0)}
    found = gate(late, evaluation(100, 100, 5.0), 6, 50)
    assert found["merge"] == "naive" and not found["passed"] and "no merge keeps 98%" in found["line"] and "plan faster" in found["line"]
    none = gate({"naive": evaluation(0, 9, 10.0), "guided": evaluation(0, 9, 4.0)}, evaluation(0, 9, 5.0), 6, 50)
    assert none["merge"] == "naive" and "no success without delay" in none["line"]
    lost = gate({"naive": evaluation(9, 9, 3.0), "guided": evaluation(9, 9, None)}, evaluation(9, 9, 5.0), 6, 50)
    assert lost["merge"] == "naive" and lost["passed"] == ["naive"]


def test_merges_are_compared_on_the_same_seeds_and_the_best_is_kept(shell, run):
    told = ["eval", "delay", "run=run", "delays=[0,3]", "merges=[guided,frozen@0.6,prefix]", "dims=[0,1,2]", "out=merged", "control.execute=4", "adopt=true"]
    done = shell(*told, *SHORT)
    assert done.code == 0, done.err
    found = json.loads((shell.folder / "merged" / "delay.json").read_text())
    assert {label: [p["delay"] for p in rows] for label, rows in found["curves"].items()} == {key: [0, 3] for key in ("naive", "guided", "frozen@0.6")}
    assert "prefix is left out: it needs a run trained with train.rtc=3" in done.out and found["gate"]["line"] in " ".join(done.out.split())
    assert [r["name"] for r in found["runs"]] == [
        "delay 0, naive", "delay 0, guided", "delay 0, frozen@0.6", "delay 3, naive", "delay 3, guided", "delay 3, frozen@0.6"]
    at = {name: shell.folder / "merged" / name.replace(", ", "-").replace(" ", "_") for name in ("delay 3, guided", "delay 3, naive")}
    assert json.loads((at["delay 3, guided"] / "metrics.json").read_text())["control"].items() >= {"merge": "guided", "delay": 3}.items()
    acted = [a[:, :3] for a in load_actions(at["delay 3, naive"] / "actions.npz").values()]
    want = smoothness(acted, 4, 3, np.array(metrics(shell, "merged/delay_3-naive")["smoothness"]["range"])[:3], 10)
    assert found["curves"]["naive"][1]["accel_peak"] == pytest.approx(want["accel_peak"]) and (shell.folder / "merged" / "delay.png").stat().st_size > 5000
    warm = json.loads((shell.folder / "merged" / "delay_3-frozen@0.6" / "metrics.json").read_text())["control"]
    assert (warm["merge"], warm["warm"]) == ("frozen", 0.6)
    kept = found["gate"]["merge"].partition("@")[0]
    assert OmegaConf.load(shell.folder / "run" / "config.yaml").control.merge == kept
    again = shell("eval", "run=run", "control.delay=1", "control.execute=4", "out=again", *SHORT)
    assert again.code == 0 and metrics(shell, "again")["control"]["merge"] == kept  # also where another setting of control is named
    refused(shell("eval", "delay", "run=run", "delays=[0,3]", "merges=[mean]", "control.execute=4"), "'mean' is unknown; use some of naive, ensemble")
    refused(shell("eval", "delay", "run=run", "delays=[0,3]", "merges=[naive]", "gate=2", "control.execute=4"), "gate=2 must be one of delays=[0, 3]")
    refused(shell("eval", "run=run", "control.merge=prefix", "control.delay=2", *SHORT), "train.rtc=2")


def test_training_time_chunking_from_the_command_line(shell, run):
    for said, rtc in (("true", 8), ("3", 3)):
        trained = shell("train", "recipe=gantry", "data.path=demos.zarr", f"run=told{said}", "train.steps=4", f"train.rtc={said}", *TINY)
        assert trained.code == 0, trained.err
        assert checkpoint.load(shell.folder / f"told{said}")[0].rtc == rtc
    done = shell("eval", "run=told3", "control.merge=prefix", "control.delay=3", "out=prefix", *SHORT)
    assert done.code == 0 and metrics(shell, "prefix")["control"]["merge"] == "prefix", done.err
    again = shell("train", "run=told3", "resume=true", "train.steps=6")
    assert again.code == 0 and checkpoint.load(shell.folder / "told3")[0].rtc == 3, again.err
    refused(shell("train", "recipe=gantry", "data.path=demos.zarr", "run=x", "train.rtc=16", *TINY), "train.rtc=16 must be true (half the horizon)")
    refused(shell("train", "recipe=gantry", "data.path=demos.zarr", "run=x", "train.rtc=true", "formalism=consistency", *TINY), "objective=denoising")


def test_a_winner_with_a_warm_start_is_kept_whole(tmp_path):
    (tmp_path / "config.yaml").write_text("control: {execute: 4, merge: naive}\n")
    (tmp_path / "overrides.json").write_text('["env=gantry", "control.merge=identity"]')
    for merge, want in (("guided@0.8", {"execute": 4, "merge": "guided", "warm": 0.8}), ("frozen", {"execute": 4, "merge": "frozen", "warm": None})):
        adopt(tmp_path, merge)
        assert OmegaConf.load(tmp_path / "config.yaml").control == want
        said = json.loads((tmp_path / "overrides.json").read_text())
        assert said == ["env=gantry", f"control.merge={want['merge']}", f"control.warm={'null' if want['warm'] is None else 0.8}"]


def test_the_table_of_seams_reads_what_the_evaluations_left():
    def point(delay: int, success: float, peak: float) -> dict:
        return {"delay": delay, "success": success, "accel_peak": peak, "seam": 0.02}
    curves = {"naive": [point(0, 0.8, 10), point(3, 0.9, 20)], "guided": [point(0, 1, 8), point(3, 0.95, 9)]}
    runs = [{"name": name, "per_seed": {"success": [i < won for i in range(100)]}}
            for name, won in (("delay 0, naive", 80), ("delay 0, guided", 100), ("delay 3, naive", 90), ("delay 3, guided", 95))]
    found = {"panda": {"recipe": "", "seeds": {1: {"curves": curves, "runs": runs, "fps": 20, "gate": {
        "merge": "guided", "delay": 3, "line": "gate", "kept": {"guided": [0.95, 0.9, 1]}, "accel_peak_normalised": {"naive": 4.0, "guided": 2.0}}}}}}
    text = bench_seams.markdown(found)
    assert "| panda | 1 | guided | 100% · 8 (80%) · 2.0 | 95% · 9 (45%) · 2.0 |" in text and "3 steps (150 ms)" in text and "- panda, seed 1: gate" in text
    assert "| panda | 1 | guided | 95.0% [90.5%, 99.7%] | 118.8% [108.7%, 129.7%] | 45% |" in text
    assert bench_seams.headline(found) == "panda seed 1: guided keeps 95% of the success at 50% of naive's peak acceleration"


@pytest.mark.parametrize(("n", "before", "after", "shared"), [(400, 0.97, 0.95, 0.0), (400, 0.99, 0.98, 0.5), (60, 0.5, 0.6, 0.5)])
def test_the_interval_of_a_ratio_of_successes_holds_it_as_often_as_it_says(n, before, after, shared):
    rng, held, draws = np.random.default_rng(0), 0, 600
    for _ in range(draws):
        luck = rng.random(n)
        other = np.where(rng.random(n) < shared, luck, rng.random(n))
        found, (lo, hi) = bench_seams.ratio((luck < before).tolist(), (other < after).tolist())
        assert lo <= found <= hi
        held += lo <= after / before <= hi
    assert 0.93 < held / draws < 0.98

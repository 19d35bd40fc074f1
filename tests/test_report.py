"""The report: well-formed, self-contained, escaped, and there even when half of the run is missing."""
import json
import math
import re
from html.parser import HTMLParser

import pytest

from policy.page import with_cost
from policy.report import write_report
from policy.svg import Frame, curve, number, ticks

VOID = {"meta", "br", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that every tag closes in order, and keeps texts, attributes and tag names."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text += data


@pytest.fixture
def run(tmp_path):
    """A run folder with everything in it: 2 evaluations, 3 episodes of which one failed, 2 videos of which one is gone."""
    folder = tmp_path / "pusht"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "seed 7.mp4").write_bytes(b"")
    (folder / "config.yaml").write_text("sampler: {steps: 10}\n")
    (folder / "versions.json").write_text('{"torch": "2.13.0"}')
    steps = [{"step": s, "cpu_s": 6.0 * s, "wall_s": 3.0 * s, "loss": 1 / s, "lr": 1e-3, "samples_per_s": 2000, "data_wait": 0.02}
             for s in range(1, 301)]
    grade = {"score": 0.5, "score_ci": [0.4, 0.6], "success": 0.3, "success_ci": [0.1, 0.5]}
    log = [*steps[:100], {"step": 100, "val_loss": 0.02, "eval": grade},
           *steps[100:], {"step": 300, "val_loss": 0.01, "eval": {**grade, "score": 0.9, "score_ci": [0.8, 1.0]}}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
    metrics = {"task": "pusht", "episodes": 3, "seeds": [7, 8, 9], "success": 2 / 3, "success_ci": [0.21, 0.94], "score": 0.934,
               "score_ci": [0.91, 0.95], "return": 52.5, "plan_ms": {"p50": 29.7, "p99": 41.2}, "env_steps_per_s": 21400.0, "wall_s": 150,
               "command": "dipole eval run=outputs/pusht",
               "videos": [{"file": "videos/seed 7.mp4", "seed": 7, "success": True, "score": 1.0},
                          {"file": "videos/gone.mp4", "seed": 8, "success": False, "score": 0.4}],
               "per_episode": [{"seed": 7, "success": True, "score": 1.0, "return": 60, "steps": 90},
                               {"seed": 8, "success": False, "score": 0.4, "return": 30, "steps": 300},
                               {"seed": 9, "success": True, "score": 0.97, "return": 55, "steps": 120}]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def page(folder) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_a_full_run_shows_its_numbers_with_their_intervals(run):
    html, parsed = page(run)
    assert (run / "report.html").read_text(encoding="utf-8") == html
    for text in ("66.7 %", "21 – 94 %", "0.934", "0.91 – 0.95", "29.7 ms", "41.2 ms", "21.4k", "2.5 min", "seeds 7–9", "2 succeeded",
                 "1 failed", "dipole eval run=outputs/pusht", "sampler: {steps: 10}", "2.13.0", "waiting for data 2 %", "seeds 8 (0.4)"):
        assert text in parsed.text, text
    assert "held out" in parsed.text and parsed.tags.count("polyline") == 6
    assert parsed.tags.count("svg") == 5  # score, loss, throughput, learning rate, episodes


def test_it_is_self_contained(run):
    html, parsed = page(run)
    assert not re.search(r"https?:|//[a-z]", html, re.IGNORECASE)
    assert not {"link", "img", "iframe"} & set(parsed.tags) and "@import" not in html and "url(" not in html
    assert parsed.sources == ["videos/seed%207.mp4"]


def test_videos_wear_their_verdict_in_colour_and_words(run):
    html, _ = page(run)
    green, red = re.findall(r'<figure class="(\w+)">(.*?)</figure>', html, re.DOTALL)
    assert green[0] == "good" and "✓ success" in green[1] and "<video controls loop muted" in green[1]
    assert red[0] == "bad" and "✗ failure" in red[1] and "videos/gone.mp4 is gone" in red[1]


def test_every_episode_is_one_tile_that_names_its_seed(run):
    html, _ = page(run)
    tiles = re.findall(r'<rect class="unit (\w+)"[^>]*><title>(.*?)</title>', html)
    assert sorted(tiles) == [("bad", "seed 8: failure, score 0.4, 300 steps"), ("good", "seed 7: success, score 1, 90 steps"),
                             ("good", "seed 9: success, score 0.97, 120 steps")]


def test_score_is_drawn_against_the_cpu_minutes_spent_before_it(run):
    html, _ = page(run)
    assert "score 0.5 (0.4 – 0.6) at 10 CPU-minutes" in html and "score 0.9 (0.8 – 1) at 30 CPU-minutes" in html


def test_an_evaluation_row_may_carry_its_own_cost():
    log = [{"step": 1, "cpu_s": 5.0}, {"step": 1, "eval": {}}, {"step": 2, "cpu_s": 9.0, "eval": {}}]
    assert [row["cpu_s"] for row in with_cost(log)] == [5.0, 9.0]


@pytest.mark.parametrize("absent", ["config.yaml", "versions.json", "train.jsonl", "metrics.json", "videos/seed 7.mp4"])
def test_any_piece_may_be_missing(run, absent):
    (run / absent).unlink()
    _, parsed = page(run)
    assert "pusht" in parsed.text


def test_an_empty_folder_says_what_to_run(tmp_path):
    _, parsed = page(tmp_path)
    assert "nothing was measured here yet" in parsed.text and "dipole eval" in parsed.text


def test_without_metrics_the_last_evaluation_of_training_is_shown(run):
    (run / "metrics.json").unlink()
    _, parsed = page(run)
    assert "0.8 – 1" in parsed.text and "last evaluation during training" in parsed.text


def test_videos_that_nobody_listed_are_shown_without_a_verdict(run):
    (run / "metrics.json").unlink()
    html, parsed = page(run)
    assert '<figure class="none">' in html and parsed.sources == ["videos/seed%207.mp4"]


def test_everything_from_the_run_is_escaped(run):
    evil = '</pre><script>alert("x")</script>&<b>'
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"task": evil, "command": evil, "seeds": evil, "videos": [{"file": f"videos/{evil}.mp4", "seed": evil, "success": True}],
                "per_episode": [{"seed": evil, "success": True, "score": 1.0, "steps": evil}], evil: evil}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.yaml").write_text(evil)
    (run / "versions.json").write_text(json.dumps({evil: evil}))
    (run / "train.jsonl").write_text(json.dumps({"step": 1, "loss": math.nan, evil: evil}) + "\n")
    html, parsed = page(run)
    assert "script" not in parsed.tags and "<script" not in html
    assert parsed.text.count(evil) >= 8


def test_a_foreign_address_in_videos_is_never_fetched(run):
    (run / "metrics.json").write_text(json.dumps({"videos": [{"file": "https://example.com/x.mp4"}, {"file": "javascript:alert(1)"}]}))
    assert page(run)[1].sources == []


def test_a_loss_that_is_not_finite_is_announced_with_its_step(run):
    with open(run / "train.jsonl", "a") as file:
        file.write('{"step": 301, "loss": NaN, "lr": 0.001}\n{"step": 302, "loss": Infinity}\n')
    _, parsed = page(run)
    assert "not finite from step 301 on" in parsed.text


def test_a_killed_run_left_half_a_line(run):
    with open(run / "train.jsonl", "a") as file:
        file.write('{"step": 301, "lo')
    assert "300 steps" in page(run)[1].text


def test_a_broken_metrics_file_is_named(run):
    (run / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON"):
        write_report(run)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder"):
        write_report(tmp_path / "absent")


@pytest.mark.parametrize("row", [{"step": 0, "loss": 0.5, "lr": 0}, {"step": 5, "loss": -3.0}, {"step": 1, "loss": 0.0, "lr": 1e9}])
def test_one_row_zeros_and_negatives_can_be_drawn(tmp_path, row):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    html, _ = page(tmp_path)
    assert "<polyline" in html and "nan" not in html and "inf," not in html


def test_scores_outside_0_1_are_words_not_a_bar(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"score": -12.0, "score_ci": [-14.0, -9.0], "per_episode": [
        {"seed": 0, "return": -14.0}, {"seed": 1, "return": -9.0}]}))
    html, parsed = page(tmp_path)
    assert "-14 – -9" in parsed.text and 'class="range"' not in html


def test_missing_values_are_dashes_or_left_out(tmp_path):
    (tmp_path / "metrics.json").write_text('{"success": null, "score": NaN, "plan_ms": {"p50": 3.0, "p99": null}, "per_episode": []}')
    _, parsed = page(tmp_path)
    assert "Success" not in parsed.text and "p99 – ms" in parsed.text


@pytest.mark.parametrize("x, text", [(0.93412, "0.934"), (0, "0"), (999.9, "1k"), (1234, "1.23k"), (21400.0, "21.4k"), (999_950, "1M"),
                                     (2.5e6, "2.5M"), (-3500, "-3.5k"), (None, "–"), (math.nan, "–"), ("text", "–")])
def test_numbers_are_short(x, text):
    assert number(x) == text


@pytest.mark.parametrize("lo, hi", [(0, 1), (0, 20), (-3, 7), (1e-6, 3e-6), (0, 29_950), (100, 101), (-1e-9, 1e9)])
def test_ticks_are_round_inside_and_few(lo, hi):
    values = ticks(lo, hi)
    assert 2 <= len(values) <= 7 and values == sorted(values)
    assert all(lo - 1e-9 * abs(hi) <= v <= hi + 1e-9 * abs(hi) for v in values)


def test_a_long_run_becomes_few_points_with_the_same_mean_range_and_ends():
    points = [(i, float(i % 10)) for i in range(12_000)]
    s = curve(points)
    assert len(s.x) == 120 and s.x[-1] == 11_999
    assert s.y == [4.5] * 120 and s.lo == [0.0] * 120 and s.hi == [9.0] * 120


def test_a_short_run_keeps_every_point():
    s = curve([(1, 2.0), (5, 1.0), (9, 4.0)])
    assert (s.x, s.y) == ([1, 5, 9], [2.0, 1.0, 4.0])


@pytest.mark.parametrize("low, high", [(0.31, 0.62), (0.9, 1.1), (0.02, 0.09), (1e-4, 3.0)])
def test_a_logarithmic_axis_has_labels_enough_to_read_its_ends(low, high):
    """Also where less than a decade is shown, as the loss of a short training."""
    frame = Frame(0, 1, math.log10(low), math.log10(high), log=True)
    labels = [float(v.replace("k", "e3")) for v in re.findall(r'text-anchor="end">([^<]+)<', frame.y_axis())]
    assert len(labels) >= 3 and all(low * (1 - 1e-6) <= v <= high * (1 + 1e-6) for v in labels), labels

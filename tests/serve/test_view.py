"""What people see of a bridge: the live picture, the journal on disk, the timeline, the page."""
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from policy.serve.bridge import Bridge
from policy.serve.client import Chunk
from policy.serve.journal import Journal
from policy.serve.supervisor import Mode
from policy.serve.view import bar, facts, picture
from scripts import deploy_page
from tests.serve.fakes import ROBOT
from tests.serve.test_bridge import Rig


def shown(bridge: Bridge) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(picture(json.loads(json.dumps(facts(bridge))), [1e-4]))
    return console.export_text()


def test_the_live_picture_tells_mode_reason_joints_delays_and_counts():
    rig = Rig()
    before = shown(rig.bridge)
    assert "HOLD" in before and "waiting for the first plan" in before and "no plan" in before
    rig.run(2.0)
    now = shown(rig.bridge)
    assert "RUN" in now and "delay 60 ms" in now and "chunks" in now and all(j in now for j in ROBOT.joints) and "rad" in now
    rig.driver.broken = "cable out"
    rig.run(0.5)
    assert "STOP" in shown(rig.bridge) and "cable out" in shown(rig.bridge)


@pytest.mark.parametrize("value, at", [(-1.0, 0), (0.0, 12), (0.999, 23), (5.0, 23), (-9.0, 0), (np.nan, 0)])
def test_a_bar_stays_inside_its_limits(value, at):
    assert str(bar(value, -1.0, 1.0)).index("█") == at


def test_the_journal_is_lines_of_json_and_its_numbers_are_those_of_the_run(tmp_path):
    rig = Rig()
    rig.bridge.journal = journal = Journal(tmp_path / "a" / "bridge.jsonl", keep=1.0)
    journal.start(ROBOT, {"scheduler": "normal"})
    rig.run(3.0)
    numbers = journal.finish(dict(rig.bridge.counts), rig.bridge.limiter)
    journal.close()
    rows = [json.loads(line) for line in (tmp_path / "a" / "bridge.jsonl").read_text().splitlines()]
    assert [r["event"] for r in rows if r["event"] != "second"][:3] == ["start", "chunk", "mode"]
    assert sum(r["event"] == "chunk" for r in rows) == rig.bridge.counts["chunks"]
    assert numbers["ticks"] == 3 * ROBOT.rate and numbers["late_ms"]["max"] == 0 and numbers["modes"] == {"RUN": 1.0}  # of the second that is kept
    a = journal.arrays()
    assert len(a["t"]) == ROBOT.rate and np.allclose(np.diff(a["t"]), 1 / ROBOT.rate) and np.array_equal(a["q"][-1], rig.bridge.limiter.q)
    assert abs(numbers["delay_steps"]["p50"] - (0.04 + 0.02) / 0.05) < 1e-6
    journal.robot, obtained = ROBOT, {**numbers, "obtained": {"scheduler": "normal"}}
    deploy_page.timeline(tmp_path / "timeline.png", journal, ROBOT)
    assert (tmp_path / "timeline.png").stat().st_size > 20_000
    assert "control lateness" in deploy_page.cards(obtained) and "waiting" not in deploy_page.events(journal)


def test_the_journal_keeps_what_it_took_at_the_start():
    """An hour at 50 Hz, plans and refusals all the while: no more memory than after the first minutes."""
    rig, journal = Rig(), Journal(keep=60.0)
    journal.start(ROBOT, {"scheduler": "normal"})
    size, chunk = journal._rows.nbytes, Chunk(0, 0, 0.0, 0.05, np.zeros((16, 2)), 1.0, 0.0, 1.0, "toy")
    for k in range(180_000):
        journal.tick(0.02 * k, 0.0, Mode.RUN, None, rig.bridge.limiter)
        if k % 25 == 0:
            journal.chunk(chunk, 0.02 * k, 0.0, rig.bridge.execution)
            journal.event(0.02 * k, "refused", {"why": "jump"})
    assert journal._rows.nbytes == size and len(journal.chunks) == len(journal.events) == 1000 and journal._lines.empty()
    assert journal.arrays()["t"][[0, -1]].tolist() == pytest.approx([3540.0, 3599.98]) and journal.finish({}, rig.bridge.limiter)["ticks"] == 180_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_disk_that_refuses_costs_lines_and_nothing_else():
    """/dev/full takes nothing."""
    rig = Rig()
    rig.bridge.journal = journal = Journal("/dev/full", keep=1.0)
    journal.start(ROBOT, {"scheduler": "normal"})
    rig.run(3.0)
    journal.close()
    assert rig.modes[-1] == "RUN" and "No space left" in next(e["why"] for e in journal.events if e["event"] == "unwritten")


@pytest.mark.parametrize("last", [False, True])
def test_a_long_run_is_filmed_for_half_a_minute(tmp_path, last):
    """20 episodes of 10 s, in each of which the robot moves for 4."""
    n, dt = 40_000, 0.005
    t = np.arange(n) * dt
    episode, moving = (t // 10).astype(int), t % 10 < 4
    np.savez(tmp_path / "robot.npz", commanded=np.cumsum(moving)[:, None] * 1e-3, episode=episode, qpos=t[:, None], number=np.arange(20),
             mocap=np.arange(20.0)[:, None, None], dt=dt)
    qpos, mocap, count = deploy_page.states(tmp_path / "robot.npz", last=last)
    assert len(qpos) == deploy_page.FILMED * deploy_page.FPS and count == 7
    assert (qpos[0, 0] < 0.1 and 60 < qpos[-1, 0] < 70) if not last else (190 < qpos[-1, 0] < 194.5 and 130 < qpos[0, 0] < 140)
    assert np.array_equal(mocap[:, 0, 0], qpos[:, 0] // 10)

"""The simulated robot: what it plays and refuses in virtual time, then as a process against packets of every kind."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest

from envs.gantry import Gantry
from envs.maze import Maze
from envs.panda import PandaPick
from envs.robot import FIELDS, LARGEST, Link, Log, parse
from envs.simulator import Simulator, State
from envs.twin import ANCHOR, Body, Twin, Unplayable

ROOT = Path(__file__).parents[2]


def ramp(twin: Twin, n: int, joint: int = 0, size: float = 0.02) -> np.ndarray:
    """(n + 1, dof) setpoints on from where it is told to be, smooth, at rest at both ends."""
    part = np.linspace(0, 1, n)
    q = np.repeat(twin.commanded[None], n, 0)
    q[:, joint] += size * (part**3 * (10 - 15 * part + 6 * part**2))
    return np.concatenate([q, q[-1:]])


def anchor(twin: Twin, step: int) -> np.ndarray:
    return twin._row(np.arange(step - ANCHOR, step))


@pytest.mark.parametrize("task, index", [(Gantry(), [0, 1, 2, 3]), (PandaPick(), [0, 1, 2, 3, 4, 5, 6])])
def test_actions_are_joints_where_targets_are_positions(task, index):
    rng = np.random.default_rng(0)
    qpos, qvel = rng.normal(size=(5, task.model.nq)), rng.normal(size=(5, task.model.nv))
    q, dq = Body(task).measured(qpos, qvel)
    np.testing.assert_allclose(q[:, index[:3]], qpos[:, index[:3]])
    last = (qpos[:, 3] + qpos[:, 4]) / 2 if isinstance(task, Gantry) else qpos[:, 7] + qpos[:, 8]  # each finger's way out; the gap
    np.testing.assert_allclose(q[:, -1], last)
    np.testing.assert_allclose(dq[:, -1], (qvel[:, 3] + qvel[:, 4]) / 2 if isinstance(task, Gantry) else qvel[:, 7] + qvel[:, 8])


def test_other_actions_are_refused():
    with pytest.raises(ValueError, match="cannot be played as a robot"):
        Twin(Maze())


def test_setpoints_are_played_one_per_physics_step_as_the_simulator_would():
    task = Gantry()
    twin = Twin(task)
    twin.reset(3)
    rows = ramp(twin, 60)
    twin.move(twin.step + 5, anchor(twin, twin.step + 5), rows, 0.0)
    played = np.stack([twin.advance(0.0) for _ in range(80)])
    np.testing.assert_array_equal(played, np.concatenate([rows[:1].repeat(5, 0), rows, rows[-1:].repeat(14, 0)]))
    simulator = Simulator(task.model, 1, substeps=1)
    simulator.write(np.zeros(1, int), State.stack([task.reset(3)]))
    expected = simulator.run(np.zeros(1, int), task.control(played)[None])
    np.testing.assert_array_equal(twin.state.qpos, expected.qpos[0, -1])
    assert twin.rest and twin.elapsed == pytest.approx(0.4)
    v = np.abs(np.diff(rows[:, 0])).max() / twin.dt
    assert twin.peak[0, 0] == pytest.approx(v) and twin.peak[0, 1] == 0
    assert twin.peak[2, 0] == pytest.approx(np.abs(np.diff(np.concatenate([rows[:1].repeat(3, 0), rows, rows[-1:].repeat(3, 0)])[:, 0], 3)).max() / twin.dt**3)


def test_a_newer_packet_takes_over_where_it_begins():
    twin = Twin(Gantry())
    first = ramp(twin, 40)
    twin.move(twin.step, anchor(twin, twin.step), first, 0.0)
    second = np.concatenate([first[10:20], first[19:20].repeat(2, 0)])  # stops after 20: not smooth, but continuous
    twin.move(twin.step + 10, anchor(twin, twin.step + 10), second, 0.0)
    played = np.stack([twin.advance(0.0) for _ in range(30)])
    np.testing.assert_array_equal(played, np.concatenate([first[:20], first[19:20].repeat(10, 0)]))


@pytest.mark.parametrize("reason, change", [
    ("shape", lambda t, s, a, q: (s, a, q[:, :2])),
    ("shape", lambda t, s, a, q: (s, a[:2], q)),
    ("shape", lambda t, s, a, q: (s, a, q[:0])),
    ("not_finite", lambda t, s, a, q: (s, a, np.where(np.arange(len(q))[:, None] == 4, np.nan, q))),
    ("not_finite", lambda t, s, a, q: (s, a * np.inf, q)),
    ("range", lambda t, s, a, q: (s, a, q + 1)),
    ("late", lambda t, s, a, q: (t.step - 1, a, q)),
    ("early", lambda t, s, a, q: (s + 1000, a, q)),
    ("gap", lambda t, s, a, q: (s, a + 1e-6, q)),
    ("no_rest", lambda t, s, a, q: (s, a, q[:-10])),
    ("no_rest", lambda t, s, a, q: (s, a, q[5:6])),
])
def test_what_it_does_not_play_leaves_it_as_it_was(reason, change):
    twin = Twin(Gantry())
    twin.move(twin.step, anchor(twin, twin.step), ramp(twin, 30), 0.0)
    for _ in range(10):
        twin.advance(0.0)
    step = twin.step + 4
    good = anchor(twin, step)[-1] + np.concatenate([np.linspace(0, 1e-3, 20), [1e-3]])[:, None] * np.array([1, 0, 0, 0])
    with pytest.raises(Unplayable, match=reason):
        twin.move(*change(twin, step, anchor(twin, step), good), 0.0)
    assert dict(twin.refused) == {reason: 1}
    played = np.stack([twin.advance(0.0) for _ in range(40)])
    assert (played[-1] == played[-2]).all() and np.abs(np.diff(played[:, 0], 2)).max() < 1e-3  # the old packet, to its end


def test_who_is_silent_may_not_go_on_until_connected_again():
    twin = Twin(Gantry(), watchdog=0.1)
    for k in range(100):  # nobody has told it to move yet: nothing to watch
        twin.advance(k * twin.dt)
    assert not twin.tripped
    now = 100 * twin.dt
    twin.move(twin.step, anchor(twin, twin.step), ramp(twin, 30), now)
    for k in range(19):
        twin.advance(now + (k + 1) * twin.dt)
    assert not twin.tripped and not twin.rest
    for k in range(19, 40):
        twin.advance(now + (k + 1) * twin.dt)
    assert twin.tripped and twin.rest
    with pytest.raises(Unplayable, match="watchdog"):
        twin.move(twin.step, anchor(twin, twin.step), ramp(twin, 30), now)
    twin.connect(now)
    twin.move(twin.step, anchor(twin, twin.step), ramp(twin, 30), now)


def test_after_a_stop_it_plays_its_tail_and_takes_no_more():
    twin = Twin(Gantry())
    rows = ramp(twin, 30)
    twin.move(twin.step, anchor(twin, twin.step), rows, 0.0)
    twin.stop()
    with pytest.raises(Unplayable, match="stopped"):
        twin.move(twin.step + 2, anchor(twin, twin.step + 2), rows, 0.0)
    for _ in range(33):
        twin.advance(0.0)
    assert twin.rest and (twin.commanded == rows[-1]).all()


def test_success_is_looked_at_once_per_control_step_latched_and_timed():
    task = Gantry()
    twin = Twin(task)
    expert = task.expert(1, 1)
    twin.reset(1)
    while twin.episode.success_at is None and twin.elapsed < 10:
        action = expert.act({key: value[None] for key, value in twin.observe().items()})[0]
        q = np.clip(action, task.action_space.low, task.action_space.high).astype(float)
        twin.move(twin.step, anchor(twin, twin.step), np.repeat(q[None], 2, 0), 0.0)  # a robot that takes jumps: this one has no limits of its own
        for _ in range(task.substeps):
            twin.advance(0.0)
    assert twin.episode.success_at == pytest.approx(round(twin.episode.success_at * task.fps) / task.fps)
    assert twin.episode.metrics["distance"] < 0.02
    at = twin.episode.success_at
    for _ in range(50):
        twin.advance(0.0)
    assert twin.episode.success_at == at
    twin.reset(2)
    assert twin.episode.success_at is None and twin.episode.seed == 2 and not twin.peak.any()


def test_an_unstable_simulation_is_a_fault_not_a_crash(monkeypatch):
    twin = Twin(Gantry())
    twin._simulator._worlds[0].qvel[0] = np.nan
    twin.advance(0.0)
    assert "unstable" in twin.fault
    twin.advance(0.0)
    with pytest.raises(Unplayable, match="fault"):
        twin.move(twin.step, anchor(twin, twin.step), ramp(twin, 5), 0.0)
    twin.reset(0)
    assert not twin.fault


def test_parse_takes_exactly_its_commands():
    good = {"v": 1, "op": "reset", "session": 1, "id": 1, "seed": 3}
    assert parse(msgpack.packb(good))["seed"] == 3
    for bad in ({**good, "v": 2}, {**good, "op": "save"}, {**good, "path": "/tmp/x"}, {**good, "seed": -1}, {**good, "seed": 1.0}, {**good, "seed": True},
                {key: value for key, value in good.items() if key != "id"}, [good], 7, None, "reset", {**good, "op": []}):  # fmt: skip
        with pytest.raises(ValueError):
            parse(msgpack.packb(bad))
    for raw in (b"", b"\xc1", os.urandom(200), msgpack.packb(good)[:-1], msgpack.packb(good) + b"\0", b"\x81" * 70_000, bytes(LARGEST + 1)):
        with pytest.raises(ValueError):
            parse(raw)


def test_no_packet_breaks_the_link_or_moves_the_robot():
    """20,000 random, mutated and forged packets."""
    twin, rng = Twin(Gantry()), random.Random(0)
    link = Link(twin, 0)
    start = twin.commanded.copy()
    body = {"connect": {}, "reset": {"id": 1, "seed": 1}, "move": {"episode": 0, "id": 1, "step": 3, "anchor": bytes(96), "q": bytes(64)}}
    for k in range(20_000):
        op = rng.choice(list(FIELDS))
        packet = bytearray(msgpack.packb({"v": 1, "op": op, **({"session": rng.randrange(1 << 40)} if op != "describe" else {}), **body.get(op, {})}))
        if k % 3 == 0:
            packet = bytearray(rng.randbytes(rng.randrange(300)))
        for _ in range(rng.randrange(1, 4) if k % 3 == 1 else 0):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        try:
            link._obey(parse(bytes(packet)), ("127.0.0.1", 9 + k % 5), 0.01 * k)
        except ValueError:
            link.counts["garbage"] += 1
    assert link.counts["garbage"] > 1000 and link.counts["stranger"] > 1000 and not link.quit
    assert np.isfinite(twin.commanded).all() and (twin.commanded == start).all() and twin.episode.seed == 0
    link.socket.close()


def test_the_watchdog_hears_its_client_whatever_is_said_and_nobody_else():
    for message, tripped in (({"op": "alive", "session": 1}, False), ({"op": "move", "session": 1, "episode": 0, "id": 2, "step": 0, "anchor": bytes(96),
                             "q": bytes(32)}, False), ({"op": "alive", "session": 2}, True)):  # fmt: skip
        twin = Twin(Gantry())
        link = Link(twin, 0)
        link._obey(parse(msgpack.packb({"v": 1, "op": "connect", "session": 1})), "here", 0.0)
        twin.move(twin.step, anchor(twin, twin.step), ramp(twin, 30), 0.0)
        link._obey(parse(msgpack.packb({"v": 1, **message})), "here", 0.09)
        twin.advance(0.15)
        assert twin.tripped == tripped
        link.socket.close()


def test_the_process_says_what_it_is_ignores_noise_stalls_and_writes_its_log(tmp_path):
    log = tmp_path / "log.npz"
    robot = subprocess.Popen([sys.executable, "-m", "envs.robot", "--task", "envs.gantry:Gantry", "--log", str(log), "--stall", ".2", ".1"], cwd=ROOT,
                             stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        facts = json.loads(robot.stdout.readline())
        assert facts["dof"] == 4 and facts["dt"] == 0.005 and facts["task"] == "Gantry"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("127.0.0.1", facts["port"]))
            client.settimeout(5)
            for noise in (b"", b"{}", os.urandom(1000), bytes(65_000)):
                client.send(noise)
            client.send(msgpack.packb({"v": 1, "op": "connect", "session": 5}))
            last = first = None
            while last is None or last["step"] < 120:
                last = msgpack.unpackb(client.recv(65536))
                first = first or last
            assert last["session"] == 5 and last["counts"]["garbage"] >= 3
            assert last["t"] - first["t"] == pytest.approx((last["step"] - first["step"]) * 0.005, abs=1e-6)  # deadlines are absolute
            assert last["late_max"] > 0.09  # the stall, after which it caught up
            assert abs(last["t"] - time.monotonic()) < 1
        robot.send_signal(signal.SIGTERM)
        out, _ = robot.communicate(timeout=20)
        assert json.loads(out.splitlines()[-1])["late_ms"]["max"] > 90
    finally:
        robot.kill()
        robot.wait()
    with np.load(log) as kept:
        assert kept["commanded"].shape == (len(kept["t"]), 4) and kept["qpos"].shape[1] == 12 and (np.diff(kept["step"]) == 1).all()
        np.testing.assert_allclose(np.diff(kept["t"]), 0.005, atol=1e-9)
        assert kept["seed"].tolist() == [0]


def test_the_recording_keeps_the_last_minutes_in_memory_of_one_size(tmp_path):
    """250 steps of three episodes, of which 100 are kept."""
    twin = Twin(Gantry())
    log = Log(twin, 100 * twin.dt / 60)
    size = log._rows.nbytes
    for k in range(250):
        if k in (20, 180):
            twin.reset(k)
        log.add(twin, k * twin.dt, 0.0, twin.advance(0.0))
        if k == 60:
            log.save(str(tmp_path / "early.npz"), twin)
    log.save(str(tmp_path / "late.npz"), twin)
    assert log._rows.nbytes == size == 100 * (5 + 4 + 12 + 11) * 8 and sorted(p.name for p in tmp_path.iterdir()) == ["early.npz", "late.npz"]
    with np.load(tmp_path / "early.npz") as early, np.load(tmp_path / "late.npz") as late:
        assert early["step"].tolist() == list(range(1, 62)) and early["seed"].tolist() == [0, 20]
        assert late["step"].tolist() == list(range(151, 251)) and late["seed"].tolist() == [20, 180] and len(late["mocap"]) == 2
        np.testing.assert_allclose(late["t"], np.arange(150, 250) * twin.dt)
        np.testing.assert_array_equal(late["qpos"][-1], twin.state.qpos)
        assert (late["episode"] == np.where(np.arange(150, 250) < 180, *late["number"])).all()


def test_it_ends_with_its_parent_and_refuses_what_is_no_task():
    robot = subprocess.Popen([sys.executable, "-m", "envs.robot", "--task", "envs.gantry:Gantry", "--with-parent"], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)  # fmt: skip
    robot.stdout.readline()
    robot.stdin.close()
    assert robot.wait(20) == 0
    robot.stdout.close()
    done = subprocess.run([sys.executable, "-m", "envs.robot", "--task", "envs.gantry:REACH"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "names no task" in done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="needs Linux")
def test_it_compresses_its_recording_as_an_ordinary_process(tmp_path):
    """With real-time priority, seconds of it kept a core from every other robot on the computer, and their watchdogs tripped."""
    code = ("import os, sys; from envs import robot; "
            "robot.Log.save = lambda self, path, twin: print('SCHEDULER', os.sched_getscheduler(0), flush=True); "
            "robot.main(['--task', 'envs.gantry:Gantry', '--priority', '5', '--keep', '0.1', '--log', sys.argv[1]])")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log.npz")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    said = json.loads(process.stdout.readline())["scheduling"]
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=20)[0]
    if said.startswith("normal"):
        pytest.skip(said)
    assert f"SCHEDULER {os.SCHED_OTHER}" in out

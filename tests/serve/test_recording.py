"""What a bridge records: the observations at policy steps, and where the joints really were told to be."""
import dataclasses

import numpy as np
import pytest

from policy.data import DataError, Recorder, Store
from policy.serve.recording import Recording
from policy.serve.supervisor import Mode
from tests.serve.fakes import DT, RATE
from tests.serve.test_bridge import Rig, wave


def ticked(rig: Rig, recording: Recording) -> None:
    recording.watch(rig.bridge, 0.0)


def drive(rig: Rig, recording: Recording, seconds: float, *, ending: bool = False) -> None:
    """As Bridge.run does it, on the rig's clock."""
    start = rig.clock.now
    for i in range(round(seconds * rig.bridge.robot.rate)):
        rig.clock.now = start + i / rig.bridge.robot.rate
        rig.bridge.tick(rig.clock.now, ending=ending)
        ticked(rig, recording)
    rig.clock.now = start + round(seconds * rig.bridge.robot.rate) / rig.bridge.robot.rate


def commanded(rig: Rig, t: np.ndarray) -> np.ndarray:
    """What the fake robot really played at times t [s]."""
    q = rig.q
    times = rig.driver.start + (1 + np.arange(len(q))) / RATE
    return np.stack([np.interp(t, times, joint) for joint in q.T], -1)


def test_frames_are_policy_steps_with_what_the_joints_were_told_a_step_later(tmp_path):
    rig = Rig(delay=0.04)
    with Recorder(tmp_path / "d.zarr", fps=1 / DT) as recorder:
        recording = Recording(recorder, rig.bridge)
        drive(rig, recording, 3.0)
        drive(rig, recording, 1.0, ending=True)
        assert rig.bridge.supervisor.mode is Mode.HOLD and not recording.trouble
    episode = Store.open(tmp_path / "d.zarr").episode(0)
    n = len(episode["action"])
    assert set(episode) == {"q", "action"} and 50 <= n <= 60
    first = next(t for t in np.arange(100, 101, 1 / RATE) if np.abs(commanded(rig, np.array([t + 1 / RATE])) - commanded(rig, np.array([t]))).max() > 0)
    times = np.array([np.abs(commanded(rig, np.arange(100, 104, 0.02)) - q).sum(1).argmin() for q in episode["q"]]) * 0.02 + 100
    start = times[5] - 5 * DT  # the robot stands at the first ones
    assert first - 0.06 <= start <= first + 0.06
    steps = start + DT * np.arange(n)
    np.testing.assert_allclose(episode["q"], commanded(rig, steps), atol=0.02)  # control periods are 0.02 s, policy steps 0.05 s
    np.testing.assert_allclose(episode["action"], commanded(rig, steps + DT), atol=0.02)
    moving = slice(20, n - 5)
    np.testing.assert_allclose(episode["action"][moving], wave(steps[moving] + DT - 100.0), atol=0.03)  # the plan that it follows
    assert np.abs(episode["action"][moving] - episode["q"][moving]).max() > 0.03  # and not where the robot is already


def test_an_episode_ends_where_the_robot_brakes_and_only_what_is_worth_keeping_is_kept(tmp_path):
    rig = Rig()
    with Recorder(tmp_path / "d.zarr", fps=1 / DT) as recorder:
        kept = iter([True, False])
        recording = Recording(recorder, rig.bridge, keep=lambda state: next(kept))
        for _ in range(2):
            rig.bridge.begin(rig.driver.state())
            drive(rig, recording, 1.0)
            drive(rig, recording, 0.6, ending=True)
    store = Store.open(tmp_path / "d.zarr")
    assert store.episodes == 1 and 15 <= store.steps <= 21


def test_a_disk_that_refuses_is_remembered_and_the_robot_goes_on():
    class Refuses:
        def add(self, frame):
            raise DataError("No space left")
    rig = Rig()
    recording = Recording(Refuses(), rig.bridge)
    drive(rig, recording, 1.0)
    assert rig.bridge.supervisor.mode is Mode.RUN and recording.trouble == "No space left"


@pytest.mark.parametrize("latency, shift", [(0.0, 1), (0.1, -1)])
def test_latencies_are_taken_out(latency, shift):
    """Action k is where the joints are told to be one step after what was observed, which was measured `latency` before it was read."""
    rig, rows = Rig(), []
    rig.bridge.robot = dataclasses.replace(rig.bridge.robot, latency_obs=latency)

    class Keeps:
        add = staticmethod(rows.append)
    drive(rig, Recording(Keeps(), rig.bridge), 2.0)
    q, action = np.stack([r["q"] for r in rows]), np.stack([r["action"] for r in rows])
    inner = np.arange(5, len(q) - 5)
    assert min(range(-4, 5), key=lambda k: np.abs(action[inner] - q[inner + k]).mean()) == shift

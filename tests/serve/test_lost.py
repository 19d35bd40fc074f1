"""A robot that refuses what it was told: the bridge brakes, goes on from where the robot stands, and only with a fresh plan."""
import dataclasses

import numpy as np
import pytest

from policy.serve.supervisor import Mode
from tests.serve.fakes import FakeDriver
from tests.serve.test_bridge import Rig


@pytest.mark.parametrize("periods", [1, 8])  # at rest when it is first seen, or braking for a while
def test_lost_setpoints_start_over_from_where_the_robot_stands(periods):
    rig = Rig().run(2.0)
    where, ticks, plain = rig.bridge.limiter.q.copy() - 0.05, [0], FakeDriver.state

    def state(self):
        ticks[0] += 1
        info = {"lost": ticks[0] <= periods + 1, "rest": ticks[0] >= periods, "why": "late", "commanded": where}
        return dataclasses.replace(plain(self), info=info)

    rig.driver.state = state.__get__(rig.driver)
    before = rig.bridge.epoch
    rig.run(0.02)
    assert rig.bridge.counts["lost"] == 1 and rig.modes[-1] is Mode.BRAKE and rig.bridge.execution.now is None and rig.bridge.epoch > before
    rig.run(0.02 * periods)
    assert np.allclose(rig.bridge.limiter.q, where)
    rig.run(1.0)
    assert rig.modes[-1] is Mode.RUN and rig.bridge.counts["lost"] == 1


def test_what_is_no_driver_error_stops_the_robot_all_the_same():
    rig = Rig().run(0.5)
    rig.bridge.observe = lambda state: 1 / 0
    with pytest.raises(ZeroDivisionError):
        rig.bridge.run(1.0, priority=None)
    assert rig.driver.stopped

"""Push-T seen as pictures: against the recorded ones, and what observing costs."""

import numpy as np
import pytest

from envs.batch import BatchEnv
from envs.pusht import GOAL, PushT


class Counting(PushT):
    """Counts the states it observes."""

    seen = 0

    def observe(self, state):
        self.seen += state.qpos[..., 0].size
        return super().observe(state)


@pytest.mark.parametrize("last", [1, 2, 8, 50])
def test_the_last_observations_are_those_of_a_whole_chunk(last):
    """Three episodes: one that succeeds inside the chunk, one that is truncated there, one that goes on."""
    task = Counting(success_coverage=0.9, max_steps=20)
    back = np.array([np.sin(GOAL[2]), -np.cos(GOAL[2])])
    near = np.array([*(GOAL[:2] + 52 * back), *(GOAL[:2] + 12 * back), GOAL[2]])
    starts = task.state(np.stack([near, [50.0, 50.0, 400.0, 150.0, 0.0], [60.0, 50.0, 300.0, 150.0, 0.0]]))
    whole, part = BatchEnv(task, 3, threads=1), BatchEnv(task, 3, threads=1)
    actions = np.tile(GOAL[:2] + 14 * back, (3, 16, 1))
    for env in (whole, part):
        env.reset(options={"state": starts})
        env.step_chunk(actions[:, :12], active=np.array([False, True, False]))
    expected, *_, info = whole.step_chunk(actions)
    task.seen = 0
    obs, *_, same = part.step_chunk(actions, last=last)
    ends = info["elapsed"][:, -1] - [0, 12, 0]
    assert 0 < ends[0] < 8 and ends[1] == 8 and ends[2] == 16
    assert task.seen == sum(min(end, max(1, end - (16 - min(last, 16)))) for end in ends)
    for key, value in obs.items():
        assert value.shape[1] == min(last, 16) and (value == expected[key][:, -last:]).all()
    assert all((same[key] == info[key]).all() for key in info if key != "error")
    assert all((a == b).all() for a, b in zip(whole.step_chunk(actions)[0].values(), part.step_chunk(actions)[0].values(), strict=True))


def test_no_observation_at_all_is_refused():
    env = BatchEnv(PushT(), 1, threads=1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="last=0 must be at least 1"):
        env.step_chunk(np.zeros((1, 2, 2)), last=0)


def test_the_last_good_observation_of_a_failing_world_may_lie_before_the_last():
    class Breaks(PushT):
        def observe(self, state):
            obs = super().observe(state)
            return {**obs, "agent_pos": np.where(obs["agent_pos"] > 300, np.nan, obs["agent_pos"])}

    start = PushT().state(np.array([[200.0, 50.0, 400.0, 400.0, 0.0], [200.0, 60.0, 400.0, 400.0, 0.0]]))
    actions = np.stack([np.linspace([200, 50], [500, 50], 16), np.linspace([200, 60], [100, 60], 16)])
    whole, part = BatchEnv(Breaks(), 2, threads=1), BatchEnv(Breaks(), 2, threads=1)
    for env in (whole, part):
        env.reset(options={"state": start})
    expected, *_, told = whole.step_chunk(actions)
    obs, *_, info = part.step_chunk(actions, last=2)
    assert "not finite" in info["error"][0] and info["error"][1] is None and told["error"][0] == info["error"][0]
    assert all((obs[key] == expected[key][:, -2:]).all() for key in obs) and obs["agent_pos"][0, -1, 0] > 250

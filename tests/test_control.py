"""The controller: history, queue and noise belong to each row alone."""
import functools

import numpy as np
import pytest
import torch
from torch import nn

from policy.control import Controller, NotFinite
from policy.diffusion.samplers import first_order
from policy.timeline import CONTINUES
from policy.types import Spec
from tests.helpers import make_data, make_planner, make_store

SPEC = Spec(obs={"x": (2,), "y": ()}, action_dim=1, t_obs=3, horizon=6)


class Counting(nn.Module):
    """Plan number n of the episode, step t, is 100 n + t: known without a network. What it was shown is kept."""

    def __init__(self, spec: Spec = SPEC):
        super().__init__()
        self.spec, self.anchor = spec, nn.Parameter(torch.zeros(1))
        self.seen: list[dict[str, torch.Tensor]] = []
        self.noise: list[torch.Tensor] = []

    def plan(self, obs, *, noise=None, prefix=None, draw=None):
        self.seen.append({k: v.clone() for k, v in obs.items()})
        self.noise.append(noise.clone())
        return (100 * len(self.seen) + torch.arange(6.0))[None, :, None].expand(len(noise), -1, self.spec.action_dim)


def frame(n: int, value: float) -> dict[str, np.ndarray]:
    return {"x": np.full((n, 2), value) + 100 * np.arange(n)[:, None], "y": np.full(n, value) + 100 * np.arange(n), "unused": np.zeros(n)}


def chunk(n: int, values: list[float]) -> dict[str, np.ndarray]:
    frames = [frame(n, v) for v in values]
    return {k: np.stack([f[k] for f in frames], 1) for k in frames[0]}


def test_the_first_observation_fills_the_history_and_later_ones_push():
    controller = Controller(Counting(), execute=1)
    controller.reset([0, 1])
    for value, want in ((5, [5, 5, 5]), (6, [5, 5, 6]), (7, [5, 6, 7]), (8, [6, 7, 8])):  # oldest first
        controller.act(frame(2, value))
        seen = controller.planner.seen[-1]
        assert seen["y"].tolist() == [want, [w + 100 for w in want]] and torch.equal(seen["x"][..., 0], seen["y"])
    controller.reset([0, 1])
    controller.act(frame(2, 40))
    assert controller.planner.seen[-1]["y"][0].tolist() == [40, 40, 40]  # nothing of the last episode


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_observing_a_chunk_is_observing_its_steps(steps):
    one, many = Controller(Counting(), execute=6), Controller(Counting(), execute=6)
    one.reset([0, 1]), many.reset([0, 1])
    for start in (10.0, 20.0):
        values = [start + k for k in range(steps)]
        many.observe(chunk(2, values))
        for v in values:
            one.observe(chunk(2, [v]))
        assert torch.equal(one.history["x"], many.history["x"]) and torch.equal(one.history["y"], many.history["y"])


@pytest.mark.parametrize("execute", [1, 2, 4, 6])
def test_the_first_actions_of_each_plan_are_executed(execute):
    controller = Controller(Counting(), execute=execute)
    controller.reset([0])
    done = [controller.act(frame(1, k))[0, 0].item() for k in range(3 * execute)]
    assert done == [100 * plan + t for plan in (1, 2, 3) for t in range(execute)]
    assert len(controller.planner.seen) == 3
    assert controller.planner.seen[1]["y"][0, -1] == execute  # planned from the newest observation
    assert controller.act(frame(1, 9)).shape == (1, 1)


def test_a_reset_row_plans_at_once_and_the_others_go_on():
    controller = Controller(Counting(), execute=4)
    controller.reset([0, 1, 2])
    first = [controller.act(frame(3, k))[:, 0].tolist() for k in range(2)]
    controller.reset([9], rows=np.array([1]))
    assert controller.planner.seen[-1]["y"].shape == (3, 3)
    after = [controller.act(frame(3, k))[:, 0].tolist() for k in range(2, 6)]
    assert first == [[100] * 3, [101] * 3]
    assert after == [[102, 200, 102], [103, 201, 103], [300, 202, 300], [301, 203, 301]]
    assert controller.planner.seen[1]["y"].tolist() == [[102, 102, 102]]  # its history starts anew, at step 2 of row 1


class Clock(Counting):
    """Plans the time of the step an action is meant for: what it is shown counts the steps, and step t of a plan is t later."""

    def plan(self, obs, *, noise=None, prefix=None, draw=None):
        super().plan(obs, noise=noise)
        return obs["y"][:, -1, None, None] + torch.arange(6.0)[None, :, None]


@pytest.mark.parametrize("execute, delay, align, want", [
    (4, 2, True, [100, 101, 102, 103, 104, 105, 202, 203, 204, 205, 302, 303]),  # planned at 0, 4 and 8, acting from 0, 6 and 10
    (4, 2, False, [100, 101, 102, 103, 104, 105, 200, 201, 202, 203, 300, 301]),
    (2, 2, True, [100, 101, 102, 103, 202, 203, 302, 303]),
    (1, 3, True, [100, 101, 102, 103, 203, 303, 403]),  # several plans under way at once
    (1, 3, False, [100, 101, 102, 103, 200, 300, 400]),
    (4, 0, False, [100, 101, 102, 103, 200, 201])])
def test_a_plan_acts_delay_steps_after_what_it_saw(execute, delay, align, want):
    controller = Controller(Counting(), execute=execute, delay=delay, align=align)
    controller.reset([0])
    assert [controller.act(frame(1, k))[0, 0].item() for k in range(len(want))] == want
    assert [seen["y"][0, -1].item() for seen in controller.planner.seen] == list(range(0, len(want), execute))


@pytest.mark.parametrize("execute, delay", [(4, 2), (2, 3), (1, 5), (3, 0)])
def test_an_aligned_plan_of_a_certain_future_loses_nothing(execute, delay):
    """Every action is the one meant for its step; without alignment it is one from `delay` steps before."""
    for align in (True, False):
        controller = Controller(Clock(), execute=execute, delay=delay, align=align)
        controller.reset([0, 1])
        done = np.stack([controller.act(frame(2, k))[:, 0] for k in range(15)], 1)
        late = np.where(np.arange(15) < execute + delay, 0, 0 if align else delay)
        assert np.array_equal(done, np.arange(15) - late + 100 * np.arange(2)[:, None])


def test_a_reset_row_waits_for_no_plan():
    """It starts with a whole plan of its own again, while the other rows keep what was promised them."""
    controller = Controller(Counting(), execute=2, delay=1)
    controller.reset([0, 1])
    first = [controller.act(frame(2, k))[:, 0].tolist() for k in range(2)]
    controller.reset([9], rows=np.array([1]))
    after = [controller.act(frame(2, k))[:, 0].tolist() for k in range(2, 6)]
    assert first == [[100, 100], [101, 101]]
    assert after == [[102, 200], [201, 201], [202, 202], [301, 301]]


def test_a_delay_that_plans_are_too_short_for_is_refused():
    with pytest.raises(ValueError, match="execute=4 and delay=3 need plans of 7 steps, the planner's horizon is 6: lower one"):
        Controller(Counting(), execute=4, delay=3)
    for delay in (-1, 1.5):
        with pytest.raises(ValueError, match=f"delay={delay} must be a whole number"):
            Controller(Counting(), delay=delay, execute=1)


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    return make_planner(make_data(make_store(tmp_path_factory.mktemp("data") / "d.zarr"))).eval().requires_grad_(False)


def real(n: int, k: int) -> dict[str, np.ndarray]:
    """Observations of row i at step k, different for every row."""
    return {"x": 5 + np.sin(np.arange(n)[:, None] * 1.7 + k * 0.3 + np.arange(3))}


def test_a_seed_fixes_the_plans_of_its_row_whatever_the_batch(planner):
    """Row 2 of five, alone, and beside rows that are dropped: the same actions; another seed: others."""
    together, alone = Controller(planner, execute=3), Controller(planner, execute=3)
    together.reset([10, 11, 12, 13, 14])
    alone.reset([12])
    for k in range(10):
        a, b = together.act(real(5, k)), alone.act({"x": real(5, k)["x"][2:3]})
        np.testing.assert_allclose(a[2], b[0], rtol=1e-5, atol=1e-5)
    again, other = Controller(planner, execute=3), Controller(planner, execute=3)
    again.reset([10, 11, 12, 13, 14])
    other.reset([10, 11, 99, 13, 14])
    first = again.act(real(5, 0))
    apart = np.abs(first - other.act(real(5, 0))).max(1)
    assert apart[2] > 1e-2 and apart[[0, 1, 3, 4]].max() == 0
    together.reset([10, 11, 12, 13, 14])
    assert np.array_equal(together.act(real(5, 0)), first)  # a reset forgets everything


def test_rows_do_not_depend_on_which_others_are_alive(planner):
    """As evaluate drives it: chunks of observations, fewer rows each time."""
    def drive(alive: list[list[int]]) -> list[np.ndarray]:
        controller = Controller(planner, execute=4)
        controller.reset([3, 4, 5])
        controller.observe({"x": real(3, 0)["x"][:, None]})
        plans = []
        for k, rows in enumerate(alive):
            at = np.array(rows)
            plans.append(controller.plan(at)[rows.index(1)])
            controller.observe({"x": np.stack([real(3, 4 * k + t)["x"][at] for t in range(1, 5)], 1)}, at)
        return plans

    for a, b in zip(drive([[0, 1, 2]] * 4), drive([[0, 1, 2], [1, 2], [1], [1]]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("late", [{}, {"delay": 3}, {"delay": 2, "align": False}])
def test_acting_is_observing_and_planning(planner, late):
    stepper, planned = Controller(planner, execute=5, **late), Controller(planner, execute=5, **late)
    stepper.reset([1, 2]), planned.reset([1, 2])
    for k in range(3):
        actions = np.stack([stepper.act(real(2, 5 * k + t)) for t in range(5)], 1)
        planned.observe({"x": real(2, 5 * k)["x"][:, None]})
        assert np.array_equal(planned.plan(), actions)
        planned.observe({"x": np.stack([real(2, 5 * k + t)["x"] for t in range(1, 5)], 1)})


@pytest.mark.parametrize("execute, delay, align", [(4, 4, True), (4, 4, False), (5, 2, True), (2, 3, False), (8, 0, True)])
def test_late_plans_follow_a_timeline_made_by_hand(planner, execute, delay, align):
    """A network's plans: the one made of steps s - 1 and s of the episode, with the seed's next noise, acts from s + delay on."""
    late, steps = Controller(planner, execute=execute, delay=delay, align=align), 24
    late.reset([7])
    acted = [late.act(real(1, s))[0] for s in range(steps)]
    noise, plans = torch.Generator().manual_seed(7), {}
    for s in range(0, steps, execute):
        seen = torch.from_numpy(np.concatenate([real(1, max(0, s - 1))["x"], real(1, s)["x"]])).float()[None]
        plans[s] = planner.plan({"x": seen}, noise=torch.randn(8, 2, generator=noise)[None])[0].detach().numpy()
    for now, action in enumerate(acted):
        made = max(s for s in plans if s == 0 or s + delay <= now)
        np.testing.assert_allclose(action, plans[made][now - made - (0 if align or made == 0 else delay)], atol=1e-6)


class Told(Clock):
    """A clock that keeps what it was told of the plan before, and deviates from the time by the number of its plan."""
    rtc = 6

    def plan(self, obs, *, noise=None, prefix=None, draw=None, **told):
        self.told = [*getattr(self, "told", []), (prefix, told, len(noise))]
        return super().plan(obs, noise=noise) + 1000 * len(self.seen)


@pytest.mark.parametrize("execute, delay", [(2, 2), (3, 1), (1, 4), (4, 0), (6, 0)])
@pytest.mark.parametrize("merge", CONTINUES)
def test_a_planner_is_told_what_is_going_to_be_executed(execute, delay, merge):
    """Step i of the prefix is what acts i steps from now as far as is known; its first `delay` steps do act, the same to the bit."""
    controller = Controller(Told(), execute=execute, delay=delay, merge=merge)
    controller.reset([0])
    acted = np.array([controller.act(frame(1, k))[0, 0] for k in range(18)])
    first, *others = controller.planner.told
    assert first[:2] == (None, {}) and len(others) == -(-18 // execute) - 1
    for k, (prefix, told, _) in enumerate(others, 1):
        assert prefix.shape == (1, 6 - execute, 1) and (told["merge"], told["committed"], told["warm"]) == (merge, delay, None)
        assert ("limit" in told) == (merge in ("guided", "identity"))
        until = min(k * execute + delay, 18)
        assert np.array_equal(prefix[0, : until - k * execute, 0], acted[k * execute: until])
        assert np.array_equal(prefix[0, :, 0] % 1000, k * execute + np.arange(6 - execute))  # aligned: every action is the one meant for its step
        assert (prefix[0, delay:, 0] // 1000 == k).all()  # behind the committed ones, what the newest plan says


@pytest.mark.parametrize("execute, delay", [(2, 0), (2, 2), (3, 1), (1, 2)])
def test_an_ensemble_averages_the_plans_that_have_landed(execute, delay):
    """Against exp(-.1 i) over them by hand, the oldest first; what is promised already is not changed."""
    controller = Controller(Told(), execute=execute, delay=delay, merge="ensemble")
    controller.reset([0])
    acted = [controller.act(frame(1, k))[0, 0] for k in range(18)]
    for now, action in enumerate(acted):
        landed = [s for s in range(0, now + 1, execute) if now - s < 6 and (s == 0 or s + delay <= now)]
        weight = np.exp(-0.1 * np.arange(len(landed)))
        want = now + 1000 * (weight @ np.array([s // execute + 1 for s in landed])) / weight.sum()
        assert action == pytest.approx(want, rel=1e-5), now


@pytest.mark.parametrize("merge", ["frozen", "guided", "ensemble"])
def test_a_reset_row_is_told_nothing_and_the_others_all(planner, merge):
    """Rows that start and rows that go on are planned apart, each with its own noise: as if alone."""
    def drive(rows: list[int]) -> list[np.ndarray]:
        controller = Controller(planner, execute=3, delay=2, merge=merge)
        controller.reset([10 + r for r in rows])
        acted = []
        for k in range(12):
            if k == 6 and 1 in rows:
                controller.reset([99], rows=np.array([rows.index(1)]))
            acted.append(controller.act({"x": real(3, k)["x"][rows]}))
        return acted
    together = drive([0, 1, 2])
    for row in range(3):
        for a, b in zip(together, drive([row]), strict=True):
            np.testing.assert_allclose(a[row], b[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("merge", ["ensemble", "frozen", "guided", "identity"])
def test_merges_are_the_same_acted_and_planned(planner, merge):
    stepper, planned = (Controller(planner, execute=3, delay=2, merge=merge, warm=0.8) for _ in range(2))
    stepper.reset([1, 2]), planned.reset([1, 2])
    planned.observe({"x": real(2, 0)["x"][:, None]})
    for k in range(4):
        actions = np.stack([stepper.act(real(2, 3 * k + t)) for t in range(3)], 1)
        assert np.array_equal(planned.plan(), actions)
        planned.observe({"x": np.stack([real(2, 3 * k + t)["x"] for t in range(1, 4)], 1)})


@pytest.mark.parametrize("merge", ["guided", "identity"])
def test_plans_join_more_smoothly_than_naive_ones(planner, merge):
    """The network knows nothing, so naive plans jump where they join; one that goes on from the promised steps jumps less."""
    def seam(merge: str) -> float:
        controller = Controller(planner, execute=4, delay=2, merge=merge, prior=0.3)
        controller.reset(range(30))
        acted = np.stack([controller.act(real(30, 0)) for _ in range(26)], 1)
        return float(np.abs(np.diff(acted, axis=1))[:, 5::4].mean())
    assert seam(merge) < 0.97 * seam("naive")


def test_a_merge_that_cannot_work_is_refused(planner):
    with pytest.raises(ValueError, match=r"control.merge='mean' is unknown; use one of naive"):
        Controller(Counting(), execute=4, merge="mean")
    for options in ({"merge": "guided"}, {"merge": "ensemble"}, {"warm": 0.5}):
        with pytest.raises(ValueError, match=r"control.align=false starts plans late.*control.align=true"):
            Controller(Counting(), execute=4, align=False, **options)
    with pytest.raises(ValueError, match=r"merge=prefix with delay=2 needs a policy trained with train.rtc=2 or more, and this one has none"):
        Controller(planner, execute=4, delay=2, merge="prefix")


def test_the_global_generator_is_left_alone(planner):
    controller = Controller(planner)
    controller.reset([1])
    state = torch.random.get_rng_state()
    controller.act(real(1, 0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_misuse_is_told():
    controller = Controller(Counting(), execute=6)
    for use in (lambda: controller.act(frame(2, 0)), controller.plan, lambda: controller.observe(chunk(2, [0]))):
        with pytest.raises(RuntimeError, match="call reset"):
            use()
    with pytest.raises(RuntimeError, match="first reset starts every row"):
        controller.reset([1], rows=np.array([0]))
    controller.reset([0, 1])
    with pytest.raises(RuntimeError, match=r"rows \[0, 1\] have observed nothing since their reset"):
        controller.plan()
    with pytest.raises(KeyError, match=r"lacks y \(got x\)"):
        controller.act({"x": np.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"'x' must be \(2, t, 2\), got \(2, 1, 3\)"):
        controller.act({**frame(2, 0), "x": np.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"'x' must be \(2, t, 2\), got \(3, 1, 2\)"):
        controller.act({**frame(2, 0), "x": np.zeros((3, 2))})
    controller.observe({k: v[:1] for k, v in chunk(2, [0]).items()}, np.array([0]))
    with pytest.raises(RuntimeError, match=r"rows \[1\] have observed nothing"):
        controller.plan()
    controller.act(frame(2, 0))
    controller.reset([7], rows=np.array([1]))
    with pytest.raises(RuntimeError, match=r"rows \[1\] have observed nothing"):
        controller.plan()
    assert controller.plan(np.array([0])).shape == (1, 6, 1)
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        controller.reset([7], rows=np.array([0, 1]))
    with pytest.raises(TypeError, match=r"rows are indices, got bool.*nonzero"):
        controller.reset([7, 8], rows=np.array([True, False]))
    for execute in (0, 7):
        with pytest.raises(ValueError, match=f"execute={execute} must be between 1 and the planner's horizon 6"):
            Controller(Counting(), execute=execute)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_plan_that_is_not_finite_is_refused(planner, bad):
    """Naming the row; what was planned for the others comes with the refusal."""
    controller, sound = Controller(planner), Controller(planner)
    controller.reset([0, 1]), sound.reset([0, 1])
    with pytest.raises(NotFinite, match=r"plan of rows \[1\] is not finite") as refused:
        controller.act({"x": np.array([[1.0, 2, 3], [1, bad, 3]])})
    actions = sound.act({"x": np.array([[1.0, 2, 3], [1, 2, 3]])})
    assert refused.value.rows == [1] and np.array_equal(refused.value.chunk[0, 0], actions[0]) and not refused.value.chunk[1].any()


def test_what_a_drawing_sampler_plans_for_a_row_depends_on_that_row_alone(planner):
    """DDPM for three robots, and for the last of them alone, with the global generator left alone."""
    planner.set_sampler(functools.partial(first_order, eta=1.0), 5)
    seen = {"x": np.random.default_rng(0).normal(5, 1, (3, 1, 3)).astype(np.float32)}
    state, plans = torch.random.get_rng_state(), []
    for rows in ([0, 1, 2], [2]):
        controller = Controller(planner, execute=4)
        controller.reset(seeds=rows)
        controller.observe({"x": seen["x"][rows]})
        plans.append(controller.plan())
    np.testing.assert_allclose(plans[0][2], plans[1][0], rtol=1e-5, atol=1e-5)
    assert np.abs(plans[0][1] - plans[0][2]).max() > 1e-3 and torch.equal(torch.random.get_rng_state(), state)

"""Planning by simulation: the planner's model is the environment, its geometry the T's, and it reaches the goal."""

import numpy as np
import pytest

from envs.batch import BatchEnv
from envs.pusht import GOAL, PushT, to_world
from envs.pusht_mpc import ENDS, GAP, WALK, PushPlanner, _clearance, cost, distance, draw, follow, outline, turn
from policy.control import Controller
from policy.rollout import evaluate
from scripts.baseline import Simulating

FULL = PushT(obs="full")


@pytest.fixture(scope="module")
def planner():
    planner = PushPlanner(FULL, threads=2)
    yield planner
    planner.close()


def generators(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


def test_the_planner_simulates_what_the_environment_does_bit_for_bit(planner):
    """From states in mid-episode, many of them in contact; the environment is put there by a reset, or went on, which differs
    by the solver's warm start."""
    goes_on, put = (BatchEnv(PushT(success_coverage=2.0), 6, threads=2) for _ in range(2))
    goes_on.reset(seed=100_000)
    rng, touching, worst = np.random.default_rng(0), 0, 0.0
    pushes = planner.plan(goes_on.state, generators(*range(6)))
    for k in range(10):
        start = goes_on.state
        touching += _clearance(FULL.vector(start)[0, :2], FULL.vector(start)[0, 2:]) < 15.5
        put.reset(options={"state": start})
        actions = np.concatenate([pushes[:, 2 * k : 2 * k + 2], FULL.vector(start)[:, None, 2:4] + rng.normal(0, 60, (6, 4, 2))], axis=1)
        *_, info = put.step_chunk(actions)
        path = [planner.simulate(start[i], actions) for i in range(6)]
        assert all((path[i].qpos[i] == info["qpos"][i]).all() and (path[i].qvel[i, -1] == put.state.qvel[i]).all() for i in range(6))
        *_, info = goes_on.step_chunk(actions[:, :2])
        worst = max(worst, *(np.abs(path[i].qpos[i, :2] - info["qpos"][i]).max() for i in range(6)))
    assert worst < 1e-9, "m and rad"
    assert touching > 1
    goes_on.close()
    put.close()


def test_the_outline_is_the_blocks():
    contact = np.arange(0.5, ENDS[-1], 1.0)
    point, normal = outline(contact)
    assert ENDS[-1] == 2 * (120 + 30) + 2 * 90 and np.allclose(np.linalg.norm(normal, axis=-1), 1)
    assert np.allclose(np.linalg.norm(np.diff(point, axis=0), axis=-1).round(9), 1, atol=0.5)
    nowhere = np.zeros(3)
    assert np.allclose(_clearance(point, nowhere), 0) and np.allclose(_clearance(point + 0.3 * normal, nowhere), 0)
    assert np.allclose(_clearance(point - 0.3 * normal, nowhere), 0.3)


def test_the_cost_is_the_corners_distance():
    steps = np.tile([0.0, 0.0, *GOAL], (3, 5, 1))
    steps[1, :, 2:4] += [3.0, 4.0]  # stays 5 px away
    steps[2, 2, 2:4] += [3.0, 4.0]  # comes back
    assert cost(steps) == pytest.approx([0, 5 * 1.15, 0], abs=1e-9)
    turned = GOAL + [0, 0, np.pi]
    corner = np.array([[60.0, 0.0]])
    assert distance(turned) == pytest.approx(2 * np.mean([np.hypot(x, y) for x, y in [(60, 0), (60, 30), (15, 30), (15, 120)]]))
    assert np.allclose(to_world(corner, turned), 2 * GOAL[:2] - to_world(corner, GOAL))


def test_the_way_to_a_push_touches_nothing(planner):
    """Pushes of length -GAP end where they start: then the block stays where it is. The corners between bar and stem are too narrow."""
    moved, arrived = [], []
    for seed in range(12):
        state = FULL.state(np.array([*np.random.default_rng(seed).uniform(60, 450, 2), 256.0, 220.0, seed]))
        vector = FULL.vector(state)
        if _clearance(vector[:2], vector[2:]) < 20:
            continue
        push = draw(vector, 40, np.random.default_rng(seed))
        push[:, 2] = -GAP
        point, normal = outline(push[:, 0])
        start = vector[2:4] + turn(point - 24 * normal, vector[4])
        room = _clearance(start, vector[2:]) > 20
        push, start = push[room], start[room]
        actions = follow(vector, push, 40)
        path = FULL.vector(planner.simulate(state, actions))
        moved.append(np.abs(distance(path[:, -1, 2:]) - distance(vector[2:])) > 0.5)
        arrived.append(np.linalg.norm(path[:, -1, :2] - start, axis=-1) < 1)
        assert np.linalg.norm(np.diff(actions, axis=1), axis=-1).max() < WALK + 1e-9
    moved, arrived = np.concatenate(moved), np.concatenate(arrived)
    assert len(moved) > 300 and moved.mean() < 0.02 and arrived.mean() > 0.98


def test_a_plan_depends_on_state_and_seed_alone(planner):
    state = FULL.state(np.array([[100.0, 100.0, 200.0, 200.0, 1.0], [400.0, 100.0, 300.0, 260.0, 2.0]]))
    both, single = planner.plan(state, generators(1, 2)), PushPlanner(FULL, threads=1)
    assert (both[1] == single.plan(state[1:], generators(2))[0]).all() and (both == planner.plan(state, generators(1, 2))).all()
    assert (both[1] != planner.plan(state[1:], generators(3))[0]).any()
    single.close()


def test_searching_on_finds_better_plans(planner):
    """Two rounds begin with the draws of none, so they can only do better; and the block gets nearer to its goal."""
    hasty = PushPlanner(FULL, rounds=0, threads=1)
    found = []
    for seed in range(8):
        state = FULL.reset(100_000 + seed)
        plans = [each.search(state, np.random.default_rng(seed)) for each in (hasty, planner)]
        found.append([*cost(FULL.vector(planner.simulate(state, np.stack(plans)))), 1.15 * distance(FULL.vector(state)[2:])])
    drawn, varied, before = np.array(found).T
    assert (varied <= drawn).all() and (varied < drawn).mean() > 0.8
    assert varied.mean() < 0.8 * before.mean()
    hasty.close()


def rolled(planner: PushPlanner, episodes: int, seed: int = 100_000, **control):
    envs = BatchEnv(FULL, min(episodes, 50))
    report = evaluate(Controller(Simulating(planner), **control), envs, episodes, seed)  # type: ignore[arg-type]
    envs.close()
    return report.metrics()


def test_it_reaches_the_goal():
    planner = PushPlanner(FULL, drawn=32, varied=16)
    metrics = rolled(planner, 4)
    assert metrics["success"] == 1 and metrics["steps"] < 4 * 200
    planner.close()


@pytest.mark.slow
def test_it_reaches_the_goal_from_200_seeds(planner):
    metrics = rolled(planner, 200)
    assert metrics["success_ci"][0] > 0.95, f"{metrics['success']:.1%}"


def test_planning_asks_for_the_full_state():
    with pytest.raises(ValueError, match=r"not agent_pos, keypoint: planner\.task\.obs=full"):
        Simulating(PushPlanner(PushT(), threads=1))

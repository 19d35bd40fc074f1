"""The maze's physics and walls, its shortest ways, its expert, its maps; and what gymnasium and the batch ask of every task."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import render
from envs.batch import BatchEnv
from envs.collect import demonstrations
from envs.maze import FORCE, LAYOUTS, RADIUS, SPEED, SUCCESS, Maze, next_cells, normalised_score, stretch_ends
from envs.simulator import State
from envs.task import TaskEnv

SIZES = list(LAYOUTS)
OPEN = ["######", "#....#", "#....#", "#....#", "######"]
FAR = 100.0  # m, a goal that is never reached


def endless(task: Maze, n: int, seed: int = 0) -> State:
    """n starts of a task with the goal out of reach, so that nothing ends an episode early."""
    state = State.stack([task.reset(seed + i) for i in range(n)])
    return State(state.qpos, state.qvel, np.full_like(state.mocap_pos, FAR))


def violent_actions(n: int, t: int, seed: int = 0) -> np.ndarray:
    """Full force in one of nine directions, each held for half a second."""
    return np.random.default_rng(seed).choice([-1.0, 0.0, 1.0], (n, -(-t // 10), 2)).repeat(10, axis=1)[:, :t]


def walls(task: Maze) -> np.ndarray:
    """The middles (w, 2) of the map's wall cells, m, from the rows alone."""
    height, width = len(task.rows), len(task.rows[0])
    return np.array([(c + 0.5 - width / 2, height / 2 - r - 0.5) for r in range(height) for c in range(width) if task.rows[r][c] == "#"])


def depth(task: Maze, points: np.ndarray) -> float:
    """How far balls at points (n, 2) reach into the nearest wall at worst, m; RADIUS when a middle touches one."""
    outside = np.maximum(np.abs(points[:, None] - walls(task)) - 0.5, 0)
    return float(RADIUS - np.linalg.norm(outside, axis=-1).min())


def distances(cells: np.ndarray) -> np.ndarray:
    """Steps between all cells (c, c) by Floyd and Warshall: slow, and without a queue."""
    d = np.where(np.abs(cells[:, None] - cells).sum(-1) == 1, 1.0, np.inf)
    np.fill_diagonal(d, 0)
    for middle in range(len(cells)):
        d = np.minimum(d, d[:, [middle]] + d[[middle]])
    return d


def expert_success(task: Maze, n: int, noise: bool) -> tuple[float, int]:
    """Share of n seeds the expert solves in time, and the longest episode [steps]."""
    env, expert, rng = BatchEnv(task, n, threads=1), task.expert(n, 1), np.random.default_rng(0)
    obs, _ = env.reset(seed=0)
    terminated = truncated = np.zeros(n, bool)
    while not (terminated | truncated).all():
        action = expert.act(obs)
        obs, _, terminated, truncated, info = env.step(action + noise * rng.normal(size=action.shape) * task.expert_noise)
    env.close()
    return terminated.mean(), int(info["elapsed"].max())


@pytest.mark.gl
@pytest.mark.parametrize("options", [{}, {"size": "large"}, {"map": OPEN}])
def test_gymnasium_finds_nothing_to_warn_of(gl, options):
    env = gymnasium.make("dipole/Maze-v0", **options).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    env.close()


def test_the_task_says_what_it_promises():
    env = gymnasium.make("dipole/Maze-v0", size="medium").unwrapped
    task = env.task
    assert set(task.units) == set(task.observation_space) | {"action"} and "force" in task.action_semantics
    obs, info = env.reset(seed=3)
    state = task.reset(3)
    assert {key: value.shape for key, value in obs.items()} == {"position": (2,), "velocity": (2,), "goal": (2,)}
    assert env.observation_space.contains(obs) and info["distance"] == np.linalg.norm(state.qpos - state.mocap_pos[0, :2])
    two_axes = task.observe(State.stack([State.stack([state] * 4)] * 2))
    assert all((two_axes[key] == obs[key]).all() and two_axes[key].shape == (2, 4, *obs[key].shape) for key in obs)
    assert [Maze(size=size).max_steps / task.fps for size in SIZES] == [3, 6, 8]  # s, D4RL's


def test_batch_equals_single_bit_for_bit():
    task, n, t = Maze(size="medium", max_steps=300), 3, 300
    actions, start = violent_actions(n, t), endless(Maze(size="medium"), 3, seed=7)
    batch = BatchEnv(task, n, threads=2)
    batch.reset(options={"state": start})
    obs, reward, terminated, truncated, info = batch.step_chunk(actions)
    batch.close()
    for i in range(n):
        single = TaskEnv(task)
        single.reset(options={"state": start[i]})
        for k in range(t):
            o, r, te, tr, one = single.step(actions[i, k])
            assert (single.state.qpos[0] == info["qpos"][i, k]).all(), f"step {k}"
            assert all((o[key] == obs[key][i, k]).all() for key in o)
            assert (r, te, tr, one["distance"]) == (reward[i, k], terminated[i, k], truncated[i, k], info["distance"][i, k])
        single.close()
    assert truncated[:, -1].all() and not truncated[:, :-1].any() and np.ptp(info["qpos"], axis=1).max() > 0.5


@pytest.mark.parametrize("size", SIZES)
def test_no_force_passes_a_wall(size):
    """Every physics step is looked at, and free flights show that the walls were there to be hit."""
    task = Maze(size=size, max_steps=10**6)
    task.substeps = 1
    env = BatchEnv(task, 8, threads=1)
    env.reset(options={"state": endless(task, 8)})
    obs, *_, info = env.step_chunk(violent_actions(8, 400).repeat(10, axis=1))
    env.close()
    points = info["qpos"].reshape(-1, 2)
    visited = {tuple(np.rint(point - task.middles[0]).astype(int)) for point in points}
    worst = depth(task, points)
    print(f"\n{size}: into a wall {100 * worst:.1f} cm at worst, {len(visited)} of {len(task.cells)} cells, {np.abs(obs['velocity']).max():.2f} m/s")
    assert 0 < worst < 0.05 < RADIUS
    assert len(visited) > 3 and all(task.observation_space[key].contains(value) for key in ("position", "velocity") for value in obs[key].reshape(-1, 2))


def test_free_flight_is_newton_with_damping_and_drag():
    """Against the equation m dv/dt = F - v - c v|v|, c so that FORCE holds SPEED, integrated a hundred times finer."""
    task = Maze(map=["#" * 42, "#" + "." * 40 + "#", "#" * 42], max_steps=100)
    env = BatchEnv(task, 2, threads=1)
    env.reset(options={"state": State(np.array([[-19.0, 0.0]] * 2), np.zeros((2, 2)), np.full((2, 1, 3), FAR))})
    obs, *_ = env.step_chunk(np.tile(np.array([[1.0, 0.0], [0.3, 0.0]])[:, None], (1, 60, 1)))
    env.close()
    mass, drag, v, dt = 4000 / 3 * np.pi * RADIUS**3, (FORCE - SPEED) / SPEED**2, np.zeros(2), 0.05e-3
    for k in range(60):
        for _ in range(1000):
            v = v + dt / mass * (np.array([1.0, 0.3]) * FORCE - v - drag * v * abs(v))
        assert np.abs(obs["velocity"][:, k, 0] - v).max() < 0.03
    assert obs["velocity"][0, -1, 0] == pytest.approx(SPEED, abs=1e-3) and np.abs(obs["velocity"][..., 1]).max() < 1e-9


@pytest.mark.parametrize("size", SIZES)
def test_the_expert_succeeds(size):
    for noise in (False, True):
        task = Maze(size=size)
        rate, longest = expert_success(task, 50, noise)
        print(f"\n{size}, noise {noise}: {rate:.3f} of 50 seeds, longest {longest} of {task.max_steps} steps")
        assert rate >= 0.99


def test_the_straight_way_to_the_goal_fails():
    class Straight(Maze):
        def expert(self, n, seed):
            expert = super().expert(n, seed)
            expert._stretch = np.broadcast_to(np.arange(len(self.cells)), expert._stretch.shape)
            return expert

    rate, _ = expert_success(Straight(size="large"), 50, noise=False)
    print(f"\nstraight to the goal: {rate:.2f} of 50 seeds")
    assert rate < 0.5


@pytest.mark.parametrize("rows", [*LAYOUTS.values(), OPEN], ids=[*SIZES, "open"])
def test_next_cells_are_shortest_ways(rows):
    task = Maze(map=rows)
    d, every = distances(task.cells), np.arange(len(task.cells))
    for table in task.next_cell:
        after = d[table, every]
        assert (after == np.maximum(d - 1, 0)).all(), "each cell is one step nearer to the goal"
        assert (d[table, every[:, None]] == (d > 0)).all(), "and a neighbour of the one before"
    assert task.max_steps == 20 * (1 + 0.5 * d.max())


def test_demonstrators_choose_between_equally_short_ways():
    shares = {size: float((np.diff(Maze(size=size).next_cell, axis=0) != 0).mean()) for size in SIZES}
    print("\nstarts and goals with two ways:", shares)
    assert shares["umaze"] == 0 and min(shares["medium"], shares["large"]) > 0.01
    expert = Maze(size="medium").expert(100, 0)
    assert 0.3 < expert.choice.mean() < 0.7


def test_a_stretch_ends_where_the_way_turns():
    cells = Maze().cells.tolist()
    ends = stretch_ends(next_cells(Maze().cells), Maze().cells)
    at = {tuple(cell): i for i, cell in enumerate(cells)}
    way = ends[at[3, 1], at[1, 1]]
    assert cells[way] == [3, 3] and cells[ends[way, at[1, 1]]] == [1, 3] and cells[ends[at[1, 3], at[1, 1]]] == [1, 1]
    assert cells[ends[at[3, 1], at[3, 2]]] == [3, 2] and (np.diag(ends) == np.arange(len(cells))).all()


@pytest.mark.parametrize("size", SIZES)
def test_start_and_goal_come_from_the_seed_and_from_all_free_cells(size):
    task = Maze(size=size)
    states = State.stack([task.reset(seed) for seed in range(600)])
    same = task.reset(5)
    assert all((getattr(same, part) == getattr(states[5], part)).all() for part in ("qpos", "qvel", "mocap_pos"))
    for place in (states.qpos, states.mocap_pos[:, 0, :2]):
        offset = np.abs(place[:, None] - task.middles).max(-1)
        assert offset.min(1).max() <= 0.1
        count = np.bincount(offset.argmin(1), minlength=len(task.cells))
        assert (np.abs(count - 600 / len(task.cells)) < 5 * np.sqrt(600 / len(task.cells))).all()
    assert task.outcome(states).metrics["distance"].min() > SUCCESS and depth(task, states.qpos) < 0
    assert np.abs(states.qvel).std() < 0.1


def test_success_and_reward_within_half_a_metre():
    task = Maze()
    goal = np.array([1.0, 1.0, 0.0])
    state = State(goal[:2] + [[0.0, 0.0], [0.3, 0.39], [0.3, 0.41]], np.zeros((3, 2)), np.tile(goal, (3, 1, 1)))
    assert task.success(state).tolist() == [True, True, False] and task.reward(state).tolist() == [1, 1, 0]
    assert task.metrics(state)["distance"][0] == 0


def test_demonstrations_do_not_touch_the_walls_without_noise():
    task = Maze(size="large")
    episodes = list(demonstrations(task, task.expert, 20, noise=0.0, batch=20))
    assert max(depth(task, episode["position"]) for episode in episodes) < -0.05
    assert all((np.abs(episode["action"]) <= 1).all() for episode in episodes)


def test_normalised_score():
    assert normalised_score(23.85, "umaze") == 0 and normalised_score(161.86, "umaze") == pytest.approx(100)
    assert normalised_score(np.array([13.13, 277.39]), "medium") == pytest.approx([0, 100])
    with pytest.raises(ValueError, match="no reference for size 'small'"):
        normalised_score(1.0, "small")


def test_own_maps():
    listed, written = Maze(map=OPEN), Maze(map="\n".join(OPEN))
    assert listed.rows == written.rows == tuple(OPEN)
    assert (listed.middles[0] == [-1.5, 1]).all() and (listed.middles[-1] == [1.5, -1]).all()  # x to the right, y up
    assert expert_success(listed, 20, noise=True)[0] == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["#####", "#....", "#####"], "border is open at row 1, column 4: close it"),
        (["##.##", "#...#", "#####"], "border is open at row 0, column 2: close it"),
        (["#####", "#.x #", "#####"], r"characters \[' ', 'x'\]: write '#' for a wall"),
        (["####", "#.##", "####"], "1 free cells: give it at least two"),
        (["#####", "#..#", "#####"], r"lengths \[5, 4, 5\]: make them equally long"),
        ([], r"lengths \[\]"),
        (["#####", "#.#.#", "#####"], r"without a way between them, as from row, column \[1, 3\] to \[1, 1\]|\[1, 1\] to \[1, 3\]: join"),
    ],
)
def test_bad_maps_say_how_to_mend_them(rows, says):
    with pytest.raises(ValueError, match=says):
        Maze(map=rows)


def test_an_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="'huge' is unknown: use umaze, medium, large"):
        Maze(size="huge")


@pytest.mark.gl
@pytest.mark.parametrize("size", SIZES)
def test_the_picture_shows_the_map_as_it_is_written(gl, size):
    task = Maze(size=size)
    state = task.reset(4)
    pixels = 480
    image = render.frames(task.model, state.qpos[None], state.mocap_pos[None], camera=task.camera, size=pixels)[0].astype(int)
    scale = pixels / max(len(task.rows), len(task.rows[0]))

    def colour(x, y):
        return image[round(pixels / 2 - y * scale), round(pixels / 2 + x * scale)]

    point, goal = state.qpos, state.mocap_pos[0, :2]
    red, green, blue = colour(*point)
    assert blue > 180 and blue > 2 * red
    red, green, blue = colour(*goal)
    assert green > 200 and green > 1.3 * red
    assert all(colour(*(0.98 * wall)).max() < 170 for wall in walls(task))  # drawn inwards: the picture ends with the border
    away = [middle for middle in task.middles if min(np.linalg.norm(middle - point), np.linalg.norm(middle - goal)) > 0.8]
    assert away and all(colour(*middle).min() > 220 for middle in away)

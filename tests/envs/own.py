"""Every task of our own that conf/env names, and play in it: a new one is tested without anyone asking."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from envs.batch import BatchEnv
from envs.simulator import State
from envs.task import Task

CONF = Path(__file__).parents[2] / "conf" / "env"
VARIANTS = {
    "pusht": {"state": {"obs": "state"}},
    "gantry": {"pillar": {"pillar": True}, "belt": {"belt": 0.2}},
    "maze": {"medium": {"size": "medium"}, "large": {"size": "large"}},
}


def own_tasks() -> dict[str, Callable[[], Task]]:
    """How to make each, by name: conf/env's name as it stands there, and with `-variant` behind it."""
    made = {}
    for path in sorted(CONF.glob("*.yaml")):
        node = OmegaConf.load(path)
        if "_target_" in node and not node.get("_partial_") and issubclass(get_class(node["_target_"]), Task):
            for variant, options in {"": {}, **VARIANTS.get(path.stem, {})}.items():
                made[f"{path.stem}-{variant}".rstrip("-")] = partial(_make, OmegaConf.merge(node, options))
    return made


def _make(node) -> Task:
    task = instantiate(node)
    try:
        task.model  # noqa: B018  a task may borrow its model from a package
    except ImportError as error:
        pytest.skip(str(error))
    return task


def endless(make: Callable[[], Task], steps: int) -> Task:
    """A task that nothing ends before so many control steps."""
    task = make()
    outcome, task.max_steps = task.outcome, steps
    task.outcome = lambda state: (found := outcome(state))._replace(success=found.success & False)  # type: ignore[method-assign]
    return task


def random_actions(task: Task, n: int, t: int, seed: int = 0) -> np.ndarray:
    """(n, t, d), straight ways between points anywhere in the action space, 20 control steps apart."""
    low, high = task.action_space.low, task.action_space.high
    corners = np.random.default_rng(seed).uniform(low, high, (n, t // 20 + 2, len(low)))
    k, s = np.divmod(np.arange(t), 20)
    s = s[:, None] / 20
    return (1 - s) * corners[:, k] + s * corners[:, k + 1]


@cache
def played(name: str, t: int, seed: int = 7) -> tuple[State, np.ndarray]:
    """States (4, t + 1, ...) and the actions (4, t, d) between them: two worlds of random play, two driven by the expert if there is one."""
    task = endless(own_tasks()[name], t)
    actions = random_actions(task, 4, t)
    env = BatchEnv(task, 4, threads=1)
    obs, _ = env.reset(seed=seed)
    try:
        expert = task.expert(4, seed)
    except NotImplementedError:
        expert = None
    states = [env.state]
    for k in range(t):
        if expert is not None:
            actions[2:, k] = expert.act(obs)[2:]
        obs, _, _, _, info = env.step(actions[:, k])
        assert info["error"].tolist() == [None] * 4
        states.append(env.state)
    env.close()
    return State(*(np.stack([getattr(state, key) for state in states], axis=1) for key in ("qpos", "qvel", "mocap_pos"))), actions


def flat(state: State) -> State:
    """(n, t, ...) -> (n t, ...)."""
    n, t = state.qpos.shape[:2]
    return State(*(value.reshape(n * t, *value.shape[2:]) for value in (state.qpos, state.qvel, state.mocap_pos)))

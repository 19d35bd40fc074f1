"""Demonstrations from a scripted expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from envs.simulator import Simulator, State
from envs.task import Task

KEEP = 4  # steps recorded after success, so that a policy learns to stay there


def demonstrations(
    task: Task,
    expert_factory: Callable[[int, int], Any],
    episodes: int,
    *,
    seed: int = 10_000,
    noise: float | tuple[float, ...] | None = None,
    batch: int = 50,
) -> Iterator[dict[str, Any]]:
    """Yield episodes that succeed: {observation key: (t, ...), "action": (t, d) float32, "seed": the initial state's}.

    expert_factory(n, seed) makes a controller of n envs (task.expert is one). Gaussian noise, a standard deviation per action
    dimension (default: the task's expert_noise), is added to what is executed but not to what is recorded: so states off the
    expert's path come with the action that leads back. Seeds count up from `seed`; failed ones are skipped.
    """
    rng = np.random.default_rng(seed)
    found = 0
    while found < episodes:
        seeds = list(range(seed, seed + batch))
        seed += batch
        before = found
        for episode in _roll(task, expert_factory(batch, seeds[0]), seeds, task.expert_noise if noise is None else noise, rng):
            if found < episodes:
                found += 1
                yield episode
        if found == before:
            raise RuntimeError(f"the expert of {task.name} failed from all of seeds {seeds[0]}..{seeds[-1]}")


def _roll(
    task: Task, expert: Any, seeds: list[int], noise: float | tuple[float, ...], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Run one batch past success, which would end an episode of the environment; cut each where KEEP says."""
    envs = np.arange(len(seeds))
    simulator = Simulator(task.model, len(seeds), substeps=task.substeps)
    state = State.stack([task.reset(each) for each in seeds])
    simulator.write(envs, state)
    first = np.full(len(seeds), -1)  # the step whose action brought success
    observed, actions = [], []
    for k in range(task.max_steps + KEEP):
        obs = task.observe(state)
        action = expert.act(obs)
        observed.append(obs)
        actions.append(action)
        noisy = action + rng.normal(size=action.shape) * noise
        state = simulator.run(envs, task.control(noisy)[:, None])[:, 0]
        first[(first < 0) & task.success(state)] = k
        if (first >= 0).all() and k >= first.max() + KEEP:
            break
    simulator.close()
    for env in np.flatnonzero((first >= 0) & (first < task.max_steps)):
        steps = slice(first[env] + 1 + KEEP)
        episode = {key: np.stack([obs[key][env] for obs in observed[steps]]) for key in observed[0]}
        yield {**episode, "action": np.stack([a[env] for a in actions[steps]]).astype(np.float32), "seed": seeds[env]}

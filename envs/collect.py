"""Demonstrations from a scripted expert: of our own tasks in batches, of other packages' environments one by one; in processes or on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import numpy as np

from envs.crew import Crew, crew_of, do
from envs.simulator import Simulator, State
from envs.task import Task

KEEP = 4  # steps recorded after success, so that a policy learns to stay there
HOPELESS = 50  # failures in a row after which an expert is not asked again
Noise = float | tuple[float, ...] | None
Episode = dict[str, Any]


def demonstrations(
    task: Task,
    expert_factory: Callable[[int, int], Any] | None,
    episodes: int,
    *,
    seed: int = 10_000,
    noise: Noise = None,
    batch: int = HOPELESS,
    crew: Crew | None = None,
) -> Iterator[Episode]:
    """Yield episodes that succeed: {observation key: (t, ...), "action": (t, d) float32, "seed": the initial state's}.

    expert_factory(n, seed) makes a controller of n envs; task.expert when absent. Gaussian noise, a standard deviation per action
    dimension (default: the task's expert_noise), is added to what is executed but not to what is recorded: so states off the
    expert's path come with the action that leads back. Seeds count up from `seed`; failed ones are skipped. Whoever of `crew` does
    it (default: this process, in threads), episodes are the same: each batch of seeds draws its noise from its first seed.
    """
    expert = expert_factory or task.expert
    who = crew or Crew()
    work = partial(_batch, noise=task.expert_noise if noise is None else noise, threads=who.threads)
    for seeds, found in do(who, work, partial(_both, task, expert), batched(seed, batch)):
        if not found:
            raise RuntimeError(f"the expert of {task.name} failed from all of seeds {seeds[0]}..{seeds[-1]}")
        yield from found[:episodes]
        episodes -= len(found)
        if episodes <= 0:
            return


def batched(seed: int, batch: int) -> Iterator[list[int]]:
    """Seeds from `seed` on, in lists of so many."""
    return (list(range(first, first + batch)) for first in count(seed, batch))


def _both(task: Task, expert: Callable[[int, int], Any]) -> tuple[Task, Callable[[int, int], Any]]:
    return task, expert


def _batch(made: tuple[Task, Callable[[int, int], Any]], seeds: list[int], noise: float | tuple[float, ...],
           threads: int | None) -> list[Episode]:
    task, expert = made
    return list(_roll(task, expert(len(seeds), seeds[0]), seeds, noise, np.random.default_rng(seeds[0]), threads))


def from_env(
    factory: Callable[[], Any], episodes: int, *, seed: int = 10_000, noise: Noise = None, workers: int | None = None, crew: Crew | None = None
) -> Iterator[Episode]:
    """`demonstrations` of a gymnasium.Env with expert(seed) and info["success"], as envs.adapter.Adapter is one.

    factory makes one copy and can be pickled. workers: spawned processes, one copy in each (default: a process per CPU); 0 runs in
    this one. crew: who else does it. Episodes are the same for any number: each draws its noise from its own seed.
    """
    if episodes <= 0:
        return
    failed = 0
    for at, episode in do(crew or crew_of(workers), partial(run, noise=noise), factory, count(seed)):
        failed = 0 if episode else failed + 1
        if failed == HOPELESS:
            raise RuntimeError(f"the expert failed from all of seeds {at - HOPELESS + 1}..{at}. Lower noise={noise}, or watch one of them")
        if episode:
            episodes -= 1
            yield episode
        if not episodes:
            return


def attempts(task: Any, episodes: int, *, seed: int, workers: int | None = None) -> Iterator[tuple[int, int | None]]:
    """What the expert makes of seeds seed, seed + 1, ...: each with its steps to success, or None where it fails. Without noise.

    task: a Task, or a factory as `from_env` takes it.
    """
    if not isinstance(task, Task):
        for at, episode in do(crew_of(workers), partial(run, noise=0.0), task, range(seed, seed + episodes)):
            yield at, None if episode is None else len(episode["action"]) - KEEP
        return
    for first in range(seed, seed + episodes, HOPELESS):
        seeds = list(range(first, min(first + HOPELESS, seed + episodes)))
        found = {e["seed"]: len(e["action"]) - KEEP for e in _roll(task, task.expert(len(seeds), first), seeds, 0.0, np.random.default_rng(first))}
        yield from ((each, found.get(each)) for each in seeds)


def run(env: Any, seed: int, noise: Noise = None) -> Episode | None:
    """The expert's episode from this seed, KEEP steps beyond success, as `demonstrations` yields it; None when it fails."""
    obs, _ = env.reset(seed=seed)
    act, rng = env.expert(seed), np.random.default_rng(seed)
    spread = np.asarray(env.expert_noise if noise is None else noise)
    observed, actions, first = [], [], -1  # first: the step whose action brought success
    for k in range(env.max_steps + KEEP):
        actions.append(np.asarray(act(obs), np.float32))
        observed.append(obs)
        obs, _, _, _, info = env.step(actions[-1] + spread * rng.normal(size=actions[-1].shape))
        if first < 0 and info["success"]:
            first = k
        if k >= (first + KEEP if first >= 0 else env.max_steps - 1):
            break
    if first < 0:
        return None
    return {**{key: np.stack([each[key] for each in observed]) for key in obs}, "action": np.stack(actions), "seed": seed}


def _roll(task: Task, expert: Any, seeds: list[int], noise: float | tuple[float, ...], rng: np.random.Generator,
          threads: int | None = None) -> Iterator[Episode]:
    """Run one batch past success, which would end an episode of the environment; cut each where KEEP says."""
    envs = np.arange(len(seeds))
    simulator = Simulator(task.model, len(seeds), substeps=task.substeps, threads=threads)
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

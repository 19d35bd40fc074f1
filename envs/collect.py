"""Demonstrations from a scripted expert: of our own tasks in batches, of other packages' environments one by one in processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import count, islice
from typing import Any

import numpy as np

from envs.simulator import Simulator, State
from envs.task import Task

KEEP = 4  # steps recorded after success, so that a policy learns to stay there
HOPELESS = 50  # failures in a row after which an expert is not asked again
Noise = float | tuple[float, ...] | None
Episode = dict[str, Any]


def demonstrations(
    task: Task,
    expert_factory: Callable[[int, int], Any],
    episodes: int,
    *,
    seed: int = 10_000,
    noise: Noise = None,
    batch: int = HOPELESS,
) -> Iterator[Episode]:
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


def from_env(
    factory: Callable[[], Any], episodes: int, *, seed: int = 10_000, noise: Noise = None, workers: int | None = None
) -> Iterator[Episode]:
    """`demonstrations` of a gymnasium.Env with expert(seed) and info["success"], as envs.adapter.Adapter is one.

    factory makes one copy and can be pickled. workers: spawned processes, one copy in each (default: a process per CPU); 0 runs in
    this one. Episodes are the same for any number: each draws its noise from its own seed.
    """
    failed = 0
    for at, episode in _from_seeds(factory, seed, noise, workers):
        failed = 0 if episode else failed + 1
        if failed == HOPELESS:
            raise RuntimeError(f"the expert failed from all of seeds {at - HOPELESS + 1}..{at}. Lower noise={noise}, or watch one of them")
        if episode and episodes:
            episodes -= 1
            yield episode
        if not episodes:
            return


def attempts(task: Any, episodes: int, *, seed: int, workers: int | None = None) -> Iterator[tuple[int, int | None]]:
    """What the expert makes of seeds seed, seed + 1, ...: each with its steps to success, or None where it fails. Without noise.

    task: a Task, or a factory as `from_env` takes it.
    """
    if not isinstance(task, Task):
        for at, episode in islice(_from_seeds(task, seed, 0.0, workers), episodes):
            yield at, None if episode is None else len(episode["action"]) - KEEP
        return
    for first in range(seed, seed + episodes, HOPELESS):
        seeds = list(range(first, min(first + HOPELESS, seed + episodes)))
        found = {e["seed"]: len(e["action"]) - KEEP for e in _roll(task, task.expert(len(seeds), first), seeds, 0.0, np.random.default_rng(first))}
        yield from ((each, found.get(each)) for each in seeds)


def _from_seeds(factory: Callable[[], Any], seed: int, noise: Noise, workers: int | None) -> Iterator[tuple[int, Episode | None]]:
    """Seeds and their episodes, in order, None where the expert failed."""
    workers = os.cpu_count() or 1 if workers is None else workers
    if not workers:
        env = factory()
        try:
            for each in count(seed):
                yield each, run(env, each, noise)
        finally:
            env.close()
    made = pickle.dumps(factory)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        seeds = count(seed)
        ahead = deque((each, pool.submit(_in_worker, made, each, noise)) for each in islice(seeds, 2 * workers))
        while True:
            at, future = ahead.popleft()
            yield at, future.result()
            ahead.append((each := next(seeds), pool.submit(_in_worker, made, each, noise)))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_worker(factory: bytes, seed: int, noise: Noise) -> Episode | None:
    return run(_made(factory), seed, noise)


@lru_cache(maxsize=1)
def _made(factory: bytes) -> Any:
    """A process's copy; the bytes come from the process that started it."""
    return pickle.loads(factory)()


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


def _roll(task: Task, expert: Any, seeds: list[int], noise: float | tuple[float, ...], rng: np.random.Generator) -> Iterator[Episode]:
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

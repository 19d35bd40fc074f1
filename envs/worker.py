"""Environments of another make, several in one process, which an exception in one of them does not bring down; and that process.

What this imports is loaded by every worker: no simulator, no torch.
"""

from __future__ import annotations

import faulthandler
import mmap
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import gymnasium
import numpy as np
from gymnasium import spaces

from envs.rows import ELAPSED, REWARD, SUCCESS, TERMINATED, TRUNCATED, Fault, Rows, not_finite

Row = dict[tuple[str, str], Any]  # one step of one copy
OWN = ("success", "is_success", "elapsed", "error")  # names in info that are not metrics
MARKS = 3 * 8  # bytes of shared memory: the copy at work or -1, its step in this message, calls so far


class Episode(NamedTuple):
    """How a copy came to where it stands: the answer, for a deterministic environment, to a lost process."""

    seed: int
    options: dict[str, Any]
    chunks: list[np.ndarray]  # (t, d) each

    @property
    def actions(self) -> list[np.ndarray]:
        return [action for chunk in self.chunks for action in chunk]


class Unfit(Exception):
    """What an environment returned is no observation or reward; the message says all there is to say."""


class Group:
    """Copies of one environment, made when first reset; a copy that fails is made anew by its next reset."""

    def __init__(self, factory: Callable[[], gymnasium.Env], mark: Callable[[int, int], None] = lambda copy, step: None) -> None:
        self._factory, self._mark = factory, mark
        self._envs: dict[int, gymnasium.Env] = {}
        self._last: dict[int, Row] = {}

    def describe(self, copy: int) -> dict[str, Any]:
        """Make this copy and say what it is: spaces, metadata, name."""
        env = self._env(copy)
        self._space = observed(env.observation_space)
        if not isinstance(env.action_space, spaces.Box):
            raise TypeError(f"the environment acts in {env.action_space}; only a Box of continuous actions can be planned")
        name = getattr(env.unwrapped, "name", None) or (env.spec.id if env.spec else type(env.unwrapped).__name__)
        return {"name": str(name), "observation_space": self._space, "action_space": env.action_space, "metadata": dict(env.metadata)}

    def reset(self, jobs: Sequence[tuple[int, int, dict[str, Any]]]) -> tuple[Rows, dict[int, Fault]]:
        """Begin episodes (copy, seed, options): rows (m, ...), faults by copy."""
        faults = {copy: Fault(0, text) for copy, seed, options in jobs if (text := self._try(copy, 0, self._begin, copy, seed, options))}
        self._mark(-1, 0)
        return stack([[self._last[copy]] for copy, *_ in jobs], (len(jobs),)), faults

    def step(self, copies: Sequence[int], actions: np.ndarray) -> tuple[Rows, dict[int, Fault]]:
        """Run actions (m, t, d): rows (m, t, ...), repeating the last after an end or a fault; faults by copy."""
        m, t = actions.shape[:2]
        paths, faults = [], {}
        for copy, chunk in zip(copies, actions, strict=True):
            path = []
            for k, action in enumerate(chunk):
                if text := self._try(copy, k, self._advance, copy, action):
                    faults[copy] = Fault(k, text)
                    break
                path.append(self._last[copy])
                if path[-1][TERMINATED] or path[-1][TRUNCATED]:
                    break
            paths.append([*path, *[self._last[copy]] * (t - len(path))])
        self._mark(-1, 0)
        return stack(paths, (m, t)), faults

    def restore(self, episodes: dict[int, tuple[Episode, dict[str, np.ndarray]]]) -> dict[int, str]:
        """Play episodes again on fresh copies; the texts of those that fail or do not end with the same observation."""
        lost = {copy: text for copy, (episode, obs) in episodes.items() if (text := self._try(copy, 0, self._replay, copy, episode, obs))}
        self._mark(-1, 0)
        return lost

    def close(self) -> None:
        for copy in list(self._envs):
            self._drop(copy)

    def _env(self, copy: int) -> gymnasium.Env:
        if copy not in self._envs:
            env = self._factory()
            if not isinstance(env, gymnasium.Env):
                raise TypeError(f"the factory returned {env!r}, expected a gymnasium.Env; "
                                "a function that makes a whole VectorEnv must take the number of copies")  # fmt: skip
            self._envs[copy] = env
        return self._envs[copy]

    def _drop(self, copy: int) -> None:
        try:
            self._envs.pop(copy).close()
        except Exception:  # what does not work does not close either
            traceback.print_exc()

    def _try(self, copy: int, step: int, function: Callable[..., None], *args: Any) -> str:
        """Why it failed, or nothing."""
        self._mark(copy, step)
        try:
            function(*args)
            return ""
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, Unfit) else traceback.format_exc()
        self._last.setdefault(copy, blank(self._space))
        if copy in self._envs:
            self._drop(copy)
        return text

    def _begin(self, copy: int, seed: int, options: dict[str, Any]) -> None:
        self._last[copy] = blank(self._space)
        obs, info = self._env(copy).reset(seed=seed, options=options or None)
        self._last[copy] = self._row(obs, 0.0, False, False, info, 0)

    def _advance(self, copy: int, action: np.ndarray) -> None:
        obs, reward, terminated, truncated, info = self._envs[copy].step(action.copy())
        self._last[copy] = self._row(obs, reward, terminated, truncated, info, self._last[copy][ELAPSED] + 1)

    def _replay(self, copy: int, episode: Episode, expected: dict[str, np.ndarray]) -> None:
        self._begin(copy, episode.seed, episode.options)
        for k, action in enumerate(episode.actions):
            self._mark(copy, k)
            self._advance(copy, action)
        if not all(np.array_equal(self._last[copy]["obs", name], value) for name, value in expected.items()):
            raise Unfit("its process was lost, and playing the episode again led elsewhere: the environment's steps do not follow from its seed alone")

    def _row(self, obs: Any, reward: Any, terminated: Any, truncated: Any, info: dict[str, Any], elapsed: int) -> Row:
        obs = obs if isinstance(obs, dict) else {"state": obs}
        row: Row = {}
        for name, space in self._space.spaces.items():
            value = np.array(obs[name], space.dtype)  # a copy: many environments write into the same array
            if value.shape != space.shape:
                raise Unfit(f"observation {name!r} has shape {value.shape}, expected {space.shape}")
            row["obs", name] = value
        row[REWARD] = float(reward)
        for (kind, name), value in row.items():
            if not np.isfinite(value).all():
                raise Unfit(not_finite(kind, name, np.asarray(value)))
        row[TERMINATED], row[TRUNCATED], row[ELAPSED] = bool(terminated), bool(truncated), elapsed
        row[SUCCESS] = bool(info.get("success", info.get("is_success", terminated)))
        numbers = (bool, int, float, np.number, np.bool_)
        return {**row, **{("info", name): float(value) for name, value in info.items() if isinstance(value, numbers) and name not in OWN}}


def observed(space: spaces.Space) -> spaces.Dict:
    """Observations by name: a Box is called state. TypeError for what has no arrays."""
    known = space if isinstance(space, spaces.Dict) else spaces.Dict({"state": space})
    for name, each in known.spaces.items():
        if not isinstance(each, (spaces.Box, spaces.Discrete, spaces.MultiBinary, spaces.MultiDiscrete)):
            raise TypeError(f"observation {name!r} is {each}; expected arrays: gymnasium.wrappers.FlattenObservation makes one of it")
    return known


def blank(space: spaces.Dict) -> Row:
    """What stands where a copy has never been."""
    zeros = {("obs", name): np.zeros(each.shape or (), each.dtype) for name, each in space.spaces.items()}
    return {**zeros, REWARD: 0.0, TERMINATED: False, TRUNCATED: False, SUCCESS: False, ELAPSED: 0}


def stack(paths: list[list[Row]], shape: tuple[int, ...]) -> Rows:
    """Rows (*shape, ...) of paths; numbers that some steps lack are NaN there."""
    flat = [row for path in paths for row in path]
    keys = dict.fromkeys(key for row in flat for key in row)
    return {key: (values := np.stack([row.get(key, np.nan) for row in flat])).reshape(*shape, *values.shape[1:]) for key in keys}


def serve(pipe: Connection, mark: Callable[[int, int], None]) -> None:
    """Answer (method of Group, its arguments) with (True, result) or (False, traceback) until the pipe is closed."""
    group = None
    try:
        while (message := pipe.recv()) is not None:
            method, args = message
            try:
                if group is None:
                    group = Group(cloudpickle.loads(args[0]), mark)
                    mark(-1, 0)
                    args = args[1:]
                answer = True, getattr(group, method)(*args)
            except (Exception, SystemExit):
                answer = False, traceback.format_exc()
            pipe.send(answer)
    except (EOFError, OSError):  # the parent has gone
        pass
    if group is not None:
        group.close()


def main(pipe: int, file: int) -> None:
    """A worker process: talks through one inherited descriptor, and through the other says where it is and what it dies of."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's to handle
    faulthandler.enable(file, all_threads=False)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
    marks = np.frombuffer(mmap.mmap(file, MARKS), np.int64)

    def mark(copy: int, step: int) -> None:
        marks[0], marks[1] = copy, step
        marks[2] += 1

    serve(Connection(pipe), mark)

"""Environments of another make behind the batch interface: many copies in a few processes, a whole chunk in one message to each.

A process is a fresh interpreter, so it inherits no threads and loads no torch. One that hangs or dies is replaced; its copies
play their episodes again there, from their seeds and actions, and only the copy at fault leaves its episode.
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import cloudpickle
import gymnasium
import numpy as np

from envs import process
from envs.process import Message, Process
from envs.rows import TERMINATED, TRUNCATED, Fault, Faults, Rows, named, put
from envs.vector import ChunkEnv
from envs.worker import Episode, Group, blank, stack

START = 120.0  # s for a process to import and make its first copy, however little a step may take


def make(id: str, **options: Any) -> gymnasium.Env:
    """Any environment gymnasium knows; "package:Name-v0" imports its package first. options are the environment's."""
    return gymnasium.make(id, disable_env_checker=True, **options)


def makes_one(function: Callable[..., Any]) -> bool:
    """Whether it makes one environment: a gymnasium.Env class (or functools.partial of one), or what can be called without arguments."""
    inner = getattr(function, "func", function)
    if isinstance(inner, type) and issubclass(inner, gymnasium.Env):
        return True
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


class Copies(ChunkEnv):
    """num_envs copies of the environment that factory() makes, spread over processes.

    factory:  a gymnasium.Env class, functools.partial of one, or any function without arguments that returns one; a Box observation
              is called "state". Equal seeds must start equal episodes: what a lost process held is replayed, and checked.
    workers:  processes, at most one per copy (default: one per core). 0: all in this process, where nothing can stop a copy that hangs.
    timeout:  seconds that one reset or step of one copy may take.

    success in info is the environment's success or is_success, else a termination; its other numbers are the metrics.
    RuntimeError with the process's traceback when not even the first copy can be made.
    """

    def __init__(self, factory: Callable[..., gymnasium.Env], num_envs: int, *, workers: int | None = None, timeout: float = 60.0) -> None:
        self._factory, self._timeout = factory, timeout
        count = min(num_envs, (os.cpu_count() or 1) if workers is None else workers)
        self._owner = np.arange(num_envs) * max(count, 1) // num_envs  # the process of every copy
        self._episodes = [Episode(0, {}, [])] * num_envs
        self._group = None if count else Group(factory)
        self._processes = [Process() for _ in range(count)]
        self._kill = weakref.finalize(self, process.close, self._processes)
        try:
            about = self._group.describe(0) if self._group else self._first(range(count))
        except BaseException:
            self._kill()
            raise
        super().__init__(num_envs, about["observation_space"], about["action_space"])
        self.name, self._blank = about["name"], blank(about["observation_space"])
        self.metadata = {**about["metadata"], **ChunkEnv.metadata, "render_modes": about["metadata"].get("render_modes", [])}

    def render_episode(self, seed: int, actions: np.ndarray, size: int = 256) -> np.ndarray:
        """Frames (t + 1, size, size, 3) uint8 of the seed's episode under actions (t, d), played again by a fresh copy in this process.

        Frames of other shapes are fitted into the square. ValueError when the environment offers no render_mode rgb_array.
        """
        env = _drawing(self._factory)
        try:
            env.reset(seed=seed)
            frames, over = [env.render()], False
            for action in np.asarray(actions).astype(self.single_action_space.dtype):
                if not over:
                    _, _, terminated, truncated, _ = env.step(action)
                    over = terminated or truncated
                    last = env.render()
                frames.append(last)
        finally:
            env.close()
        return np.stack([_fit(frame, size) for frame in frames])

    def close_extras(self, **kwargs: Any) -> None:
        self._kill()
        if self._group is not None:
            self._group.close()

    def _start(self, envs: np.ndarray, seeds: Sequence[int], options: dict[str, Any]) -> tuple[Rows, Faults]:
        for i, seed in zip(envs, seeds, strict=True):
            self._episodes[i] = Episode(seed, options, [])
        return self._call(envs, (), lambda rows: ("reset", ([(int(envs[r]), seeds[r], options) for r in rows],)))

    def _advance(self, envs: np.ndarray, actions: np.ndarray, last: int) -> tuple[Rows, Faults]:
        actions = actions.astype(self.single_action_space.dtype)
        result = self._call(envs, actions.shape[1:2], lambda rows: ("step", (envs[rows].tolist(), actions[rows])))
        for i, chunk in zip(envs, actions, strict=True):
            self._episodes[i].chunks.append(chunk)
        return result

    def _call(self, envs: np.ndarray, t: tuple[int, ...], message: Callable[[np.ndarray], Message]) -> tuple[Rows, Faults]:
        """Send the processes of envs (m,) the messages about their rows of envs: rows (m, *t, ...), faults by copy."""
        faults: dict[int, Fault] = {}
        shape = len(envs), *t
        rows = stack([[self._blank]] * int(np.prod(shape)), shape)
        mine = {int(w): np.flatnonzero(self._owner[envs] == w) for w in np.unique(self._owner[envs])}
        messages = {w: message(each) for w, each in mine.items()}
        if self._group is not None:
            answers = {w: getattr(self._group, method)(*args) for w, (method, args) in messages.items()}
        else:
            answers = process.ask(self._processes, messages, self._timeout)
        for w, each in mine.items():
            if w not in answers:
                each, answers[w], lost = self._recover(w, envs, each, message, anew=not t)
                faults |= lost
            put(rows, each, answers[w][0], shape)
            faults |= answers[w][1]
        return rows, faults

    def _recover(
        self, w: int, envs: np.ndarray, rows: np.ndarray, message: Callable[[np.ndarray], Message], anew: bool
    ) -> tuple[np.ndarray, Any, dict[int, Fault]]:
        """Replace process w until it has answered for all rows but those of lost copies: rows, answer, {lost copy: why}.

        Other episodes in it (of all its copies, or, when these rows begin anew, of the rest) are played again first.
        A copy is lost when its process hangs at it once, or dies at it twice: the first time might be the system's doing.
        """
        kept = set(np.flatnonzero(self._owner == w).tolist()) - (set(envs[rows].tolist()) if anew else set())
        kept = {i for i in kept if self._now and not (self._now[TERMINATED][i] or self._now[TRUNCATED][i])}
        lost: dict[int, Fault] = {}
        deaths: Counter[int] = Counter()
        asked = True
        while True:
            end = self._processes[w].end()
            deaths[end.copy] += 1
            if end.copy >= 0 and (end.hung or deaths[end.copy] > 1):
                lost[end.copy] = Fault(0, end.text, end.step if asked else 0)
            try:
                if deaths[-1] > 1:
                    raise RuntimeError(end.text)
                self._processes[w] = Process()
                self._first([w])
            except RuntimeError as error:
                return rows[:0], ({}, {}), {**dict.fromkeys({*kept, *envs[rows].tolist()}, Fault(0, str(error))), **lost}
            asked = False
            back = {i: (self._episodes[i], {name: value[i] for name, value in named(self._now, "obs").items()}) for i in kept - lost.keys()}
            if (unlike := self._tell(w, ("restore", (back,)))) is None:
                continue
            lost |= {i: Fault(0, text) for i, text in unlike.items()}
            rows = rows[[i not in lost for i in envs[rows].tolist()]]
            asked = True
            if (answer := self._tell(w, message(rows)) if rows.size else ({}, {})) is not None:
                return rows, answer, lost

    def _tell(self, w: int, message: Message) -> Any:
        return process.ask(self._processes, {w: message}, self._timeout).get(w)

    def _first(self, workers: Sequence[int]) -> dict[str, Any]:
        """What processes say of the first of their copies. RuntimeError with their traceback when it cannot be made."""
        factory = cloudpickle.dumps(self._factory)
        told = process.ask(self._processes, {w: ("describe", (factory, int(np.argmax(self._owner == w)))) for w in workers}, START)
        for w in workers:
            if w not in told:
                raise RuntimeError(f"the environment cannot be made: {self._processes[w].end().text}")
        return told[workers[0]]


def _drawing(factory: Callable[..., gymnasium.Env]) -> gymnasium.Env:
    """An environment that renders to arrays."""
    try:
        inspect.signature(factory).bind(render_mode="rgb_array")
    except TypeError:
        env = factory()
    else:
        env = factory(render_mode="rgb_array")
    if env.render_mode != "rgb_array":
        env.close()
        raise ValueError(f"{env} does not draw: its render_mode is {env.render_mode!r}, expected 'rgb_array'")
    return env


def _fit(frame: Any, size: int) -> np.ndarray:
    """frame (h, w, 3) uint8 as (size, size, 3), its sides in proportion, the rest black."""
    frame = np.asarray(frame)
    if frame.shape[:2] == (size, size):
        return frame
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("fitting pictures needs pillow: pip install pillow") from error
    return np.asarray(ImageOps.pad(Image.fromarray(frame), (size, size)))

"""A simulated robot that is told joint setpoints one physics step at a time: what it plays, what it refuses, and its own watchdog.

Time comes from outside, so that it runs in real time (envs.robot) and in tests alike. A packet of setpoints ends at rest and must begin where
the robot is going to be, so a robot that hears nothing more, or nothing acceptable, plays what it has and stands.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mujoco
import numpy as np

from envs.simulator import Simulator, State
from envs.task import Obs, Task

ANCHOR = 3  # setpoints before a packet's first that the robot must agree on: they fix position, velocity and acceleration
AHEAD = 1.0  # s, the farthest a packet may begin in the future
FAULT = "the simulation went unstable"


class Unplayable(ValueError):
    """Setpoints that the robot does not take; the first argument is a short name of the reason."""


class Body:
    """How a task's actions are joints: every action dimension is the target length of one or more position actuators of the model.

    ValueError where they are not, as in a task that acts by a mocap body or by forces.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, task.model
        low, high = (np.asarray(x, float) for x in (task.action_space.low, task.action_space.high))
        middle = (low + high) / 2
        there = task.control(middle[None])[0]
        moved = np.stack([task.control((middle + step)[None])[0] - there for step in np.diag((high - low) / 4)], 1) / ((high - low) / 4)
        gain = np.round(moved, 9)  # (nu, dof)
        position = self.model.actuator_biastype == mujoco.mjtBias.mjBIAS_AFFINE
        if not position.all() or ((gain != 0).sum(1) != 1).any() or not (gain != 0).any(0).all():
            raise ValueError(f"{task.name} cannot be played as a robot: its actions are not the targets of position actuators, one or more each")
        share = (gain != 0) / (gain != 0).sum(0)
        self._q, self._dq = ((share / np.where(gain, gain, 1)).T @ length for length in self._lengths())

    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """(nu, nq) and (nu, nv): actuator lengths and speeds as linear functions of qpos and qvel."""
        model, of_q, of_v = self.model, np.zeros((self.model.nu, self.model.nq)), np.zeros((self.model.nu, self.model.nv))
        for i in range(model.nu):
            kind, at = model.actuator_trntype[i], model.actuator_trnid[i, 0]
            if kind == mujoco.mjtTrn.mjTRN_JOINT:
                joints, gears = [at], [model.actuator_gear[i, 0]]
            elif kind == mujoco.mjtTrn.mjTRN_TENDON and model.wrap_type[model.tendon_adr[at]] == mujoco.mjtWrap.mjWRAP_JOINT:
                wraps = slice(model.tendon_adr[at], model.tendon_adr[at] + model.tendon_num[at])
                joints, gears = list(model.wrap_objid[wraps]), list(model.actuator_gear[i, 0] * model.wrap_prm[wraps])
            else:
                raise ValueError(f"{self.task.name} cannot be played as a robot: its actuator {i} pulls neither a joint nor a sum of joints")
            for joint, gear in zip(joints, gears, strict=True):
                of_q[i, model.jnt_qposadr[joint]] += gear
                of_v[i, model.jnt_dofadr[joint]] += gear
        return of_q, of_v

    def measured(self, qpos: np.ndarray, qvel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities (..., dof) of the action dimensions."""
        return qpos @ self._q.T, qvel @ self._dq.T


@dataclass
class Episode:
    """What is known of the episode: success (latched, looked at once per control step as in evaluation) and metrics."""

    number: int = 0
    seed: int = 0
    started: int = 0  # physics step
    success_at: float | None = None  # s since the start
    metrics: dict[str, float] = field(default_factory=dict)


class Twin:
    """One simulated robot, at rest in an episode from seed 0. dt: s per physics step, which is also that between setpoints.

    watchdog: s without a packet after which it takes no more until connect().   seconds: after which an episode is over; default the task's max_steps.
    step: physics steps made.   peak: (3, dof) largest commanded velocity, acceleration and jerk of the episode, by finite differences.
    """

    def __init__(self, task: Task, *, watchdog: float = 0.1, seconds: float | None = None) -> None:
        self.task, self.body, self.watchdog = task, Body(task), watchdog
        self.dt = float(task.model.opt.timestep)
        self.seconds = task.max_steps / task.fps if seconds is None else seconds
        self.dof = task.action_shape[0]
        self.refused: Counter[str] = Counter()
        self.step, self.episode = 0, Episode(number=-1)
        self._world = np.zeros(1, int)
        self._simulator = Simulator(task.model, 1, substeps=1, threads=1)
        self.connect(0.0)
        self.reset(0)

    def connect(self, now: float) -> None:
        """Listen again, after the watchdog or a stop."""
        self.tripped, self.stopped = False, False
        self.heard: float | None = None

    def hear(self, now: float) -> None:
        """Somebody is there, whatever they say; the watchdog runs from the first setpoints on."""
        if self.heard is not None:
            self.heard = now

    def reset(self, seed: int) -> None:
        """A new episode; the robot stands at its start and is told to stay there."""
        self.state = self.task.reset(seed)
        self._simulator.write(self._world, State.stack([self.state]))
        self.episode = Episode(self.episode.number + 1, seed, self.step)
        self.fault, self.heard, self.peak = "", None, np.zeros((3, self.dof))
        q, _ = self.measured
        self._rows, self._first = np.repeat(q[None], ANCHOR, 0), self.step - ANCHOR
        self._judge()

    def move(self, step: int, anchor: np.ndarray, q: np.ndarray, now: float) -> None:
        """Play q (n, dof) from physics step `step` on. Unplayable, with the reason, leaves everything as it was.

        anchor: (ANCHOR, dof) what is played in the steps before.
        """
        try:
            self._check(step, anchor, q)
        except Unplayable as why:
            self.refused[str(why.args[0])] += 1
            raise
        self._rows, self._first = np.concatenate([self._row(np.arange(self.step - ANCHOR, step)), q]), self.step - ANCHOR
        self.heard = now

    def _check(self, step: int, anchor: np.ndarray, q: np.ndarray) -> None:
        low, high = self.task.action_space.low - 1e-6, self.task.action_space.high + 1e-6
        if self.tripped or self.stopped or self.fault:
            raise Unplayable("fault" if self.fault else "watchdog" if self.tripped else "stopped")
        if anchor.shape != (ANCHOR, self.dof) or q.ndim != 2 or q.shape[1] != self.dof or not len(q):
            raise Unplayable("shape")
        if not (np.isfinite(q).all() and np.isfinite(anchor).all()):
            raise Unplayable("not_finite")
        if ((q < low) | (q > high)).any():
            raise Unplayable("range")
        if step < self.step:
            raise Unplayable("late")
        if step > self.step + AHEAD / self.dt:
            raise Unplayable("early")
        if np.abs(self._row(np.arange(step - ANCHOR, step)) - anchor).max() > 1e-9:
            raise Unplayable("gap")
        if (q[-1] != (q[-2] if len(q) > 1 else anchor[-1])).any():
            raise Unplayable("no_rest")

    def _row(self, steps: np.ndarray) -> np.ndarray:
        """Setpoints (n, dof) of physics steps (n,), played or to be played."""
        return self._rows[(steps - self._first).clip(0, len(self._rows) - 1)]

    def stop(self) -> None:
        """Take no more setpoints until connect(); the braking tail that every packet ends with brings it to rest."""
        self.stopped = True

    def advance(self, now: float) -> np.ndarray:
        """One physics step; the setpoint (dof,) that it played."""
        if self.heard is not None and now - self.heard > self.watchdog:
            self.tripped = True
        last = self._row(np.arange(self.step - ANCHOR, self.step + 1))
        for i, scale in enumerate((self.dt, self.dt**2, self.dt**3)):
            self.peak[i] = np.maximum(self.peak[i], np.abs(np.diff(last, i + 1, axis=0)[-1]) / scale)
        self.step += 1
        if not self.fault:
            new = self._simulator.run(self._world, self.task.control(last[-1:])[:, None])[0, 0]
            if np.isnan(new.qpos).any():
                self.fault = f"{FAULT}: {self._simulator.why(0)}"
            else:
                self.state = new
        if (self.step - self.episode.started) % self.task.substeps == 0:
            self._judge()
        return last[-1]

    def _judge(self) -> None:
        if self.fault:
            return
        _, success, metrics = self.task.outcome(self.state)
        self.episode.metrics = {key: float(value) for key, value in metrics.items()}
        if success and self.episode.success_at is None and self.elapsed <= self.seconds:
            self.episode.success_at = self.elapsed

    @property
    def elapsed(self) -> float:
        """s of the episode."""
        return (self.step - self.episode.started) * self.dt

    @property
    def commanded(self) -> np.ndarray:
        """(dof,) the setpoint played last."""
        return self._row(np.array([self.step - 1]))[0]

    @property
    def rest(self) -> bool:
        """Whether nothing is left to play but standing still."""
        return bool((self._row(np.arange(self.step - ANCHOR, self._first + len(self._rows))) == self._rows[-1]).all())

    @property
    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities (dof,) of the action dimensions."""
        return self.body.measured(self.state.qpos, self.state.qvel)

    def observe(self) -> Obs:
        return self.task.observe(self.state)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a driver must know."""
        return {
            "task": type(self.task).__name__,
            "name": self.task.name,
            "dof": self.dof,
            "dt": self.dt,
            "lower": self.task.action_space.low.tolist(),
            "upper": self.task.action_space.high.tolist(),
            "obs": {key: list(space.shape or ()) for key, space in self.task.observation_space.items()},
            "seconds": self.seconds,
            "watchdog": self.watchdog,
        }

    def close(self) -> None:
        self._simulator.close()

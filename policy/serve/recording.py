"""What a deployed policy sees and what the robot is told, kept as demonstrations: a bridge's own dataset, one frame a policy step."""
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from policy.serve.bridge import Bridge


class Takes(Protocol):
    """policy.data.record.Recorder."""

    def add(self, frame: dict[str, Any]) -> None: ...

    def end(self, *, wait: bool = True) -> None: ...

    def cancel(self) -> None: ...


class Recording:
    """`bridge.watchers.append(Recording(recorder, bridge).watch)`: an episode is from the first plan that moves the robot until it brakes.

    A frame holds the policy's observations at a time t, and as action (dof,) where the joints were commanded to be when the first action of a plan
    made at t would be reached, knot policy steps later; so it is what the robot did, not what a plan wished. A period that was skipped, or a robot
    that refused, is interpolated over.
    keep: state of the robot as it starts to brake -> whether the episode is worth keeping; all are when absent.   trouble: what the disk refused.
    """

    def __init__(self, recorder: Takes, bridge: Bridge, *, keep: Callable[[Any], bool] = lambda state: True):
        self.recorder, self.keep, self.trouble = recorder, keep, ""
        self.dt, self.lag = bridge.execution.dt, bridge.execution.knot * bridge.execution.dt
        self._seen: deque[tuple[float, dict[str, np.ndarray]]] = deque()
        self._told: deque[tuple[float, np.ndarray]] = deque(maxlen=max(8, int(2 * bridge.robot.rate * (self.lag + bridge.period)) + 8))
        self._due, self._frames, self._last = -np.inf, 0, -np.inf

    def watch(self, bridge: Bridge, late: float) -> None:
        """Told of every control period. Never waits for the disk, never raises what it says."""
        try:
            if bridge.supervisor.moves:
                self._take(bridge)
            elif self._frames or self._seen:
                self._end(bridge)
        except ValueError as e:  # of the disk or the dataset: the robot goes on
            self.trouble = str(e)
            self._forget()

    def _take(self, bridge: Bridge) -> None:
        told = bridge.sent + bridge.robot.latency_action
        if not self._told or told > self._told[-1][0]:
            self._told.append((told, bridge.limiter.q.copy()))
        state, seen = bridge.states[-1]
        if state.t > self._last and state.t >= self._due - bridge.period / 2:
            self._last, self._due = state.t, (state.t if self._due == -np.inf else self._due) + self.dt
            self._seen.append((state.t - bridge.robot.latency_obs, {key: np.array(seen[key]) for key in bridge.obs}))
        while self._seen and self._told[-1][0] >= self._seen[0][0] + self.lag:
            t, obs = self._seen.popleft()
            self.recorder.add({**obs, "action": self._commanded(t + self.lag)})
            self._frames += 1

    def _commanded(self, t: float) -> np.ndarray:
        times = np.array([told for told, _ in self._told])
        joints = np.stack([q for _, q in self._told])
        return np.array([np.interp(t, times, joint) for joint in joints.T], np.float32)

    def _end(self, bridge: Bridge) -> None:
        frames, keep = self._frames, self.keep(bridge.state)
        self._forget()
        if frames and keep:
            self.recorder.end(wait=False)
        elif frames:
            self.recorder.cancel()

    def _forget(self) -> None:
        self._seen.clear()
        self._told.clear()
        self._due, self._frames, self._last = -np.inf, 0, -np.inf

"""What happens in an environment, recorded: gymnasium's wrapper around whatever acts in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np

Info = dict[str, Any]


class Takes(Protocol):
    """policy.data.record.Recorder, or anything else that keeps frames."""

    def add(self, frame: Mapping[str, Any]) -> None: ...

    def end(self) -> None: ...

    def cancel(self) -> None: ...


def everything(info: Info) -> bool:
    return True


def successes(info: Info) -> bool:
    """Of an environment that says info["success"] or "is_success" with its last step."""
    return bool(info.get("success", info.get("is_success", False)))


class Record(gymnasium.Wrapper):
    """env as before; every episode that ends goes to recorder, step by step: what was observed before the action, the action, its reward.

    keep: info of the last step -> whether the episode is worth keeping: `everything`, `successes`, or your own. Success may come early in an
    environment that goes on: it counts at any step, with info["success"] of the last one set.
    cut: what is left by reset or close before its end is kept too, if it was cut and `keep` says so; forgotten otherwise.
    A Dict observation is recorded under its own keys, any other as "obs"; Discrete actions as integers. ValueError where a key would be
    "action" or "reward".
    """

    def __init__(self, env: gymnasium.Env, recorder: Takes, *, keep: Callable[[Info], bool] = everything, cut: bool = False) -> None:
        super().__init__(env)
        self.recorder, self.keep, self.cut = recorder, keep, cut
        space = env.observation_space
        self.named = isinstance(space, gymnasium.spaces.Dict)
        keys = set(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {"obs"}
        if taken := keys & {"action", "reward"}:
            raise ValueError(f"an observation is called {sorted(taken)[0]!r}, as a recording calls the action or the reward: rename it with a wrapper")
        self._seen: Any = None
        self._frames, self._success = 0, False
        self._info: Info = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        self._finish(self.cut)
        self._seen, info = self.env.reset(seed=seed, options=options)
        return self._seen, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        seen = self._seen if self.named else {"obs": self._seen}
        frame = {key: np.array(x) for key, x in seen.items()}  # copied: some environments write the next observation into the last one
        self._seen, reward, terminated, truncated, info = self.env.step(action)
        self.recorder.add({**frame, "action": np.asarray(action), "reward": np.float32(reward)})
        self._frames, self._success, self._info = self._frames + 1, self._success or successes(info), info
        if terminated or truncated:
            self._finish(True)
        return self._seen, reward, terminated, truncated, info

    def close(self) -> None:
        self._finish(self.cut)
        super().close()

    def _finish(self, whole: bool) -> None:
        if not self._frames:
            return
        if whole and self.keep({**self._info, "success": self._success}):
            self.recorder.end()
        else:
            self.recorder.cancel()
        self._frames, self._success, self._info = 0, False, {}

"""A small deterministic environment that fails as told from chosen seeds. It imports no more than a worker needs."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

LENGTH = 20


class Faulty(gymnasium.Env):
    """A point pushed about: its moves depend on all that came before, through a random stream. Ends when it comes near the origin."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    name = "faulty"

    def __init__(self, faults: dict[int, str] | None = None, at: int = 11, box: bool = False, render_mode: str | None = None) -> None:
        """faults: {seed: what happens in step `at` of its episode; at=0 is its reset}."""
        self.faults, self.at, self.box, self.render_mode = faults or {}, at, box, render_mode
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        each = {"place": spaces.Box(-np.inf, np.inf, (2,), np.float32), "speed": spaces.Box(-np.inf, np.inf, (1,), np.float64)}
        self.observation_space = each["place"] if box else spaces.Dict(each)
        self.place = np.zeros(2, np.float32)  # always the same array

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.seed, self.elapsed = seed, 0
        self.place[:] = self.np_random.uniform(1, 2, 2) if options is None else options["place"]
        self.fail()
        return self.see(), {"success": False, "distance": float(np.linalg.norm(self.place))}

    def step(self, action):
        self.elapsed += 1
        self.place += 0.2 * np.asarray(action) + self.np_random.normal(0, 0.02, 2).astype(np.float32)
        self.fail()
        distance = float(np.linalg.norm(self.place))
        info = {"success": distance < 0.5, "distance": distance, "torch": "torch" in sys.modules, "note": "words are no metric"}
        reward = np.inf if self.told() == "reward" else -distance
        return self.see(), reward, distance < 0.5, self.elapsed >= LENGTH, info

    def see(self):
        place = self.place * np.nan if self.told() == "nan" else self.place
        return place if self.box else {"place": place, "speed": np.array([self.np_random.normal()])}

    def told(self) -> str | None:
        return self.faults.get(self.seed) if self.elapsed == self.at else None

    def fail(self) -> None:
        match self.told():
            case "raise":
                raise ZeroDivisionError("the gripper fell off")
            case "sleep":
                while True:
                    time.sleep(0.01)
            case "sleep in C":
                while True:
                    ctypes.PyDLL(None).sleep(1000)  # does not release the GIL
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "exit":
                raise SystemExit("bye")

    def close(self):
        if self.faults.get(-1) == "close":
            raise RuntimeError("it will not close either")

    def render(self):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[:, : int(8 * self.place[0])] = 255
        return frame


class Forgetful(Faulty):
    """Starts elsewhere every time, whatever the seed."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed, options={"place": np.random.default_rng().uniform(1, 2, 2)})


def broken() -> gymnasium.Env:
    raise ImportError("no module named robots")


gymnasium.register("dipole-test/Faulty-v0", Faulty, max_episode_steps=7)

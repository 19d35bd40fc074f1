"""A planner that dances around a home position in closed form, for both simulated robots; python -m tests.serve.dance ROBOT|CARD [PORT] serves it.

`fast` dances as fast as the limits nearly allow, so that braking takes its time.
"""
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from policy.serve.card import Card
from policy.serve.robot import RobotSpec

CONF = Path(__file__).parents[2] / "conf" / "robot"
# q: observations that, joined and scaled, are the joints.   w: rad/s of the wave.   gain: share of the way there in one action, at most `most`.
GANTRY = {"q": ["hand", "opening"], "scale": [1.0, 0.5], "home": [0.0, 0.0, 0.15, 0.02], "amplitude": [0.1, 0.1, 0.05, 0.01], "most": 0.02, "gain": 0.3,
          "w": 1.2}
PANDA = {"q": ["joints", "opening"], "scale": [1.0, 1.0], "home": [0.0, 0.06, 0.0, -2.0, 0.0, 2.3, 0.785, 0.04], "amplitude": [0.2] * 7 + [0.01], "most": 0.02,
         "gain": 0.3, "w": 2.0}
FAST = {"gantry": {"amplitude": [0.12, 0.12, 0.05, 0.01], "most": 0.12, "gain": 0.8, "w": 6.0},
        "panda_pick": {"amplitude": [0.3] * 7 + [0.01], "most": 0.07, "gain": 0.8, "w": 6.0}}
CARDS = {"gantry": Card("dance", "Gantry", {"hand": (3,), "opening": (1,)}, 2, 10, 4, 0.1, committed=10, facts=GANTRY),
         "panda_pick": Card("dance", "PandaPick", {"joints": (7,), "opening": (1,)}, 2, 16, 8, 0.05, committed=16, facts=PANDA)}


def node(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return found


def spec(name: str) -> RobotSpec:
    return RobotSpec(**{k: v for k, v in node(name)["spec"].items() if k != "_target_"})


def goal(card: Card, t: np.ndarray) -> np.ndarray:
    """Where to be at t (n,) s, (n, dof)."""
    f = card.facts
    return np.array(f["home"]) + np.array(f["amplitude"]) * np.sin(f["w"] * t[:, None] + np.arange(card.action_dim))


def plan(card: Card, obs: Mapping[str, np.ndarray], now: float) -> np.ndarray:
    """(horizon, dof) gently from where the robot is."""
    x, rows = np.concatenate([obs[k][-1] * s for k, s in zip(card.facts["q"], card.facts["scale"], strict=True)]), []
    for to in goal(card, now + card.dt * np.arange(1, card.horizon + 1)):
        x = x + np.clip(card.facts["gain"] * (to - x), -card.facts["most"], card.facts["most"])
        rows.append(x)
    return np.array(rows)


class Dance:
    """policy.serve.card.Backend."""

    def __init__(self, card: Card):
        self.card = card

    def plan(self, obs: Mapping[str, np.ndarray], **request: Any) -> np.ndarray:
        return plan(self.card, obs, time.monotonic())


def main(card: str, port: str = "0") -> None:
    from policy.serve.entrance import Entrance
    from policy.serve.server import PlannerServer
    PlannerServer(Dance(CARDS[card] if card in CARDS else Card.from_json(json.loads(card))), Entrance(port=int(port))).run(lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])

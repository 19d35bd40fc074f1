"""What a robot needs of the model that is to move it. numpy only."""
from collections.abc import Mapping
from dataclasses import dataclass

from policy.serve.card import Card


class WrongRobot(ValueError):
    """A model was made for another robot; the text names the differences."""


@dataclass(frozen=True)
class Expect:
    """What is left out is not asked for.   obs: {key: shape of one step} that the robot can provide.   dt: s between actions."""
    dof: int | None = None
    dt: float | None = None
    obs: Mapping[str, tuple[int, ...]] | None = None
    task: str = ""
    model_id: str = ""
    merge: str = ""

    def differences(self, card: Card) -> str:
        """What of this the model does not offer; '' when it fits."""
        wrong = []
        if self.task and card.task != self.task:
            wrong.append(f"it was trained for {card.task or 'an unnamed task'}, the robot's task is {self.task}")
        if self.dof is not None and card.action_dim != self.dof:
            wrong.append(f"its actions have {card.action_dim} dimensions, the robot {self.dof} joints")
        if self.dt is not None and abs(card.dt - self.dt) > 1e-6:
            wrong.append(f"its actions are {card.dt:g} s apart, the robot expects {self.dt:g} s")
        if self.obs is not None:
            wrong += [f"it sees {key!r} of shape {tuple(size)}, the robot has {tuple(self.obs[key]) if key in self.obs else 'none'}"
                      for key, size in card.obs.items() if tuple(self.obs.get(key, (-1,))) != tuple(size)]
        if self.model_id and card.model_id != self.model_id:
            wrong.append(f"it is model {card.model_id}, expected is {self.model_id}")
        if self.merge and self.merge not in card.merges:
            wrong.append(f"it does not plan with merge {self.merge}, but with {', '.join(card.merges)}")
        return "; ".join(wrong)

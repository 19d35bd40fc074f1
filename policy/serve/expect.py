"""What a robot needs of the model that is to move it. numpy only."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policy.serve.card import Card
from policy.serve.robot import RobotSpec


class WrongRobot(ValueError):
    """A model was made for another robot; the text names the differences."""


@dataclass(frozen=True)
class Expect:
    """What is left out is not asked for.   obs: {key: shape of one step} that the robot can provide.   dt: s between actions.   task: compared without case,
    spaces, - and _; a model that names none passes, as does one that does not know its joints.   joints, units: of the robot, one for each action dimension.
    """
    dof: int | None = None
    dt: float | None = None
    obs: Mapping[str, tuple[int, ...]] | None = None
    task: str = ""
    model_id: str = ""
    merge: str = ""
    joints: Sequence[str] = ()
    units: Sequence[str] = ()

    @classmethod
    def of(cls, robot: RobotSpec) -> "Expect":
        """What any model that is to move this robot must fit."""
        return cls(robot.dof, task=robot.task, joints=tuple(robot.joints), units=tuple(robot.units))

    def differences(self, card: Card) -> str:
        """What of this the model does not offer; '' when it fits."""
        wrong = []
        if self.task and card.task and plain(card.task) != plain(self.task):
            wrong.append(f"it was trained for {card.task}, the robot's task is {self.task}")
        if self.dof is not None and card.action_dim != self.dof:
            wrong.append(f"it plans {card.action_dim} action dimensions{named(card.joints)}, the robot has {self.dof} joints{named(self.joints)}")
        elif set(card.joints) == set(self.joints) and tuple(card.joints) != tuple(self.joints):
            wrong.append(f"its action dimensions are{named(card.joints)}, in another order than the robot's joints{named(self.joints)}")
        elif self.units and card.joint_units and tuple(card.joint_units) != tuple(self.units):
            wrong.append(f"its actions are in {', '.join(card.joint_units)}, the robot's joints in {', '.join(self.units)}")
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


def plain(task: str) -> str:
    """panda_pick, PandaPick and "Panda pick" are one task."""
    return "".join(c for c in task.lower() if c not in " _-")


def named(each: Sequence[str]) -> str:
    return f" ({', '.join(each)})" if each else ""

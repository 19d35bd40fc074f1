"""ROS 2 bags, .mcap and .db3, one or a folder of them: each is an episode, its topics brought to steps at a rate.

`options:` of a mapping, all but the rate may be left out:

  fps: 20                 # Hz; the same as fps=20
  clock: header           # header: stamps of the messages, of receipt where a type has none (and of trajectories); receive: of receipt, for all
  topics: [/joint_states, /camera/image_raw]        # null: all of known types; or, with more to say about each:
  topics:
    /joint_states: {joints: [panda_joint1, panda_joint2], fields: [position]}  # their order, whatever a message's; which of its arrays
    /gripper/width: {how: linear}                                              # linear or hold, where a type does not tell
  gap: 0.5                # s; a pause of measurements or images longer than this …
  on_gap: error           # … is an error; split: ends the episode and begins another after it
  damaged: error          # keep: take what comes before the damage of a truncated bag

Steps lie where all topics overlap. Measurements are interpolated between two messages (orientations along the arc), commands, counters and images hold
their latest value. Keys are topic/field, such as joint_states/position. Message definitions in a bag are not used: the standard types are known.
"""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.convert import bag_files, bag_types
from policy.data.convert.bag_episodes import Reader, Topic, episodes
from policy.data.convert.bag_files import Bag
from policy.data.convert.source import Source
from policy.data.files import DataError
from policy.data.semantics import Semantics

COMMANDS = ("command", "cmd", "action", "target", "desired", "setpoint")  # in the name of a topic


def detects(path: Path) -> bool:
    return bag_files.has_bags(path)


@dataclass
class Seen:
    """What a bag holds of a topic."""
    type: str
    count: int = 0
    first: bytes = b""
    begin: int = 0
    end: int = 0
    joints: dict[str, None] = field(default_factory=dict)
    fields: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{self.type}, {self.count} messages" + (f", {(self.count - 1) / (self.end - self.begin) * 1e9:.4g} Hz" if self.end > self.begin else "")


def read(path: Path, *, fps: float | None = None, clock: str = "header", topics: Sequence[str] | Mapping[str, Any] | None = None, gap: float = 0.5,
         on_gap: str = "error", damaged: str = "error") -> Source:
    """DataError: a damaged bag, topics that do not overlap, pauses, a topic of an unknown type or that is not in every bag."""
    for name, value, known in (("clock", clock, ("header", "receive")), ("on_gap", on_gap, ("error", "split")), ("damaged", damaged, ("error", "keep"))):
        if value not in known:
            raise ValueError(f"{name} of a bag is {' or '.join(known)}, got {value!r}")
    if not gap > 0:
        raise ValueError(f"gap is a time in s above 0, got {gap!r}")
    bags, notes = bag_files.find(path), list[str]()
    notes += [bag.note for bag in bags if bag.note]
    reader = Reader(float(fps or 0), clock, gap, on_gap, damaged, notes)
    seen = _survey(bags[0], reader)
    if not fps or not math.isfinite(fps) or fps <= 0:
        table = "".join(f"\n  {name}: {s}" for name, s in seen.items())
        raise DataError(f"{bags[0].path} holds topics of many rates; say at which one steps are wanted: fps=20 (Hz), and which topics where not all of "
                        f"them: options: {{topics: […]}}. There are:{table}")
    reader.topics = _chosen(bags[0], seen, topics, reader)
    schema = {t.key(part): t.shape[part] for t in reader.topics.values() for part in t.fields}
    units = {t.key(part): unit for t in reader.topics.values() for part in t.fields if (unit := _unit(t, part))}
    action, semantics = _action(reader.topics)
    measured = [t.key(p) for t in reader.topics.values() for p in t.fields if t.how[p] in (bag_types.LINEAR, bag_types.SLERP) and t.key(p) != action]
    attrs = {"names": {t.key(p): t.joints for t in reader.topics.values() for p in t.fields if t.joints}, "clock": clock}
    keep = {} if on_gap == "split" else {"episodes": [{"bag": bag.path.name} for bag in bags]}
    return Source(path, "rosbag", schema, partial(episodes, bags, reader), len(bags), fps=float(fps), units=units, action=action, semantics=semantics,
                  attrs=attrs, notes=notes, keep=keep, obs=measured or None)


def _unit(topic: Topic, part: str) -> str:
    if topic.how[part] == bag_types.IMAGE:
        return {"uint16": "mm", "float32": "m"}.get(str(topic.shape[part][1]), "")  # 16UC1 and 32FC1 depth by REP 118
    return bag_types.TYPES[topic.type].fields[part][1]


def _survey(bag: Bag, reader: Reader) -> dict[str, Seen]:
    """What is in a bag, by topic; one pass over it."""
    seen: dict[str, Seen] = {}
    for raw in bag_files.messages(bag, damaged=reader.damaged):
        s = seen.setdefault(raw.topic, Seen(raw.type, first=raw.data, begin=raw.received, end=raw.received))
        s.count, s.begin, s.end = s.count + 1, min(s.begin, raw.received), max(s.end, raw.received)
        kind = bag_types.TYPES.get(raw.type)
        if kind and kind.joints:
            message = reader.decoder.message(raw.type, raw.data, f"a message of {raw.topic} in {bag.path}")
            names = list(getattr(message, kind.joints))
            s.joints |= dict.fromkeys(names)
            s.fields |= {k for k, x in kind.values(message).items() if len(x) == len(names) and names}
    if not seen:
        raise DataError(f"{bag.path} holds no messages. Remove it, or record it again")
    return seen


def _chosen(bag: Bag, seen: Mapping[str, Seen], topics: Sequence[str] | Mapping[str, Any] | None, reader: Reader) -> dict[str, Topic]:
    if isinstance(topics, str) or not (topics is None or all(isinstance(t, str) for t in topics)):
        raise ValueError(f"topics is a list of names such as [/joint_states], or {{name: {{…}}}}, got {topics!r}")
    table = "".join(f"\n  {name}: {s}" for name, s in seen.items())
    asked: dict[str, Any] = dict(topics) if isinstance(topics, Mapping) else dict.fromkeys(topics or (), None)
    for name in asked:
        if name not in seen:
            raise ValueError(f"topics: {name!r} is not in {bag.path}. There are:{table}")
        if seen[name].type not in bag_types.TYPES:
            raise DataError(f"{name} is a {seen[name].type}, which is not read; known are {', '.join(sorted(bag_types.TYPES))}. "
                            "Leave it out, or publish its numbers as std_msgs/msg/Float64MultiArray")
    if topics is None:
        odd = [name for name, s in seen.items() if s.type not in bag_types.TYPES or s.count < 2]
        asked = {name: None for name in seen if name not in odd}
        reader.notes += [f"{name} is left out: {seen[name]}" + ("" if seen[name].type in bag_types.TYPES else ", a type that is not read") for name in odd]
    if not asked:
        raise DataError(f"{bag.path} holds no topic that can be read. There are:{table}")
    return {name: _topic(name, seen[name], said, bag, reader) for name, said in asked.items()}


def _topic(name: str, seen: Seen, said: Any, bag: Bag, reader: Reader) -> Topic:
    said, kind = dict(said or {}), bag_types.TYPES[seen.type]
    if unknown := sorted(set(said) - {"joints", "fields", "how"}):
        raise ValueError(f"topics: {name} has no entry {unknown[0]!r}; it takes joints, fields and how")
    where = f"{name} in {bag.path}"
    message = reader.decoder.message(seen.type, seen.first, f"the first message of {where}")
    have = kind.values(message)
    fields = [part for part in kind.fields if not kind.joints or part in seen.fields]
    if said.get("fields") is not None:
        if wrong := [f for f in said["fields"] if f not in fields]:
            raise ValueError(f"topics: {name} holds no {wrong[0]!r}; it has {', '.join(filter(None, fields)) or 'one value a message'}")
        fields = list(said["fields"])
    if not fields:
        raise DataError(f"{where}: its messages hold no joints with values. Leave it out with options: {{topics: […]}}")
    joints = list(said.get("joints") or seen.joints) if kind.joints else []
    if absent := [j for j in joints if j not in seen.joints]:
        raise ValueError(f"topics: {name} has no joint {absent[0]!r}; it has {', '.join(seen.joints)}")
    how = {part: kind.fields[part][0] for part in fields}
    if said.get("how") is not None:
        if said["how"] not in (bag_types.LINEAR, bag_types.HOLD) or bag_types.IMAGE in how.values():
            raise ValueError(f"topics: how of {name} is linear or hold, and pictures are always held; got {said['how']!r}")
        how = {part: h if h == bag_types.SLERP and said["how"] == bag_types.LINEAR else said["how"] for part, h in how.items()}
    topic = Topic(name, seen.type, fields, how, joints=joints)
    for part in fields:
        topic.shape[part] = ((len(joints),), np.dtype("float64")) if kind.joints else (have[part].shape, have[part].dtype)
        if how[part] == bag_types.LINEAR and topic.shape[part][1].kind != "f":
            raise ValueError(f"topics: {name} holds {topic.shape[part][1]}, which cannot be interpolated; use how: hold")
    return topic


def _action(topics: Mapping[str, Topic]) -> tuple[str | None, Semantics]:
    """The one command among the topics, if there is one: a trajectory, or a topic named like one."""
    found = [(t, p) for t in topics.values() for p in t.fields[:1] if t.how[p] != bag_types.IMAGE and len(t.shape[p][0]) == 1
             and ("JointTrajectory" in t.type or any(word in t.name.lower() for word in COMMANDS))]
    if len(found) != 1:
        return None, Semantics()
    topic, part = found[0]
    for p in topic.fields:
        topic.how[p] = bag_types.HOLD  # what was commanded last
    if topic.joints:
        of = next((t for t in topics.values() if t is not topic and "position" in t.fields and set(topic.joints) <= set(t.joints)), None)
        take = None if of is None or of.joints == topic.joints else tuple(of.joints.index(j) for j in topic.joints)
        text = f"joint positions commanded on {topic.name}, the latest at each step"
        return topic.key(part), Semantics("absolute", "joint", of.key("position") if of else None, take, text=text)
    kind = {"linear": "velocity", "force": "effort", "position": "absolute"}.get(part, "unknown")
    return topic.key(part), Semantics(kind, text=f"{topic.type} commanded on {topic.name}, the latest at each step")

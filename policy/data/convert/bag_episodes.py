"""A bag's messages as episodes: collected by topic, laid on steps, pictures decoded last and only those that are shown."""
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from policy.data.convert import bag_files, bag_time, bag_types
from policy.data.convert.bag_files import Bag
from policy.data.convert.bag_time import Series
from policy.data.convert.source import Episode
from policy.data.files import DataError


@dataclass
class Topic:
    """One topic that is read: how {field: …} and shape {field: (shape, dtype)} of its fields; joints in their order, where it has some."""
    name: str
    type: str
    fields: list[str]
    how: dict[str, str]
    shape: dict[str, tuple[tuple[int, ...], np.dtype]] = field(default_factory=dict)
    joints: list[str] = field(default_factory=list)

    def key(self, part: str) -> str:
        return "/".join(filter(None, (self.name.strip("/"), part)))


@dataclass
class Reader:
    """The options of `read`, checked, and the topics."""
    fps: float
    clock: str
    gap: float
    on_gap: str
    damaged: str
    notes: list[str]
    topics: dict[str, Topic] = field(default_factory=dict)
    decoder: bag_types.Decoder = field(default_factory=bag_types.Decoder)


def episodes(bags: Sequence[Bag], reader: Reader) -> Iterator[Episode]:
    """Each bag's episodes, one after the other."""
    for bag in bags:
        try:
            yield from _bag(bag, reader)
        except DataError as e:
            raise e if str(bag.path) in str(e) else DataError(f"{bag.path}: {e}") from e


def _stamp(reader: Reader, raw: bag_files.Raw) -> int:
    if reader.clock == "receive" or not bag_types.stamped(raw.type):
        return raw.received
    stamp = bag_types.stamp(raw.data)
    if not stamp:
        raise DataError(f"a message of {raw.topic} has no stamp in its header. Use options: {{clock: receive}}")
    return stamp


def _bag(bag: Bag, reader: Reader) -> Iterator[Episode]:
    """The episodes of one bag, of which the pictures are decoded in a second pass, once it is known which are needed."""
    series = {t.key(p): Series(t.how[p]) for t in reader.topics.values() for p in t.fields}
    for raw in bag_files.messages(bag, damaged=reader.damaged, notes=reader.notes):
        if topic := reader.topics.get(raw.topic):
            _add(series, topic, raw, _stamp(reader, raw), reader, bag)
    if empty := [key for key, s in series.items() if not s.stamps]:
        raise DataError(f"{bag.path} holds no messages for {empty[0]}, which the first bag has. Leave that topic out with topics: […], or this bag")
    sorted_times = {key: s.times(key, reader.gap) for key, s in series.items()}
    channels = {key: _channels(series[key], *sorted_times[key], key) for key in series}
    watched = [key for key, s in series.items() if s.how != bag_types.HOLD]
    grids = bag_time.grids({k: [t for t, _ in c] for k, c in channels.items()}, reader.fps, reader.gap, watched, reader.on_gap)
    if len(grids) > 1:
        reader.notes.append(f"{bag.path.name} has pauses of more than {reader.gap:g} s and became {len(grids)} episodes")
    for grid in grids:
        episode = {key: _values(s, channels[key], grid) for key, s in series.items() if s.how != bag_types.IMAGE}
        wanted = {key: channels[key][0][1][bag_time.held(channels[key][0][0], grid)] for key, s in series.items() if s.how == bag_types.IMAGE}
        yield {**episode, **_pictures(bag, reader, wanted, len(grid))}


def _add(series: Mapping[str, Series], topic: Topic, raw: bag_files.Raw, stamp: int, reader: Reader, bag: Bag) -> None:
    if topic.how[topic.fields[0]] == bag_types.IMAGE:
        return series[topic.key("")].add(stamp, np.empty(0))  # decoded later
    kind = bag_types.TYPES[topic.type]
    message = reader.decoder.message(raw.type, raw.data, f"a message of {raw.topic} in {bag.path}")
    have = kind.values(message)
    at = {name: i for i, name in enumerate(getattr(message, kind.joints))} if kind.joints else {}
    for part in topic.fields:
        x, key, mask = have[part], topic.key(part), None
        if kind.joints:
            if len(x) != len(at):
                continue  # a message may leave an array out
            mask = np.array([j in at for j in topic.joints])
            x = np.array([x[at[j]] if j in at else np.nan for j in topic.joints])
            if not mask.any():
                continue
        elif x.shape != topic.shape[part][0]:
            raise DataError(f"{key} changes its shape from {topic.shape[part][0]} to {x.shape}. Leave the topic out, or record it with one")
        series[key].add(stamp, x, None if mask is None or mask.all() else mask)


def _channels(s: Series, t: np.ndarray, order: np.ndarray, key: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """[(stamps, index of the message)], one for all channels, or one each where messages bring some of them."""
    if all(m is None for m in s.masks):
        return [(t, order)]
    full = np.stack([np.ones(len(s.values[0]), bool) if m is None else m for m in s.masks])
    every = np.array(s.stamps, np.int64)
    out = []
    for c in range(full.shape[1]):
        has = np.flatnonzero(full[:, c])
        has = has[np.argsort(every[has], kind="stable")]
        if not len(has):
            raise DataError(f"no message brings channel {c} of {key}. Leave that joint out with joints: […]")
        last = np.append(np.diff(every[has]) > 0, True)  # of equal stamps the last message counts
        out.append((every[has][last], has[last]))
    return out


def _values(s: Series, channels: list[tuple[np.ndarray, np.ndarray]], grid: np.ndarray) -> np.ndarray:
    x = np.stack(s.values)
    if len(channels) == 1:
        return _at(s.how, *channels[0], x, grid)
    return np.stack([_at(s.how, t, i, x[:, c], grid) for c, (t, i) in enumerate(channels)], 1)


def _at(how: str, t: np.ndarray, index: np.ndarray, x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    if how == bag_types.HOLD:
        return x[index[bag_time.held(t, grid)]]
    return (bag_time.slerp if how == bag_types.SLERP else bag_time.linear)(t, x[index], grid)


def _pictures(bag: Bag, reader: Reader, wanted: Mapping[str, np.ndarray], n: int) -> Episode:
    """wanted {key: number of the message (n,) among those of its topic} -> {key: (n, h, w, c)}"""
    topics = {t.name: t for t in reader.topics.values() if t.key("") in wanted}
    out = {t.key(""): np.empty((n, *t.shape[""][0]), t.shape[""][1]) for t in topics.values()}
    places = {name: _where(wanted[t.key("")]) for name, t in topics.items()}
    count = dict.fromkeys(topics, -1)
    for raw in bag_files.messages(bag, damaged=reader.damaged) if topics else ():
        topic = topics.get(raw.topic)
        if topic is None:
            continue
        count[raw.topic] += 1
        steps = places[raw.topic].get(count[raw.topic])
        if not steps:
            continue
        message = reader.decoder.message(raw.type, raw.data, f"an image of {raw.topic} in {bag.path}")
        x = bag_types.TYPES[raw.type].values(message)[""]
        if (x.shape, x.dtype) != topic.shape[""]:
            raise DataError(f"{raw.topic} changes from {topic.shape['']} to {x.shape} {x.dtype} at step {steps[0]}. Leave the topic out, or record it "
                            "with one size")
        out[topic.key("")][steps] = x
    return out


def _where(index: np.ndarray) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for step, i in enumerate(index.tolist()):
        found.setdefault(i, []).append(step)
    return found

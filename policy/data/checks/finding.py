"""What a check says: one Finding for each fault and key, with the places it was seen at, why it hurts and what to type."""
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SEVERITIES = ("error", "warning", "note")  # error: do not train on this.   warning: it costs success.   note: true, and often meant
LONG = 40     # episodes in a command to copy
PLACES = 500  # kept per finding, spread over the dataset; `count` is the whole number


@dataclass(frozen=True)
class Place:
    """Steps [lo, hi) of an episode; channel None is all of them.   text: the numbers seen there."""
    episode: int
    lo: int
    hi: int
    channel: int | None = None
    text: str = ""

    def __str__(self) -> str:
        steps = f"step {self.lo}" if self.hi - self.lo <= 1 else f"steps {self.lo} to {self.hi - 1}"
        return f"episode {self.episode}, {steps}" + (f" ({self.text})" if self.text else "")


@dataclass(frozen=True)
class Finding:
    """severity, one of SEVERITIES; code, a word to look for; key and its channels (): all, or none in particular.

    text: what was seen, with numbers.   why: what it does to training or to a robot.   fix: a command, a setting, or what to look at.
    places: where, in the order of the dataset, at most PLACES.   count: how many there are.
    """
    severity: str
    code: str
    text: str
    why: str
    fix: str
    key: str = ""
    channels: tuple[int, ...] = ()
    places: tuple[Place, ...] = ()
    count: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def where(self) -> str:
        """`key[0, 2]`, the key alone, or ''."""
        return self.key + (f"[{shortened(self.channels)}]" if self.channels else "")


def finding(severity: str, code: str, text: str, *, why: str, fix: str, key: str = "", channels: Iterable[int] = (),
            places: Iterable[Place] = (), count: int | None = None, **numbers: Any) -> Finding:
    """A Finding of any number of places, thinned to PLACES."""
    places = sorted(places, key=lambda p: (p.episode, p.lo, p.hi))
    kept = places if len(places) <= PLACES else [places[i * len(places) // PLACES] for i in range(PLACES)]
    return Finding(severity, code, text, why, fix, key, tuple(sorted({int(c) for c in channels})), tuple(kept),
                   len(places) if count is None else count, numbers)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Worst first, then by code, then by how often."""
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.code, -f.count, f.key))


def shortened(numbers: Sequence[int]) -> str:
    """0, 1, 2, 3, 7 -> 0-3, 7"""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}-{b}" for a, b in runs)


def some(items: Sequence[object], most: int = 3, word: str = "") -> str:
    """The first few in words: `episode 3; episode 5; and 12 more`."""
    more = len(items) - most
    return "; ".join(map(str, items[:most])) + (f"; and {more:,} more{word}" if more > 0 else "")


def trim(path: Path | str, how: str) -> str:
    """The command that makes a better copy of the dataset."""
    return f"dipole data trim src={path} dst={str(path).rstrip('/').removesuffix('.zip').removesuffix('.zarr')}_clean.zarr {how}"


def drop(path: Path | str, places: Iterable[Place]) -> str:
    """The command that leaves out the episodes of these places."""
    episodes = sorted({p.episode for p in places})
    if len(episodes) > LONG:
        return f"leave out these {len(episodes)} episodes (findings.json lists them): {trim(path, 'drop=[…]')}"
    return trim(path, f"drop=[{','.join(map(str, episodes))}]")

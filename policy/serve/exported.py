"""A plan from exported graphs: the solver's loop, what happens to actions and what is promised are numpy around them."""
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy.data.meaning import chain, described
from policy.data.transform import NOTHING, Transform
from policy.serve.card import Card
from policy.serve.solver import Promised, Solver, check_prefix, kept, noises, promised

Graph = Callable[[Mapping[str, np.ndarray]], np.ndarray]
Obs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Host:
    """What an export leaves to numpy.   solver: the sampler's table; warm: its table from the promised plan on (control.warm), None without.   shift, scale:
    (d,) or (t,d); what the network sees of actions is (transform.encode(actions) - shift) / scale.   rtc: as the planner's.
    """
    solver: Solver
    warm: Solver | None
    shift: np.ndarray
    scale: np.ndarray
    transform: Transform = NOTHING
    rtc: int = 0

    def to_json(self) -> dict[str, Any]:
        """ValueError when the transform is none of ours."""
        return {"solver": self.solver.to_json(), "warm": self.warm and self.warm.to_json(), "shift": self.shift.tolist(), "scale": self.scale.tolist(),
                "transform": described(self.transform), "rtc": self.rtc}

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> "Host":
        """KeyError, TypeError or ValueError when it is none."""
        warm = None if d["warm"] is None else Solver.from_json(d["warm"])
        shift, scale = (np.array(d[k], np.float32) for k in ("shift", "scale"))
        return cls(Solver.from_json(d["solver"]), warm, shift, scale, chain(d["transform"]), int(d["rtc"]))

    def encode(self, actions: np.ndarray, obs: Obs, valid: np.ndarray | None = None) -> np.ndarray:
        """Physical actions (p,d) from now on as the network sees them (p,d').   obs: {key: (1, t_obs, *shape)}."""
        x = self.transform.encode(actions[None], obs, valid)[0]
        near: np.ndarray = ((x - _first(self.shift, len(x))) / _first(self.scale, len(x))).astype(np.float32)
        return near

    def decode(self, x: np.ndarray, obs: Obs) -> np.ndarray:
        """The inverse, of a whole chunk."""
        actions: np.ndarray = self.transform.decode((x * self.scale + self.shift)[None], obs)[0].astype(np.float32)
        return actions


class Exported:
    """A Backend of a host's loops around graphs: encoder, step, and guided, time where there are such."""

    def __init__(self, card: Card, host: Host, graphs: Mapping[str, Graph]):
        self.card, self.host, self.graphs, self.lock = card, host, graphs, threading.Lock()
        self.size, self.guidance = (card.horizon, card.action_dim), guidance(card)
        self.loops = [Loop(table, graphs, host.rtc, card.horizon) for table in (host.solver, host.warm) if table is not None]

    def plan(self, obs: Mapping[str, np.ndarray], *, noise: np.ndarray | None = None, prefix: np.ndarray | None = None, committed: int = 0,
             merge: str = "naive") -> np.ndarray:
        """See Backend. noise may also be (1 + draws, *card.noise_size), when the sampler is stochastic and its draws are to be fixed one by one."""
        seen, host, t = self._observed(obs), self.host, self.card.horizon
        known = check_prefix(prefix, committed, merge, size=self.size, merges=tuple(self.card.merges), rtc=host.rtc)
        given, loop, near = noises(noise, self.card.noise_size, host.solver.draws), self.loops[0], None
        if known is not None:
            near = host.encode(known, seen)
            if host.warm is not None:
                whole = np.concatenate([known, np.repeat(known[-1:], t - len(known), 0)])
                given, loop = np.stack([*given[: host.warm.draws], host.encode(whole, seen, np.arange(t)[None] < len(known))]), self.loops[1]
        told = promised(loop.solver, self.card.noise_size, near, committed if near is not None else 0, merge, **self.guidance)
        with self.lock:
            x = loop.walk({f"obs_{k}": v for k, v in seen.items()}, given, told, merge == "guided" and near is not None)
        return kept(host.decode(x, seen), known, committed, merge)

    def _observed(self, obs: Mapping[str, np.ndarray]) -> Obs:
        """{key: (1, t_obs, *shape)} float32. KeyError, ValueError."""
        missing = [k for k in self.card.obs if k not in obs]
        if missing:
            raise KeyError(f"observation lacks {', '.join(missing)} (got {', '.join(obs) or 'nothing'})")
        seen = {}
        for key, size in self.card.obs.items():
            x = np.asarray(obs[key], np.float32)
            if x.shape != (self.card.t_obs, *size):
                raise ValueError(f"observation {key!r} must be ({', '.join(map(str, (self.card.t_obs, *size)))}), got {x.shape}")
            seen[key] = x[None]
        return seen


class Loop:
    """One solver's walk along the graphs."""

    def __init__(self, solver: Solver, graphs: Mapping[str, Graph], rtc: int, horizon: int):
        self.solver, self.encoder, self.step, self.guided, time = solver, graphs["encoder"], graphs["step"], graphs.get("guided"), graphs.get("time")
        self.taus = [np.full((1, horizon) if rtc else (1,), tau, np.float32) for tau in solver.taus]
        self.times = [{} if time is None else {"time": np.array(time({"tau": tau.ravel()[:1]}))} for tau in self.taus]

    def walk(self, seen: Mapping[str, np.ndarray], given: np.ndarray, told: Promised, guided: bool) -> np.ndarray:
        """The normalised plan (t,d).   given: (1 + draws, t, d), see Solver.   guided: the pull goes through the Jacobian."""
        cond, step = np.array(self.encoder(seen)), self.guided if guided else self.step
        assert step is not None  # the card offers no merge without its graph

        def estimate(i: int, x: np.ndarray) -> np.ndarray:
            tau = np.where(told.mask[:, 0], np.float32(0), self.taus[i]) if told.told else self.taus[i]
            return step({"x": x[None], "tau": tau, "cond": cond, "known": told.known[None], "mask": told.mask[None], "pull": told.pull[i: i + 1],
                         **self.times[i]})[0]
        return self.solver.walk(estimate, given)


def guidance(card: Card) -> dict[str, Any]:
    """limit and prior of merge=identity and guided."""
    return {k: float(v) for k, v in dict(card.facts.get("guidance", {})).items() if k in ("limit", "prior")}


def _first(x: np.ndarray, steps: int) -> np.ndarray:
    """Of (t,d) the first steps, of (d,) all."""
    return x[:steps] if x.ndim == 2 else x

"""What an export is worth: its answers beside those of the planner it came from, and how long a plan takes."""
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policy.planner import Planner
from policy.serve.backend import PlannerBackend, drawing, seen_range
from policy.serve.card import Backend

PARITY = 1e-4   # largest difference of a normalised action in fp32, where the policy is not more sensitive than that itself
SENSITIVE = 10  # elsewhere: times the planner's own distance from exact arithmetic
ASKED = 8       # plans for which that is found out, those of the largest differences
Seen = Mapping[str, np.ndarray]  # an observation, {key: (t_obs, *shape)} in physical units


@dataclass
class Difference:
    """Of two ways to plan, over plans. normalised: (plans,) largest of each, in half ranges of the training data.   physical: (d,), in the actions' units.

    own: largest distance of the planner from itself in double precision, 0 where normalised is within PARITY and nobody needs to know.
    """
    normalised: list[float] = field(default_factory=list)
    physical: np.ndarray = field(default_factory=lambda: np.zeros(1))
    own: float = 0.0

    @property
    def excess(self) -> float:
        """Above 1 the two do not plan alike, for rounding does not explain it: it leaves most plans as they are."""
        most = max(self.normalised)
        return most / max(PARITY, SENSITIVE * self.own) if np.median(self.normalised) <= PARITY / 10 else most / PARITY

    def to_json(self) -> dict[str, Any]:
        return {"normalised": max(self.normalised), "median": float(np.median(self.normalised)), "physical": self.physical.tolist(), "own": self.own,
                "excess": self.excess}


def parity(policy: PlannerBackend, backend: Backend, observations: Sequence[Seen], *, draws: int = 0, seed: int = 0) -> dict[str, Difference]:
    """Plans of both from the same observations, noise and promised actions, once with each merge the backend has.

    A policy can be so sensitive that fp32 differs from fp32: eps from alpha = .0005 amplifies rounding 2000 times, and plans that could go either way
    more. So where a difference is above PARITY the planner is asked in double precision how exact it is itself.   draws: of a stochastic sampler.
    """
    card, rng = backend.card, np.random.default_rng(seed)
    size, (low, high) = policy.planner.size, seen_range(policy.planner)
    half = (np.array(high) - np.array(low)) / 2
    found = {merge: Difference(physical=np.zeros(card.action_dim)) for merge in card.merges}
    asked: list[tuple[Seen, np.ndarray, dict[str, Any]]] = []
    before = rng.uniform(low, high, (card.horizon, card.action_dim)).astype(np.float32)
    for obs in observations:
        first = rng.standard_normal(size, np.float32)
        draw = drawing(first)
        noise = np.stack([first, *(draw(torch.empty(size)).numpy() for _ in range(draws))])
        p = int(rng.integers(1, size[0] + 1))
        told: dict[str, Any] = {"prefix": before[-p:], "committed": int(rng.integers(0, min(p, card.committed) + 1))}
        asked.append((obs, noise, told))
        for merge, difference in found.items():
            want = eager(policy, policy.planner, obs, noise, merge=merge, **told)
            got = backend.plan(obs, noise=noise if draws and card.facts.get("format") != "torch" else first, merge=merge, **told)
            apart = np.nan_to_num(np.abs(got - want), nan=np.inf)
            difference.normalised.append(float((apart / half).max()))
            difference.physical = np.maximum(difference.physical, apart.max(0))
        before = want
    if any(max(one.normalised) > PARITY for one in found.values()):
        exact = exactly(policy.planner)
        for merge, one in found.items():
            for i in np.argsort(one.normalised)[-ASKED:] if max(one.normalised) > PARITY else ():
                obs, noise, told = asked[i]
                both = [eager(policy, planner, obs, noise, merge=merge, **told) for planner in (policy.planner, exact)]
                one.own = max(one.own, float((np.abs(both[0] - both[1]) / half).max()))
    return found


def random_observations(planner: Planner, count: int) -> list[dict[str, np.ndarray]]:
    """Within the range of the training data."""
    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        unit = {k: torch.from_numpy(rng.uniform(-1, 1, (1, planner.spec.t_obs, *size)).astype(np.float32)).to(next(planner.normalizer.buffers()))
                for k, size in planner.transform.sizes(planner.spec.obs).items()}
        made.append({k: v[0].cpu().numpy() for k, v in planner.decode_obs(unit).items()})
    return made


@torch.inference_mode()
def eager(policy: PlannerBackend, planner: Planner, obs: Seen, noise: np.ndarray, *, prefix: np.ndarray, committed: int, merge: str) -> np.ndarray:
    """The plan (t,d) of policy's planner, or of its copy in another precision, with every draw given: noise (1 + draws, t, d)."""
    like = next(planner.normalizer.buffers())
    start, drawn = torch.from_numpy(noise[:1]).to(like), iter(torch.from_numpy(noise)[1:, None].to(like))
    plan = planner.plan({k: torch.from_numpy(np.array(obs[k], np.float32))[None].to(like) for k in policy.card.obs}, noise=start,
                        prefix=torch.from_numpy(np.array(prefix, np.float32))[None].to(like), committed=committed, merge=merge, warm=policy.warm,
                        limit=policy.limit, prior=policy.prior, draw=lambda x: next(drawn))
    return plan[0].cpu().numpy()


def exactly(planner: Planner) -> Planner:
    """A copy that computes in double precision, also behind the casts to fp32 that networks have inside."""
    exact = copy.deepcopy(planner).double()

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    for module in exact.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(widen)
    return exact


def race(plans: Mapping[str, Callable[[], Any]], *, rounds: int, each: int = 3, turned: Callable[[], None] = lambda: None) -> dict[str, dict[str, float]]:
    """Milliseconds of every call, in turns of `each`, so that a busy computer is busy for all: {name: cpu_ms, cpu_min_ms, wall_p50_ms, wall_p99_ms}.

    cpu: of all threads of the process. The first turn warms up and does not count.   turned: called after every turn, rounds + 1 times.
    """
    cpu: dict[str, list[float]] = {name: [] for name in plans}
    wall: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, plan in plans.items():
            for _ in range(each):
                c, w = time.process_time(), time.perf_counter()
                plan()
                c, w = time.process_time() - c, time.perf_counter() - w
                if turn:
                    cpu[name].append(1e3 * c)
                    wall[name].append(1e3 * w)
        turned()
    return {name: {"cpu_ms": float(np.median(cpu[name])), "cpu_min_ms": min(cpu[name]), "wall_p50_ms": float(np.median(wall[name])),
                   "wall_p99_ms": float(np.percentile(wall[name], 99)), "plans": len(cpu[name])} for name in plans}

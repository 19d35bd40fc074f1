"""All state of closed-loop control lives here: observation history and the queue of planned actions, for e robots at once."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from policy.planner import Planner
from policy.timeline import CONTINUES, MERGES, Plan, shifted, take_over


class NotFinite(ValueError):
    """A plan holds NaN or infinity. chunk: what `plan` would have returned, zero in the rows at fault;   rows: those, by number of the controller."""

    def __init__(self, chunk: np.ndarray, rows: list[int]):
        super().__init__(f"the plan of rows {rows} is not finite: the checkpoint or the observation holds NaN or infinity")
        self.chunk, self.rows = chunk, rows


class Controller:
    """Receding-horizon control: plan a chunk, execute its first `execute` steps, plan again.

    Robots (or environments) are rows of every array, and each has its own history, plan and noise: what row i does depends only on its
    own observations and seed, never on which other rows are alive.

    delay: simulated latency in control steps. A plan from the observation of step s acts from step s + delay on; until then the plan
    before it goes on. The first plan is made before the clock starts.   align: a late plan is entered at the action meant for that
    step. False starts it at its first action, `delay` steps too late, as a naive robot does. Which is better is the task's: aligned, only
    later actions of plans are executed, the less certain ones; late, nothing is skipped. Where the world waits, late can win (gantry, 200
    seeds, delay 8: 83 % against 69 %, in 34 steps instead of 20); where plans are certain, alignment loses nothing.

    merge: how a plan goes on from the one before it (policy.timeline.MERGES): naive knows nothing of it, ensemble averages, the others are
    planned with it in mind (Planner.plan), `delay` of its steps committed.   warm, limit, prior: as Planner.plan takes them.
    """

    def __init__(self, planner: Planner, *, execute: int = 8, delay: int = 0, align: bool = True, merge: str = "naive", warm: float | None = None,
                 limit: float = 5.0, prior: float = 1.0):
        horizon = planner.spec.horizon
        if type(execute) is not int or not 1 <= execute <= horizon:
            raise ValueError(f"execute={execute!r} must be between 1 and the planner's horizon {horizon}")
        if not isinstance(delay, int) or delay < 0:
            raise ValueError(f"delay={delay!r} must be a whole number of control steps from 0")
        if execute + delay > horizon:
            raise ValueError(f"execute={execute} and delay={delay} need plans of {execute + delay} steps, the planner's horizon is {horizon}: "
                             "lower one of the two, or train with a longer horizon")
        if not isinstance(align, bool):
            raise ValueError(f"control.align={align!r} must be true or false")
        if merge not in MERGES:
            raise ValueError(f"control.merge={merge!r} is unknown; use one of {', '.join(MERGES)}")
        if not align and (merge != "naive" or warm is not None):
            raise ValueError(f"control.align=false starts plans late, so they cannot go on from one another: use control.merge=naive, not {merge}, "
                             "and no warm start, or control.align=true")
        if merge == "prefix" and delay > getattr(planner, "rtc", 0):
            raise ValueError(f"control.merge=prefix with delay={delay} needs a policy trained with train.rtc={delay} or more, and this one has "
                             f"{getattr(planner, 'rtc', 0) or 'none'}: use control.merge=frozen or guided, which need no training")
        self.planner, self.execute, self.delay, self.align, self.merge = planner.eval(), execute, delay, align, merge
        self.options: dict[str, Any] = {"merge": merge, "committed": delay, "warm": warm}
        if merge in ("guided", "identity"):
            self.options |= {"limit": limit, "prior": prior}
        self.goes_on = merge in CONTINUES or warm is not None
        self.device = next(planner.parameters()).device
        self.noise: list[torch.Generator] = []

    def reset(self, seeds: Sequence[int], rows: np.ndarray | None = None) -> None:
        """Start an episode on all rows, or on `rows` (n,) of them: forget history and plan; seeds (n,) fix each row's noise.

        The first observation after a reset fills the whole history.
        """
        if rows is None:
            e, spec = len(seeds), self.planner.spec
            self.history = {k: torch.zeros(e, spec.t_obs, *s) for k, s in spec.obs.items()}
            self.queue, self.left = torch.zeros(e, self.execute, spec.action_dim), torch.zeros(e, dtype=torch.long)
            self.fresh, self.first = torch.ones(e, dtype=torch.bool), torch.ones(e, dtype=torch.bool)
            size = (e, spec.horizon)
            self.acts = Plan(np.zeros((*size, spec.action_dim), np.float32), np.ones(size, np.float32), np.ones(size, np.float32))
            self.noise = [torch.Generator() for _ in seeds]
            rows = np.arange(e)
        elif not self.noise:
            raise RuntimeError("the first reset starts every row: leave out rows")
        if np.asarray(rows).dtype.kind not in "iu":
            raise TypeError(f"rows are indices, got {np.asarray(rows).dtype}; a mask is turned into them by mask.nonzero()[0]")
        if len(rows) != len(seeds):
            raise ValueError(f"{len(seeds)} seeds for {len(rows)} rows")
        for row, seed in zip(rows, seeds, strict=True):
            self.noise[row].manual_seed(int(seed))
        self.fresh[rows], self.first[rows], self.left[rows] = True, True, 0

    def observe(self, obs: dict[str, np.ndarray], rows: np.ndarray | None = None) -> None:
        """Append the newest observations {key: (n, t, *shape)}, oldest first, of `rows` (n,) (all when None)."""
        if not self.noise:
            raise RuntimeError("call reset(seeds) before the first observation")
        missing = [k for k in self.history if k not in obs]
        if missing:
            raise KeyError(f"observation lacks {', '.join(missing)} (got {', '.join(obs) or 'nothing'})")
        at = torch.arange(len(self.noise)) if rows is None else torch.as_tensor(rows)
        for k, h in self.history.items():
            new = torch.as_tensor(np.asarray(obs[k])).to(h.dtype)
            if tuple(new.shape) != (len(at), new.shape[1] if new.ndim > 1 else 0, *h.shape[2:]):
                raise ValueError(f"observation {k!r} must be ({len(at)}, t, {', '.join(map(str, h.shape[2:]))}), got {tuple(new.shape)}")
            old = torch.where(self.fresh[at].reshape(-1, *(1,) * (h.ndim - 1)), new[:, :1].expand(-1, h.shape[1], *h.shape[2:]), h[at])
            h[at] = torch.cat([old, new], 1)[:, -h.shape[1]:]
        self.fresh[at] = False

    @torch.inference_mode()
    def plan(self, rows: np.ndarray | None = None) -> np.ndarray:
        """The next `execute` actions of `rows`, (n, execute, d) in physical units. Raises NotFinite when a plan is not."""
        if not self.noise:
            raise RuntimeError("call reset(seeds), then observe, before the first plan")
        at = torch.arange(len(self.noise)) if rows is None else torch.as_tensor(rows)
        if self.fresh[at].any():
            raise RuntimeError(f"rows {at[self.fresh[at]].tolist()} have observed nothing since their reset: call observe first")
        first, old, chunk = self.first[at].numpy(), self.acts[at.numpy()], np.empty((len(at), *self.acts.actions.shape[1:]), np.float32)
        promised, known = shifted(old.actions, self.execute, chunk.shape[1])
        for some in (first, ~first) if self.goes_on else (np.ones_like(first),):
            if some.any():
                chunk[some] = self._chunk(at[some], promised[some][:, known] if self.goes_on and not first[some].any() else None)
        acts = self._acts(old, chunk, promised, first)
        finite = np.isfinite(acts.actions).all((1, 2))
        acts.actions[~finite] = 0
        for mine, new in ((self.acts.actions, acts.actions), (self.acts.weight, acts.weight), (self.acts.count, acts.count)):
            mine[at.numpy()] = new
        self.first[at] = False
        out = acts.actions[:, : self.execute].copy()
        if not finite.all():
            raise NotFinite(out, at[torch.from_numpy(~finite)].tolist())
        return out

    def _chunk(self, at: torch.Tensor, prefix: np.ndarray | None) -> np.ndarray:
        """A new chunk (n, t, d) for rows `at` from what they saw, going on from prefix (n, p, d) where there is one."""
        spec, generators = self.planner.spec, [self.noise[i] for i in at.tolist()]

        def draw(like: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)

        size = getattr(self.planner, "size", (spec.horizon, spec.action_dim))
        noise = draw(torch.empty(len(at), *size, device=self.device))
        told = {} if prefix is None else {"prefix": torch.from_numpy(prefix).to(self.device), **self.options}
        chunk: np.ndarray = self.planner.plan({k: h[at].to(self.device) for k, h in self.history.items()}, noise=noise, draw=draw, **told).float().cpu().numpy()
        return chunk

    def _acts(self, old: Plan, chunk: np.ndarray, promised: np.ndarray, first: np.ndarray) -> Plan:
        """What acts from now on: the promised (n, t, d) for `delay` steps, then the new chunk as it takes over; a first chunk (rows `first`) at once."""
        due = chunk if self.align else shifted(chunk, -self.delay, chunk.shape[1])[0]
        new = take_over(old, due, self.execute, self.merge)
        late = np.arange(chunk.shape[1])[:, None] < self.delay
        actions = np.where(first[:, None, None], chunk, np.where(late, promised, new.actions))
        return Plan(actions, np.where(first[:, None], 1, new.weight), np.where(first[:, None], 1, new.count))

    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """One control step of all rows: obs {key: (e, *shape)} -> actions (e, d); rows whose queue is empty get a new plan."""
        self.observe({k: np.asarray(v)[:, None] for k, v in obs.items() if k in self.planner.spec.obs})
        empty = (self.left == 0).nonzero().flatten()
        if len(empty):
            self.queue[empty] = torch.from_numpy(self.plan(empty.numpy()))
            self.left[empty] = self.execute
        actions = self.queue[torch.arange(len(self.left)), self.execute - self.left]
        self.left -= 1
        return actions.numpy()

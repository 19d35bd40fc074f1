"""Checks of what the actions mean: when the state follows them, and whether they are targets or changes, in every episode alike."""
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, finding, some
from policy.data.checks.late import Goes, periodic, uneven
from policy.data.checks.look import Data
from policy.data.checks.relate import LEFT, Array, better, changes, correlation, joined, moving_states, rates, shifted
from policy.page import counted

PAST, AHEAD = 8, 24        # lags looked at [steps]
CLEAR, MARGIN = 0.4, 0.05  # a correlation worth a word, and what one lag must be ahead of another by
COPY = 1e-4                # of a state's spread: an action this close to it is a copy
TRACKS = 0.5               # a target stays this close to the state it commands, in spreads of that state; or, where it is scaled,
LEVEL, NEAR = 0.85, 8      # its level goes with that of a state at most so many steps away, clearly better than with any change
DELAY = 0.3                # seconds after which a reaction is worth a note
SURE = 0.15                # by as much one lag leads where the action may answer the state, as a controller's does


@dataclass(frozen=True)
class Pairs:
    """Actions (n, d) and moving state channels (n, s) of the same sampled frames, and what goes with what.

    episode: (n,), which stretch a frame belongs to.   columns: key and channel of each state channel.   lags: (l,), -PAST … AHEAD.
    target, change: (l, d) correlations of each action channel with its best state channel: changes with changes, and the action with changes.
    level: (l, d), of the action with the state itself, of those that are no velocity.   rate: (s,), state channels that are the velocity of others.
    of_target, of_change: (d,) that state channel.   apart: (l, d) rms distance of the action to it, in its spreads.   slope: (d,) of state over action.
    """
    action: Array
    state: Array
    episode: NDArray[np.int64]
    at: NDArray[np.int64]
    columns: list[tuple[str, int]]
    lags: NDArray[np.int64]
    target: Array
    change: Array
    level: Array
    rate: NDArray[np.bool_]
    of_target: NDArray[np.int64]
    of_change: NDArray[np.int64]
    apart: Array
    slope: Array

    @property
    def best(self) -> tuple[Array, Array]:
        """(d,), (d,): how well the level of a state goes with each action channel, and how well the change of one does."""
        return self.level[np.abs(self.lags) <= NEAR].max(axis=0), self.change.max(axis=0)

    @property
    def tracked(self) -> NDArray[np.bool_]:
        """(d,): action channels whose changes a state channel follows."""
        return self.target.max(axis=0) > CLEAR

    @property
    def targets(self) -> NDArray[np.bool_]:
        """(d,): action channels that say where a state channel shall be, in its unit or scaled: as a velocity that is commanded, it would be a change."""
        level, change = self.best
        velocity = self.rate[self.of_target] & better(change, level)
        return (self.tracked & (self.apart.min(axis=0) < TRACKS) & ~velocity) | ((level > LEVEL) & better(level, change))

    @property
    def deltas(self) -> NDArray[np.bool_]:
        """(d,): action channels that say by how much a state channel shall change."""
        level, change = self.best
        return (change > np.maximum(CLEAR, self.target.max(axis=0))) & better(change, level) & ~self.targets


def pairs(data: Data) -> Pairs | None:
    """None where there is no action, or no state that moves."""
    return data.once("pairs", data.action, lambda: matched(data))


def matched(data: Data) -> Pairs | None:
    if not data.action or not data.scales(data.action).moves.any():
        return None
    seen = data.observed | {data.semantics.of or ""}  # what is kept beside it may be the action itself, in its parts
    together = joined(data, {data.action: np.arange(data.width(data.action)), **moving_states(data, seen)})
    d = data.width(data.action)
    if together is None or together.values.shape[1] == d or len(together.values) < 4 * PAST:
        return None
    action, state, episode, at = together.values[:, :d], together.values[:, d:], together.episode, together.at
    lags = np.arange(-PAST, AHEAD + 1)
    da, ds, plain = changes(action, episode), changes(state, episode), action - action.mean(axis=0)
    rate = np.array([rates(data, key)[c] for key, c in together.columns[d:]])
    target = np.stack([correlation(da, ds, episode, int(lag)) for lag in lags])  # (l, d, s)
    level = np.stack([correlation(plain, state - state.mean(axis=0), episode, int(lag)) for lag in lags]) * ~rate
    change = np.abs(np.stack([correlation(plain, ds, episode, int(lag)) for lag in lags]))
    of_target, of_change = target.max(axis=0).argmax(axis=1), change.max(axis=0).argmax(axis=1)
    of_level = level[np.abs(lags) <= NEAR].max(axis=0).argmax(axis=1)
    goal = state[:, of_target]
    spread = goal.std(axis=0) + 1e-12
    apart = np.stack([distance(action, goal, episode, int(lag)) for lag in lags]) / spread
    each = np.arange(d)
    slopes = [slope(da[:, i], ds[:, j], episode, int(lags[target[:, i, j].argmax()])) for i, j in enumerate(of_target)]
    return Pairs(action, state, episode, at, together.columns[d:], lags, target[:, each, of_target], change[:, each, of_change], level[:, each, of_level],
                 rate, of_target, of_change, apart, np.array(slopes))


def distance(a: Array, s: Array, episode: NDArray[np.int64], lag: int) -> Array:
    """(d,): root mean square of a at t minus s at t + lag."""
    i, j = shifted(len(a), lag)
    same = episode[i] == episode[j]
    return np.sqrt(((a[i] - s[j])[same] ** 2).mean(axis=0)) if same.any() else np.full(a.shape[1], np.inf)


def slope(a: Array, s: Array, episode: NDArray[np.int64], lag: int) -> float:
    """Of the changes of s over those of a, as if both had the same noise."""
    i, j = shifted(len(a), lag)
    same = episode[i] == episode[j]
    moving = same & (a[i] != 0)
    return float(s[j][same].std() / a[i][same].std()) if moving.any() else 0.0


def lag_curve(data: Data) -> tuple[str, NDArray[np.int64], Array] | None:
    """("target", "level" or "change", lags, mean correlation over the action channels that are it): what the report draws; None where nothing goes
    together. "level": targets none of whose changes the state follows at once."""
    found = pairs(data)
    if found is None:
        return None
    targets, deltas = found.targets, found.deltas
    if not (targets | deltas).any():
        return None
    if np.maximum(found.target, found.level).max(axis=0)[targets].sum() < found.change.max(axis=0)[deltas].sum():
        return "change", found.lags, found.change[:, deltas].mean(axis=1)
    if (use := targets & found.tracked).any():
        return "target", found.lags, found.target[:, use].mean(axis=1)
    return "level", found.lags, found.level[:, targets].mean(axis=1)


def looks(data: Data) -> dict[str, object]:
    """{looks: absolute, delta or unclear, declared, lag [steps], correlation}; {} where nothing goes together."""
    if (curve := lag_curve(data)) is None:
        return {}
    kind, lags, mean = curve
    best, said = int(lags[mean.argmax()]), data.semantics.kind
    late = kind == "change" and said not in ("delta", "velocity") and not 0 <= best <= NEAR  # as a torque, which is neither
    seen = "unclear" if late or periodic(lags, mean, best) else "delta" if kind == "change" else "absolute"
    return {"looks": seen, "declared": said, "lag": best, "correlation": round(float(mean.max()), 3)}


def lag(data: Data) -> list[Finding]:
    """When the state follows the action: never before it, and in every episode alike."""
    found, curve = pairs(data), lag_curve(data)
    if found is None or curve is None:
        return []
    kind, lags, mean = curve
    use = np.flatnonzero(found.targets & found.tracked if kind == "target" else found.deltas)
    best = int(lags[mean.argmax()])
    if kind == "target" and (copied := copies(data, found, use)):
        return copied
    sure = kind != "change" or data.semantics.kind in ("delta", "velocity")  # an effort may answer the state's change: that is how a controller damps
    other = min(kinds_of_episodes(data).values(), key=len)  # of them it is said that they are of another kind
    if sure and (differ := uneven(data, together(found, kind), other)):
        return differ
    if kind == "level" or periodic(lags, mean, best):
        return []
    fix = later(data, best)
    first = float(mean[lags >= 0].max())
    clear = mean.max() > first + MARGIN or 1 - mean.max() ** 2 < LEFT * (1 - first ** 2)
    if best < 0 and (clear if sure else mean.max() > first + SURE):
        return [finding("error" if sure else "note", "action_lag", f"the action goes best with what the state did {-best} steps before: correlation "
                        f"{mean.max():.2f} there, {first:.2f} at best when the action comes first", key=data.action, channels=use,
                        why="Cause and effect are exchanged: the policy learns to repeat what has happened." if sure else
                        "The data are misaligned, or the action is an effort that answers the motion.", fix=fix, lag=best)]
    late = best / data.fps if data.fps else 0.0
    if kind == "target" and (best > data.horizon / 2 or late > DELAY):
        said = f"{best} steps" + (f" ({late:.2f} s)" if late else "")
        return [finding("note", "action_lag", f"the state follows the action after {said}" + (", or later" if best == AHEAD else ""),
                        key=data.action, channels=use,
                        why="A slow robot, or actions stamped early: the observation shows little of what the newest actions did.",
                        fix="A horizon of several times that lag; and the action as observation, if the robot knows it", lag=best)]
    return []


def together(found: Pairs, kind: str) -> Goes:
    """What an episode's lag is measured by."""
    level = kind == "change"
    use = np.flatnonzero(found.deltas if level else (found.targets & found.tracked) if (found.targets & found.tracked).any() else found.targets)
    of = (found.of_change if level else found.of_target)[use]
    x = found.action[:, use] - found.action[:, use].mean(axis=0) if level else changes(found.action[:, use], found.episode)
    y = changes(found.state[:, of], found.episode)
    best = [int(found.lags[found.change[:, c].argmax()]) for c in use]
    sign = [np.sign(correlation(x[:, [i]], y[:, [i]], found.episode, k)[0, 0]) or 1.0 if level else 1.0 for i, k in enumerate(best)]
    scale = np.stack([np.sqrt((v ** 2).mean(axis=0)) + 1e-300 for v in (x, y)])
    leap = np.maximum(6 * scale, 3 * np.stack([np.quantile(np.abs(v), 0.995, axis=0) for v in (x, y)]))
    return Goes(use, [found.columns[j] for j in of], level, scale, leap, np.array(sign))


def copies(data: Data, found: Pairs, use: NDArray[np.intp]) -> list[Finding]:
    """Action channels that are a state of the same frame or of one before: a part is enough, for the gripper beside it may well be commanded."""
    close = found.apart[:, use] < COPY
    last = np.where(close.any(axis=0), found.lags[len(close) - 1 - close[::-1].argmax(axis=0)], 1)  # of a lag that is ahead there is nothing to say
    copied = use[last <= 0]
    if not len(copied):
        return []
    before, some_of = int(last[last <= 0].max()), len(copied) < len(use)
    what = f"{len(copied)} of {len(use)} channels of the action are copies" if some_of else "the action is a copy"
    return [finding("error" if len(copied) > 1 or not some_of else "warning", "action_lag",
                    f"{what} of the state " + ("of the same frame" if before == 0 else f"{-before} steps before"), key=data.action, channels=copied,
                    why="The policy learns to stay where it is: it reads the answer off its observation.", fix=later(data, before), lag=before)]


def later(data: Data, lag: int) -> str:
    shift = max(1, 1 - lag)
    return f"Check which clock stamped them; to take each action {counted(shift, 'step')} later, convert with action_from: " \
        f"[{{key: {data.action}, shift: {shift}}}] in the mapping"


def meaning(data: Data) -> list[Finding]:
    """Declared targets that are changes, or the other way round; episodes of another kind than the rest."""
    found = pairs(data)
    if found is None:
        return []
    targets, deltas, said = found.targets, found.deltas, data.semantics.kind
    out = []
    gait = (curve := lag_curve(data)) is not None and periodic(curve[1], curve[2], int(curve[1][curve[2].argmax()]))  # a level is a change a quarter later
    if said == "absolute" and deltas.sum() > targets.sum() and not gait:
        out.append(meant(data, deltas, "absolute", "changes of the state", "delta"))
    if said in ("delta", "velocity") and targets.sum() > deltas.sum():
        out.append(meant(data, targets, said, "where the state shall be", "absolute"))
    return [*out, *mixed(data)]


def meant(data: Data, use: NDArray[np.bool_], said: str, seen: str, better: str) -> Finding:
    return finding("error", "action_kind", f"declared as {said}, but {int(use.sum())} channels are {seen}", key=data.action, channels=np.flatnonzero(use),
                   why="Transforms, exports and the robot's driver believe the declaration: a robot would be sent to the wrong place.",
                   fix=f"If the data are right, convert again with action={{kind:{better},…}}")


def kinds_of_episodes(data: Data) -> dict[str, list[int]]:
    """{"targets", "changes": episodes in which half of the action channels clearly are that}"""
    return data.once("kinds", data.action, lambda: sorted_by_kind(data))


def sorted_by_kind(data: Data) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = {"targets": [], "changes": []}
    found = pairs(data)
    if found is None:
        return kinds
    channels = np.arange(found.action.shape[1])
    level = found.of_target
    of_episode = np.searchsorted(data.ends, found.at, side="right")
    for e in np.unique(of_episode).tolist():
        rows = of_episode == e
        if rows.sum() < 2 * PAST:
            continue
        a, s, change = found.action[rows], found.state[rows], changes(found.state[rows], found.episode[rows])
        with np.errstate(invalid="ignore", divide="ignore"):
            at_level = np.nan_to_num([np.corrcoef(a[:, c], s[:, level[c]])[0, 1] for c in channels])
            ratio = np.nan_to_num([s[:, level[c]].std() / a[:, c].std() for c in channels])
            at_change = np.abs(np.nan_to_num([np.corrcoef(a[:-1, c], change[:-1, found.of_change[c]])[0, 1] for c in channels]))
        is_target = (at_level > 0.85) & (ratio > 0.5) & (ratio < 2)
        is_change = (at_change > 0.5) & (at_level < 0.6) & (ratio > 4)
        if is_target.sum() >= 0.5 * len(channels):
            kinds["targets"].append(e)
        elif is_change.sum() >= 0.5 * len(channels):
            kinds["changes"].append(e)
    return kinds


def mixed(data: Data) -> list[Finding]:
    """Episodes whose actions are targets among episodes whose actions are changes."""
    kinds = kinds_of_episodes(data)
    few, many = sorted(kinds, key=lambda k: len(kinds[k]))
    if not kinds[few]:
        return []
    return [finding("error", "action_mixed", f"the actions are {few} in {len(kinds[few])} episodes and {many} in {len(kinds[many])} of "
                    f"{len(data.ends)}: {some(kinds[few], 8)}", key=data.action, places=[Place(e, 0, int(data.lengths[e])) for e in kinds[few]],
                    why="One network cannot tell which of the two is wanted; its answer is something in between.",
                    fix="Convert the two kinds apart, one of them with its transform, and merge them afterwards: dipole data merge")]


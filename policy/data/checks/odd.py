"""Checks of one episode against the others: another scale, noise, an action turned round or exchanged with another, quaternions in another order.

An episode is told only where it lies far outside of all the others and the others agree: people and tasks differ, and that is no fault.
"""
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.actions import kinds_of_episodes
from policy.data.checks.finding import Finding, Place, drop, finding, some
from policy.data.checks.look import Data
from policy.data.checks.relate import Array, changes, correlation, joined, rates
from policy.data.checks.rotation import quaternion_groups
from policy.data.checks.units import between_episodes
from policy.page import counted

LEAST = 5        # episodes: with fewer there is no usual one
SHORT = 12       # frames: shorter episodes are left out
SHARE = 0.2      # of the episodes: where more of them are odd, none is
FAR, ONE = 6, 3  # robust standard deviations from the median, on a logarithmic scale: alone, and of each of several channels
SCALES = {10.0: "centimetres among decimetres, or a gain?", 100.0: "centimetres among metres?", 1000.0: "millimetres among metres?",
          180 / np.pi: "degrees among radians?"}
ALIKE = 2.5      # channels of one episode are scaled alike up to this factor
NOISE = 4        # times as rough as usual, and as the channels beside it are in the same episode
LOUD = 0.005     # of its range, from step to step: less is no noise worth a word
AGREE = 0.6      # correlation with a state that an action has in nearly all episodes (its 10 % quantile): it belongs to it
GAP = 0.25       # of the usual correlation: none of the other episodes is below
LAGS = range(9)
TURNED = 0.3     # 1 - |cosine| of a quaternion to the usual one
WHY = "The network is told two things about the same motion."


@dataclass(frozen=True)
class Usual:
    """Of each episode and channel (E, c), nan where it is too short.   spread: 10 to 90 % of the values.   size: the greater of both, absolute.

    rough: 75 % quantile of |second differences|.   white: of the fourth over it: 3.4 of white noise, far below 1 of a quick and smooth motion."""
    spread: Array
    size: Array
    rough: Array
    white: Array


def summary(data: Data, key: str) -> Usual:
    return data.once("usual", key, lambda: summarised(data, key))


def summarised(data: Data, key: str) -> Usual:
    out, longest = np.full((4, len(data.ends), data.width(key)), np.nan), np.full(len(data.ends), SHORT - 1)
    for block in data.blocks(key):
        cuts = sorted({0, *np.flatnonzero(block.first).tolist(), len(block.values)})
        for lo, hi in pairwise(cuts):
            x = block.values[lo:hi].astype(np.float64)
            e = int(np.searchsorted(data.ends, block.lo + lo, side="right"))
            if hi - lo <= longest[e] or not np.isfinite(x).all():
                continue
            longest[e] = hi - lo  # of an episode that is cut its longest piece speaks
            low, high = np.quantile(x, [0.1, 0.9], axis=0)
            rough, fourth = (np.quantile(np.abs(np.diff(x, n, axis=0)), 0.75, axis=0) for n in (2, 4))
            out[:, e] = high - low, np.maximum(np.abs(low), np.abs(high)), rough, fourth / np.maximum(rough, 1e-300)
    return Usual(*out)


def logs(x: Array) -> Array:
    """log of x over its median over the episodes; nan where nothing can be said."""
    with np.errstate(invalid="ignore", divide="ignore"):
        out = np.log(x / np.nanmedian(x, axis=0))
    out[~np.isfinite(out)] = np.nan
    return out


def away(x: Array, least: float, far: float) -> NDArray[np.bool_]:
    """Where x (E, c), around 0, is farther from it than `least` and `far` robust deviations, in at most SHARE of the episodes."""
    deviation = 1.48 * np.median(np.abs(np.nan_to_num(x)), axis=0)
    out = np.abs(np.nan_to_num(x)) > np.maximum(least, far * deviation)
    return out & (out.mean(axis=0) <= SHARE)


def odd(data: Data) -> list[Finding]:
    if len(data.ends) < LEAST:
        return []
    out: list[Finding] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a channel of which nothing is known in any episode
        for key in data.motion:
            if len(use := moving_channels(data, key)):
                out += [*scaled(data, key, use), *noisy(data, key, use), *reordered(data, key)]
        return [*out, *related(data)]


# ---------------------------------------------------------------- values
def scaled(data: Data, key: str, use: NDArray[np.intp]) -> Iterator[Finding]:
    """Episodes in which two channels or more are ten, a hundred … times as large as usual, in spread and in size."""
    of = summary(data, key)
    three = np.stack([logs(x[:, use]) for x in (of.spread, of.size, of.rough)])
    ratio, weakest = three.mean(axis=0), np.abs(three).min(axis=0)  # (E, c): an idle or a fast episode is small in one of them
    alike = (np.sign(three) == np.sign(three[0])).all(axis=0)
    out, weak = (away(ratio, np.log(5), ONE) & alike & (weakest > np.log(3)), away(ratio, np.log(4), ONE / 2) & alike & (weakest > np.log(1.5)))
    least = min(2, data.width(key))
    if key == data.action and all(kinds_of_episodes(data).values()):
        return  # targets among changes: action_mixed
    if data.width(key) == 1:
        out &= away(ratio, np.log(8), FAR)
    told = {p.episode for f in between_episodes(data, key) for p in f.places}
    found: dict[float, list[tuple[int, NDArray[np.intp]]]] = {}
    for e in np.flatnonzero(out.sum(axis=1) >= least).tolist():
        middle = float(np.median(ratio[e, out[e]]))
        c = np.flatnonzero((out[e] | weak[e]) & (np.abs(ratio[e] - middle) < np.log(ALIKE)))
        rest = np.nan_to_num(ratio * np.sign(middle))[~out.any(axis=1)][:, c]  # episodes that are as usual
        apart = np.abs(ratio[e, c]).mean() - rest.mean(axis=1).max(initial=0)
        if e not in told and len(c) >= (least if middle > 0 else min(3, len(use))) and apart > np.log(2):
            factor = min(SCALES, key=lambda f: abs(abs(middle) - np.log(f)))
            found.setdefault(factor if middle > 0 else 1 / factor, []).append((e, use[c]))
    for factor, episodes in found.items():
        channels = sorted({int(c) for _, cs in episodes for c in cs})
        places = [Place(e, 0, int(data.lengths[e])) for e, _ in episodes]
        what = SCALES[factor if factor > 1 else 1 / factor]
        yield finding("error", "units_mixed", f"{counted(len(places), 'episode')} about {factor:.3g} times as large as the others in "
                      f"{counted(len(channels), 'channel')}: {what} {some([f'episode {e}' for e, _ in episodes], 4)}", key=key, channels=channels,
                      places=places, why=WHY + " The larger ones set the limits of the normaliser.",
                      fix=f"Scale these episodes in the source and convert it again; or {drop(data.path, places)}", factor=factor)


def noisy(data: Data, key: str, use: NDArray[np.intp]) -> Iterator[Finding]:
    """A channel that trembles in one episode, while it goes as far as usual and its neighbours do not tremble."""
    of, scales = summary(data, key), data.scales(key)
    use = use[~rates(data, key)[use]] if key != data.action else use
    rough = logs(of.rough[:, use])
    if not rough.size or np.isnan(rough).all():
        return
    with np.errstate(invalid="ignore"):
        others = np.nanmedian(rough, axis=1) if len(use) > 2 else np.zeros(len(rough))
        loud = (of.white[:, use] > 1.5) & (of.rough[:, use] > LOUD * scales.range[use]) & (np.nanmedian(of.rough[:, use], axis=0) > 0)
        more = rough - np.maximum(others, 0)[:, None]
        quiet = np.fmax.reduce(np.where(rough < np.log(NOISE), rough, -np.inf), axis=0)  # the roughest of the usual ones
        out = away(rough, np.log(NOISE), FAR / 2) & (rough > quiet + np.log(2)) & (more > np.log(NOISE)) & loud
        out &= np.nan_to_num(logs(of.spread[:, use])) < rough - np.log(NOISE / 2)
    places = [Place(int(e), 0, int(data.lengths[e]), int(use[c]), f"{np.exp(rough[e, c]):.0f} times as rough as usual")
              for e, c in zip(*np.nonzero(out), strict=True)]
    if places:
        yield finding("warning", "noise", f"trembles in {counted(len({p.episode for p in places}), 'episode')}: {places[0].text}", key=key,
                      channels={int(use[c]) for c in np.nonzero(out)[1]}, places=places,
                      why="A loose cable or a tracker that lost its mark: the policy learns to mistrust the channel, or to tremble itself.",
                      fix=f"dipole data view path={data.path} episode={places[0].episode}; {drop(data.path, places)}")


def reordered(data: Data, key: str) -> Iterator[Finding]:
    """Quaternions of one episode that are those of the others with the real part at the other end."""
    for at in quaternion_groups(data, key):
        mean = np.full((len(data.ends), 4), np.nan)
        for block in data.blocks(key):
            e = np.searchsorted(data.ends, block.lo + np.arange(len(block.values)), side="right")
            for i in np.unique(e).tolist():
                q = block.values[e == i, at:at + 4].astype(np.float64)
                if np.isfinite(q).all():
                    mean[i] = np.linalg.eigh(q.T @ q)[1][:, -1]
        known = np.isfinite(mean).all(axis=1)
        if known.sum() < LEAST:
            continue
        usual = np.linalg.eigh(mean[known].T @ mean[known])[1][:, -1]
        far, turned = (1 - np.abs(np.nan_to_num(m) @ usual) for m in (mean, np.roll(mean, 1, axis=1)))
        back = 1 - np.abs(np.nan_to_num(np.roll(mean, -1, axis=1)) @ usual)
        out = known & (far > TURNED) & (np.minimum(turned, back) < far / 3)
        rest = far[known & ~out]
        if not out.any() or out.sum() > SHARE * len(out) or np.quantile(rest, 0.9) > TURNED / 2 or rest.max() > far[out].min() / 1.5:
            continue  # it turns all ways: nothing can be said
        places = [Place(int(e), 0, int(data.lengths[e]), at) for e in np.flatnonzero(out)]
        yield finding("error", "quaternion_order", f"{counted(len(places), 'episode')} fit the others with the real part at the other end: xyzw among wxyz? "
                      f"{some([f'episode {p.episode}' for p in places], 4)}", key=key, channels=range(at, at + 4), places=places,
                      why=WHY + " Read in the wrong order a rotation is quite another one.",
                      fix=f"Reorder them in the source and convert it again; or {drop(data.path, places)}")


# ---------------------------------------------------------------- actions
@dataclass(frozen=True)
class Ties:
    """Correlations of each episode with each state channel, (E, d, s), nan where nothing moves; how far the action goes for what the state goes,
    (E, d, s); and the columns (key, channel) of the states."""
    r: Array
    gain: Array
    columns: list[tuple[str, int]]


def ties(data: Data) -> list[Ties]:
    """Of the action with the states of LAGS later, and with their changes, at the lag where most goes together."""
    seen = data.observed | {data.semantics.of or ""}
    states = {key: use for key in data.keys("state") if key in seen and len(use := np.flatnonzero(data.scales(key).moves))}
    together = joined(data, {data.action: np.arange(data.width(data.action)), **states}) if states else None
    if together is None or len(together.values) < 4 * SHORT:
        return []
    d = data.width(data.action)
    action, state, stretch = together.values[:, :d], together.values[:, d:], together.episode
    episode = np.searchsorted(data.ends, together.at, side="right")
    rows = [np.flatnonzero(episode == e) for e in range(len(data.ends))]
    out = []
    for s in (state, changes(state, stretch)):
        best = max((np.abs(correlation(action - action.mean(axis=0), s - s.mean(axis=0), stretch, k)).max(axis=1).sum(), -k) for k in LAGS)
        lag, r = -best[1], np.full((len(rows), d, s.shape[1]), np.nan)
        gain = r.copy()
        for e, of in enumerate(rows):
            if len(of) < SHORT + lag:
                continue
            a, b = action[of[:len(of) - lag]], s[of[lag:]]
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
            with np.errstate(invalid="ignore", divide="ignore"):
                r[e] = a.T @ b / np.sqrt((a * a).sum(axis=0)[:, None] * (b * b).sum(axis=0))
                far, goes = (np.subtract(*np.quantile(x, [0.9, 0.1], axis=0)) for x in (a, b))
                gain[e] = far[:, None] / goes
        r[~np.isfinite(r)] = np.nan
        out.append(Ties(r, gain, together.columns[d:]))
    return out


def related(data: Data) -> list[Finding]:
    """Action channels that go against the state they go with elsewhere, and two of them exchanged."""
    if not data.action or not data.keys("state"):
        return []
    tie: dict[int, tuple[float, Array, int]] = {}  # channel: how sure, correlations with every state (E, s), its own state
    gains: dict[int, Array] = {}
    for t in ties(data):
        for c in range(t.r.shape[1]):
            r = t.r[:, c]
            enough = np.isfinite(r).mean(axis=0) > 0.7
            if not enough.any():
                continue
            low, high = np.nanquantile(r[:, enough], [0.1, 0.9], axis=0)
            sure = np.zeros(r.shape[1])
            sure[enough] = np.maximum(low, -high)
            s = int(sure.argmax())
            if sure[s] >= AGREE and sure[s] > tie.get(c, (0.0,))[0]:
                tie[c], gains[c] = (float(sure[s]), r * np.sign(np.nanmedian(r[:, s])), s), t.gain[:, c, s]
    own = {c: (r[:, s], float(np.nanmedian(r[:, s]))) for c, (_, r, s) in tie.items()}
    against = {c: r < -0.5 * usual for c, (r, usual) in own.items()}
    out = [*exchanged(data, tie, own), *amplified(data, gains)]
    for c, bad in against.items():
        r, usual = own[c]
        rest = r[~bad & np.isfinite(r)]
        if bad.any() and bad.mean() <= SHARE and rest.min() > GAP * usual:
            places = [Place(int(e), 0, int(data.lengths[e]), c, f"correlation {r[e]:.2f}, elsewhere {usual:.2f}") for e in np.flatnonzero(bad)]
            out.append(finding("error", "action_flipped", f"{data.label(data.action, c)} goes against the state it goes with elsewhere, in "
                               f"{counted(len(places), 'episode')}: {some([f'episode {p.episode}' for p in places], 4)}", key=data.action, channels=[c],
                               places=places, why=WHY + " Half of the answer is the opposite of what was meant.",
                               fix=f"Turn its sign in the source and convert it again; or {drop(data.path, places)}"))
    return out


def amplified(data: Data, gains: dict[int, Array]) -> Iterator[Finding]:
    """Episodes in which the action goes ten times as far as elsewhere, or a tenth, for the same motion of the state."""
    use = np.array([c for c in gains if not data.scales(data.action).few[c]], np.intp)
    if not len(use) or all(kinds_of_episodes(data).values()):
        return
    gain = logs(np.stack([gains[int(c)] for c in use], axis=1))
    out = away(gain, np.log(5), FAR)
    rest = np.nanmax(np.abs(np.where(out, 0, gain)), axis=0)
    out &= np.abs(gain) > rest + np.log(2)
    told = {p.episode for key in data.motion for f in [*between_episodes(data, key), *scaled(data, key, moving_channels(data, key))] for p in f.places}
    episodes = [e for e in np.flatnonzero(out.any(axis=1)).tolist() if e not in told]
    if episodes:
        channels, factor = out[episodes].any(axis=0), float(np.exp(np.median(gain[episodes][out[episodes]])))
        places = [Place(e, 0, int(data.lengths[e])) for e in episodes]
        yield finding("error", "units_mixed", f"the action goes about {factor:.2g} times as far as elsewhere for the same motion of the state, in "
                      f"{counted(len(places), 'episode')}: {some([f'episode {e}' for e in episodes], 4)}", key=data.action, channels=use[channels],
                      places=places, why=WHY + " One of the two is in another unit there.",
                      fix=f"Scale these episodes in the source and convert it again; or {drop(data.path, places)}", factor=factor)


def moving_channels(data: Data, key: str) -> NDArray[np.intp]:
    return np.flatnonzero(data.scales(key).moves & ~data.scales(key).few)


def exchanged(data: Data, tie: dict[int, tuple[float, Array, int]], own: dict[int, tuple[Array, float]]) -> Iterator[Finding]:
    for a in tie:
        for b in (b for b in tie if b > a and tie[b][2] != tie[a][2]):
            weak = np.fmax(own[a][0] / own[a][1], own[b][0] / own[b][1])
            with np.errstate(invalid="ignore"):
                cross = np.minimum(tie[a][1][:, tie[b][2]] / own[b][1], tie[b][1][:, tie[a][2]] / own[a][1])
                bad = (cross > 0.8) & (weak < cross - 0.3)
            rest = np.isfinite(weak) & ~bad
            if bad.any() and bad.mean() <= SHARE and (cross - weak)[rest].max(initial=-1) < 0.15:
                places = [Place(int(e), 0, int(data.lengths[e]), a) for e in np.flatnonzero(bad)]
                yield finding("error", "action_exchanged", f"{data.label(data.action, a)} goes with what {data.label(data.action, b)} goes with elsewhere, and "
                              f"the other way round, in {counted(len(places), 'episode')}: {some([f'episode {p.episode}' for p in places], 4)}",
                              key=data.action, channels=[a, b], places=places, why=WHY,
                              fix=f"Exchange them in the source and convert it again; or {drop(data.path, places)}")

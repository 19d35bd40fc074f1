"""Checks of time: episode lengths, time stamps against the stated rate, frame numbers."""
import re
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from policy.data.checks.finding import Finding, Place, drop, finding, some, trim
from policy.data.checks.look import Block, Data
from policy.data.checks.values import too_coarse
from policy.page import counted

GAP = 1.75      # times the usual step between two stamps
JITTER = 0.2    # of the step: how far the 95 % of the stamps that are nearest deviate
MORE, LONG = 2.0, 20  # times the usual jitter, in an episode of so many steps
RATE = 0.03     # how far the stamps' rate may be from fps
WRONG = 0.2     # from here on that is an error
ODD = 3.0       # times longer or shorter than the median episode, if hardly any is
UNITS = {1.0: "s", 1e-3: "ms", 1e-6: "µs", 1e-9: "ns"}


def lengths(data: Data) -> list[Finding]:
    """Episodes too short to learn from, and lengths that stand out."""
    n, out = data.lengths, []
    tiny = np.flatnonzero(n < max(2, data.horizon // 2))
    if len(tiny):
        out.append(finding("warning", "short_episode", f"{len(tiny)} episodes are shorter than half the horizon of {data.horizon} steps: "
                           f"{some([f'episode {e} has {n[e]}' for e in tiny], 4)}", places=[Place(int(e), 0, int(n[e])) for e in tiny],
                           why="Most of their action chunks are padding, repeated from the last action.",
                           fix=trim(data.path, f"shortest={max(2, data.horizon // 2)}") + ", or a shorter horizon in training"))
    short = np.flatnonzero((n < data.horizon) & (n >= max(2, data.horizon // 2)))
    if len(short):
        out.append(finding("note", "short_episode", f"{len(short)} episodes are shorter than the horizon of {data.horizon} steps",
                           places=[Place(int(e), 0, int(n[e])) for e in short], why="Their action chunks always end in padding.",
                           fix="Set horizon lower in training, and padding_loss=true where standing still at the end is right"))
    median = float(np.median(n))
    rest = n[n >= data.horizon]
    if len(rest) >= 8:
        spread = 1.4826 * np.median(np.abs(np.log(rest) - np.log(median)))
        odd = np.flatnonzero((np.abs(np.log(np.maximum(n, 1) / median)) > max(np.log(ODD), 4 * spread)) & (n >= data.horizon))
        if len(odd):
            out.append(finding("note", "odd_length", f"{some([f'episode {e} has {n[e]} steps' for e in odd], 4)}; the median is {median:.0f}",
                               places=[Place(int(e), 0, int(n[e])) for e in odd],
                               why="Long ones weigh more in training, as windows are drawn by frame; they may be two episodes, or a recording left running.",
                               fix=f"dipole data view path={data.path} episode={odd[0]}"))
    return out


def stamps(data: Data) -> list[Finding]:
    """Time stamps that go back, stand still, leave gaps, tremble, or run at another rate than fps."""
    out: list[Finding] = []
    for key, channel in clocks(data):
        back, same, gaps = list[Place](), list[Place](), list[Place]()
        sample = data.sample(key)
        usual = sample.steps[~sample.first[1:], channel].astype(np.float64)
        step = float(np.median(usual[usual > 0])) if (usual > 0).any() else 0.0
        if not step:
            continue
        step = float(usual[(usual > 0) & (usual < GAP * step)].mean())  # some clocks tick now shorter, now longer
        uneven: dict[int, float] = {}
        for block in data.blocks(key):
            d = block.steps[:, channel]
            uneven |= jitters(data, block, d, step)
            with np.errstate(invalid="ignore"):
                for places, at in ((back, d < 0), (same, d == 0), (gaps, d > GAP * step)):
                    places += [data.place(block.lo + t + 1, channel=channel, text=f"{d[t] / step:+.3g} steps") for t in np.flatnonzero(at).tolist()
                               if t + 1 >= block.fresh]
        some_of = list(of_some(data, key, channel, uneven))
        out += [*(f for f in of_stamps(data, key, channel, step, usual, back, same, gaps) if f.code != "time_jitter" or not some_of), *some_of]
    return [*out, *numbers(data)]


def jitters(data: Data, block: Block, d: np.ndarray, step: float) -> dict[int, float]:
    """{episode: how far 95 % of its steps deviate from their median, of `step`}, gaps and what stands still left out; of those that are long enough."""
    out, cuts = {}, [0, *np.flatnonzero(block.first[1:]).tolist(), len(d)]
    for lo, hi in pairwise(cuts):
        x = d[lo:hi]
        x = x[(x > 0) & (x <= GAP * step)].astype(np.float64)
        if len(x) >= LONG:
            out[int(np.searchsorted(data.ends, block.lo + hi - 1, side="right"))] = float(np.quantile(np.abs(x - np.median(x)), 0.95) / step)
    return out


def of_some(data: Data, key: str, channel: int, uneven: dict[int, float]) -> Iterator[Finding]:
    """Episodes that tremble where most do not, or the mean over all would hide them."""
    usual = float(np.median(list(uneven.values()))) if uneven else 0.0
    odd = [e for e, jitter in uneven.items() if jitter > max(JITTER, MORE * usual)]
    if not odd or usual > JITTER:
        return
    most = 100 * max(uneven[e] for e in odd)
    places = [Place(e, 0, int(data.lengths[e]), channel, f"{100 * uneven[e]:.0f} %, usually {100 * usual:.0f} %") for e in odd]
    yield finding("warning", "time_jitter", f"the steps of {data.label(key, channel)} vary by up to {most:.0f} % (95 % of them) in "
                  f"{counted(len(odd), 'episode')}: {some([f'episode {e}' for e in odd], 8)}", key=key, channels=[channel], places=places,
                  why="Actions are executed evenly: what was recorded unevenly is replayed at another speed.",
                  fix=f"dipole data convert with clock={key}[{channel}] fps=… resamples a recording by its stamps; or {drop(data.path, places)}")


def clocks(data: Data) -> Iterator[tuple[str, int]]:
    """Every time stamp: keys that are called so, and channels of other keys that count on at the rate of the dataset."""
    for key in data.keys("time"):
        if not too_coarse(data, key):
            yield key, 0
    for key in data.keys("state"):
        yield from ((key, int(c)) for c in np.flatnonzero(data.scales(key).clock))


def of_stamps(data: Data, key: str, channel: int, step: float, usual: np.ndarray, back: list[Place], same: list[Place], gaps: list[Place]) -> Iterator[Finding]:
    name, fix = data.label(key, channel), \
        f"dipole data convert with clock={key}[{channel}] fps=… resamples a recording by its stamps; or {drop(data.path, [*back, *same, *gaps])}"
    if back:
        yield finding("error", "time_order", f"{name} goes back in {counted(len(back), 'place')} within episodes", key=key, channels=[channel], places=back,
                      why="Frames are out of order: the policy learns motions backwards.", fix="Sort each episode by its stamp, or record again")
    if same:
        yield finding("warning", "time_repeat", f"{name} stands still in {counted(len(same), 'place')}", key=key, channels=[channel], places=same,
                      why="The same moment was stored twice: the robot seems to stop in between.", fix="Drop frames whose stamp repeats")
    if gaps:
        most = max(float(p.text.split()[0]) for p in gaps)
        yield finding("warning", "time_gap", f"{name} leaves {counted(len(gaps), 'gap')}, up to {most:.3g} steps long", key=key, channels=[channel],
                      places=gaps, why="Frames were lost: the robot seems to move several times as fast there, and chunks assume equal steps.", fix=fix)
    even = usual[(usual > 0) & (usual <= GAP * step)]
    jitter = float(np.quantile(np.abs(even - step), 0.95) / step) if len(even) else 0.0
    if jitter > JITTER:
        yield finding("warning", "time_jitter", f"the steps of {name} vary by {100 * jitter:.0f} % (95 % of them)", key=key, channels=[channel],
                      why="Actions are executed evenly: what was recorded unevenly is replayed at another speed.", fix=fix, jitter=round(jitter, 3))
    if data.fps:
        fps = data.fps
        unit = min(UNITS, key=lambda u: abs(np.log(step * u * fps)))
        rate = 1 / (step * unit)
        if abs(rate / data.fps - 1) > RATE and not (step == 1 and unit == 1):
            yield finding("error" if abs(rate / data.fps - 1) > WRONG else "warning", "rate",
                          f"{name} counts {rate:.4g} frames a second (in {UNITS[unit]}), the dataset says fps {data.fps:g}", key=key,
                          channels=[channel], why="The policy would be executed at the wrong speed.",
                          fix=f"If the stamps are right: dipole data convert … fps={rate:.4g}", rate=rate)


def numbers(data: Data) -> list[Finding]:
    """Frame numbers that skip, and episode numbers that change within an episode."""
    out = []
    for key in data.keys("index"):
        of_episode = bool(re.search("episode|traj|demo", key.lower()))
        places: list[Place] = []
        sample = data.sample(key)
        counts = float(np.median(sample.steps[~sample.first[1:], 0])) if (~sample.first[1:]).any() else 0.0
        if not of_episode and counts <= 0:
            continue  # the number of a task
        for block in data.blocks(key):
            d = block.steps[:, 0]
            wrong = (d != 0) if of_episode else (d != counts)
            places += [data.place(block.lo + t + 1, text=f"{d[t]:+g}") for t in np.flatnonzero(wrong & ~np.isnan(d)).tolist() if t + 1 >= block.fresh]
        if places and of_episode:
            out.append(finding("error", "missed_border", f"{key} changes in {counted(len(places), 'place')} within episodes", key=key, places=places,
                               why="Two episodes were run together: windows across the border teach a motion no robot can make.",
                               fix="Write the missing entries into meta/episode_ends"))
        elif places:
            out.append(finding("warning", "time_gap", f"{key} skips in {counted(len(places), 'place')}", key=key, places=places,
                               why="Frames were lost: the robot seems to move several times as fast there.", fix=drop(data.path, places)))
    return out

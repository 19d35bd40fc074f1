"""Checks of values one by one: what is not a number, channels that say nothing, ranges that ruin a normalisation, too few digits."""
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding, Place, drop, finding
from policy.data.checks.look import Data, least_range, runs
from policy.data.checks.relate import moving

AT_LIMIT = 0.02   # share of frames at exactly the least or greatest value that is no accident
DENSER = 20       # times as many as in a bin of 1/200 of the range beside it
LONELY = 3        # the limits are this many times wider than the range of all but 0.1 % of the frames
SQUEEZED = 8      # from here on that is a warning
DIGITS = 4        # a typical step spans fewer of the numbers that the dtype can write than this
HUGE = 1e9        # and a million times what the channel is otherwise
STUCK = 10        # frames of exactly the same value, in a channel that otherwise never repeats one


def not_finite(data: Data) -> list[Finding]:
    """NaN and infinity."""
    out = []
    for key in data.keys("state", "action", "flag", "time", "index"):
        places: list[Place] = []
        channels: set[int] = set()
        frames = 0
        for block in data.blocks(key) if data.schema[key][1].kind == "f" else ():
            if np.isfinite(block.values.sum()):  # ten times as fast; a sum that overflows is looked at closely
                continue
            bad = ~np.isfinite(block.values)
            bad[:block.fresh] = False
            if bad.any():
                rows = bad.any(axis=1)
                frames += int(rows.sum())
                channels.update(np.flatnonzero(bad.any(axis=0)).tolist())
                places += [data.place(block.lo + a, block.lo + b, int(bad[a].argmax())) for a, b in runs(rows, block.first)]
        if places:
            out.append(finding("error", "not_finite", f"{frames:,} frames hold NaN or infinity", key=key, channels=channels, places=places, frames=frames,
                               why="One NaN makes the loss NaN and the network is lost; dipole train refuses such data.",
                               fix=f"Find out why the recorder wrote it; repair the frames, or {drop(data.path, places)}"))
    return [*out, *huge(data)]


def huge(data: Data) -> list[Finding]:
    """Numbers that no sensor has said: a float32 that was never written, or a fault code."""
    out = []
    for key in data.motion:
        scales, size = data.scales(key), np.maximum(*map(np.abs, data.per_episode(key)))
        size[~np.isfinite(size)] = 0
        e, c = np.nonzero(size > np.maximum(HUGE, 1e6 * np.maximum(np.abs(scales.lo), np.abs(scales.hi))))
        if len(e):
            places = [worst_step(data, key, int(a), int(b)) for a, b in zip(e[:50], c[:50], strict=True)]
            out.append(finding("error", "huge", f"reaches {size.max():.3g}, where all but 0.2 % of it stay below "
                               f"{np.abs([scales.lo, scales.hi]).max(axis=0)[c].max():.3g}", key=key, channels=c, places=places, count=len(e),
                               why="No sensor says this: one such value is the whole range of the normaliser, and its square is infinite in the loss.",
                               fix=f"Find out why the recorder wrote it; repair the frames, or {drop(data.path, places)}"))
    return out


def constant(data: Data) -> list[Finding]:
    """Channels that never change, and channels that are dead in some episodes and alive in the others."""
    out = []
    for key in data.motion:
        lo, hi = data.per_episode(key)
        with np.errstate(invalid="ignore"):
            moves = hi - lo > 1e-6 * np.maximum(np.abs(lo), np.abs(hi))
            low, high = lo.min(axis=0), hi.max(axis=0)
            whole = high - low > least_range(low, high)
        still = np.flatnonzero(~whole)
        action = key == data.action
        if len(still):
            said = ", ".join(f"{low[c]:.4g}" + (f" ± {(high[c] - low[c]) / 2:.1g}" if high[c] > low[c] else "") for c in still[:6])
            out.append(finding("note", "constant", f"{len(still)} of {lo.shape[1]} channels never change ({said})",
                               key=key, channels=still, count=len(still),
                               why="It carries nothing; the normaliser only centres it" + (", and the robot will never be commanded otherwise."
                                   if action else ". A dead or unplugged sensor looks like this."),
                               fix="Name another key, action=…, or record again: no channel of it ever changes" if action and not whole.any() else
                               "Nothing, if that is what it is; or leave them out in training: " + leave_out(key, np.flatnonzero(whole), action)))
        out += dead_in_some(data, key, moves, whole)
    return out


def leave_out(key: str, rest: NDArray[np.intp], action: bool) -> str:
    taken = f"{{key:{key},take:[{','.join(map(str, rest))}]}}"
    if not len(rest):
        return f"data.obs without {key}"
    return f"data.action={taken}" if action else f"data.obs={{…,{key}:{taken}}}"


def dead_in_some(data: Data, key: str, moves: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Iterator[Finding]:
    long = data.lengths >= max(10, np.median(data.lengths) / 4)
    usual = moves[long].mean(axis=0) if long.any() else np.zeros(moves.shape[1])
    scales = data.scales(key)
    # A setting such as a goal rests within every episode, a switch is not always thrown, and not everything is always touched.
    alive = np.flatnonzero(whole & (usual >= 0.9) & ~scales.few & (scales.still < 0.5))
    dead = ~moves[:, alive] & long[:, None]
    if dead.any():
        places = [Place(int(e), 0, int(data.lengths[e]), int(alive[c])) for e, c in zip(*np.nonzero(dead), strict=True)]
        yield finding("warning", "dead_sensor", f"rests for a whole episode in {len({p.episode for p in places})} of {len(data.ends)} episodes "
                      "and moves in all others", key=key, channels=alive[dead.any(axis=0)], places=places,
                      why="A sensor that was unplugged: the policy learns that its value does not matter, or trusts it when it lies.",
                      fix=f"dipole data view path={data.path} episode={places[0].episode}; if the sensor was off, {drop(data.path, places)}")


def stuck(data: Data) -> list[Finding]:
    """A measured channel that hangs: exactly the same value for many frames, while others move, where it otherwise never repeats one."""
    out = []
    for key in data.keys("state"):
        scales = data.scales(key)
        live = np.flatnonzero(scales.moves & ~scales.few & (scales.still < 0.02))
        if not len(live):
            continue
        places: list[Place] = []
        for block in data.blocks(key):
            with np.errstate(invalid="ignore"):
                same = np.concatenate([np.zeros((1, len(live)), bool), block.steps[:, live] == 0])
            for c in np.flatnonzero(same.sum(axis=0) >= STUCK):
                pace = np.abs(np.nan_to_num(block.steps[:, live[c]]))
                places += [data.place(block.lo + a - 1, block.lo + b, int(live[c])) for a, b in runs(same[:, c], block.first)
                           if b - a >= STUCK and b > block.fresh and pace[max(0, a - 6):a - 1].mean() > 0.3 * pace.mean() < pace[b - 1:b].sum()]
        places = [p for p in places if p.hi - p.lo < 0.95 * data.lengths[p.episode]  # the whole episode: dead_sensor
                  and moving(data, *(int(data.starts[p.episode]) + np.array([p.lo, p.hi])).tolist()).mean() > 0.5]
        if places:
            frames = sum(p.hi - p.lo for p in places)
            out.append(finding("warning", "stuck_sensor", f"hangs at one value for {frames:,} frames, where it otherwise changes in every frame",
                               key=key, channels={p.channel for p in places if p.channel is not None}, places=places,
                               why="The driver repeated its last reading: for the policy the robot stands still while it moves.",
                               fix=f"Check the sensor's rate and time-outs; {drop(data.path, places)}"))
    return out


def clipped(data: Data) -> list[Finding]:
    """Mass at exactly the least or the greatest value of a channel that otherwise spreads."""
    out = []
    for key in data.motion:
        scales, sample = data.scales(key), data.sample(key).values
        lo, hi = (x for x in data.per_episode(key))
        lo, hi = lo.min(axis=0), hi.max(axis=0)
        found: list[tuple[int, float, float]] = []
        for c in np.flatnonzero(scales.moves & ~scales.few):
            low, high = (cut_off(sample[:, c], float(end), float(hi[c] - lo[c])) for end in (lo[c], hi[c]))
            if max(low, high):
                found.append((int(c), low, high))
        if found:
            worst = max(max(f[1:]) for f in found)
            said = "; ".join(f"[{c}] {100 * a:.0f} % at {lo[c]:.4g}, {100 * b:.0f} % at {hi[c]:.4g}" for c, a, b in found[:4])
            out.append(finding("warning" if worst >= 0.1 else "note", "clipped", said, key=key, channels=[c for c, *_ in found], count=len(found),
                               why="What was meant beyond the limit is lost: the policy learns to push against it.",
                               fix="Record before the clipping, or widen the limit; if it is a joint's end or a gripper's, all is well"))
    return out


def cut_off(x: NDArray[np.floating], end: float, span: float) -> float:
    """The share of x (n,) that is exactly `end`, or 0 where that is no wonder: as many are beside it, or it comes to rest there like a closing hand."""
    at = x == end
    if not AT_LIMIT <= at.mean() <= 0.5:  # a force is nothing most of the time
        return 0.0
    near = np.unique(x[np.abs(x - end) < 0.1 * span])
    width = max(span / 200, 2.5 * float(np.diff(near).min())) if len(near) > 1 else span / 200  # a coarse dial has few values
    beside = int((np.abs(x - end) <= width).sum() - at.sum())
    return float(at.mean()) if at.sum() > DENSER * max(1, beside) and runs_into(x, at, width) else 0.0


def runs_into(x: NDArray[np.floating], at: NDArray[np.bool_], width: float) -> bool:
    """Whether it arrives with speed: the last whole step is hardly shorter than the one before, where a controller would slow down."""
    i = np.flatnonzero(at[3:] & ~at[2:-1] & ~at[1:-2] & ~at[:-3]) + 3
    if len(i) < 3:
        return False
    last, before = np.abs(x[i - 1] - x[i - 2]), np.abs(x[i - 2] - x[i - 3])
    return bool(np.median(last / (before + 1e-12)) > 0.8 and np.median(last) > 0.2 * width)


def outlier(data: Data) -> list[Finding]:
    """A few values that widen the limits so far that everything else is squeezed together."""
    out = []
    for key in data.motion:
        scales = data.scales(key)
        lo, hi = data.per_episode(key)
        with np.errstate(invalid="ignore", divide="ignore"):
            whole = hi.max(axis=0) - lo.min(axis=0)
            wider = whole / scales.range
        wide = np.flatnonzero(scales.moves & ~scales.few & (wider > LONELY))
        middle, half = (scales.lo + scales.hi) / 2, LONELY * scales.range / 2
        with np.errstate(invalid="ignore"):
            e, c = np.nonzero((hi[:, wide] > (middle + half)[wide]) | (lo[:, wide] < (middle - half)[wide]))
        few = len(set(e.tolist())) <= max(1, 0.1 * len(data.ends))  # otherwise that is how it moves
        if len(wide) and (few or len(data.ends) < 10):
            places = [worst_step(data, key, int(a), int(wide[b])) for a, b in zip(e[:50], c[:50], strict=True)]
            channel = wide[np.argmax(wider[wide])]
            out.append(finding("warning" if wider[channel] > SQUEEZED else "note", "outlier", f"{data.label(key, int(channel))} spans {whole[channel]:.4g}, "
                               f"all but 0.2 % of it {scales.range[channel]:.4g}", key=key,
                               channels=wide, places=places, count=len(e),
                               why=f"Normalised by its limits, all the rest shares 1/{wider[channel]:.0f} of the range and is hardly learned.",
                               fix="Drop the spike; or train with normalize=quantile"))
    return out


def worst_step(data: Data, key: str, e: int, channel: int) -> Place:
    lo = int(data.starts[e])
    x = np.asarray(data.store.read(key, lo, int(data.ends[e])), np.float64).reshape(int(data.lengths[e]), -1)[:, channel]
    at = int(np.nanargmax(np.abs(x - np.nanmedian(x))))
    return Place(e, at, at + 1, channel, f"{x[at]:.4g}")


def precision(data: Data) -> list[Finding]:
    """Steps too small for the digits of the dtype, float16, and actions in whole numbers."""
    out = [coarse_clock(data, key) for key in data.keys("time") if too_coarse(data, key)]
    for key in data.motion:
        dtype, scales = data.schema[key][1], data.scales(key)
        if dtype.kind in "iub" and key == data.action and (~scales.few).any():
            out.append(finding("note", "integer_action", f"actions are stored as {dtype}", key=key,
                               why="The policy answers with real numbers; what was rounded at recording stays a staircase.",
                               fix="Record floats if the device gives them; else this is what it is"))
        if dtype.kind != "f":
            continue
        info = np.finfo(np.float16 if dtype.itemsize == 2 else np.float32)  # training computes in float32
        size = np.maximum(np.abs(scales.lo), np.abs(scales.hi))
        digit = size * float(info.eps)
        coarse = np.flatnonzero(scales.moves & ~scales.few & (scales.typical > 0) & (scales.step < DIGITS * digit))
        if len(coarse):
            c = coarse[0]
            out.append(finding("warning", "precision", f"{key}[{c}] is about {size[c]:.4g} and moves {scales.step[c]:.2g} a frame; "
                               f"{info.dtype} counts in steps of {digit[c]:.2g} there", key=key, channels=coarse, count=len(coarse),
                               why="The motion is a staircase of rounding errors. Training computes in float32.",
                               fix="Subtract an origin before storing (a start time, a base pose), and store float32"))
        elif dtype.itemsize == 2:
            out.append(finding("note", "precision", f"stored as float16: {100 * float(info.eps):.2g} % of a value", key=key,
                               why="Small motions far from zero are rounded away.", fix="Store float32 when recording again"))
    return out


def too_coarse(data: Data, key: str) -> bool:
    """Whether the dtype of a time stamp [s] cannot tell two frames apart."""
    lo, hi = data.per_episode(key)
    dtype = data.schema[key][1]
    return bool(data.fps and dtype.kind == "f" and np.abs([lo, hi]).max() * np.finfo(dtype).eps > 0.25 / data.fps)


def coarse_clock(data: Data, key: str) -> Finding:
    dtype, size = data.schema[key][1], float(np.abs(data.per_episode(key)).max())
    return finding("warning", "precision", f"{key} is about {size:.4g}; {dtype} counts in steps of {size * float(np.finfo(dtype).eps):.2g} there", key=key,
                   channels=[0], why="Frames cannot be told apart by their stamps, so gaps and the rate cannot be checked.",
                   fix="Subtract the start time before storing, or store float64")

"""Checks of images, on a sample of frames: their range, black or white ones, cameras that stood still while the robot moved."""
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.camera import copied, lagging
from policy.data.checks.finding import Finding, Place, drop, finding
from policy.data.checks.look import Data, runs
from policy.data.checks.relate import moving
from policy.data.store import BLOCK_BYTES
from policy.page import counted

STRETCH = 64    # frames looked at together, where the chunks on disk are unknown
FLAT = 2.0      # of 255: an image that spans less shows nothing
PIXELS = 3000   # compared with those of the frame before
FROZEN = 8      # frames without any change while the robot moves


@dataclass
class Seen:
    """Of the frames looked at: frame numbers (n,), least, greatest value of each; same: equal to the one before, which was looked at too; change: mean of
    |pixels - those before|, nan where that was not looked at; code: equal for equal pictures."""
    at: list[int] = field(default_factory=list)
    lo: list[float] = field(default_factory=list)
    hi: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    code: list[int] = field(default_factory=list)
    last: NDArray[Any] | None = None


def images(data: Data) -> list[Finding]:
    out = []
    for key in data.keys("image"):
        seen = look(data, key)
        wrong = ranges(data, key, seen)
        unclear = any(f.severity == "error" for f in wrong)  # what is black depends on what is white
        out += [*wrong, *([] if unclear else blank(data, key, seen)), *frozen(data, key, seen)]
        at, change, code = np.array(seen.at), np.array(seen.change), np.array(seen.code)
        out += taken if (taken := copied(data, key, at, code)) else lagging(data, key, at, change)
    return out


def look(data: Data, key: str) -> Seen:
    """Stretches of neighbouring frames, evenly spread, as long as a chunk on disk: to decode one frame is to decode its chunk."""
    seen, each = Seen(), max(1, data.width(key) * data.schema[key][1].itemsize)
    stretch = max(1, min(data.chunks.get(key, STRETCH), BLOCK_BYTES // each))
    starts = np.arange(0, data.frames, stretch)
    most = max(8, int(data.image_bytes) // (stretch * each))
    if len(starts) > most:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, most).astype(int))]
    data.looked[key] = min(1.0, len(starts) * stretch / data.frames)
    for lo in starts.tolist():
        add(seen, data.store.read(key, lo, min(lo + stretch, data.frames)), lo)
    return seen


def add(seen: Seen, x: NDArray[Any], lo: int) -> None:
    flat = x.reshape(len(x), -1)
    few = flat[:, ::max(1, flat.shape[1] // PIXELS)].astype(np.float32)
    before = few[:1] * np.nan if seen.last is None or seen.at[-1] != lo - 1 else seen.last
    seen.change += np.abs(np.diff(few, axis=0, prepend=before)).mean(axis=1).astype(float).tolist()
    seen.code += [crc32(row.tobytes()) for row in flat]
    seen.last = few[-1:]
    seen.at += range(lo, lo + len(x))
    seen.lo += flat.min(axis=1).astype(float).tolist()
    seen.hi += flat.max(axis=1).astype(float).tolist()
    seen.same += [False, *(np.array_equal(a, b) for a, b in zip(flat[1:], flat[:-1], strict=True))]


def ranges(data: Data, key: str, seen: Seen) -> list[Finding]:
    """What the values span: 0 … 255 is what training expects, as uint8."""
    dtype, lo, hi, at = data.schema[key][1], np.array(seen.lo), np.array(seen.hi), np.array(seen.at)
    why = "Training reads images as 0 … 255."
    if dtype.kind == "f" and not (np.isfinite(lo) & np.isfinite(hi)).all():
        wrong = np.flatnonzero(~(np.isfinite(lo) & np.isfinite(hi)))
        return [finding("error", "image_range", "images hold NaN or infinity", key=key, places=[data.place(int(f)) for f in at[wrong]], why=why,
                        fix="Drop these episodes")]
    if not hi.max() > lo.min():
        return []
    small, large = (hi <= 1.0) & (hi > 0), hi > 1.5
    if (odd := small & (hi > 0.02) if dtype.kind == "f" else small).any() and large.any() and (dtype.kind == "f" or odd.mean() < 0.5):
        return [finding("error", "image_range", f"{odd.sum()} of {len(hi)} frames looked at span 0 … 1, the others 0 … {hi.max():.0f}", key=key,
                        places=stretches(data, at, odd), count=int(odd.sum()), why=why + " Some would be nearly black.",
                        fix="Multiply those by 255 and store uint8")]
    if dtype.kind == "f" and hi.max() <= 1.0 + 1e-6:
        return [finding("warning", "image_range", f"stored as {dtype} from {lo.min():.3g} to {hi.max():.3g}", key=key,
                        why=why + " As floats they take four to eight times the memory.", fix="Multiply by 255 and store uint8 when converting")]
    if dtype.kind == "f" and lo.min() < 0:
        return [finding("warning", "image_range", f"stored as {dtype} from {lo.min():.3g} to {hi.max():.3g}: already normalised", key=key,
                        why=why + " What was done to them is done twice, and not at all on the robot.", fix="Store them as the camera gave them, uint8")]
    if dtype.kind == "f" and hi.max() <= 255:
        return [finding("note", "image_range", f"stored as {dtype}, 0 … 255", key=key, why="Four to eight times the memory of uint8, for the same picture.",
                        fix=f"data.obs={{image: {{key: {key}, dtype: uint8}}}} packs them on reading; or store uint8 when converting")]
    if dtype == np.uint8 and hi.max() <= 1:
        return [finding("error", "image_range", "stored as uint8, but never above 1: images of 0 … 1 were cast to whole numbers", key=key,
                        why="The pictures are lost: black, with a few dots.", fix="Convert again, multiplied by 255 before the cast")]
    return []


def stretches(data: Data, at: NDArray[np.int64], mask: NDArray[np.bool_]) -> list[Place]:
    """Neighbouring frames of one episode in one place."""
    cut = np.isin(at, data.starts) | (np.diff(at, prepend=-2) != 1)
    return [data.place(int(at[a]), int(at[b - 1]) + 1) for a, b in runs(mask, cut)]


def blank(data: Data, key: str, seen: Seen) -> list[Finding]:
    """Frames of one colour."""
    lo, hi = np.array(seen.lo), np.array(seen.hi)
    top = 255 if data.schema[key][1] == np.uint8 or hi.max(initial=0) > 1.5 else 1.0
    flat = np.flatnonzero((hi - lo) <= FLAT / 255 * top)
    if not len(flat):
        return []
    colour = "black" if hi[flat].max() < 0.1 * top else "white" if lo[flat].min() > 0.9 * top else "of one colour"
    places = [data.place(seen.at[i], text=f"value {lo[i]:.3g}") for i in flat]
    return [finding("error" if len(flat) > 0.5 * len(lo) else "warning", "image_blank", f"{len(flat)} of {len(lo)} frames looked at are {colour}, in "
                    f"{counted(len({p.episode for p in places}), 'episode')}", key=key, places=places,
                    why="The camera was covered, off, or lost frames: the policy acts blindly.",
                    fix=f"dipole data view path={data.path} episode={places[0].episode}; {drop(data.path, places)}")]


def frozen(data: Data, key: str, seen: Seen) -> list[Finding]:
    """Pictures that stay the same, bit by bit, while the robot moves: found in the sample, confirmed in the whole episode."""
    suspects = sorted({data.place(f).episode for f, same in zip(seen.at, seen.same, strict=True) if same and f and moving(data, f - 1, f + 1).any()})
    places: list[Place] = []
    for e in suspects[:50]:
        lo, hi = int(data.starts[e]), int(data.ends[e])
        same, before, block = np.zeros(hi - lo, bool), None, max(1, 2**26 // max(1, data.width(key)))
        for a in range(lo, hi, block):
            x = data.store.read(key, a, min(a + block, hi))
            same[a - lo + 1:a - lo + len(x)] = [np.array_equal(p, q) for p, q in zip(x[1:], x[:-1], strict=True)]
            same[a - lo] = before is not None and np.array_equal(before, x[0])
            before = x[-1]
        moves = moving(data, lo, hi)
        none = np.zeros(hi - lo, bool)
        places += [Place(e, a - 1, b) for a, b in runs(same, none) if b - a >= FROZEN and moves[a:b].mean() > 0.5]
    if not places:
        return []
    episodes = {p.episode for p in places}
    return [finding("warning", "image_frozen", f"the picture stands still while the robot moves, in {counted(len(episodes), 'episode')}, for "
                    f"{max(p.hi - p.lo for p in places)} frames at most", key=key, places=places,
                    why="The camera hung: picture and motion do not belong together, and the policy learns to ignore what it sees.",
                    fix=f"Check the camera's rate against fps; {drop(data.path, places)}")]


"""One episode as a page to scrub through: pictures, paths, every channel with a cursor, findings marked. It opens from disk; view.js draws it."""
import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policy.data.checks.finding import Finding
from policy.data.checks.look import Data, Reads
from policy.page import counted, write

NUMBERS = 2_000_000  # of all keys that a page carries; longer episodes are thinned
IMAGE_BYTES, IMAGES, WIDTH = 12_000_000, 400, 320  # of all pictures together; frames of one camera; px
CHANNELS = 40        # of one key
APART, PLOTS = 30, 4  # a plot spans at most as many times the narrowest of its channels; plots of one key
POSITION = re.compile(r"pos|xyz|hand|eef|tip|palm|object|cube|goal|target|pose|keypoint|handle|agent")
STYLE = """<style>
#bar{position:sticky;top:0;z-index:1;background:var(--bg);padding:10px 0;display:grid;grid-template-columns:auto auto 1fr auto;gap:12px;align-items:center}
#bar button{position:static}#slider{width:100%}#now{font-variant-numeric:tabular-nums;min-width:170px;text-align:right}#strip{grid-column:3}
.three{display:grid;gap:14px;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));margin-bottom:14px}.three .card{margin:0;max-width:520px}
#plots .card{margin:0 0 12px}canvas{display:block;touch-action:none}img{width:100%;image-rendering:pixelated;border-radius:6px;display:block}
.legend{display:flex;flex-wrap:wrap;gap:0 2px;margin-top:4px}
.legend button,.legend>span,.hit{position:static;border:0;background:none;padding:1px 6px;font-size:12px}
.legend i{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:5px}
.legend b{display:inline-block;min-width:54px;font-size:12px;font-weight:600;letter-spacing:0;font-variant-numeric:tabular-nums}
#hits{display:flex;flex-wrap:wrap;gap:4px;margin-bottom:14px}.hit{border-left:3px solid var(--c);background:var(--card);text-align:left}
</style>"""
HELP = "space plays, arrows step, a click on a curve goes there; click a channel to hide it, shift-click to see it alone"
BAR = """<div id="bar"><button id="play" type="button">play</button>
<select id="speed"><option value="0.25">¼ ×</option><option value="1" selected>1 ×</option><option value="4">4 ×</option></select>
<input id="slider" type="range" min="0" value="0"><span id="now" class="soft"></span><span id="strip"></span></div>"""


def view(store: Reads, episode: int, path: Path, findings: Sequence[Finding] = (), **how: Any) -> Path:
    """Writes the page of an episode and returns its path; findings of it are marked.   how: as policy.data.checks.look.Data takes it.

    ValueError when there is no such episode. What does not fit is thinned, and the page says so.
    """
    content = data(Data(store, **how), episode, findings)
    said = [counted(content["steps"], "step"), f"{content['fps']:g} Hz" if content["fps"] else "rate not recorded", *content["notes"]]
    name, script = Path(str(how.get("called") or store.path)).name, Path(__file__).with_name("view.js").read_text(encoding="utf-8")
    body = [STYLE, f'<header><div class="over">dipole data view</div><h1>{escape(name)}, episode {episode}</h1><div class="soft">{escape(" · ".join(said))}<br>'
            f"{HELP}</div></header>", BAR, '<div id="hits"></div><section id="seen" class="three"></section><section id="plots"></section>',
            f"<script>const D={json.dumps(content).replace('</', '<' + chr(92) + '/')};\n{script}</script>"]
    return write(path, f"episode {episode} of {name}", body)


def data(look: Data, episode: int, findings: Sequence[Finding]) -> dict[str, Any]:
    """What view.js draws: numbers as base64 of float32, pictures as base64 of JPEG."""
    if not 0 <= episode < len(look.ends):
        raise ValueError(f"there is no episode {episode}: {look.path} has {counted(len(look.ends), 'episode')}, 0 to {len(look.ends) - 1}")
    lo, hi = int(look.starts[episode]), int(look.ends[episode])
    plain = look.keys("action", "state", "flag", "time")
    every = max(1, -(-(hi - lo) * sum(min(CHANNELS, look.width(k)) for k in plain) // NUMBERS))
    values = {key: look.store.read(key, lo, hi).reshape(hi - lo, -1)[::every].astype(np.float32) for key in plain}
    keys = [{"name": key, "unit": look.units.get(key, ""), "every": every, "labels": [look.short(key, c) for c in range(x.shape[1])][:CHANNELS],
             "groups": of_one_scale(x[:, :CHANNELS]), "values": packed(x[:, :CHANNELS])} for key, x in values.items()]
    notes = [f"{key}: the first {CHANNELS} of {x.shape[1]} channels" for key, x in values.items() if x.shape[1] > CHANNELS]
    notes += [f"every {every}th step of the curves"] if every > 1 else []
    cameras = look.keys("image")
    return {"steps": hi - lo, "fps": look.fps, "keys": keys, "paths": planes(look, values, every), "notes": notes,
            "images": [pictures(look, key, lo, hi, IMAGE_BYTES // len(cameras)) for key in cameras],
            "findings": [{"severity": f.severity, "code": f.code, "where": f.where, "key": f.key, "text": f.text, "lo": p.lo, "hi": p.hi,
                          "steps": str(p).partition(", ")[2]} for f in findings for p in f.places if p.episode == episode and p.hi > p.lo]}


def packed(x: NDArray[np.float32]) -> str:
    return base64.b64encode(np.ascontiguousarray(x, "<f4").tobytes()).decode()


def of_one_scale(x: NDArray[np.float32]) -> list[list[int]]:
    """Channels of x (n, c) that can be seen in one plot: pixels and radians share none, for the angle would be a flat line."""
    finite = np.where(np.isfinite(x), x, np.nan).astype(np.float64)
    lo, hi = (np.nan_to_num(f.reduce(finite, axis=0)) for f in (np.fmin, np.fmax))
    span, groups = hi - lo, list[list[int]]()
    for c in np.argsort(-span, kind="stable").tolist():
        for group in groups:
            both = [*group, c]
            fits = hi[both].max() - lo[both].min() <= APART * min((s for s in span[both] if s > 0), default=np.inf)
            if fits or (len(groups) == PLOTS and group is groups[-1]):
                group.append(c)
                break
        else:
            groups.append([c])
    return sorted(map(sorted, groups))


def planes(look: Data, values: Mapping[str, NDArray[np.float32]], every: int) -> list[dict[str, Any]]:
    """Keys of points in the plane or in space, those that share an area together: {dimensions, down: y points down, keys: [{name, points, values}]}."""
    groups: list[dict[str, Any]] = []
    areas: list[NDArray[np.float64]] = []
    for key, x in values.items():
        shape, points = look.schema[key][0], x
        space = bool(POSITION.search(key.lower())) or look.units.get(key) in ("m", "mm", "cm")
        if shape[-1:] == (2,) and look.roles[key] in ("state", "action"):
            d = 2
        elif shape[-1:] == (3,) and space:
            d = 3
        elif shape in ((6,), (7,)) and space and look.roles[key] == "state":  # a pose
            d, points = 3, x[:, :3]
        else:
            continue
        flat = points.reshape(-1, d)
        flat = flat[np.isfinite(flat).all(axis=1)]
        if not len(flat):
            continue
        area = np.array([flat.min(axis=0), flat.max(axis=0)], np.float64)
        part = {"name": key, "points": points.shape[1] // d, "every": every, "values": packed(points)}
        for group, other in zip(groups, areas, strict=True):
            if group["dimensions"] == d and shares(area, other):
                group["keys"].append(part)
                break
        else:
            groups.append({"dimensions": d, "down": d == 2 and look.down(key), "keys": [part]})
            areas.append(area)
    return groups


def shares(a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """Whether two boxes (2, d) are about of one size and lie upon each other."""
    size, other = float((a[1] - a[0]).max()) + 1e-9, float((b[1] - b[0]).max()) + 1e-9
    return bool(1 / 8 < size / other < 8 and (np.minimum(a[1], b[1]) >= np.maximum(a[0], b[0])).all())


def pictures(look: Data, key: str, lo: int, hi: int, most: int) -> dict[str, Any]:
    """Frames of a camera as JPEG, fewer of them where they would not fit into `most` bytes."""
    try:
        from PIL import Image
    except ImportError as e:
        raise ImportError("pictures need pillow: pip install 'dipole[train]'") from e
    count, frames, at, size = min(hi - lo, IMAGES), list[str](), list[int](), (0, 0)
    while True:
        steps = np.unique(np.linspace(0, hi - lo - 1, count).round().astype(int)).tolist()
        top = brightest(look, key, lo, steps)
        frames, at, total = [], steps, 0
        for step in steps:
            picture = Image.fromarray(as_picture(look.store.read(key, lo + step, lo + step + 1)[0], top))
            size = picture.size
            if picture.width > WIDTH:
                picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)))
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=88, subsampling=0)
            frames.append(base64.b64encode(file.getvalue()).decode())
            total += len(frames[-1])
            if total > most:
                break
        if total <= most or count < 8:
            break
        count = max(4, int(0.9 * count * most / (total * len(steps) / len(frames))))
    said = [f"{size[0]} × {size[1]} px" + (f", shown at {WIDTH}" if size[0] > WIDTH else ""), f"{len(at)} of {hi - lo} frames" if len(at) < hi - lo else ""]
    return {"name": key, "note": "; ".join(filter(None, said)), "at": at, "frames": frames}


def brightest(look: Data, key: str, lo: int, steps: Sequence[int]) -> float:
    """What is shown as white: 255 for pictures, 1 for floats of 0 … 1, the greatest value of a depth image."""
    if look.schema[key][1] == np.uint8:
        return 255.0
    few = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))]
    seen = np.concatenate([look.store.read(key, lo + s, lo + s + 1).ravel() for s in few]).astype(np.float64)
    top = float(seen[np.isfinite(seen)].max(initial=0))
    return 1.0 if top <= 1 else 255.0 if top <= 255 else top


def as_picture(x: NDArray[Any], top: float) -> NDArray[np.uint8]:
    """(h, w, c), (c, h, w) or (h, w) of any dtype -> uint8 that Pillow takes: (h, w) or (h, w, 3)."""
    if x.ndim > 3:
        x = x.reshape(-1, *x.shape[-2:])
    if x.ndim == 3 and x.shape[-1] > 4:
        x = np.moveaxis(x, 0, -1)
    x = x if x.dtype == np.uint8 else (255 * (np.nan_to_num(x, posinf=top, neginf=0).astype(np.float64) / top)).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(x[..., 0] if x.ndim == 3 and x.shape[-1] < 3 else x[..., :3] if x.ndim == 3 else x)

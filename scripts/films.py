"""Videos of episodes: each one alone, and all of them side by side in a grid that shows who succeeded."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from policy.episodes import Episode
from policy.train.log import bar

GOOD, BAD = (21, 147, 90), (211, 60, 60)
ENDS = {"success": "success", "truncated": "out of time", "terminated": "lost", "fault": "broke off"}
SIZE, BORDER, CAPTION = 256, 6, 26  # px of a picture, its frame, and the text above it


class Film(NamedTuple):
    """frames (t, h, w, 3) uint8."""
    frames: np.ndarray
    caption: str
    success: bool


def choose(episodes: Sequence[Episode], count: int, seeds: Sequence[int] | None = None) -> list[Episode]:
    """Those with these seeds; else up to `count`, failures first (they teach most) up to half, the rest successes."""
    drawn = [e for e in episodes if len(e.reward)]
    if seeds is not None:
        known = {e.seed: e for e in drawn}
        if lost := [s for s in seeds if s not in known]:
            raise ValueError(f"no step was made with seeds {lost}")
        return [known[s] for s in seeds]
    failed, won = [e for e in drawn if not e.success], [e for e in drawn if e.success]
    few = failed[: max(count // 2, count - len(won))]
    return few + won[: count - len(few)]


def drawable(envs: Any) -> bool:
    return hasattr(envs, "render_states") or hasattr(envs, "render_episode")


def draw(envs: Any, episode: Episode) -> np.ndarray:
    """Frames (t, size, size, 3) of an episode: of the states it kept, or played again from its seed by an environment that draws only itself."""
    if hasattr(envs, "render_states") and episode.states:
        return envs.render_states(**episode.states, size=SIZE)
    return envs.render_episode(episode.seed, episode.actions, size=SIZE)


def replay(envs: Any, seed: int, actions: np.ndarray) -> np.ndarray:
    """Frames of the episode that these actions (t, d) make of the seed, in envs of one copy."""
    if hasattr(envs, "render_episode"):
        return envs.render_episode(seed, actions, size=SIZE)
    envs.reset(seed=[seed])
    info = envs.step_chunk(np.asarray(actions)[None])[-1]
    return envs.render_states(info["qpos"][0], info["mocap_pos"][0], size=SIZE)


def write_videos(chosen: Sequence[Episode], envs: Any, folder: Path, fps: float) -> dict[str, Any]:
    """videos/seed_<seed>.mp4 of episodes, and videos/grid.mp4 of all; {"videos": [{file, seed, success, score}], "video_grid": file}."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    for old in [*(folder / "videos").glob("seed_*.mp4"), folder / "videos" / "grid.mp4"]:
        old.unlink(missing_ok=True)
    made, films = [], []
    with bar() as progress:
        task = progress.add_task("videos", total=len(chosen), note="")
        for e in chosen:
            film = Film(draw(envs, e), f"{e.seed} {ENDS[e.ended]}", e.success)
            file = f"videos/seed_{e.seed}.mp4"
            write(folder / file, film.frames, fps)
            made.append({"file": file, "seed": e.seed, "success": e.success, "score": e.score})
            films.append(film)
            progress.advance(task)
        if len(films) > 1:
            write(folder / "videos" / "grid.mp4", grid(films), fps)
    return {"videos": made, "video_grid": "videos/grid.mp4" if len(films) > 1 else None}


def write(path: Path, frames: np.ndarray, fps: float) -> None:
    import imageio.v3 as iio
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, frames, fps=fps or 10, codec="libx264", macro_block_size=2)


def grid(films: Sequence[Film], columns: int | None = None) -> np.ndarray:
    """All films at once (t, h, w, 3), of even sides: green or red around each, its caption above; one that has ended stands still."""
    columns = columns or int(np.ceil(np.sqrt(len(films))))
    rows = -(-len(films) // columns)
    height, width = SIZE + CAPTION + BORDER, SIZE + 2 * BORDER
    steps = max(len(f.frames) for f in films)
    picture = np.zeros((steps, rows * height, columns * width, 3), np.uint8)
    for i, film in enumerate(films):
        y, x = i // columns * height, i % columns * width
        picture[:, y: y + height, x: x + width] = GOOD if film.success else BAD
        picture[:, y: y + CAPTION, x: x + width] = label(film.caption, width, GOOD if film.success else BAD)
        at = np.minimum(np.arange(steps), len(film.frames) - 1)
        picture[:, y + CAPTION: y + CAPTION + SIZE, x + BORDER: x + BORDER + SIZE] = film.frames[at]
    return picture


def label(text: str, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    """Text in white on a strip (CAPTION, width, 3); what does not fit is cut off at the left, because numbers stand at the right."""
    from PIL import Image, ImageDraw, ImageFont
    strip = Image.new("RGB", (width, CAPTION), colour)
    font, pen = ImageFont.load_default(16), ImageDraw.Draw(strip)
    while pen.textlength(text, font) > width - 2 * BORDER:
        text = "…" + text.lstrip("…")[1:]
    pen.text((BORDER, CAPTION // 2), text, fill="white", font=font, anchor="lm")
    return np.asarray(strip)

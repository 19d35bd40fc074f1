"""One episode as a .rrd file for the rerun viewer: channels over time, pictures."""
from pathlib import Path
from typing import Any

import numpy as np

from policy.data.checks.look import Data, Reads
from policy.data.view import as_picture, brightest


def write_rrd(store: Reads, episode: int, path: Path, **how: Any) -> Path:
    """Writes the file and returns its path.   how: as policy.data.checks.look.Data takes it.   ValueError when there is no such episode."""
    try:
        import rerun
    except ImportError as e:
        raise ImportError("a .rrd file needs rerun: pip install 'dipole[rerun]'") from e
    look = Data(store, **how)
    if not 0 <= episode < len(look.ends):
        raise ValueError(f"there is no episode {episode}: {look.path} has {len(look.ends)} episodes")
    lo, hi = int(look.starts[episode]), int(look.ends[episode])
    stream = rerun.RecordingStream("dipole", recording_id=f"{Path(str(store.path)).name}-{episode}")
    stream.save(path)
    times = [rerun.TimeColumn("step", sequence=np.arange(hi - lo))]
    if look.fps:
        times.append(rerun.TimeColumn("time", duration=np.arange(hi - lo) / look.fps))
    for key in look.keys("action", "state", "flag"):
        x = look.store.read(key, lo, hi).reshape(hi - lo, -1).astype(np.float64)
        stream.log(key, rerun.SeriesLines(names=[look.label(key, c) for c in range(x.shape[1])]), static=True)
        stream.send_columns(key, indexes=times, columns=rerun.Scalars.columns(scalars=x.ravel()).partition([x.shape[1]] * (hi - lo)))
    for key in look.keys("image"):
        top = brightest(look, key, lo, range(hi - lo))
        for step in range(hi - lo):
            stream.set_time("step", sequence=step)
            if look.fps:
                stream.set_time("time", duration=step / look.fps)
            stream.log(key, rerun.Image(as_picture(look.store.read(key, lo + step, lo + step + 1)[0], top)).compress(jpeg_quality=85))
    stream.flush()
    return path

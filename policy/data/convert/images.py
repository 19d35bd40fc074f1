"""One PNG or JPEG in memory to and from an array, with its size known before it is decoded."""
import io
from typing import Any

import numpy as np

from policy.data.files import DataError

FORMATS = ("PNG", "JPEG")


def pillow() -> Any:
    try:
        import PIL.Image
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("images are read and written by pillow: pip install 'dipole[data]'", name="pillow") from e
    return PIL.Image


def read_image(data: bytes, where: str, *, size: tuple[int, int] | None = None, channels: int | None = None, most: int = 2**26) -> np.ndarray:
    """(h, w, 3) uint8 RGB, (h, w, 1) uint8 grey or (h, w, 1) uint16.

    size: (h, w) it must have; without it at most `most` pixels are decoded.   channels: 3 makes colours of grey, None takes what is there.
    where: words for the error.   DataError: damaged, another size, neither PNG nor JPEG.
    """
    Image = pillow()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (size and (image.height, image.width) != tuple(size)) or image.width * image.height > most:
                raise DataError(f"{where} is {image.height}x{image.width}, expected {f'{size[0]}x{size[1]}' if size else f'at most {most} pixels'}. "
                                "All frames of a key have one size: correct the description, or resize the images")
            if image.mode.startswith("I") and channels != 3:
                return np.asarray(image).astype(np.uint16)[..., None]
            if channels == 1 or (channels is None and image.mode in ("L", "1")):
                return np.asarray(image.convert("L"))[..., None]
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except Exception as e:  # pillow raises OSError, SyntaxError, ValueError, DecompressionBombError, …
        raise DataError(f"{where} cannot be decoded as {' or '.join(FORMATS)} ({e}). The data are damaged: copy them again, or leave the key out") from e


def png(x: np.ndarray) -> bytes:
    """x (h, w, 3) or (h, w, 1) uint8, or (h, w, 1) uint16 -> a PNG, which loses nothing."""
    out = io.BytesIO()
    pillow().fromarray(np.ascontiguousarray(x[..., 0] if x.shape[-1] == 1 else x)).save(out, "PNG", compress_level=1)
    return out.getvalue()

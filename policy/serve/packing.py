"""msgpack and raw arrays from strangers: what a message may cost is bounded before anything is made of it.

Containers are counted while msgpack parses, arrays are views of the bytes that came, and whatever is wrong is a WireError.
"""
import math
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

DTYPES = ("<f4", "<f8", "|u1", "<i8", "|b1")
# Every code an err carries; clients and metrics count nothing else.
CODES = ("undecodable", "too_big", "version", "schema", "missing_key", "unknown_key", "dtype", "shape", "not_finite", "merge", "superseded", "expired",
         "refused", "failed", "too_many_errors", "closing", "stale")


class WireError(ValueError):
    """A message that is not one, or a request that cannot be answered.   code: of CODES.   seq: of the request, where it could be read."""

    def __init__(self, code: str, text: str, seq: int | None = None):
        super().__init__(text)
        self.code, self.text, self.seq = code, text, seq


@dataclass(frozen=True)
class Limits:
    """Of one message.   bytes: as it comes.   containers: maps and lists.   items: in each.   text: bytes of a string.   dims: axes of an array."""
    bytes: int = 4 << 20
    containers: int = 256
    items: int = 1024
    text: int = 4096
    dims: int = 8


LIMITS = Limits()


def parse(data: bytes, limits: Limits = LIMITS, *, text_keys: bool = True) -> dict[Any, Any]:
    """The map in `data`, of nothing but maps, lists, numbers, strings and bytes, within `limits`. WireError."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise WireError("undecodable", "a message is binary, not text")
    if len(data) > limits.bytes:
        raise WireError("too_big", f"the message has {len(data)} bytes, at most {limits.bytes} are taken")
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen > limits.containers:
            raise WireError("undecodable", f"the message has more than {limits.containers} maps and lists")

    def pairs(items: list[tuple[Any, Any]]) -> dict[Any, Any]:
        count()
        found = dict(items)
        if len(found) != len(items) or not all(isinstance(k, str if text_keys else str | bytes) for k in found):
            raise WireError("undecodable", "the keys of a map must be strings, each once")
        return found

    def items(found: list[Any]) -> list[Any]:
        count()
        return found

    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True, object_pairs_hook=pairs, list_hook=items, max_str_len=limits.text,
                               max_bin_len=limits.bytes, max_array_len=limits.items, max_map_len=limits.items, max_ext_len=0)
    except WireError:
        raise
    except Exception as e:  # msgpack's own kinds, UnicodeDecodeError, OverflowError, RecursionError: whatever it is, it is no message
        raise WireError("undecodable", f"the message is not msgpack within the limits ({type(e).__name__})") from None
    if not isinstance(body, dict):
        raise WireError("undecodable", "a message is a map")
    return body


def finite(x: np.ndarray) -> bool:
    return x.dtype.kind != "f" or bool(np.isfinite(x).all())


def array(node: Any, limits: Limits = LIMITS) -> np.ndarray:
    """{dtype, shape, data} -> a read-only view of data. WireError."""
    if not isinstance(node, dict) or node.keys() != {"dtype", "shape", "data"}:
        raise WireError("schema", "an array is a map of dtype, shape and data")
    return view(node["dtype"], node["shape"], node["data"], limits)


def view(dtype: Any, size: Any, data: Any, limits: Limits = LIMITS) -> np.ndarray:
    """The array of this dtype and shape in the bytes `data`, not copied. WireError."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError("dtype", f"the dtype of an array is one of {', '.join(DTYPES)}")
    if not isinstance(size, list) or len(size) > limits.dims or not all(type(n) is int and 0 <= n <= limits.bytes for n in size):
        raise WireError("schema", f"the shape of an array is a list of at most {limits.dims} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(size) * np.dtype(dtype).itemsize:
        raise WireError("shape", "the data of an array must have as many bytes as its shape and dtype say")
    found = np.frombuffer(data, dtype)
    if dtype == "|b1" and not (found.view(np.uint8) <= 1).all():
        raise WireError("schema", "a truth value is 0 or 1")
    return found.reshape(size)


def sendable(x: Any) -> np.ndarray:
    """x as one of DTYPES: other floats as <f4, other whole numbers as <i8. WireError for what is no array of numbers."""
    x = np.asarray(x)
    if x.dtype.str not in DTYPES:
        kind = "<f4" if x.dtype.kind == "f" and x.dtype.itemsize < 8 else {"f": "<f8", "i": "<i8", "u": "<i8", "b": "|b1"}.get(x.dtype.kind)
        if kind is None:
            raise WireError("dtype", f"an array of {x.dtype} cannot be sent: use numbers")
        x = x.astype(kind)
    return x


def short(value: Any) -> str:
    """Of what the other side sent, in a message for people: never long, never with control characters in it."""
    text = value if isinstance(value, str) else repr(value) if isinstance(value, int | float | None) else type(value).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:80])

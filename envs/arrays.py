"""One way to write a task for numpy and torch: functions of whichever arrays come in."""

from typing import Any

from array_api_compat import array_namespace as namespace
from array_api_compat import device

__all__ = ["like", "namespace"]


def like(value: Any, array: Any) -> Any:
    """A constant as an array of the same kind (numpy or torch), dtype and device as `array`."""
    return namespace(array).asarray(value, dtype=array.dtype, device=device(array))

"""One way to write a task for numpy and torch: functions of whichever arrays come in."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace as namespace
from array_api_compat import device, is_numpy_array

__all__ = ["Array", "clip", "like", "namespace"]

Array = Any  # numpy.ndarray or torch.Tensor; the two share no type


def like(value: Any, array: Any) -> Any:
    """A constant as an array of the same kind (numpy or torch), dtype and device as `array`, which holds floats."""
    if is_numpy_array(array):  # a single environment asks for many small ones
        return np.asarray(value, array.dtype)
    return namespace(array).asarray(value, dtype=array.dtype, device=device(array))


def clip(array: Any, low: Any = None, high: Any = None) -> Any:
    """`array` kept between bounds that broadcast with it; the namespaces' own clip takes five times as long."""
    xp = namespace(array)
    if low is not None:
        array = xp.maximum(array, like(low, array))
    return array if high is None else xp.minimum(array, like(high, array))

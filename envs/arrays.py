"""One way to write a task for numpy and torch: functions of whichever arrays come in."""

from typing import Any

import numpy as np
from array_api_compat import array_namespace as namespace
from array_api_compat import device, is_numpy_array

__all__ = ["Array", "like", "namespace"]

Array = Any  # numpy.ndarray or torch.Tensor; the two share no type


def like(value: Any, array: Any) -> Any:
    """A constant as an array of the same kind (numpy or torch), dtype and device as `array`, which holds floats."""
    if is_numpy_array(array):  # a single environment asks for many small ones
        return np.asarray(value, array.dtype)
    return namespace(array).asarray(value, dtype=array.dtype, device=device(array))

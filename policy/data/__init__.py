"""Where trajectories come from: episodes in zarr, windows over them, normalisation that travels with the weights."""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policy.data.files import DataError
    from policy.data.normalize import Normalizer
    from policy.data.record import Recorder
    from policy.data.store import Store, check_finite
    from policy.data.windows import Field, TrajectoryDataset

__all__ = ["DataError", "Field", "Normalizer", "Recorder", "Store", "TrajectoryDataset", "check_finite"]
HOME = {"DataError": "files", "Field": "windows", "Normalizer": "normalize", "Recorder": "record", "Store": "store", "TrajectoryDataset": "windows",
        "check_finite": "store"}


def __getattr__(name: str) -> Any:
    """Only what is asked for is imported: rotations and transforms need neither torch nor zarr, where an export plans."""
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)

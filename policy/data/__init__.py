"""Where trajectories come from: episodes in zarr, windows over them, normalisation that travels with the weights."""
from policy.data.files import DataError
from policy.data.normalize import Normalizer
from policy.data.store import Store, check_finite
from policy.data.windows import Field, TrajectoryDataset

__all__ = ["DataError", "Field", "Normalizer", "Store", "TrajectoryDataset", "check_finite"]

"""A small recorded dataset, and the real Push-T demonstrations where they are at hand."""
import os
from pathlib import Path

import pytest
from data_cases import EPISODES, SCHEMA

from policy.data import Store


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A recorded dataset (v3 directory) holding EPISODES."""
    store = Store.create(tmp_path / "demo.zarr", SCHEMA, fps=10, units={"pose": "m"}, action_semantics="target position, absolute")
    for episode in EPISODES:
        store.append(episode)
    return store.path


@pytest.fixture(scope="session")
def pusht() -> Path:
    """The 206 human Push-T demonstrations of Diffusion Policy (zarr v2)."""
    root = Path(os.environ.get("DIPOLE_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = root / "pusht" / "pusht_cchi_v7_replay.zarr"
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set DIPOLE_DATA to the folder that holds pusht/{path.name}")
    return path

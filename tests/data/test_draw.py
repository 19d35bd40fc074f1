"""The table says what is in the dataset, and the picture shows it."""
import pytest
from data_cases import SCHEMA
from matplotlib.image import imread

from policy.data import DataError, Store
from policy.data.draw import describe, draw


def test_describe(dataset):
    text = describe(Store.open(dataset))
    for part in ("zarr v3, 4 episodes, 50 steps, 10 Hz, 5 s in all", "1 / 9 / 30 steps", "target position, absolute", "uint8"):
        assert part in text
    pose = next(line.split() for line in text.splitlines() if line.startswith("pose"))
    values = Store.open(dataset).read("pose")
    assert pose[3:6] == [f"{v:.4g}" for v in (values.min(), values.max(), values.mean(dtype="float64"))] and pose[6] == "m"


def test_draw_shows_something(dataset, tmp_path):
    image = imread(draw(Store.open(dataset), tmp_path / "data.png"))
    assert image.shape[1] == 1400 and (image[..., :3].min(-1) < 0.9).mean() > 0.01  # ink
    only = imread(draw(Store.open(dataset), tmp_path / "one.png", ["reward"], episodes=1))
    assert only.shape[0] < image.shape[0]


def test_nothing_recorded_yet(tmp_path):
    store = Store.create(tmp_path / "d.zarr", SCHEMA, fps=10)
    assert "no complete episode yet" in describe(store)
    with pytest.raises(DataError, match="no complete episode to draw"):
        draw(store, tmp_path / "data.png")

"""A normaliser for each of several datasets: each row is learned in its dataset's own, a plan speaks the units of the one that was named."""
import numpy as np
import pytest
import torch

from policy.data import Store, statistics
from policy.data.mixture import Mixture
from policy.data.normalize import Normalizer, PerDataset
from policy.data.relative import RelativeToChunk
from policy.data.transform import NOTHING, Chain
from policy.data.windows import TrajectoryDataset
from policy.train import checkpoint
from policy.train.log import Log
from policy.train.loop import Settings, Trainer
from policy.types import Batch, Spec
from tests.helpers import CONFIG

SCALES = {"metres": 1.0, "millimetres": 1000.0}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The same motions in two units."""
    made = {}
    for name, scale in SCALES.items():
        rng = np.random.default_rng(0)
        schema = {"x": ((3,), "float32"), "image": ((4, 4, 3), "uint8"), "action": ((2,), "float32")}
        store = Store.create(tmp_path_factory.mktemp("d") / f"{name}.zarr", schema, fps=10)
        for _ in range(5):
            x = np.sin(np.arange(20)[:, None] * 0.2 + rng.uniform(0, 6, 3)) + 5
            store.append({"x": (x * scale).astype("float32"), "image": rng.integers(0, 256, (20, 4, 4, 3)).astype("uint8"),
                          "action": (x[:, :2] * scale).astype("float32")})
        made[name] = TrajectoryDataset(store, {"x": "x"}, "action", t_obs=2, horizon=8, val_ratio=0.2)
    return made


def planner_of(data, transform=None, per_step=False):
    torch.manual_seed(0)
    config = {**CONFIG, **({"transform": transform} if transform else {}), **({"per_step": True} if per_step else {})}
    if isinstance(data, Mixture):
        config["datasets"] = list(data.parts)
    chain = checkpoint.transform_of(config)
    normalizer = statistics.fit(data, chain, per_step=per_step)
    return checkpoint.build(config, Spec(obs={"x": (3,)}, action_dim=2, t_obs=2, horizon=8, fps=10), normalizer), config


RELATIVE = {"relative": {"_target_": "policy.data.relative.RelativeToChunk", "state": "x", "channels": [0, 1], "take": [0, 1]}}


@pytest.mark.parametrize("transform, per_step", [(None, False), (RELATIVE, False), (RELATIVE, True)])
def test_every_row_is_learned_in_the_units_of_its_dataset(parts, transform, per_step):
    mixture = Mixture(parts, named=True)
    mixed, _ = planner_of(mixture, transform, per_step)
    index = torch.arange(0, 160, 7)
    batch = mixture.batch(index)
    assert 0 < batch.source.sum() < len(index)
    own = mixed.normalizer.of(batch.source)
    obs, x0 = mixed.encode_obs(batch.obs, own), mixed.encode_actions(batch.action, batch.obs, batch.valid, own)
    for i, data in enumerate(parts.values()):
        alone, _ = planner_of(data, transform, per_step)
        mine = batch.source == i
        rows = Batch({"x": batch.obs["x"][mine]}, batch.action[mine], batch.valid[mine])
        torch.testing.assert_close(obs["x"][mine], alone.encode_obs(rows.obs)["x"], rtol=0, atol=0)
        torch.testing.assert_close(x0[mine], alone.encode_actions(rows.action, rows.obs, rows.valid), rtol=0, atol=0)
    both = mixture.batch(torch.tensor([3, 83])).obs  # the same motion in metres and in millimetres
    torch.testing.assert_close(both["x"][0] * 1000, both["x"][1], rtol=1e-5, atol=0)
    torch.testing.assert_close(*mixed.encode_obs(both, mixed.normalizer.of(torch.tensor([0, 1])))["x"], rtol=1e-4, atol=1e-4)


def test_the_plan_speaks_the_units_that_were_named(parts, tmp_path):
    data = Mixture(parts, [1, 2], named=True)
    planner, config = planner_of(data)
    trainer = Trainer(planner, data, tmp_path, Settings(steps=6, batch=16, warmup=1, log=3, precision="fp32"), config=config, val=data)
    with Log(tmp_path, wandb="disabled") as log:
        trainer.run(log)
    assert trainer.validation_loss() > 0
    resumed = Trainer(planner_of(data)[0], data, tmp_path, Settings(steps=6, batch=16, warmup=1, log=3, precision="fp32"), config=config)
    resumed.resume()
    assert all(torch.equal(a, b) for a, b in zip(planner.state_dict().values(), resumed.planner.state_dict().values(), strict=True))
    noise = torch.randn(1, 8, 2)
    plans = {}
    for name, scale in SCALES.items():
        one, facts = checkpoint.load(tmp_path, f"policy@{name}")
        assert type(one.normalizer) is Normalizer and "datasets" not in facts["planner"]
        plans[name] = one.plan({"x": torch.tensor([[[5.1, 4.9, 5.5]] * 2]) * scale}, noise=noise) / scale
    torch.testing.assert_close(*plans.values(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="several datasets: say whose robot it is for, checkpoint=policy@metres or checkpoint=policy@millimetres"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="no statistics of a dataset 'miles'"):
        checkpoint.load(tmp_path, "policy@miles")
    every, _ = checkpoint.load(tmp_path, "policy@*")
    assert isinstance(every.normalizer, PerDataset) and every.normalizer.names == list(SCALES)


def test_shared_statistics_are_those_of_both(parts):
    shared = statistics.fit(Mixture(parts), NOTHING)
    frames = torch.cat([p.arrays["x"] for p in parts.values()])
    assert type(shared) is Normalizer and torch.equal(shared.shift_x, (frames.amin(0) + frames.amax(0)) / 2)
    relative = statistics.fit(Mixture(parts), Chain((RelativeToChunk(state="x", channels=(0, 1), take=(0, 1)),)))
    assert relative.scale_action[0] > 100  # millimetres

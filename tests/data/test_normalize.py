"""Normalised values lie where the mode says; decode undoes encode; statistics travel with the weights and the exported graph."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from policy.data import Normalizer
from policy.data.moments import Moments
from policy.data.normalize import measured

MODES = ["limits", "gaussian", "quantile", "identity"]
values = arrays(np.float32, st.tuples(st.integers(2, 40), st.integers(1, 4)), elements=st.floats(-1e4, 1e4, width=32))


@settings(deadline=None)
@given(values, st.sampled_from(MODES))
def test_decode_undoes_encode(x, mode):
    x = torch.from_numpy(x)
    norm = Normalizer.fit({"x": x}, mode)
    encoded = norm.encode({"x": x})
    assert encoded["x"].isfinite().all() and encoded["x"].dtype == torch.float32
    back = norm.decode(encoded)["x"]
    assert ((back - x).abs() <= 1e-5 * x.abs().amax(0).clamp_min(1e-4)).all()


@settings(deadline=None)
@given(values)
def test_limits_reach_both_ends_and_constants_sit_at_zero(x):
    x = torch.from_numpy(x)
    e = Normalizer.fit({"x": x}).encode({"x": x})["x"]
    span = (x.double().amax(0) - x.double().amin(0))
    moves = span >= (1e-6 * x.double().abs().amax(0)).clamp_min(1e-4)
    assert (e[:, moves].amin(0) + 1).abs().le(1e-3).all() and (e[:, moves].amax(0) - 1).abs().le(1e-3).all()
    assert e[:, ~moves].abs().le(5e-3).all()


def test_gaussian_and_quantile():
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 20, 0.01]) + torch.tensor([0, 500, -3.0])
    e = Normalizer.fit({"x": x}, "gaussian").encode({"x": x})["x"]
    assert e.mean(0).abs().max() < 1e-3 and (e.std(0) - 1).abs().max() < 1e-3
    e = Normalizer.fit({"x": x}, "quantile").encode({"x": x})["x"]
    np.testing.assert_allclose(np.quantile(e, [0.01, 0.99], axis=0), [[-1] * 3, [1] * 3], atol=2e-3)


def test_a_channel_that_rests_almost_always_keeps_its_events_in_range():
    flag = torch.zeros(1000, 1)
    flag[7] = 800
    assert Normalizer.fit({"x": flag}, "quantile").encode({"x": flag})["x"].abs().max() == 1


@pytest.mark.parametrize("mode", ["limits", "gaussian", "quantile"])
@pytest.mark.parametrize("value, noise", [(0.7, 0), (0.0, 1e-5), (5e6, 0.5), (-3.0, 1e-6)])
def test_constant_channels(mode, value, noise):
    x = torch.full((100, 2), value)
    x[::2, 0] += noise
    x[:, 1] = torch.linspace(-1, 1, 100)
    norm = Normalizer.fit({"x": x}, mode)
    assert norm.encode({"x": x})["x"][:, 0].abs().max() <= noise
    assert norm.decode({"x": torch.zeros(2)})["x"][0] == pytest.approx(value, rel=1e-6, abs=1e-5)
    if mode == "limits":
        assert norm.encode({"x": x})["x"][:, 1].abs().max() == pytest.approx(1)


def test_small_units_can_be_kept():
    x = torch.linspace(-1e-5, 1e-5, 50)[:, None]
    assert Normalizer.fit({"x": x}).encode({"x": x})["x"].abs().max() < 1e-4
    assert Normalizer.fit({"x": x}, min_range=0.0).encode({"x": x})["x"].abs().max() == pytest.approx(1)


def test_images_modes_and_leading_axes():
    g = torch.Generator().manual_seed(0)
    data = {"image": torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8, generator=g), "quat": torch.rand(10, 4, generator=g),
            "pose": torch.rand(10, 2, generator=g), "depth": torch.rand(10, 4, 4, 1, generator=g) * 5}
    norm = Normalizer.fit(data, {"quat": "identity"})
    assert norm.encode({"image": torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None]})["image"].flatten().tolist() == [-1, 1]
    assert torch.equal(norm.encode(data)["quat"], data["quat"])
    assert norm.encode(data)["depth"].aminmax() == pytest.approx((-1, 1), abs=1e-6)
    x = {k: v.expand(5, 2, *v.shape)[:, :, 3] for k, v in data.items()}
    assert {k: v.shape for k, v in norm.encode(x).items()} == {k: v.shape for k, v in x.items()}
    assert sum(b.numel() for b in norm.buffers()) == 2 * (1 + 4 + 2 + 1)


def test_state_dict_and_keys_with_dots():
    data = {"observation.state": torch.randn(20, 3), "a%2Eb": torch.randn(20, 2), "a.b": torch.randn(20, 1), "a_b": torch.randn(20, 1),
            "values": torch.randn(20, 2)}
    norm = Normalizer.fit(data)
    empty = Normalizer({k: tuple(v.shape[1:]) for k, v in data.items()})
    assert torch.equal(empty.encode(data)["a.b"], data["a.b"])
    empty.load_state_dict(norm.state_dict())
    for key, x in norm.encode(data).items():
        assert torch.equal(x, empty.encode(data)[key])
    assert not list(norm.parameters()) and len(norm.state_dict()) == 10


def test_mistakes_say_so():
    x = {"pose": torch.randn(5, 2), "action": torch.randn(5, 1)}
    norm = Normalizer.fit(x)
    for call in (norm.encode, norm.decode):
        with pytest.raises(KeyError, match=r"'speed' has no statistics \(known: pose, action\)"):
            call({"speed": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"\['speed'\], which are not in the data \(known: pose, action\)"):
        Normalizer.fit(x, {"speed": "limits"})
    with pytest.raises(ValueError, match="mode 'minmax' of 'pose' is unknown; use one of limits"):
        Normalizer.fit(x, "minmax")
    with pytest.raises(ValueError, match="'pose' has NaN"):
        Normalizer.fit({"pose": torch.tensor([[1.0], [torch.nan]])})
    with pytest.raises(ValueError, match="no frames"):
        Normalizer.fit({"pose": torch.zeros(0, 2)})


def test_export():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, obs):
            x = self.norm.encode(obs)
            return self.norm.decode({"action": x["obs.pose"].mean(1) + x["image"].mean((1, 2, 3, 4))[:, None]})["action"]

    data = {"obs.pose": torch.randn(30, 2) * 7, "action": torch.randn(30, 2) + 5,
            "image": torch.randint(0, 256, (30, 4, 4, 3), dtype=torch.uint8)}
    norm = Normalizer.fit(data)
    obs = {"obs.pose": torch.randn(3, 2, 2), "image": torch.randint(0, 256, (3, 2, 4, 4, 3), dtype=torch.uint8)}
    b = torch.export.Dim("b")
    program = torch.export.export(Net(), (obs,), dynamic_shapes=({"obs.pose": {0: b}, "image": {0: b}},))
    more = {k: torch.cat([v, v]) for k, v in obs.items()}
    torch.testing.assert_close(program.module()(more), Net()(more))


def test_quantiles_of_more_than_is_kept_are_of_an_even_sample(monkeypatch):
    monkeypatch.setattr("policy.data.moments.KEEP", 64)
    x, seen = torch.arange(1003.0)[:, None] * torch.tensor([1.0, -2.0]), Moments()
    for part in x.split([1, 7, 200, 33, 500, 262]):
        seen.add(part)
    kept = seen.sample()[:, 0]
    assert kept[0] == 0 and len(kept.diff().unique()) == 1 and 16 <= len(kept) <= 32  # rows of two numbers
    assert (seen.n, seen.lo.tolist(), seen.hi.tolist()) == (1003, [0, -2004], [1002, 0])
    torch.testing.assert_close(seen.mean, x.double().mean(0))
    torch.testing.assert_close(seen.std, x.double().std(0, unbiased=False))
    lo, hi = (measured("quantile", seen)[0][0] + sign * measured("quantile", seen)[1][0] for sign in (-1, 1))
    assert abs(lo - 10) < 1003 / 16 and abs(hi - 992) < 1003 / 16

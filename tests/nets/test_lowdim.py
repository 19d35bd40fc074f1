"""Low-dimensional observations: one token per step, keys in the declared order."""
import torch

from policy.nets.lowdim import LowDim

OBS = {"b": (2,), "a": (2, 2), "c": ()}


def observation(n: int = 3, t: int = 2) -> dict[str, torch.Tensor]:
    return {k: torch.randn(n, t, *OBS[k], generator=torch.Generator().manual_seed(i)) for i, k in enumerate(("c", "a", "b"))}  # another order


def test_keys_are_joined_in_the_declared_order():
    encoder, obs = LowDim(OBS, 2), observation()
    cond = encoder({**obs, "unused": torch.zeros(3, 2, 9)})
    assert (encoder.tokens, encoder.dim) == (2, 7) and cond.tokens.shape == (3, 2, 7) and cond.mask is None
    want = torch.stack([torch.cat([obs["b"][:, t], obs["a"][:, t].flatten(1), obs["c"][:, t, None]], 1) for t in range(2)], 1)
    torch.testing.assert_close(cond.tokens, want, rtol=0, atol=0)
    torch.testing.assert_close(cond.flat, want.flatten(1), rtol=0, atol=0)  # oldest step first


def test_a_width_adds_a_network_per_step():
    encoder = LowDim(OBS, 2, width=5)
    obs = observation()
    tokens = encoder(obs).tokens
    assert (encoder.tokens, encoder.dim) == (2, 5) and tokens.shape == (3, 2, 5)
    later = encoder({k: v[:, 1:] for k, v in obs.items()}).tokens  # a step's token depends on that step alone
    torch.testing.assert_close(later, tokens[:, 1:])


def test_integers_and_doubles_become_float32():
    obs = {"b": torch.ones(3, 2, 2, dtype=torch.uint8), "a": torch.ones(3, 2, 2, 2, dtype=torch.float64), "c": torch.ones(3, 2)}
    assert LowDim(OBS, 2)(obs).tokens.dtype == torch.float32

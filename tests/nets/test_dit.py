"""The transformer: who sees whom, patches, its attention against the sum written out, and what it refuses."""
import pytest
import torch

from policy.nets.dit import Attention, Block, DiT, sinusoids
from policy.types import Cond
from tests.nets.test_backbones import stirred


def make(**options) -> DiT:
    torch.manual_seed(0)
    return stirred(DiT(3, (2, 5), **{"width": 32, "layers": 2, "heads": 2, **options}))  # type: ignore[return-value]


def inputs(t: int, b: int = 2) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(b, t, 3, generator=g), torch.rand(b, generator=g), Cond(torch.randn(b, 2, 5, generator=g))


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_action_has_no_gradient_from_later_ones(causal):
    x, tau, cond = inputs(7)
    x.requires_grad_()
    y = make(causal=causal)(x, tau, cond)
    sees = torch.stack([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0].abs().amax((0, 2)) for i in range(7)]) > 0
    assert sees.equal(torch.ones(7, 7).tril().bool() if causal else torch.ones(7, 7).bool())


def test_a_causal_chunk_begins_as_the_shorter_one():
    net = make(causal=True)
    x, tau, cond = inputs(9)
    torch.testing.assert_close(net(x, tau, cond)[:, :4], net(x[:, :4], tau, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("t", range(1, 10))
def test_any_length_is_the_padded_length_cut(patch, t):
    """What stands behind the end is the last step repeated up to a multiple of patch, by hand here, and is cut off again."""
    net = make(patch=patch)
    x, tau, cond = inputs(t)
    whole = -(-t // patch) * patch
    y = net(x, tau, cond)
    assert y.shape == x.shape
    torch.testing.assert_close(y, net(torch.cat([x, x[:, -1:].expand(-1, whole - t, -1)], 1), tau, cond)[:, :t], rtol=0, atol=0)


def test_steps_keep_their_order_in_and_out_of_patches():
    """With its blocks shut, a patch of four reads and writes its own steps alone."""
    net = make(patch=4, layers=0)
    x, tau, cond = inputs(8)
    x.requires_grad_()
    y = net(x, tau, cond)
    assert torch.autograd.grad(y[:, 2].sum(), x, retain_graph=True)[0].abs().amax((0, 2)).gt(0).tolist() == [True] * 4 + [False] * 4
    with torch.no_grad():
        net.write.bias += torch.arange(12.0) * 100  # step 0 is the first three numbers written, and so on
        steps = (net(x, tau, cond) - y).reshape(2, 2, 12)
    torch.testing.assert_close(steps, (torch.arange(12.0) * 100).expand(2, 2, 12), rtol=1e-4, atol=1e-3)


def test_actions_are_told_apart_by_position():
    x, tau, cond = inputs(1)
    y = make()(x.expand(-1, 6, -1), tau, cond)  # six equal actions
    assert (y[:, 1:] - y[:, :-1]).abs().amax((0, 2)).min() > 0.01
    table = sinusoids(50, torch.zeros(1, 32))
    assert torch.cdist(table, table).add(torch.eye(50)).min() > 0.5
    torch.testing.assert_close(table[3, [0, 16, 8, 24]], torch.tensor([3.0, 3.0, 0.03, 0.03]).sin() * torch.tensor([1, 0, 1, 0])
                               + torch.tensor([3.0, 3.0, 0.03, 0.03]).cos() * torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_sum_written_out(dtype):
    torch.manual_seed(1)
    layer = Attention(16, 2).to(dtype)
    h, context = torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    got = layer(h, context, mask[:, None, None])
    q, (k, v) = layer.query(h).double(), layer.key_value(context).double().chunk(2, -1)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        weight = (q[..., part] @ k[..., part].mT / 8**0.5).exp() * mask[:, None]
        heads.append(weight / weight.sum(-1, keepdim=True) @ v[..., part])
    want = torch.cat(heads, -1) @ layer.out.weight.double().T + layer.out.bias.double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


def test_a_fresh_block_changes_nothing():
    h, c, context = torch.randn(2, 6, 16), torch.randn(2, 1, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(Block(16, 2, 4, "gelu", cross=True)(h, c, context, None, False), h, rtol=0, atol=0)


def test_the_number_of_parameters():
    """Of the default on Push-T; the U-Net has 4.56 M."""
    assert sum(p.numel() for p in DiT(2, (2, 20)).parameters()) == 1_839_874


def test_misfits_are_told():
    net = make()
    x, tau, cond = inputs(6)
    with pytest.raises(ValueError, match=r"width 30 must be a multiple of 2 \* heads = 8"):
        DiT(2, width=30)
    with pytest.raises(ValueError, match="causal=True needs patch=1: the 2 actions of one token"):
        DiT(2, patch=2, causal=True)
    with pytest.raises(ValueError, match="patch=0 and layers=4 must be"):
        DiT(2, patch=0)
    with pytest.raises(ValueError, match="conditioned on 2 tokens of 5 features; pass cond"):
        net(x, tau)
    with pytest.raises(ValueError, match=r"expected shape \(b, t, d=3\), got \(2, 6, 2\)"):
        net(x[..., :2], tau, cond)
    for wrong in (torch.zeros(2, 3, 5), torch.zeros(2, 2, 4), torch.zeros(2, 5, 2)):
        with pytest.raises(ValueError, match=r"conditioned on 2 tokens of 5 features, got cond.tokens of shape \(2, "):
            net(x, tau, Cond(wrong))

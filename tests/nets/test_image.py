"""The image encoder: where a bright spot is, that crops are what they say, and that a camera's layout does not matter."""
import pytest
import torch

from policy.nets.image import SpatialSoftmax, Vision, cropped

SHAPES = {"img": (32, 32, 3), "q": (4,)}


def batch(b=3, t=2):
    g = torch.Generator().manual_seed(0)
    return {"img": torch.randn(b, t, 32, 32, 3, generator=g), "q": torch.randn(b, t, 4, generator=g)}


def test_spatial_softmax_says_where_a_spot_is():
    maps = torch.full((1, 2, 5, 9), -1e3)
    maps[0, 0, 4, 0] = 1e3
    maps[0, 1, 2, 6] = 1e3
    assert torch.allclose(SpatialSoftmax()(maps), torch.tensor([[-1., 1., .5, 0.]]))


def test_tokens_are_one_a_step_and_end_in_the_numbers():
    net = Vision(SHAPES, 2, features=16).eval()
    obs = batch()
    cond = net(obs)
    assert cond.tokens.shape == (3, net.tokens, net.dim) == (3, 2, 20)
    assert torch.equal(cond.tokens[..., 16:], obs["q"])


def test_channels_first_and_last_give_the_same():
    torch.manual_seed(0)
    last = Vision(SHAPES, 2).eval()
    torch.manual_seed(0)
    first = Vision({"img": (3, 32, 32), "q": (4,)}, 2).eval()
    obs = batch()
    swapped = {**obs, "img": obs["img"].movedim(-1, 2)}
    assert torch.equal(last(obs).tokens, first(swapped).tokens)


def test_a_crop_is_a_window_of_the_image_the_same_for_all_steps_and_drawn_for_each_sample():
    x = torch.arange(32 * 32, dtype=torch.float32).view(1, 1, 1, 32, 32).expand(64, 2, 3, 32, 32)
    torch.manual_seed(0)
    y = cropped(x, 0.75, True)
    assert y.shape == (64, 2, 3, 24, 24)
    corner = y[:, 0, 0, 0, 0]
    expected = corner[:, None, None] + torch.arange(24)[:, None] * 32 + torch.arange(24)
    assert torch.equal(y, expected[:, None, None].expand_as(y))
    assert len(corner.unique()) > 30 and {int(v) // 32 for v in corner} >= {0, 8} and {int(v) % 32 for v in corner} >= {0, 8}
    assert torch.equal(cropped(x, 0.75, False), x[..., 4:28, 4:28]) and cropped(x, 1.0, True) is x


def test_without_training_it_is_a_function_of_the_image_alone():
    net, obs = Vision(SHAPES, 2), batch()
    assert not torch.equal(net.train()(obs).tokens, net(obs).tokens)
    assert torch.equal(net.eval()(obs).tokens, net(obs).tokens)


def test_it_learns_where_a_spot_is():
    """Half of the positions are learned from, the others asked for: within a pixel of 32."""
    torch.manual_seed(0)
    at = torch.rand(256, 2) * 24 + 4
    grid = torch.arange(32)
    image = torch.exp(-((grid - at[:, :1])[:, None] ** 2 + (grid - at[:, 1:])[:, :, None] ** 2) / 4)[:, None, :, :, None] * 2 - 1
    net = Vision({"img": (32, 32, 1)}, 1, widths=(16, 16), features=2, keypoints=8, crop=1.0)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(80):
        loss = (net({"img": image[:128]}).tokens[:, 0] - at[:128] / 16 + 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = (16 * (net({"img": image[128:]}).tokens[:, 0] + 1) - at[128:]).norm(dim=-1)
    assert error.mean() < 1.0


@pytest.mark.parametrize("how, words", [({"crop": 0.0}, "crop"), ({"widths": (12,)}, "multiples of 8")])
def test_wrong_settings_are_refused(how, words):
    with pytest.raises(ValueError, match=words):
        Vision(SHAPES, 2, **how)
    with pytest.raises(ValueError, match="encoder=lowdim"):
        Vision({"q": (4,)}, 2)

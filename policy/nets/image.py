"""Camera images, and whatever numbers come with them, as condition tokens."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.types import Cond, Obs

CHANNELS = (1, 3, 4)  # grey, colour, colour and depth


class Vision(nn.Module):
    """Observations {key: (b, t_obs, *shape)} -> one token per observed step: features of every camera, then the other keys flattened.

    A key of three axes with 1, 3 or 4 channels last (h, w, c) or first (c, h, w) is a camera; each has a residual network of its own.
    widths: channels of its stages, the first behind a convolution of stride 2; every stage but the last halves the image, which should keep
    8 pixels or more a side.   keypoints: maps of the last stage, of which spatial softmax (Levine 2016) takes the mean position.
    features: numbers per camera and step.   crop: share of each side seen; drawn anew in training, the same for all steps of a sample, the
    middle otherwise (Chi 2023: .9); 1 sees all.   GroupNorm, not BatchNorm, whose running statistics and averaged weights do not agree.
    """

    def __init__(self, obs: dict[str, tuple[int, ...]], t_obs: int, *, widths: Sequence[int] = (32, 64, 128), keypoints: int = 32, features: int = 64,
                 crop: float = 0.9):
        super().__init__()
        if not 0 < crop <= 1:
            raise ValueError(f"crop={crop} is the share of each side of an image that is seen, in (0, 1]")
        if wrong := [w for w in widths if w < 8 or w % 8]:
            raise ValueError(f"widths {wrong} must be multiples of 8")
        self.first = {key: channels_first(shape) for key, shape in obs.items() if is_image(shape)}
        if not self.first:
            raise ValueError(f"encoder=image needs a camera among the observations, an array (h, w, 3); there are {dict(obs)}. Use encoder=lowdim")
        self.rest, self.crop = [key for key in obs if key not in self.first], crop
        self.cameras = nn.ModuleDict({name_of(key): camera(shape[0 if self.first[key] else 2], widths, keypoints, features)
                                      for key, shape in obs.items() if key in self.first})
        self.tokens = t_obs
        self.dim = features * len(self.first) + sum(torch.Size(obs[k]).numel() for k in self.rest)

    def forward(self, obs: Obs) -> Cond:
        seen = []
        for key, first in self.first.items():
            x = obs[key].float() if first else obs[key].float().movedim(-1, 2)  # (b, t, c, h, w)
            x = cropped(x, self.crop, self.training)
            seen.append(self.cameras[name_of(key)](x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        numbers = [obs[k].reshape(*obs[k].shape[:2], -1).float() for k in self.rest]
        return Cond(torch.cat([*seen, *numbers], -1))


def is_image(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and (shape[0] in CHANNELS or shape[2] in CHANNELS)


def channels_first(shape: Sequence[int]) -> bool:
    return shape[2] not in CHANNELS


def name_of(key: str) -> str:
    """Module names cannot hold a dot, and keys such as observation.image do."""
    return key.replace("%", "%25").replace(".", "%2E")


def cropped(x: Tensor, share: float, draw: bool) -> Tensor:
    """x (b, t, c, h, w) -> (b, t, c, share h, share w): a place drawn for each sample, or the middle."""
    h, w = (max(1, round(share * n)) for n in x.shape[-2:])
    rows, columns = x.shape[-2] - h, x.shape[-1] - w
    if not rows and not columns:
        return x
    if not draw:
        return x[..., rows // 2:rows // 2 + h, columns // 2:columns // 2 + w]
    b = len(x)
    top, left = (torch.randint(0, n + 1, (b, 1), device=x.device) for n in (rows, columns))
    r, c = top + torch.arange(h, device=x.device), left + torch.arange(w, device=x.device)
    return x[torch.arange(b, device=x.device)[:, None, None], :, :, r[:, :, None], c[:, None, :]].movedim((1, 2), (3, 4))


def camera(channels: int, widths: Sequence[int], keypoints: int, features: int) -> nn.Module:
    """(n, channels, h, w) in about [-1, 1] -> (n, features)"""
    stages = [Residual(a, b, 1 if i == len(widths) - 1 else 2) for i, (a, b) in enumerate(zip([widths[0], *widths], widths, strict=False))]
    return nn.Sequential(nn.Conv2d(channels, widths[0], 5, stride=2, padding=2), nn.GroupNorm(8, widths[0]), nn.SiLU(), *stages,
                         nn.Conv2d(widths[-1], keypoints, 1), SpatialSoftmax(), nn.Linear(2 * keypoints, features))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He 2016), with GroupNorm of 8 groups."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.one, self.two = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)
        self.short = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.short(x) + self.norm2(self.two(F.silu(self.norm1(self.one(x))))))


class SpatialSoftmax(nn.Module):
    """(n, k, h, w) -> (n, 2k): where each map is, the mean of (x, y) in [-1, 1] under the softmax of its values."""

    def forward(self, maps: Tensor) -> Tensor:
        n, k, h, w = maps.shape
        share = maps.flatten(2).softmax(-1).view(n, k, h, w)
        x, y = (torch.linspace(-1, 1, size, device=maps.device, dtype=share.dtype) for size in (w, h))
        return torch.stack([(share.sum(2) * x).sum(-1), (share.sum(3) * y).sum(-1)], -1).flatten(1)

"""Any network, told which steps of a chunk are known: what training-time real-time chunking needs."""
import torch
from torch import Tensor, nn

from policy.types import Cond, shape


class Prefix(nn.Module):
    """x (b,t,d), tau (b,) or (b,t), cond -> (b,t,d). A step at noise time 0 is known: it enters clean, with a flag beside it.

    net: takes and gives d + 1 channels, the last of which is the flag and is dropped again. It is asked at the time of the steps that are not known.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, tau: Tensor, cond: Cond | None = None) -> Tensor:
        b, t, _ = shape(x, "b t d")
        if tau.ndim == 2:
            shape(tau, "b t", b=b, t=t)
            flag, tau = (tau == 0).to(x.dtype), tau.amax(1)
        else:
            flag = x.new_zeros(b, t)
        answer: Tensor = self.net(torch.cat([x, flag[..., None]], -1), tau, cond)
        return answer[..., :-1]

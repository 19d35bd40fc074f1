"""A function with a gradient inside as a graph of plain operators, which exporters know: they know none of those that only a gradient has."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

aten = torch.ops.aten


def traced(fn: Callable[..., Tensor], example: Sequence[Tensor]) -> GraphModule:
    """fn's operators on inputs of these sizes. Whatever fn decides by their values is decided once and for all: compare the two."""
    with sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False), torch.no_grad():  # the other kinds of attention are one operator each
        return make_fx(fn, decomposition_table=TABLE)(*(x.detach().clone() for x in example))


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
                          transposed: bool, output_padding: Sequence[int], groups: int, mask: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradient of a convolution in its input is the other kind of convolution; torch has no decomposition of it."""
    if mask[1] or mask[2]:
        raise NotImplementedError("weights take no gradient in a plan")
    axes = range(len(stride))
    lost = [0 for _ in axes] if transposed else [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1) for i in axes]
    return aten.convolution.default(grad, weight, None, stride, padding, dilation, not transposed, lost, groups), None, None


TABLE: dict[Any, Callable[..., Any]] = get_decompositions([
    aten.native_group_norm, aten.native_group_norm_backward, aten.native_layer_norm, aten.native_layer_norm_backward, aten.mish_backward, aten.silu_backward,
    aten.gelu_backward, aten.tanh_backward, aten.sigmoid_backward, aten.threshold_backward, aten.leaky_relu_backward, aten.elu_backward,
    aten.hardswish_backward, aten.hardtanh_backward, aten.softplus_backward, aten._softmax_backward_data, aten._log_softmax_backward_data,
    aten.slice_backward, aten.select_backward])
TABLE[aten.convolution_backward.default] = _convolution_backward

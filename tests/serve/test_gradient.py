"""A step with a gradient inside, as plain operators: its answers are autograd's, and no operator is left that only a gradient has."""
import pytest
import torch
from torch import Tensor, nn

from policy.diffusion import rtc
from policy.diffusion.path import Linear
from policy.serve.export import graphs
from policy.serve.gradient import traced
from policy.types import Cond
from tests.serve.small import small


def operators(graph) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("layer, steps", [(nn.Conv1d(4, 6, 3, stride=2, padding=1), 9), (nn.Conv1d(4, 6, 3, stride=2, padding=1), 8),
                                          (nn.Conv1d(4, 8, 5, padding=4, dilation=2, groups=2), 9), (nn.ConvTranspose1d(4, 6, 4, 2, 1), 7),
                                          (nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2), 7), (nn.Conv2d(4, 3, 3, stride=(1, 2)), (6, 7))])
def test_the_gradient_of_a_convolution_is_the_other_kind(layer, steps):
    layer.requires_grad_(False)

    def through(x: Tensor) -> Tensor:
        y, back = torch.func.vjp(layer, x)
        return back(y**2)[0]

    torch.manual_seed(0)
    shape = (1, 4, *(steps if isinstance(steps, tuple) else (steps,)))
    graph, x = traced(through, [torch.randn(shape)]), torch.randn(shape, requires_grad=True)
    y = layer(x)
    want, = torch.autograd.grad(y, x, y.detach()**2)
    torch.testing.assert_close(graph(x.detach()), want)
    assert operators(graph) & {"aten.convolution.default"} and not any("backward" in name for name in operators(graph))


@pytest.mark.parametrize("options", [{"net": "unet1d", "horizon": 7}, {"net": "unet1d", "horizon": 6, "rtc": 3, "path": Linear(), "target": "flow"},
                                     {"net": "dit", "horizon": 5}, {"net": "mlp", "horizon": 3, "limits": ()}])
def test_a_guided_step_is_real_time_chunking(options):
    """Against policy.diffusion.rtc.guided around the denoiser itself, then its clips; the graph on other numbers than it was traced with."""
    planner = small(**options)
    step, example = graphs(planner)["step"]
    graph = traced(step.guided, [x for name, x in example.items() if name != "mask"])
    assert not any("backward" in name for name in operators(graph))
    g = torch.Generator().manual_seed(1)
    x, known = torch.randn(2, *example["x"].shape, generator=g)
    weight = torch.rand(example["pull"].shape, generator=g)
    for tau in (0.9, 0.3):
        tokens = planner.encode({k: torch.randn(1, 2, *size, generator=g) for k, size in planner.spec.obs.items()}).tokens
        times = torch.full_like(example["tau"], tau)
        want = rtc.guided(planner.denoiser, planner.denoiser.path, known, weight[0])(x, times, Cond(tokens))
        for guide in planner.guides:
            want = want.clamp(-guide.keywords["limit"], guide.keywords["limit"])
        kappa = rtc.gain(planner.denoiser.path, times.flatten()[:1], x, 5.0, 1.0)[0]
        steered = [graphs_input(planner, tokens, times)[k] for k in ("cond", "time") if k in example]
        got = graph(x, times, steered[0], known, kappa * weight, *steered[1:])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def graphs_input(planner, tokens: Tensor, times: Tensor) -> dict[str, Tensor]:
    """What a step is told of condition and noise time: tokens, or for a U-Net what Films makes of both."""
    from policy.nets.steered import Films
    from policy.serve.step import unet_of
    if (net := unet_of(planner)) is None:
        return {"cond": tokens}
    films = Films(net)
    return {"cond": films.cond(Cond(tokens)), "time": films.time(times.flatten()[:1])}

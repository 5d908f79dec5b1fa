"""torch.fx graphs of converted models: the layers are leaves there, as torch's own are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import bnext


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Block(), Block()).double()


@pytest.mark.parametrize("options", [{}, {"fuse": True}, {"fuse": True, "sync": True}], ids=str)
def test_a_traced_model_has_its_layers_as_leaves_and_learns_the_same(options: dict[str, bool]) -> None:
    model = bnext.convert(network(), **options)
    twin = copy.deepcopy(model)
    traced = fx.symbolic_trace(model)
    assert {"1", "3.bn", "4.bn"} <= {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for training in (True, False, True):  # the layers look at their mode in each call
        outputs = [each.train(training)(x) for each in (traced, twin)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)  # nothing is fused in a trace
        if training:
            for output in outputs:
                output.square().sum().backward()
    gradients = ([p.grad for p in each.parameters()] for each in (traced, twin))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*(list(each.buffers()) for each in (traced, twin)), rtol=1e-12, atol=1e-12)


def test_a_proxy_outside_of_a_trace_is_no_leaf() -> None:
    graph = fx.Graph()
    proxy = fx.Proxy(graph.placeholder("x"))
    assert not isinstance(proxy.tracer, fx.Tracer)
    with pytest.raises(fx.proxy.TraceError):
        bnext.BatchNorm2d(3)(proxy)

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


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_traced_model_computes_and_learns_the_same(fuse: bool, x: Tensor) -> None:
    model = bnext.convert(network(), fuse=fuse)
    twin = copy.deepcopy(model)
    traced = fx.symbolic_trace(model)
    for training in (True, False, True):
        # The layers ask for it at each call.
        traced.train(training)
        twin.train(training)
        a, b = traced(x), twin(x)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # what is traced is the plain forward
        if training:
            a.square().sum().backward()
            b.square().sum().backward()
    for p, q in zip(traced.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-11)
    for a, b in zip(traced.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_layers_are_leaves(fuse: bool) -> None:
    model = bnext.convert(network(), fuse=fuse)
    graph = fx.symbolic_trace(model).graph
    called = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    assert {"1", "3.bn", "4.bn"} <= called.keys()


def test_a_synchronised_model_is_traced_too(x: Tensor) -> None:
    model = bnext.convert(network(), fuse=True, sync=True).eval()
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_proxy_outside_of_a_trace_is_no_leaf() -> None:
    graph = fx.Graph()
    proxy = fx.Proxy(graph.placeholder("x"))
    assert not isinstance(proxy.tracer, fx.Tracer)
    with pytest.raises(fx.proxy.TraceError):
        bnext.BatchNorm2d(3)(proxy)

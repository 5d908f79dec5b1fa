"""Evaluation without gradients is compiled as arithmetic that can be fused, and equals the operator to rounding."""

from __future__ import annotations

import pytest
import torch
from cases import ACTS, DTYPES, Case
from checks import check_forward, make_inputs
from marks import FLAGS, pairs
from reference import Act
from torch import Tensor, fx

import bnext
from bnext.functional import batch_norm

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CASES = [Case((7, 5), "contiguous"), Case((3, 5, 5, 3), "contiguous"), Case((3, 5, 5, 3), "channels_last")]


class Graphs:
    """A backend that keeps the code of each graph, and runs the graph unchanged."""

    def __init__(self) -> None:
        self.code: list[str] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        self.code.append(module.code)
        return module


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager calls run the arithmetic that a compiler would trace."""
    # Before torch 2.13 bnext asks is_dynamo_compiling whether a compilation is an export.
    for name in ("is_compiling", "is_dynamo_compiling"):
        monkeypatch.setattr(torch.compiler, name, lambda: True)


@pairs(case=CASES, act=(None, *ACTS), dtype=DTYPES, affine=FLAGS, has_residual=FLAGS)
@torch.no_grad()
def test_composed_equals_the_reference(
    case: Case, act: Act, dtype: torch.dtype, affine: bool, has_residual: bool, composed: None
) -> None:
    x, _, params, residual = make_inputs(*case, dtype, has_residual=has_residual)
    params = params if affine else params._replace(weight=None, bias=None)
    check_forward(x, params, training=False, residual=residual, act=act)


@torch.no_grad()
def test_composed_keeps_its_accuracy_far_from_zero(composed: None) -> None:
    x = 1e5 + torch.randn(16, 4, 16, 16)
    mean, var = torch.full((4,), 1e5), torch.ones(4)
    expected = (x.double() - 1e5) / (1 + 1e-5) ** 0.5
    assert (batch_norm(x, mean, var) - expected).abs().max() <= 2e-6


def compiled_code(layer: torch.nn.Module, *args: Tensor) -> str:
    """The code of the one graph that the compiler makes of the call."""
    graphs = Graphs()
    torch.compile(layer, fullgraph=True, backend=graphs)(*args)
    (code,) = graphs.code
    return code


def test_only_what_needs_no_gradient_is_composed() -> None:
    layer, x = bnext.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    assert "bnext.batch_norm_train" in compiled_code(layer, x)
    layer.eval()
    assert "bnext.batch_norm_eval" in compiled_code(layer, x)
    with torch.no_grad():
        assert "bnext" not in compiled_code(layer, x)
    layer.requires_grad_(False)
    assert "bnext" not in compiled_code(layer, x)
    assert "bnext.batch_norm_eval" in compiled_code(layer, x.requires_grad_())


@torch.no_grad()
def test_a_residual_that_does_not_fit_raises_as_in_eager() -> None:
    layer = bnext.BatchNormAct2d(3).eval()
    run = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 4, 4)
    for residual in (torch.randn(3, 1, 1), torch.randn(2, 3, 4, 4).double()):
        with pytest.raises((ValueError, TypeError), match="residual"):
            layer(x, residual)
        with pytest.raises((ValueError, TypeError, torch._dynamo.exc.TorchRuntimeError), match="residual"):
            run(x, residual)


@torch.no_grad()
def test_dynamic_shapes_compile_once() -> None:
    graphs = Graphs()
    layer = bnext.BatchNormAct2d(3, act="silu").eval()
    run = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    for shape in ((2, 3, 4, 5), (5, 3, 6, 2)):
        x, residual = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(run(x, residual), layer(x, residual))
    assert len(graphs.code) == 1

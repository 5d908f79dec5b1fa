"""The fused op in torch.compile and torch.export: no graph break, results equal to eager's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from cases import Case, make_grad, make_input, make_parameters, make_residual, name, same_bits
from reference import Act
from test_compile import COMPILED_CASES, assert_same_steps, module_for, twins
from torch import Tensor

import bnext
from bnext.functional import batch_norm_act

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])
# One that is kept as a mask, one that is computed again, and one with a number in its name.
ACTS = pytest.mark.parametrize("act", ["relu", "silu", ("leaky_relu", 0.3)], ids=name)


@ACTS
@RESIDUAL
@MODES
def test_steps_equal_eager(training: bool, has_residual: bool, act: Act) -> None:
    case = COMPILED_CASES[2]
    module = module_for(case, "BatchNormAct", momentum=None, act=act).train(training)
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case, has_residual)


@pytest.mark.parametrize("case", COMPILED_CASES[:2], ids=name)
def test_every_rank_equals_eager(case: Case) -> None:
    module = module_for(case, "BatchNormAct")
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case, has_residual=True)


@MODES
def test_dynamic_shapes_compile_once(training: bool) -> None:
    module = module_for(COMPILED_CASES[1], "BatchNormAct").train(training)
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    _, run = twins(module, dynamic=True, backend=counting)
    # Sizes that are equal in the first call would be taken for one and the same.
    for shape in ((3, 5, 7, 4), (4, 5, 6, 2), (9, 5, 11, 6)):
        x, residual = make_input(shape), make_residual(shape)
        assert same_bits(module(x, residual), run(x, residual))
    assert len(graphs) == 1


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_dynamic_shapes_backward(act: Act) -> None:
    # The mask's size follows from those of the input, rounded up: an expression, where shapes are symbols.
    module = module_for(COMPILED_CASES[1], "BatchNormAct", act=act)
    twin, run = twins(module, dynamic=True)
    for shape in ((3, 5, 7, 4), (4, 5, 6, 2)):
        for layout in ("contiguous", "channels_last"):
            assert_same_steps(module, twin, run, Case(shape, layout), has_residual=True)


def test_changing_the_activation_compiles_anew() -> None:
    module = module_for(COMPILED_CASES[0], "BatchNormAct")
    twin, run = twins(module)
    for act in ("relu", "gelu", None, ("leaky_relu", -0.5)):
        module.act = twin.act = act
        assert_same_steps(module, twin, run, COMPILED_CASES[0], has_residual=True)


def test_functional_form_inside_a_larger_graph() -> None:
    p = make_parameters(5)
    eager, compiled = p.clone(), p.clone()

    def step(x: Tensor, residual: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = batch_norm_act(x * 2, mean, var, p.weight, p.bias, residual + 1, True, 0.3, act=("leaky_relu", 0.2))
        return y.sin()

    x, residual, g = (make((3, 5, 5, 3)) for make in (make_input, make_residual, make_grad))
    results = []
    for run, stats in ((step, eager), (torch.compile(step, fullgraph=True, backend="aot_eager"), compiled)):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        y = run(*leaves, *stats[2:])
        results.append([y, *torch.autograd.grad(y, leaves, g), *stats])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("act", ["swish", ("relu", 1)], ids=name)
def test_unknown_activation_raises_in_compiled_code_as_well(act: Act) -> None:
    mean, var = torch.zeros(5), torch.ones(5)
    run = torch.compile(lambda x: batch_norm_act(x, mean, var, training=True, act=act), backend="aot_eager")
    with pytest.raises(Exception, match="leaky_relu"):
        run(torch.randn(7, 5))
    assert torch.equal(mean, torch.zeros(5))


class Block(torch.nn.Module):
    """A residual block, whose second half ends in batch norm, addition and activation."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norms = torch.nn.ModuleList(bnext.BatchNormAct2d(8, momentum=None, act=act) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norms[0](self.convs[0](x))
        return self.norms[1](self.convs[1](y), x)


@pytest.mark.slow
def test_inductor_trains_a_block() -> None:
    # Silu and no relu: convolutions that round otherwise would put a pre-activation on the other side of a kink.
    model = Block("silu")
    twin, run = twins(model, backend="inductor")
    x = torch.randn(4, 3, 9, 9)
    for _ in range(2):
        y, z = model(x), run(x)
        # Inductor may fuse and reorder the convolutions: 1e-5 of the largest value is a hundred roundings.
        assert (y - z).abs().max() <= 1e-5 * y.abs().max()
        y.square().mean().backward()
        z.square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-7
    for (key, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * p.abs().max(), key


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_round_trip(dynamic: bool) -> None:
    model = Block("relu").eval()
    for norm in model.norms:
        norm.running_mean.normal_()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    program = torch.export.export(model, (torch.randn(4, 3, 9, 9),), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    restored = torch.export.load(buffer).module()
    for batch in (4, 7) if dynamic else (4,):
        x = torch.randn(batch, 3, 9, 9)
        assert same_bits(restored(x), model(x))


def test_export_of_training_keeps_the_updates() -> None:
    module = module_for(COMPILED_CASES[1], "BatchNormAct", momentum=None)
    twin = copy.deepcopy(module)
    x, residual = make_input((3, 5, 5, 3)), make_residual((3, 5, 5, 3))
    exported = torch.export.export(twin, (x, residual)).module()
    for _ in range(2):
        assert same_bits(exported(x, residual), module(x, residual))
    buffers = dict(exported.named_buffers())
    for key, expected in module.named_buffers():
        assert same_bits(buffers[key], expected), key

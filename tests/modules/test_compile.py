"""Compiled layers have no graph break and give the bits of eager mode. Where an `act` is None the layer is BatchNorm*,
else BatchNormAct*."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import TORCH_HAS_BIAS_OPTION, Case, make_grad, make_input, make_parameters, make_residual, same_bits
from checks import call
from marks import FLAGS, each, pairs
from reference import Act
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bnext
from bnext.functional import batch_norm_act

pytestmark = pytest.mark.usefixtures("fresh_compiler")

COMPILED_CASES = [
    Case((7, 5), "contiguous"),
    Case((3, 5, 5, 3), "contiguous"),
    Case((3, 5, 5, 3), "channels_last"),
]


def twins(module: nn.Module, **options: object) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A copy of the module with its own parameters and buffers, and that copy compiled."""
    twin = copy.deepcopy(module)
    return twin, torch.compile(twin, fullgraph=True, **{"backend": "aot_eager", **options})


def module_for(case: Case, act: Act = None, **options: object) -> nn.Module:
    """A layer that is not new: BatchNormAct* where there is an activation, else BatchNorm*."""
    kind, options = ("BatchNorm", options) if act is None else ("BatchNormAct", {"act": act, **options})
    module = getattr(bnext, f"{kind}{1 if len(case.shape) == 2 else 2}d")(case.shape[1], **options)
    p = make_parameters(case.shape[1])
    with torch.no_grad():
        for name, value in p._asdict().items():
            if getattr(module, name) is not None:
                getattr(module, name).copy_(value)
    return module


def assert_same_steps(
    eager: nn.Module, twin: nn.Module, run: Callable[..., Tensor], case: Case, has_residual: bool = False
) -> None:
    """Three training steps of both: outputs, gradients and buffers agree bit for bit."""
    for _ in range(3):
        values, g = [make_input(*case) for _ in range(1 + has_residual)], make_grad(case.shape)
        results = []
        for module, call_module in ((eager, eager), (twin, run)):
            leaves = [value.detach().requires_grad_() for value in values]
            y = call_module(*leaves)
            y.backward(g)
            results.append([y, *(t.grad for t in (*leaves, *module.parameters())), *module.buffers()])
        assert all(map(same_bits, *results))


# No activation; one with a mask; one whose backward computes the pre-activation again; one with a parameter.
ACTS = (None, "relu", "silu", ("leaky_relu", 0.3))
OPTIONS = ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2}, {"momentum": 1.0})


@pairs(case=COMPILED_CASES, act=ACTS, options=OPTIONS, training=FLAGS, has_residual=FLAGS)
def test_steps_equal_eager(
    case: Case, act: Act, options: dict[str, object], training: bool, has_residual: bool
) -> None:
    module = module_for(case, act, **options).train(training)
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case, has_residual=has_residual and act is not None)
    if module.track_running_stats:
        assert twin.num_batches_tracked.item() == 3 * training


@pytest.mark.skipif(not TORCH_HAS_BIAS_OPTION, reason="torch's layers take no `bias` before 2.13")
def test_steps_without_a_bias_equal_eager() -> None:
    module = module_for(COMPILED_CASES[2], bias=False)
    assert_same_steps(module, *twins(module), COMPILED_CASES[2])


@each(act=(None, "relu", "gelu"))
def test_dynamic_shapes_compile_once(act: Act) -> None:
    # The mask's size is the input's, rounded up: with symbolic sizes an expression, without a branch on a size.
    module = module_for(COMPILED_CASES[1], act)
    compiler = CompileCounterWithBackend("aot_eager")
    twin, run = twins(module, dynamic=True, backend=compiler)
    for layout in ("contiguous", "channels_last"):
        # All sizes of a shape differ, since the compiler takes equal ones in the first call for one symbol.
        for shape in ((3, 5, 7, 4), (4, 5, 6, 2), (9, 5, 11, 6)):
            assert_same_steps(module, twin, run, Case(shape, layout), has_residual=act is not None)
            if shape[0] == 3:
                compiled = compiler.frame_count
        assert compiler.frame_count == compiled


def test_steps_equal_eager_after_mode_or_activation_has_changed() -> None:
    module = module_for(COMPILED_CASES[0], "relu")
    twin, run = twins(module)
    for act, training in (("relu", True), ("relu", False), ("gelu", True), (None, False), (("leaky_relu", -0.5), True)):
        for each_module in (module, twin):
            each_module.train(training).act = act
        assert_same_steps(module, twin, run, COMPILED_CASES[0], has_residual=True)


@each(act=(None, ("leaky_relu", 0.2)))
def test_functional_form_inside_a_larger_graph(act: Act) -> None:
    p = make_parameters(5)
    eager, compiled = p.clone(), p.clone()

    def step(x: Tensor, residual: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        stats = p._replace(running_mean=mean, running_var=var)
        added = residual + 1 if act else None
        return call(x * 2, stats, p.weight, p.bias, True, 0.3, residual=added, act=act).sin()

    x, residual, g = (make((3, 5, 5, 3)) for make in (make_input, make_residual, make_grad))
    results = []
    for run, stats in ((step, eager), (torch.compile(step, fullgraph=True, backend="aot_eager"), compiled)):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        y = run(*leaves, *stats[2:])
        results.append([y, *torch.autograd.grad(y, leaves[: 2 if act else 1], g), *stats])
    assert all(map(same_bits, *results))


def test_too_small_a_batch_raises_in_compiled_code_as_well() -> None:
    twin, run = twins(module_for(COMPILED_CASES[0]))
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training"):
        run(torch.zeros(1, 5))
    assert twin.num_batches_tracked.item() == 0


@each(act=("swish", ("relu", 1)))
def test_unknown_activation_raises_in_compiled_code_as_well(act: Act) -> None:
    mean, var = torch.zeros(5), torch.ones(5)
    run = torch.compile(lambda x: batch_norm_act(x, mean, var, training=True, act=act), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="leaky_relu"):
        run(torch.randn(7, 5))
    assert torch.equal(mean, torch.zeros(5))


@pytest.mark.slow
def test_inductor_trains_a_network() -> None:
    # silu has no kink: where a convolution rounds differently, a pre-activation may lie on the other side of relu's.
    layers = (bnext.BatchNormAct2d(8, momentum=None, act="silu"), bnext.BatchNorm2d(8))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layers[0], nn.Conv2d(8, 8, 3), layers[1])
    twin, run = twins(model, backend="inductor")
    x = torch.randn(4, 3, 9, 9)
    for _ in range(2):
        outputs = [model(x), run(x)]
        for y in outputs:
            y.square().mean().backward()
        # Inductor may reorder the sums of a convolution: 1e-5 is a hundred roundings.
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_inductor_keeps_channels_last_in_eval() -> None:
    module = module_for(COMPILED_CASES[2]).eval()
    _, run = twins(module, backend="inductor", dynamic=True)
    for shape in ((3, 5, 5, 3), (2, 5, 6, 4)):
        x = make_input(shape, "channels_last")
        with torch.no_grad():
            eager, compiled = module(x), run(x)
        # Not bit for bit: inductor fuses arithmetic that replaces the operator (test_compiled_eval.py).
        torch.testing.assert_close(compiled, eager)
        assert compiled.stride() == eager.stride()

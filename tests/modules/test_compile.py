"""The contract's torch.compile row: no graph break, results equal to eager's, torch.export there and back.

Of BatchNorm*, where an `act` is None, and of BatchNormAct*.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from cases import TORCH_HAS_BIAS_OPTION, Case, make_grad, make_input, make_parameters, make_residual, same_bits
from checks import call
from marks import FLAGS, each, pairs
from reference import Act
from torch import Tensor

import bnext
from bnext.functional import batch_norm_act

pytestmark = pytest.mark.usefixtures("fresh_compiler")

COMPILED_CASES = [
    Case((7, 5), "contiguous"),
    Case((3, 5, 5, 3), "contiguous"),
    Case((3, 5, 5, 3), "channels_last"),
]


def twins(module: torch.nn.Module, **options: object) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """A copy of the module with its own parameters and buffers, and that copy compiled."""
    twin = copy.deepcopy(module)
    return twin, torch.compile(twin, fullgraph=True, **{"backend": "aot_eager", **options})


def module_for(case: Case, act: Act = None, **options: object) -> torch.nn.Module:
    """BatchNorm*, or BatchNormAct* where there is an activation."""
    kind, options = ("BatchNorm", options) if act is None else ("BatchNormAct", {"act": act, **options})
    module = getattr(bnext, f"{kind}{1 if len(case.shape) == 2 else 2}d")(case.shape[1], **options)
    p = make_parameters(case.shape[1])
    with torch.no_grad():
        for tensor, value in ((module.weight, p.weight), (module.bias, p.bias)):
            if tensor is not None:
                tensor.copy_(value)
    return module


def assert_same_steps(
    eager: torch.nn.Module, twin: torch.nn.Module, run: Callable[..., Tensor], case: Case, has_residual: bool = False
) -> None:
    """Three training steps of both: outputs, gradients and buffers agree bit for bit."""
    for _ in range(3):
        values, g = [make_input(*case) for _ in range(1 + has_residual)], make_grad(case.shape)
        a, b = ([value.detach().requires_grad_() for value in values] for _ in range(2))
        y, z = eager(*a), run(*b)
        assert same_bits(y, z)
        y.backward(g)
        z.backward(g)
        for p, q in zip(a, b, strict=True):
            assert same_bits(p.grad, q.grad)
        for p, q in zip(eager.parameters(), twin.parameters(), strict=True):
            assert same_bits(p.grad, q.grad)
        for (key, p), q in zip(eager.named_buffers(), twin.buffers(), strict=True):
            assert same_bits(p, q), key


# No activation; one that is kept as a mask, one that is computed again, and one with a number in its name.
FUSED = ("relu", "silu", ("leaky_relu", 0.3))


@pairs(case=COMPILED_CASES, act=(None, *FUSED), momentum=(0.1, None), training=FLAGS, has_residual=FLAGS)
def test_steps_equal_eager(case: Case, act: Act, momentum: float | None, training: bool, has_residual: bool) -> None:
    module = module_for(case, act, momentum=momentum).train(training)
    module.running_mean.normal_()
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case, has_residual=has_residual and act is not None)
    assert twin.num_batches_tracked.item() == 3 * training


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 1e-2},
        {"momentum": 1.0},
        *([{"bias": False}] if TORCH_HAS_BIAS_OPTION else []),
    ],
    ids=lambda options: next(iter(options)),
)
def test_training_steps_with_every_option(options: dict[str, object]) -> None:
    case = COMPILED_CASES[2]
    module = module_for(case, **options)
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case)


@pairs(act=(None, "relu"), training=FLAGS)
def test_dynamic_shapes_compile_once(act: Act, training: bool) -> None:
    module = module_for(COMPILED_CASES[1], act).train(training)
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    twin, run = twins(module, dynamic=True, backend=counting)
    # Sizes that are equal in the first call would be taken for one and the same.
    for shape in ((3, 5, 7, 4), (4, 5, 6, 2), (9, 5, 11, 6)):
        inputs = [make_input(shape)] + [make_residual(shape)] * (act is not None)
        assert same_bits(module(*inputs), run(*inputs))
    assert len(graphs) == 1
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        assert same_bits(a, b)


@each(act=(None, "relu", "gelu"))
def test_dynamic_shapes_backward(act: Act) -> None:
    # The mask's size follows from those of the input, rounded up: an expression, where shapes are symbols.
    module = module_for(COMPILED_CASES[1], act)
    twin, run = twins(module, dynamic=True)
    for shape in ((3, 5, 7, 4), (4, 5, 6, 2)):
        for layout in ("contiguous", "channels_last"):
            assert_same_steps(module, twin, run, Case(shape, layout), has_residual=act is not None)


def test_switching_between_training_and_eval() -> None:
    case = COMPILED_CASES[1]
    module = module_for(case)
    twin, run = twins(module)
    for training in (True, False, True):
        module.train(training)
        twin.train(training)
        assert_same_steps(module, twin, run, case)


def test_changing_the_activation_compiles_anew() -> None:
    module = module_for(COMPILED_CASES[0], "relu")
    twin, run = twins(module)
    for act in ("relu", "gelu", None, ("leaky_relu", -0.5)):
        module.act = twin.act = act
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
    run = torch.compile(lambda x: batch_norm_act(x, mean, var, training=True, act=act), backend="aot_eager")
    with pytest.raises(Exception, match="leaky_relu"):
        run(torch.randn(7, 5))
    assert torch.equal(mean, torch.zeros(5))


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), bnext.BatchNorm2d(8, momentum=None), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3)
    )


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
def test_inductor_trains_a_network() -> None:
    # Silu and no relu: convolutions that round otherwise would put a pre-activation on the other side of a kink.
    model = Block("silu")
    twin, run = twins(model, backend="inductor")
    x = torch.randn(4, 3, 9, 9)
    for _ in range(2):
        y, z = model(x), run(x)
        # Inductor may fuse and reorder the ReLU and the convolution, not the batch norm; 1e-5 of the largest value
        # is a hundred roundings.
        assert (y - z).abs().max() <= 1e-5 * y.abs().max()
        y.square().mean().backward()
        z.square().mean().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max() + 1e-7
    for (key, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * p.abs().max(), key


@pytest.mark.slow
def test_inductor_keeps_channels_last_in_eval() -> None:
    module = module_for(COMPILED_CASES[2]).eval()
    _, run = twins(module, backend="inductor", dynamic=True)
    for shape in ((3, 5, 5, 3), (2, 5, 6, 4)):
        x = make_input(shape, "channels_last")
        with torch.no_grad():
            y, z = module(x), run(x)
        torch.testing.assert_close(y, z)  # not the operator, but arithmetic that inductor fuses: test_compiled_eval.py
        assert z.stride() == y.stride()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_round_trip(dynamic: bool, fused: bool) -> None:
    model = (Block("relu") if fused else network()).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.running_mean.normal_()
    x = torch.randn(4, 3, 9, 9)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert "bnext" not in program.graph_module.code
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    restored = torch.export.load(buffer).module()
    for batch in (4, 7) if dynamic else (4,):
        x = torch.randn(batch, 3, 9, 9)
        torch.testing.assert_close(restored(x), model(x))  # torch rounds in other places


@each(act=(None, "relu"))
def test_export_of_training_keeps_the_updates(act: Act) -> None:
    module = module_for(COMPILED_CASES[1], act, momentum=None)
    twin = copy.deepcopy(module)
    inputs = (make_input((3, 5, 5, 3)),) + (make_residual((3, 5, 5, 3)),) * (act is not None)
    exported = torch.export.export(twin, inputs).module()
    for _ in range(2):
        assert same_bits(exported(*inputs), module(*inputs))
    buffers = dict(exported.named_buffers())
    for key, expected in module.named_buffers():
        assert same_bits(buffers[key], expected), key

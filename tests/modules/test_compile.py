"""The contract's torch.compile row: no graph break, results equal to eager's, torch.export there and back."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
from cases import Case, make_grad, make_input, make_parameters, name, same_bits
from torch import Tensor

import bnext
from bnext.functional import batch_norm

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Since torch 2.13.
BIAS = {"bias": False} if "bias" in inspect.signature(torch.nn.BatchNorm2d).parameters else {}

COMPILED_CASES = [
    Case((7, 5), "contiguous"),
    Case((3, 5, 5, 3), "contiguous"),
    Case((3, 5, 5, 3), "channels_last"),
]


def twins(module: torch.nn.Module, **options: object) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    """A copy of the module with its own parameters and buffers, and that copy compiled."""
    twin = copy.deepcopy(module)
    return twin, torch.compile(twin, fullgraph=True, **{"backend": "aot_eager", **options})


def module_for(case: Case, kind: str = "BatchNorm", **options: object) -> torch.nn.Module:
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


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("case", COMPILED_CASES, ids=name)
def test_training_steps_equal_eager(case: Case, momentum: float | None) -> None:
    module = module_for(case, momentum=momentum)
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"eps": 1e-2}, {"momentum": 1.0}, BIAS],
    ids=lambda options: next(iter(options), "default"),
)
def test_training_steps_with_every_option(options: dict[str, object]) -> None:
    case = COMPILED_CASES[2]
    module = module_for(case, **options)
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_dynamic_shapes_compile_once(training: bool) -> None:
    module = module_for(COMPILED_CASES[1]).train(training)
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    twin, run = twins(module, dynamic=True, backend=counting)
    # Sizes that are equal in the first call would be taken for one and the same.
    for shape in ((3, 5, 7, 4), (4, 5, 6, 2), (9, 5, 11, 6)):
        x = make_input(shape)
        assert same_bits(module(x), run(x))
    assert len(graphs) == 1
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        assert same_bits(a, b)


def test_dynamic_shapes_backward() -> None:
    module = module_for(COMPILED_CASES[1])
    twin, run = twins(module, dynamic=True)
    for shape in ((3, 5, 7, 4), (4, 5, 6, 2)):
        assert_same_steps(module, twin, run, Case(shape, "contiguous"))


def test_eval_equals_eager_and_differentiates() -> None:
    case = COMPILED_CASES[2]
    module = module_for(case).eval()
    module.running_mean.normal_()
    twin, run = twins(module)
    assert_same_steps(module, twin, run, case)
    assert twin.num_batches_tracked.item() == 0


def test_switching_between_training_and_eval() -> None:
    case = COMPILED_CASES[1]
    module = module_for(case)
    twin, run = twins(module)
    for training in (True, False, True):
        module.train(training)
        twin.train(training)
        assert_same_steps(module, twin, run, case)


def test_functional_form() -> None:
    p = make_parameters(5)
    eager, compiled = p.clone(), p.clone()

    def step(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return batch_norm(x * 2, mean, var, p.weight, p.bias, training=True, momentum=0.3).relu()

    x = make_input((3, 5, 5, 3))
    expected = step(x, *eager[2:])
    assert same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled[2:]), expected)
    assert same_bits(compiled.running_mean, eager.running_mean)
    assert same_bits(compiled.running_var, eager.running_var)


def test_too_small_a_batch_raises_in_compiled_code_as_well() -> None:
    twin, run = twins(module_for(COMPILED_CASES[0]))
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training"):
        run(torch.zeros(1, 5))
    assert twin.num_batches_tracked.item() == 0


def network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), bnext.BatchNorm2d(8, momentum=None), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3)
    )


@pytest.mark.slow
def test_inductor_trains_a_network() -> None:
    model = network()
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


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_round_trip(dynamic: bool) -> None:
    model = network().eval()
    model[1].running_mean.normal_()
    x = torch.randn(4, 3, 9, 9)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert "bnext" in program.graph_module.code
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    restored = torch.export.load(buffer).module()
    for batch in (4, 7) if dynamic else (4,):
        x = torch.randn(batch, 3, 9, 9)
        assert same_bits(restored(x), model(x))


def test_export_of_training_keeps_the_updates() -> None:
    module = module_for(COMPILED_CASES[1], momentum=None)
    twin = copy.deepcopy(module)
    x = make_input((3, 5, 5, 3))
    exported = torch.export.export(twin, (x,)).module()
    for _ in range(2):
        assert same_bits(exported(x), module(x))
    buffers = dict(exported.named_buffers())
    for key, expected in module.named_buffers():
        assert same_bits(buffers[key], expected), key

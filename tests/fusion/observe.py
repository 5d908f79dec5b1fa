"""How tests see that a batch norm was fused and that nothing else changed.

Two independent sources say what was fused: the report, and the autograd graph of the output, in which neither a fused
activation nor its sum has a node.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from cases import seed
from counting import count, count_sums, tensors
from networks import assert_close, conv, random_input
from torch import Tensor, nn

import bnext

Pair = tuple[nn.Module, nn.Module]


class Net(nn.Module):
    """The layers that patterns are made of, all of which keep shapes. A subclass adds the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.bn2 = conv(3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu, self.silu = nn.ReLU(), nn.SiLU()
        for layer in (self.bn, self.bn2):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)

    @classmethod
    def with_forward(cls, forward: Callable[..., Any]) -> type[Net]:
        return type("Net", (cls,), {"forward": forward})


def sequential(*more: nn.Module, act: nn.Module | None = None) -> nn.Sequential:
    """A convolution, a pair that is fused (layers 1 and 2), and the layers that are given."""
    return nn.Sequential(conv(3, 1), nn.BatchNorm2d(3), nn.ReLU() if act is None else act, *more)


def net() -> nn.Module:
    """A pair between two convolutions."""
    return sequential(conv(3, 1))


def pair(make: Callable[[], nn.Module] = net) -> Pair:
    """A model in float64, of torch's layers, and its fused copy."""
    original = make().double()
    return original, bnext.convert(copy.deepcopy(original), fuse=True)


def fused_names(model: nn.Module) -> list[str]:
    """Names of the batch norms that are fused in some graph."""
    return sorted({name for name, _ in bnext.fusion_report(model).fused})


def why_left(model: nn.Module, name: str) -> str:
    """The reasons in the report why the batch norm of this name is not fused."""
    return "; ".join(why for layer, why in bnext.fusion_report(model).left if layer == name)


def assert_fuses(original: nn.Module, fused: nn.Module, *inputs: Any, pairs: int = 1, sums: int = 0) -> None:
    """In training, fusing removes `pairs` activations and `sums` sums from the autograd graph, and keeps the output."""
    expected, actual = (model.train()(*clones(leaves_of(inputs))) for model in (original, fused))
    saved = count(expected) - count(actual), count_sums(expected) - count_sums(actual)
    assert saved == (pairs, sums), bnext.fusion_report(fused)
    assert_close(actual, expected, "output")


def assert_same_results(original: nn.Module, fused: nn.Module, call: Callable[[nn.Module], Any]) -> None:
    """`call` returns the same for both models, with the same random numbers."""
    results = []
    for model in (original, fused):
        seed(17)
        results.append(call(model))
    assert_close(results[1], results[0], "results")


# How a model may be called: whether in training, and in which context.
MODES: dict[str, tuple[bool, Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "training": (True, contextlib.nullcontext),
    "evaluation": (False, contextlib.nullcontext),
    "training, no_grad": (True, torch.no_grad),
    "evaluation, no_grad": (False, torch.no_grad),
    "evaluation, inference_mode": (False, torch.inference_mode),
}
QUICK = ("training", "evaluation, no_grad")


@contextlib.contextmanager
def called(model: nn.Module, mode: str) -> Iterator[None]:
    """The context of a call in one of the modes, with the same random numbers each time."""
    training, context = MODES[mode]
    model.train(training).zero_grad()
    seed(17)
    with context():
        yield


def leaves_of(inputs: Iterable[Any]) -> list[Any]:
    """Copies of the inputs, which require gradients if the grad mode is on."""
    grad = torch.is_grad_enabled()
    return [
        x.detach().clone().requires_grad_(grad and x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    ]


def clones(leaves: list[Any]) -> list[Any]:
    """Copies that are not leaves, so that a model may write to them."""
    return [x.clone() if isinstance(x, Tensor) else x for x in leaves]


def step(model: nn.Module, inputs: Iterable[Any], mode: str = "training") -> dict[str, Any]:
    """The outcome of one call of a model, and the state of torch's random numbers after it."""
    with called(model, mode):
        leaves = leaves_of(inputs)
        given = clones(leaves)
        output = model(*given)
    return {**outcome(model, leaves, given, output), "random state": torch.get_rng_state()}


def outcome(model: nn.Module, leaves: list[Any], given: list[Any], output: Any) -> dict[str, Any]:
    """The output of a call, and the arguments, gradients and buffers after it."""
    found = {"output": values(output), "arguments": values(given), **backward(output, leaves)}
    if "gradients" in found:
        found["parameters"] = [p.grad for p in model.parameters()]
    return {**found, "buffers": [b.clone() for b in model.buffers()]}


def backward(output: Any, leaves: list[Any]) -> dict[str, Any]:
    """The gradients of the leaves, or the error if a pattern overwrote what backward needs."""
    differentiable = [t for t in tensors(output) if t.requires_grad]
    if not differentiable:
        return {}
    try:
        torch.autograd.backward(differentiable, [grad_of(t) for t in differentiable])
    except RuntimeError as error:
        return {"error": str(error)}
    return {"gradients": [0 if t.grad is None else t.grad for t in tensors(leaves)]}


def grad_of(output: Tensor) -> Tensor:
    """A gradient whose elements all differ."""
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape).cos()


def values(output: Any) -> Any:
    """A copy of an output, whose tensors are detached."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        return {key: values(v) for key, v in output.items()}
    return [values(v) for v in output] if isinstance(output, (list, tuple)) else output


def assert_same_steps(
    original: nn.Module, fused: nn.Module, *inputs: Any, modes: Iterable[str] = QUICK, steps: int = 2
) -> None:
    for mode in modes:
        for _ in range(steps):
            assert_same_step(step(original, inputs, mode), step(fused, inputs, mode), mode)


def assert_same_step(expected: dict[str, Any], actual: dict[str, Any], what: str) -> None:
    """Two steps are equal. Where a pattern overwrites what torch saved, so that backward of the original model fails,
    backward of the fused model may succeed."""
    if "error" in expected:
        for found in (expected, actual):
            for key in ("error", "gradients", "parameters"):
                found.pop(key, None)
    assert actual.keys() == expected.keys(), f"{what}: {actual.get('error')}"
    for key, value in expected.items():
        assert_close(actual[key], value, f"{what}: {key}")


def small() -> Tensor:
    """A small random batch in float64, which fits the models of these tests."""
    return random_input(2, 3, 5, 4)


def assert_close_loosely(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal up to four roundings of a narrow type, since only the unfused model rounds the terms of a sum."""
    scale = expected.double().abs().max().item() + 1
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= 4 * torch.finfo(dtype).eps * scale, f"{error} > 4 roundings of {dtype}"
    assert math.isfinite(error)


@contextlib.contextmanager
def counted_graphs() -> Iterator[Callable[[], int]]:
    """Yields a function that returns how many graphs dynamo has captured inside the context."""
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    yield lambda: counters["unique_graphs"] - before

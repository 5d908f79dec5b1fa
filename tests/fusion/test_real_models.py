"""Models of torchvision and timm: how much of them is fused, and that nothing else about them changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from counting import count, count_norms, count_pairs, tensors
from real_models import MODELS, RealModel, why_not
from tolerances import assert_within
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import bnext
from bnext.fusion.backend import eager, inductor

# The largest error allowed, relative to the largest element of a tensor and of all tensors of a kind: a gradient that
# is zero but for rounding, as that of a bias before a batch norm, is a sum of terms of the size of other gradients.
# In copies of these models whose input, parameters, outputs of batch norms and gradients of these outputs were changed
# by 2^-46 of themselves, which is 128 roundings of float64, results changed by less than that.
TENSOR_LIMIT, KIND_LIMIT = 1e-6, 1e-8

KINDS = ("outputs", "gradients", "buffers", "evaluation")
# Inductor takes a minute for each. None has a hardsigmoid, whose gradient in inductor has the accuracy of float32.
GENERATED = ["test_resnet", "test_byobnet", "test_efficientnet", "resnet18d", "tinynet_e", "darknet17"]


class Step(NamedTuple):
    """A step of training, an evaluation after it, and what was counted in the step's autograd graph."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of the input and all parameters
    buffers: dict[str, Tensor]
    evaluation: dict[str, Tensor]
    pairs: int
    activations: int
    norms: int
    own_norms: int


def numbered(output: object) -> dict[str, Tensor]:
    return {str(i): t.detach() for i, t in enumerate(tensors(output))}


def step(
    model: nn.Module, input: Tensor, call: Callable[[Tensor], object] | None = None, evaluate: bool = True
) -> Step:
    """Calls the model, or `call`, which is the compiled model."""
    call = model if call is None else call
    leaf = input.clone().requires_grad_()
    model.train().zero_grad()
    torch.manual_seed(17)  # for dropout and stochastic depth
    output = call(leaf)
    counts = count_pairs(output), count(output), *count_norms(output)
    generator = torch.Generator().manual_seed(19)
    grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors(output)]
    torch.autograd.backward(tensors(output), grads)
    gradients = {name: p.grad for name, p in (("input", leaf), *model.named_parameters()) if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        evaluation = numbered(call(input)) if evaluate else {}
    return Step(numbered(output), gradients, buffers, evaluation, *counts)


def magnitude(tensor: Tensor) -> float:
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


class Original:
    """A model, and the results of its first step."""

    def __init__(self, model: RealModel) -> None:
        self.model, self.input = model.make(), model.input()
        self.unused = copy.deepcopy(self.model)  # before its first step
        self.step = step(self.model, self.input)
        assert self.step.pairs, "a model with nothing to fuse"

    def assert_same(self, other: Step, kinds: tuple[str, ...]) -> None:
        for kind in kinds:
            got, expected = getattr(other, kind), getattr(self.step, kind)
            assert list(got) == list(expected)
            assert expected
            largest = max(magnitude(value) for value in expected.values() if value.is_floating_point())
            for name, value in expected.items():
                assert got[name].dtype == value.dtype, name
                limit = TENSOR_LIMIT * magnitude(value) + KIND_LIMIT * largest if value.is_floating_point() else 0.0
                assert_within(got[name], value.double(), limit, f"{kind}: {name}")

    def assert_same_compiled(self, compiled: nn.Module, call: Callable[[Tensor], object]) -> None:
        """In training alone: bnext's back end leaves evaluation without gradients to the compiler."""
        self.assert_same(step(compiled, self.input, call, evaluate=False), KINDS[:-1])

    def assert_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """The back end "bnext" has logged that it fused the pairs."""
        fused = [int(r.message.split()[0]) for r in caplog.records if r.module == "backend"]
        assert fused
        assert max(fused) >= 0.95 * self.step.pairs, caplog.text


class Both:
    """Replaces the back end of converted models, and gives each graph of training to the back end of torch.compile,
    too, so that a model is captured once for both."""

    def __init__(self) -> None:
        self.compiled = False  # whether the graph for torch.compile runs

    def __call__(self, module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        twin = fx.GraphModule(module, copy.deepcopy(module.graph))
        run = eager(module, inputs)
        compiled = inductor(twin, inputs) if torch.is_grad_enabled() else None
        return lambda *args: (compiled if self.compiled else run)(*args)


def parameters(models: list[RealModel]) -> list[object]:
    reasons = {library: why_not(library) for library in {model.library for model in models}}
    return [
        pytest.param(
            model,
            id=str(model).replace(" ", "-"),
            marks=[
                pytest.mark.skipif(reasons[model.library] is not None, reason=reasons[model.library] or ""),
                *([pytest.mark.long] if model.long else []),
            ],
        )
        for model in models
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler", "without_collector")  # which would take a third of a capture's time
@pytest.mark.parametrize("model", parameters(MODELS))
def test_a_model_is_fused_and_nothing_else_changes(
    model: RealModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, both = Original(model), Both()
    is_thorough = model.long or model.thorough
    monkeypatch.setattr("bnext.fusion.backend.eager", both)
    # In place of inductor, which would take a minute to generate code: the graph runs operator by operator.
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda module, inputs, **_: aot_eager(module, inputs) if is_thorough else module.forward,
    )
    converted = bnext.convert(copy.deepcopy(original.unused), fuse=True)
    with caplog.at_level(logging.INFO, "bnext"):
        fused = step(converted, original.input, evaluate=is_thorough)
    report = str(bnext.fusion_report(converted))
    original.assert_same(fused, KINDS if is_thorough else KINDS[:-1])
    assert list(converted.state_dict()) == list(original.model.state_dict())
    assert original.step.activations - fused.activations >= 0.95 * original.step.pairs, report
    assert fused.norms == original.step.norms
    assert fused.own_norms >= 0.98 * fused.norms, report

    converted.load_state_dict(original.unused.state_dict())
    both.compiled = True
    original.assert_same_compiled(converted, converted)
    original.assert_logged(caplog)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("model", parameters([m._replace(long=True) for m in MODELS if m.name in GENERATED]))
def test_inductors_code_changes_nothing(model: RealModel, caplog: pytest.LogCaptureFixture) -> None:
    """torch.compile with the back end "bnext", of a model that is not converted."""
    original = Original(model)
    compiled = copy.deepcopy(original.unused)
    with caplog.at_level(logging.INFO, "bnext"):
        original.assert_same_compiled(compiled, torch.compile(compiled, backend="bnext"))
    original.assert_logged(caplog)

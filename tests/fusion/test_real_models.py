"""Models of torchvision and timm: how much of them is fused, and that nothing else about them changes.

How far rounding carries depends on the depth of a model, and is measured. In three more copies the input, every
parameter and every element that leaves a batch norm, and its gradient, which comes back, are off by 2^-46 of
themselves. What comes out of the fused model may be off by as much as it is in one of these: `limits`.

- 2^-46 is 128 roundings of float64. A rounding of an element is one; those of statistics, which a channel shares, are
  less than a hundred where it has a few thousand values (tolerances.py), and move it as its weight and bias do.
- Three, since the response of a single number may be small by chance.
- A gradient that is zero but for rounding, as that of the bias before a batch norm, is a sum of terms of the size of
  other gradients, and may be off by 2^-46 of the largest.
- Where no rounding comes before, as in the statistics of the first batch norm, a value may be off by four roundings of
  the largest.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from counting import Census, census, left, tensors
from real_models import MODELS, RealModel, why_not
from tolerances import assert_within
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import bnext
from bnext.fusion.backend import eager, inductor

PERTURBATION = 2.0**-46
COPIES = 3
U = 2.0**-53
# Of the largest value. Beyond it a model says nothing of its batch norms, and has no place here.
LARGEST_LIMIT = 1e-6

KINDS = ("outputs", "gradients", "buffers", "evaluation")
# A minute each. None with a hardsigmoid: inductor's gradient of it is right to float32 only.
GENERATED = ["test_resnet", "test_byobnet", "test_efficientnet", "resnet18d", "tinynet_e", "darknet17"]


class Step(NamedTuple):
    """A step of training: its outputs, the gradients of the input and all parameters, and the buffers thereafter; and
    the outputs of an evaluation after it."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    evaluation: dict[str, Tensor]
    census: Census


def size(tensor: Tensor) -> Tensor:
    return tensor.detach().double().abs().max() if tensor.numel() else torch.zeros(())


def largest(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([size(t) for t in tensors.values() if t.is_floating_point()]).max()


def numbered(output: object) -> dict[str, Tensor]:
    return {str(i): t.detach() for i, t in enumerate(tensors(output))}


def step(
    model: nn.Module, input: Tensor, call: Callable[[Tensor], object] | None = None, evaluate: bool = True
) -> Step:
    """``call``: the model, compiled."""
    call = model if call is None else call
    leaf = input.clone().requires_grad_()
    model.train().zero_grad()
    torch.manual_seed(17)  # for dropout and stochastic depth
    output = call(leaf)
    counted = census(model, tensors(output))
    generator = torch.Generator().manual_seed(19)
    grads = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors(output)]
    torch.autograd.backward(tensors(output), grads)
    gradients = {name: p.grad for name, p in (("input", leaf), *model.named_parameters()) if p.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        evaluation = numbered(call(input)) if evaluate else {}
    return Step(numbered(output), gradients, buffers, evaluation, counted)


def perturb(tensor: Tensor, random: torch.Generator) -> Tensor:
    signs = 2.0 * torch.randint(0, 2, tensor.shape, generator=random).to(tensor.dtype) - 1
    return tensor * (1 + PERTURBATION * signs)


def perturbed_step(model: nn.Module, input: Tensor, seed: int) -> Step:
    """Of a copy."""
    random = torch.Generator().manual_seed(seed)  # the model's own numbers stay those of the original
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(perturb(parameter, random))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda module, args, output: perturb(output, random))
    return step(model, perturb(input, random))


def limits(original: Step, perturbed: list[Step], kind: str) -> dict[str, Tensor]:
    """For each tensor of a kind."""
    values: dict[str, Tensor] = getattr(original, kind)
    floor = (PERTURBATION if kind == "gradients" else 4 * U) * largest(values)
    return {
        name: floor + torch.stack([size(getattr(each, kind)[name] - value) for each in perturbed]).max()
        for name, value in values.items()
    }


class Original:
    """A model, a step of it, and how far that of another may be off."""

    def __init__(self, model: RealModel) -> None:
        self.model, self.input = model.make(), model.input()
        self.unused = copy.deepcopy(self.model)  # before its first step
        perturbed = [perturbed_step(self.model, self.input, seed) for seed in range(COPIES)]
        self.step = step(self.model, self.input)
        self.limits = {kind: limits(self.step, perturbed, kind) for kind in KINDS}
        for kind in KINDS:
            assert max(self.limits[kind].values()) <= LARGEST_LIMIT * largest(getattr(self.step, kind)), kind
        assert self.step.census.pairs, "a model with nothing to fuse"

    def assert_same(self, other: Step, kinds: tuple[str, ...]) -> None:
        for kind in kinds:
            got, wanted = getattr(other, kind), getattr(self.step, kind)
            assert list(got) == list(wanted)
            assert wanted
            for name, value in wanted.items():
                assert got[name].dtype == value.dtype, name
                assert_within(got[name], value.double(), self.limits[kind][name], f"{kind}: {name}")

    def assert_same_compiled(self, compiled: nn.Module, call: Callable[[Tensor], object]) -> None:
        """In training: an evaluation without gradients is left to the compiler."""
        self.assert_same(step(compiled, self.input, call, evaluate=False), KINDS[:-1])

    def assert_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        """That the back end "bnext" fused the pairs."""
        fused = [int(r.message.split()[0]) for r in caplog.records if r.module == "backend"]
        assert fused
        assert max(fused) >= 0.95 * len(self.step.census.pairs), caplog.text


class Both:
    """In place of the back end of converted models. A graph of training is given to the back end of torch.compile, too:
    capturing takes most of the time. Inductor would need a minute for its code; the graph runs operator by operator."""

    def __init__(self) -> None:
        self.compiled = False  # which of the two runs

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
    monkeypatch.setattr("bnext.fusion.backend.eager", both)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: aot_eager(module, inputs))
    converted = bnext.convert(copy.deepcopy(original.unused), fuse=True)
    # An evaluation is another capture, which takes most of the time.
    evaluates = model.long or model.library == "torchvision"
    with caplog.at_level(logging.INFO, "bnext"):
        fused = step(converted, original.input, evaluate=evaluates)
    report = str(bnext.fusion_report(converted))
    original.assert_same(fused, KINDS if evaluates else KINDS[:-1])
    assert list(converted.state_dict()) == list(original.model.state_dict())
    could, unfused = original.step.census.pairs, left(original.step.census, fused.census)
    assert len(unfused) <= 0.05 * len(could), f"left: {', '.join(map(str, unfused))}\n{report}"
    assert fused.census.norms == original.step.census.norms
    assert fused.census.ours >= 0.98 * fused.census.norms, report

    converted.load_state_dict(original.unused.state_dict())
    both.compiled = True
    original.assert_same_compiled(converted, converted)
    original.assert_logged(caplog)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("model", parameters([m._replace(long=True) for m in MODELS if m.name in GENERATED]))
def test_inductors_code_changes_nothing(model: RealModel, caplog: pytest.LogCaptureFixture) -> None:
    """By itself, of a model that is not converted."""
    original = Original(model)
    compiled = copy.deepcopy(original.unused)
    with caplog.at_level(logging.INFO, "bnext"):
        original.assert_same_compiled(compiled, torch.compile(compiled, backend="bnext"))
    original.assert_logged(caplog)

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
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from counting import Census, census, left
from real_models import MODELS, RealModel, tensors, why_not
from tolerances import assert_within
from torch import Tensor, nn

import bnext

PERTURBATION = 2.0**-46
COPIES = 3
U = 2.0**-53
# Of the largest value. Beyond it a model says nothing of its batch norms, and has no place here.
LARGEST_LIMIT = 1e-6

KINDS = ["outputs", "gradients", "buffers", "evaluation"]
# A minute each, and the first always. None with a hardsigmoid: inductor's gradient of it is right to float32 only.
COMPILED = ["test_resnet", "test_byobnet", "test_efficientnet", "resnet18d", "tinynet_e", "darknet17"]


class Step(NamedTuple):
    """A step of training: its outputs, the gradients of the input and all parameters, and the buffers thereafter; and
    the outputs of an evaluation after it."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    evaluation: dict[str, Tensor]
    census: Census


class Trial(NamedTuple):
    model: RealModel
    original: Step
    perturbed: list[Step]
    fused: Step
    original_keys: list[str]
    fused_keys: list[str]
    report: str


def size(tensor: Tensor) -> Tensor:
    return tensor.detach().double().abs().max() if tensor.numel() else torch.zeros(())


def largest(tensors: dict[str, Tensor]) -> Tensor:
    return torch.stack([size(t) for t in tensors.values() if t.is_floating_point()]).max()


def numbered(output: object) -> dict[str, Tensor]:
    return {str(i): t.detach() for i, t in enumerate(tensors(output))}


def step(model: nn.Module, input: Tensor, call: Callable[[Tensor], object] | None = None) -> Step:
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
        evaluation = numbered(call(input))
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


def assert_same(actual: Step, original: Step, perturbed: list[Step], kind: str) -> None:
    got, wanted, allowed = getattr(actual, kind), getattr(original, kind), limits(original, perturbed, kind)
    assert list(got) == list(wanted)
    assert wanted
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert_within(got[name], value.double(), allowed[name], name)


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


@pytest.fixture(scope="module", params=parameters(MODELS))
def trial(request: pytest.FixtureRequest) -> Iterator[Trial]:
    model: RealModel = request.param
    original, input = model.make(), model.input()
    fused = bnext.convert(copy.deepcopy(original), fuse=True)
    perturbed = [perturbed_step(original, input, seed) for seed in range(COPIES)]
    steps = step(original, input), perturbed, step(fused, input)
    yield Trial(model, *steps, [*original.state_dict()], [*fused.state_dict()], str(bnext.fusion_report(fused)))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes(trial: Trial, kind: str) -> None:
    assert_same(trial.fused, trial.original, trial.perturbed, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_would_show_errors(trial: Trial, kind: str) -> None:
    allowed = limits(trial.original, trial.perturbed, kind)
    assert max(allowed.values()) <= LARGEST_LIMIT * largest(getattr(trial.original, kind))


def test_the_state_dict_has_the_same_keys(trial: Trial) -> None:
    assert trial.fused_keys == trial.original_keys


def test_what_could_be_fused_is(trial: Trial) -> None:
    could, unfused = trial.original.census.pairs, left(trial.original.census, trial.fused.census)
    assert could, "a model with nothing to fuse"
    assert len(unfused) <= 0.05 * len(could), f"left: {', '.join(map(str, unfused))}\n{trial.report}"


def test_the_batch_norms_are_ours(trial: Trial) -> None:
    original, fused = trial.original.census, trial.fused.census
    assert fused.norms == original.norms
    assert fused.ours >= 0.98 * fused.norms, trial.report


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "model", parameters([m._replace(long=m.name != COMPILED[0]) for m in MODELS if m.name in COMPILED])
)
def test_compiling_changes_nothing(model: RealModel, caplog: pytest.LogCaptureFixture) -> None:
    """By itself, of a model that is not converted."""
    original, input = model.make(), model.input()
    compiled, perturbed = copy.deepcopy(original), [perturbed_step(original, input, seed) for seed in range(COPIES)]
    expected = step(original, input)
    with caplog.at_level(logging.INFO, "bnext"):
        actual = step(compiled, input, torch.compile(compiled, backend="bnext"))
    for kind in KINDS:
        assert_same(actual, expected, perturbed, kind)
    fused = [int(r.message.split()[0]) for r in caplog.records if " batch norm(s) fused" in r.message]
    assert fused
    assert fused[0] >= 0.95 * len(expected.census.pairs), caplog.text

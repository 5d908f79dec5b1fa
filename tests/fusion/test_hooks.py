"""Hooks on layers, activations and the model: they are called with the values of the unfused model, whenever they are
added."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import Net, assert_fuses, assert_same_results, assert_same_steps, count, grad_of, net, pair, small, values
from torch import Tensor, nn

import bnext

LAYERS = {"the batch norm": "1", "the activation": "2", "the model": ""}
KINDS = (("forward", "forward_pre"), ("full_backward", "full_backward_pre"))  # dynamo does not capture the latter


def watch(model: nn.Module, layer: str, kind: str) -> tuple[list[Any], Any]:
    """Registers a hook on a layer. Returns the list to which each call of it adds its arguments, and its handle."""
    seen: list[Any] = []

    def hook(module: nn.Module, *args: Any) -> None:
        seen.append(values(args))

    return seen, getattr(model.get_submodule(layer), f"register_{kind}_hook")(hook)


def run(model: nn.Module, x: Tensor) -> list[Any]:
    """The output and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = model(x * 1)
    y.backward(grad_of(y))
    return [y.detach(), x.grad]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("added", ["before convert", "after convert", "after the first call"])
def test_hooks_see_the_values_of_the_unfused_model(added: str, layer: str) -> None:
    x = small()
    for kinds in KINDS:
        original = net().double()
        fused = copy.deepcopy(original)
        if added != "before convert":
            bnext.convert(fused, fuse=True)
        if added == "after the first call":
            run(fused, x)
            run(original, x)
        seen = [[watch(model, LAYERS[layer], kind) for kind in kinds] for model in (original, fused)]
        if added == "before convert":
            bnext.convert(fused, fuse=True)
        for _ in range(2):
            assert_close(run(fused, x), run(original, x), "results")
        for kind, (theirs, first), (ours, second) in zip(kinds, *seen, strict=True):
            assert len(theirs) == 2
            assert_close(ours, theirs, f"what the {kind} hook saw")
            first.remove()
            second.remove()
        assert_close(run(fused, x), run(original, x), "results")
        assert {len(found) for hooks in seen for found, _ in hooks} == {2}
        if kinds == KINDS[0]:  # Dynamo does not try again to capture what it could not.
            assert_fuses(original, fused, x)


@pytest.mark.parametrize("first_call", [False, True])
def test_tensor_hooks_between_a_norm_and_its_activation(first_call: bool) -> None:
    class Watched(Net):
        watched = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            if self.watched:
                y.register_hook(lambda grad: grad * 3)
            return F.relu(y)

    original, fused = pair(Watched)
    if first_call:
        assert_same_steps(original, fused, small())
    original.watched = fused.watched = True
    assert_same_steps(original, fused, small(), modes=("training", "evaluation"))


def test_retained_gradients_of_the_normalised_value() -> None:
    class Kept(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y.retain_grad()
            self.kept = y
            return F.relu(y)

    original, fused = pair(Kept)
    for _ in range(2):
        assert_same_results(original, fused, lambda model: [*run(model, small()), model.kept, model.kept.grad])


def test_hooks_with_keywords_and_always_called() -> None:
    def watched(model: nn.Module) -> list[Any]:
        seen: list[Any] = []
        for layer in (model, model.bn):
            layer.register_forward_hook(
                lambda module, args, kwargs, output: seen.append((len(args), sorted(kwargs))),
                with_kwargs=True,
                always_call=layer is model,
            )
        y = model(small(), scale=2.0)
        assert seen == [(0, ["input"]), (1, ["scale"])]
        return y

    models = pair(Net.with_forward(lambda self, x, *, scale=1.0: F.relu(self.bn(input=self.conv(x) * scale))))
    assert_same_results(*models, watched)


def test_an_exception_in_a_hook_comes_out_and_leaves_the_model_working() -> None:
    def stop(*_: Any) -> None:
        raise LookupError("here")

    original, fused = pair()
    x = small()
    assert_same_steps(original, fused, x, modes=("training",))
    handles = [model[2].register_forward_hook(stop) for model in (original, fused)]
    for _ in range(2):
        for model in (original, fused):
            with pytest.raises(LookupError, match="here"):
                model(x)
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    for handle in handles:
        handle.remove()
    assert_same_steps(original, fused, x)
    assert_fuses(original, fused, x)
    assert torch._C._len_torch_dispatch_stack() == 0, "a dispatch mode is still active"


GLOBAL = {
    "forward": (nn.modules.module.register_module_forward_hook, lambda model: model(small())),
    "full backward": (nn.modules.module.register_module_full_backward_hook, lambda model: run(model, small())),
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_hooks_see_every_module(kind: str) -> None:
    original, fused = pair()
    fused(small())
    register, call = GLOBAL[kind]

    def seen(model: nn.Module) -> list[Any]:
        found: list[Any] = []
        handle = register(lambda module, *args: found.append([type(module).__name__, *values(args)]))
        try:
            result = call(model)
        finally:
            handle.remove()
        assert len(found) == 5  # the model and its four layers
        return [result, found]

    assert_same_results(original, fused, seen)
    assert count(fused(small())) == 0

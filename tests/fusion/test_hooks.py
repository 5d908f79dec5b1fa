"""Hooks on layers, activations and the whole: they fire, and see what they would have seen, whenever added."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import (
    Net,
    assert_fuses,
    assert_same_results,
    assert_same_steps,
    count,
    grad_of,
    pair,
    sequential,
    small,
    values,
)
from torch import Tensor, nn
from torch.nn.utils import prune

import bnext

LAYERS = {"the batch norm": "1", "the activation": "2", "the model": ""}
KINDS = (("forward", "forward_pre"), ("full_backward", "full_backward_pre"))  # the latter are not captured


def watch(model: nn.Module, layer: str, kind: str) -> tuple[list[Any], Any]:
    seen: list[Any] = []

    def hook(module: nn.Module, *args: Any) -> None:
        seen.append(values(args))

    return seen, getattr(model.get_submodule(layer), f"register_{kind}_hook")(hook)


def net() -> nn.Module:
    return sequential(nn.Conv2d(3, 2, 1))


def run(model: nn.Module, x: Tensor) -> list[Any]:
    x = x.clone().requires_grad_()
    y = model(x * 1)
    y.backward(grad_of(y))
    return [y.detach(), x.grad]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("added", ["before convert", "after convert", "after the first call"])
def test_hooks_see_what_they_saw(added: str, layer: str) -> None:
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
        if kinds == KINDS[0]:  # Dynamo does not come back to what it could not capture.
            assert_fuses(original, fused, x)


def test_a_hook_that_changes_the_normalised_value_is_obeyed() -> None:
    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output - 0.5

    original, fused = pair(net)
    assert_same_steps(original, fused, small(), steps=1)
    for model in (original, fused):
        model[1].register_forward_hook(halve)
    assert_same_steps(original, fused, small())


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

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((len(args), sorted(kwargs)))

        model.register_forward_hook(hook, with_kwargs=True, always_call=True)
        model.bn.register_forward_hook(hook, with_kwargs=True)
        y = model(small(), scale=2.0)
        assert seen == [(0, ["input"]), (1, ["scale"])]
        return y

    class Keyword(Net):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return F.relu(self.bn(input=self.conv(x) * scale))

    assert_same_results(*pair(Keyword), watched)


def test_an_exception_in_a_hook_comes_out_and_leaves_the_model_working() -> None:
    def stop(*_: Any) -> None:
        raise LookupError("here")

    original, fused = pair(net)
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
    assert torch._C._len_torch_dispatch_stack() == 0


def test_hooks_that_collect_features() -> None:
    """As feature extractors do it: of every layer, replaced by the next call."""
    original, fused = pair(lambda: nn.Sequential(sequential(), sequential()))
    features: dict[str, Tensor] = {}
    for name, module in (*original.named_modules(), *fused.named_modules()):
        module.register_forward_hook(lambda m, a, out, n=name: features.__setitem__(n, out.detach().clone()))

    def collected(model: nn.Module) -> dict[str, Tensor]:
        features.clear()
        model(small())
        assert len(features) == 9
        return dict(features)

    for _ in range(2):
        assert_same_results(original, fused, collected)


def test_activation_gradients_of_grad_cam() -> None:
    """Full backward hooks of an activation behind a fused pair, by which people explain images."""
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU()))
    seen = [watch(model, "5", "full_backward")[0] for model in (original, fused)]
    assert_same_steps(original, fused, small(), modes=("training", "evaluation"))
    assert len(seen[0]) == 4
    assert_close(seen[1], seen[0], "gradients")


@pytest.mark.parametrize("by_hook", [False, True])
def test_tools_that_work_by_hooks(by_hook: bool) -> None:
    """Pruning and the older spectral norm set a plain attribute before each forward."""

    def mask(model: nn.Module) -> None:
        if by_hook:
            prune.l1_unstructured(model[1], "weight", amount=1)
        else:
            prune.random_structured(model[0], "weight", amount=1, dim=0)

    original, fused = pair(net)
    assert_same_steps(original, fused, small(), steps=1)
    for model in (original, fused):
        torch.manual_seed(3)
        mask(model)
    assert_same_steps(original, fused, small(), modes=("training", "evaluation"))


GLOBAL = {
    "forward": (nn.modules.module.register_module_forward_hook, lambda model: model(small())),
    "full backward": (nn.modules.module.register_module_full_backward_hook, lambda model: run(model, small())),
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_global_hooks_see_every_module(kind: str) -> None:
    original, fused = pair(net)
    fused(small())
    register, call = GLOBAL[kind]

    def seen(model: nn.Module) -> list[Any]:
        found: list[Any] = []
        handle = register(lambda module, *args: found.append([type(module).__name__, *values(args)]))
        try:
            result = call(model)
        finally:
            handle.remove()
        assert len(found) == 5
        return [result, found]

    assert_same_results(original, fused, seen)
    assert count(fused(small())) == 0

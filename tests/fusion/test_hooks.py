"""Hooks on layers, activations and the whole: they fire, and see what they would have seen, whenever added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import Net, assert_fuses, assert_same_steps, count, grad_of, pair, sequential, small, values
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
        original = sequential(nn.Conv2d(3, 2, 1)).double()
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

    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
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
        for model in (original, fused):
            run(model, small() * 0 + torch.arange(4.0, dtype=torch.float64).sin())
        assert_close(fused.kept, original.kept, "the kept value")
        assert_close(fused.kept.grad, original.kept.grad, "its gradient")


def test_hooks_with_keywords_and_always_called() -> None:
    def after(seen: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.append((len(args), sorted(kwargs)))

        return hook

    class Keyword(Net):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return F.relu(self.bn(input=self.conv(x) * scale))

    original, fused = pair(Keyword)
    seen: list[list[Any]] = [[], []]
    for model, found in zip((original, fused), seen, strict=True):
        model.register_forward_hook(after(found), with_kwargs=True, always_call=True)
        model.bn.register_forward_hook(after(found), with_kwargs=True)
    x = small()
    assert_close(fused(x, scale=2.0), original(x, scale=2.0), "output")
    assert seen[1] == seen[0] == [(0, ["input"]), (1, ["scale"])]


def test_an_exception_in_a_hook_comes_out_and_leaves_the_model_working() -> None:
    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError("here")

    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    x = small()
    assert_same_steps(original, fused, x, modes=("training",))
    handles = [model[2].register_forward_hook(stop) for model in (original, fused)]
    for _ in range(2):
        for model in (original, fused):
            with pytest.raises(StopError, match="here"):
                model(x)
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    for handle in handles:
        handle.remove()
    assert_same_steps(original, fused, x)
    assert_fuses(original.train(), fused.train(), x)
    assert torch._C._len_torch_dispatch_stack() == 0


def test_hooks_that_collect_features() -> None:
    """As feature extractors do it: of every layer, replaced by the next call."""
    original, fused = pair(lambda: nn.Sequential(sequential(), sequential()))
    features: list[dict[str, Tensor]] = [{}, {}]
    for model, found in zip((original, fused), features, strict=True):
        for name, module in model.named_modules():
            module.register_forward_hook(lambda m, a, out, n=name, f=found: f.__setitem__(n, out.detach().clone()))
    for n in range(2):
        x = small() * (n + 1)
        for model in (original, fused):
            model(x.clone())
        assert len(features[0]) == 9
        assert_close(features[1], features[0], "features")


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

    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    assert_same_steps(original, fused, small(), steps=1)
    for model in (original, fused):
        torch.manual_seed(3)
        mask(model)
    assert_same_steps(original, fused, small(), modes=("training", "evaluation"))


def test_global_hooks_see_every_module() -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    x = small()
    fused(x)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    try:
        y = fused(x)
        mine, seen = seen, []
        assert_close(y, original(x), "output")
    finally:
        handle.remove()
    assert mine == seen
    assert len(seen) == 5
    assert count(fused(x)) == 0


def test_a_full_backward_hook_of_a_global_kind() -> None:
    original, fused = pair(lambda: sequential(nn.Conv2d(3, 2, 1)))
    seen: list[Any] = []
    handle = nn.modules.module.register_module_full_backward_hook(lambda m, i, o: seen.append(values(o)))
    try:
        found = []
        for model in (original, fused):
            run(model, small() * 0 + torch.linspace(-1, 1, 4, dtype=torch.float64))
            found.append(list(seen))
            seen.clear()
    finally:
        handle.remove()
    assert_close(found[1], found[0], "what the hook saw")
    assert len(found[0]) == 5

"""Models whose layers are replaced, deleted, sliced off, wrapped, parametrised, shared or frozen after a call: they
compute what the unconverted model would, and pairs are still fused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Basic, assert_close, conv
from observe import Pair, assert_fuses, assert_same_steps, count, pair, sequential, small
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils import mkldnn

import bnext


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs() + 0.5


class Wrapper(nn.Module):
    """A wrapper as profilers make them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object) -> object:
        return self.inner(*args)


def two_pairs() -> nn.Module:
    return nn.Sequential(*sequential(), *sequential(), conv(3, 1))


Change = Callable[[nn.Module], object]  # in place


def put(index: int, make: Change) -> Change:
    """A change that replaces the layer at an index by the one that `make` returns."""
    return lambda model: model.__setitem__(index, make(model))


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(model[1], "weight", Positive())


def parametrized_and_removed(model: nn.Module) -> None:
    parametrized(model)
    parametrize.remove_parametrizations(model[1], "weight")


def other_slope(model: nn.Module) -> None:
    model[2] = nn.LeakyReLU(0.3)
    model(torch.ones(2, 3, 2, 2, dtype=torch.float64))
    model[2].negative_slope = 0.7


def without_statistics(model: nn.Module) -> None:
    model[1].running_mean = model[1].running_var = None


def new_parameters(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    model[1].running_var = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)


# What is done to a model after a call, and how many pairs are fused then (None: they are not counted).
CHANGES: dict[str, tuple[Change, int | None]] = {
    "activation to LeakyReLU": (put(2, lambda m: nn.LeakyReLU(0.3)), 2),
    "activation to Identity": (put(2, lambda m: nn.Identity()), 1),
    "activation wrapped": (put(2, lambda m: Wrapper(m[2])), 2),
    "activation deleted": (lambda m: m.pop(2), 1),
    "another slope": (other_slope, None),
    "a forward of its own": (lambda m: setattr(m[2], "forward", lambda x: x * 2), 1),
    "norm to a new one": (put(1, lambda m: nn.BatchNorm2d(3, eps=0.1)), 2),
    "norm wrapped": (put(1, lambda m: Wrapper(m[1])), 2),
    "norm compiled": (put(1, lambda m: torch.compile(m[1], backend="eager")), None),
    "norm to GroupNorm": (put(1, lambda m: nn.GroupNorm(1, 3)), 1),
    "something inserted": (lambda m: m.insert(2, nn.Tanh()), 1),
    "a pair appended": (lambda m: m.extend([nn.BatchNorm2d(3), nn.ReLU()]), 3),
    "a layer shared": (put(4, lambda m: m[1]), 2),
    "a parameter shared": (lambda m: setattr(m[4], "weight", m[1].weight), 2),
    "parametrised": (parametrized, None),
    "parametrised, and no more": (parametrized_and_removed, 2),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m[0]), 2),
    "pruned": (lambda m: prune.random_structured(m[0], "weight", amount=1, dim=0), 2),
    "norm pruned": (lambda m: prune.l1_unstructured(m[1], "weight", amount=1), None),
    "a hook that changes the norm's output": (lambda m: m[1].register_forward_hook(lambda *a: a[2] - 0.5), 1),
    "frozen": (lambda m: m[1].requires_grad_(False).running_mean.add_(0.5), 2),
    "other settings": (lambda m: vars(m[1]).update(eps=0.5, momentum=0.3), 2),
    "without statistics": (without_statistics, 2),
    "new parameters": (new_parameters, 2),
}


def changed(change: str) -> Pair:
    """A model that is changed after its first call, and its fused copy."""
    original, fused = pair(two_pairs)
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    for model in (original, fused):
        torch.manual_seed(5)
        CHANGES[change][0](model)
        model.double()
    return original, fused


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_is_seen(change: str) -> None:
    original, fused = changed(change)
    pairs = CHANGES[change][1]
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    if pairs is not None:
        assert_fuses(original, fused, small(), pairs=pairs)


@pytest.mark.parametrize("change", ["norm wrapped", "parametrised"])
@pytest.mark.parametrize("again", [bnext.revert, lambda m: bnext.convert(m, fuse=True)], ids=["revert", "convert"])
def test_revert_or_convert_after_a_change(again: Change, change: str) -> None:
    original, fused = changed(change)
    assert_same_steps(original, fused, small(), steps=1)
    again(fused)
    assert_same_steps(original, fused, small(), steps=1)


def test_slices_and_parts_are_plain() -> None:
    original, fused = pair(two_pairs)
    x = small()
    assert_same_steps(original, fused, x, steps=1)
    for take in (
        lambda m: m[:2],
        lambda m: m[:3],
        lambda m: nn.Sequential(*list(m.children())[:-1]),
        lambda m: nn.Sequential(*m, *m),
        lambda m: m[1],
        lambda m: m[:3].forward,
    ):
        assert_close(take(fused)(x), take(original)(x), "output")
    assert_fuses(original, fused, x, pairs=2)
    part = nn.Sequential(*list(fused.children())[:3])
    assert count(part(x)) == 1, "a part is not fused until it is converted itself"
    bnext.convert(part, fuse=True)
    assert count(part(x)) == 0


def test_a_submodule_called_by_itself_and_the_whole_in_turn() -> None:
    original, fused = pair(lambda: nn.Sequential(conv(3), Basic(3), nn.Flatten()))
    for _ in range(2):
        assert_same_steps(original, fused, small(), modes=("training",))
        assert_same_steps(original[1], fused[1], small(), modes=("training",))
        assert_same_steps(original[1].bn1, fused[1].bn1, small(), modes=("training",))


def test_a_fused_model_as_a_part_of_others() -> None:
    original, fused = pair()
    x = small()
    for wrap in (lambda m: nn.Sequential(m, nn.Tanh()), Wrapper, lambda m: nn.Sequential(m, m)):
        assert_same_steps(wrap(original), wrap(fused), x, modes=("training",))
    outer = bnext.convert(nn.Sequential(fused, nn.BatchNorm2d(3), nn.ReLU(), conv(3, 1)).double(), fuse=True)
    assert count(outer(x)) == 0
    assert count(fused(x)) == 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no mkldnn")
def test_to_mkldnn() -> None:
    model = bnext.convert(two_pairs().eval(), fuse=True)
    x = torch.randn(2, 3, 8, 8)
    want = model(x).detach()
    dense = mkldnn.to_mkldnn(copy.deepcopy(model))
    torch.testing.assert_close(dense(x.to_mkldnn()).to_dense(), want, rtol=1e-4, atol=1e-4)

"""Outputs that are recomputed from a residual, or from outputs that are recomputed themselves, and which of those in a
row are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import make_input, same_bits
from recomputing import FEATURES, Recomputed, gradients, storage_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import bnext


class Row(nn.Module):
    """Residual blocks, or batch norms alone, in a row. `storages` are those of the outputs of the last call."""

    def __init__(self, length: int, act: str, alone: bool = False) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(length + 1))
        self.norms = nn.ModuleList(bnext.BatchNormAct2d(4, act=act) for _ in range(length))
        self.alone = alone
        self.storages: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        self.storages.clear()
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = norm(x) if self.alone else norm(conv(x), x)
            self.storages.append(storage_of(x))
        return self.convs[-1](x)

    def kept(self) -> list[bool]:
        return [not storage.expired() for storage in self.storages]


@pytest.mark.parametrize("around", [False, True], ids=["", "in other hooks"])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("alone", [False, True], ids=["blocks", "alone"])
def test_every_third_is_kept_and_each_other_is_made_once(alone: bool, act: str, around: bool) -> None:
    row, x = Row(9, act, alone), make_input(FEATURES)
    expected = gradients(row(x), row.parameters())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if around else torch.enable_grad():
        y = bnext.recompute()(row)(x)
    assert row.kept() == [False, False, True] * 3
    with Recomputed() as recomputed:
        actual = gradients(y, row.parameters())
    assert (len(recomputed.storages), recomputed.alive()) == (6, 0)
    assert all(map(same_bits, actual, expected))


# These functions return what else holds a residual.
def nobody(residual: Tensor) -> list[Tensor]:
    return []


def another_tensor(residual: Tensor) -> list[Tensor]:
    return [residual.detach()]


def its_square(residual: Tensor) -> list[Tensor]:
    return [residual.square()]


@pytest.mark.parametrize(
    ("act", "holder", "output_is_kept"),
    [
        ("relu", nobody, True),
        ("relu", another_tensor, False),
        ("relu", its_square, False),
        ("identity", nobody, True),
        ("silu", nobody, False),  # the backward of silu itself keeps the residual
    ],
)
def test_an_output_goes_where_its_residual_stays(
    act: str, holder: Callable[[Tensor], list[Tensor]], output_is_kept: bool
) -> None:
    """An output is kept if otherwise its residual would be, which nothing else holds, to recompute it from."""
    x, weight = make_input(FEATURES).requires_grad_(), torch.randn(4, 4, 1, 1).requires_grad_()
    layer = bnext.BatchNormAct2d(4, act=act)

    def step() -> tuple[list[bool], list[Tensor]]:
        residual = x.sin()
        others = holder(residual)
        h = layer(x, residual)
        storages = [storage_of(t) for t in (h, residual)]
        y = nn.functional.conv2d(h, weight)
        del h, residual
        kept = [not storage.expired() for storage in storages]
        del others
        return kept, gradients(y, [weight, *layer.parameters()])

    _, expected = step()
    (output, residual), actual = bnext.recompute()(step)()
    assert output == output_is_kept
    assert residual == (not output_is_kept)
    assert all(map(same_bits, actual, expected))


def test_a_residual_that_was_made_in_inference_mode() -> None:
    layer, conv, x = bnext.BatchNormAct2d(4, act="relu"), nn.Conv2d(4, 4, 1), make_input(FEATURES)
    with torch.inference_mode():
        residual = x.sin()
        parts = residual.split(1)
    parameters = [*layer.parameters(), *conv.parameters()]
    step = lambda: conv(layer(x, residual))  # noqa: E731
    assert all(map(same_bits, gradients(bnext.recompute()(step)(), parameters), gradients(step(), parameters)))
    assert all(part.is_inference() for part in parts)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_an_input_that_is_its_own_residual(act: str) -> None:
    layer, conv, x = bnext.BatchNormAct2d(4, act=act), nn.Conv2d(4, 4, 1), make_input(FEATURES)
    parameters = [*layer.parameters(), *conv.parameters()]
    step = lambda: conv(layer(x, x))  # noqa: E731
    expected = gradients(step(), parameters)
    with Recomputed() as recomputed:
        actual = gradients(bnext.recompute()(step)(), parameters)
    assert len(recomputed.storages) == 1
    assert all(map(same_bits, actual, expected))


def test_a_residual_may_be_a_part_of_a_recomputed_output_or_have_another_layout() -> None:
    """As in dense connections, the input and the residual are slices of a recomputed output."""
    x = make_input((2, 8, 6, 6))
    first, second, conv = bnext.BatchNormAct2d(8, act="silu"), bnext.BatchNormAct2d(4, act="relu"), nn.Conv2d(4, 4, 1)
    parts = [*first.parameters(), *second.parameters(), *conv.parameters()]

    def step(other: Callable[[Tensor], Tensor]) -> list[Tensor]:
        h = first(x)
        return gradients(conv(second(h[:, 4:], other(h[:, :4]))), parts)

    for other in (torch.clone, lambda t: t.mT, lambda t: t.contiguous(memory_format=torch.channels_last)):
        with Recomputed() as recomputed:
            actual = bnext.recompute()(step)(other)
        assert recomputed.storages
        assert all(map(same_bits, actual, step(other)))

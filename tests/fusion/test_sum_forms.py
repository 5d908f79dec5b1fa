"""The ways a sum between a batch norm and its activation is written: operands, operators, in place or not, and where
the residual comes from. Results, gradients, buffers and arguments after the call are those of the unfused model."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import FOUR_MODES, Pattern, failures
from observe import QUICK, Net, assert_fuses, assert_same_steps, fused_names, pair, small, why_left
from torch import Tensor


def in_place(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


def in_place_of_the_residual(y: Tensor, r: Tensor) -> Tensor:
    r += y
    return r


# Functions of the normalised value and a residual that only the forward holds, and whether each is fused (None: that is
# not tested).
SUMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool | None]] = {
    "y + r": (lambda y, r: y + r, True),
    "r + y": (lambda y, r: r + y, True),
    "y += r": (in_place, True),
    "r += y": (in_place_of_the_residual, True),
    "y.add(r)": (lambda y, r: y.add(r), True),
    "r.add(y)": (lambda y, r: r.add(y), True),
    "y.add_(r)": (lambda y, r: y.add_(r), True),
    "r.add_(y)": (lambda y, r: r.add_(y), True),
    "torch.add(y, r)": (lambda y, r: torch.add(y, r), True),
    "torch.add(r, y)": (lambda y, r: torch.add(r, y), True),
    "operator.add": (lambda y, r: operator.add(y, r), True),
    "operator.iadd": (lambda y, r: operator.iadd(y, r), True),
    "__radd__": (lambda y, r: y.__radd__(r), True),
    "alpha=2": (lambda y, r: torch.add(y, r, alpha=2), False),
    "method, alpha=2": (lambda y, r: y.add(r, alpha=2), False),
    # Before torch 2.13 the graph has a product and a sum of alpha 1, which is fused.
    "in place, alpha=2": (lambda y, r: y.add_(r, alpha=2), None if torch.__version__ < "2.13" else False),
    "of three": (lambda y, r: y + r + r.sin(), False),
    "of three, from the left": (lambda y, r: r.sin() + r + y, True),
    "in place, of three": (lambda y, r: y.add_(r).add_(r.sin()), False),
    "y - r": (lambda y, r: y - r, False),
    "y * r": (lambda y, r: y * r, False),
    "y + 1": (lambda y, r: y + 1, False),
    "1 + y": (lambda y, r: 1.0 + y, False),
    "y + a number in a tensor": (lambda y, r: y + torch.tensor(1.0, dtype=torch.float64), False),
    "y + y": (lambda y, r: y + y, False),
    "y += y": (lambda y, r: y.add_(y), False),
    "y + view of y": (lambda y, r: y + y.view(y.shape), False),
    "y + a flipped y": (lambda y, r: y + y.flip(0), False),
    "sum of a list": (lambda y, r: sum([y, r]), False),
    "a mean": (lambda y, r: y + r.mean((2, 3), keepdim=True), False),
    "per channel": (lambda y, r: y + r[0, :, :1, :1], False),
    "a broadcast y": (lambda y, r: y + r.unsqueeze(0), False),
    "an expanded residual": (lambda y, r: y + r[:, :, :1, :1].expand_as(r), True),
    "a transposed residual": (lambda y, r: y + r.transpose(2, 3).contiguous().transpose(2, 3), True),
    "a narrower residual": (lambda y, r: y + r.float(), False),
    "an integer residual": (lambda y, r: y + r.long(), False),
    "residual detached": (lambda y, r: y + r.detach(), True),
    "residual of the same values": (lambda y, r: y + y.detach().clone(), False),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_": lambda y: y.relu_(),
    "silu": F.silu,
    "gelu": F.gelu,
}


def behind(function: Callable[[Tensor, Tensor], Tensor], act: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda self, x, r: act(function(self.bn(self.conv(x)), r * 2))


# Sums whose operators may depend on the size: two plain ones, and those that broadcast.
SIZED = ("y + r", "r += y", "a mean", "per channel", "a broadcast y", "an expanded residual", "a transposed residual")


@pytest.mark.parametrize("other_size", [False, True])
def test_each_form_of_a_sum(other_size: bool) -> None:
    patterns = {
        name: Pattern(behind(function, ACTIVATIONS["relu_"]), fusible, fusible)
        for name, (function, fusible) in SUMS.items()
        if name in SIZED or not other_size
    }
    assert failures(patterns, QUICK, other_size) == {}


def test_each_form_of_a_sum_before_a_smooth_activation() -> None:
    patterns = {
        name: Pattern(behind(function, ACTIVATIONS["silu"]), 1, 1)
        for name, (function, fusible) in SUMS.items()
        if fusible
    }
    assert failures(patterns, ("training",)) == {}


def test_in_place_forms_before_every_activation_in_every_mode() -> None:
    patterns = {
        f"{name}, {act}": Pattern(behind(SUMS[name][0], function), 1, 1)
        for name in ("y += r", "r.add_(y)")
        for act, function in ACTIVATIONS.items()
    }
    assert failures(patterns, FOUR_MODES) == {}


def made_of_a_parameter(self: Net, x: Tensor, r: Tensor) -> Tensor:
    shortcut = self.conv.weight.detach().view(1, 9, 1, 1)[:, :3].expand_as(x).clone()
    shortcut += self.bn(x)
    return F.relu(shortcut)


def view_of_the_residual_read_later(self: Net, x: Tensor, r: Tensor) -> Tensor:
    s = self.conv(r)
    other = s[:, :1]
    s += self.bn(x)
    return F.relu(s) + other


def view_of_the_residual_read_before(self: Net, x: Tensor, r: Tensor) -> Tensor:
    s = self.conv(r)
    other = s[:, :1].sin()
    s += self.bn(x)
    return F.relu(s) + other


# Where the residual comes from. A sum in place of a residual is fused if the forward alone holds it.
ORIGINS = {
    "an argument": Pattern(lambda self, x, r: F.relu(self.bn(x) + r), 1, 1),
    "an argument, written to": Pattern(lambda self, x, r: F.relu(r.add_(self.bn(x))), 0),
    "an argument, written to and activated": Pattern(lambda self, x, r: F.relu_(r.add_(self.bn(x))), 0),
    "a view of an argument, written to": Pattern(lambda self, x, r: F.relu(r.view(r.shape).add_(self.bn(x))), 0),
    "an argument, detached and written to": Pattern(
        lambda self, x, r: F.relu(r.detach().add_(self.bn(x).detach()) + self.bn2(x)), 1, 1
    ),
    "the input itself": Pattern(lambda self, x, r: F.relu(self.bn(x) + x), 1, 1),
    "the input itself, written to": Pattern(lambda self, x, r: F.relu((h := x * 2).add_(self.bn(h))), 1, 1),
    "made of a parameter": Pattern(made_of_a_parameter, 1, 1),
    "another norm": Pattern(lambda self, x, r: F.silu(self.bn(self.conv(x)) + self.bn2(r)), 1, 1),
    "another norm, in place": Pattern(lambda self, x, r: F.relu_(self.bn(self.conv(x)).add_(self.bn2(r))), 1, 1),
    "another pair": Pattern(lambda self, x, r: F.relu(self.bn(self.conv(x)) + F.relu(self.bn2(r))), 2, 1),
    "the pair before": Pattern(lambda self, x, r: F.relu(self.bn2(self.conv(y := F.relu(self.bn(x)))) + y), 2, 1),
    "made in between": Pattern(lambda self, x, r: F.silu(self.bn(x) + self.conv(r).sin()), 1, 1),
    "two names, written to": Pattern(lambda self, x, r: (F.relu((s := self.conv(r)).add_(self.bn(x))), s.sum()), 0),
    "a view read later": Pattern(view_of_the_residual_read_later, 0),
    "a view read before": Pattern(view_of_the_residual_read_before, 1, 1),
}


def test_where_the_residual_comes_from() -> None:
    assert failures(ORIGINS, QUICK) == {}


class TwoInputs(Net):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + residual)


def test_a_residual_that_does_not_fit_in_some_calls_is_added_as_before() -> None:
    original, fused = pair(TwoInputs)
    x = small()
    for residual in (small(), small()[:1, :, :1, :1], small().float(), 0.5, small(), 2, True, x):
        assert_same_steps(original, fused, x, residual, modes=("training",), steps=1)
    assert_fuses(original, fused, x, small(), sums=1)
    assert fused_names(fused) == ["bn"]
    for reason in ("shape, dtype or device", "number"):
        assert reason in why_left(fused, "bn")


def test_two_sizes_that_happen_to_be_equal_are_not_taken_for_one() -> None:
    """With dynamic sizes, a first call in which a residual fits must not decide for one in which it is broadcast."""
    original, fused = pair(TwoInputs)
    for n, m in ((4, 4), (5, 5), (6, 1), (1, 1), (1, 6), (7, 7), (2, 2)):
        x, residual = (torch.randn(k, 3, 4, 4, dtype=torch.float64) for k in (n, m))
        assert_same_steps(original, fused, x, residual, modes=("training",), steps=1)

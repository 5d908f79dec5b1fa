"""Values that are also read elsewhere, returned, kept or viewed; and tensors, counters and modes that change between a
batch norm and its activation, or residuals that change later. Each forward does all that it does unfused, and is fused
only where nobody can notice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import FOUR_MODES, Pattern, failures
from networks import assert_close
from observe import QUICK, Net, pair, small
from torch import Tensor


def kept_on_the_module(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    self.kept = [y]
    z = F.relu(y)
    return z + self.kept[0]


def activation_in_place_twice(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    F.relu_(y)
    return F.silu(F.relu_(y))


def norm_not_used(self: Net, x: Tensor, r: Tensor) -> Tensor:
    self.bn(x)
    return F.relu(r)


def asked_for_its_shape(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    n, c = y.size(0), y.shape[1]
    z = F.relu(y + r)
    return z.view(n, c, -1) * y.dim() * z.ndim


def asked_for_more(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    scale = 2.0 if y.is_contiguous() and y.dtype == torch.float64 and y.requires_grad else 3.0
    return F.relu(y + r) * scale


READ_ELSEWHERE = {
    "its value is used twice": Pattern(lambda self, x, r: F.silu(y := self.bn(x)) * y, 0),
    "returned": Pattern(lambda self, x, r: (F.relu(y := self.bn(x)), y), 0),
    "returned, after both names are the activated value": Pattern(lambda self, x, r: (F.relu_(y := self.bn(x)), y)),
    "returned in a dict": Pattern(lambda self, x, r: {"features": (y := self.bn(x)), "out": F.relu(y)}, 0),
    "kept on the module": Pattern(kept_on_the_module, 0),
    "the sum is returned": Pattern(lambda self, x, r: (F.relu(z := self.bn(x) + r), z), 0),
    "the sum in place is returned": Pattern(lambda self, x, r: (F.relu((y := self.bn(x)).add_(r)), y), 0),
    "all in place, returned": Pattern(lambda self, x, r: (F.relu_((y := self.bn(x)).add_(r)), y), 1, 1),
    "read before the sum": Pattern(lambda self, x, r: (y := self.bn(x)).mean() * F.relu(y.add_(r)), 0),
    "read after the sum": Pattern(lambda self, x, r: F.relu((y := self.bn(x)) + r) * y.mean(), 0),
    "viewed before the activation": Pattern(lambda self, x, r: ((y := self.bn(x)).view(-1), F.relu_(y)), 0),
    "detached before the activation": Pattern(lambda self, x, r: ((y := self.bn(x)).detach(), F.relu_(y)), 0),
    "viewed after the activation": Pattern(lambda self, x, r: (F.relu_(y := self.bn(x)), y.view(-1))),
    "the sum is viewed before": Pattern(lambda self, x, r: ((y := self.bn(x) + r)[:, 1:], F.relu_(y)), 0),
    "viewed before the sum": Pattern(lambda self, x, r: ((y := self.bn(x))[:, 1:], F.relu(y.add_(r))), 0),
    "activated twice": Pattern(lambda self, x, r: F.relu(y := self.bn(x)) + F.relu(y), 0),
    "activated in place twice": Pattern(activation_in_place_twice),
    "in place after a plain one": Pattern(lambda self, x, r: (F.silu(y := self.bn(x)), F.relu_(y)), 0),
    "not used": Pattern(norm_not_used, 0),
    "a chain": Pattern(lambda self, x, r: F.relu(self.bn2(self.bn(x)) + r), 1, 1),
    "asked for its shape": Pattern(asked_for_its_shape, 1, 1),
    "asked for more": Pattern(asked_for_more, None),
    "zeros like it": Pattern(lambda self, x, r: F.relu(y := self.bn(x)) + torch.zeros_like(y), None),
}


def written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    y[:, 0] = 0
    return F.relu(y)


def written_through_a_view(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    y[0].zero_()
    return F.relu_(y)


def input_written_through_a_view_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    h = self.conv(x)
    part = h[:, :1]
    y = self.bn(h)
    part.zero_()
    return F.relu(y + r)


def input_written_after_the_sum(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        h = self.conv(x)
        y = F.relu(self.bn(h) + r)
        h.mul_(2)
    return y, h


def statistics_read_without_a_sum(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    m = self.bn.running_mean * 2
    return F.relu(y), m


def weight_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.no_grad():
        self.bn.weight.mul_(1.5)
    return F.relu(y + r)


def bias_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.no_grad():
        self.bn.bias.add_(0.5)
    return F.relu(y + r)


WRITTEN_BETWEEN = {
    "written between": Pattern(written_between, 0),
    "written through a view": Pattern(written_through_a_view, 0),
    "written afterwards": Pattern(lambda self, x, r: ((z := F.silu(self.bn(x))).mul_(2), z.sum())),
    "the input": Pattern(lambda self, x, r: F.relu(self.bn(x) + x.mul_(2).sin()), 0),
    "a fresh input": Pattern(lambda self, x, r: F.relu(self.bn(h := self.conv(x)) + r * h.mul_(2)), 0),
    "the input, through a view": Pattern(input_written_through_a_view_between, 0),
    "the input, after the sum": Pattern(input_written_after_the_sum, None),
    "the input is read later": Pattern(lambda self, x, r: (F.relu(self.bn(h := self.conv(x))), h.exp())),
    # The graph does not know whether `r` lies in the memory of `x`.
    "another argument": Pattern(lambda self, x, r: F.relu(self.bn(x) + 1 * r.mul_(2)), 0),
    "statistics": Pattern(lambda self, x, r: F.relu(self.bn(x) + r * self.bn.running_mean.mul_(0).sum()), 0),
    "statistics are read": Pattern(lambda self, x, r: F.relu(self.bn(x) + r * self.bn.running_mean.sum()), 0),
    "the counter is read": Pattern(lambda self, x, r: F.relu(self.bn(x) + r * self.bn.num_batches_tracked), 0),
    "statistics are read behind": Pattern(lambda self, x, r: (F.relu(self.bn(x) + r), self.bn.running_var * 2), 1, 1),
    "statistics are read, no sum": Pattern(statistics_read_without_a_sum),
    "the weight": Pattern(weight_written_between, None),
    "the bias": Pattern(bias_written_between, None),
    # If the first call moved behind the second, it would update the running statistics last.
    "called again between": Pattern(lambda self, x, r: F.relu(self.bn(self.conv(x)) + F.relu(self.bn(x)))),
    "both terms of one layer": Pattern(lambda self, x, r: F.relu(self.bn(x) + self.bn(r)), 1, 1),
}


def residual_written_through_a_view(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = r * 2
    part = s[:, :1]
    y = F.gelu(self.bn(x) + s)
    part.zero_()
    return y, s


def residual_assigned_later(self: Net, x: Tensor, r: Tensor) -> Tensor:
    s = r * 2
    y = F.silu(self.bn(x) + s)
    s[0] = 1
    return y + s


# Backward of a fused smooth activation would read the residual, which torch's sum does not keep.
RESIDUAL_WRITTEN_LATER = {
    "in place": Pattern(lambda self, x, r: (F.silu(self.bn(x) + (s := r * 2)), s.mul_(3)), 0),
    "in place, relu": Pattern(lambda self, x, r: (F.relu(self.bn(x) + (s := r * 2)), s.mul_(3)), 1, 1),
    "through a view": Pattern(residual_written_through_a_view, 0),
    "activated": Pattern(lambda self, x, r: (F.hardswish(self.bn(x) + (s := r * 2)), F.relu_(s)), 0),
    "an argument": Pattern(lambda self, x, r: (F.silu(self.bn(x) + r), r.mul_(3)), 0),
    "an argument, leaky_relu": Pattern(lambda self, x, r: (F.leaky_relu(self.bn(x) + r), r.mul_(3)), 1, 1),
    "an argument, relu6": Pattern(lambda self, x, r: (F.relu6(self.bn(x) + r), r.mul_(3)), 1, 1),
    "by out=": Pattern(
        lambda self, x, r: F.silu(self.bn(x) + (s := (r * 2).detach())) + torch.mul(r.detach(), 2, out=s), 0
    ),
    "by foreach": Pattern(
        lambda self, x, r: (F.silu(self.bn(x) + (s := r * 2)), torch._foreach_mul_([s], 2.0), s + 0), 0
    ),
    "assigned": Pattern(residual_assigned_later, 0),
    # The caller may write to these after the call and before backward.
    "the caller's": Pattern(lambda self, x, r: F.silu(self.bn(x) + r), 0),
    "a view of the caller's": Pattern(lambda self, x, r: F.silu(self.bn(x) + r.view_as(x)), 0),
    "returned": Pattern(lambda self, x, r: (F.silu(self.bn(x) + (s := r * 2)), s), 0),
    "returned, relu": Pattern(lambda self, x, r: (F.relu(self.bn(x) + (s := r * 2)), s), 1, 1),
    "the graph's alone": Pattern(lambda self, x, r: F.silu(self.bn(x) + r * 2), 1, 1),
}


def without_grad(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    with torch.no_grad():
        return function(*arguments)


def under_autocast(function: Callable[..., Tensor], *arguments: Any, enabled: bool = True) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled):
        return function(*arguments)


def grad_mode_set_in_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = F.relu(y)
    torch.set_grad_enabled(before)
    return z + self.conv(x)


MODE_SWITCHED = {
    "no_grad around the norm": Pattern(lambda self, x, r: F.relu(without_grad(self.bn, x) + r), None),
    "no_grad around the activation": Pattern(lambda self, x, r: without_grad(F.relu, self.bn(x)) + self.conv(x), 0),
    "no_grad around the sum": Pattern(
        lambda self, x, r: F.relu(without_grad(torch.add, self.bn(x), r)) + self.conv(x), 0
    ),
    "no_grad in between": Pattern(lambda self, x, r: F.relu(self.bn(x) + r * without_grad(torch.mean, r)), None),
    "grad mode set": Pattern(grad_mode_set_in_between, 0),
    "autocast": Pattern(lambda self, x, r: under_autocast(F.relu, self.bn(x)).double(), 0),
    "autocast disabled": Pattern(
        lambda self, x, r: F.relu(self.bn(x) + under_autocast(torch.add, r, 1, enabled=False)), None
    ),
}


# Some need fewer modes: reads do not depend on the mode, and writes to a residual matter to gradients alone.
@pytest.mark.parametrize(
    ("patterns", "modes"),
    [
        (READ_ELSEWHERE, QUICK),
        (WRITTEN_BETWEEN, FOUR_MODES),
        (RESIDUAL_WRITTEN_LATER, ("training", "evaluation", "evaluation, no_grad")),
        (MODE_SWITCHED, FOUR_MODES),
    ],
    ids=["read elsewhere", "written between", "residual written later", "mode switched"],
)
def test_nobody_notices_that_a_pair_is_fused(patterns: dict[str, Pattern], modes: tuple[str, ...]) -> None:
    assert failures(patterns, modes) == {}


class Written(Net):
    """Writes to the third argument, which shares the memory of another argument in some of the calls."""

    first = False  # whether it writes before the sum

    def forward(self, x: Tensor, r: Tensor, s: Tensor) -> Tensor:
        y = self.bn(x)
        if self.first:
            s.mul_(2)
        z = F.silu(y + r)
        if not self.first:
            s.mul_(2)
        return z


@pytest.mark.parametrize("first", [True, False], ids=["before the sum", "behind it"])
@pytest.mark.parametrize("order", [(None, "x", "r"), ("r", "x", None)], ids=str)
def test_arguments_may_share_memory_in_some_calls(order: tuple[str | None, ...], first: bool) -> None:
    original, fused = pair(Written)
    original.first = fused.first = first
    for shared in order:
        values = small(), small()
        results = []
        for model in (original, fused):
            x, r = (v.clone().requires_grad_() * 1 for v in values)
            s = {"x": x, "r": r}[shared][:] if shared else small() * 0 + 1
            y = model(x, r, s.detach())  # shares the memory and the version counter
            try:
                y.square().sum().backward()
            except RuntimeError as error:
                results.append(str(error)[:60])
            else:
                results.append([y, x, r])
        if not isinstance(results[0], str):
            assert_close(results[1], results[0], f"{shared} is written to")

"""What is written, counted or switched between a batch norm and its sum, and written to the residual later: nothing may
move past it. Each is compared with the unfused model in all that a call does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import Pattern, failures
from networks import assert_close
from observe import MODES, Net, fused_names, pair, small
from torch import Tensor


def written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    y[:, 0] = 0
    return F.relu(y)


def written_through_a_view(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    y[0].zero_()
    return F.relu_(y)


def written_afterwards(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    z = F.silu(y)
    z.mul_(2)
    return z, z.sum()


def input_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    return F.relu(y + x.mul_(2).sin())


def fresh_input_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    h = self.conv(x)
    y = self.bn(h)
    h.mul_(2)
    return F.relu(y + r)


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


def other_argument_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    """That `r` does not lie in the memory of `x` is not known to the graph."""
    y = self.bn(x)
    r.mul_(2)
    return F.relu(y + 1 * r)


def statistics_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    self.bn.running_mean.zero_()
    return F.relu(y + r)


def statistics_read_between(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    m = self.bn.running_mean * 2
    return F.relu(y + r), m


def counter_read_between(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    n = self.bn.num_batches_tracked + 0
    return F.relu(y + r), n


def statistics_read_behind(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(self.bn(x) + r)
    return y, self.bn.running_var * 2


def statistics_read_without_a_sum(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    m = self.bn.running_mean * 2
    return F.relu(y), m


def called_again_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    """Moved behind its second call, the first would update the running statistics last."""
    first = self.bn(self.conv(x))
    second = F.relu(self.bn(x))
    return F.relu(first + second)


def both_terms_of_one_layer(self: Net, x: Tensor, r: Tensor) -> Tensor:
    return F.relu(self.bn(x) + self.bn(r))


def weight_written_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.no_grad():
        self.bn.bias.mul_(1.0).add_(0.5)
    return F.relu(y + r)


def no_grad_around_the_norm(self: Net, x: Tensor, r: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.bn(x)
    return F.relu(y + r)


def no_grad_around_the_activation(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.no_grad():
        z = F.relu(y)
    return z + self.conv(x)


def no_grad_around_the_sum(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.no_grad():
        z = y + r
    return F.relu(z) + self.conv(x)


def no_grad_in_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.no_grad():
        s = r.abs().mean()
    return F.relu(y + r) * s


def grad_mode_set_in_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    z = F.relu(y)
    torch.set_grad_enabled(before)
    return z + self.conv(x)


def autocast_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.autocast("cpu", torch.bfloat16):
        z = F.relu(y)
    return z.double()


def autocast_disabled_between(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    with torch.autocast("cpu", enabled=False):
        s = r + 1
    return F.relu(y + s)


def residual_written_later(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Backward of a smooth activation would read the residual; torch's sum keeps none."""
    s = r * 2
    y = F.silu(self.bn(x) + s)
    s.mul_(3)
    return y, s


def residual_written_later_relu(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = r * 2
    y = F.relu(self.bn(x) + s)
    s.mul_(3)
    return y, s


def residual_written_later_through_a_view(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = r * 2
    part = s[:, :1]
    y = F.gelu(self.bn(x) + s)
    part.zero_()
    return y, s


def residual_activated_later(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    s = r * 2
    y = F.hardswish(self.bn(x) + s)
    return y, F.relu_(s)


def residual_argument_written_later(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = F.silu(self.bn(x) + r)
    r.mul_(3)
    return y


def residual_written_by_out(self: Net, x: Tensor, r: Tensor) -> Tensor:
    s = (r * 2).detach()
    y = F.silu(self.bn(x) + s)
    torch.mul(r.detach(), 2, out=s)
    return y + s


def residual_written_by_foreach(self: Net, x: Tensor, r: Tensor) -> Tensor:
    s = r * 2
    y = F.silu(self.bn(x) + s)
    torch._foreach_mul_([s], 2.0)
    return y + s


def residual_assigned_later(self: Net, x: Tensor, r: Tensor) -> Tensor:
    s = r * 2
    y = F.silu(self.bn(x) + s)
    s[0] = 1
    return y + s


def input_written_before_backward(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    h = self.conv(x)
    y = F.relu(self.bn(h))
    return y, h.exp()


PATTERNS: dict[str, Pattern] = {
    "written between": Pattern(written_between, 0),
    "written through a view": Pattern(written_through_a_view, 0),
    "written afterwards": Pattern(written_afterwards, 1),
    "input written between": Pattern(input_written_between, 0),
    "fresh input written between": Pattern(fresh_input_written_between, 0),
    "input written through a view": Pattern(input_written_through_a_view_between, 0),
    "another argument written between": Pattern(other_argument_written_between, 0),
    "statistics written between": Pattern(statistics_written_between, 0),
    "statistics read between": Pattern(statistics_read_between, 0),
    "counter read between": Pattern(counter_read_between, 0),
    "statistics read behind": Pattern(statistics_read_behind, 1, 1),
    "statistics read, no sum": Pattern(statistics_read_without_a_sum, 1),
    "called again between": Pattern(called_again_between, 1),
    "both terms of one layer": Pattern(both_terms_of_one_layer, 1, 1),
    "no grad around the activation": Pattern(no_grad_around_the_activation, 0),
    "no grad around the sum": Pattern(no_grad_around_the_sum, 0),
    "grad mode set": Pattern(grad_mode_set_in_between, 0),
    "autocast between": Pattern(autocast_between, 0),
    "residual written later": Pattern(residual_written_later, 0),
    "residual written later, relu": Pattern(residual_written_later_relu, 1, 1),
    "residual written later through a view": Pattern(residual_written_later_through_a_view, 0),
    "residual activated later": Pattern(residual_activated_later, 0),
    "residual, an argument, written later": Pattern(residual_argument_written_later, 0),
    "residual written by out=": Pattern(residual_written_by_out, 0),
    "residual written by foreach": Pattern(residual_written_by_foreach, 0),
    "residual assigned later": Pattern(residual_assigned_later, 0),
    "input read later": Pattern(input_written_before_backward, 1),
}
# Right, whether or not it is fused; that depends on the mode.
EITHER: dict[str, Pattern] = {
    "weight written between": Pattern(weight_written_between, 0),
    "no grad around the norm": Pattern(no_grad_around_the_norm, 0),
    "input written after the sum": Pattern(input_written_after_the_sum, 0),
    "no grad in between": Pattern(no_grad_in_between, 0),
    "autocast disabled between": Pattern(autocast_disabled_between, 0),
}


def test_patterns() -> None:
    assert failures(PATTERNS, modes=tuple(MODES)) == {}


def test_results_whatever_is_fused() -> None:
    wrong = failures(EITHER, modes=tuple(MODES))
    assert {name: why for name, why in wrong.items() if "fused" not in why} == {}


class Written(Net):
    """The third argument is written to, which may lie in the memory of the others, in one call and not in the next."""

    def forward(self, x: Tensor, r: Tensor, s: Tensor) -> Tensor:
        y = self.bn(x)
        if self.first:
            s.mul_(2)
        z = F.silu(y + r)
        if not self.first:
            s.mul_(2)
        return z

    first = False


@pytest.mark.parametrize("first", [True, False], ids=["before the sum", "behind it"])
@pytest.mark.parametrize("order", [(None, "x", "r"), ("r", "x", None)], ids=str)
def test_arguments_that_share_memory_this_time(order: tuple[str | None, ...], first: bool) -> None:
    original, fused = pair(Written)
    original.first = fused.first = first
    for shared in order:
        values = small(), small()
        results = []
        for model in (original, fused):
            model.zero_grad()
            x, r = (v.clone().requires_grad_() * 1 for v in values)
            s = {"x": x, "r": r}[shared][:] if shared else small() * 0 + 1
            y = model(x, r, s.detach())  # which shares the memory and its version
            try:
                y.square().sum().backward()
            except RuntimeError as error:
                results.append(str(error)[:60])
            else:
                results.append([y.detach(), x.detach(), r.detach(), *(p.grad for p in model.parameters())][:3])
        if not isinstance(results[0], str):
            assert_close(results[1], results[0], f"{shared} is written to")


@pytest.mark.parametrize("act", [F.relu, F.leaky_relu, F.relu6])
def test_a_residual_may_be_changed_after_the_call(act: Callable[[Tensor], Tensor]) -> None:
    original, fused = pair(Net.of(lambda self, x, r: act(self.bn(x) + r)))
    x, r = small(), small()
    for model in (original, fused):
        residual = r.clone()
        y = model(x, residual)
        residual.mul_(2)
        y.square().sum().backward()
    assert_close(list(map(grad, fused.parameters())), list(map(grad, original.parameters())), "gradients")
    assert fused_names(fused) == ["bn"]


def grad(p: Tensor) -> Any:
    return p.grad

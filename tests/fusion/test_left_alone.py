"""Values that somebody else reads, returns, keeps or has a view of: a pair is left, unless all see the activated."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from bank import Pattern, failures
from observe import MODES, Net
from torch import Tensor


def twice(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    return F.silu(y) * y


def returned(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    return F.relu(y), y


def returned_in_place(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """After relu_ both names are the activated value."""
    y = self.bn(x)
    return F.relu_(y), y


def returned_in_a_dict(self: Net, x: Tensor, r: Tensor) -> dict[str, Tensor]:
    y = self.bn(x)
    return {"features": y, "out": F.relu(y)}


def kept_on_the_module(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    self.kept = [y]
    z = F.relu(y)
    return z + self.kept[0]


def summed_and_returned(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    z = self.bn(x) + r
    return F.relu(z), z


def summed_in_place_and_returned(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    y += r
    return F.relu(y), y


def all_in_place_and_returned(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    y += r
    return F.relu_(y), y


def norm_read_before_the_sum(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    m = y.mean()
    y += r
    return F.relu(y) * m


def norm_read_after_the_sum(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    z = F.relu(y + r)
    return z * y.mean()


def view_before_the_activation(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    v = y.view(-1)
    return F.relu_(y), v


def detached_before_the_activation(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    v = y.detach()
    return F.relu_(y), v


def view_after_the_activation(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    z = F.relu_(y)
    return z, y.view(-1)


def view_of_the_sum_before_the_activation(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x) + r
    v = y[:, 1:]
    return F.relu_(y), v


def view_of_the_norm_before_the_sum(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    v = y[:, 1:]
    y += r
    return F.relu(y), v


def activation_twice(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    return F.relu(y) + F.relu(y)


def activation_in_place_twice(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    F.relu_(y)
    return F.silu(F.relu_(y))


def in_place_after_a_plain_one(self: Net, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    y = self.bn(x)
    z = F.silu(y)
    return z, F.relu_(y)


def norm_not_used(self: Net, x: Tensor, r: Tensor) -> Tensor:
    self.bn(x)
    return F.relu(r)


def chain(self: Net, x: Tensor, r: Tensor) -> Tensor:
    return F.relu(self.bn2(self.bn(x)) + r)


def asked_for_its_shape(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    n, c = y.size(0), y.shape[1]
    z = F.relu(y + r)
    return z.view(n, c, -1) * y.dim() * z.ndim


def asked_for_more(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    scale = 2.0 if y.is_contiguous() and y.dtype == torch.float64 and y.requires_grad else 3.0
    return F.relu(y + r) * scale


def retained(self: Net, x: Tensor, r: Tensor) -> Tensor:
    y = self.bn(x)
    z = torch.zeros_like(y)
    return F.relu(y) + z


PATTERNS: dict[str, Pattern] = {
    "its value is used twice": Pattern(twice, 0),
    "it is returned": Pattern(returned, 0),
    "it is returned, in place": Pattern(returned_in_place, 1),
    "it is returned in a dict": Pattern(returned_in_a_dict, 0),
    "it is kept on the module": Pattern(kept_on_the_module, 0),
    "the sum is returned": Pattern(summed_and_returned, 0),
    "the sum in place is returned": Pattern(summed_in_place_and_returned, 0),
    "all in place, returned": Pattern(all_in_place_and_returned, 1, 1),
    "read before the sum": Pattern(norm_read_before_the_sum, 0),
    "read after the sum": Pattern(norm_read_after_the_sum, 0),
    "view before the activation": Pattern(view_before_the_activation, 0),
    "detached before the activation": Pattern(detached_before_the_activation, 0),
    "view after the activation": Pattern(view_after_the_activation, 1),
    "view of the sum before the activation": Pattern(view_of_the_sum_before_the_activation, 0),
    "view before the sum": Pattern(view_of_the_norm_before_the_sum, 0),
    "activation twice": Pattern(activation_twice, 0),
    "activation in place twice": Pattern(activation_in_place_twice, 1),
    "in place after a plain one": Pattern(in_place_after_a_plain_one, 0),
    "not used": Pattern(norm_not_used, 0),
    "a chain": Pattern(chain, 1, 1),
    "asked for its shape": Pattern(asked_for_its_shape, 1, 1),
}
# Right, whether or not it is fused; that depends on the mode.
EITHER: dict[str, Pattern] = {
    "asked for more": Pattern(asked_for_more, 0),
    "zeros like it": Pattern(retained, 0),
}


def test_patterns() -> None:
    assert failures(PATTERNS, modes=tuple(MODES)) == {}


def test_results_whatever_is_fused() -> None:
    wrong = failures(EITHER, modes=tuple(MODES))
    assert {name: why for name, why in wrong.items() if "fused" not in why} == {}

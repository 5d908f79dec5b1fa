"""Shared by the tests of this folder: a network, the comparison of what is done with recompute and without, and the
observation of which outputs are kept and which are recomputed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from cases import make_grad, make_input, same_bits, seed
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import bnext
from benchmarks.memory import allocated

SHAPE = (2, 3, 6, 6)
FEATURES = (2, 4, 6, 6)  # of inputs and outputs of the network's batch norms


class Net(nn.Module):
    """A batch norm with a smooth activation and one with a rectifier, between convolutions."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            bnext.BatchNormAct2d(4, act="silu", **options),
            nn.Conv2d(4, 4, 3, padding=1),
            bnext.BatchNormAct2d(4, act="relu", **options),
        )
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


Scope = Callable[[], contextlib.AbstractContextManager[None]]
# Does something with a network and an input, in parts inside the scope, and returns the results.
Scenario = Callable[[Net, Tensor, Scope], Iterable[Tensor]]


def leaves(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Those of the input and the parameters that require gradients."""
    return [t for t in (x, *net.parameters()) if t.requires_grad]


def gradients(y: Tensor, inputs: Iterable[Tensor], **options: Any) -> list[Tensor]:
    """The gradients of those inputs that `y` depends on; the gradient of `y` is the same each time."""
    seed(23)
    grad = make_grad(tuple(y.shape), dtype=y.dtype)
    found = torch.autograd.grad(y, list(inputs), grad, allow_unused=True, **options)
    return [g for g in found if g is not None]


class Recomputed(TorchDispatchMode):
    """Records the storages of recomputed outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.bnext.batch_norm_recompute.default:
            self.storages.append(storage_of(result))
        return result

    def alive(self) -> int:
        """How many of the storages are still in memory."""
        return sum(not storage.expired() for storage in self.storages)


def storage_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def outcomes(
    scenario: Scenario, make: Callable[[], Net] = Net, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """What the scenario returns, and the buffers after it, without recompute and with it."""
    results = []
    for scope in (contextlib.nullcontext, bnext.recompute):
        seed(17)
        net = make().to(dtype)
        x = make_input(SHAPE, dtype=dtype).requires_grad_()
        found = [t.detach().clone() for t in scenario(net, x, scope)]
        results.append([*found, *(b.clone() for b in net.buffers())])
    return results


def assert_same(
    scenario: Scenario,
    count: int | None = None,
    make: Callable[[], Net] = Net,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The results are the same bits with recompute and without. If `count` is given, so many outputs were recomputed,
    and none of them is alive."""
    with contextlib.nullcontext() if count is None else Recomputed() as mode:
        expected, actual = outcomes(scenario, make, dtype)
    assert len(actual) == len(expected)
    assert [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if not same_bits(a, b)] == []
    if mode is not None:
        assert (len(mode.storages), mode.alive()) == (count, 0)


def held_bytes(call: Callable[[], Tensor]) -> int:
    """The bytes that a call has allocated and the graph of its result keeps alive."""
    return allocated(lambda: call().grad_fn).held

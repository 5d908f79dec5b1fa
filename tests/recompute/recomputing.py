"""What the tests of this folder share: a network, how what is done to it with recompute is compared with the same
without, and how it is seen what was kept and what was made again."""

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

SHAPE = (2, 3, 6, 6)
FEATURES = (2, 4, 6, 6)  # of what a batch norm of the network takes and gives


class Net(nn.Module):
    """A smooth activation and a rectifier, between convolutions."""

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
# What is done to a network and its input, inside the scope as far as it enters it, and what comes of it.
Scenario = Callable[[Net, Tensor, Scope], Iterable[Tensor]]


def leaves(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [t for t in (x, *net.parameters()) if t.requires_grad]


def gradients(y: Tensor, wanted: Iterable[Tensor], **options: Any) -> list[Tensor]:
    seed(23)
    grad = make_grad(tuple(y.shape), dtype=y.dtype)
    given = torch.autograd.grad(y, list(wanted), grad, allow_unused=True, **options)
    return [g for g in given if g is not None]


class Made(TorchDispatchMode):
    """The outputs that are made again, by their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.bnext.batch_norm_recompute.default:
            self.storages.append(storage_of(result))
        return result

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


def storage_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def outcomes(
    scenario: Scenario, make: Callable[[], Net] = Net, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """Without recompute and with it: what the scenario returns, and the buffers after it."""
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
    made: int | None = None,
    make: Callable[[], Net] = Net,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The same bits; and how many outputs were made again, none of which is alive."""
    with contextlib.nullcontext() if made is None else Made() as mode:
        expected, actual = outcomes(scenario, make, dtype)
    assert len(actual) == len(expected)
    assert [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if not same_bits(a, b)] == []
    if mode is not None:
        assert (len(mode.storages), mode.alive()) == (made, 0)


class Results(TorchDispatchMode):
    """The memory that operators have made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(result, Tensor) and func is not torch.ops.aten.detach.default:
                storage = storage_of(result)
                self.sizes[storage.cdata] = storage, result.untyped_storage().nbytes()
        return results


def held_bytes(call: Callable[[], Tensor]) -> int:
    """Of what a call has made, that which the graph of its result keeps alive."""
    with Results() as results:
        y = call()
    node = y.grad_fn
    del y
    assert node is not None
    return sum(size for storage, size in results.sizes.values() if not storage.expired())

"""What the processes of test_population.py run, and the statistics that it compares with, from their definition."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from cases import make_input
from networks import assert_close
from processes import World
from reference import widen
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import bnext


def population(inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of all values of each channel together, in float64: sum(x)/n, and sum((x - mean)^2)/(n - 1)."""
    x = torch.cat([widen(input).transpose(0, 1).flatten(1) for input in inputs], 1)
    mean = x.sum(1) / x.shape[1]
    return mean, (x - mean[:, None]).square().sum(1) / (x.shape[1] - 1)


def expected(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """By the name of each layer that trains: the statistics of what it sees, and the number of its calls."""
    twin = copy.deepcopy(model).train()
    seen: dict[str, list[Tensor]] = {
        name: [] for name, m in twin.named_modules() if isinstance(m, _BatchNorm) and m.training
    }
    for name, found in seen.items():
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return {name: (*population(inputs), len(inputs)) for name, inputs in seen.items()}


def assert_statistics(model: nn.Module, wanted: dict[str, tuple[Tensor, Tensor, int]]) -> None:
    for name, (mean, var, calls) in wanted.items():
        layer = model.get_submodule(name)
        assert_close(layer.running_mean, mean, f"{name}: mean")
        assert_close(layer.running_var, var, f"{name}: var")
        assert layer.num_batches_tracked == calls, name


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))


def all_ranks_together(world: World, *, shares: Sequence[Sequence[int]]) -> None:
    """`shares`: the sizes of each rank's batches."""
    model = network().double()
    batches = [[make_input((size, 3, 4, 3), dtype=torch.float64) for size in sizes] for sizes in shares]
    wanted = expected(model, [batch for share in batches for batch in share])
    parallel = DistributedDataParallel(model)
    for run in (model, parallel, torch.compile(parallel, backend="eager")):
        for layer in (model[1], model[4]):
            layer.reset_running_stats()
        bnext.update_bn(batches[world.rank], run)
        assert_statistics(model, wanted)


def one_collective(world: World) -> int:
    """How many there are, of a model of two layers."""
    calls = 0
    all_gather = torch.distributed.all_gather

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return all_gather(*args, **kwargs)

    torch.distributed.all_gather = counted
    try:
        bnext.update_bn([torch.randn(4, 3, 2, 2)], network())
    finally:
        torch.distributed.all_gather = all_gather
    return calls

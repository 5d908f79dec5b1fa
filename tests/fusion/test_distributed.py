"""Fused models of several processes: synchronised batch norms, DistributedDataParallel around and inside, FSDP."""

from __future__ import annotations

import copy
from collections.abc import Callable

import fusion_jobs
import pytest
import torch
from networks import assert_close, conv
from observe import Pair, assert_same_steps, count, pair, sequential, small
from processes import Pool
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import bnext


def two_pairs() -> nn.Module:
    return nn.Sequential(sequential(), sequential(conv(3, 1)))


@pytest.mark.parametrize(
    "job", [fusion_jobs.no_collective_is_passed, fusion_jobs.one_rank_may_be_unfused, fusion_jobs.data_parallel]
)
def test_in_several_processes(pools: Callable[[int], Pool], job: Callable[..., None]) -> None:
    pools(2).run(job, seed=3)


@pytest.mark.usefixtures("group")
def test_data_parallel_around_and_inside() -> None:
    original, fused = pair(two_pairs)
    wrapped = DistributedDataParallel(fused)
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    assert_same_steps(original, wrapped, small(), modes=("training",))
    assert count(wrapped(small())) == 0
    inner = nn.Sequential(DistributedDataParallel(copy.deepcopy(original[0])), copy.deepcopy(original[1]))
    assert_same_steps(original, bnext.convert(inner, fuse=True), small())


@pytest.fixture
def called(group: object) -> Pair:
    """A model after its first call, and its fused copy, in a group of one process."""
    original, fused = pair(two_pairs)
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    return original, fused


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.parametrize("policy", [None, {nn.Conv2d}], ids=["whole", "layers"])
def test_a_sharded_fused_model_computes_the_same(called: Pair, policy: set[type[nn.Module]] | None) -> None:
    original, fused = called
    x = small()
    sharded = FullyShardedDataParallel(
        fused, auto_wrap_policy=policy and ModuleWrapPolicy(policy), device_id=torch.device("cpu"), use_orig_params=True
    )
    for _ in range(2):
        gradients = []
        for model in (sharded, original):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            gradients.append([y, *(p.grad for p in model.parameters())])
        assert_close(*gradients, "output and gradients")


@pytest.mark.parametrize("part", [None, 1], ids=["whole", "norm"])
def test_fully_shard_and_revert(called: Pair, part: int | None) -> None:
    original, fused = called
    x = small()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(fused if part is None else fused[0][part], mesh=mesh)
    assert_close(fused(x), original(x), "output")
    bnext.revert(fused)
    assert_close(fused(x), original(x), "output")

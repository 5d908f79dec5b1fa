"""What the processes of tests/recompute run."""

from __future__ import annotations

import torch
from cases import make_input, same_bits, seed
from networks import Bottleneck
from processes import World
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnext


def data_parallel(world: World) -> None:
    """Recompute does not change the gradients, parameters and statistics of two steps with synchronised batch norms."""
    seed(3)
    batches = [make_input((2 + world.rank, 4, 6, 6)) for _ in range(2)]
    results = []
    for recompute in (False, True):
        seed(5)
        model = bnext.convert(nn.Sequential(Bottleneck(), Bottleneck()), fuse=True, recompute=recompute, sync=True)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for x in batches:
            optimizer.zero_grad()
            parallel(x).square().mean().backward()
            optimizer.step()
        assert len(bnext.fusion_report(parallel).fused) == 6
        results.append([*model.state_dict().values(), *(p.grad for p in model.parameters())])
    assert all(map(same_bits, *results))

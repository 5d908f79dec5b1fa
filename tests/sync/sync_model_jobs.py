"""What the processes of test_sync.py run on whole models: each function here is run by all ranks, and asserts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import same_bits
from checks import output_strides
from processes import World
from reference import Act, widen
from sync_shares import make_batch, make_layer, share_of
from tolerances import assert_within
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import bnext


class ConvNet(nn.Module):
    """What convert fuses: batch norm with an activation, in a Sequential and in a forward, and with a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.SiLU())
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, momentum=None)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head, self.bn3 = nn.Linear(4, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)) + x)
        return self.bn3(self.head(out.mean((2, 3))))


def trained(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], rows: slice, scale: float = 1.0, penalty: float = 0.0
) -> list[float]:
    """The loss of each step of SGD on these rows of the batches; `scale` undoes that gradients are averaged.

    The `penalty` is a gradient penalty: by how much the loss changes with the input.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in data:
        optimizer.zero_grad()
        images = x[rows].requires_grad_(penalty > 0)
        loss = (model(images) - target[rows]).square().sum() / len(x)
        if penalty:
            (slope,) = torch.autograd.grad(loss, images, create_graph=True)
            loss = loss + penalty * slope.square().sum()
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trains_as_one_process_does(
    world: World,
    *,
    sizes: Sequence[int],
    how: str = "",
    options: dict[str, bool] | None = None,
    steps: int = 4,
    penalty: float = 0.0,
) -> None:
    plain = ConvNet().double()
    data = [
        (torch.randn(sum(sizes), 3, 6, 5, dtype=torch.float64), torch.randn(sum(sizes), 5, dtype=torch.float64))
        for _ in range(steps)
    ]
    model = bnext.convert(copy.deepcopy(plain), sync=True, **(options or {}))
    assert sum(type(m) is bnext.SyncBatchNorm for m in model.modules()) == 4
    parallel = DistributedDataParallel(torch.compile(model, backend="aot_eager") if how == "compiled inside" else model)
    run = torch.compile(parallel, backend="aot_eager") if how == "compiled" else parallel
    losses = torch.tensor(trained(run, data, share_of(sizes, world.rank), world.size, penalty), dtype=torch.float64)
    distributed.all_reduce(losses)
    expected = torch.tensor(trained(plain, data, slice(None), penalty=penalty), dtype=torch.float64)
    # Rounding at eps = 2^-52 through some 10 layers, and through the steps, each of which passes it on.
    assert_within(losses, expected, 1e-11 * (1 + expected), "losses")
    actual = model.state_dict()
    assert list(actual) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert_within(actual[key], widen(value), 1e-11 * (1 + widen(value).abs().max()), key)
    # In evaluation each by itself.
    x = data[0][0][: world.rank + 1]
    assert_within(model.eval()(x), plain.eval()(x).detach(), 1e-10, "evaluation")
    torch._dynamo.reset()


def lets_torch_refuse_its_own(world: World) -> None:
    """torch's SyncBatchNorm does not work on the CPU; that DistributedDataParallel says so is not ours to change."""
    theirs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3))
    for model in (theirs, nn.Sequential(bnext.SyncBatchNorm(3), nn.SyncBatchNorm(3)), nn.SyncBatchNorm(3)):
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            DistributedDataParallel(model)
    for model in (bnext.convert(theirs), bnext.SyncBatchNorm(3)):
        DistributedDataParallel(model)


def equals_eager_when_compiled(
    world: World, *, act: Act, has_residual: bool, dynamic: bool, options: dict[str, Any], backend: str = "aot_eager"
) -> None:
    """In training, then in evaluation; outputs, gradients and buffers."""
    torch._dynamo.reset()
    layer = make_layer(5, torch.float32, act=act, **options)
    twin = copy.deepcopy(layer)
    graphs = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    run = torch.compile(twin, fullgraph=True, dynamic=dynamic, backend=counted)
    # Sizes that are equal in the first call would be taken for one and the same.
    shapes = ((3, 5, 7, 4), (4, 5, 6, 2), (9, 5, 11, 6)) if dynamic else ((3, 5, 5, 4),) * 2
    for training in (True, False):
        first = 0
        for shape in shapes:
            # A share of another size in each process.
            batch = make_batch((shape[0] + 10 * world.rank, *shape[1:]), torch.float32, has_residual=has_residual)
            results = []
            for module, call in ((layer, layer), (twin, run)):
                module.train(training).zero_grad()
                share = batch.rows(slice(None), "contiguous" if dynamic else "channels_last")
                leaves = [t.detach().requires_grad_() for t in (share.input, share.residual) if t is not None]
                y = call(*leaves)
                assert y.stride() == output_strides(share.input)
                y.backward(share.grad_output)
                grads = [t.grad for t in (*leaves, *module.parameters())]
                results.append([y.detach(), *grads, *(b.clone() for b in module.buffers())])
            assert all(map(same_bits, *results)), (training, shape)
            # The compiler itself may begin anew, in the first call, to find that momentum is no tensor.
            first = first or len(graphs)
        assert len(graphs) == first, "compiled again"
    torch._dynamo.reset()

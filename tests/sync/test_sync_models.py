"""Models with SyncBatchNorm in several processes: in DistributedDataParallel, and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import same_bits
from checks import output_strides
from processes import World
from reference import Act
from sync_shares import make_batch, make_layer, share_of
from torch import Tensor, distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
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


def trained(model: nn.Module, data: list[tuple[Tensor, Tensor]], rows: slice, scale: float, penalty: float) -> Tensor:
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
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("sizes", "how", "fuse", "penalty", "steps"),
    [
        ((5, 2), "eager", False, 0.0, 4),
        ((4, 0, 3), "eager", True, 0.0, 4),
        ((5, 2), "eager", False, 1.0, 2),
        ((4, 1, 3), "eager", False, 1.0, 2),
        ((5, 2), "compiled", True, 0.0, 2),
        ((5, 2), "compiled inside", True, 0.0, 2),
    ],
)
def test_trains_in_distributed_data_parallel_as_one_process_does(
    world: World, sizes: tuple[int, ...], how: str, fuse: bool, penalty: float, steps: int
) -> None:
    torch._dynamo.reset()
    plain = ConvNet().double()
    shape = (sum(sizes), 3, 6, 5)
    data = [(torch.randn(shape).double(), torch.randn(sum(sizes), 5).double()) for _ in range(steps)]
    model = bnext.convert(copy.deepcopy(plain), sync=True, fuse=fuse)
    assert sum(type(m) is bnext.SyncBatchNorm for m in model.modules()) == 4
    parallel = DistributedDataParallel(torch.compile(model, backend="aot_eager") if how == "compiled inside" else model)
    run = torch.compile(parallel, backend="aot_eager") if how == "compiled" else parallel
    losses = trained(run, data, share_of(sizes, world.rank), world.size, penalty)
    distributed.all_reduce(losses)
    expected = trained(plain, data, slice(None), 1.0, penalty)
    # Rounding at eps = 2^-52 through some 10 layers, and through the steps, each of which passes it on.
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-11, atol=1e-11)
    # In evaluation each process computes alone.
    x = data[0][0][: world.rank + 1]
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=0, atol=1e-10)


def test_distributed_data_parallel_refuses_torchs_layer(world: World) -> None:
    """torch's SyncBatchNorm does not work on the CPU; that DistributedDataParallel says so is not ours to change."""
    theirs = nn.Sequential(nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3))
    for model in (theirs, nn.Sequential(bnext.SyncBatchNorm(3), nn.SyncBatchNorm(3)), nn.SyncBatchNorm(3)):
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            DistributedDataParallel(model)
    for model in (bnext.convert(theirs), bnext.SyncBatchNorm(3)):
        DistributedDataParallel(model)


@pytest.mark.parametrize(
    ("act", "has_residual", "dynamic", "options", "backend"),
    [
        (None, False, False, {}, "aot_eager"),
        ("relu", True, False, {"momentum": None}, "aot_eager"),
        ("silu", True, True, {}, "aot_eager"),
        (("leaky_relu", 0.3), False, True, {"momentum": None, "affine": False}, "aot_eager"),
        ("gelu", False, True, {"track_running_stats": False}, "aot_eager"),
        pytest.param("relu", True, False, {}, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_equals_eager(
    world: World, act: Act, has_residual: bool, dynamic: bool, options: dict[str, Any], backend: str
) -> None:
    torch._dynamo.reset()
    layer = make_layer(5, torch.float32, act=act, **options)
    twin = copy.deepcopy(layer)
    compiler = CompileCounterWithBackend(backend)
    run = torch.compile(twin, fullgraph=True, dynamic=dynamic, backend=compiler)
    # All sizes of a shape differ, since the compiler takes equal ones in the first call for one symbol.
    shapes = ((3, 5, 7, 4), (4, 5, 6, 2), (9, 5, 11, 6)) if dynamic else ((3, 5, 5, 4),) * 2
    for training in (True, False):
        first = 0
        for shape in shapes:
            # Each process has a share of another size.
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
            first = first or compiler.frame_count
        assert compiler.frame_count == first, "compiled again"

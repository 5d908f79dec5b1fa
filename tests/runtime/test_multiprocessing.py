"""bnext in several processes: models whose tensors they share, loaders of data, and what a fork copies."""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import threading

import pytest
import torch
from cases import make_grad, make_input, same_bits
from marks import FORK_WARNING, linux_only, needs_fork
from outputs import MIB, POOL_BLOCK, in_new_process, is_all, output, returns_in_a_fork
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnext
from bnext import _C


def step(model: nn.Module, x: Tensor) -> None:
    torch.set_num_threads(1)
    model(x).square().sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


def steps(models: list[nn.Module], x: Tensor, answers: multiprocessing.SimpleQueue[object]) -> None:
    for model in models:
        step(model, x)
    answers.put(bnext.fusion_report(models[1]).fused)


@pytest.mark.slow
def test_a_step_in_a_spawned_process() -> None:
    """The process trains a plain and a fused model, whose tensors it shares with this one."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).double()
    models = [bnext.convert(copy.deepcopy(network).share_memory(), fuse=fuse) for fuse in (False, True)]
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=steps, args=(models, x, answers))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert answers.get() == [("1", "batch norm -> relu")]
    step(network, x)
    for model in models:
        torch.testing.assert_close(model.state_dict(), network.state_dict())
        assert int(model[1].num_batches_tracked) == 1


class Normalized(Dataset[list[Tensor]]):
    """Samples that a layer has normalised: small, divided between threads, and with an output of 33 MiB."""

    def __init__(self) -> None:
        self.inputs = [make_input(shape) for shape in ((3, 4, 5, 5), (4, 4, 70, 70), (7, 4, 2, 3))]
        self.inputs.append(make_input((1, 4, 64, 64)).expand(528, 4, 64, 64).contiguous())
        self.grads = [make_grad(tuple(x.shape)) for x in self.inputs]
        # momentum=0 keeps the statistics: evaluation must not depend on which samples a worker trained its copy with.
        self.layer = bnext.BatchNormAct2d(4, act="silu", momentum=0.0)

    def __len__(self) -> int:
        return 2 * len(self.inputs)

    def __getitem__(self, index: int) -> list[Tensor]:
        self.layer.train(index % 2 == 0)
        x = self.inputs[index // 2].detach().requires_grad_()
        y = self.layer(x)
        gradients = torch.autograd.grad(y, [x, *self.layer.parameters()], self.grads[index // 2])
        # Large tensors take long to send to another process; sums of their bits do not.
        return [y.detach().view(torch.int32).sum(), gradients[0].view(torch.int32).sum(), *gradients[1:]]


@needs_fork
@pytest.mark.filterwarnings(FORK_WARNING)
def test_loader_whose_workers_normalize() -> None:
    data = Normalized()
    # Threads and cached blocks are what a fork might copy badly.
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    data.layer(data.inputs[-1]).sum().backward()
    torch.set_num_threads(threads)
    expected = [data[i] for i in range(len(data))]
    if sys.platform == "linux":
        assert _C.cached_bytes() > 0
    # Two workers, since forks might write to one another's memory.
    workers = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True}
    loader = DataLoader(data, batch_size=None, timeout=100, **workers)
    for _ in range(2):
        assert all(all(map(same_bits, *pair)) for pair in zip(loader, expected, strict=True))
    _C.empty_cache()


def forks_have_memory_of_their_own() -> None:
    output(34)
    outputs = {value: output(size, value) for value, size in ((2.0, 34), (5.0, 40), (0.0, 4), (1.0, 4), (3.0, 4))}
    output(50)
    address = outputs[2.0].data_ptr()  # of a block that had been cached
    del outputs[1.0]  # a gap between pieces
    cached = 50 * MIB
    assert _C.cached_bytes() == cached

    def use() -> None:
        torch.set_num_threads(1)
        assert all(is_all(y, value) for value, y in outputs.items())
        del outputs[2.0]
        assert _C.cached_bytes() == cached + 34 * MIB
        again, large, piece = output(34, 3.0), output(50, 4.0), output(8, 7.0)
        assert (again.data_ptr(), _C.cached_bytes()) == (address, 0)
        assert is_all(again, 3.0)
        assert is_all(large, 4.0)
        assert is_all(piece, 7.0)
        assert all(is_all(y, value) for value, y in outputs.items())
        del outputs[0.0], outputs[3.0], again, large, piece
        assert _C.cached_bytes() == (34 + 50) * MIB + POOL_BLOCK
        _C.empty_cache()
        assert is_all(output(34, 6.0), 6.0)
        assert is_all(outputs[5.0], 5.0)

    for fork in (use, lambda: returns_in_a_fork(use) or os._exit(1)):
        assert returns_in_a_fork(fork)
        assert all(is_all(y, value) for value, y in outputs.items())
        assert _C.cached_bytes() == cached
        assert is_all(output(50, 7.0), 7.0)
        assert is_all(output(4, 8.0), 8.0)


@needs_fork
@linux_only
def test_a_fork_has_memory_of_its_own() -> None:
    in_new_process(forks_have_memory_of_their_own)


def forks_while_threads_train() -> None:
    torch.set_num_threads(2)
    inputs = [torch.randn(5, 4, 3), torch.randn(40, 4, 600)]

    def train(x: Tensor) -> list[Tensor]:
        layer, leaf = bnext.BatchNormAct1d(4, act="gelu"), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(x)
        return [y.detach(), leaf.grad, layer.weight.grad, layer.running_var]

    def trains_as_before(i: int) -> bool:
        return all(map(torch.equal, train(inputs[i]), expected[i]))

    expected = [train(x) for x in inputs]
    started, stop = threading.Barrier(3), threading.Event()

    def work(x: Tensor) -> None:
        started.wait()
        while not stop.is_set():
            train(x)

    def use() -> None:
        # bnext computes a small batch in one thread, in a fork too. torch's operators wait for threads, which a fork
        # does not have, unless it sets their number to one.
        assert trains_as_before(0)
        torch.set_num_threads(1)
        assert trains_as_before(1)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    started.wait()
    good = [returns_in_a_fork(use) for _ in range(3)]
    stop.set()
    for thread in threads:
        thread.join()
    assert all(good)
    assert trains_as_before(0)
    assert trains_as_before(1)


@needs_fork
def test_a_fork_while_threads_train() -> None:
    in_new_process(forks_while_threads_train)

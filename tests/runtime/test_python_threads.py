"""Several Python threads at once, with autograd: the bits of one thread, whoever else computes meanwhile.

As with torch, a layer that trains in several threads may lose an update of its running statistics.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import FEW_ACTS, make_grad, make_input, make_residual, name, same_bits
from marks import MODES
from reference import Act
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import bnext
from bnext.functional import batch_norm

WORKERS = 4
JOBS = 3 * WORKERS
# A shape for one of torch's threads, and one that is just large enough for all of them.
SMALL, LARGE = (6, 5, 7, 3), (4, 5, 58, 58)
EACH_SHAPE = pytest.mark.parametrize("shape", [SMALL, LARGE], ids=name)
EACH_ACT = pytest.mark.parametrize(
    ("act", "shape"),
    [*((act, SMALL) for act in (None, *FEW_ACTS)), *((act, LARGE) for act in (None, "relu", "silu"))],
    ids=name,
)


@pytest.fixture(autouse=True)
def _switch_often(set_threads: Callable[[int], None]) -> Iterator[None]:
    """Switch often between Python threads, each of which has two of torch's for large tensors."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    set_threads(2)
    yield
    sys.setswitchinterval(interval)


def in_threads(run: Callable[[int], object], jobs: int = JOBS) -> list[object]:
    """What `run` returns for 0, 1, ..., from several threads that start together."""
    together = threading.Barrier(WORKERS, timeout=60)
    with ThreadPoolExecutor(WORKERS, initializer=together.wait) as pool:
        return list(pool.map(run, range(jobs), timeout=120))


def in_another_thread(run: Callable[[], object]) -> object:
    """What `run` returns in another thread, which has ended by then."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result(60)


def assert_same(got: object, want: object) -> None:
    assert len(got) == len(want) > 0
    assert all(map(same_bits, got, want))


class Data:
    """Inputs and gradients of each job, made beforehand: all threads share one generator of random numbers."""

    def __init__(self, shape: tuple[int, ...], jobs: int = JOBS, has_residual: bool = False) -> None:
        self.inputs = [make_input(shape, ("contiguous", "channels_last")[i % 2]) for i in range(jobs)]
        self.grads = [make_grad(shape) for _ in range(jobs)]
        self.residuals = [make_residual(shape) if has_residual else None for _ in range(jobs)]

    def forward(self, layer: nn.Module, i: int) -> tuple[Tensor, list[Tensor]]:
        """The output, and the leaves that it can be differentiated in."""
        x = self.inputs[i].detach().requires_grad_()
        if self.residuals[i] is None:
            return layer(x), [x, *layer.parameters()]
        residual = self.residuals[i].detach().requires_grad_()
        return layer(x, residual), [x, residual, *layer.parameters()]

    def step(self, layer: nn.Module, i: int) -> list[Tensor]:
        y, leaves = self.forward(layer, i)
        return [y, *torch.autograd.grad(y, leaves, self.grads[i])]


def make_layer(shape: tuple[int, ...], act: Act, training: bool = True) -> nn.Module:
    layer = bnext.BatchNorm2d(shape[1]) if act is None else bnext.BatchNormAct2d(shape[1], act=act)
    nn.init.uniform_(layer.weight, -1, 1)
    nn.init.uniform_(layer.bias, -1, 1)
    return layer.train(training)


@MODES
@EACH_ACT
def test_one_layer_in_many_threads(act: Act, shape: tuple[int, ...], training: bool) -> None:
    data, layer = Data(shape, has_residual=act is not None), make_layer(shape, act, training)
    expected = [data.step(layer, i) for i in range(JOBS)]
    buffers = [b.clone() for b in layer.buffers()]

    def step(i: int) -> list[Tensor]:
        torch.set_num_threads(1 + i % 4)
        return data.step(layer, i)

    for got, want in zip(in_threads(step), expected, strict=True):
        assert_same(got, want)
    if not training:
        assert_same(list(layer.buffers()), buffers)
        return
    # Whichever updates were lost, each statistic is a mean of the one before and of those of the batches.
    flat = torch.stack([x.transpose(0, 1).flatten(1) for x in data.inputs])
    for running, before, batches in (
        (layer.running_mean, buffers[0], flat.mean(-1)),
        (layer.running_var, buffers[1], flat.var(-1)),
    ):
        seen = torch.cat([before[None], batches])
        assert ((running > seen.amin(0) - 1e-4) & (running < seen.amax(0) + 1e-4)).all()
    assert JOBS < int(layer.num_batches_tracked) <= 2 * JOBS


@EACH_SHAPE
def test_parameters_sum_the_gradients_of_all_threads(shape: tuple[int, ...]) -> None:
    # Each thread adds the same, so that the order of the sum does not matter, but a lost term does.
    layer = make_layer(shape, "silu")
    x, g = make_input(shape), make_grad(shape)

    def step(i: int) -> None:
        layer(x).backward(g)

    for i in range(JOBS):
        step(i)
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    in_threads(step)
    assert_same([p.grad for p in layer.parameters()], expected)


@EACH_ACT
def test_forward_in_a_thread_that_has_ended(act: Act, shape: tuple[int, ...]) -> None:
    data, layer = Data(shape, 1, has_residual=act is not None), make_layer(shape, act)
    expected = data.step(layer, 0)
    y, leaves = in_another_thread(lambda: data.forward(layer, 0))
    assert_same([y, *torch.autograd.grad(y, leaves, data.grads[0])], expected)
    y, leaves = data.forward(layer, 0)
    assert_same([y, *in_another_thread(lambda: torch.autograd.grad(y, leaves, data.grads[0]))], expected)


@EACH_SHAPE
@pytest.mark.parametrize("packed", [False, True], ids=["saved", "packed"])
@pytest.mark.parametrize("act", [None, "relu", "silu"], ids=name)
def test_one_graph_backward_in_many_threads(act: Act, packed: bool, shape: tuple[int, ...]) -> None:
    data, layer = Data(shape, 1, has_residual=act is not None), make_layer(shape, act)
    if packed:
        # Unpacking takes the interpreter's lock while the node is locked.
        with saved_tensors_hooks(lambda t: (t.clone(),), lambda pair: pair[0] + 0):
            y, leaves = data.forward(layer, 0)
    else:
        y, leaves = data.forward(layer, 0)

    def gradients(_: int) -> list[Tensor]:
        first = torch.autograd.grad(y, leaves, data.grads[0], create_graph=True)
        return [*first, *torch.autograd.grad(first[0].square().sum(), leaves[0])]

    expected = gradients(0)
    for got in in_threads(gradients):
        assert_same(got, expected)


def test_transforms_in_many_threads() -> None:
    data = [torch.stack([make_input((4, 5, 3)) for _ in range(2)]) for _ in range(JOBS)]

    def run(i: int) -> list[Tensor]:
        return [vmap(grad(lambda x: batch_norm(x, None, None, None, None, True).sin().sum()))(data[i])]

    expected = [run(i) for i in range(JOBS)]
    for got, want in zip(in_threads(run), expected, strict=True):
        assert_same(got, want)


def test_threads_end_while_those_of_autograd_live() -> None:
    # Backward within backward, deeper than autograd goes on one thread: the rest runs on its own threads, which stay.
    depth = 64
    layer = make_layer((4, 5, 3, 3), "silu")
    x, g = make_input((4, 5, 3, 3)), make_grad((4, 5, 3, 3))

    def plain(value: Tensor, levels: int) -> Tensor:
        return layer(plain(value, levels - 1)) if levels else value

    def nested(value: Tensor, levels: int) -> Tensor:
        # torch reads its generator's state holding a lock and the GIL; where a garbage collection runs Python code
        # there, as hypothesis' does, two threads wait for each other for ever.
        options = {"use_reentrant": True, "preserve_rng_state": False}
        return checkpoint(lambda v: layer(nested(v, levels - 1)), value, **options) if levels else value

    def step(chain: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = chain(leaf, depth)
        y.backward(g)
        return [y, leaf.grad]

    expected = step(plain)
    for got in in_threads(lambda _: step(nested), WORKERS):
        assert_same(got, expected)
    assert_same(in_another_thread(lambda: step(nested)), expected)
    assert_same(step(nested), expected)


def test_large_outputs_from_thread_to_thread() -> None:
    # Each thread frees what some other made, while all take blocks of one size. Every job has values of its own: in
    # equal ones a block that two outputs share would not show.
    shape, jobs = (33, 64, 64, 64), 16
    x = make_input((1, *shape[1:])).expand(shape).contiguous()
    layers = [make_layer(shape, "relu") for _ in range(jobs)]

    def step(i: int) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = layers[i](leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, y.detach())]

    def bits(results: list[Tensor]) -> list[int]:
        return [int(t.view(torch.int32).sum()) for t in results]

    expected = [bits(step(i)) for i in range(jobs)]
    assert len({tuple(each) for each in expected}) == jobs
    finished: queue.Queue[tuple[int, list[Tensor]]] = queue.Queue()

    def work(i: int) -> bool:
        finished.put((i, step(i)))
        j, results = finished.get(timeout=60)
        return bits(results) == expected[j]

    assert all(in_threads(work, jobs))
    bnext._C.empty_cache()

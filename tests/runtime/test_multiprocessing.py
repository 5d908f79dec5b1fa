"""bnext in several processes: models whose tensors they share, loaders of data, and what a fork copies."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import sys
from collections.abc import Callable

import pytest
import torch
from cases import make_grad, make_input, same_bits
from marks import FORK_WARNING, linux_only, needs_fork
from test_large_outputs import script
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnext


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
    """Of a plain and of a fused model, whose tensors it shares."""
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
        for (key, a), b in zip(model.state_dict().items(), network.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=key)
        assert int(model[1].num_batches_tracked) == 1


class Normalized(Dataset[list[Tensor]]):
    """Samples that a layer has normalised: small, divided between threads, and with an output of 33 MiB."""

    def __init__(self) -> None:
        self.inputs = [make_input(shape) for shape in ((3, 4, 5, 5), (4, 4, 70, 70), (7, 4, 2, 3))]
        self.inputs.append(make_input((1, 4, 64, 64)).expand(528, 4, 64, 64).contiguous())
        self.grads = [make_grad(tuple(x.shape)) for x in self.inputs]
        self.layer = bnext.BatchNormAct2d(4, act="silu")

    def __len__(self) -> int:
        return 2 * len(self.inputs)

    def __getitem__(self, index: int) -> list[Tensor]:
        self.layer.train(index % 2 == 0)
        x = self.inputs[index // 2].detach().requires_grad_()
        y = self.layer(x)
        gradients = torch.autograd.grad(y, [x, *self.layer.parameters()], self.grads[index // 2])
        # Bits that are quickly sent to another process.
        return [y.detach().view(torch.int32).sum(), gradients[0].view(torch.int32).sum(), *gradients[1:]]


def use_threads_and_keep_blocks(layer: nn.Module, x: Tensor) -> None:
    """So that a process has all that a fork might copy badly."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    layer(x).sum().backward()
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings(FORK_WARNING)
@pytest.mark.parametrize(
    "method", [pytest.param("fork", marks=needs_fork), pytest.param("spawn", marks=pytest.mark.slow)]
)
def test_loader_whose_workers_normalize(method: str) -> None:
    data = Normalized()
    # In evaluation by statistics that training does not change: a worker trains a copy.
    data.layer.momentum = 0.0
    use_threads_and_keep_blocks(data.layer, data.inputs[-1])
    data.layer.zero_grad()
    expected = [data[i] for i in range(len(data))]
    if sys.platform == "linux":
        assert bnext._C.cached_bytes() > 0
    # Two forks might write to one another's memory; that a spawned process imports and computes is seen of one.
    workers = {"num_workers": 2 if method == "fork" else 1, "multiprocessing_context": method}
    loader = DataLoader(data, batch_size=None, timeout=100, persistent_workers=True, **workers)
    for _ in range(2):
        assert all(all(map(same_bits, *pair)) for pair in zip(loader, expected, strict=True))
    bnext._C.empty_cache()


CHILD = """
    import sys
    def child(run):
        "Whether it returns in a fork of this process, which then ends as processes do."
        pid = os.fork()
        if pid:
            return os.waitpid(pid, 0)[1] == 0
        signal.alarm(60)
        run()
        sys.exit()
    """


def forking(code: str) -> str:
    return script(f"{inspect.cleandoc(CHILD)}\n{inspect.cleandoc(code)}")


@needs_fork
@linux_only
def test_fork_frees_what_is_its_parents(check_script: Callable[..., None]) -> None:
    code = """
    output(34)
    y, other = output(34, 2.0), output(40, 5.0)  # the first in memory that was kept
    output(50)
    address = y.data_ptr()
    assert _C.cached_bytes() == 50 * MIB

    def run():
        global y
        torch.set_num_threads(1)
        assert is_all(y, 2.0) and _C.cached_bytes() == 50 * MIB
        del y
        assert _C.cached_bytes() == 84 * MIB
        again, large = output(34, 3.0), output(50, 4.0)
        assert (again.data_ptr(), _C.cached_bytes()) == (address, 0)
        assert is_all(again, 3.0) and is_all(large, 4.0) and is_all(other, 5.0)
        del again, large
        _C.empty_cache()
        assert is_all(output(34, 6.0), 6.0) and is_all(other, 5.0)

    for fork in (run, lambda: child(run) or os._exit(1)):
        assert child(fork)
        assert is_all(y, 2.0) and is_all(other, 5.0) and _C.cached_bytes() == 50 * MIB
        assert is_all(output(50, 7.0), 7.0)
    print("done")
    """
    check_script(forking(code), "-W", FORK_WARNING)


@needs_fork
def test_fork_while_threads_train(check_script: Callable[..., None]) -> None:
    # A small batch is one thread's work, in a child too; torch's own operators wait for threads that are not there if
    # the child does not say that it has one.
    code = """
    import bnext
    torch.set_num_threads(2)
    inputs = [torch.randn(5, 4, 3), torch.randn(40, 4, 600)]

    def step(x):
        layer, leaf = bnext.BatchNormAct1d(4, act="gelu"), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(x)
        return [y.detach(), leaf.grad, layer.weight.grad, layer.running_var]

    def same(a, b):
        return all(map(torch.equal, a, b))

    expected = [step(x) for x in inputs]
    started, stop = threading.Barrier(3), threading.Event()

    def work(x):
        started.wait()
        while not stop.is_set():
            step(x)

    def run():
        assert same(step(inputs[0]), expected[0])
        torch.set_num_threads(1)
        assert same(step(inputs[1]), expected[1])

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    started.wait()
    good = [child(run) for _ in range(3)]
    stop.set()
    for thread in threads:
        thread.join()
    assert all(good)
    assert all(same(step(x), e) for x, e in zip(inputs, expected))
    print("done")
    """
    check_script(forking(code), "-W", FORK_WARNING)

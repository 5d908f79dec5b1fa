"""The calls of test_leaks.py, each made over and over in a process that does nothing else.

A function whose name is in CALLS of test_leaks.py makes what its calls need, and returns the calls. What they leave
behind is measured, and whether all that they use goes with them.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import mmap
import pickle
import threading
from collections.abc import Callable

import networks
import torch
from cases import FEW_ACTS, make_input, make_parameters, make_residual
from leaks import Step, Usage, growth, lasting_growth, still_alive
from marks import FLAGS
from processes import World
from torch import Tensor, distributed, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import bnext
from bnext import _C
from bnext.functional import batch_norm, batch_norm_act

ops = torch.ops.bnext
SHAPE = (3, 4, 2, 2)
EPS = 1e-5


def leaf(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return make_input(shape or SHAPE, layout, dtype).detach().requires_grad_()


def backward(output: Tensor) -> None:
    output.sum().backward()


def both_ways(layer: nn.Module, *inputs: Tensor | None) -> Step:
    return lambda: backward(layer(*inputs))


def layers() -> list[Step]:
    frozen, x = bnext.BatchNorm2d(4).eval(), leaf()

    def without_gradients(mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        with mode():
            frozen(x)

    return [
        both_ways(bnext.BatchNorm1d(4), leaf(5, 4)),
        both_ways(bnext.BatchNorm1d(4, affine=False), leaf(3, 4, 5)),
        both_ways(bnext.BatchNorm2d(4), leaf()),
        both_ways(bnext.BatchNorm2d(4, momentum=None), leaf(layout="channels_last")),
        both_ways(bnext.BatchNorm2d(4, track_running_stats=False), leaf(layout="sliced")),
        both_ways(bnext.BatchNorm2d(4), leaf(dtype=torch.bfloat16)),
        both_ways(bnext.BatchNorm3d(4), leaf(2, 4, 2, 2, 2, layout="channels_last_3d")),
        both_ways(frozen, x),
        both_ways(frozen, leaf(layout="channels_last")),
        lambda: without_gradients(torch.no_grad),
        lambda: without_gradients(torch.inference_mode),
    ]


def activations() -> list[Step]:
    return [
        both_ways(bnext.BatchNormAct2d(4, act=act).train(mode), leaf(), residual)
        for act, residual, mode in itertools.product(FEW_ACTS, (None, leaf()), FLAGS)
    ]


def synchronized() -> list[Step]:
    """The layer, which has no collective in a group of one process, and the operator, which has them all the same."""
    x, residual, p = leaf(), make_residual(SHAPE), make_parameters(4)
    group = (1, distributed.group.WORLD.group_name)
    p.weight.requires_grad_()

    def twice() -> None:
        y = ops.batch_norm_sync(x, None, None, None, None, None, 0.1, EPS, *group)
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        backward(g)

    return [
        both_ways(bnext.SyncBatchNorm(4, act="relu"), x),
        lambda: backward(ops.batch_norm_sync(x, *p, None, 0.1, EPS, *group, residual, "silu")),
        twice,
    ]


def raises(call: Callable[[], object]) -> None:
    try:
        call()
    except (RuntimeError, TypeError, ValueError):
        return
    raise AssertionError("expected an error")


def errors() -> list[Step]:
    x, p = leaf(), make_parameters(4)
    three, meta = torch.ones(3), torch.ones(4, device="meta")
    layer, fused = bnext.BatchNorm2d(4), bnext.BatchNormAct2d(4)
    flat, other = make_input((3, 4)), make_residual((3, 4, 2, 1))

    def changed_in_place() -> None:
        twin = x.detach() * 2
        y = layer(twin)
        twin.add_(1)
        backward(y)

    def backward_twice() -> None:
        y = layer(x)
        backward(y)
        backward(y)

    wrong: list[Step] = [
        lambda: batch_norm(x, None, None, three, None, True),
        lambda: batch_norm(x, p.running_mean, p.running_var, meta),
        lambda: batch_norm(x, p.running_mean.double(), p.running_var, None, None, True),
        lambda: batch_norm(x, p.running_mean, None),
        lambda: batch_norm(x[:1, :, :1, :1], None, None, None, None, True),
        lambda: batch_norm(x, p.weight.requires_grad_(), p.running_var, None, None, True),
        lambda: batch_norm_act(x, None, None, None, None, other, True),
        lambda: batch_norm_act(x, None, None, None, None, None, True, act="tanh"),
        lambda: layer(flat),
        lambda: fused(x, "residual"),
        lambda: bnext.BatchNormAct2d(4, act=("leaky_relu", "steep")),
        lambda: ops.batch_norm_stats(flat.int(), EPS),
        lambda: bnext.convert("model"),
        changed_in_place,
        backward_twice,
    ]
    return [lambda call=call: raises(call) for call in wrong]


def dropped_graphs() -> list[Step]:
    """Graphs without a backward pass."""
    layer, fused = bnext.BatchNorm2d(4), bnext.BatchNormAct2d(4, act="gelu")
    x, residual = leaf(), leaf()

    def deep() -> None:
        y = x
        for _ in range(5):
            y = layer(fused(y, y))

    def held_by_a_cycle() -> None:
        y = layer(x)
        y.itself = y

    return [
        lambda: layer(x),
        lambda: fused(x, residual),
        lambda: torch.autograd.grad(fused(x, residual).sum(), x, create_graph=True),
        deep,
        held_by_a_cycle,
    ]


def saved_tensors() -> list[Step]:
    """Saved tensors that hooks pack and unpack."""
    layer, x, residual = bnext.BatchNormAct2d(4, act="silu"), leaf(), leaf()

    def packed() -> Tensor:
        with saved_tensors_hooks(lambda t: (t.clone(), "packed"), lambda pair: pair[0]):
            return layer(x, residual)

    return [packed, lambda: backward(packed())]


def double_backward() -> list[Step]:
    x, weight, residual = leaf(), torch.ones(4, requires_grad=True), leaf()
    running = make_parameters(4)[2:]

    def step(y: Tensor, *inputs: Tensor) -> None:
        grads = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        backward(grads[0].sum() * grads[1].sum() + grads[0] * grads[0])

    return [
        lambda: step(batch_norm(x, *running, weight, None, True), x, weight),
        lambda: step(batch_norm(x, *running, weight, None, False), x, weight),
        lambda: step(batch_norm_act(x, *running, weight, None, residual, True, act="relu"), x, residual),
        lambda: step(batch_norm_act(x, *running, weight, None, residual, True, act="gelu"), x, residual),
    ]


def transforms() -> list[Step]:
    x, xs = make_input(SHAPE), torch.stack([make_input(SHAPE)] * 2)
    running = make_parameters(4)[2:]

    def train(t: Tensor) -> Tensor:
        return batch_norm(t, None, None, None, None, True)

    def frozen(t: Tensor) -> Tensor:
        return batch_norm_act(t, *running, act="silu")

    def scalar(t: Tensor) -> Tensor:
        return train(t).sin().sum()

    return [
        lambda: vmap(grad(scalar))(xs),
        lambda: vmap(frozen)(xs),
        lambda: grad(scalar)(x),
        lambda: vjp(frozen, x)[1](x),
        lambda: jvp(train, (x,), (x,)),
        lambda: jvp(frozen, (x,), (x,)),
        lambda: jacrev(lambda t: frozen(t)[0, :2, 0, 0])(x),
        lambda: jacfwd(lambda s: train(x * s)[0, :2, 0, 0])(x[:1, :1, :1, :1]),
    ]


def conversions() -> list[Step]:
    """Models are converted and reverted."""
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))

    def lazy() -> None:
        layer = bnext.LazyBatchNorm2d()
        layer(make_input(SHAPE))
        bnext.revert(layer)

    return [
        lambda: bnext.revert(bnext.convert(model)),
        lambda: bnext.revert(bnext.convert(model, fuse=True)),
        lambda: bnext.revert(bnext.convert(model, sync=True, fuse=True)),
        lazy,
    ]


def traced_conversions() -> list[Step]:
    """One model is fused over and over; new models are fused and dropped."""
    model = networks.Basic()
    return [lambda: bnext.revert(bnext.convert(model, fuse=True)), lambda: bnext.convert(networks.Basic(), fuse=True)]


def copies() -> list[Step]:
    layer, fused = bnext.BatchNormAct2d(4, act="gelu"), bnext.convert(networks.Basic(), fuse=True)
    return [
        lambda: copy.deepcopy(layer),
        lambda: copy.deepcopy(fused),
        lambda: pickle.loads(pickle.dumps(layer)),
        lambda: pickle.loads(pickle.dumps(fused)),
        lambda: bnext.BatchNormAct2d(4).load_state_dict(layer.state_dict()),
    ]


def threads() -> list[Step]:
    """A thread makes a step with a small tensor and one with a tensor that torch divides between threads, and ends."""
    layer, inputs = bnext.BatchNorm2d(4), (leaf(), leaf(4, 4, 70, 70))

    def work() -> None:
        torch.set_num_threads(2)
        for x in inputs:
            torch.autograd.grad(layer(x).sum(), x)

    def step() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    return [step]


def recomputed() -> list[Step]:
    """Outputs that are recomputed for all users, for some or for none; within hooks; in a scope that an error ends."""
    layer, conv, x = bnext.BatchNormAct2d(4, act="silu"), nn.Conv2d(4, 4, 1), leaf()

    def forward() -> Tensor:
        with bnext.recompute():
            h = layer(x, x)
            return conv(layer(h, x)) + h.square() + h.sigmoid()

    def within_hooks() -> None:
        with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            backward(forward())

    def error() -> None:
        with bnext.recompute():
            y = conv(layer(x))
            raises(lambda: layer(y[0]))

    return [
        lambda: backward(forward()),
        forward,
        lambda: torch.autograd.grad(forward().sum(), conv.weight),
        within_hooks,
        error,
    ]


_hoard: list[object] = []


def hoards() -> list[Step]:
    """Leaks of malloc's memory, of mapped pages, of objects with and without references to others, and of a graph."""
    x, layer, libc = leaf(), bnext.BatchNorm2d(4), ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def leak() -> None:
        ctypes.memset(libc.malloc(100), 1, 100)
        _hoard.extend((object(), [], mmap.mmap(-1, 4096), layer(x).grad_fn))

    return [leak]


def live_tensors() -> list[Tensor]:
    # isinstance() reads __class__, at which torch's deprecated objects warn.
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def leave_behind(
    world: World, *, calls_of: str, calls: int, warm_up: int | None = None
) -> tuple[Usage, list[tuple[int, ...]]]:
    """The memory that `calls` calls leave behind, and the shapes of the tensors that outlive them."""
    gc.collect()
    before = set(map(id, live_tensors()))
    threads = torch.get_num_threads()
    steps = globals()[calls_of]()
    left = lasting_growth(steps, calls, warm_up)
    torch.set_num_threads(threads)
    alive = still_alive(t for t in live_tensors() if id(t) not in before)
    del steps
    return left, alive()


def large_outputs(calls: int) -> tuple[Usage, int]:
    """What `calls` calls leave behind beside cached memory, and the most bytes that were cached."""
    layers = bnext.BatchNorm2d(64), bnext.BatchNorm2d(64).eval(), bnext.BatchNormAct2d(64, act="silu").eval()
    cached = 0

    def step(layer: nn.Module, mebibytes: int) -> None:
        nonlocal cached
        x = torch.zeros(mebibytes, 64, 64, 64, requires_grad=layer.training)
        y = layer(x)
        if layer.training:
            y.backward(y.detach())
        del x, y
        cached = max(cached, _C.cached_bytes())

    steps = [
        lambda layer=layer, size=size: step(layer, size)
        for layer, size in zip(itertools.cycle(layers), (34, 52, 36, 42, 34, 66, 40), strict=False)
    ]
    return growth(steps, calls, settle=_C.empty_cache), cached

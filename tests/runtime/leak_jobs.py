"""The calls of test_leaks.py, each made over and over in a process that does nothing else.

A function here makes what its calls need and returns them: what they leave behind is measured, and then whether all
that they were made of goes when they go.
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
from cases import FEW_ACTS, RECTIFIERS, make_grad, make_input, make_parameters, make_residual
from leaks import Step, Usage, Watch, growth, lasting_growth
from processes import World
from reference import named
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import bnext
from bnext import _C
from bnext.functional import batch_norm, batch_norm_act

ops = torch.ops.bnext
SHAPE = (3, 4, 2, 2)
EPS = 1e-5


def leaf(*shape: int, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return make_input(shape, layout, dtype).detach().requires_grad_()


def backward(output: Tensor) -> None:
    output.sum().backward()


def training() -> list[Step]:
    def step(layer: nn.Module, x: Tensor) -> Step:
        return lambda: backward(layer(x))

    return [
        step(bnext.BatchNorm1d(4), leaf(5, 4)),
        step(bnext.BatchNorm1d(4, affine=False), leaf(3, 4, 5)),
        step(bnext.BatchNorm2d(4), leaf(*SHAPE)),
        step(bnext.BatchNorm2d(4, momentum=None), leaf(*SHAPE, layout="channels_last")),
        step(bnext.BatchNorm2d(4, track_running_stats=False), leaf(*SHAPE, layout="sliced")),
        step(bnext.BatchNorm2d(4), leaf(*SHAPE, dtype=torch.bfloat16)),
        step(bnext.BatchNorm3d(4), leaf(2, 4, 2, 2, 2, layout="channels_last_3d")),
    ]


def evaluation() -> list[Step]:
    layer = bnext.BatchNorm2d(4).eval()
    x, channels_last = leaf(*SHAPE), leaf(*SHAPE, layout="channels_last")

    def without(mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        with mode():
            layer(x)

    return [
        lambda: without(torch.no_grad),
        lambda: without(torch.inference_mode),
        lambda: backward(layer(x)),
        lambda: backward(layer(channels_last)),
    ]


def activations() -> list[Step]:
    def step(layer: nn.Module, x: Tensor, residual: Tensor | None) -> Step:
        return lambda: backward(layer(x, residual))

    return [
        step(bnext.BatchNormAct2d(4, act=act).train(mode), leaf(*SHAPE), residual)
        for act in FEW_ACTS
        for residual in (None, make_residual(SHAPE).requires_grad_())
        for mode in (True, False)
    ]


def operators() -> list[Step]:
    """Themselves, below autograd."""
    x, g, r = make_input(SHAPE), make_grad(SHAPE), make_residual(SHAPE)
    p, counter = make_parameters(4), torch.tensor(0)
    running = (p.running_mean, p.running_var)

    def train_and_back() -> None:
        for act in FEW_ACTS:
            name, slope = named(act)
            rectifies = name in RECTIFIERS
            _, save_stats, mask = ops.batch_norm_train(
                x, p.weight, p.bias, *running, counter, 0.1, EPS, r, name, slope, rectifies
            )
            again = (None, None, mask) if rectifies else (p.bias, r, None)
            output_mask = [True, True, True, name != "identity"]
            ops.batch_norm_backward(g, x, p.weight, save_stats, True, EPS, output_mask, *again, name, slope)

    return [
        train_and_back,
        lambda: ops.batch_norm_eval(x, p.weight, p.bias, *running, EPS, r, "gelu"),
        lambda: ops.batch_norm_gathered(
            x, torch.stack([ops.batch_norm_stats(x, EPS)] * 3), p.weight, p.bias, *running, counter, 0.1, EPS
        ),
    ]


def synchronized() -> list[Step]:
    """A layer with nobody to share its batch with, and the operator, whose collectives run all the same."""
    layer, x = bnext.SyncBatchNorm(4, act="relu"), leaf(*SHAPE)
    p, residual = make_parameters(4), make_residual(SHAPE)
    group = (1, distributed.group.WORLD.group_name)
    p.weight.requires_grad_()

    def operator() -> None:
        vectors = (p.weight, p.bias, p.running_mean, p.running_var, None)
        backward(ops.batch_norm_sync(x, *vectors, 0.1, EPS, *group, residual, "silu"))

    def twice() -> None:
        y = ops.batch_norm_sync(x, None, None, None, None, None, 0.1, EPS, *group)
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        backward(g)

    return [lambda: backward(layer(x)), operator, twice]


def raises(call: Callable[[], object]) -> None:
    try:
        call()
    except (RuntimeError, TypeError, ValueError):
        return
    raise AssertionError("expected an error")


def errors() -> list[Step]:
    x, p = leaf(*SHAPE), make_parameters(4)
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
    """Made, and never gone backward through."""
    layer, x = bnext.BatchNorm2d(4), leaf(*SHAPE)
    fused, residual = bnext.BatchNormAct2d(4, act="gelu"), leaf(*SHAPE)

    def of_a_gradient() -> None:
        torch.autograd.grad(fused(x, residual).sum(), x, create_graph=True)

    def deep() -> None:
        y = x
        for _ in range(5):
            y = layer(fused(y, y))

    def held_by_a_cycle() -> None:
        y = layer(x)
        y.itself = y

    return [lambda: layer(x), lambda: fused(x, residual), of_a_gradient, deep, held_by_a_cycle]


def saved_tensors() -> list[Step]:
    """Packed and unpacked by hooks."""
    layer, x, residual = bnext.BatchNormAct2d(4, act="silu"), leaf(*SHAPE), leaf(*SHAPE)

    def packed(goes_back: bool) -> None:
        with saved_tensors_hooks(lambda t: (t.clone(), "packed"), lambda pair: pair[0]):
            y = layer(x, residual)
        if goes_back:
            backward(y)

    return [lambda: packed(True), lambda: packed(False)]


def double_backward() -> list[Step]:
    x, weight, residual = leaf(*SHAPE), torch.ones(4, requires_grad=True), leaf(*SHAPE)
    running = make_parameters(4)[2:]

    def plain(training: bool) -> None:
        y = batch_norm(x, *running, weight, None, training)
        grads = torch.autograd.grad(y.sin().sum(), [x, weight], create_graph=True)
        backward(grads[0] * grads[0] + grads[1].sum())

    def fused(act: str) -> None:
        y = batch_norm_act(x, *running, weight, None, residual, True, act=act)
        grads = torch.autograd.grad(y.sin().sum(), [x, residual], create_graph=True)
        backward(grads[0] * grads[1])

    return [lambda: plain(True), lambda: plain(False), lambda: fused("relu"), lambda: fused("gelu")]


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
        lambda: jacrev(lambda t: frozen(t)[0, :2, 0, 0])(x),
        lambda: jacfwd(lambda s: train(x * s)[0, :2, 0, 0])(x[:1, :1, :1, :1]),
    ]


def forward_mode() -> list[Step]:
    x, tangent, residual = make_input(SHAPE), make_grad(SHAPE), make_residual(SHAPE)
    layer, fused = bnext.BatchNorm2d(4), bnext.BatchNormAct2d(4, act="hardswish").eval()

    def step(run: Callable[[Tensor], Tensor]) -> None:
        with forward_ad.dual_level():
            forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent)))

    return [lambda: step(layer), lambda: step(lambda t: fused(t, residual))]


def conversions() -> list[Step]:
    """There and back."""
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
    """Of one model over and over, and of models that go."""
    model = networks.Basic()
    return [lambda: bnext.revert(bnext.convert(model, fuse=True)), lambda: bnext.convert(networks.Basic(), fuse=True)]


def copies() -> list[Step]:
    layer, fused = bnext.BatchNormAct2d(4, act="gelu"), bnext.convert(networks.Basic(), fuse=True)

    def load() -> None:
        bnext.BatchNormAct2d(4).load_state_dict(layer.state_dict())

    return [
        lambda: copy.deepcopy(layer),
        lambda: copy.deepcopy(fused),
        lambda: pickle.loads(pickle.dumps(layer)),
        lambda: pickle.loads(pickle.dumps(fused)),
        load,
    ]


def threads() -> list[Step]:
    """Each ends after a step or two, of small tensors and of some that torch divides between threads of its own."""
    layer, x, large = bnext.BatchNorm2d(4), leaf(*SHAPE), leaf(4, 4, 70, 70)

    def work() -> None:
        torch.set_num_threads(2)
        for each in (x, large):
            torch.autograd.grad(layer(each).sum(), each)

    def step() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    return [step]


def recomputed() -> list[Step]:
    """With users that ask and users that do not, with hooks around, and left by an error."""
    layer, conv, x = bnext.BatchNormAct2d(4, act="silu"), nn.Conv2d(4, 4, 1), leaf(*SHAPE)

    def forward() -> Tensor:
        with bnext.recompute():
            h = layer(x, x)
            return conv(layer(h, x)) + h.square() + h.sigmoid()

    def part() -> None:
        torch.autograd.grad(forward().sum(), conv.weight)

    def within_hooks() -> None:
        with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            backward(forward())

    def error() -> None:
        with bnext.recompute():
            y = conv(layer(x))
            raises(lambda: layer(y[0]))

    return [lambda: backward(forward()), forward, part, within_hooks, error]


def live_tensors() -> list[Tensor]:
    # isinstance() would ask an object that lies about its class, and torch's deprecated ones warn of that.
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]


def leave_behind(
    world: World, *, calls_of: str, calls: int, warm_up: int | None = None
) -> tuple[Usage, list[tuple[int, ...]]]:
    """The memory that so many calls leave behind, and the shapes of the tensors that outlive them."""
    gc.collect()
    before = set(map(id, live_tensors()))
    threads = torch.get_num_threads()
    steps = globals()[calls_of]()
    left = lasting_growth(steps, calls, warm_up)
    torch.set_num_threads(threads)
    watch = Watch(t for t in live_tensors() if id(t) not in before)
    del steps
    return left, watch.alive()


def large_outputs(calls: int) -> tuple[Usage, int]:
    """What they leave behind beside what is kept, and how much that was at most."""
    most = 0

    def step(layer: nn.Module, mebibytes: int) -> None:
        nonlocal most
        x = torch.zeros(mebibytes, 64, 64, 64, requires_grad=layer.training)
        y = layer(x)
        if layer.training:
            y.backward(y.detach())
        del x, y
        most = max(most, _C.cached_bytes())

    layers = bnext.BatchNorm2d(64), bnext.BatchNorm2d(64).eval(), bnext.BatchNormAct2d(64, act="silu").eval()
    steps = [
        lambda layer=layer, size=size: step(layer, size)
        for layer, size in zip(itertools.cycle(layers), (34, 52, 36, 42, 34, 66, 40), strict=False)
    ]
    return growth(steps, calls, settle=_C.empty_cache), most


_hoard: list[object] = []


def hoards(world: World, *, calls: int) -> tuple[Usage, list[tuple[int, ...]]]:
    """What leaks look like: of malloc's memory and of mapped pages, of objects that the collector knows and of others,
    of a graph."""
    x, layer, libc = leaf(*SHAPE), bnext.BatchNorm2d(4), ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    watch = Watch([x])

    def leak(x: Tensor = x) -> None:
        ctypes.memset(libc.malloc(100), 1, 100)
        _hoard.extend((object(), [], mmap.mmap(-1, 4096), layer(x).grad_fn))

    left = lasting_growth([leak], calls)
    del x, leak
    alive = watch.alive()
    _hoard.clear()
    return left, alive

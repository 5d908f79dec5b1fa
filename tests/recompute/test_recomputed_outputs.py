"""Outputs that backward recomputes: which are not kept, when they are recomputed, and that results stay the same."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import make_grad, make_input, same_bits
from recomputing import (
    FEATURES,
    SHAPE,
    Net,
    Scenario,
    Scope,
    assert_same,
    gradients,
    held_bytes,
    leaves,
    outcomes,
    storage_of,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import bnext

# The bytes of both batch norms' weights and biases in float32, each once or twice, and statistics in float64.
VECTORS = 2 * 4 * (4 * 4 + 2 * 8)


@pytest.mark.parametrize("around", [False, True], ids=["alone", "in other hooks"])
def test_each_activation_is_held_once(around: bool) -> None:
    def step(scope: Scope) -> Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: t) if around else torch.enable_grad(), scope():
            return net(x)

    net, x = Net(), make_input(SHAPE)
    inputs = 2 * 4 * torch.Size(FEATURES).numel()  # the bytes of both batch norms' inputs in float32
    held, less = held_bytes(lambda: step(torch.enable_grad)), held_bytes(lambda: step(bnext.recompute))
    assert 2 * inputs <= held <= 2 * inputs + VECTORS
    assert inputs <= less <= inputs + VECTORS


def forward_and_back(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        y = net(x)
    return [y, *gradients(y, leaves(net, x))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_the_same_bits(dtype: torch.dtype) -> None:
    assert_same(forward_and_back, count=2, dtype=dtype)


def test_layers_without_parameters() -> None:
    assert_same(forward_and_back, count=2, make=functools.partial(Net, affine=False))


def frozen(names: str, training: bool) -> Callable[[], Net]:
    """Makes a network in which the parameters whose names contain one of `names` do not require gradients."""

    def make() -> Net:
        net = Net().train(training)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not any(each in name for each in names.split()))
        return net

    return make


# In evaluation with frozen parameters a rectifier keeps a mask, and has no input from which to recompute its output.
@pytest.mark.parametrize(
    ("names", "training", "count"),
    [
        ("features.1 features.3", True, 2),
        ("bias", True, 2),
        ("", False, 2),
        ("features.1 features.3", False, 1),
    ],
)
def test_frozen_parameters_and_evaluation(names: str, training: bool, count: int) -> None:
    assert_same(forward_and_back, count, make=frozen(names, training))


# Functions of an output, and whether the output is kept nevertheless.
CONSUMERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "a convolution": (F.conv2d, False),
    "of some channels": (lambda h, w: F.conv2d(h[:, 1:3], w[:, :2]), False),
    "of some images": (lambda h, w: F.conv2d(h[1:], w), False),
    "transposed": (lambda h, w: F.conv2d(h.mT, w), False),
    "a linear layer": (lambda h, w: F.linear(h.flatten(1), w.new_ones(3, 144) * w.sum()), False),
    "a pooling": (lambda h, w: F.max_pool2d(h, 2), False),
    "a gate": (lambda h, w: F.conv2d(h.mean((2, 3), keepdim=True), w[:, :, :1, :1]).sigmoid() * h, False),
    "its square": (lambda h, w: h * h, False),
    "windows": (lambda h, w: h.unfold(2, 2, 1).square(), False),
    "repeated": (lambda h, w: h.expand(2, *FEATURES).square(), False),
    "a diagonal": (lambda h, w: h.diagonal(1, 2, 3).square(), False),
    "a view without gradient": (lambda h, w: view_without_gradient(h) * w.sum(), False),
    "there and back by complex numbers": (
        lambda h, w: torch.view_as_real(torch.view_as_complex(h.unflatten(3, (3, 2)))).square(), False,
    ),
    "complex numbers": (lambda h, w: torch.view_as_complex(h.unflatten(3, (3, 2))).pow(2).abs(), True),
    "conjugates": (lambda h, w: torch.view_as_complex(h.unflatten(3, (3, 2))).conj().imag.square(), True),
    "integers": (lambda h, w: h.detach().view(torch.int32).remainder(2) * w.sum(), False),
    "detached": (lambda h, w: h.detach() * w.sum(), True),
    "negated lazily": (lambda h, w: torch._neg_view(h).square(), True),
    "nothing that is saved": (lambda h, w: h + w.sum(), False),
}  # fmt: skip


def view_without_gradient(h: Tensor) -> Tensor:
    with torch.no_grad():
        return h[:, ::2]


@pytest.mark.parametrize("use", CONSUMERS)
def test_which_uses_keep_an_output(use: str) -> None:
    consume, is_kept = CONSUMERS[use]
    kept = []  # without recompute and with it

    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        with scope():
            h = net.features(x)
            storage, y = storage_of(h), consume(h, net.last.weight)
            del h
        kept.append(not storage.expired())
        return [y, *gradients(y, leaves(net, x))]

    assert_same(scenario)
    assert kept[1] == is_kept


def twice_inside(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        return second_derivatives(net(x), net, x)


def twice_outside(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        y = net(x)
    return second_derivatives(y, net, x)


def second_derivatives(y: Tensor, net: Net, x: Tensor) -> list[Tensor]:
    first = gradients(y, leaves(net, x), create_graph=True)
    return [*first, *gradients(sum(g.sin().sum() for g in first), leaves(net, x))]


def batched(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        y = net(x)
    several = torch.autograd.grad(y, leaves(net, x), make_grad((3, *y.shape)), is_grads_batched=True, retain_graph=True)
    return [*several, *gradients(y, leaves(net, x))]


def forward_mode(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope(), forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, make_grad(SHAPE))))
        return [y, tangent, *gradients(y.exp() + tangent.square(), leaves(net, x))]


def two_forwards(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        first, second = net(x), net(x.sin())
    return [*gradients(first, leaves(net, x)), *gradients(second, leaves(net, x))]


def accumulated(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    for scale in (1, 2):
        with scope():
            y = net(x * scale)
        y.square().sum().backward()
    return [t.grad for t in leaves(net, x)]


def nested(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        with scope():
            h = net.features[:2](x)
        y = net.last(net.features[2:](h))
    return gradients(y, leaves(net, x))


def after_an_exception(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with contextlib.suppress(ValueError), scope():
        net.features(x)
        net.features[1](x[0])
    return forward_and_back(net, x, scope)


def without_gradients(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        with torch.no_grad():
            first = net(x)
        with torch.inference_mode():
            second = net(x).clone()
        y = net(x)
    return [first, second, *gradients(y, leaves(net, x))]


def in_autocast(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope(), torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    return [y, *gradients(y, leaves(net, x))]


def in_another_thread(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    with scope():
        loss = net(x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return [t.grad for t in leaves(net, x)]


def with_hooks(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
    for layer in (net.features[1], net.features[3]):
        layer.register_forward_hook(lambda layer, args, output: output * 1.5)
        layer.register_full_backward_hook(lambda layer, grads, above: (grads[0] * 2,))
    return forward_and_back(net, x, scope)


@pytest.mark.parametrize(
    ("scenario", "count"),
    [
        *((scenario, 4) for scenario in (batched, two_forwards, accumulated)),
        *((scenario, 2) for scenario in (nested, after_an_exception, without_gradients)),
        *((s, None) for s in (twice_inside, twice_outside, forward_mode, in_autocast, in_another_thread, with_hooks)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ways_to_go_forward_and_back(scenario: Scenario, count: int | None) -> None:
    assert_same(scenario, count)


# Writes to an output before a convolution saves it.
WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda h: h.detach().mul_(2),
    "a part": lambda h: h.detach()[:, 1:].zero_(),
    "shape": lambda h: torch.no_grad()(h.transpose_)(2, 3),
    "data": lambda h: setattr(h, "data", h.data * 2),
    "data of another layout": lambda h: setattr(h, "data", h.detach().mT),
    "data within a larger one": lambda h: setattr(h, "data", torch.cat([h.detach() + 1] * 2)[1:3]),
}


@pytest.mark.parametrize("view", [False, True], ids=["itself", "a view from before"])
@pytest.mark.parametrize("write", WRITES)
def test_an_output_that_is_written_to_before_it_is_saved(write: str, view: bool) -> None:
    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        with scope():
            h = net.features(x)
            before = h[:, :, 1:]
            WRITES[write](h)
            y = net.last(before if view else h)
        return [y, *gradients(y, net.last.parameters())]

    assert_same(scenario)


def test_an_output_that_is_written_to_after_it_was_saved_does_not_matter() -> None:
    def scenario(net: Net, x: Tensor, scope: Scope, writes: bool) -> list[Tensor]:
        with scope():
            h = net.features(x)
            y = net.last(h)
        if writes:
            h.detach().mul_(2)
        return gradients(y, leaves(net, x))

    _, written = outcomes(lambda net, x, scope: scenario(net, x, bnext.recompute, True))
    _, expected = outcomes(lambda net, x, scope: scenario(net, x, scope, False))
    assert all(map(same_bits, written, expected))


@pytest.mark.parametrize("changed", ["input", "residual"])
def test_a_source_that_is_written_to_afterwards_is_torchs_error(changed: str) -> None:
    net = Net()
    sources = {"input": net.features[:3](make_input(SHAPE)), "residual": make_input(FEATURES)}
    residual = sources["residual"]
    with bnext.recompute():
        holder = residual * net.last.weight.sum()  # saves the residual, so that the output is recomputed from it
        y = net.last(net.features[3](sources["input"], residual))
    sources[changed].detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, [net.last.weight])
    del holder


def test_parameters_may_be_changed_before_the_gradient_of_a_user() -> None:
    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        with scope():
            y = net(x)
        with torch.no_grad():
            for layer in (net.features[1], net.features[3]):
                layer.weight.mul_(2)
                layer.bias.add_(1)
                layer.running_mean.add_(1)
        return gradients(y, net.last.parameters())

    assert_same(scenario, count=1)


def test_a_user_may_outlive_the_backward_of_the_output() -> None:
    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        with scope():
            h = net.features(x)
            first, second = net.last(h), net.last(h.mT)
        return [*gradients(first, leaves(net, x)), *gradients(second, net.last.parameters())]

    assert_same(scenario, count=3)


def test_recompute_is_for_the_thread_that_enters_it() -> None:
    net, x = Net(), make_input(SHAPE)

    def keeps(scope: bool) -> bool:
        with bnext.recompute() if scope else torch.enable_grad():
            h = net.features(x)
            storage, y = storage_of(h), net.last(h)
            del h
        return not storage.expired() and y is not None

    with bnext.recompute(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(keeps, False).result()
        other = bnext.recompute()
        pool.submit(other.__enter__).result()
        assert not keeps(False)
        pool.submit(other.__exit__, None, None, None).result()
    assert keeps(False)
    assert not keeps(True)


def test_two_threads_at_once_do_not_affect_each_other() -> None:
    pools = ThreadPoolExecutor(1), ThreadPoolExecutor(2)

    def steps(number: int) -> list[Tensor]:
        found = []
        for _ in range(20):
            with bnext.recompute():
                loss = nets[number](images[number]).square().sum()
            found += torch.autograd.grad(loss, nets[number].parameters())
        return found

    nets, images = [Net().eval(), Net().eval()], [make_input(SHAPE), make_input(SHAPE)]
    alone, together = ([g for found in pool.map(steps, (0, 1)) for g in found] for pool in pools)
    assert all(map(same_bits, together, alone))

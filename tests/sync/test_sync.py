"""SyncBatchNorm in several real processes, over gloo and loopback, against the whole batch in one."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
from cases import FEW_ACTS, LOW_PRECISION, Case, parameter_dtype, same_bits, to_layout
from marks import FLAGS, each, pairs
from processes import Pool, World
from reference import Act
from sync_shares import (
    EACH_WORLD,
    Batch,
    Collectives,
    check_same_bits_everywhere,
    check_step,
    make_batch,
    make_layer,
    share_of,
    stats_of,
)
from tolerances import assert_within
from torch import distributed, nn

import bnext

# The shares of a batch: uneven; with an empty one; with ones of a single image.
SHARES = ((5, 2), (4, 0, 3), (1, 3), (2, 1, 1), (0, 6))
EACH_OF_FEW_SHARES = each(sizes=SHARES[:2])
EACH_LAYOUT = each(layout=("contiguous", "channels_last"))

IMAGES = (
    Case((5,), "contiguous"),
    Case((5, 7), "contiguous"),
    Case((5, 3, 3), "contiguous"),
    Case((5, 3, 3), "channels_last"),
    Case((5, 4, 4), "transposed"),
    Case((17, 2, 3, 2), "contiguous"),
    Case((17, 2, 3, 2), "channels_last_3d"),
)


def check_steps(
    world: World,
    sizes: Sequence[int],
    image: Case,
    *,
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    offset: float = 0.0,
    acts: Sequence[Act] = (None,),
    residuals: Sequence[bool] = FLAGS,
    needs: Sequence[Sequence[bool]] = ((True, True, True, True),),
    steps: int = 1,
    options: dict[str, Any] | None = None,
) -> None:
    """Check steps of a new layer for each of `acts` with each of `residuals` and of `needs`. `image` is the shape of an
    image, and the batch's layout."""
    for act, has_residual, need in itertools.product(acts, residuals, needs):
        layer = make_layer(image.shape[0], parameters or parameter_dtype(dtype), act=act, **(options or {}))
        for _ in range(steps):
            batch = make_batch((sum(sizes), *image.shape), dtype, offset, has_residual)
            check_step(layer, batch, sizes, world.rank, layout=image.layout, needs=need)
            check_same_bits_everywhere(layer)


@pairs(image=IMAGES, act=(None, *FEW_ACTS), sizes=SHARES)
def test_equals_one_process_with_the_whole_batch(world: World, image: Case, act: Act, sizes: tuple[int, ...]) -> None:
    check_steps(world, sizes, image, acts=[act], offset=1e4)


@pairs(
    sizes=SHARES[:2],
    layout=("contiguous", "channels_last"),
    dtype=(torch.float32, *LOW_PRECISION),
    parameters=("own", "float32"),
)
def test_dtypes(world: World, sizes: tuple[int, ...], layout: str, dtype: torch.dtype, parameters: str) -> None:
    own = dtype if parameters == "own" else torch.float32
    check_steps(world, sizes, Case((5, 7, 6), layout), dtype=dtype, parameters=own, acts=FEW_ACTS)


@EACH_LAYOUT
@EACH_OF_FEW_SHARES
def test_padding(world: World, sizes: tuple[int, ...], layout: str) -> None:
    """The results equal those of one process with the whole batch, which tests/ops compares with the reference."""
    rows = share_of(sizes, world.rank)
    batch = make_batch((sum(sizes), 5, 4, 3), offset=10.0, has_residual=True)
    valid = torch.rand(sum(sizes), 4, 3) < 0.6
    valid[share_of(sizes, 1)] = len(sizes) > 2  # of two processes one has nothing but padding
    layer = make_layer(5, act="relu")
    alone = bnext.BatchNormAct2d(5, act="relu", dtype=torch.float64)
    alone.load_state_dict(layer.state_dict())
    results = []
    for each_layer, part in ((alone, slice(None)), (layer, rows)):
        x, residual = (t[part].detach().requires_grad_() for t in (to_layout(batch.input, layout), batch.residual))
        y = each_layer(x, residual, mask=valid[part])
        grads = torch.autograd.grad(y, [x, residual, *each_layer.parameters()], batch.grad_output[part])
        results.append([y.detach(), *grads])
    expected = [t[rows] for t in results[0][:3]] + results[0][3:]
    for grad in results[1][3:]:
        distributed.all_reduce(grad)
    for got, want in zip([*results[1], *stats_of(layer)], [*expected, *stats_of(alone)], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    check_same_bits_everywhere(layer)


OPTIONS = (
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
@EACH_OF_FEW_SHARES
def test_options_over_several_steps(world: World, sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    for dtype in (torch.float64, torch.float32):
        image = Case((5, 3, 4), "contiguous")
        check_steps(world, sizes, image, dtype=dtype, acts=[None, "relu"], options=options, steps=3)


@EACH_OF_FEW_SHARES
def test_any_subset_of_gradients(world: World, sizes: tuple[int, ...]) -> None:
    needs = [need for need in itertools.product(FLAGS, repeat=4) if any(need)]
    without = [need for need in needs if any(need[:3]) and not need[3]]
    for residuals, subsets in (([True], needs), ([False], without)):
        image = Case((5, 3, 2), "contiguous")
        check_steps(world, sizes, image, acts=[None, "relu", "silu"], residuals=residuals, needs=subsets)


@each(sizes=((0, 0), (0, 0, 0), (1, 0), (0, 1, 0), (1, 1)))
def test_channels_of_at_most_two_values(world: World, sizes: tuple[int, ...]) -> None:
    """An empty batch is counted, but leaves the statistics as they are. One value is its mean and has no variance."""
    for shape in ((5,), (5, 1, 1)):
        check_steps(world, sizes, Case(shape, "contiguous"), acts=[None, "relu"], offset=3.0, steps=2)


@EACH_LAYOUT
@each(sizes=((11, 5), (7, 0, 9)))
def test_offset_does_not_cost_accuracy(world: World, sizes: tuple[int, ...], layout: str) -> None:
    for offset in (0.0, 1e4, 1e5):
        check_steps(world, sizes, Case((5, 32, 32), layout), dtype=torch.float32, offset=offset, residuals=[False])


@pytest.mark.parametrize("world", [3], indirect=True)
def test_groups_of_some_processes(world: World) -> None:
    """Processes 0 and 1 are a group, 1 and 2 another. A group does not see the batch of the third."""
    groups = {ranks: distributed.new_group(list(ranks)) for ranks in ((0, 1), (1, 2))}
    layers = {ranks: make_layer(5, act="relu", process_group=group) for ranks, group in groups.items()}
    sizes = (4, 3, 6)
    for _ in range(2):
        batch = make_batch((13, 5, 3, 2), offset=10.0, has_residual=True)
        shares = [batch.rows(share_of(sizes, rank), "contiguous") for rank in range(3)]
        for ranks, layer in layers.items():
            if world.rank in ranks:
                together = Batch(*map(torch.cat, zip(*(shares[rank] for rank in ranks), strict=True)))
                index, group = ranks.index(world.rank), groups[ranks]
                check_step(layer, together, [sizes[rank] for rank in ranks], index, group=group)
                check_same_bits_everywhere(layer, group)
            else:
                check_step(layer, shares[world.rank], [sizes[world.rank]], 0)
    # Layers of both groups, and one of all processes, in one graph.
    layers[0, 1, 2] = make_layer(5)
    xs = [make_batch((13, 5)).input for _ in layers]
    rows = share_of(sizes, world.rank)
    leaves = [x[rows].detach().requires_grad_() for x in xs]
    scale = torch.linspace(1, 2, 13, dtype=torch.float64)[:, None]
    outputs = [layer(leaf) for layer, leaf in zip(layers.values(), leaves, strict=True)]
    sum((y * scale[rows]).square().sum() for y in outputs).backward()
    for (ranks, layer), x, leaf in zip(layers.items(), xs, leaves, strict=True):
        seen = ranks if world.rank in ranks else (world.rank,)
        together = torch.cat([x[share_of(sizes, rank)] for rank in seen]).requires_grad_()
        factor = torch.cat([scale[share_of(sizes, rank)] for rank in seen])
        y = reference.composite(together, None, None, layer.weight, layer.bias, True, act=layer.act)
        (grad,) = torch.autograd.grad((y * factor).square().sum(), together)
        mine = share_of([sizes[rank] for rank in seen], seen.index(world.rank))
        assert_within(leaf.grad, grad[mine], 1e-11 * (1 + grad.abs().max()), "grad_input")
    for ranks, group in groups.items():
        if world.rank in ranks:
            distributed.destroy_process_group(group)


def test_a_group_of_one_equals_batch_norm(world: World) -> None:
    groups = [distributed.new_group([rank]) for rank in range(world.size)]
    with Collectives(allowed=False):
        check_equals_batch_norm(groups[world.rank])
    distributed.destroy_process_group(groups[world.rank])


def test_no_group_equals_batch_norm() -> None:
    assert not distributed.is_initialized()
    check_equals_batch_norm()


def check_equals_batch_norm(group: Any = None) -> None:
    """A layer of this group gives the bits of BatchNormAct2d, and refuses one value a channel as it does."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = make_layer(5, parameter_dtype(dtype), act="silu", process_group=group)
        plain = bnext.BatchNormAct2d(5, act="silu", dtype=parameter_dtype(dtype))
        plain.load_state_dict(layer.state_dict())
        for training in FLAGS:
            batch = make_batch((3, 5, 4, 3), dtype, has_residual=True)
            results = []
            for each_layer in (layer.train(training), plain.train(training)):
                x, residual = (t.detach().requires_grad_() for t in (batch.input, batch.residual))
                y = each_layer(x, residual)
                grads = torch.autograd.grad(y, [x, residual, *each_layer.parameters()], batch.grad_output)
                results.append([y, *grads, *each_layer.buffers()])
            assert all(map(same_bits, *results)), (dtype, training)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer.train()(batch.input[:1, :, :1, :1])


@EACH_WORLD
def test_one_collective_a_direction(world: World) -> None:
    channels = 5
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sums = parameter_dtype(dtype)
        for act, has_residual in itertools.product((None, "relu", "gelu"), FLAGS):
            layer = make_layer(channels, sums, act=act)
            batch = make_batch((3, channels, 2, 2), dtype, has_residual=has_residual)
            x = batch.input.requires_grad_()
            with Collectives() as collectives:
                y = layer(x, batch.residual)
                assert collectives.seen == [("all_gather_into_tensor", (1, 2 * channels + 1), torch.float64)]
                collectives.seen.clear()
                y.backward(batch.grad_output)
                assert collectives.seen == [("all_reduce", (2, channels), sums)]
                collectives.seen.clear()
                # The gradients of parameters need no other process.
                layer(x.detach(), batch.residual).backward(batch.grad_output)
                assert [opname for opname, *_ in collectives.seen] == ["all_gather_into_tensor"]


@EACH_WORLD
def test_no_collective_in_eval(world: World) -> None:
    """One process evaluates alone: a collective would wait for the others."""
    if world.rank != world.size - 1:
        return
    for tracked in FLAGS:
        layer = bnext.SyncBatchNorm(5, act="relu", track_running_stats=tracked, dtype=torch.float64).eval()
        plain = bnext.BatchNormAct2d(5, act="relu", track_running_stats=tracked, dtype=torch.float64).eval()
        plain.load_state_dict(layer.state_dict())
        before = stats_of(layer)
        leaves = [make_batch((3, 5, 2, 2)).input.requires_grad_()]
        leaves.append(leaves[0].detach().requires_grad_())
        with Collectives(allowed=False):
            for model, leaf in zip((layer, plain), leaves, strict=True):
                model(leaf).square().sum().backward()
        assert same_bits(leaves[0].grad, leaves[1].grad)
        assert all(map(same_bits, before, stats_of(layer)))


@EACH_OF_FEW_SHARES
def test_called_twice_before_backward(world: World, sizes: tuple[int, ...]) -> None:
    rows = share_of(sizes, world.rank)
    layer = make_layer(5, act="silu")
    batches = [make_batch((sum(sizes), 5, 2, 2)) for _ in range(2)]
    leaves = [batch.input[rows].detach().requires_grad_() for batch in batches]
    outputs = [layer(leaf) for leaf in leaves]
    loss = sum((y * batch.grad_output[rows]).sum() for y, batch in zip(outputs, batches, strict=True))
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for batch, leaf, grad in zip(batches, leaves, once, strict=True):
        fwd = reference.forward(batch.input, layer.weight, layer.bias, act="silu")
        expected = reference.backward(batch.grad_output, fwd, layer.weight, training=True, act="silu").input[rows]
        assert_within(grad, expected, 1e-12 * (1 + expected.abs()), "grad_input")
        assert same_bits(leaf.grad, 2 * grad)


# For each wrong argument the error, its message, the argument or attribute, and its value.
WRONG = {
    "1-D input": (ValueError, "2 dimensions|2D|1D", "input", lambda: torch.ones(3)),
    "zero channels": (ValueError, "channels", "input", lambda: torch.ones(4, 0, 2, 2)),
    "integers": (TypeError, "input", "input", lambda: torch.ones(4, 3, 2, 2, dtype=torch.int64)),
    "residual's shape": (ValueError, "residual", "residual", lambda: torch.ones(4, 3, 2, 1)),
    "residual's dtype": (TypeError, "residual", "residual", lambda: torch.ones(4, 3, 2, 2, dtype=torch.float64)),
    "length of weight": (RuntimeError, "weight", "weight", lambda: nn.Parameter(torch.ones(4))),
    "dtype of bias": (TypeError, "bias", "bias", lambda: nn.Parameter(torch.ones(3, dtype=torch.float64))),
    "length of running_mean": (RuntimeError, "running_mean", "running_mean", lambda: torch.ones(4)),
    "overlapping running_var": (RuntimeError, "running_var", "running_var", lambda: torch.ones(1).expand(3)),
    "eps": (ValueError, "eps", "eps", lambda: 0.0),
    "activation": (ValueError, "leaky_relu", "_activation", lambda: ("swish", 0.0)),
}


def test_wrong_arguments_raise_before_anything_is_exchanged(world: World) -> None:
    """So what is wrong in one process alone does not leave the others in a collective of which it is no part."""
    for error, message, wrong, make in WRONG.values():
        layer = make_layer(3, torch.float32, act="relu")
        args = {"input": torch.randn(4, 3, 2, 2), "residual": torch.randn(4, 3, 2, 2)}
        if wrong in args:
            args[wrong] = make()
        else:
            setattr(layer, wrong, make())
        before = stats_of(layer)
        with Collectives(allowed=False), pytest.raises(error, match=message):
            layer(**args)
        assert all(map(same_bits, before, stats_of(layer)))


def survives_a_death(world: World) -> float:
    """How many seconds the other process waits for one that dies while both are in their backward."""
    layer = make_layer(5, act="relu")
    x = make_batch((3, 5, 2, 2)).input.requires_grad_()
    y = layer(x)
    before = stats_of(layer)
    distributed.barrier()
    if world.rank == 1:
        time.sleep(0.3)
        os._exit(7)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        y.sum().backward()
    with pytest.raises(RuntimeError):
        layer(x)
    assert x.grad is None
    assert all(map(same_bits, before, stats_of(layer)))
    return time.monotonic() - start


def test_a_rank_that_dies_is_an_error_for_the_others(short_lived: Callable[..., Pool]) -> None:
    group_timeout = 10.0
    waited, none = short_lived(2, group_timeout).run(survives_a_death, exits=[1])
    assert none is None
    assert waited < group_timeout + 1


def test_a_rank_that_does_not_come_is_an_error_for_the_others(world: World) -> None:
    """The group's timeout ends the wait."""
    group = distributed.new_group(timeout=datetime.timedelta(seconds=2))
    layer = make_layer(5, process_group=group)
    before = stats_of(layer)
    if world.rank != 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            layer(make_batch((3, 5)).input)
        assert all(map(same_bits, before, stats_of(layer)))
        assert 1.5 <= time.monotonic() - start < 5
    distributed.barrier()
    distributed.destroy_process_group(group)

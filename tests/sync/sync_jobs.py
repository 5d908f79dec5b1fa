"""What the processes of test_sync.py run on one layer: each function here is run by all ranks at once, and asserts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import reference
import torch
from cases import make_grad, parameter_dtype, same_bits, to_layout
from processes import World
from reference import Act
from sync_shares import (
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


def equals_the_whole_batch(
    world: World,
    *,
    sizes: Sequence[int],
    shape: Sequence[int],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
    parameters: torch.dtype | None = None,
    offset: float = 0.0,
    acts: Sequence[Act] = (None,),
    residuals: Sequence[bool] = (False, True),
    needs: Sequence[Sequence[bool]] = ((True, True, True, True),),
    steps: int = 1,
    options: dict[str, Any] | None = None,
) -> None:
    """`shape` is that of an image, without the batch."""
    for act in acts:
        for has_residual in residuals:
            for need in needs:
                layer = make_layer(shape[0], parameters or parameter_dtype(dtype), act=act, **(options or {}))
                for _ in range(steps):
                    batch = make_batch((sum(sizes), *shape), dtype, offset, has_residual)
                    check_step(layer, batch, sizes, world.rank, layout=layout, needs=need)
                    check_same_bits_everywhere(layer)


def counts_what_is_no_padding(world: World, *, sizes: Sequence[int], layout: str) -> None:
    """As one process with the whole batch, whose own tests compare it with the reference. On one process there may be
    nothing but padding."""
    rows = share_of(sizes, world.rank)
    batch = make_batch((sum(sizes), 5, 4, 3), offset=10.0, has_residual=True)
    valid = torch.rand(sum(sizes), 4, 3) < 0.6
    valid[share_of(sizes, 1)] = len(sizes) > 2
    alone = bnext.BatchNormAct2d(5, act="relu", dtype=torch.float64)
    layer = make_layer(5, act="relu")
    alone.load_state_dict(layer.state_dict())
    results = []
    for each, part in ((alone, slice(None)), (layer, rows)):
        x, residual = (t[part].detach().requires_grad_() for t in (to_layout(batch.input, layout), batch.residual))
        y = each(x, residual, mask=valid[part])
        grads = torch.autograd.grad(y, [x, residual, *each.parameters()], batch.grad_output[part])
        results.append((y, *grads))
    y, dx, dresidual, *_ = results[0]
    for what, got, expected in zip(("output", "input", "residual"), results[1], (y, dx, dresidual), strict=False):
        assert_within(got, expected[rows], 1e-11 * (1 + expected.abs().max()), what)
    for got, expected in zip(results[1][3:], results[0][3:], strict=True):
        distributed.all_reduce(got)
        assert_within(got, expected, 1e-11 * (1 + expected.abs().max()), "parameters")
    for what in ("running_mean", "running_var"):
        assert_within(getattr(layer, what), getattr(alone, what), 1e-11, what)
    check_same_bits_everywhere(layer)


def is_accurate_far_from_zero(world: World, *, sizes: Sequence[int], layout: str) -> None:
    """The bars of the contract's section 3: 16,384 values a channel, standard deviation 1, float32."""
    rows = share_of(sizes, world.rank)
    for mean in (0.0, 1e4, 1e5):
        layer = bnext.SyncBatchNorm(5)
        whole = torch.randn(sum(sizes), 5, 32, 32) + mean
        assert whole.numel() // 5 == 16384
        g = make_grad(tuple(whole.shape))
        x = to_layout(whole[rows], layout).detach().requires_grad_()
        y = layer(x)
        y.backward(g[rows])
        fwd = reference.forward(whole)
        expected = reference.backward(g, fwd, training=True)
        # As in test_numerics.py: for |y| up to 4, beyond it is relative.
        assert_within(y, fwd.output[rows], (2e-6 * (fwd.output.abs() / 4).clamp(min=1))[rows], f"output at {mean}")
        assert_within(x.grad, expected.input[rows], 1e-5 * expected.input.abs().max(), f"grad_input at {mean}")
        check_same_bits_everywhere(layer)


def merges_groups_by_themselves(world: World) -> None:
    """Of three processes, 0 and 1 are a group, and 1 and 2 another; each also has the third's batch not to see."""
    first, second = (distributed.new_group(list(ranks)) for ranks in ((0, 1), (1, 2)))
    a, b = (make_layer(5, act="relu", process_group=group) for group in (first, second))
    sizes = [4, 3, 6]
    for _ in range(2):
        batch = make_batch((13, 5, 3, 2), offset=10.0, has_residual=True)
        for layer, group, ranks in ((a, first, (0, 1)), (b, second, (1, 2))):
            members = [batch.rows(share_of(sizes, rank), "contiguous") for rank in ranks]
            if world.rank in ranks:
                together = Batch(*(torch.cat(parts) for parts in zip(*members, strict=True)))
                group_sizes = [sizes[rank] for rank in ranks]
                check_step(layer, together, group_sizes, ranks.index(world.rank), group=group)
                check_same_bits_everywhere(layer, group)
            else:
                alone = batch.rows(share_of(sizes, world.rank), "contiguous")
                check_step(layer, alone, [sizes[world.rank]], 0)
    # Both at once, in one graph, and with the group of all.
    layers = [a, b, make_layer(5)]
    xs = [make_batch((13, 5)).input for _ in layers]
    rows = share_of(sizes, world.rank)
    leaves = [x[rows].detach().requires_grad_() for x in xs]
    scale = torch.linspace(1, 2, 13, dtype=torch.float64)[:, None]
    sum((layer(leaf) * scale[rows]).square().sum() for layer, leaf in zip(layers, leaves, strict=True)).backward()
    for layer, ranks, x, leaf in zip(layers, ((0, 1), (1, 2), (0, 1, 2)), xs, leaves, strict=True):
        seen = ranks if world.rank in ranks else (world.rank,)
        together = torch.cat([x[share_of(sizes, rank)] for rank in seen]).requires_grad_()
        factor = torch.cat([scale[share_of(sizes, rank)] for rank in seen])
        y = reference.composite(together, None, None, layer.weight, layer.bias, True, act=layer.act)
        (grad,) = torch.autograd.grad((y * factor).square().sum(), together)
        mine = share_of([sizes[rank] for rank in seen], seen.index(world.rank))
        assert_within(leaf.grad, grad[mine], 1e-11 * (1 + grad.abs().max()), "grad_input")
    for group in (first, second):
        if group is not distributed.GroupMember.NON_GROUP_MEMBER:
            distributed.destroy_process_group(group)


def equals_batch_norm_alone(world: World) -> None:
    """A group of one process: bit for bit bnext's BatchNorm2d."""
    groups = [distributed.new_group([rank]) for rank in range(world.size)]
    with Collectives(allowed=False):
        check_equals_batch_norm(groups[world.rank])
    distributed.destroy_process_group(groups[world.rank])


def check_equals_batch_norm(group: Any = None) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = make_layer(5, parameter_dtype(dtype), act="silu", process_group=group)
        plain = bnext.BatchNormAct2d(5, act="silu", dtype=parameter_dtype(dtype))
        plain.load_state_dict(layer.state_dict())
        for training in (True, False):
            batch = make_batch((3, 5, 4, 3), dtype, has_residual=True)
            results = []
            for each in (layer.train(training), plain.train(training)):
                x, r = (t.detach().requires_grad_() for t in (batch.input, batch.residual))
                y = each(x, r)
                results.append(
                    [y, *torch.autograd.grad(y, [x, r, *each.parameters()], batch.grad_output), *each.buffers()]
                )
            assert all(map(same_bits, *results)), (dtype, training)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer.train()(batch.input[:1, :, :1, :1])


def exchanges_once_a_direction(world: World, *, dtype: torch.dtype) -> None:
    channels = 5
    sums = parameter_dtype(dtype)
    for act in (None, "relu", "gelu"):
        for has_residual in (False, True):
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
                # Nothing that needs the others.
                layer(x.detach(), batch.residual).backward(batch.grad_output)
                assert [name for name, *_ in collectives.seen] == ["all_gather_into_tensor"]


def exchanges_nothing_in_eval(world: World) -> None:
    """One rank alone evaluates; the others would be waited for."""
    layer = make_layer(5, act="relu").eval()
    untracked = bnext.SyncBatchNorm(5, track_running_stats=False, dtype=torch.float64).eval()
    if world.rank != world.size - 1:
        return
    with Collectives(allowed=False):
        for each in (layer, untracked):
            plain = bnext.BatchNormAct2d(5, act=each.act, dtype=torch.float64, track_running_stats=each is layer)
            plain.load_state_dict(each.state_dict())
            x = make_batch((3, 5, 2, 2)).input
            before = stats_of(each)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            for model, leaf in zip((each, plain.eval()), leaves, strict=True):
                model(leaf).square().sum().backward()
            assert same_bits(leaves[0].grad, leaves[1].grad)
            assert all(map(same_bits, before, stats_of(each)))


def is_called_twice_before_backward(world: World, *, sizes: Sequence[int]) -> None:
    rows = share_of(sizes, world.rank)
    layer = make_layer(5, act="silu")
    first, second = (make_batch((sum(sizes), 5, 2, 2)) for _ in range(2))
    leaves = [batch.input[rows].detach().requires_grad_() for batch in (first, second)]
    outputs = [layer(leaf) for leaf in leaves]
    loss = sum((y * batch.grad_output[rows]).sum() for y, batch in zip(outputs, (first, second), strict=True))
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for batch, leaf, grad in zip((first, second), leaves, once, strict=True):
        fwd = reference.forward(batch.input, layer.weight, layer.bias, act="silu")
        expected = reference.backward(batch.grad_output, fwd, layer.weight, training=True, act="silu").input[rows]
        assert_within(grad, expected, 1e-12 * (1 + expected.abs()), "grad_input")
        assert same_bits(leaf.grad, 2 * grad)


WRONG = {
    "1-D input": (ValueError, "2 dimensions|2D|1D", {"input": lambda: torch.ones(3)}),
    "zero channels": (ValueError, "channels", {"input": lambda: torch.ones(4, 0, 2, 2)}),
    "integers": (TypeError, "input", {"input": lambda: torch.ones(4, 3, 2, 2, dtype=torch.int64)}),
    "residual's shape": (ValueError, "residual", {"residual": lambda: torch.ones(4, 3, 2, 1)}),
    "residual's dtype": (TypeError, "residual", {"residual": lambda: torch.ones(4, 3, 2, 2, dtype=torch.float64)}),
    "length of weight": (RuntimeError, "weight", {"weight": lambda: nn.Parameter(torch.ones(4))}),
    "dtype of bias": (TypeError, "bias", {"bias": lambda: nn.Parameter(torch.ones(3, dtype=torch.float64))}),
    "length of running_mean": (RuntimeError, "running_mean", {"running_mean": lambda: torch.ones(4)}),
    "overlapping running_var": (RuntimeError, "running_var", {"running_var": lambda: torch.ones(1).expand(3)}),
    "eps": (ValueError, "eps", {"eps": lambda: 0.0}),
    "activation": (ValueError, "leaky_relu", {"_activation": lambda: ("swish", 0.0)}),
}


def raises_before_it_exchanges(world: World, *, wrong: str) -> None:
    """What is wrong in one process alone must not leave the others waiting."""
    error, message, values = WRONG[wrong]
    layer = make_layer(3, torch.float32, act="relu")
    args = {"input": torch.randn(4, 3, 2, 2), "residual": torch.randn(4, 3, 2, 2)}
    for name, make in values.items():
        if name in args:
            args[name] = make()
        else:
            setattr(layer, name, make())
    before = stats_of(layer)
    with Collectives(allowed=False), pytest.raises(error, match=message):
        layer(**args)
    assert all(map(same_bits, before, stats_of(layer)))

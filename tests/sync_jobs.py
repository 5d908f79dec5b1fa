"""What the processes of test_sync.py run: each function here is run by all ranks at once, and asserts.

Every rank draws the same whole batch, so that it can compare its own share with the float64 reference of the whole.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import reference
import tolerances
import torch
from cases import (
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    parameter_dtype,
    same_bits,
    to_layout,
)
from checks import output_strides, significant_strides
from processes import World
from reference import Act, Forward, reduced_dims, widen
from tolerances import assert_within
from torch import Tensor, distributed, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import bnext

gather_op = torch.ops._c10d_functional.all_gather_into_tensor.default
reduce_op = torch.ops._c10d_functional.all_reduce.default


class Collectives(TorchDispatchMode):
    """Records the collectives of bnext as (operator, shape, dtype), or refuses them."""

    def __init__(self, allowed: bool = True) -> None:
        super().__init__()
        self.allowed = allowed
        self.seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "_c10d_functional" and func is not torch.ops._c10d_functional.wait_tensor.default:
            assert self.allowed, f"{func} was called"
            self.seen.append((func._opname, tuple(args[0].shape), args[0].dtype))
        if func.namespace == "bnext":
            # Below this operator a mode sees nothing, unless it is entered again.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


# Shares and their references.


class Batch(NamedTuple):
    """Of all processes together."""

    input: Tensor
    grad_output: Tensor
    residual: Tensor | None

    def rows(self, rows: slice, layout: str) -> Batch:
        """A process's share. The last two lie as they come."""
        residual = None if self.residual is None else self.residual[rows]
        return Batch(to_layout(self.input[rows], layout), self.grad_output[rows], residual)


def make_batch(
    shape: Sequence[int], dtype: torch.dtype = torch.float64, offset: float = 0.0, has_residual: bool = False
) -> Batch:
    shape = tuple(shape)
    x = (make_input(shape, dtype=torch.float64) + offset).to(dtype)
    return Batch(x, make_grad(shape, dtype=dtype), make_residual(shape, dtype=dtype) if has_residual else None)


def share_of(sizes: Sequence[int], index: int) -> slice:
    return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


def make_layer(channels: int, dtype: torch.dtype = torch.float64, **options: Any) -> bnext.SyncBatchNorm:
    """With parameters and statistics that are not those of a new layer, the same in every process."""
    layer = bnext.SyncBatchNorm(channels, dtype=dtype, **options)
    p = make_parameters(channels, dtype)
    with torch.no_grad():
        for name, value in p._asdict().items():
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(value)
    return layer


def stats_of(layer: nn.Module) -> list[Tensor]:
    return [buffer.detach().clone() for buffer in layer.buffers()]


@contextlib.contextmanager
def merged(fwd: Forward, shares: int) -> Iterator[None]:
    """The tolerances of statistics that were merged from `shares`.

    A mean is rounded to a double once for each share and once for each merge, of which at most `shares + 1` stand
    between a value and the result, each 2^-53 of |mean|; the reference's own is one more. And a difference of means
    that is off by d moves sum((x - mean)^2) by 2 d |delta| n1 n2/n, where delta^2 n1 n2/n is at most m sigma^2: sigma
    by at most d/2 a merge. Both are errors of the statistics in units of sigma.
    """
    plain = tolerances.statistics
    rounding = float(((shares + 2) * 2.0**-53 * fwd.mean.abs() * fwd.invstd).max())
    with mock.patch.object(tolerances, "statistics", lambda count, dtype: plain(count, dtype) + rounding):
        yield


def check_step(
    layer: bnext.SyncBatchNorm,
    batch: Batch,
    sizes: Sequence[int],
    index: int,
    *,
    layout: str = "contiguous",
    needs: Sequence[bool] = (True, True, True, True),
    group: Any = None,
) -> None:
    """One step of a layer in training, forward and backward, by the process that holds share `index`.

    `needs` says which of input, weight, bias and residual need a gradient.
    """
    rows = share_of(sizes, index)
    share = batch.rows(rows, layout)
    weight, bias = layer.weight, layer.bias
    tensors = {"input": share.input.detach(), "weight": weight, "bias": bias, "residual": share.residual}
    leaves = {}
    for (name, tensor), need in zip(tensors.items(), needs, strict=True):
        if tensor is not None:
            tensor.requires_grad_(need)
            if need:
                leaves[name] = tensor
    before = stats_of(layer)
    y = layer(tensors["input"], share.residual)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), share.grad_output), strict=True))

    dtype, act = share.input.dtype, layer.act
    about: dict[str, Any] = {"training": True, "has_residual": batch.residual is not None, "act": act}
    fwd = reference.forward(batch.input, weight, bias, eps=layer.eps, residual=batch.residual, act=act)
    local = fwd._replace(output=fwd.output[rows], z=fwd.z[rows], xhat=fwd.xhat[rows])
    expected = reference.backward(batch.grad_output, fwd, weight, training=True, act=act)
    reaching = expected.residual
    with merged(fwd, len(sizes)):
        assert y.dtype == dtype
        if y.numel():
            assert y.stride() == output_strides(share.input)
        assert_within(y, local.output, tolerances.output(fwd, weight, bias, dtype, **about)[rows], "output")
        check_running(layer, before, fwd, dtype)

        slack = tolerances.slack(batch.grad_output, fwd, weight, bias, dtype, **about)
        if "input" in grads:
            limit = tolerances.grad_input(reaching, fwd, weight, dtype, training=True, slack=slack)
            assert_within(grads["input"], expected.input[rows], limit[rows], "grad_input")
            assert significant_strides(grads["input"]) == significant_strides(y)
        if "residual" in grads:
            limit = tolerances.grad_residual(reaching, slack, dtype, act)
            assert_within(grads["residual"], reaching[rows], limit[rows], "grad_residual")
        # Of its own share, rounded to the parameter's dtype: DistributedDataParallel sums them up.
        g, off = reaching[rows], slack[rows]
        sums = {
            "weight": ((g * local.xhat).sum(reduced_dims(g.ndim)), expected.weight),
            "bias": (g.sum(reduced_dims(g.ndim)), expected.bias),
        }
        together = group is not None or len(sizes) == distributed.get_world_size()
        for name in sorted(sums.keys() & grads.keys()):
            to = leaves[name].dtype
            if name == "weight":
                limit = tolerances.grad_weight(g, local, dtype, to, training=True, slack=off)
            else:
                limit = tolerances.grad_bias(g, dtype, to, off)
            assert_within(grads[name], sums[name][0], limit, f"grad_{name} of the share")
            if together:
                total, limits = widen(grads[name]), limit.clone()
                distributed.all_reduce(total, group=group)
                distributed.all_reduce(limits, group=group)
                assert_within(total, sums[name][1], limits, f"grad_{name} summed over the ranks")


def check_running(layer: nn.Module, before: list[Tensor], fwd: Forward, dtype: torch.dtype) -> None:
    """That this step took the batch into the running statistics of before."""
    if not layer.track_running_stats:
        assert before == []
        return
    mean, var, counter = before
    assert layer.num_batches_tracked == counter + 1
    momentum = 1 / (counter.item() + 1) if layer.momentum is None else layer.momentum
    if fwd.count == 1:  # a variance of one value is not taken in
        fwd, want_var = fwd._replace(count=2), widen(var)
        expected = (reference.updated_running_stats(mean, var, fwd, momentum)[0], want_var)
    else:
        expected = reference.updated_running_stats(mean, var, fwd, momentum)
    limits = tolerances.running_stats(expected, fwd, momentum, dtype, mean.dtype, var.dtype)
    assert_within(layer.running_mean, expected[0], limits[0], "running_mean")
    assert_within(layer.running_var, expected[1], limits[1], "running_var")


def check_same_bits_everywhere(layer: nn.Module, group: Any = None) -> None:
    for name, buffer in layer.named_buffers():
        mine = buffer.double()  # gloo knows no bfloat16; nothing is lost
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyone, mine, group=group)
        assert all(same_bits(other, mine) for other in everyone), name


# The jobs.


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


FIRST_ONLY = "over several processes only first derivatives"


def refuses_what_is_not_implemented(world: World) -> None:
    """Second derivatives and forward mode; that a graph of the gradient is made is no error by itself."""
    for act, has_residual in ((None, False), ("relu", True), ("silu", True)):
        layer = make_layer(5, act=act)
        batch = make_batch((2 * world.size, 5, 2, 2), has_residual=has_residual)
        share = batch.rows(share_of([2] * world.size, world.rank), "contiguous")
        x = share.input.detach().requires_grad_()
        r = None if share.residual is None else share.residual.detach().requires_grad_()
        inputs = [t for t in (x, *layer.parameters(), r) if t is not None]
        y = layer(x, r)
        plain = torch.autograd.grad(y, inputs, share.grad_output, retain_graph=True)
        grads = torch.autograd.grad(y, inputs, share.grad_output, create_graph=True)
        assert all(map(same_bits, grads, plain))
        for grad in grads[:3]:
            with pytest.raises(RuntimeError, match=FIRST_ONLY):
                grad.square().sum().backward(retain_graph=True)
        before = stats_of(layer)
        with Collectives(allowed=False), forward_ad.dual_level():
            for which in range(len(inputs)):
                duals = list(inputs)
                duals[which] = forward_ad.make_dual(inputs[which].detach(), torch.ones_like(inputs[which]))
                params = dict(zip(("weight", "bias"), duals[1:3], strict=True))
                args = (duals[0], *duals[3:])
                with pytest.raises(RuntimeError, match="over several processes there is no forward mode"):
                    torch.func.functional_call(layer, params, args)
        assert all(map(same_bits, before, stats_of(layer)))


def refuses_second_derivatives_of_chosen_inputs(world: World) -> None:
    """Where torch.autograd.grad asks for one tensor alone, the derivative must not be taken for zero."""
    layer = make_layer(5, act="silu")
    x = (make_batch((4, 5, 2, 2)).input + world.rank).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, g, create_graph=True)
    for what in (x, layer.weight, layer.bias, g):
        with pytest.raises(RuntimeError, match=FIRST_ONLY):
            torch.autograd.grad(grad.square().sum(), what, retain_graph=True, allow_unused=True)


def refuses_second_derivatives_of_parameter_gradients(world: World) -> None:
    """They need no collective themselves, but depend on the input by the statistics of all processes."""
    for act in (None, "relu", "silu"):
        layer = make_layer(5, act=act)
        x = (make_batch((4, 5, 2, 2)).input + world.rank).requires_grad_()
        y = layer(x)
        (grad,) = torch.autograd.grad(y, layer.weight, torch.randn_like(y), create_graph=True)
        with pytest.raises(RuntimeError, match=FIRST_ONLY):
            torch.autograd.grad(grad.square().sum(), x)


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
    "dtype of the counter": (TypeError, "num_batches_tracked", {"num_batches_tracked": lambda: torch.tensor(0.0)}),
    "eps": (ValueError, "eps", {"eps": lambda: 0.0}),
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


def refuses_an_unknown_activation(world: World) -> None:
    layer = make_layer(3, torch.float32)
    for make in (lambda: bnext.SyncBatchNorm(3, act="swish"), lambda: setattr(layer, "act", "swish")):
        with pytest.raises(ValueError, match="leaky_relu"):
            make()
    assert layer.act is None
    before = stats_of(layer)
    group = (world.size, distributed.group.WORLD.group_name)
    vectors = (layer.weight, layer.bias, *layer.buffers(), 0.1, 1e-5)
    with Collectives(allowed=False), pytest.raises(ValueError, match="leaky_relu"):
        torch.ops.bnext.batch_norm_sync(torch.ones(4, 3), *vectors, *group, None, "swish")
    assert all(map(same_bits, before, stats_of(layer)))


# Whole models.


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


def trained(model: nn.Module, data: list[tuple[Tensor, Tensor]], rows: slice, scale: float = 1.0) -> list[float]:
    """The loss of each step of SGD on these rows of the batches; `scale` undoes that gradients are averaged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in data:
        optimizer.zero_grad()
        loss = (model(x[rows]) - target[rows]).square().sum() / len(x)
        (loss * scale).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trains_as_one_process_does(
    world: World, *, sizes: Sequence[int], how: str = "", options: dict[str, bool] | None = None, steps: int = 4
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
    losses = torch.tensor(trained(run, data, share_of(sizes, world.rank), world.size), dtype=torch.float64)
    distributed.all_reduce(losses)
    expected = torch.tensor(trained(plain, data, slice(None)), dtype=torch.float64)
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


# Processes that die.


def survives_a_death_in_forward(world: World, *, dying: int) -> float:
    """How long the others waited."""
    layer = make_layer(5, act="relu")
    layer(make_batch((3, 5, 2, 2)).input)
    before = stats_of(layer)
    if world.rank == dying:
        time.sleep(0.3)  # the others are in their forward
        os._exit(7)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        layer(make_batch((3, 5, 2, 2)).input)
    waited = time.monotonic() - start
    assert all(map(same_bits, before, stats_of(layer)))
    return waited


def survives_a_death_in_backward(world: World, *, dying: int) -> float:
    layer = make_layer(5, act="relu")
    x = make_batch((3, 5, 2, 2)).input.requires_grad_()
    y = layer(x)
    before = stats_of(layer)
    distributed.barrier()
    if world.rank == dying:
        time.sleep(0.3)
        os._exit(7)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        y.sum().backward()
    assert x.grad is None
    assert all(map(same_bits, before, stats_of(layer)))
    return time.monotonic() - start


def waits_for_one_that_does_not_come(world: World) -> float:
    """The group's timeout ends the wait."""
    group = distributed.new_group(timeout=datetime.timedelta(seconds=2))
    layer = make_layer(5, process_group=group)
    before = stats_of(layer)
    waited = 0.0
    if world.rank != 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError):
            layer(make_batch((3, 5)).input)
        assert all(map(same_bits, before, stats_of(layer)))
        waited = time.monotonic() - start
    distributed.barrier()
    distributed.destroy_process_group(group)
    return waited


# What the pool itself is tested with.


def answers(world: World, *, value: int) -> tuple[int, int, Tensor]:
    return world.rank, value, torch.rand(1) * value


def raises(world: World, *, rank: int) -> None:
    if world.rank == rank:
        raise KeyError("what the job said")


def warns(world: World) -> None:
    import warnings

    warnings.warn("in a worker", stacklevel=1)


def exits(world: World, *, rank: int) -> None:
    if world.rank == rank:
        print("last words", flush=True)
        os._exit(5)


def hangs(world: World, *, rank: int) -> None:
    if world.rank == rank:
        time.sleep(600)

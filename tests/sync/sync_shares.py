"""A batch in shares, the float64 reference of the whole, and what a step of one process is compared with.

Every rank draws the same whole batch, so that it can compare its own share with the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import reference
import tolerances
import torch
from cases import make_grad, make_input, make_parameters, make_residual, same_bits, to_layout
from checks import output_strides, significant_strides
from reference import Forward, reduced_dims, widen
from tolerances import assert_within
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnext

# batch_norm_sync, and what it is made of.
EPS = 1e-5
local_stats = torch.ops.bnext.batch_norm_stats
merge = torch.ops.bnext.batch_norm_gathered
train = torch.ops.bnext.batch_norm_train
backward = torch.ops.bnext.batch_norm_backward
sync = torch.ops.bnext.batch_norm_sync
sync_backward = torch.ops.bnext.batch_norm_sync_backward
all_reduce_sum = torch.ops.bnext.all_reduce_sum

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


def gathered(shares: Sequence[Tensor]) -> Tensor:
    """The gathered stats of processes with these shares."""
    return torch.stack([local_stats(share, EPS) for share in shares])


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

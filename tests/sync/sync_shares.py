"""A batch in shares, one for each process, compared with the float64 reference of the whole batch.

Every process draws the same whole batch, so that it can compare its own share with a part of the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import pytest
import reference
import tolerances
import torch
from cases import make_grad, make_input, make_parameters, make_residual, same_bits, to_layout
from checks import output_strides, significant_strides
from reference import Act, named, reduced_dims, widen
from tolerances import assert_within
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnext

# batch_norm_sync, and the operators of which it is made.
EPS = 1e-5
local_stats = torch.ops.bnext.batch_norm_stats
merge = torch.ops.bnext.batch_norm_gathered
train = torch.ops.bnext.batch_norm_train
backward = torch.ops.bnext.batch_norm_backward
sync = torch.ops.bnext.batch_norm_sync
sync_backward = torch.ops.bnext.batch_norm_sync_backward
all_reduce_sum = torch.ops.bnext.all_reduce_sum

EACH_WORLD = pytest.mark.parametrize("world", [2, 3], indirect=True, ids=lambda size: f"world={size}")


class Collectives(TorchDispatchMode):
    """Records the collectives of bnext as (operator, shape, dtype), or refuses them."""

    def __init__(self, allowed: bool = True) -> None:
        super().__init__()
        self.allowed = allowed
        self.seen: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.namespace in ("c10d", "_c10d_functional")
            and func is not torch.ops._c10d_functional.wait_tensor.default
        ):
            assert self.allowed, f"{func} was called"
            self.seen.append((func._opname, tuple(args[0].shape), args[0].dtype))
        if func.namespace == "bnext":
            # Below this operator a mode sees nothing, unless it is entered again.
            with self:
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Batch(NamedTuple):
    """The tensors of all processes together, or of the share of one."""

    input: Tensor
    grad_output: Tensor
    residual: Tensor | None

    def rows(self, rows: slice, layout: str) -> Batch:
        """The share of these rows. The layout is that of its input alone."""
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
    """A layer whose parameters and statistics are not those of a new one, and are the same in every process."""
    layer = bnext.SyncBatchNorm(channels, dtype=dtype, **options)
    p = make_parameters(channels, dtype)
    with torch.no_grad():
        for name, value in p._asdict().items():
            if getattr(layer, name) is not None:
                getattr(layer, name).copy_(value)
    return layer


def stats_of(layer: nn.Module) -> list[Tensor]:
    return [buffer.detach().clone() for buffer in layer.buffers()]


class Whole:
    """A batch in shares, and the reference's results of the whole, of which the results of each share are a part."""

    def __init__(
        self, batch: Batch, sizes: Sequence[int], weight: Tensor | None, bias: Tensor | None, act: Act, eps: float = EPS
    ) -> None:
        self.sizes, self.act, self.dtype = sizes, act, batch.input.dtype
        about: dict[str, Any] = {"training": True, "has_residual": batch.residual is not None, "act": act}
        self.fwd = reference.forward(batch.input, weight, bias, eps=eps, residual=batch.residual, act=act)
        self.grads = reference.backward(batch.grad_output, self.fwd, weight, training=True, act=act)
        reaching = self.grads.residual
        with self.tolerances():
            self.slack = tolerances.slack(batch.grad_output, self.fwd, weight, bias, self.dtype, **about)
            self.limits = {
                "output": tolerances.output(self.fwd, weight, bias, self.dtype, **about),
                "input": tolerances.grad_input(reaching, self.fwd, weight, self.dtype, training=True, slack=self.slack),
                "residual": tolerances.grad_residual(reaching, self.slack, self.dtype, act),
            }

    @contextlib.contextmanager
    def tolerances(self) -> Iterator[None]:
        """Within this context the tolerances are those of statistics that were merged from shares.

        A mean is rounded to a double once for each share and once for each merge, of which at most `shares + 1` stand
        between a value and the result, each 2^-53 of |mean|; the reference's own is one more. And a difference of means
        that is off by d moves sum((x - mean)^2) by 2 d |delta| n1 n2/n, where delta^2 n1 n2/n is at most m sigma^2:
        sigma by at most d/2 a merge. Both are errors of the statistics in units of sigma.
        """
        plain = tolerances.statistics
        rounding = float(((len(self.sizes) + 2) * 2.0**-53 * self.fwd.mean.abs() * self.fwd.invstd).max())
        with mock.patch.object(tolerances, "statistics", lambda count, dtype: plain(count, dtype) + rounding):
            yield

    def check(self, index: int, share: Batch, y: Tensor, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compare a share's output, and its gradients by the names of their tensors, with its part of the whole.

        Those of weight and bias are sums over the share, rounded to the parameter's dtype: DistributedDataParallel adds
        them up. Returns how far off each result may be.
        """
        rows = share_of(self.sizes, index)
        g, off, local = self.grads.residual[rows], self.slack[rows], self.fwd._replace(xhat=self.fwd.xhat[rows])
        expected = {
            "output": self.fwd.output[rows],
            "input": self.grads.input[rows],
            "residual": g,
            "weight": (g * local.xhat).sum(reduced_dims(g.ndim)),
            "bias": g.sum(reduced_dims(g.ndim)),
        }
        limits = {what: limit[rows] for what, limit in self.limits.items()}
        with self.tolerances():
            if "weight" in grads:
                to = grads["weight"].dtype
                limits["weight"] = tolerances.grad_weight(g, local, self.dtype, to, training=True, slack=off)
            if "bias" in grads:
                limits["bias"] = tolerances.grad_bias(g, self.dtype, grads["bias"].dtype, off)
        for what, result in {"output": y, **grads}.items():
            assert_within(result, expected[what], limits[what], f"{what} of share {index}")
        assert y.dtype == self.dtype
        if y.numel():
            assert y.stride() == output_strides(share.input)
            # Without an activation the gradient of the residual is grad_output itself, which has strides of its own.
            for what in ("input", "residual") if named(self.act)[0] != "identity" else ("input",):
                if what in grads:
                    assert grads[what].dtype == self.dtype
                    assert significant_strides(grads[what]) == significant_strides(y), what
        return limits

    def check_running_stats(
        self, stats: Sequence[Tensor], before: Sequence[Tensor], momentum: float | None = 0.1
    ) -> None:
        """Compare running mean, variance and counter with those of `before`, updated by the whole batch."""
        mean, var, counter = before
        assert stats[2] == counter + 1
        momentum = 1 / (counter.item() + 1) if momentum is None else momentum
        # One value has no unbiased variance, so running_var stays.
        fwd = self.fwd._replace(count=2) if self.fwd.count == 1 else self.fwd
        expected = reference.updated_running_stats(mean, var, fwd, momentum)
        if self.fwd.count == 1:
            expected = (expected[0], widen(var))
        with self.tolerances():
            limits = tolerances.running_stats(expected, fwd, momentum, self.dtype, mean.dtype, var.dtype)
        assert_within(stats[0], expected[0], limits[0], "running_mean")
        assert_within(stats[1], expected[1], limits[1], "running_var")


NAMES = ("input", "weight", "bias", "residual")


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
    share = batch.rows(share_of(sizes, index), layout)
    values = (share.input.detach(), layer.weight, layer.bias, share.residual)
    tensors = {
        name: tensor.requires_grad_(need)
        for name, tensor, need in zip(NAMES, values, needs, strict=True)
        if tensor is not None
    }
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    before = stats_of(layer)
    y = layer(tensors["input"], share.residual)
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), share.grad_output), strict=True))

    whole = Whole(batch, sizes, layer.weight, layer.bias, layer.act, layer.eps)
    limits = whole.check(index, share, y, grads)
    if layer.track_running_stats:
        whole.check_running_stats(list(layer.buffers()), before, layer.momentum)
    if group is not None or len(sizes) == distributed.get_world_size():
        for name in [name for name in ("weight", "bias") if name in grads]:
            total, limit = widen(grads[name]), limits[name].clone()
            distributed.all_reduce(total, group=group)
            distributed.all_reduce(limit, group=group)
            assert_within(total, getattr(whole.grads, name), limit, f"grad_{name} summed over the ranks")


def check_same_bits_everywhere(layer: nn.Module, group: Any = None) -> None:
    for name, buffer in layer.named_buffers():
        mine = buffer.double()  # gloo knows no bfloat16; nothing is lost
        everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyone, mine, group=group)
        assert all(same_bits(other, mine) for other in everyone), name

"""Calls with padding, and with ghost batches, against the reference on the values that are normalised together.

The reference gets the values that are not padding as the rows of an (N, C) batch. The padding of input, residual and
gradient is NaN, so that any use of it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import reference
import tolerances
import torch
from cases import make_input
from checks import Inputs, significant_strides
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm_act

EPS, MOMENTUM = 1e-5, 0.1


def positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the channels: that of a mask of valid positions."""
    return (shape[0], *shape[2:])


def random_mask(shape: tuple[int, ...]) -> Tensor:
    """30 % padding, none in the first image; of more than three images the second is all padding."""
    generator = torch.Generator().manual_seed(sum(shape))
    valid = torch.rand(positions(shape), generator=generator) < 0.7
    valid[0] = True
    if shape[0] > 3:
        valid[1] = False
    return valid


def rows_of(data: Tensor, valid: Tensor) -> Tensor:
    """The values that are not padding, as rows: (values, C)."""
    return data.movedim(1, -1)[valid]


def with_garbage(data: Tensor | None, valid: Tensor) -> Tensor | None:
    """The data with NaN at padding, in memory of its own with the same layout."""
    if data is None:
        return None
    filled = torch.where(valid.unsqueeze(1), data, math.nan)
    return torch.empty_like(data).copy_(filled)


def parts_of(valid: Tensor, size: int | None) -> Iterator[Tensor]:
    """The mask of each part of `size` images, in the shape of the whole."""
    images = len(valid) if size is None else size
    for first in range(0, len(valid), images):
        part = torch.zeros_like(valid)
        part[first : first + images] = valid[first : first + images]
        yield part


def check_batch(
    inputs: Inputs, valid: Tensor | None, size: int | None = None, *, training: bool = True, act: Act = None
) -> None:
    """Check output, running statistics and all gradients of a call with the mask `valid`, in parts of `size` images."""
    mask, valid = valid, torch.ones(positions(inputs.input.shape), dtype=torch.bool) if valid is None else valid
    p, dtype = inputs.params, inputs.input.dtype
    x, g, r = (with_garbage(t, valid) for t in (inputs.input, inputs.grad_output, inputs.residual))
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, p.weight, p.bias, r)]
    stats = p.clone()
    options = {"mask": mask, "virtual_batch_size": size}
    y = batch_norm_act(
        leaves[0], *stats[2:], leaves[1], leaves[2], leaves[3], training, MOMENTUM, EPS, act or "identity", **options
    )
    given = [leaf for leaf in leaves if leaf is not None]
    names = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
    grads = dict(zip(names, torch.autograd.grad(y, given, g), strict=False))
    for what, whole in (("output", y), *((k, grads[k]) for k in ("grad_input", "grad_residual") if k in grads)):
        assert rows_of(whole, ~valid).count_nonzero() == 0, f"{what} is not 0 at padding"
        assert not whole.isnan().any(), f"{what} has a NaN"
    assert significant_strides(y) == significant_strides(grads["grad_input"])

    running = tuple(map(reference.widen, p[2:]))
    limits = [torch.zeros_like(running[0])] * 2
    totals = {what: [torch.zeros_like(running[0])] * 2 for what in ("grad_weight", "grad_bias")}
    for part in parts_of(valid, size if training else None):
        rows = rows_of(x, part)
        if not len(rows):
            continue
        residual = None if r is None else rows_of(r, part)
        frozen = {} if training else {"running_mean": p.running_mean, "running_var": p.running_var}
        fwd = reference.forward(rows, p.weight, p.bias, eps=EPS, **frozen, residual=residual, act=act)
        call = {"training": training, "has_residual": r is not None, "act": act}
        limit = tolerances.output(fwd, p.weight, p.bias, dtype, **call)
        assert_within(rows_of(y, part), fwd.output, limit, "output")
        if training:
            limits = [(1 - MOMENTUM) * t for t in limits]
            running = reference.updated_running_stats(*running, fwd, MOMENTUM)
            more = tolerances.running_stats(running, fwd, MOMENTUM, dtype, *(t.dtype for t in p[2:]))
            limits = [a + b for a, b in zip(limits, more, strict=True)]
        expected = reference.backward(rows_of(g, part), fwd, p.weight, training=training, act=act)
        slack = tolerances.slack(rows_of(g, part), fwd, p.weight, p.bias, dtype, **call)
        reaching = expected.residual
        limit = tolerances.grad_input(reaching, fwd, p.weight, dtype, training=training, slack=slack)
        assert_within(rows_of(grads["grad_input"], part), expected.input, limit, "grad_input")
        if r is not None:
            limit = tolerances.grad_residual(reaching, slack, dtype, act)
            assert_within(rows_of(grads["grad_residual"], part), reaching, limit, "grad_residual")
        to = p.weight.dtype
        weight_limit = tolerances.grad_weight(reaching, fwd, dtype, to, training=training, slack=slack)
        for what, value, limit in (
            ("grad_weight", expected.weight, weight_limit),
            ("grad_bias", expected.bias, tolerances.grad_bias(reaching, dtype, to, slack)),
        ):
            totals[what] = [a + b for a, b in zip(totals[what], (value, limit), strict=True)]
    for what, (value, limit) in totals.items():
        rounding = value.abs() * torch.finfo(p.weight.dtype).eps
        assert_within(grads[what], value, limit + rounding, what)
    for after, expected_stat, limit in zip(stats[2:], running, limits, strict=True):
        held = torch.where(expected_stat > torch.finfo(after.dtype).max, math.inf, expected_stat)
        assert_within(after, held, limit, "running statistics")


def make_padded(shape: tuple[int, ...], valid: Tensor, layout: str = "contiguous") -> Tensor:
    padded = with_garbage(make_input(shape, layout), valid)
    assert padded is not None
    return padded

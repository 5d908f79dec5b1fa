"""Batches with padding and ghost batches: bnext's calls, and what people write by hand instead."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.operators import SEED, BatchNorm
from benchmarks.suites import BNEXT, BNEXT_BY_HAND, GHOST, LENGTHS, RANDOM, TORCH_BY_HAND, WHOLE, Case
from bnext import functional

PARTS = 32
VALID = 0.8  # of a random mask


def options(case: Case) -> dict[str, Tensor | int]:
    """The arguments of bnext's functions. Sequences, and rectangles in images, are at least half as long as the
    longest."""
    n, _, *sizes = case.shape
    generator = torch.Generator().manual_seed(SEED)
    if case.variant == GHOST:
        return {"virtual_batch_size": n // PARTS}
    if case.variant == RANDOM:
        return {"mask": torch.rand((n, *sizes), generator=generator) < VALID}
    ends = [torch.randint(size // 2, size + 1, (n, 1), generator=generator) for size in sizes]
    if case.variant == LENGTHS:
        return {"lengths": ends[0].squeeze(1)}
    rows, columns = (torch.arange(size) < end for size, end in zip(sizes, ends, strict=True))
    return {"mask": rows.unsqueeze(2) & columns.unsqueeze(1)}


def on_valid(batch_norm: BatchNorm, valid: Tensor) -> BatchNorm:
    """Batch norm of the valid values, gathered and scattered back."""

    def by_hand(input: Tensor, *how: Tensor | float) -> Tensor:
        values = input.movedim(1, -1)
        output = torch.zeros_like(values)
        output[valid] = batch_norm(values[valid], *how)
        return output.movedim(-1, 1)

    return by_hand


def on_parts(batch_norm: BatchNorm, size: int) -> BatchNorm:
    """Batch norm of one part of the batch after another."""
    return lambda input, *how: torch.cat([batch_norm(part, *how) for part in input.split(size)])


def functions(case: Case) -> dict[str, BatchNorm]:
    """The functions by provider. The mask of the functions by hand is made beforehand."""
    told = options(case)
    if case.variant == GHOST:
        by_hand = partial(on_parts, size=told["virtual_batch_size"])
    else:
        is_mask = "mask" in told
        valid = told["mask"] if is_mask else torch.arange(case.shape[2]) < told["lengths"].unsqueeze(1)
        by_hand = partial(on_valid, valid=valid)
    return {
        WHOLE: functional.batch_norm,
        BNEXT: partial(functional.batch_norm, **told),
        BNEXT_BY_HAND: by_hand(functional.batch_norm),
        TORCH_BY_HAND: by_hand(F.batch_norm),
    }

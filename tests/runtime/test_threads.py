"""The same bits for any number of torch's threads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import DTYPES, FEW_CASES, LARGE_CASES, MEDIUM_CASES, Case, pairwise, same_bits, seed
from checks import call, make_inputs
from marks import FLAGS, PLAIN_OR_ACT, rows
from reference import Act
from torch import Tensor

THREAD_COUNTS = (1, 2, 3, 4, 7)


def forward_and_backward(case: Case, dtype: torch.dtype, training: bool, act: Act, has_residual: bool) -> list[Tensor]:
    """Output, gradients and running statistics of one step."""
    seed(0)
    layout = case.layout if case.layout.startswith("channels_last") else "contiguous"
    x, g, p, residual = make_inputs(*case, dtype, has_residual=has_residual, grad_layout=layout)
    leaves = [t.detach().requires_grad_() for t in (x, p.weight, p.bias, residual) if t is not None]
    added = leaves[3] if has_residual else None
    y = call(leaves[0], p, *leaves[1:3], training, residual=added, act=act)
    return [y, *torch.autograd.grad(y, leaves, g), p.running_mean, p.running_var]


@rows(
    ("case", "dtype", "act", "training", "has_residual"),
    [
        *pairwise([*FEW_CASES, *MEDIUM_CASES], DTYPES, PLAIN_OR_ACT, FLAGS, FLAGS),
        *pairwise(LARGE_CASES, DTYPES, (None, "relu"), FLAGS, FLAGS),
    ],
)
def test_same_bits_for_any_number_of_threads(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, set_threads: Callable[[int], None]
) -> None:
    results = []
    for count in THREAD_COUNTS:
        set_threads(count)
        results.append(forward_and_backward(case, dtype, training, act, has_residual))
    for count, result in zip(THREAD_COUNTS, results, strict=True):
        assert all(map(same_bits, result, results[0])), f"{count} threads"

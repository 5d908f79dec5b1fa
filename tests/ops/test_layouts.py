"""The memory layout of results is the input's, that of sequences (N, C, L) which lie in memory as (N, L, C) and that of
empty tensors too."""

from __future__ import annotations

import pytest
import torch
from cases import ACTS, EMPTY_CASES, Case, Parameters, make_grad, make_input, make_residual, same_bits
from checks import call
from marks import FLAGS, pairs
from reference import Act
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bnext.functional import batch_norm

pytestmark = pytest.mark.kernels


def results(x: Tensor, residual: Tensor | None, g: Tensor, act: Act, training: bool) -> list[Tensor]:
    """Output and gradients of (input, residual, weight, bias)."""
    channels = x.shape[1]
    mean, var, weight, bias = (torch.rand(channels, device=x.device) + 0.5 for _ in range(4))
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    parameters = Parameters(leaves[-2], leaves[-1], mean, var)
    y = call(
        leaves[0], parameters, *parameters[:2], training, residual=None if residual is None else leaves[1], act=act
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, g), mean, var]


@pairs(act=(None, *ACTS), training=FLAGS, has_residual=FLAGS, dtype=(torch.float32, torch.bfloat16))
def test_a_transposed_sequence_is_computed_as_rows(
    act: Act, training: bool, has_residual: bool, dtype: torch.dtype, device: str
) -> None:
    n, c, length = 5, 37, 6
    x, g = (make((n, c, length), "channels_last", dtype, device) for make in (make_input, make_grad))
    residual = make_residual((n, c, length), "channels_last", dtype, device) if has_residual else None

    def rows(sequences: Tensor | None) -> Tensor | None:
        return None if sequences is None else sequences.transpose(1, 2).reshape(n * length, c)

    torch.manual_seed(0)
    got = results(x, residual, g, act, training)
    torch.manual_seed(0)
    want = results(rows(x), rows(residual), rows(g), act, training)
    data = 3 if has_residual else 2  # the output, and what is differentiated in, of the data's size
    for a, b in zip(got[:data], want[:data], strict=True):
        assert a.stride() == x.stride()
        assert same_bits(rows(a), b)
    for a, b in zip(got[data:], want[data:], strict=True):
        assert same_bits(a, b)


@pairs(case=EMPTY_CASES, act=(None, "relu", "gelu"), training=FLAGS)
def test_empty_results_have_the_strides_of_torchs(case: Case, act: Act, training: bool, device: str) -> None:
    x = make_input(*case, device=device)
    output, grad, *_ = results(x, None, x, act, training)
    want = F.batch_norm(x, x.new_zeros(3), x.new_ones(3), training=training)
    assert output.shape == want.shape
    assert output.stride() == want.stride() == grad.stride()


@pytest.mark.not_emulated
@pytest.mark.parametrize("training", [False, True])
def test_an_empty_vector_is_no_data(training: bool) -> None:
    x = torch.empty(0)
    assert batch_norm(x, torch.zeros(0), torch.ones(0), training=training).shape == (0,)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        batch_norm(torch.ones(3), torch.zeros(3), torch.ones(3), training=training)

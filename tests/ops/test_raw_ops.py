"""What only the raw operators have: the mask, the output mask, and arguments that backward may do without."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import ACTS, DTYPES, FEW_ACTS, FEW_CASES, Case, parameter_dtype, same_bits
from marks import FLAGS, MODES, pairs
from raw_ops import Call, keeps_mask
from reference import Act
from refusals import ORDINARY

ONE_SIDED = ("relu", "relu6", ("leaky_relu", -0.5))


def test_training_counts_and_statistics_do_not_depend_on_the_activation() -> None:
    plain = Call(FEW_CASES[3], torch.float32, True, "identity", has_residual=False)
    results = []
    for act in ACTS:
        call = Call(FEW_CASES[3], torch.float32, True, act)
        call.x, call.mean, call.var = plain.x, plain.mean.clone(), plain.var.clone()
        results.append((call.forward()[1], call.mean, call.var))
        assert call.counter.item() == 4
    stats = plain.forward()[1]
    for result in results:
        assert all(map(same_bits, result, (stats, plain.mean, plain.var)))


def mask_rows(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The mask's leading sizes: planes, (N, C), or pixels, (N*spatial,)."""
    n, c, *spatial = shape
    return (n * math.prod(spatial),) if layout.startswith("channels_last") or not spatial else (n, c)


@pairs(case=FEW_CASES, dtype=DTYPES, act=ONE_SIDED, training=FLAGS)
def test_mask_is_a_bit_an_element_and_says_all_that_backward_asks(
    case: Case, dtype: torch.dtype, act: Act, training: bool
) -> None:
    call = Call(case, dtype, training, act)
    plain, stats, no_mask = call.forward(with_mask=False)
    y, same_stats, mask = call.forward(with_mask=True)
    assert same_bits(y, plain)
    assert same_bits(same_stats, stats)
    assert (no_mask.dtype, tuple(no_mask.shape), mask.dtype) == (torch.uint8, (0,), torch.uint8)
    assert tuple(mask.shape[:-1]) == mask_rows(case.shape, case.layout)
    row = case.shape[1] if mask.ndim == 2 else call.x.numel() // (case.shape[0] * case.shape[1])
    assert 8 * mask.shape[-1] >= row
    assert mask.shape[-1] <= -(-row // 8) + 8

    from_mask = call.backward(stats, call.wanted(), mask)
    from_residual = call.backward(stats, call.wanted())
    assert all(map(same_bits, from_mask, from_residual))
    if act == "relu":
        assert torch.equal(from_mask[3], torch.where(y > 0, call.g, 0))


@pytest.mark.kernels
@pairs(case=FEW_CASES, dtype=DTYPES, act=FEW_ACTS, training=FLAGS, with_mask=FLAGS, has_residual=FLAGS)
def test_output_mask_computes_what_is_asked_and_nothing_else(
    case: Case, dtype: torch.dtype, act: Act, training: bool, with_mask: bool, has_residual: bool, device: str
) -> None:
    call = Call(case, dtype, training, act, has_residual, device=device)
    kept = with_mask and keeps_mask(act)
    _, stats, bits = call.forward(with_mask=kept)
    mask = bits if kept else None
    everything = call.backward(stats, call.wanted(), mask)
    assert [t.dtype for t in everything] == [dtype, parameter_dtype(dtype), parameter_dtype(dtype), dtype]
    for asked in itertools.product((True, False), repeat=4):
        if asked[3] and not call.wanted()[3]:
            continue
        for want, got, full in zip(asked, call.backward(stats, asked, mask), everything, strict=True):
            if want:
                assert same_bits(got, full), asked
            else:
                assert got.shape == (0,), asked


@pytest.mark.kernels
@pairs(case=FEW_CASES, act=("identity", *ONE_SIDED), training=FLAGS)
def test_what_no_result_depends_on_may_be_left_out(case: Case, act: Act, training: bool, device: str) -> None:
    # In evaluation with a mask only grad_weight needs the input; in training grad_bias and grad_residual do not.
    call = Call(case, torch.float32, training, act, has_residual=act != "identity", device=device)
    activated = act != "identity"
    _, stats, mask = call.forward(with_mask=activated)
    masks = [(False, False, True, False), (False, False, False, activated)]
    if not training:
        masks += [(True, False, False, activated), (True, False, True, False)]
    for asked in masks:
        expected = call.backward(stats, asked, mask if activated else None)
        without = call.backward(stats, asked, mask if activated else None, input=None, bias=None)
        assert all(map(same_bits, without, expected)), asked


@MODES
def test_with_identity_the_residuals_gradient_is_refused(training: bool) -> None:
    # It is grad_output itself.
    call = Call(FEW_CASES[2], torch.float32, training, "identity")
    _, stats, _ = call.forward()
    with pytest.raises(ORDINARY, match="output_mask"):
        call.backward(stats, (True, True, True, True))

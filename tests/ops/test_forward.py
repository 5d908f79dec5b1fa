"""Forward and backward against the float64 reference: shapes, layouts, dtypes, training, evaluation."""

from __future__ import annotations

import itertools
import re

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    DENSE_CASES,
    DTYPES,
    EMPTY_CASES,
    FEW_ACTS,
    FEW_CASES,
    LARGE_CASES,
    LOW_PRECISION,
    MEDIUM_CASES,
    MISALIGNED_CASES,
    STRIDED_CASES,
    STRIDED_LAYOUTS,
    Case,
    Parameters,
    make_input,
    make_parameters,
    make_residual,
    name,
    pairwise,
    parameter_dtype,
    same_bits,
)
from checks import Inputs, call, check_backward, check_call, check_forward, make_inputs
from marks import EACH_DTYPE, FEW, FLAGS, LARGER_THAN_THE_CACHE, MODES, PLAIN_OR_ACT, pairs, rows
from reference import Act
from tolerances import assert_within
from torch import Tensor

from bnext.functional import batch_norm, batch_norm_act

pytestmark = pytest.mark.kernels

PARAMETERS = ("case", "dtype", "act", "training", "has_residual")
SHAPE = (6, 5, 7, 3)


@pairs(case=[*DENSE_CASES, *MISALIGNED_CASES, *EMPTY_CASES], dtype=DTYPES, training=FLAGS)
def test_every_shape_and_layout(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    check_call(make_inputs(*case, dtype, device), training=training)


@pytest.mark.not_emulated
@rows(
    PARAMETERS,
    [
        *pairwise([*DENSE_CASES, *EMPTY_CASES], DTYPES, FEW_ACTS, FLAGS, FLAGS),
        *pairwise([*STRIDED_CASES, *LARGE_CASES], DTYPES, (None, "relu", "gelu"), FLAGS, FLAGS),
    ],
)
def test_every_shape_with_an_epilogue(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    inputs = make_inputs(*case, dtype, device, has_residual)
    check_call(inputs, training=training, act=act)


@pytest.mark.parametrize(("layout", "dtype"), [("contiguous", torch.float32), ("channels_last", torch.bfloat16)])
@pairs(act=ACTS, training=FLAGS, has_residual=FLAGS)
def test_every_activation(
    layout: str, dtype: torch.dtype, act: Act, has_residual: bool, training: bool, device: str
) -> None:
    inputs = make_inputs((3, 5, 5, 3), layout, dtype, device, has_residual, grad_layout=layout)
    check_call(inputs, training=training, act=act)


@pytest.mark.not_emulated
@LARGER_THAN_THE_CACHE
def test_outputs_larger_than_the_cache(layout: str, act: Act, training: bool, dtype: torch.dtype, device: str) -> None:
    # 35 MB: non-temporal stores begin at 24 MB, and fresh mappings for each tensor at 32 MB.
    shape = (44 // dtype.itemsize, 64, 112, 112)
    x, g, params, residual = make_inputs(shape, layout, dtype, device, act is not None, grad_layout=layout)
    check_backward(x, g, params, training=training, residual=residual, act=act, output_too=True)


@rows(
    PARAMETERS,
    [
        *pairwise([*FEW_CASES, *MEDIUM_CASES], (torch.float32, torch.bfloat16), (None, "relu", "gelu"), FLAGS, FLAGS),
        *pairwise(MEDIUM_CASES[:1], (torch.float32,), ACTS, FLAGS, FLAGS),
    ],
)
def test_every_instruction_set(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, isa: str
) -> None:
    inputs = make_inputs(*case, dtype, has_residual=has_residual, grad_layout=case.layout)
    check_call(inputs, training=training, act=act)


@pytest.mark.not_emulated
@pairs(
    grad_layout=("contiguous", "channels_last", "offset", "sliced", "transposed", "expanded", "expanded_channels"),
    residual_layout=("contiguous", "channels_last", *STRIDED_LAYOUTS[4]),
    layout=("contiguous", "channels_last", "sliced"),
    dtype=(torch.float32, torch.bfloat16),
    act=(None, "relu", "silu"),
    training=FLAGS,
)
def test_grad_output_and_residual_of_any_stride(
    grad_layout: str, residual_layout: str, layout: str, dtype: torch.dtype, act: Act, training: bool, device: str
) -> None:
    # The result has the input's layout, and the bits that it has with a residual in the input's layout.
    inputs = make_inputs(SHAPE, layout, dtype, device, grad_layout=grad_layout)
    residual = make_residual(SHAPE, residual_layout, dtype, device)
    y, *_ = check_call(inputs._replace(residual=residual if act else None), training=training, act=act)
    if act:
        alike = torch.empty_strided(SHAPE, y.stride(), dtype=dtype, device=device).copy_(residual)
        assert same_bits(y, check_forward(inputs.input, inputs.params, training=training, residual=alike, act=act))


@pairs(act=(None, "relu", "gelu"), training=FLAGS, has_residual=FLAGS, dtype=(torch.float32, torch.bfloat16))
def test_a_transposed_sequence_is_computed_as_rows(
    act: Act, training: bool, has_residual: bool, dtype: torch.dtype, device: str
) -> None:
    # An (N, C, L) input in (N, L, C) memory has the bits of the (N*L, C) input in the same memory.
    inputs = make_inputs((5, 37, 6), "channels_last", dtype, device, has_residual, grad_layout="channels_last")

    def as_rows(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.ndim < 3 else t.transpose(1, 2).reshape(-1, 37)

    x, g, params, residual = inputs
    expected = check_call(Inputs(as_rows(x), as_rows(g), params, as_rows(residual)), training=training, act=act)
    assert all(map(same_bits, map(as_rows, check_call(inputs, training=training, act=act)), expected))


@MODES
def test_a_vector_is_taken_only_if_it_is_empty(training: bool) -> None:
    assert batch_norm(torch.empty(0), torch.zeros(0), torch.ones(0), training=training).shape == (0,)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        batch_norm(torch.ones(3), torch.zeros(3), torch.ones(3), training=training)


@pairs(case=FEW_CASES, act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_grad_output_expanded_from_one_number(
    case: Case, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    # y.sum().backward() passes a gradient whose strides are zero.
    g = torch.tensor(0.75, device=device).expand(case.shape)
    inputs = make_inputs(*case, device=device, has_residual=has_residual)
    check_call(inputs._replace(grad_output=g), training=training, act=act)


@pairs(
    mix=["".join(choices) for choices in itertools.product("if", repeat=4)],
    dtype=(torch.float64, *LOW_PRECISION),
    layout=("contiguous", "channels_last"),
    act=(None, "relu", "gelu"),
    training=FLAGS,
    has_residual=FLAGS,
)
def test_every_mix_of_parameter_dtypes(
    mix: str, dtype: torch.dtype, layout: str, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    # A letter for each of weight, bias, running_mean and running_var: i is the input's dtype, f is float32.
    params = make_parameters(5, tuple(torch.float32 if choice == "f" else dtype for choice in mix), device)
    inputs = make_inputs((3, 5, 5, 3), layout, dtype, device, has_residual)
    check_call(inputs._replace(params=params), training=training, act=act)


@pairs(
    case=FEW_CASES,
    missing=("none", "bias", "weight", "weight+bias"),
    act=PLAIN_OR_ACT,
    training=FLAGS,
    has_residual=FLAGS,
)
def test_weight_and_bias_are_optional(
    case: Case, missing: str, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    inputs = make_inputs(*case, device=device, has_residual=has_residual)
    params = inputs.params._replace(**{what: None for what in ("weight", "bias") if what in missing})
    check_call(inputs._replace(params=params), training=training, act=act)


@pairs(momentum=(0.0, 0.1, 0.5, 1.0), eps=(1e-12, 1e-8, 1e-5, 1.0), act=(None, "silu"))
def test_momentum_and_eps(momentum: float, eps: float, act: Act, device: str) -> None:
    x, _, params, residual = make_inputs(SHAPE, device=device, has_residual=act is not None)
    check_forward(x, params, training=True, momentum=momentum, eps=eps, residual=residual, act=act)
    check_forward(x, params, training=False, eps=eps, residual=residual, act=act)


@pairs(shape=((1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)), act=PLAIN_OR_ACT)
def test_one_value_a_channel(shape: tuple[int, ...], act: Act, device: str) -> None:
    x, _, params, residual = make_inputs(shape, device=device, has_residual=act is not None)
    check_forward(x, params, training=False, residual=residual, act=act)
    kept = params.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as theirs:
        torch.nn.functional.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        call(x, params, params.weight, params.bias, True, residual=residual, act=act)
    assert all(map(same_bits, params, kept))


@MODES
@EACH_DTYPE
def test_save_stats_are_mean_and_invstd_in_float64(dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(SHAPE, "channels_last", dtype, device)
    p = make_parameters(5, parameter_dtype(dtype), device)
    if training:
        fwd = reference.forward(x)
        _, stats, _ = torch.ops.bnext.batch_norm_train(x, p.weight, p.bias, None, None, None, 0.1, 1e-5)
    else:
        fwd = reference.forward(x, running_mean=p.running_mean, running_var=p.running_var)
        _, stats, _ = torch.ops.bnext.batch_norm_eval(x, p.weight, p.bias, p.running_mean, p.running_var, 1e-5)
    assert stats.dtype == torch.float64
    expected = torch.stack([fwd.mean, fwd.invstd])
    # In eval mode the mean is copied; 1/sqrt takes three roundings in double, the reference's as many.
    relative = tolerances.statistics(fwd.count, dtype) if training else 0.0
    limit = torch.stack([fwd.var.sqrt() * relative, fwd.invstd * (relative + 6 * 2.0**-53)])
    assert_within(stats, expected, limit, "save_stats")


@pytest.mark.not_emulated
@pytest.mark.parametrize("case", STRIDED_CASES, ids=name)
def test_strides_do_not_change_a_bit_of_the_result(case: Case, device: str) -> None:
    # A tensor of any strides is copied at most once, and passes through the same kernel as a dense one.
    x = make_input(*case, torch.float32, device)
    params = make_parameters(case.shape[1], device=device)
    dense = torch.empty_strided(x.shape, batch_norm(x, *params[2:]).stride(), device=device).copy_(x)
    for training in (True, False):
        results = [batch_norm(t, *params.clone()[2:], *params[:2], training) for t in (x, dense)]
        assert same_bits(*results)


@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_grad_mode_does_not_change_the_result(act: Act, training: bool, has_residual: bool, device: str) -> None:
    # Only a call with gradients may keep a mask.
    x, _, p, residual = make_inputs(SHAPE, device=device, has_residual=has_residual)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return call(x, p.clone(), weight, p.bias, training, residual=residual, act=act)

    tracked = run(x.clone().requires_grad_(), p.weight.clone().requires_grad_())
    plain = run(x, p.weight)
    with torch.no_grad():
        without = run(x.clone().requires_grad_(), p.weight)
    with torch.inference_mode():
        inference = run(x, p.weight)
    assert tracked.requires_grad
    assert not plain.requires_grad
    assert not without.requires_grad
    assert inference.is_inference()
    for y in (plain, without, inference):
        assert same_bits(y, tracked)


@pairs(act=PLAIN_OR_ACT, training=FLAGS)
def test_output_is_a_tensor_of_its_own(act: Act, training: bool, device: str) -> None:
    # Mean 0 and variance 1 - eps change nothing. Still the output shares no memory with input or residual.
    x, zeros = torch.tensor([[-1.0], [1.0]], device=device), torch.zeros(2, 1, device=device)
    for residual in (None, zeros, x):
        kept, zero = x.clone(), torch.zeros(1, device=device)
        stats = Parameters(zero, zero, zero.clone(), zero + 1 - 1e-5)
        call(x, stats, None, None, training, residual=residual, act=act).fill_(5)
        assert torch.equal(x, kept)
        assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.not_emulated
@pairs(case=FEW_CASES, dtype=DTYPES, training=FLAGS)
def test_identity_has_the_bits_of_plain_batch_norm(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    inputs = make_inputs(*case, dtype, device, has_residual=True)
    without = inputs._replace(residual=None)
    plain = check_call(without, training=training)
    assert all(map(same_bits, check_call(without, training=training, act="identity"), plain))
    _, *added, grad_residual = check_call(inputs, training=training, act="identity")
    assert all(map(same_bits, added, plain[1:]))
    assert same_bits(grad_residual, inputs.grad_output)
    p = [inputs.params.clone() for _ in range(3)]
    expected = batch_norm(inputs.input, *p[0][2:], *p[0][:2], training)
    for kept, act in zip(p[1:], ("identity", None), strict=True):
        y = batch_norm_act(inputs.input, *kept[2:], *kept[:2], None, training, act=act)
        assert same_bits(y, expected)
        assert all(map(same_bits, kept, p[0]))


@pytest.mark.not_emulated
@MODES
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.0, 3.0, -1.0, 1], ids=str)
def test_any_finite_slope(slope: float, training: bool, device: str) -> None:
    # For a slope above 1, max(z, slope*z) would be wrong.
    inputs = make_inputs(SHAPE, device=device, has_residual=True)
    for each in (inputs, inputs._replace(residual=None)):
        results = check_call(each, training=training, act=("leaky_relu", slope))
        if slope == 0.01:
            assert all(map(same_bits, results, check_call(each, training=training, act="leaky_relu")))


@pytest.mark.not_emulated
@MODES
@FEW
def test_the_input_may_be_its_own_residual(act: Act, training: bool, device: str) -> None:
    for case in FEW_CASES:
        x, g, p, _ = make_inputs(*case, device=device)
        leaf = x.detach().requires_grad_()
        y = batch_norm_act(leaf, *p.clone()[2:], *p[:2], leaf, training, act=act)
        (total,) = torch.autograd.grad(y, leaf, g)
        _, grad_input, *_, grad_residual = check_call(Inputs(x, g, p, x), training=training, act=act)
        assert same_bits(total, grad_input + grad_residual)

"""The forward pass against the float64 reference: contract section 2, rows shapes, layouts, dtypes, training, eval.

Of the plain op, and of act(batch_norm(input) + residual): without a residual, an `act` of None is the plain op.
"""

from __future__ import annotations

import itertools

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    DENSE_CASES,
    DTYPES,
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
    parameter_dtype,
    same_bits,
    without_repeats,
)
from checks import call, check_forward
from marks import EACH_DTYPE, EVERY_ACT, FEW, FLAGS, LARGER_THAN_THE_CACHE, MODES, PLAIN_OR_ACT, pairs
from reference import Act
from tolerances import assert_within

from bnext.functional import batch_norm, batch_norm_act

pytestmark = pytest.mark.kernels

# Of each kernel in either layout, at either width.
EITHER_LAYOUT = [
    (Case((3, 5, 5, 3), "contiguous"), torch.float32),
    (Case((3, 5, 5, 3), "channels_last"), torch.bfloat16),
]


@pairs(case=[*DENSE_CASES, *MISALIGNED_CASES], dtype=DTYPES, training=FLAGS)
def test_every_shape_and_layout(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    check_forward(x, make_parameters(case.shape[1], parameter_dtype(dtype), device), training=training)


@pytest.mark.not_emulated
@pairs(case=DENSE_CASES, dtype=DTYPES, act=FEW_ACTS, training=FLAGS, has_residual=FLAGS)
def test_every_shape_with_an_epilogue(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x = make_input(*case, dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    check_forward(x, params, training=training, residual=residual, act=act)


@pytest.mark.not_emulated  # they are copied above the kernels
@pairs(case=STRIDED_CASES, dtype=DTYPES, act=(None, "relu", "gelu"), training=FLAGS, has_residual=FLAGS)
def test_every_stride_pattern(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x = make_input(*case, dtype, device)
    residual = make_residual(case.shape, without_repeats(case.layout), dtype, device) if has_residual else None
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    check_forward(x, params, training=training, residual=residual, act=act)


@pytest.mark.parametrize(("case", "dtype"), EITHER_LAYOUT, ids=name)
@pairs(act=ACTS, training=FLAGS, has_residual=FLAGS)
def test_every_activation(
    case: Case, dtype: torch.dtype, act: Act, has_residual: bool, training: bool, device: str
) -> None:
    x = make_input(*case, dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    check_forward(x, make_parameters(5, device=device), training=training, residual=residual, act=act)


@pytest.mark.not_emulated
@pairs(case=LARGE_CASES, dtype=DTYPES, act=(None, "relu", "gelu"), training=FLAGS, has_residual=FLAGS)
def test_across_chunks(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x = make_input(*case, dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    check_forward(x, params, training=training, residual=residual, act=act)


@pytest.mark.not_emulated
@LARGER_THAN_THE_CACHE
def test_output_larger_than_the_cache(layout: str, act: Act, training: bool, dtype: torch.dtype, device: str) -> None:
    # 35 MB: past the 24 MB from which stores go round the cache, past the 32 MB from which each tensor is a fresh
    # mapping.
    shape = (44 // dtype.itemsize, 64, 112, 112)
    x = make_input(shape, layout, dtype, device)
    residual = make_residual(shape, layout, dtype, device) if act else None
    check_forward(x, make_parameters(64, dtype, device), training=training, residual=residual, act=act)


@pairs(
    case=[*FEW_CASES, *MEDIUM_CASES],
    dtype=(torch.float32, torch.bfloat16),
    act=(None, "relu", "gelu"),
    training=FLAGS,
    has_residual=FLAGS,
)
def test_every_instruction_set(
    case: Case, dtype: torch.dtype, act: Act, training: bool, has_residual: bool, isa: str
) -> None:
    x = make_input(*case, dtype)
    residual = make_residual(*case, dtype) if has_residual else None
    check_forward(x, make_parameters(case.shape[1]), training=training, residual=residual, act=act)


@EVERY_ACT
def test_every_activation_on_every_instruction_set(act: Act, isa: str) -> None:
    x, residual = make_input(*MEDIUM_CASES[0]), make_residual(*MEDIUM_CASES[0])
    for training, added in ((True, residual), (False, None)):
        check_forward(x, make_parameters(3), training=training, residual=added, act=act)


@pairs(
    mix=["".join(choices) for choices in itertools.product("if", repeat=4)],
    dtype=(torch.float64, *LOW_PRECISION),
    layout=("contiguous", "channels_last"),
    act=(None, "relu", "gelu"),
    training=FLAGS,
)
def test_every_mix_of_parameter_dtypes(
    mix: str, dtype: torch.dtype, layout: str, act: Act, training: bool, device: str
) -> None:
    # i: the input's dtype, f: float32; for weight, bias, running_mean, running_var.
    params = make_parameters(5, tuple(torch.float32 if choice == "f" else dtype for choice in mix), device)
    x = make_input((3, 5, 5, 3), layout, dtype, device)
    residual = make_residual((3, 5, 5, 3), layout, dtype, device) if act else None
    check_forward(x, params, training=training, residual=residual, act=act)


@pairs(
    case=FEW_CASES,
    given=("weight+bias", "weight", "bias", "neither"),
    act=PLAIN_OR_ACT,
    training=FLAGS,
    has_residual=FLAGS,
)
def test_weight_and_bias_are_optional(
    case: Case, given: str, act: Act, training: bool, has_residual: bool, device: str
) -> None:
    x = make_input(*case, torch.float32, device)
    residual = make_residual(case.shape, device=device) if has_residual else None
    params = make_parameters(case.shape[1], torch.float32, device)
    weight = params.weight if "weight" in given else None
    bias = params.bias if "bias" in given else None
    frozen = {} if training else {"running_mean": params.running_mean, "running_var": params.running_var}
    fwd = reference.forward(x, weight, bias, **frozen, residual=residual, act=act)
    y = call(x, params, weight, bias, training, residual=residual, act=act)
    limit = tolerances.output(fwd, weight, bias, x.dtype, training=training, has_residual=has_residual, act=act)
    assert_within(y, fwd.output, limit, "output")


@pairs(momentum=(0.0, 0.1, 0.5, 1.0), eps=(1e-12, 1e-5, 1.0), act=(None, "silu"))
def test_momentum_and_eps(momentum: float, eps: float, act: Act, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device)
    residual = make_residual((6, 5, 7, 3), device=device) if act else None
    params = make_parameters(5, device=device)
    check_forward(x, params, training=True, momentum=momentum, eps=eps, residual=residual, act=act)
    check_forward(x, params, training=False, eps=eps, residual=residual, act=act)


@pairs(shape=((1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)), act=PLAIN_OR_ACT)
def test_one_value_a_channel(shape: tuple[int, ...], act: Act, device: str) -> None:
    x, params = make_input(shape, device=device), make_parameters(3, device=device)
    residual = make_residual(shape, device=device) if act else None
    check_forward(x, params, training=False, residual=residual, act=act)
    kept = params.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        call(x, params, params.weight, params.bias, True, residual=residual, act=act)
    assert all(map(same_bits, params, kept))


@MODES
@EACH_DTYPE
def test_save_stats_are_mean_and_invstd_in_float64(dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), "channels_last", dtype, device)
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
    # "At most one copy": whatever the strides, the values pass through the same kernel as a dense tensor's.
    x = make_input(*case, torch.float32, device)
    params = make_parameters(case.shape[1], device=device)
    dense = torch.empty_strided(x.shape, batch_norm(x, *params[2:]).stride(), device=device).copy_(x)
    for training in (True, False):
        results = [batch_norm(t, *params.clone()[2:], *params[:2], training) for t in (x, dense)]
        assert same_bits(*results)


def test_channels_are_independent(device: str) -> None:
    # The result of a channel is the same bits whichever channels surround it.
    for case in FEW_CASES:
        x = make_input(*case, torch.float32, device)
        other = x.clone(memory_format=torch.preserve_format)
        other[:, 1:] = other[:, 1:] * -3 + 1
        a, b = (batch_norm(t, None, None, training=True)[:, 0] for t in (x, other))
        assert same_bits(a, b), case


@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_grad_mode_does_not_change_the_result(act: Act, training: bool, has_residual: bool, device: str) -> None:
    # With gradients the op may keep a mask, without it does not.
    x = make_input((6, 5, 7, 3), device=device)
    residual = make_residual((6, 5, 7, 3), device=device) if has_residual else None
    p = make_parameters(5, device=device)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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
    # Even where nothing is to be done (mean 0, variance 1 - eps): writing to the output reaches neither the input
    # nor the residual.
    x, zeros = torch.tensor([[-1.0], [1.0]], device=device), torch.zeros(2, 1, device=device)
    for residual in (None, zeros, x):
        kept, zero = x.clone(), torch.zeros(1, device=device)
        stats = Parameters(zero, zero, zero.clone(), zero + 1 - 1e-5)
        call(x, stats, None, None, training, residual=residual, act=act).fill_(5)
        assert torch.equal(x, kept)
        assert torch.equal(zeros, torch.zeros_like(zeros))


@pytest.mark.not_emulated
@pairs(
    added=("contiguous", "channels_last", *STRIDED_LAYOUTS[4]),
    layout=("contiguous", "channels_last", "sliced"),
    act=("relu", "silu"),
    training=FLAGS,
)
def test_residual_of_any_stride(added: str, layout: str, act: Act, training: bool, device: str) -> None:
    # Whatever its strides, the result has the input's layout and the bits of a residual that is laid out as the input.
    shape = (6, 5, 7, 3)
    x, residual = make_input(shape, layout, device=device), make_residual(shape, added, device=device)
    params = make_parameters(5, device=device)
    y = check_forward(x, params, training=training, residual=residual, act=act)
    alike = torch.empty_strided(shape, y.stride(), device=device).copy_(residual)
    assert same_bits(y, check_forward(x, params, training=training, residual=alike, act=act))


@pytest.mark.not_emulated
@pairs(case=FEW_CASES, dtype=DTYPES, training=FLAGS)
def test_identity_has_the_bits_of_plain_batch_norm(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    p = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    stats = [p.clone() for _ in range(3)]
    expected = batch_norm(x, stats[0].running_mean, stats[0].running_var, p.weight, p.bias, training)
    for kept, act in zip(stats[1:], ("identity", None), strict=True):
        y = batch_norm_act(x, kept.running_mean, kept.running_var, p.weight, p.bias, None, training, act=act)
        assert same_bits(y, expected)
        assert y.stride() == expected.stride()
        assert all(map(same_bits, kept, stats[0]))


@pytest.mark.not_emulated
@MODES
def test_relu_is_the_default(training: bool, device: str) -> None:
    x, residual = make_input((6, 5, 7, 3), device=device), make_residual((6, 5, 7, 3), device=device)
    p = make_parameters(5, device=device)
    default, named = (
        batch_norm_act(x, stats.running_mean, stats.running_var, residual=residual, training=training, **options)
        for stats, options in ((p.clone(), {}), (p.clone(), {"act": "relu"}))
    )
    assert same_bits(default, named)
    assert (default >= 0).all()


@pytest.mark.not_emulated
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.0, 3.0, -1.0, 1], ids=str)
def test_any_finite_slope(slope: float, device: str) -> None:
    x, residual = make_input((6, 5, 7, 3), device=device), make_residual((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    y = check_forward(x, params, training=True, residual=residual, act=("leaky_relu", slope))
    if slope == 0.01:
        assert same_bits(y, check_forward(x, params, training=True, residual=residual, act="leaky_relu"))


@pytest.mark.not_emulated
@MODES
@FEW
def test_the_input_may_be_its_own_residual(act: Act, training: bool, device: str) -> None:
    for case in FEW_CASES:
        x = make_input(*case, device=device)
        params = make_parameters(case.shape[1], device=device)
        check_forward(x, params, training=training, residual=x, act=act)

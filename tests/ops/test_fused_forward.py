"""act(batch_norm(input) + residual) against the float64 reference, on every shape, layout and dtype of the plain op."""

from __future__ import annotations

import itertools

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    CASES,
    DTYPES,
    FEW_ACTS,
    FEW_CASES,
    LARGE_CASES,
    LOW_PRECISION,
    MEDIUM_CASES,
    STRIDED_LAYOUTS,
    Case,
    crossed,
    make_input,
    make_parameters,
    make_residual,
    name,
    parameter_dtype,
    same_bits,
)
from checks import check_forward
from reference import Act
from tolerances import assert_within

from bnext.functional import batch_norm, batch_norm_act

pytestmark = pytest.mark.kernels

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])
EVERY_ACT = pytest.mark.parametrize("act", ACTS, ids=name)
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)

# What the emulator has time for: each kernel once in either layout, at either width.
EMULATED = [
    (Case((3, 5, 5, 3), "contiguous"), torch.float32),
    (Case((3, 5, 5, 3), "channels_last"), torch.bfloat16),
]


def residual_layout(case: Case) -> str:
    """The layout of the case if it can be had without repeating values, so that kernels meet no copy."""
    return "contiguous" if case.layout.startswith("expanded") else case.layout


@MODES
@RESIDUAL
@EVERY_ACT
@pytest.mark.parametrize(("case", "dtype"), EMULATED, ids=name)
def test_every_activation(
    case: Case, dtype: torch.dtype, act: Act, has_residual: bool, training: bool, device: str
) -> None:
    x = make_input(*case, dtype, device)
    residual = make_residual(*case, dtype, device) if has_residual else None
    check_forward(x, make_parameters(5, device=device), training=training, residual=residual, act=act)


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_every_rank(case: Case, training: bool, device: str) -> None:
    x, residual = make_input(*case, device=device), make_residual(case.shape, device=device)
    check_forward(x, make_parameters(case.shape[1], device=device), training=training, residual=residual, act="relu")


@pytest.mark.too_large_for_simt
@FEW
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_shape_and_layout(case: Case, dtype: torch.dtype, act: Act, device: str) -> None:
    x = make_input(*case, dtype, device)
    residual = make_residual(case.shape, residual_layout(case), dtype, device)
    params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
    for training, added in itertools.product((True, False), (None, residual)):
        check_forward(x, params, training=training, residual=added, act=act)


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("case", LARGE_CASES, ids=name)
def test_across_chunks(case: Case, act: Act, training: bool, device: str) -> None:
    x, residual = make_input(*case, device=device), make_residual(*case, device=device)
    check_forward(x, make_parameters(case.shape[1], device=device), training=training, residual=residual, act=act)


@pytest.mark.too_large_for_simt
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_larger_than_the_cache(layout: str, device: str) -> None:
    shape = (11, 64, 112, 112)  # 35 MB, see test_forward
    x, residual = make_input(shape, layout, device=device), make_residual(shape, layout, device=device)
    check_forward(x, make_parameters(64, device=device), training=True, residual=residual, act="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize(("case", "act"), crossed([*FEW_CASES, *MEDIUM_CASES]), ids=name)
def test_every_instruction_set(case: Case, dtype: torch.dtype, act: Act, isa: str) -> None:
    x, residual = make_input(*case, dtype), make_residual(*case, dtype)
    for training, added in itertools.product((True, False), (None, residual)):
        check_forward(x, make_parameters(case.shape[1]), training=training, residual=added, act=act)


@pytest.mark.too_large_for_simt
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("mix", list(itertools.product("if", repeat=4)), ids="".join)
@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=name)
def test_every_mix_of_parameter_dtypes(dtype: torch.dtype, mix: tuple[str, ...], act: Act, device: str) -> None:
    # i: the input's dtype, f: float32; for weight, bias, running_mean, running_var.
    params = make_parameters(5, tuple(torch.float32 if choice == "f" else dtype for choice in mix), device)
    for layout, training in itertools.product(("contiguous", "channels_last"), (True, False)):
        x = make_input((3, 5, 5, 3), layout, dtype, device)
        residual = make_residual((3, 5, 5, 3), layout, dtype, device)
        check_forward(x, params, training=training, residual=residual, act=act)


@pytest.mark.too_large_for_simt
@MODES
@RESIDUAL
@FEW
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_weight_and_bias_are_optional(given: str, act: Act, has_residual: bool, training: bool, device: str) -> None:
    for case in FEW_CASES:
        x = make_input(*case, device=device)
        residual = make_residual(case.shape, device=device) if has_residual else None
        p = make_parameters(case.shape[1], device=device)
        weight, bias = p.weight if given == "weight" else None, p.bias if given == "bias" else None
        frozen = {} if training else {"running_mean": p.running_mean, "running_var": p.running_var}
        fwd = reference.forward(x, weight, bias, **frozen, residual=residual, act=act)
        limit = tolerances.output(
            fwd, weight, bias, x.dtype, training=training, has_residual=residual is not None, act=act
        )
        y = batch_norm_act(x, p.running_mean, p.running_var, weight, bias, residual, training, act=act)
        assert_within(y, fwd.output, limit, f"output, {case}")


@pytest.mark.too_large_for_simt
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_momentum_and_eps(momentum: float, eps: float, device: str) -> None:
    x, residual = make_input((6, 5, 7, 3), device=device), make_residual((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    check_forward(x, params, training=True, momentum=momentum, eps=eps, residual=residual, act="silu")
    check_forward(x, params, training=False, eps=eps, residual=residual, act="silu")


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("added", ["contiguous", "channels_last", *STRIDED_LAYOUTS[4]])
def test_residual_of_any_stride(added: str, layout: str, act: Act, training: bool, device: str) -> None:
    # Whatever its strides, the result has the input's layout and the bits of a residual that is laid out as the input.
    shape = (6, 5, 7, 3)
    x, residual = make_input(shape, layout, device=device), make_residual(shape, added, device=device)
    params = make_parameters(5, device=device)
    y = check_forward(x, params, training=training, residual=residual, act=act)
    alike = torch.empty_strided(shape, y.stride(), device=device).copy_(residual)
    assert same_bits(y, check_forward(x, params, training=training, residual=alike, act=act))


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
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


@pytest.mark.too_large_for_simt
@MODES
def test_the_activation_does_not_reach_the_statistics(training: bool, device: str) -> None:
    x, residual = make_input((6, 5, 7, 3), device=device), make_residual((6, 5, 7, 3), device=device)
    expected = make_parameters(5, device=device)
    results = [expected.clone() for _ in ACTS]
    batch_norm(x, expected.running_mean, expected.running_var, None, None, training)
    for act, stats in zip(ACTS, results, strict=True):
        batch_norm_act(x, stats.running_mean, stats.running_var, None, None, residual, training, act=act)
        assert all(map(same_bits, stats, expected)), act


@pytest.mark.too_large_for_simt
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


@pytest.mark.too_large_for_simt
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.2, 1.0, 3.0, -1.0, 1], ids=str)
def test_any_finite_slope(slope: float, device: str) -> None:
    x, residual = make_input((6, 5, 7, 3), device=device), make_residual((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    y = check_forward(x, params, training=True, residual=residual, act=("leaky_relu", slope))
    if slope == 0.01:
        assert same_bits(y, check_forward(x, params, training=True, residual=residual, act="leaky_relu"))


@pytest.mark.too_large_for_simt
@MODES
@FEW
def test_the_input_may_be_its_own_residual(act: Act, training: bool, device: str) -> None:
    for case in FEW_CASES:
        x = make_input(*case, device=device)
        params = make_parameters(case.shape[1], device=device)
        check_forward(x, params, training=training, residual=x, act=act)


@pytest.mark.too_large_for_simt
@RESIDUAL
@FEW
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 5), (0, 3, 2, 2, 2), (2, 3, 0), (2, 3, 0, 4)], ids=str)
def test_empty_batch_leaves_the_stats_alone(shape: tuple[int, ...], act: Act, has_residual: bool, device: str) -> None:
    for dtype, training in itertools.product(DTYPES, (True, False)):
        x = torch.empty(shape, dtype=dtype, device=device)
        p = make_parameters(3, parameter_dtype(dtype), device)
        kept = p.clone()
        residual = torch.empty_like(x) if has_residual else None
        y = batch_norm_act(x, p.running_mean, p.running_var, p.weight, p.bias, residual, training, act=act)
        assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
        assert all(map(same_bits, p, kept))


@pytest.mark.too_large_for_simt
@FEW
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_a_channel(shape: tuple[int, ...], act: Act, device: str) -> None:
    x, residual = make_input(shape, device=device), make_residual(shape, device=device)
    p = make_parameters(3, device=device)
    check_forward(x, p, training=False, residual=residual, act=act)
    kept = p.clone()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm_act(x, p.running_mean, p.running_var, p.weight, p.bias, residual, True, act=act)
    assert all(map(same_bits, p, kept))


@pytest.mark.too_large_for_simt
@MODES
@RESIDUAL
@FEW
def test_grad_mode_does_not_change_the_result(act: Act, has_residual: bool, training: bool, device: str) -> None:
    # With gradients the op may keep a mask, without it does not.
    x = make_input((6, 5, 7, 3), device=device)
    residual = make_residual((6, 5, 7, 3), device=device) if has_residual else None
    p = make_parameters(5, device=device)

    def run(x: torch.Tensor) -> torch.Tensor:
        stats = p.clone()
        return batch_norm_act(x, stats.running_mean, stats.running_var, p.weight, p.bias, residual, training, act=act)

    tracked, plain = run(x.clone().requires_grad_()), run(x)
    with torch.inference_mode():
        inference = run(x)
    assert tracked.requires_grad
    assert not plain.requires_grad
    assert same_bits(plain, tracked)
    assert same_bits(inference, tracked)


@pytest.mark.too_large_for_simt
@MODES
@FEW
def test_output_is_a_tensor_of_its_own(act: Act, training: bool, device: str) -> None:
    # Even where nothing is to be done: writing to the output must reach neither the input nor the residual.
    x, residual = torch.tensor([[-1.0], [1.0]], device=device), torch.zeros(2, 1, device=device)
    var = torch.ones(1, device=device) - 1e-5
    for added in (None, residual, x):
        kept = x.clone()
        batch_norm_act(x, torch.zeros(1, device=device), var.clone(), residual=added, training=training, act=act).fill_(
            5
        )
        assert torch.equal(x, kept)
        assert torch.equal(residual, torch.zeros_like(residual))

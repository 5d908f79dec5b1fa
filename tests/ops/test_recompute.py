"""batch_norm_recompute gives the bits of a forward operator's output from what that operator saved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import (
    ACTS,
    DTYPES,
    EMPTY_CASES,
    FEW_ACTS,
    FEW_CASES,
    LARGE_CASES,
    LOW_PRECISION,
    MEDIUM_CASES,
    Case,
    make_input,
    make_residual,
    same_bits,
    to_layout,
)
from checks import assert_predicts
from marks import FEW, FLAGS, MODES, each, pairs
from raw_ops import Call, act_args
from reference import Act
from torch import Tensor

recompute = torch.ops.bnext.batch_norm_recompute
SEQUENCE = Case((4, 3, 6), "channels_last")
ODD_CASES = [Case((1, 1, 9, 11), "contiguous"), Case((5, 130, 1, 1), "channels_last"), SEQUENCE, *EMPTY_CASES]


def assert_recomputes(call: Call) -> None:
    """Asserts that the recomputed output has the bits and the strides of the call's."""
    y, stats, _ = call.forward()
    recomputed = recompute(call.x, stats, call.weight, call.bias, call.residual, **act_args(call.act))
    assert same_bits(recomputed, y)
    assert recomputed.stride() == y.stride()


@pytest.mark.kernels
@pairs(
    case=[*FEW_CASES, *ODD_CASES],
    act=ACTS,
    dtype=DTYPES,
    missing=("", "weight", "bias", "weight bias"),
    training=FLAGS,
    has_residual=FLAGS,
)
def test_every_call_is_recomputed(
    case: Case, act: Act, dtype: torch.dtype, missing: str, training: bool, has_residual: bool, device: str
) -> None:
    assert_recomputes(Call(case, dtype, training, act, has_residual, device=device, missing=missing))


@FEW
@each(case=MEDIUM_CASES)
def test_every_instruction_set_recomputes(case: Case, act: Act, isa: str) -> None:
    for training, has_residual in ((True, True), (False, False)):
        assert_recomputes(Call(case, torch.float32, training, act, has_residual))


@each(case=LARGE_CASES[:4])
def test_any_number_of_threads_recomputes(case: Case, set_threads: Callable[[int], None]) -> None:
    call = Call(case, torch.bfloat16, True, "gelu")
    y, stats, _ = call.forward()
    for threads in (1, 3):
        set_threads(threads)
        assert same_bits(recompute(call.x, stats, call.weight, call.bias, call.residual, **act_args("gelu")), y)


@each(dtype=LOW_PRECISION)
@pytest.mark.parametrize("narrow", ["weight", "bias", "weight bias"])
def test_parameters_may_have_the_dtype_of_the_input(narrow: str, dtype: torch.dtype) -> None:
    call = Call(FEW_CASES[3], dtype, True, "silu")
    for vector in narrow.split():
        setattr(call, vector, getattr(call, vector).to(dtype))
    assert_recomputes(call)


# Inputs whose mean or variance is not finite, or is not found by float32 sums.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "infinite": lambda x: x.index_fill(0, torch.tensor(0), torch.inf),
    "nan": lambda x: x.index_fill(1, torch.tensor(2), torch.nan),
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-30,
    "subnormal": lambda x: x * 1e-40,
    "far from zero": lambda x: x + 1e6,
    "constant": torch.ones_like,
    "one outlier": lambda x: x.index_fill(0, torch.tensor(1), 1e20),
}


@MODES
@pytest.mark.parametrize("eps", [1e-5, 1e-30])
@pytest.mark.parametrize("values", VALUES)
def test_outputs_of_extreme_values_are_recomputed(values: str, eps: float, training: bool) -> None:
    for case in (Case((33, 5, 7, 3), "contiguous"), Case((33, 5, 7, 3), "channels_last")):
        for act in FEW_ACTS:
            call = Call(case, torch.float32, training, act)
            call.x = to_layout(VALUES[values](call.x), case.layout)
            call.eps = eps
            assert_recomputes(call)


@pairs(case=FEW_CASES, dtype=DTYPES, act=FEW_ACTS)
def test_outputs_of_gathered_stats_are_recomputed(case: Case, dtype: torch.dtype, act: Act) -> None:
    call = Call(case, dtype, True, act)
    others = [make_input(case.shape, dtype=dtype) for _ in range(2)]
    gathered = torch.stack([torch.ops.bnext.batch_norm_stats(x, 1e-5) for x in (call.x, *others)])
    vectors = (call.weight, call.bias, call.mean, call.var, call.counter)
    epilogue = {"residual": call.residual, **act_args(act)}
    y, stats, _ = torch.ops.bnext.batch_norm_gathered(call.x, gathered, *vectors, 0.1, 1e-5, **epilogue)
    assert same_bits(recompute(call.x, stats, call.weight, call.bias, **epilogue), y)


def test_input_and_stats_may_have_other_strides() -> None:
    # Saved tensors may come back from a hook with other strides. The output has the layout of the input as it is then.
    call = Call(Case((6, 5, 7, 3), "channels_last"), torch.float32, True, "silu")
    y, stats, _ = call.forward()
    spread = torch.stack([stats, stats], -1)[..., 0]
    recomputed = recompute(call.x.contiguous(), spread, call.weight, call.bias, call.residual, **act_args("silu"))
    assert same_bits(recomputed, y)
    assert recomputed.is_contiguous()


@pairs(case=[*FEW_CASES, *ODD_CASES], dtype=DTYPES, has_residual=FLAGS)
def test_fake_kernel_predicts_shape_dtype_and_strides(case: Case, dtype: torch.dtype, has_residual: bool) -> None:
    call = Call(case, dtype, True, "relu", has_residual)
    args = (call.x, call.forward()[1], call.weight, call.bias, call.residual)
    assert_predicts(recompute, args, act_args("relu"))


@each(case=FEW_CASES)
def test_opcheck(case: Case) -> None:
    call = Call(case, torch.float32, True, "silu")
    args = (call.x, call.forward()[1], call.weight, call.bias, make_residual(case.shape))
    torch.library.opcheck(recompute.default, args, act_args("silu"))

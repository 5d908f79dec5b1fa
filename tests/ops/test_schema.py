"""The raw operators as torch sees them: schemas, fake kernels, opcheck, over layouts, dtypes and optional arguments."""

from __future__ import annotations

import itertools

import torch
from cases import DTYPES, EMPTY_CASES, FEW_CASES, STRIDED_CASES, Case, pairwise
from checks import assert_predicts
from marks import FLAGS, pairs, rows
from raw_ops import Call, backward, evaluate, keeps_mask, train
from reference import Act
from torch import Tensor


def test_schemas_keep_names_and_marks() -> None:
    # The names stand in error messages, in exported programs and in users' keyword calls.
    stem = ["input", "weight", "bias", "running_mean", "running_var"]
    fused = ["residual", "act", "slope", "with_mask"]
    backwards = ["grad_output", "input", "weight", "save_stats", "training", "eps", "output_mask", "bias", "residual"]
    parts = ["valid", "virtual_batch_size"]
    training = [*stem, "num_batches_tracked", "momentum", "eps", *fused, *parts, "update_in_backward"]
    expected = {
        train: (training, {*stem[3:], "num_batches_tracked"}),
        evaluate: ([*stem, "eps", *fused, "valid"], set()),
        backward: ([*backwards, "mask", "act", "slope", "mean_grads", *parts], set()),
    }
    for op, (names, written) in expected.items():
        schema = op.default._schema
        assert [a.name for a in schema.arguments] == names
        assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == written
        assert not any(r.alias_info for r in schema.returns), schema.name
    assert [len(op.default._schema.returns) for op in expected] == [3, 3, 4]


# To the schema, the fake kernels and autograd there are three kinds of activation: none, one with a mask, one without.
KINDS_OF_ACT = ("identity", "relu", "silu")
OPCHECK_CASES = [FEW_CASES[i] for i in (0, 3, 5)]
AFFINE = ("", "bias", "weight", "weight bias")
MISSING = (*AFFINE, "momentum", "mean var counter", "weight bias mean var counter")
WANTED = list(itertools.product(FLAGS, repeat=3))


@rows(
    ("case", "missing", "act", "dtype", "training", "has_residual", "grad"),
    [
        *pairwise(OPCHECK_CASES, MISSING, KINDS_OF_ACT, DTYPES, (True,), FLAGS, FLAGS),
        *pairwise(OPCHECK_CASES, AFFINE, KINDS_OF_ACT, DTYPES, (False,), FLAGS, FLAGS),
    ],
)
def test_opcheck_forward(
    case: Case, missing: str, act: Act, dtype: torch.dtype, training: bool, has_residual: bool, grad: bool
) -> None:
    call = Call(case, dtype, training, act, has_residual, grad, missing=missing)
    torch.library.opcheck(call.op.default, call.forward_args(), call.epilogue(with_mask=not grad and keeps_mask(act)))


def backward_args(call: Call, wanted: tuple[bool, ...], with_mask: bool) -> dict[str, object]:
    """The arguments of a call's backward pass, without the input where no result depends on it."""
    with torch.no_grad():
        _, stats, mask = call.forward(with_mask)
    needs_input = call.act != "identity" or wanted[1] or (call.training and wanted[0])
    changes = {} if needs_input else {"input": None}
    return call.backward_args(stats, (*wanted, call.wanted()[3]), mask if with_mask else None, **changes)


@rows(
    ("wanted", "case", "dtype", "act", "training", "grad"),
    [
        *pairwise(WANTED[:-1], OPCHECK_CASES, (torch.float32, torch.bfloat16), ("identity",), FLAGS, FLAGS),
        *pairwise(WANTED[:1], OPCHECK_CASES, (torch.float32,), ("relu", "silu"), FLAGS, (False,)),
    ],
)
def test_opcheck_backward(
    wanted: tuple[bool, ...], case: Case, dtype: torch.dtype, act: Act, training: bool, grad: bool
) -> None:
    call = Call(case, dtype, training, act, grad=grad)
    torch.library.opcheck(backward.default, (), backward_args(call, wanted, not grad and keeps_mask(act)))


@pairs(
    case=[*FEW_CASES, *STRIDED_CASES, *EMPTY_CASES],
    wanted=WANTED,
    dtype=DTYPES,
    act=KINDS_OF_ACT,
    training=FLAGS,
    has_residual=FLAGS,
    grad_is_contiguous=FLAGS,
)
def test_fake_kernels_predict_shape_dtype_and_strides(
    case: Case,
    wanted: tuple[bool, ...],
    dtype: torch.dtype,
    act: Act,
    training: bool,
    has_residual: bool,
    grad_is_contiguous: bool,
) -> None:
    call = Call(case, dtype, training, act, has_residual)
    if grad_is_contiguous:
        call.g = call.g.contiguous()
    for with_mask in {False, keeps_mask(act)}:
        assert_predicts(call.op, call.forward_args(), call.epilogue(with_mask))
        assert_predicts(backward, (), backward_args(call, wanted, with_mask))


def test_meta_tensors_run() -> None:
    # Shape propagation and models under torch.device("meta") call every operator on them.
    args = Call(FEW_CASES[3], torch.bfloat16, True, "identity").forward_args()
    y, stats, _ = train(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    assert (y.shape, y.dtype, y.device.type) == (FEW_CASES[3].shape, torch.bfloat16, "meta")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (tuple(stats.shape), stats.dtype) == ((2, 5), torch.float64)

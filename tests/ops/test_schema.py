"""The raw operators as torch sees them: schemas, fake kernels, opcheck, over layouts, dtypes and optional arguments."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from cases import (
    DTYPES,
    EMPTY_CASES,
    FEW_CASES,
    LOW_PRECISION,
    RECTIFIERS,
    STRIDED_CASES,
    Case,
    make_grad,
    name,
    pairwise,
    same_bits,
)
from checks import assert_predicts, make_inputs
from marks import FLAGS, pairs, rows
from raw_ops import Call, act_args, backward, evaluate, train
from reference import Act
from torch import Tensor


def forward_args(
    training: bool, case: Case, dtype: torch.dtype, given: str = "weight bias stats counter", *, grad: bool = False
) -> tuple[object, ...]:
    """Arguments with those optional tensors that `given` names."""
    x, _, p, _ = make_inputs(*case, dtype)
    x, weight, bias = (
        t.detach().requires_grad_(grad) if what in ("", *given.split()) else None
        for what, t in (("", x), ("weight", p.weight), ("bias", p.bias))
    )
    if not training:
        return x, weight, bias, *p[2:], 1e-5
    stats = p[2:] if "stats" in given else (None, None)
    counter = torch.tensor(3) if "counter" in given else None
    return x, weight, bias, *stats, counter, None if "cumulative" in given else 0.1, 1e-5


def backward_args(
    case: Case, dtype: torch.dtype, training: bool, mask: tuple[bool, ...] = (True, True, True), *, grad: bool = False
) -> tuple[object, ...]:
    args = forward_args(training, case, dtype)
    _, stats, _ = (train if training else evaluate)(*args)
    g = make_grad(case.shape, "contiguous", dtype)
    g, x, weight = (t.detach().requires_grad_(grad) for t in (g, *args[:2]))
    needs_input = mask[1] or (training and mask[0])
    return g, x if needs_input else None, weight, stats, training, 1e-5, [*mask, False]


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


OPTIONS = [
    "weight bias stats counter",
    "weight bias stats counter cumulative",
    "weight bias",
    "weight stats",
    "bias",
    "stats counter",
    "",
]


CHANNELS_LAST = [Case((3, 5, 5, 3), "channels_last")]


@rows(
    ("case", "dtype", "given", "grad"),
    [
        *pairwise(CHANNELS_LAST, DTYPES[:1], OPTIONS, FLAGS),
        *pairwise(FEW_CASES, DTYPES[:1], OPTIONS[:1], (True,)),
        *pairwise(FEW_CASES[2:3], DTYPES[1:], OPTIONS[:1], (True,)),
    ],
)
def test_opcheck_train(case: Case, dtype: torch.dtype, given: str, grad: bool) -> None:
    torch.library.opcheck(train.default, forward_args(True, case, dtype, given, grad=grad))


@rows(
    ("case", "dtype", "given"),
    [
        *pairwise([FEW_CASES[0], FEW_CASES[3]], DTYPES[:1], ("weight bias", "weight", "bias", "")),
        *pairwise(FEW_CASES[2:3], LOW_PRECISION, ("weight bias",)),
    ],
)
def test_opcheck_eval(case: Case, dtype: torch.dtype, given: str) -> None:
    torch.library.opcheck(evaluate.default, forward_args(False, case, dtype, given, grad=bool(given)))


@pairs(
    case=[FEW_CASES[i] for i in (0, 3, 5)],
    mask=[(True, True, True), (True, False, False), (False, True, True), (False, False, True), (True, False, True)],
    dtype=(torch.float32, torch.bfloat16),
    training=FLAGS,
    grad=FLAGS,
)
def test_opcheck_backward(case: Case, mask: tuple[bool, ...], dtype: torch.dtype, training: bool, grad: bool) -> None:
    torch.library.opcheck(backward.default, backward_args(case, dtype, training, mask, grad=grad))


# Of activations there are to the schema, the fake kernels and autograd three: none, with a mask, and without one.
KINDS_OF_ACT = ("identity", "relu", "silu")


@pairs(case=[FEW_CASES[0], FEW_CASES[3], FEW_CASES[5]], act=KINDS_OF_ACT, training=FLAGS, grad=FLAGS)
def test_opcheck_forward_with_an_epilogue(case: Case, act: Act, training: bool, grad: bool) -> None:
    call = Call(case, torch.float32, training, act, grad=grad)
    with_mask = not grad and reference.named(act)[0] in RECTIFIERS
    options = {**act_args(act), "residual": call.residual, "with_mask": with_mask}
    torch.library.opcheck((train if training else evaluate).default, call.forward_args(), options)


@pairs(act=KINDS_OF_ACT, training=FLAGS, with_mask=FLAGS)
def test_opcheck_backward_with_an_epilogue(act: Act, training: bool, with_mask: bool) -> None:
    call = Call(FEW_CASES[2 if with_mask else 3], torch.float32, training, act)
    kept = with_mask and reference.named(act)[0] in RECTIFIERS
    _, stats, mask = call.forward(with_mask=kept)
    args = (call.g, call.x, call.weight, stats, training, 1e-5, list(call.wanted()), call.bias)
    residual = None if kept else call.residual
    torch.library.opcheck(backward.default, (*args, residual, mask if kept else None), act_args(act))


ALL_CASES = [*FEW_CASES, *STRIDED_CASES, *EMPTY_CASES]


@pairs(case=ALL_CASES, mask=list(itertools.product(FLAGS, repeat=3)), dtype=DTYPES, training=FLAGS)
def test_fake_kernels_predict_shape_dtype_and_strides(
    case: Case, mask: tuple[bool, ...], dtype: torch.dtype, training: bool
) -> None:
    assert_predicts(train if training else evaluate, forward_args(training, case, dtype))
    assert_predicts(backward, backward_args(case, dtype, training, mask))


@pairs(case=ALL_CASES, dtype=DTYPES, act=KINDS_OF_ACT, training=FLAGS)
def test_fake_kernels_with_an_epilogue(case: Case, dtype: torch.dtype, act: Act, training: bool) -> None:
    call = Call(case, dtype, training, act)
    with_mask = act == "relu"
    op = train if training else evaluate
    options = {**act_args(act), "residual": call.residual, "with_mask": with_mask}
    _, stats, mask = assert_predicts(op, call.forward_args(), options)
    args = (call.g, call.x, call.weight, stats, training, 1e-5, list(call.wanted()), call.bias)
    more = {"residual": None if with_mask else call.residual, "mask": mask if with_mask else None, **act_args(act)}
    assert_predicts(backward, args, more)


def test_meta_tensors_run() -> None:
    # What torch.device("meta") initialisation and shape propagation ask of every op.
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in forward_args(True, FEW_CASES[3], torch.bfloat16)]
    y, stats, _ = train(*args)
    assert (y.shape, y.dtype, y.device.type) == (args[0].shape, torch.bfloat16, "meta")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (tuple(stats.shape), stats.dtype) == ((2, 5), torch.float64)


@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_train_bumps_the_version_of_what_it_writes(case: Case) -> None:
    # Otherwise autograd would not see that a tensor saved elsewhere has changed.
    args = forward_args(True, case, torch.float32)
    before = [t._version for t in args[:6]]
    train(*args)
    assert [t._version for t in args[:3]] == before[:3]
    assert all(t._version > v for t, v in zip(args[3:6], before[3:], strict=True))


def test_ops_take_keywords() -> None:
    args = forward_args(True, FEW_CASES[3], torch.float32, "weight bias")
    names = [a.name for a in train.default._schema.arguments]
    for a, b in zip(train(*args), train(**dict(zip(names, args, strict=False))), strict=True):
        assert same_bits(a, b)

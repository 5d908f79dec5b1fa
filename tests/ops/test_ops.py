"""The raw ops as torch sees them: schema, fake kernels and opcheck over layouts, dtypes and optional arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    DTYPES,
    FEW_CASES,
    LOW_PRECISION,
    STRIDED_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    name,
    parameter_dtype,
    same_bits,
)
from checks import significant_strides
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

train = torch.ops.bnext.batch_norm_train
evaluate = torch.ops.bnext.batch_norm_eval
backward = torch.ops.bnext.batch_norm_backward


def train_args(
    case: Case, dtype: torch.dtype, given: str = "weight bias stats counter", *, grad: bool = False
) -> tuple[object, ...]:
    """Arguments of batch_norm_train with those optional tensors that `given` names."""
    p = make_parameters(case.shape[1], parameter_dtype(dtype))
    has = given.split()
    return (
        make_input(*case, dtype).detach().requires_grad_(grad),
        p.weight.requires_grad_(grad) if "weight" in has else None,
        p.bias.requires_grad_(grad) if "bias" in has else None,
        p.running_mean if "stats" in has else None,
        p.running_var if "stats" in has else None,
        torch.tensor(3) if "counter" in has else None,
        None if "cumulative" in has else 0.1,
        1e-5,
    )


def eval_args(case: Case, dtype: torch.dtype, given: str = "weight bias", *, grad: bool = False) -> tuple[object, ...]:
    p = make_parameters(case.shape[1], parameter_dtype(dtype))
    return (
        make_input(*case, dtype).detach().requires_grad_(grad),
        p.weight.requires_grad_(grad) if "weight" in given else None,
        p.bias.requires_grad_(grad) if "bias" in given else None,
        p.running_mean,
        p.running_var,
        1e-5,
    )


def backward_args(
    case: Case, dtype: torch.dtype, training: bool, mask: tuple[bool, ...] = (True, True, True), *, grad: bool = False
) -> tuple[object, ...]:
    x, weight = eval_args(case, dtype)[:2]
    if training:
        _, stats, _ = train(*train_args(case, dtype, ""))
    else:
        _, stats, _ = evaluate(*eval_args(case, dtype))
    g = make_grad(case.shape, "contiguous", dtype)
    g, x, weight = (t.detach().requires_grad_(grad) for t in (g, x, weight))
    needs_input = mask[1] or (training and mask[0])
    return g, x if needs_input else None, weight, stats, training, 1e-5, [*mask, False]


def test_schemas_mark_what_is_written() -> None:
    written = {"running_mean", "running_var", "num_batches_tracked"}
    for op, mutates in ((train, written), (evaluate, set()), (backward, set())):
        schema = op.default._schema
        marked = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert marked == mutates, schema.name
        assert not any(r.alias_info for r in schema.returns), schema.name


def test_schemas_keep_the_argument_names() -> None:
    # The names stand in error messages, in exported programs and in users' keyword calls.
    stem = ["input", "weight", "bias", "running_mean", "running_var"]
    names = [[a.name for a in op.default._schema.arguments] for op in (train, evaluate, backward)]
    epilogue = ["residual", "act", "slope", "with_mask"]
    assert names[0] == [*stem, "num_batches_tracked", "momentum", "eps", *epilogue]
    assert names[1] == [*stem, "eps", *epilogue]
    asked = ["grad_output", "input", "weight", "save_stats", "training", "eps", "output_mask"]
    assert names[2] == [*asked, "bias", "residual", "mask", "act", "slope", "mean_grads"]


OPTIONS = [
    "weight bias stats counter",
    "weight bias stats counter cumulative",
    "weight bias",
    "weight stats",
    "bias",
    "stats counter",
    "",
]


@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
@pytest.mark.parametrize("given", OPTIONS, ids=lambda given: given.replace(" ", "+") or "input")
def test_opcheck_train_options(given: str, grad: bool) -> None:
    case = Case((3, 5, 5, 3), "channels_last")
    torch.library.opcheck(train.default, train_args(case, torch.float32, given, grad=grad))


@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_opcheck_train_layouts(case: Case) -> None:
    torch.library.opcheck(train.default, train_args(case, torch.float32, grad=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name)
def test_opcheck_train_dtypes(dtype: torch.dtype) -> None:
    torch.library.opcheck(train.default, train_args(FEW_CASES[2], dtype, grad=True))


@pytest.mark.parametrize(
    "given", ["weight bias", "weight", "bias", ""], ids=lambda given: given.replace(" ", "+") or "input"
)
@pytest.mark.parametrize("case", [FEW_CASES[0], FEW_CASES[3]], ids=name)
def test_opcheck_eval(case: Case, given: str) -> None:
    torch.library.opcheck(evaluate.default, eval_args(case, torch.float32, given, grad=bool(given)))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_opcheck_eval_dtypes(dtype: torch.dtype) -> None:
    torch.library.opcheck(evaluate.default, eval_args(FEW_CASES[2], dtype, grad=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("case", "mask", "grad"),
    [
        (FEW_CASES[0], (True, True, True), False),
        (FEW_CASES[3], (True, True, True), True),
        (FEW_CASES[3], (True, False, False), True),
        (FEW_CASES[3], (False, True, True), False),
        (FEW_CASES[4], (False, False, True), False),
        (FEW_CASES[5], (True, False, True), True),
    ],
    ids=lambda v: (
        name(v) if isinstance(v, Case) else "".join("01"[b] for b in v) if isinstance(v, tuple) else f"grad={v}"
    ),
)
def test_opcheck_backward(case: Case, mask: tuple[bool, ...], grad: bool, training: bool) -> None:
    torch.library.opcheck(backward.default, backward_args(case, torch.float32, training, mask, grad=grad))


def test_opcheck_backward_half() -> None:
    torch.library.opcheck(backward.default, backward_args(FEW_CASES[2], torch.bfloat16, True))


EMPTY_CASES = [Case((0, 3), "contiguous"), Case((0, 3, 4, 5), "contiguous"), Case((2, 3, 0), "contiguous")]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [*FEW_CASES, *STRIDED_CASES, *EMPTY_CASES], ids=name)
def test_fake_kernels_predict_shape_dtype_and_strides(case: Case, dtype: torch.dtype) -> None:
    calls: list[tuple[object, tuple[object, ...]]] = [
        (train, train_args(case, dtype)),
        (evaluate, eval_args(case, dtype)),
    ]
    for training, mask in itertools.product((True, False), itertools.product((True, False), repeat=3)):
        calls.append((backward, backward_args(case, dtype, training, mask)))
    for op, args in calls:
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        for predicted, real in zip(fake, op(*args), strict=True):
            assert predicted.shape == real.shape, op
            assert predicted.dtype == real.dtype, op
            assert predicted.device == real.device, op
            assert significant_strides(predicted) == significant_strides(real), op


def test_meta_tensors_run() -> None:
    # What torch.device("meta") initialisation and shape propagation ask of every op.
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in train_args(FEW_CASES[3], torch.bfloat16)]
    y, stats, _ = train(*args)
    assert (y.shape, y.dtype, y.device.type) == (args[0].shape, torch.bfloat16, "meta")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (tuple(stats.shape), stats.dtype) == ((2, 5), torch.float64)


@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_train_bumps_the_version_of_what_it_writes(case: Case) -> None:
    # Otherwise autograd would not see that a tensor saved elsewhere has changed.
    args = train_args(case, torch.float32)
    before = [t._version for t in args[:6]]
    train(*args)
    assert [t._version for t in args[:3]] == before[:3]
    assert all(t._version > v for t, v in zip(args[3:6], before[3:], strict=True))


def test_ops_take_keywords() -> None:
    args = train_args(FEW_CASES[3], torch.float32, "weight bias")
    names = [a.name for a in train.default._schema.arguments]
    for a, b in zip(train(*args), train(**dict(zip(names, args, strict=False))), strict=True):
        assert same_bits(a, b)

"""The contract's errors row: each wrong argument raises before anything is read or written.

The message names the argument, what was expected and what came; running statistics, the counter and their versions
are as before. Where torch makes the same check, type and text are torch's.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import make_grad, make_input, make_residual, same_bits
from marks import FLAGS, MODES, each, needs_todays_rule_for_eps, pairs
from wrong_arguments import (
    CHANNELS,
    NOT_FLOAT32,
    OVERLAPPING,
    RAISES,
    SHAPE,
    WORDS,
    WRONG_COUNTERS,
    WRONG_INPUTS,
    WRONG_RESIDUALS,
    WRONG_VECTORS,
    Arguments,
    Call,
    Wrong,
    arguments,
    assert_raises_and_leaves_alone,
    wrong_channel_vectors,
)

import bnext
from bnext.functional import batch_norm, batch_norm_act

KNOWN = (r"\bact\b", "identity, relu, relu6, leaky_relu, silu, gelu, hardswish, mish, elu")


def without_counter(args: Arguments) -> Arguments:
    return {key: value for key, value in args.items() if key != "num_batches_tracked"}


def train_op(args: Arguments) -> object:
    return torch.ops.bnext.batch_norm_train(**args, momentum=0.1, eps=1e-5)


def eval_op(args: Arguments) -> object:
    return torch.ops.bnext.batch_norm_eval(**without_counter(args), eps=1e-5)


def functional(training: bool, **options: object) -> Call:
    return lambda args: batch_norm(**without_counter(args), training=training, **options)


def fused(training: bool, **options: object) -> Call:
    return lambda args: batch_norm_act(**without_counter(args), training=training, **options)


def module(training: bool, **options: object) -> Call:
    """A layer that holds the tensors of the arguments."""

    def call(args: Arguments) -> object:
        layer = bnext.BatchNormAct2d(CHANNELS, **options).train(training)
        layer.weight, layer.bias = (torch.nn.Parameter(args[key]) for key in ("weight", "bias"))
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(layer, key, args[key])
        return layer(args["input"], args["residual"])

    return call


# Those that begin with a function of Python, by the mode that follows.
ENTRIES = {"functional": functional, "fused": fused, "module": module}
CALLS: dict[str, Call] = {
    "train_op": train_op,
    "eval_op": eval_op,
    **{f"{n}_{mode}": entry(mode == "training") for n, entry in ENTRIES.items() for mode in ("training", "eval")},
}
WITHOUT_RESIDUAL = [call for call in CALLS if not call.startswith("module")]
WITH_RESIDUAL = [call for call in CALLS if call.startswith(("fused", "module"))]


def with_residual(**changes: object) -> Arguments:
    return {**arguments(), "residual": make_residual(SHAPE), **changes}


@pairs(row=[*WRONG_INPUTS, *WRONG_VECTORS], call=WITHOUT_RESIDUAL, grad=FLAGS)
def test_wrong_argument(row: Wrong, call: str, grad: bool) -> None:
    args = with_residual() if call.startswith("fused") else arguments()
    args["input"].requires_grad_(grad)
    args[row.argument] = row.value()
    assert_raises_and_leaves_alone(CALLS[call], args, rf"\b{row.argument}\b", *row.message)


@pytest.mark.parametrize("call", ["train_op", "module_training"])
@each(row=[*WRONG_COUNTERS, *OVERLAPPING])
def test_wrong_argument_in_training(row: Wrong, call: str) -> None:
    args = (with_residual if call == "module_training" else arguments)()
    args[row.argument] = row.value()
    assert_raises_and_leaves_alone(CALLS[call], args, rf"\b{row.argument}\b", *row.message)


@pairs(row=WRONG_RESIDUALS, call=WITH_RESIDUAL, act=("relu", "silu", None), grad=FLAGS)
def test_wrong_residual(row: Wrong, call: str, act: str | None, grad: bool) -> None:
    entry, mode = call.split("_")
    args = with_residual(residual=row.value())
    args["input"].requires_grad_(grad)
    run = ENTRIES[entry](mode == "training", act=act)
    assert_raises_and_leaves_alone(run, args, r"\bresidual\b", *row.message)


@pytest.mark.parametrize("call", WITH_RESIDUAL)
@pytest.mark.parametrize(
    "value", [5, 1.0, True, "relu", [[1.0]], np.ones(SHAPE, dtype=np.float32)], ids=lambda v: type(v).__name__
)
def test_residual_that_is_no_tensor(value: object, call: str) -> None:
    args = with_residual(residual=value)
    assert_raises_and_leaves_alone(CALLS[call], args, r"\bresidual\b", "Tensor", type(value).__name__)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("argument", ["weight", "bias", "running_mean", "running_var"])
def test_only_the_dtype_of_the_input_or_float32(argument: str, dtype: torch.dtype) -> None:
    args = {k: v if k == "num_batches_tracked" else v.to(dtype) for k, v in arguments().items()}
    for other in WORDS:
        if other in (dtype, torch.float32):
            continue
        args[argument] = torch.ones(CHANNELS).to(other)
        assert_raises_and_leaves_alone(train_op, args, rf"\b{argument}\b", WORDS[dtype], WORDS[other])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_counter_of_one_element_has_any_shape(shape: tuple[int, ...]) -> None:
    counter = torch.full(shape, 5)
    train_op({**arguments(), "num_batches_tracked": counter})
    assert counter.item() == 6


@pytest.mark.parametrize("call", ["functional_eval", "fused_eval"])
@pytest.mark.parametrize(
    "missing", [("running_mean",), ("running_var",), ("running_mean", "running_var")], ids="+".join
)
def test_eval_needs_both_running_stats(missing: tuple[str, ...], call: str) -> None:
    args = {**arguments(), **dict.fromkeys(missing)}
    assert_raises_and_leaves_alone(CALLS[call], args, missing[0], "evaluation|eval", "defined|expected")


@pytest.mark.parametrize("call", ["train_op", "functional", "fused"])
def test_cumulative_average_needs_a_counter(call: str) -> None:
    def run(args: Arguments) -> object:
        if call == "train_op":
            return torch.ops.bnext.batch_norm_train(**without_counter(args), num_batches_tracked=None, eps=1e-5)
        return ENTRIES[call](True)(args)

    args = {**arguments(), "momentum": None}
    assert_raises_and_leaves_alone(run, args, "momentum", "num_batches_tracked|float|None")


@needs_todays_rule_for_eps
@MODES
@pytest.mark.parametrize("entry", ["functional", "fused"])
@pytest.mark.parametrize("eps", [0.0, -1e-5, -1.0, -2.5e-7, float("-inf")], ids=str)
def test_eps_as_in_torch(eps: float, entry: str, training: bool) -> None:
    args, run = arguments(), ENTRIES[entry](training, eps=eps)
    theirs = {key: value.clone() for key, value in without_counter(args).items()}
    try:
        torch.nn.functional.batch_norm(**theirs, training=training, eps=eps)
    except ValueError as error:
        expected = str(error)
    else:
        assert eps == 0.0
        assert not training
        run(args)  # as permitted as in torch
        return
    assert assert_raises_and_leaves_alone(run, args) == expected
    with pytest.raises(ValueError, match="eps"):
        run(args)


@pytest.mark.parametrize("call", ["train_op", "functional_training", "fused_training"])
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_a_channel_as_in_torch(shape: tuple[int, ...], call: str) -> None:
    args = {**arguments(), "input": torch.ones(shape)}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        torch.nn.functional.batch_norm(args["input"], None, None, training=True)
    assert assert_raises_and_leaves_alone(CALLS[call], args) == str(caught.value)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        CALLS[call](args)


WRONG_ACTS = [
    "swish",
    "RELU",
    "relu ",
    "",
    5,
    0,
    True,
    False,
    0.5,
    b"relu",
    torch.nn.functional.relu,
    torch.nn.ReLU(),
    ("relu",),
    ("relu", 1),
    ("silu", 0.1),
    ("leaky_relu",),
    ("leaky_relu", float("nan")),
    ("leaky_relu", float("inf")),
    ("leaky_relu", None),
    ("leaky_relu", "0.1"),
    ("leaky_relu", True),
    ("leaky_relu", 0.1, 0.2),
    ["leaky_relu", 0.1],
    ("relu6", 1),
    ("elu", float("nan")),
    (),
    ["relu"],
    {"relu"},
    torch.tensor(1.0),
]


@MODES
@pytest.mark.parametrize("act", WRONG_ACTS, ids=lambda act: getattr(act, "__name__", repr(act)))
def test_unknown_activation_lists_the_known_ones(act: object, training: bool) -> None:
    # A ValueError whatever the type, unhashable ones among them; and before the statistics move.
    args = with_residual()
    message = assert_raises_and_leaves_alone(fused(training, act=act), args, *KNOWN)
    assert repr(act) in message
    with pytest.raises(ValueError, match="leaky_relu"):
        fused(training, act=act)(args)


@MODES
def test_the_input_is_checked_before_the_residual(training: bool) -> None:
    # Of two wrong arguments the first is named: the residual's shape is wrong because the input's is.
    args = with_residual(input=torch.ones(3), residual=torch.ones(SHAPE))
    assert_raises_and_leaves_alone(fused(training), args, r"\binput\b")


@MODES
def test_a_residual_for_an_empty_batch_is_checked_too(training: bool) -> None:
    args = with_residual(input=torch.ones(0, 3, 5, 5), residual=torch.ones(1, 3, 5, 5))
    assert_raises_and_leaves_alone(fused(training), args, r"\bresidual\b", r"0, 3, 5, 5", r"1, 3, 5, 5")


def backward_arguments() -> Arguments:
    x = make_input(SHAPE)
    _, stats, _ = torch.ops.bnext.batch_norm_train(x, None, None, None, None, None, 0.1, 1e-5)
    return {"grad_output": make_grad(SHAPE), "input": x, "weight": torch.ones(CHANNELS), "save_stats": stats}


WRONG_IN_BACKWARD = [
    *wrong_channel_vectors("weight", NOT_FLOAT32),
    Wrong("shape", "grad_output", lambda: torch.ones(4, 3, 5, 4), (r"4, 3, 5, 5", r"4, 3, 5, 4")),
    Wrong("rank", "grad_output", lambda: torch.ones(4, 3, 25), (r"4, 3, 5, 5", r"4, 3, 25")),
    Wrong("scalar", "grad_output", lambda: torch.tensor(1.0), (r"4, 3, 5, 5|\b2\b", r"\[\]")),
    Wrong(
        "float64",
        "grad_output",
        lambda: make_grad(SHAPE, dtype=torch.float64),
        (WORDS[torch.float32], WORDS[torch.float64]),
    ),
    Wrong(
        "bfloat16",
        "grad_output",
        lambda: make_grad(SHAPE, dtype=torch.bfloat16),
        (WORDS[torch.float32], WORDS[torch.bfloat16]),
    ),
    Wrong("meta", "grad_output", lambda: torch.ones(SHAPE, device="meta"), ("cpu", "meta")),
    Wrong("float32", "save_stats", lambda: torch.ones(2, 3), (WORDS[torch.float64], WORDS[torch.float32])),
    Wrong("short", "save_stats", lambda: torch.ones(2, 2, dtype=torch.float64), (r"2, 3", r"2, 2")),
    Wrong("one-row", "save_stats", lambda: torch.ones(1, 3, dtype=torch.float64), (r"2, 3", r"1, 3")),
    Wrong("1d", "save_stats", lambda: torch.ones(6, dtype=torch.float64), (r"2, 3", r"\b6\b|\b1\b")),
    Wrong("meta", "save_stats", lambda: torch.ones(2, 3, dtype=torch.float64, device="meta"), ("cpu", "meta")),
    Wrong("missing", "input", lambda: None, ("None|needed|required|expected",)),
]


@MODES
@pytest.mark.parametrize("row", WRONG_IN_BACKWARD, ids=str)
def test_wrong_argument_of_backward(row: Wrong, training: bool) -> None:
    args = {**backward_arguments(), row.argument: row.value()}

    def call(args: Arguments) -> object:
        return torch.ops.bnext.batch_norm_backward(
            **args, training=training, eps=1e-5, output_mask=[True, True, True, False]
        )

    assert_raises_and_leaves_alone(call, args, rf"\b{row.argument}\b", *row.message)


def test_backward_in_training_needs_the_input_for_its_gradient() -> None:
    args = {**backward_arguments(), "input": None}
    for mask in ([True, False, False, False], [False, True, False, False], [True, False, True, False]):
        with pytest.raises(RAISES, match=r"\binput\b"):
            torch.ops.bnext.batch_norm_backward(**args, training=True, eps=1e-5, output_mask=mask)


@MODES
def test_wrong_number_of_channels_leaves_a_module_alone(training: bool) -> None:
    module = bnext.BatchNorm2d(CHANNELS).train(training)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    for shape in ((4, 2, 5, 5), (4, 4, 5, 5), (4, 0, 5, 5)):
        with pytest.raises(RAISES, match=r"\b3\b") as caught:
            module(torch.ones(shape))
        assert re.search(rf"\b{shape[1]}\b", str(caught.value))
    for key, value in module.state_dict().items():
        assert same_bits(value, state[key]), key


@MODES
def test_wrong_residual_leaves_a_module_alone(training: bool) -> None:
    layer = bnext.BatchNormAct2d(CHANNELS).train(training)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    for row in WRONG_RESIDUALS:
        with pytest.raises(RAISES, match="residual"):
            layer(torch.ones(SHAPE), row.value())
    for key, value in layer.state_dict().items():
        assert same_bits(value, state[key]), key


@pytest.mark.parametrize("which", ["shape", "dtype"])
def test_wrong_grad_output_is_refused_by_autograd(which: str) -> None:
    x = make_input(SHAPE).requires_grad_()
    y = batch_norm_act(x, None, None, residual=make_residual(SHAPE), training=True)
    g = make_grad((4, 3, 5, 4)) if which == "shape" else torch.ones(SHAPE, dtype=torch.complex64)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, x, g)

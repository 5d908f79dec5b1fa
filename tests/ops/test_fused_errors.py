"""Wrong arguments of the fused op: each raises, by name, before anything is read or written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import make_grad, make_input, make_residual, name, same_bits
from test_errors import (
    CHANNELS,
    RAISES,
    SHAPE,
    WORDS,
    WRONG_COUNTERS,
    WRONG_INPUTS,
    WRONG_VECTORS,
    Wrong,
    arguments,
    assert_raises_and_leaves_alone,
    needs_todays_rule_for_eps,
)

import bnext
from bnext.functional import batch_norm_act

Arguments = dict[str, object]
KNOWN = (r"\bact\b", "identity, relu, relu6, leaky_relu, silu, gelu, hardswish, mish, elu")

WRONG_RESIDUALS = [
    Wrong("batch", "residual", lambda: make_residual((3, *SHAPE[1:])), (r"4, 3, 5, 5", r"3, 3, 5, 5")),
    Wrong("channels", "residual", lambda: make_residual((4, 1, 5, 5)), (r"4, 3, 5, 5", r"4, 1, 5, 5")),
    Wrong("width", "residual", lambda: make_residual((4, 3, 5, 1)), (r"4, 3, 5, 5", r"4, 3, 5, 1")),
    Wrong("flat", "residual", lambda: make_residual((4, 3, 25)), (r"4, 3, 5, 5", r"4, 3, 25")),
    Wrong("rank", "residual", lambda: make_residual((1, *SHAPE)), (r"4, 3, 5, 5", r"1, 4, 3, 5, 5")),
    Wrong("vector", "residual", lambda: torch.ones(CHANNELS), (r"4, 3, 5, 5", r"\[3\]|\b1\b")),
    Wrong("scalar", "residual", lambda: torch.tensor(1.0), (r"4, 3, 5, 5|\b4\b", r"\[\]|\b0\b")),
    Wrong("empty", "residual", lambda: torch.ones(0, *SHAPE[1:]), (r"4, 3, 5, 5", r"0, 3, 5, 5")),
    *(
        Wrong(name(dtype), "residual", lambda d=dtype: torch.ones(SHAPE, dtype=d), (WORDS[torch.float32], WORDS[dtype]))
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
    ),
    Wrong("meta", "residual", lambda: torch.ones(SHAPE, device="meta"), ("cpu", "meta")),
]
NOT_TENSORS = [5, 1.0, True, "relu", [[1.0]], np.ones(SHAPE, dtype=np.float32)]


def functional(training: bool, **options: object) -> Callable[[Arguments], object]:
    def call(args: Arguments) -> object:
        return batch_norm_act(
            **{k: v for k, v in args.items() if k != "num_batches_tracked"}, training=training, **options
        )

    return call


def module(training: bool, **options: object) -> Callable[[Arguments], object]:
    """A layer that holds the tensors of the arguments."""

    def call(args: Arguments) -> object:
        layer = bnext.BatchNormAct2d(CHANNELS, **options).train(training)
        layer.weight, layer.bias = (torch.nn.Parameter(args[key]) for key in ("weight", "bias"))
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(layer, key, args[key])
        return layer(args["input"], args["residual"])

    return call


CALLS = {
    "functional_training": functional(True),
    "functional_eval": functional(False),
    "module_training": module(True),
    "module_eval": module(False),
}


def fused_arguments() -> Arguments:
    return {**arguments(), "residual": make_residual(SHAPE)}


@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
@pytest.mark.parametrize("act", ["relu", "silu", None], ids=str)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("row", WRONG_RESIDUALS, ids=str)
def test_wrong_residual(row: Wrong, call: str, act: str | None, grad: bool) -> None:
    make = {"functional": functional, "module": module}[call.split("_")[0]]
    args = {**fused_arguments(), "residual": row.value()}
    args["input"].requires_grad_(grad)
    run = make(call.endswith("training"), act=act)
    assert_raises_and_leaves_alone(run, args, r"\bresidual\b", *row.message)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("value", NOT_TENSORS, ids=lambda v: type(v).__name__)
def test_residual_that_is_no_tensor(value: object, call: str) -> None:
    args = {**fused_arguments(), "residual": value}
    assert_raises_and_leaves_alone(CALLS[call], args, r"\bresidual\b", "Tensor", type(value).__name__)


@pytest.mark.parametrize("call", ["functional_training", "functional_eval"])
@pytest.mark.parametrize("row", [*WRONG_INPUTS, *WRONG_VECTORS], ids=str)
def test_wrong_argument_of_the_plain_op(row: Wrong, call: str) -> None:
    args = {**fused_arguments(), row.argument: row.value()}
    assert_raises_and_leaves_alone(CALLS[call], args, rf"\b{row.argument}\b", *row.message)


@pytest.mark.parametrize("row", WRONG_COUNTERS, ids=str)
def test_wrong_counter(row: Wrong) -> None:
    args = {**fused_arguments(), row.argument: row.value()}
    assert_raises_and_leaves_alone(CALLS["module_training"], args, rf"\b{row.argument}\b", *row.message)


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


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("act", WRONG_ACTS, ids=repr)
def test_unknown_activation_lists_the_known_ones(act: object, training: bool) -> None:
    # A ValueError whatever the type, unhashable ones among them; and before the statistics move.
    args = fused_arguments()
    message = assert_raises_and_leaves_alone(functional(training, act=act), args, *KNOWN)
    assert repr(act) in message
    with pytest.raises(ValueError, match="leaky_relu"):
        functional(training, act=act)(args)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_the_input_is_checked_before_the_residual(training: bool) -> None:
    # Of two wrong arguments the first is named: the residual's shape is wrong because the input's is.
    args = {**fused_arguments(), "input": torch.ones(3), "residual": torch.ones(SHAPE)}
    assert_raises_and_leaves_alone(functional(training), args, r"\binput\b")


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_eval_needs_both_running_stats(missing: str) -> None:
    args = {**fused_arguments(), missing: None}
    assert_raises_and_leaves_alone(functional(False), args, missing, "evaluation|eval", "defined|expected")


@needs_todays_rule_for_eps
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("eps", [-1e-5, float("-inf")], ids=str)
def test_eps_as_in_torch(eps: float, training: bool) -> None:
    with pytest.raises(ValueError, match="eps") as caught:
        torch.nn.functional.batch_norm(make_input(SHAPE), torch.zeros(3), torch.ones(3), training=training, eps=eps)
    args = fused_arguments()
    assert assert_raises_and_leaves_alone(functional(training, eps=eps), args) == str(caught.value)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_a_channel_as_in_torch(shape: tuple[int, ...]) -> None:
    args = {**fused_arguments(), "input": torch.ones(shape), "residual": torch.ones(shape)}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        torch.nn.functional.batch_norm(args["input"], None, None, training=True)
    assert assert_raises_and_leaves_alone(functional(True), args) == str(caught.value)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_residual_for_an_empty_batch_is_checked_too(training: bool) -> None:
    args = {**fused_arguments(), "input": torch.ones(0, 3, 5, 5), "residual": torch.ones(1, 3, 5, 5)}
    assert_raises_and_leaves_alone(functional(training), args, r"\bresidual\b", r"0, 3, 5, 5", r"1, 3, 5, 5")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
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

"""Errors that depend on several arguments; test_bad_arguments.py has those of single ones.

Each is raised before anything is read or written: running statistics, counter and their versions stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bad_values import CHANNELS, SHAPE, backward_arguments, forward_arguments
from cases import make_grad, make_residual
from marks import MODES
from refusals import ORDINARY, WORDS, Arguments, raised

from bnext.functional import batch_norm, batch_norm_act

KNOWN = (r"\bact\b", "identity, relu, relu6, leaky_relu, silu, gelu, hardswish, mish, elu")
VECTORS = ("input", "weight", "bias", "running_mean", "running_var")


def arguments(**changes: object) -> Arguments:
    """Valid values for VECTORS, with these changes and additions."""
    values = forward_arguments()
    return {key: values[key] for key in VECTORS} | changes


def train_op(args: Arguments) -> object:
    return torch.ops.bnext.batch_norm_train(
        **{"num_batches_tracked": torch.tensor(5), "momentum": 0.1, **args}, eps=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("argument", VECTORS[1:])
def test_only_the_dtype_of_the_input_or_float32(argument: str, dtype: torch.dtype) -> None:
    args = {key: value.to(dtype) for key, value in arguments().items()}
    for other in WORDS.keys() - {dtype, torch.float32}:
        args[argument] = torch.ones(CHANNELS).to(other)
        raised(train_op, args, rf"\b{argument}\b", WORDS[dtype], WORDS[other])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_counter_of_one_element_has_any_shape(shape: tuple[int, ...]) -> None:
    counter = torch.full(shape, 5)
    train_op(arguments(num_batches_tracked=counter))
    assert counter.item() == 6


@pytest.mark.parametrize("entry", [batch_norm, batch_norm_act])
def test_evaluation_needs_running_stats(entry: Callable[..., object]) -> None:
    args = arguments(running_mean=None, running_var=None)
    raised(lambda args: entry(**args), args, "running_mean", "evaluation|eval", "defined|expected")


def test_cumulative_average_needs_a_counter() -> None:
    raised(train_op, arguments(momentum=None, num_batches_tracked=None), "momentum", "num_batches_tracked")


WRONG_ACTS = (
    "swish", "RELU", "relu ", "", 5, 0, True, False, 0.5, b"relu", torch.nn.functional.relu, torch.nn.ReLU(), ("relu",),
    ("relu", 1), ("silu", 0.1), ("leaky_relu",), ("leaky_relu", float("nan")), ("leaky_relu", float("inf")),
    ("leaky_relu", None), ("leaky_relu", "0.1"), ("leaky_relu", True), ("leaky_relu", 0.1, 0.2), ["leaky_relu", 0.1],
    ("relu6", 1), ("elu", float("nan")), (), ["relu"], {"relu"}, torch.tensor(1.0),
)  # fmt: skip


@MODES
@pytest.mark.parametrize("act", WRONG_ACTS, ids=lambda act: getattr(act, "__name__", repr(act)))
def test_unknown_activation_lists_the_known_ones(act: object, training: bool) -> None:
    # Whatever the type, hashable or not, a ValueError is raised before the statistics change.
    args = arguments(residual=make_residual(SHAPE), training=training, act=act)
    assert repr(act) in raised(lambda args: batch_norm_act(**args), args, *KNOWN)
    with pytest.raises(ValueError, match="leaky_relu"):
        batch_norm_act(**args)


@MODES
@pytest.mark.parametrize(
    ("input", "residual", "message"),
    [
        # Of two wrong arguments the first is named: the residual's shape is wrong because the input's is.
        ((3,), SHAPE, (r"\binput\b",)),
        ((0, 3, 5, 5), (1, 3, 5, 5), (r"\bresidual\b", "0, 3, 5, 5", "1, 3, 5, 5")),
    ],
    ids=["1-D input", "empty batch"],
)
def test_residual_of_another_shape(
    input: tuple[int, ...], residual: tuple[int, ...], message: tuple[str, ...], training: bool
) -> None:
    args = arguments(input=torch.ones(input), residual=torch.ones(residual), training=training)
    raised(lambda args: batch_norm_act(**args), args, *message)


def test_backward_in_training_needs_the_input_for_its_gradient() -> None:
    args = {key: backward_arguments()[key] for key in ("grad_output", "weight", "save_stats")}
    for mask in ([True, False, False, False], [False, True, False, False], [True, False, True, False]):
        options = {"input": None, "training": True, "eps": 1e-5, "output_mask": mask}
        raised(lambda args, o=options: torch.ops.bnext.batch_norm_backward(**args, **o), args, r"\binput\b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "silu"}, ("with_mask",)),
        ({"num_batches_tracked": None, "momentum": None}, ("momentum=None", "num_batches_tracked")),
    ],
    ids=["a mask of what has none", "a cumulative average without a counter"],
)
def test_arguments_beside_gathered_stats_that_do_not_go_together(changes: Arguments, message: tuple[str, ...]) -> None:
    values = forward_arguments()
    epilogue = ("num_batches_tracked", "gathered_stats", "residual", "momentum", "eps", "act", "with_mask")
    args = {key: values[key] for key in (*VECTORS, *epilogue)} | changes
    raised(lambda args: torch.ops.bnext.batch_norm_gathered(**args), args, *message)


@pytest.mark.parametrize("argument", ["grad_output", "input", "weight"])
def test_given_means_have_no_derivative(argument: str) -> None:
    args = {key: value for key, value in backward_arguments().items() if key not in ("count", "group_name")}
    args[argument].requires_grad_()
    call = lambda args: torch.ops.bnext.batch_norm_backward(**args)  # noqa: E731
    raised(call, args, "mean_grads", "require grad")
    with torch.no_grad():
        call(args)


@pytest.mark.parametrize(
    "g", [make_grad((4, 3, 5, 4)), torch.ones(SHAPE, dtype=torch.complex64)], ids=["shape", "dtype"]
)
def test_wrong_grad_output_is_refused_by_autograd(g: torch.Tensor) -> None:
    args = arguments(residual=make_residual(SHAPE), training=True)
    y = batch_norm_act(**args | {"input": args["input"].requires_grad_()})
    with pytest.raises(ORDINARY):
        torch.autograd.grad(y, args["input"], g)

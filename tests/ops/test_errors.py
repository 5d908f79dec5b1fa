"""The contract's errors row: each wrong argument raises before anything is read or written.

The message names the argument, what was expected and what came; running statistics, the counter and their versions
are as before. Where torch makes the same check, type and text are torch's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import make_grad, make_input, same_bits
from torch import Tensor

import bnext
from bnext.functional import batch_norm


def _eps_may_be_zero_in_evaluation() -> bool:
    try:
        torch.nn.functional.batch_norm(torch.ones(2, 1), torch.zeros(1), torch.ones(1), eps=0.0)
    except ValueError:
        return False
    return True


# torch 2.13's rule, and ours.
needs_todays_rule_for_eps = pytest.mark.skipif(
    not _eps_may_be_zero_in_evaluation(), reason="this torch refuses eps=0 in evaluation, too"
)

RAISES = (RuntimeError, ValueError, TypeError)
CHANNELS = 3
SHAPE = (4, CHANNELS, 5, 5)

WORDS = {  # of a dtype, in Python or in C++
    torch.float64: r"float64|double",
    torch.float32: r"float32|\bfloat\b",
    torch.float16: r"float16|half",
    torch.bfloat16: r"bfloat16",
    torch.int64: r"int64|\blong\b",
    torch.int32: r"int32|\bint\b",
    torch.bool: r"bool",
    torch.complex64: r"complex64|complexfloat",
}


class Wrong(NamedTuple):
    """An argument, its wrong value, and regular expressions that the message must contain besides the name."""

    id: str
    argument: str
    value: Callable[[], object]
    message: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.argument}-{self.id}"


def wrong_channel_vectors(argument: str, dtypes: tuple[torch.dtype, ...]) -> list[Wrong]:
    """Everything that may be wrong with one of weight, bias, running_mean and running_var."""
    rows = [
        Wrong("short", argument, lambda: torch.ones(2), (r"\b3\b", r"\b2\b")),
        Wrong("long", argument, lambda: torch.ones(4), (r"\b3\b", r"\b4\b")),
        Wrong("empty", argument, lambda: torch.ones(0), (r"\b3\b", r"\b0\b")),
        Wrong("0d", argument, lambda: torch.tensor(1.0), (r"\b1\b", r"\[\]|\b0\b")),
        Wrong("2d", argument, lambda: torch.ones(1, 3), (r"\b1\b", r"1, 3|\b2\b")),
        Wrong("4d", argument, lambda: torch.ones(1, 3, 1, 1), (r"\b1\b", r"1, 3, 1, 1|\b4\b")),
        Wrong("meta", argument, lambda: torch.ones(3, device="meta"), ("cpu", "meta")),
    ]
    rows += [
        Wrong(
            str(d).removeprefix("torch."),
            argument,
            lambda d=d: torch.ones(3, dtype=d),
            (WORDS[torch.float32], WORDS[d]),
        )
        for d in dtypes
    ]
    return rows


NOT_FLOAT32 = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
WRONG_INPUTS = [
    Wrong("0d", "input", lambda: torch.tensor(1.0), (r"\b2\b", r"\[\]|\b0\b")),
    Wrong("1d", "input", lambda: torch.ones(3), (r"\b2\b", r"\[3\]|\b1\b")),
    *(
        Wrong(name, "input", lambda d=dtype: torch.ones(SHAPE, dtype=d), ("float32|floating", WORDS[dtype]))
        for name, dtype in (
            ("int64", torch.int64),
            ("int32", torch.int32),
            ("bool", torch.bool),
            ("complex64", torch.complex64),
        )
    ),
]
WRONG_VECTORS = [
    row for a in ("weight", "bias", "running_mean", "running_var") for row in wrong_channel_vectors(a, NOT_FLOAT32)
]
WRONG_COUNTERS = [
    Wrong("float32", "num_batches_tracked", lambda: torch.tensor(0.0), (WORDS[torch.int64], WORDS[torch.float32])),
    Wrong(
        "int32",
        "num_batches_tracked",
        lambda: torch.tensor(0, dtype=torch.int32),
        (WORDS[torch.int64], WORDS[torch.int32]),
    ),
    Wrong("two", "num_batches_tracked", lambda: torch.zeros(2, dtype=torch.int64), (r"\b1\b|one", r"\b2\b")),
    Wrong("none", "num_batches_tracked", lambda: torch.zeros(0, dtype=torch.int64), (r"\b1\b|one", r"\b0\b")),
    Wrong("meta", "num_batches_tracked", lambda: torch.tensor(0, device="meta"), ("cpu", "meta")),
]
OVERLAPPING = [
    Wrong("expanded", argument, lambda: torch.ones(1).expand(3), ("memory|overlap", r"\b0\b|expand"))
    for argument in ("running_mean", "running_var")
]


def arguments() -> dict[str, object]:
    """Right ones."""
    return {
        "input": make_input(SHAPE),
        "weight": torch.ones(CHANNELS),
        "bias": torch.zeros(CHANNELS),
        "running_mean": torch.randn(CHANNELS),
        "running_var": torch.rand(CHANNELS) + 0.5,
        "num_batches_tracked": torch.tensor(5),
    }


def train_op(args: dict[str, object]) -> object:
    return torch.ops.bnext.batch_norm_train(**args, momentum=0.1, eps=1e-5)


def eval_op(args: dict[str, object]) -> object:
    return torch.ops.bnext.batch_norm_eval(**{k: v for k, v in args.items() if k != "num_batches_tracked"}, eps=1e-5)


def functional(training: bool) -> Callable[[dict[str, object]], object]:
    return lambda args: batch_norm(**{k: v for k, v in args.items() if k != "num_batches_tracked"}, training=training)


CALLS: dict[str, Callable[[dict[str, object]], object]] = {
    "train_op": train_op,
    "eval_op": eval_op,
    "functional_training": functional(True),
    "functional_eval": functional(False),
}


def assert_raises_and_leaves_alone(
    call: Callable[[dict[str, object]], object], args: dict[str, object], *message: str
) -> str:
    tensors = {k: v for k, v in args.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    before = {k: (v.detach().clone(), v._version) for k, v in tensors.items()}
    with pytest.raises(RAISES) as caught:
        call(args)
    for part in message:
        assert re.search(part, str(caught.value), re.IGNORECASE), f"{part!r} is not in {caught.value!s}"
    for key, (value, version) in before.items():
        assert same_bits(tensors[key], value), f"{key} was written to"
        assert tensors[key]._version == version, f"the version of {key} has changed"
    return str(caught.value)


@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("row", [*WRONG_INPUTS, *WRONG_VECTORS], ids=str)
def test_wrong_argument(row: Wrong, call: str, grad: bool) -> None:
    args = arguments()
    args["input"].requires_grad_(grad)
    args[row.argument] = row.value()
    assert_raises_and_leaves_alone(CALLS[call], args, rf"\b{row.argument}\b", *row.message)


@pytest.mark.parametrize("row", [*WRONG_COUNTERS, *OVERLAPPING], ids=str)
def test_wrong_argument_in_training(row: Wrong) -> None:
    args = arguments()
    args[row.argument] = row.value()
    assert_raises_and_leaves_alone(train_op, args, rf"\b{row.argument}\b", *row.message)


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


@pytest.mark.parametrize("call", ["functional_eval"])
@pytest.mark.parametrize(
    "missing", [("running_mean",), ("running_var",), ("running_mean", "running_var")], ids="+".join
)
def test_eval_needs_both_running_stats(missing: tuple[str, ...], call: str) -> None:
    args = {**arguments(), **dict.fromkeys(missing)}
    assert_raises_and_leaves_alone(CALLS[call], args, missing[0], "evaluation|eval", "defined|expected")


@pytest.mark.parametrize("call", [train_op, functional(True)], ids=["train_op", "functional"])
def test_cumulative_average_needs_a_counter(call: Callable[[dict[str, object]], object]) -> None:
    def run(args: dict[str, object]) -> object:
        args = {**args, "momentum": None}
        if call is train_op:
            return torch.ops.bnext.batch_norm_train(**{**args, "num_batches_tracked": None}, eps=1e-5)
        args.pop("num_batches_tracked")
        return batch_norm(**args, training=True)

    assert_raises_and_leaves_alone(run, arguments(), "momentum", "num_batches_tracked|float|None")


@needs_todays_rule_for_eps
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("eps", [0.0, -1e-5, -1.0, -2.5e-7, float("-inf")], ids=str)
def test_eps_as_in_torch(eps: float, training: bool) -> None:
    args = arguments()
    args.pop("num_batches_tracked")
    try:
        torch.nn.functional.batch_norm(**{k: v.clone() for k, v in args.items()}, training=training, eps=eps)
    except ValueError as error:
        expected = str(error)
    else:
        assert eps == 0.0
        assert not training
        batch_norm(**args, training=training, eps=eps)  # as permitted as in torch
        return
    message = assert_raises_and_leaves_alone(lambda a: batch_norm(**a, training=training, eps=eps), args)
    assert message == expected
    with pytest.raises(ValueError, match="eps"):
        batch_norm(**args, training=training, eps=eps)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_a_channel_as_in_torch(shape: tuple[int, ...]) -> None:
    args = {**arguments(), "input": torch.ones(shape)}
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        torch.nn.functional.batch_norm(args["input"], None, None, training=True)
    for call in (train_op, functional(True)):
        assert assert_raises_and_leaves_alone(call, args) == str(caught.value)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            call(args)


def backward_arguments() -> dict[str, object]:
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


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("row", WRONG_IN_BACKWARD, ids=str)
def test_wrong_argument_of_backward(row: Wrong, training: bool) -> None:
    args = {**backward_arguments(), row.argument: row.value()}

    def call(args: dict[str, object]) -> object:
        return torch.ops.bnext.batch_norm_backward(
            **args, training=training, eps=1e-5, output_mask=[True, True, True, False]
        )

    assert_raises_and_leaves_alone(call, args, rf"\b{row.argument}\b", *row.message)


def test_backward_in_training_needs_the_input_for_its_gradient() -> None:
    args = {**backward_arguments(), "input": None}
    for mask in ([True, False, False, False], [False, True, False, False], [True, False, True, False]):
        with pytest.raises(RAISES, match=r"\binput\b"):
            torch.ops.bnext.batch_norm_backward(**args, training=True, eps=1e-5, output_mask=mask)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_wrong_number_of_channels_leaves_a_module_alone(training: bool) -> None:
    module = bnext.BatchNorm2d(CHANNELS).train(training)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    for shape in ((4, 2, 5, 5), (4, 4, 5, 5), (4, 0, 5, 5)):
        with pytest.raises(RAISES, match=r"\b3\b") as caught:
            module(torch.ones(shape))
        assert re.search(rf"\b{shape[1]}\b", str(caught.value))
    for key, value in module.state_dict().items():
        assert same_bits(value, state[key]), key

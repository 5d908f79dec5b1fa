"""Wrong arguments of what batch_norm_sync is made of: each raises, by name, before anything is read or written."""

from __future__ import annotations

import pytest
import torch
from cases import make_grad, make_input, make_residual
from sync_shares import EPS, backward, gathered, local_stats, merge, sync, train
from wrong_arguments import (
    CHANNELS,
    SHAPE,
    WORDS,
    WRONG_COUNTERS,
    WRONG_INPUTS,
    WRONG_RESIDUALS,
    WRONG_VECTORS,
    Wrong,
    arguments,
    assert_raises_and_leaves_alone,
)


def stats_op(args: dict[str, object]) -> object:
    return local_stats(args["input"], EPS)


def gathered_op(args: dict[str, object]) -> object:
    return merge(**args, momentum=0.1, eps=EPS)


def sync_op(args: dict[str, object]) -> object:
    """Whatever is wrong is found before the group, which does not exist, is looked for."""
    args = {key: value for key, value in args.items() if key != "gathered_stats"}
    return sync(**args, momentum=0.1, eps=EPS, group_size=2, group_name="no such group")


def merged_arguments() -> dict[str, object]:
    args = arguments()
    halves = args["input"][:1], args["input"][1:]
    return {**args, "gathered_stats": gathered(halves), "residual": make_residual(SHAPE)}


WRONG_MOMENTS = [
    Wrong("float32", "gathered_stats", lambda: torch.ones(2, 7), (WORDS[torch.float64], WORDS[torch.float32])),
    Wrong(
        "int64",
        "gathered_stats",
        lambda: torch.ones(2, 7, dtype=torch.int64),
        (WORDS[torch.float64], WORDS[torch.int64]),
    ),
    Wrong("1d", "gathered_stats", lambda: torch.ones(7, dtype=torch.float64), (r"processes, 7", r"\[7\]")),
    Wrong("3d", "gathered_stats", lambda: torch.ones(1, 2, 7, dtype=torch.float64), (r"processes, 7", "1, 2, 7")),
    Wrong("short", "gathered_stats", lambda: torch.ones(2, 6, dtype=torch.float64), (r"processes, 7", "2, 6")),
    Wrong("long", "gathered_stats", lambda: torch.ones(2, 8, dtype=torch.float64), (r"processes, 7", "2, 8")),
    Wrong("meta", "gathered_stats", lambda: torch.ones(2, 7, dtype=torch.float64, device="meta"), ("cpu", "meta")),
]
WRONG_ARGUMENTS = [*WRONG_INPUTS, *WRONG_VECTORS, *WRONG_COUNTERS, *WRONG_RESIDUALS]


@pytest.mark.parametrize("row", WRONG_INPUTS, ids=str)
def test_wrong_argument_of_moments(row: Wrong) -> None:
    assert_raises_and_leaves_alone(stats_op, {"input": row.value()}, r"\binput\b", *row.message)


@pytest.mark.parametrize("row", [*WRONG_ARGUMENTS, *WRONG_MOMENTS], ids=str)
def test_wrong_argument_of_merged(row: Wrong) -> None:
    args = {**merged_arguments(), row.argument: row.value()}
    assert_raises_and_leaves_alone(gathered_op, args, rf"\b{row.argument}\b", *row.message)


@pytest.mark.parametrize("row", WRONG_ARGUMENTS, ids=str)
def test_wrong_argument_of_sync(row: Wrong) -> None:
    args = {**merged_arguments(), row.argument: row.value()}
    assert_raises_and_leaves_alone(sync_op, args, rf"\b{row.argument}\b", *row.message)


@pytest.mark.parametrize("eps", [0.0, -1e-5], ids=str)
def test_eps_is_positive(eps: float) -> None:
    args = merged_arguments()
    gathered_stats = args.pop("gathered_stats")
    for call in (
        lambda args: local_stats(args["input"], eps),
        lambda args: merge(**args, gathered_stats=gathered_stats, momentum=0.1, eps=eps),
        lambda args: sync(**args, momentum=0.1, eps=eps, group_size=2, group_name="none"),
    ):
        assert "eps must be positive" in assert_raises_and_leaves_alone(call, args)


def test_an_activation_that_is_none_and_a_mask_of_one_that_has_none() -> None:
    args = merged_arguments()
    assert_raises_and_leaves_alone(lambda args: merge(**args, momentum=0.1, eps=EPS, act="swish"), args, "leaky_relu")
    call = lambda args: merge(**args, momentum=0.1, eps=EPS, act="silu", with_mask=True)  # noqa: E731
    assert_raises_and_leaves_alone(call, args, "with_mask")


def test_cumulative_average_needs_a_counter() -> None:
    args = {**merged_arguments(), "num_batches_tracked": None}
    call = lambda args: merge(**args, momentum=None, eps=EPS)  # noqa: E731
    assert_raises_and_leaves_alone(call, args, "momentum=None", "num_batches_tracked")


WRONG_MEANS = [
    Wrong("float64", "mean_grads", lambda: torch.ones(2, 3, dtype=torch.float64), ("Float|float32", "Double|float64")),
    Wrong("1d", "mean_grads", lambda: torch.ones(6), (r"2, 3", r"\[6\]")),
    Wrong("3d", "mean_grads", lambda: torch.ones(2, 3, 1), (r"2, 3", "2, 3, 1")),
    Wrong("short", "mean_grads", lambda: torch.ones(2, 2), (r"2, 3", "2, 2")),
    Wrong("transposed", "mean_grads", lambda: torch.ones(3, 2), (r"2, 3", "3, 2")),
    Wrong("meta", "mean_grads", lambda: torch.ones(2, 3, device="meta"), ("cpu", "meta")),
]


def backward_arguments() -> dict[str, object]:
    x = make_input(SHAPE)
    _, stats, _ = train(x, None, None, None, None, None, 0.1, EPS)
    return {"grad_output": make_grad(SHAPE), "input": x, "weight": torch.ones(CHANNELS), "save_stats": stats}


def backward_op(args: dict[str, object]) -> object:
    return backward(**args, training=True, eps=EPS, output_mask=[True, True, True, False])


@pytest.mark.parametrize("row", WRONG_MEANS, ids=str)
def test_wrong_mean_grads(row: Wrong) -> None:
    args = {**backward_arguments(), "mean_grads": row.value()}
    assert_raises_and_leaves_alone(backward_op, args, rf"\b{row.argument}\b", *row.message)


@pytest.mark.parametrize("argument", ["grad_output", "input", "weight"])
def test_given_means_have_no_derivative(argument: str) -> None:
    args = {**backward_arguments(), "mean_grads": torch.ones(2, CHANNELS)}
    args[argument].requires_grad_()
    assert_raises_and_leaves_alone(backward_op, args, "mean_grads", "require grad")
    with torch.no_grad():
        backward_op(args)

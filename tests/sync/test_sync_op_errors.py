"""Wrong combinations of arguments of what batch_norm_sync is made of; single ones are test_bad_arguments.py's."""

from __future__ import annotations

import pytest
import torch
from cases import make_grad, make_input, make_parameters, make_residual
from refusals import Arguments, raised
from sync_shares import EPS, backward, gathered, merge, train

SHAPE = (4, 3, 5, 5)


def merged_arguments(**changes: object) -> Arguments:
    x = make_input(SHAPE)
    args = {"input": x, **make_parameters(3)._asdict(), "num_batches_tracked": torch.tensor(5)}
    return {
        **args,
        "gathered_stats": gathered((x[:1], x[1:])),
        "residual": make_residual(SHAPE),
        "momentum": 0.1,
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act": "silu", "with_mask": True}, ("with_mask",)),
        ({"num_batches_tracked": None, "momentum": None}, ("momentum=None", "num_batches_tracked")),
    ],
    ids=["a mask of what has none", "a cumulative average without a counter"],
)
def test_arguments_that_do_not_go_together(changes: Arguments, message: tuple[str, ...]) -> None:
    raised(lambda args: merge(**args, eps=EPS), merged_arguments(**changes), *message)


@pytest.mark.parametrize("argument", ["grad_output", "input", "weight"])
def test_given_means_have_no_derivative(argument: str) -> None:
    x = make_input(SHAPE)
    _, stats, _ = train(x, None, None, None, None, None, 0.1, EPS)
    args = {"grad_output": make_grad(SHAPE), "input": x, "weight": torch.ones(3), "save_stats": stats}
    args["mean_grads"] = torch.ones(2, 3)
    args[argument].requires_grad_()

    def call(args: Arguments) -> object:
        return backward(**args, training=True, eps=EPS, output_mask=[True, True, True, False])

    raised(call, args, "mean_grads", "require grad")
    with torch.no_grad():
        call(args)

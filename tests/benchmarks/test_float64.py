"""The check against float64: what it lets pass, what it does not, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.closeness import MismatchError
from benchmarks.float64 import CURVATURE, KINKS, Checker, by_channel, require_kind, slope, spread
from benchmarks.operators import ACTIVATIONS, Provider, eager, functions, make_tensors
from benchmarks.suites import BN_ADD_RELU, BN_RELU, LAYOUTS, PLAIN, Case, Epilogue

EPILOGUES = [PLAIN, BN_RELU, BN_ADD_RELU, Epilogue("silu"), Epilogue("hardswish", True), Epilogue("gelu")]
SHAPE = (4, 6, 7, 5)


def case_of(epilogue: Epilogue, dtype: str = "float32", layout: str = "contiguous") -> Case:
    return Case("tiny", SHAPE, dtype, layout, epilogue=epilogue)


def check(case: Case, function: Callable[..., Tensor], name: str = "bnext") -> None:
    Checker(case, make_tensors(case)).check(Provider(name, function))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_torch_and_bnext_pass(epilogue: Epilogue, layout: str, dtype: str) -> None:
    case = case_of(epilogue, dtype, layout)
    for name, function in functions(epilogue).items():
        check(case, function, name)


WRONG: dict[str, tuple[Epilogue, Callable[[Callable[..., Tensor]], Callable[..., Tensor]]]] = {
    "output": (PLAIN, lambda right: lambda *args: right(*args) * 1.01),
    "running_var": (BN_RELU, lambda right: lambda *args: right(args[0], args[1], args[2].clone(), *args[3:])),
    "eval output": (BN_RELU, lambda right: lambda *args: right(*args) * (1.0 if args[-3] else 1.01)),
    "grad_residual": (
        BN_ADD_RELU,
        lambda right: lambda *args: right(*args[:5], args[5] * 2 - args[5].detach(), *args[6:]),
    ),
    "grad_weight": (
        BN_RELU,
        lambda right: lambda *args: right(*args[:3], args[3] * 1.01 - args[3].detach() * 0.01, *args[4:]),
    ),
    "grad_input": (
        BN_RELU,
        lambda right: lambda *args: right(args[0] * 1.01 - args[0].detach() * 0.01, *args[1:]),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    epilogue, spoil = WRONG[name]
    with pytest.raises(MismatchError, match=f"tiny 4x6x7x5.* float32 contiguous: {name} of bnext is not") as error:
        check(case_of(epilogue), spoil(eager(epilogue)))
    assert "\n" not in str(error.value)


def test_a_plain_one_may_round_once() -> None:
    """In bfloat16 two results that are each half a unit off agree with one another, and one of 1.5 units does."""

    def truncating(*args: Any) -> Tensor:
        output = functional.batch_norm(*args)
        return output + output.detach().abs() * 2.0**-7  # one unit in the last place, or two

    with pytest.raises(MismatchError, match="output of bnext is not float64's"):
        check(case_of(PLAIN, "bfloat16"), truncating)


def test_nan_is_close_to_nothing() -> None:
    with pytest.raises(MismatchError, match="inf too far off"):
        check(case_of(BN_RELU), lambda *args: eager(BN_RELU)(*args) * torch.nan)


class TakesSides(torch.autograd.Function):
    """A ReLU whose gradient counts as positive, or not, what is closer to zero than ``within``."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, within: float, positive: bool) -> Tensor:
        ctx.mask = z > (-within if positive else within)
        return z.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.mask, None, None


def near_zero(epilogue: Epilogue, positive: bool, within: float) -> tuple[Case, Any, Callable[..., Tensor]]:
    """A case in which a tenth of the arguments of ReLU are about 1e-8, and a function that chooses their side."""
    case = case_of(epilogue)
    tensors = make_tensors(case)
    with torch.no_grad():
        y = functional.batch_norm(tensors.input, None, None, tensors.weight, tensors.bias, True)
        if epilogue.residual:
            tensors.residual[0].view(-1)[::10] = 1e-8 - y.reshape(-1)[::10]
        else:
            # Symmetric about zero, without a bias: zeros stay zeros.
            tensors.input.view(4, 6, 35)[2:] = -tensors.input.view(4, 6, 35)[:2]
            tensors.input.view(4, 6, 35)[:, :, ::10] = 0.0
            tensors.bias.zero_()

    def function(*args: Any) -> Tensor:
        output = functional.batch_norm(*args[:5], *args[-3:])
        return TakesSides.apply(output + args[5] if epilogue.residual else output, within, positive)

    return case, tensors, function


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU], ids=str)
def test_what_rounding_cannot_tell_from_zero_may_be_on_either_side(epilogue: Epilogue, positive: bool) -> None:
    case, tensors, function = near_zero(epilogue, positive, within=1e-6)
    Checker(case, tensors).check(Provider("bnext", function))


@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU], ids=str)
def test_what_is_clearly_positive_may_not(epilogue: Epilogue) -> None:
    case, tensors, function = near_zero(epilogue, False, within=0.1)
    with pytest.raises(MismatchError, match="grad_"):
        Checker(case, tensors).check(Provider("bnext", function))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_kinks_and_curvatures_are_those_of_the_activations(act: str) -> None:
    z = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    change = (slope(act, z[1:]) - slope(act, z[:-1])).abs()
    jumps = change > 0.1
    places = z[:-1][jumps]
    assert len(places) >= len(KINKS.get(act, ()))
    assert all(min(abs(float(place) - kink) for kink in KINKS[act]) < 2e-4 for place in places)
    assert float(change[~jumps].max() / (z[1] - z[0])) == pytest.approx(CURVATURE[act], abs=0.01)


def test_channels_are_rows() -> None:
    data = torch.arange(48.0).reshape(2, 4, 3, 2).contiguous(memory_format=torch.channels_last)
    index = torch.tensor([0, 3])
    torch.testing.assert_close(by_channel(data, index)[1], data[:, 3].flatten())
    torch.testing.assert_close(by_channel(torch.arange(4.0), index), torch.tensor([[0.0], [3.0]]))
    assert spread(64, 3) == [0, 31, 63]
    assert spread(3, 9) == [0, 1, 2]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(2, 3, 4, 4, dtype=torch.float64), "has dtype"),
        (torch.ones(2, 3, 4, 5), "has shape"),
        (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), "has strides"),
    ],
)
def test_results_of_another_kind_are_named(result: Tensor, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        require_kind("it", result, torch.ones(2, 3, 4, 4))

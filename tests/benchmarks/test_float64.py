"""The check against float64: what it lets pass, what it does not, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.check import MismatchError
from benchmarks.float64 import CURVATURE, KINKS, Checker, by_channel, require_kind, slope, spread
from benchmarks.operations import make_tensors
from benchmarks.providers import ACTIVATIONS, Provider, eager, functions
from benchmarks.suites import BN_ADD_RELU, BN_RELU, LAYOUTS, PLAIN, TORCH_COMPILE, Case, Epilogue

EPILOGUES = [PLAIN, BN_RELU, BN_ADD_RELU, Epilogue("silu"), Epilogue("hardswish", True), Epilogue("gelu")]
SHAPE = (4, 6, 7, 5)


def case_of(epilogue: Epilogue, dtype: str = "float32", layout: str = "contiguous") -> Case:
    return Case("tiny", SHAPE, dtype, layout, (), epilogue)


def check(case: Case, function: Callable[..., Tensor], name: str = "bnext") -> None:
    Checker(case, make_tensors(case)).check(Provider(name, function))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_torch_and_bnext_pass(epilogue: Epilogue, layout: str, dtype: str) -> None:
    case = case_of(epilogue, dtype, layout)
    for name, function in functions(epilogue).items():
        check(case, function, name)


class RoundsStatistics(torch.autograd.Function):
    """A batch norm that keeps its statistics for backward in bfloat16."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        var, mean = torch.var_mean(input.float(), (0, 2, 3), correction=0, keepdim=True)
        ctx.save_for_backward(input, weight, mean.bfloat16(), (var + 1e-5).rsqrt().bfloat16())
        return functional.batch_norm(input, rest[0], rest[1], weight, bias, *rest[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, invstd = (tensor.float() for tensor in ctx.saved_tensors)
        dy, xhat = grads[0].float(), (input - mean) * invstd
        sums = [(dy * factor).sum((0, 2, 3), keepdim=True) for factor in (torch.ones(()), xhat)]
        count = dy.numel() / len(weight)
        grad_input = weight.view(-1, 1, 1) * invstd * (dy - sums[0] / count - xhat * sums[1] / count)
        return grad_input.bfloat16(), sums[1].flatten(), sums[0].flatten(), *[None] * 5


def test_the_compiled_one_of_a_cpu_may_round_its_statistics() -> None:
    """As the compiled code of torch does in 16 bits, and as bnext must not."""

    def function(*args: Any) -> Tensor:
        input, running_mean, running_var, weight, bias, *how = args
        return functional.relu(RoundsStatistics.apply(input, weight, bias, running_mean, running_var, *how))

    case = case_of(BN_RELU, "bfloat16")
    check(case, function, TORCH_COMPILE)
    with pytest.raises(MismatchError, match="grad_"):
        check(case, function)


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


def test_a_side_is_taken_for_all_that_follows() -> None:
    """The gradient of the residual is on one side and that of the bias on the other."""
    case, tensors, low = near_zero(BN_ADD_RELU, False, within=1e-6)
    tensors.grad_output.fill_(1.0)
    high = near_zero(BN_ADD_RELU, True, within=1e-6)[2]

    def function(*args: Any) -> Tensor:
        def detached(*places: int) -> list[Any]:
            return [arg.detach() if place in places else arg for place, arg in enumerate(args)]

        running = {1: args[1].clone(), 2: args[2].clone()}
        again = [running.get(place, arg) for place, arg in enumerate(detached(0, 3, 4))]
        other = high(*again)
        return low(*detached(5)) + other - other.detach()

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

"""The check of a batch norm's results: right ones pass, and a wrong one is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.correctness import Checker, MismatchError, away_from_kinks, require_as_close, require_kind
from benchmarks.operators import Provider, eager, functions, make_tensors
from benchmarks.suites import Case
from benchmarks.traffic import BN_ADD_RELU, BN_RELU, LAYOUTS, PLAIN, Epilogue

EPILOGUES = [PLAIN, BN_RELU, BN_ADD_RELU, Epilogue("silu"), Epilogue("hardswish", True), Epilogue("gelu")]
Function = Callable[..., Tensor]


def case_of(epilogue: Epilogue, dtype: str = "float32", layout: str = "contiguous") -> Case:
    return Case("tiny", (4, 6, 7, 5), dtype, layout, epilogue=epilogue)


def check(case: Case, function: Function) -> None:
    Checker(case, make_tensors(case)).check(Provider("bnext", function))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_torch_and_bnext_pass(epilogue: Epilogue, layout: str, dtype: str) -> None:
    for function in functions(epilogue).values():
        check(case_of(epilogue, dtype, layout), function)


def last(tensor: Tensor, factor: float) -> Tensor:
    """The factor for the last element, 1 for the others."""
    factors = torch.ones_like(tensor)
    factors.view(-1)[-1] = factor
    return factors


def with_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor with a wrong gradient: that of its last element is multiplied by the factor."""
    factors = last(tensor, factor)
    return tensor * factors - (tensor * (factors - 1)).detach()


def replaced(arguments: tuple[Any, ...], index: int, argument: Any) -> tuple[Any, ...]:
    return (*arguments[:index], argument, *arguments[index + 1 :])


# Batch norms with one wrong element of a result, by the name of that result.
WRONG: dict[str, Callable[[Function, tuple[Any, ...]], Tensor]] = {
    "output": lambda right, a: right(*a) + last(a[0], 1.1) - 1,
    "output (NaN)": lambda right, a: right(*a) * last(a[0], torch.nan),
    "eval output": lambda right, a: right(*a) + (0 if a[-3] else last(a[0], 1.1) - 1),
    "running_mean": lambda right, a: right(*replaced(a, 1, a[1].clone())),
    "running_var": lambda right, a: right(*replaced(a, 2, a[2].clone())),
    "grad_input": lambda right, a: right(*replaced(a, 0, with_gradient(a[0], 1.2))),
    "grad_weight": lambda right, a: right(*replaced(a, 3, with_gradient(a[3], 1.01))),
    "grad_bias": lambda right, a: right(*replaced(a, 4, with_gradient(a[4], 1.01))),
    "grad_residual": lambda right, a: right(*replaced(a, 5, with_gradient(a[5], 1.2))),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_wrong_element_is_named(name: str) -> None:
    said = f"tiny 4x6x7x5 add.relu float32 contiguous: {name.partition(' (')[0]} of bnext: .* of its size off"
    with pytest.raises(MismatchError, match=said) as error:
        check(case_of(BN_ADD_RELU), lambda *arguments: WRONG[name](eager(BN_ADD_RELU), arguments))
    assert "\n" not in str(error.value)


def test_float64_computed_in_float32_is_wrong() -> None:
    with pytest.raises(MismatchError, match="output of bnext"):
        check(case_of(PLAIN, "float64"), lambda *arguments: eager(PLAIN)(*arguments).float().double())


@pytest.mark.parametrize(("act", "kinks"), [("relu", [0.0]), ("hardswish", [-3.0, 3.0])])
def test_only_elements_near_a_kink_get_no_gradient(act: str, kinks: list[float]) -> None:
    tensors = make_tensors(case_of(epilogue := Epilogue(act, True)))
    arguments = (tensors.input, None, None, tensors.weight, tensors.bias)
    z = (torch.nn.functional.batch_norm(*arguments, True) + tensors.residual[0]).detach()
    near = away_from_kinks(epilogue, tensors).grad_output == 0
    distance = torch.stack([(z - kink).abs() for kink in kinks]).amin(0)
    assert near.any()
    assert float(distance[near].max()) < 2**-5 <= float(distance[~near].min())


@pytest.mark.parametrize(
    ("error", "torchs", "least", "right"),
    [
        (3e-4, 1e-4, 0.0, True),
        (3e-4, 0.0, 0.0, True),
        (5e-4, 1e-4, 0.0, False),
        (5e-4, 1e-4, 6e-4, True),
        (7e-4, 1e-4, 6e-4, False),
        (3e-2, 1e-2, 0.0, True),
        (torch.nan, 1.0, 1.0, False),
    ],
)
def test_an_error_may_be_a_few_times_torchs(error: float, torchs: float, least: float, right: bool) -> None:
    expected = {"it": torch.ones(10, dtype=torch.float64)}
    actual, torch_actual = ({"it": torch.full((10,), 1 + off)} for off in (error, torchs))
    if right:
        require_as_close("{}", actual, torch_actual, expected, torch.mean, least)
    else:
        with pytest.raises(MismatchError, match=r"^it: "):
            require_as_close("{}", actual, torch_actual, expected, torch.mean, least)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(2, 3, 4, 4, dtype=torch.float64), "has dtype"),
        (torch.ones(2, 3, 4, 5), "has shape"),
        (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), "has strides"),
    ],
)
def test_a_wrong_dtype_shape_or_layout_is_named(result: Tensor, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        require_kind("it", result, torch.ones(2, 3, 4, 4))

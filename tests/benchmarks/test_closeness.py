"""When a result is right: what passes, what does not, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.closeness import Checker, MismatchError, require_as_close, require_kind
from benchmarks.operators import Provider, eager, functions, make_tensors
from benchmarks.suites import BN_ADD_RELU, BN_RELU, LAYOUTS, PLAIN, Case, Epilogue

EPILOGUES = [PLAIN, BN_RELU, BN_ADD_RELU, Epilogue("silu"), Epilogue("hardswish", True), Epilogue("gelu")]
Function = Callable[..., Tensor]


def check(epilogue: Epilogue, function: Function, dtype: str = "float32", layout: str = "contiguous") -> None:
    case = Case("tiny", (4, 6, 7, 5), dtype, layout, epilogue=epilogue)
    Checker(case, make_tensors(case)).check(Provider("bnext", function))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_torch_and_bnext_pass(epilogue: Epilogue, layout: str, dtype: str) -> None:
    for function in functions(epilogue).values():
        check(epilogue, function, dtype, layout)


def one_element(output: Tensor) -> Tensor:
    changed = output.clone()
    changed.view(-1)[-1] += 0.1
    return changed


WRONG: dict[str, tuple[Epilogue, Callable[[Function], Function]]] = {
    "output": (PLAIN, lambda right: lambda *args: right(*args) * 1.01),
    "output ": (BN_RELU, lambda right: lambda *args: one_element(right(*args))),
    "output  ": (BN_RELU, lambda right: lambda *args: right(*args) * torch.nan),
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
    "grad_input": (BN_RELU, lambda right: lambda *args: right(args[0] * 1.01 - args[0].detach() * 0.01, *args[1:])),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    epilogue, spoil = WRONG[name]
    said = f"tiny 4x6x7x5.* float32 contiguous: {name.strip()} of bnext: .* of its size off"
    with pytest.raises(MismatchError, match=said) as error:
        check(epilogue, spoil(eager(epilogue)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "torchs", "right"),
    [(3e-4, 1e-4, True), (3e-4, 0.0, True), (5e-4, 1e-4, False), (3e-2, 1e-2, True), (torch.nan, 1.0, False)],
)
def test_as_close_is_a_few_times_what_torch_is_off(error: float, torchs: float, right: bool) -> None:
    expected = {"it": torch.ones(10, dtype=torch.float64)}
    actual, torch_actual = ({"it": torch.full((10,), 1 + off)} for off in (error, torchs))
    if right:
        require_as_close("{}", actual, torch_actual, expected)
    else:
        with pytest.raises(MismatchError, match=r"^it: "):
            require_as_close("{}", actual, torch_actual, expected)


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

"""The suites' cases, and the bytes that an operation has to move."""

from math import prod

import pytest

from benchmarks import suites
from benchmarks.suites import EAGER_PROVIDERS, select_cases
from benchmarks.traffic import BN_ADD_RELU, BN_RELU, LAYOUTS, model_bytes, tensor_bytes


@pytest.mark.parametrize(
    ("operation", "tensors", "with_residual", "bits"),
    [("forward", 2, 3, 1), ("backward", 3, 4, 1), ("eval", 2, 3, 0), ("forward_backward", 5, 7, 2)],
)
def test_model_reads_or_writes_each_tensor_once(operation: str, tensors: int, with_residual: int, bits: int) -> None:
    shape, numel = (2, 3, 5, 7), 210
    for dtype, item in (("float16", 2), ("bfloat16", 2), ("float32", 4), ("float64", 8)):
        assert model_bytes(operation, shape, dtype) == model_bytes(operation, shape, dtype, BN_RELU)
        assert model_bytes(operation, shape, dtype) == tensors * item * numel
        assert model_bytes(operation, shape, dtype, BN_ADD_RELU) == with_residual * item * numel + bits * 27


def test_fused_layers_are_resnet50s_and_compiled_where_they_have_bars() -> None:
    cases = select_cases(["fused"])
    assert sum(suites.is_fused_layer(*tensor) for tensor in {(case.shape, case.epilogue) for case in cases}) == 9
    large = [case for case in cases if tensor_bytes(case.shape, case.dtype) > 32e6]
    large += select_cases(["fused", "fused-256"], "cuda", ["bfloat16"])
    assert all(case.providers[-1] == "torch-compile" for case in large)


def test_the_provider_that_may_fail_is_last() -> None:
    def providers(device: str, **options: bool) -> tuple[str, ...]:
        return select_cases(["fused"], device, ["bfloat16"], **options)[0].providers

    assert providers("cpu") == ("torch", "bnext", "torch-compile")
    assert providers("cpu", with_compile=False) == ("torch", "bnext")
    assert providers("cuda") == ("torch", "bnext", "torch-no-cudnn", "torch-compile")
    assert len(providers("cuda", with_plans=True)) == 4 + len(suites.PLANS)


def test_cases_have_the_chosen_dtypes_layouts_and_operations_that_exist() -> None:
    assert {case.layout for case in select_cases(["2d"])} == {"contiguous"}
    for asked, chosen in ((("eval", "backward"), {("backward", "eval")}), (("forward_backward",), set())):
        assert {case.operations for case in select_cases(["large"], operations=asked)} == chosen
    assert not select_cases(["training"], dtypes=["float16"])
    assert not select_cases(["training"], operations=["eval"])
    assert not select_cases(["compiled"], with_compile=False)
    assert [case.layout for case in select_cases(["models"], dtypes=["float32"], models=["unet"])] == [*LAYOUTS]
    (case,) = select_cases(["training"], "cpu", ["bfloat16"], ["contiguous"], with_compile=False)
    assert case.providers == EAGER_PROVIDERS


def test_quick_leaves_out_large_tensors_and_most_models() -> None:
    cases = select_cases(["resnet50", "large", "2d", "fused"], quick=True)
    assert {case.suite for case in cases} == {"resnet50", "2d", "fused"}
    assert max(prod(case.shape) for case in cases) <= suites.QUICK_MAX_ELEMENTS
    quick = select_cases(["models"], quick=True)
    assert {case.model for case in quick} == {"resnet20", "torchvision/mobilenet_v3_large", "timm/regnety_004"}
    assert {case.providers for case in quick} == {(*EAGER_PROVIDERS, suites.WITHOUT)}


def test_a_suite_that_has_to_be_named_has_a_budget_of_its_own() -> None:
    assert suites.default_suites("cpu") == ["resnet50", "large", "2d"]
    assert suites.default_seconds("cpu", suites.default_suites("cpu")) == suites.default_seconds("cpu", ["2d"]) == 110
    assert suites.default_seconds("cpu", ["2d", "fused", "fused"]) == 110 + (suites.SUITES["cpu"]["fused"].seconds or 0)

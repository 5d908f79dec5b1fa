"""What python -m benchmarks measures, and what it says an operation has to move."""

from __future__ import annotations

from math import prod

import pytest

from benchmarks.operators import ACTIVATIONS
from benchmarks.suites import (
    BN_ADD_RELU,
    BN_RELU,
    COMPILE_S,
    EAGER_PROVIDERS,
    LAYOUTS,
    QUICK_MAX_ELEMENTS,
    SUITES,
    WITHOUT,
    Case,
    check_work,
    default_seconds,
    default_suites,
    is_fused_layer,
    model_bytes,
    operation_work,
    select_cases,
    tensor_bytes,
)

FIVE = (*EAGER_PROVIDERS, "torch-compile", "bnext-compile")


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


@pytest.mark.parametrize(
    ("on", "name", "batch"), [("cpu", "resnet50", 32), ("cuda", "resnet50-32", 32), ("cuda", "resnet50-256", 256)]
)
def test_resnet50_has_every_shape_in_both_dtypes_and_layouts(on: str, name: str, batch: int) -> None:
    cases = select_cases([name], on)
    measured = {(case.shape, case.dtype, case.layout) for case in cases}
    assert len(measured) == len(cases) == 12 * 2 * 2
    assert {shape[0] for shape, _, _ in measured} == {batch}
    compiled = {case.shape for case in cases if "torch-compile" in case.providers}
    assert len(compiled) == (6 if name == "resnet50-256" else 0)


def test_fused_layers_are_resnet50s_a_small_tensor_and_other_activations() -> None:
    cases = select_cases(["fused"])
    tensors = {(case.shape, case.epilogue) for case in cases}
    assert len(cases) == 4 * len(tensors) == 4 * 14
    of = {e: {s[1:3] for s, found in tensors if found == e and s[0] == 32} for e in (BN_RELU, BN_ADD_RELU)}
    assert of[BN_RELU] == {(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)}
    assert of[BN_ADD_RELU] == {(256, 56), (512, 28), (1024, 14), (2048, 7)}
    assert {epilogue for shape, epilogue in tensors if shape == (8, 64, 14, 14)} == {BN_RELU, BN_ADD_RELU}
    assert {epilogue.act for _, epilogue in tensors} == set(ACTIVATIONS)
    assert sum(is_fused_layer(*tensor) for tensor in tensors) == 9
    # torch.compile is measured where its bars are.
    large = [case for case in cases if tensor_bytes(case.shape, case.dtype) > 32e6]
    large += select_cases(["fused", "fused-256"], "cuda", ["bfloat16"])
    assert all(case.providers[-1] == "torch-compile" for case in large)


def test_providers_are_in_an_order_in_which_what_may_fail_is_last() -> None:
    def providers(device: str, **options: bool) -> tuple[str, ...]:
        return select_cases(["fused"], device, ["bfloat16"], **options)[0].providers

    assert providers("cpu") == ("torch", "bnext", "torch-compile")
    assert providers("cpu", with_compile=False) == ("torch", "bnext")
    assert providers("cuda") == ("torch", "bnext", "torch-no-cudnn", "torch-compile")
    assert len(providers("cuda", with_plans=True)) == 7


def test_a_case_has_what_was_asked_for_and_exists() -> None:
    assert {case.layout for case in select_cases(["2d"])} == {"contiguous"}
    assert not select_cases(["2d"], layouts=["channels_last"])
    for asked, chosen in ((("eval", "backward"), {("backward", "eval")}), (("forward_backward",), set())):
        assert {case.operations for case in select_cases(["large"], operations=asked)} == chosen
    assert not select_cases(["training"], dtypes=["float16"])
    assert not select_cases(["training"], operations=["eval"])
    assert not select_cases(["compiled"], with_compile=False)
    assert [case.layout for case in select_cases(["models"], dtypes=["float32"], models=["unet"])] == [*LAYOUTS]
    (case,) = select_cases(["training"], "cpu", ["bfloat16"], ["contiguous"], with_compile=False)
    assert case.providers == EAGER_PROVIDERS


def test_quick_leaves_big_tensors_and_most_models_out() -> None:
    cases = select_cases(["resnet50", "large", "2d", "fused"], quick=True)
    assert {case.suite for case in cases} == {"resnet50", "2d", "fused"}
    assert max(prod(case.shape) for case in cases) <= QUICK_MAX_ELEMENTS
    quick = select_cases(["models"], quick=True)
    assert {case.model for case in quick} == {"resnet20", "torchvision/mobilenet_v3_large", "timm/regnety_004"}
    assert {case.providers for case in quick} == {(*EAGER_PROVIDERS, WITHOUT)}


def test_work_grows_with_bytes_providers_and_compiling() -> None:
    small = Case("2d", (4, 8), "float32", "contiguous", ("forward",), ("torch", "bnext"))
    compiled = Case("2d", (4, 8), "float32", "contiguous", ("forward",), ("torch", "bnext", "torch-compile"))
    large = Case("2d", (4096, 512), "float32", "contiguous", ("forward",), ("torch", "bnext"))
    assert check_work(compiled, "cpu") - check_work(small, "cpu") == COMPILE_S["cpu"]
    assert operation_work("forward", large, "cpu") > operation_work("forward", small, "cpu")
    assert operation_work("forward_backward", large, "cpu") > operation_work("forward", large, "cpu")
    five, three = (select_cases(["training"], with_compile=compiles)[0] for compiles in (True, False))
    assert check_work(five, "cpu") - check_work(three, "cpu") > 2 * 25


def test_what_has_to_be_named_has_a_budget_of_its_own() -> None:
    assert default_suites("cpu") == ["resnet50", "large", "2d"]
    assert default_suites("cuda") == ["resnet50-256", "resnet50-32", "2d"]
    assert default_seconds("cpu", default_suites("cpu")) == default_seconds("cpu", ["2d"]) == 110
    assert default_seconds("cpu", ["2d", "fused", "fused"]) == 110 + (SUITES["cpu"]["fused"].seconds or 0)
    assert default_seconds("cpu", ["training", "compiled"]) == 270 + 180


def test_resnet50_is_trained_five_ways() -> None:
    found = [(c.model, c.shape, c.dtype, c.layout, c.providers) for c in select_cases(["training"])]
    assert found == [("resnet50", (8, 3, 64, 64), "float32", layout, FIVE) for layout in LAYOUTS]
    (gpu,) = select_cases(["training"], "cuda")
    assert (gpu.shape, gpu.dtype, gpu.layout) == ((256, 3, 224, 224), "bfloat16", "channels_last")
    assert gpu.providers == FIVE


def test_models_are_measured_in_both_dtypes_and_in_the_layouts_that_their_inputs_have() -> None:
    for on in ("cpu", "cuda"):
        calls = select_cases(["compiled"], on)
        assert {case.model for case in calls} == {"bn", "conv-bn-relu", "bottleneck"}
        assert len(calls) == 5 * 2 * 2
        assert {case.providers for case in calls} == {FIVE[3:]}
    cases = select_cases(["models"])
    assert len(cases) == len({(case.model, case.dtype, case.layout) for case in cases}) == (15 * 2 - 1) * 2
    assert [case.layout for case in cases if case.model == "pointnet"] == ["contiguous"] * 2
    assert {case.providers[:4] for case in cases} == {(*EAGER_PROVIDERS, WITHOUT)}
    assert {case.model for case in cases if case.providers[4:] == FIVE[3:]} == {"resnet20", "torchvision/resnet18"}

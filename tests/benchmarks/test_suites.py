"""What python -m benchmarks measures, and what it says an operation has to move."""

from __future__ import annotations

from math import prod

import pytest

from benchmarks.measure import Host, case_work
from benchmarks.model_suites import EAGER_PROVIDERS, WITHOUT, default_model_seconds, select_model_cases
from benchmarks.providers import ACTIVATIONS
from benchmarks.suites import (
    BN_ADD_RELU,
    BN_RELU,
    COMPILE_WORK_BYTES,
    LAYOUTS,
    QUICK_MAX_ELEMENTS,
    SUITES,
    TENSOR_PASSES,
    Case,
    default_seconds,
    default_suites,
    is_fused_layer,
    model_bytes,
    select_cases,
    tensor_bytes,
)

RESNET50 = {(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)}
RESNET50 |= {(256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)}
BOTH = ("float32", "bfloat16")


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
    cases = select_cases([name], BOTH, LAYOUTS, device=on)
    measured = {(case.shape, case.dtype, case.layout) for case in cases}
    assert len(measured) == len(cases) == 12 * 2 * 2
    assert {shape[:1] + shape[1:3] for shape, _, _ in measured} == {(batch, *chosen) for chosen in RESNET50}
    compiled = {case.shape for case in cases if case.compiled}
    assert len(compiled) == (6 if name == "resnet50-256" else 0)


def test_fused_layers_are_resnet50s_a_small_tensor_and_other_activations() -> None:
    cases = select_cases(["fused"], BOTH, LAYOUTS)
    tensors = {(case.shape, case.epilogue) for case in cases}
    assert len(cases) == 4 * len(tensors) == 4 * 14
    of = {e: {s[1:3] for s, found in tensors if found == e and s[0] == 32} for e in (BN_RELU, BN_ADD_RELU)}
    assert of[BN_RELU] == {(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)}
    assert of[BN_ADD_RELU] == {(256, 56), (512, 28), (1024, 14), (2048, 7)}
    assert {epilogue for shape, epilogue in tensors if shape == (8, 64, 14, 14)} == {BN_RELU, BN_ADD_RELU}
    assert {epilogue.act for _, epilogue in tensors} == set(ACTIVATIONS)
    assert sum(is_fused_layer(*tensor) for tensor in tensors) == 9
    # torch.compile is measured where its bars are.
    assert all(case.compiled for case in cases if tensor_bytes(case.shape, case.dtype) > 32e6)
    for name in ("fused", "fused-256"):
        assert all(case.compiled for case in select_cases([name], ["bfloat16"], LAYOUTS[1:], device="cuda"))


def test_a_two_dimensional_tensor_has_one_layout() -> None:
    assert {case.layout for case in select_cases(["2d"], ["float32"], LAYOUTS)} == {"contiguous"}
    assert not select_cases(["2d"], ["float32"], ["channels_last"])


def test_operations_are_those_asked_for_that_the_suite_has() -> None:
    def chosen(*operations: str) -> set[tuple[str, ...]]:
        return {case.operations for case in select_cases(["large"], ["float32"], ["contiguous"], operations)}

    assert chosen("eval", "backward") == {("backward", "eval")}
    assert chosen("forward_backward", "eval") == {("eval",)}
    assert chosen("forward_backward") == set()


def test_quick_leaves_big_tensors_out() -> None:
    cases = select_cases(SUITES, ["float32"], ["contiguous"], quick=True)
    assert {case.suite for case in cases} == {"resnet50", "2d", "fused"}
    assert max(prod(case.shape) for case in cases) <= QUICK_MAX_ELEMENTS
    assert (8, 64, 14, 14) in {case.shape for case in cases}


def test_work_grows_with_bytes_operations_and_compiling() -> None:
    host = Host(with_compile=True)
    small = Case("x", (4, 8), "float32", "contiguous", ("forward",), compiled=True)
    assert case_work(host, small) - case_work(Host(False), small) == COMPILE_WORK_BYTES
    for shape, operations in (((4096, 512), ("forward",)), ((4, 8), tuple(TENSOR_PASSES))):
        assert case_work(host, Case("x", shape, "float32", "contiguous", operations, compiled=True)) > case_work(
            host, small
        )


def test_what_has_to_be_named_has_a_budget_of_its_own() -> None:
    assert default_suites("cpu") == ["resnet50", "large", "2d"]
    assert default_suites("cuda") == ["resnet50-256", "resnet50-32", "2d"]
    assert default_seconds("cpu", default_suites("cpu")) == default_seconds("cpu", ["2d"]) == 110
    assert default_seconds("cpu", ["fused"]) == SUITES["fused"].seconds
    assert default_seconds("cpu", ["2d", "fused", "fused"]) == 110 + (SUITES["fused"].seconds or 0)
    assert default_model_seconds("cpu", ["training", "2d"]) == 270
    assert default_model_seconds("cpu", ["training", "compiled"]) == 270 + 180


# Whole models.

FIVE = (*EAGER_PROVIDERS, "torch-compile", "bnext-compile")


def test_resnet50_is_trained_five_ways() -> None:
    cpu = select_model_cases(["training"], "cpu")
    assert [(c.model, c.shape, c.dtype, c.layout, c.providers) for c in cpu] == [
        ("resnet50", (8, 3, 64, 64), "float32", layout, FIVE) for layout in LAYOUTS
    ]
    (gpu,) = select_model_cases(["training"], "cuda")
    assert (gpu.model, gpu.shape, gpu.dtype) == ("resnet50", (256, 3, 224, 224), "bfloat16")
    assert (gpu.layout, gpu.providers) == ("channels_last", FIVE)


@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_small_models_are_compiled_in_both_dtypes_and_layouts(on: str) -> None:
    chosen = select_model_cases(["compiled"], on)
    assert {case.model for case in chosen} == {"bn", "conv-bn-relu", "bottleneck"}
    assert len(chosen) == 5 * 2 * 2
    assert {case.providers for case in chosen} == {FIVE[3:]}
    assert {case.operations for case in chosen} == {("forward_backward", "eval")}


def test_models_are_trained_in_both_dtypes_and_in_the_layouts_that_their_inputs_have() -> None:
    cases = select_model_cases(["models"], "cpu")
    assert len(cases) == len({(case.model, case.dtype, case.layout) for case in cases}) == (15 * 2 - 1) * 2
    assert [case.layout for case in cases if case.model == "pointnet"] == ["contiguous"] * 2
    assert {case.providers[:4] for case in cases} == {(*EAGER_PROVIDERS, WITHOUT)}
    assert {case.model for case in cases if case.providers[4:] == FIVE[3:]} == {"resnet20", "torchvision/resnet18"}
    quick = select_model_cases(["models"], "cpu", quick=True)
    assert {case.model for case in quick} == {"resnet20", "torchvision/mobilenet_v3_large", "timm/regnety_004"}
    assert {case.providers for case in quick} == {(*EAGER_PROVIDERS, WITHOUT)}


def test_models_that_are_asked_for_and_do_not_exist_are_left_out() -> None:
    assert not select_model_cases(["training"], "cpu", dtypes=["float16"])
    assert not select_model_cases(["training"], "cpu", operations=["eval"])
    assert not select_model_cases(["compiled"], "cpu", with_compile=False)
    assert [case.layout for case in select_model_cases(["models"], "cpu", ["float32"], models=["unet"])] == [*LAYOUTS]
    (case,) = select_model_cases(["training"], "cpu", ["bfloat16"], ["contiguous"], with_compile=False)
    assert case.providers == EAGER_PROVIDERS

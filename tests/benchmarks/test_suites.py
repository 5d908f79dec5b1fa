"""What python -m benchmarks measures, and what it says an operation has to move."""

from __future__ import annotations

from math import prod

import pytest

from benchmarks.suites import SUITES, TENSOR_PASSES, Case, case_work, model_bytes, select_cases, tensor_bytes


@pytest.mark.parametrize(
    ("operation", "tensors"), [("forward", 2), ("eval", 2), ("backward", 3), ("forward_backward", 5)]
)
def test_model_reads_or_writes_each_tensor_once(operation: str, tensors: int) -> None:
    assert model_bytes(operation, (32, 64, 112, 112), "float32") == tensors * 4 * 32 * 64 * 112 * 112
    assert model_bytes(operation, (4, 8), "bfloat16") == tensors * 2 * 4 * 8


@pytest.mark.parametrize(("dtype", "item"), [("float16", 2), ("bfloat16", 2), ("float32", 4), ("float64", 8)])
def test_tensor_bytes_follow_the_dtype(dtype: str, item: int) -> None:
    assert tensor_bytes((3, 5, 7), dtype) == 105 * item


def test_count_is_elements_a_channel() -> None:
    assert Case("x", (32, 64, 7, 7), "float32", "contiguous", ()).count == 32 * 49
    assert Case("x", (4, 8), "float32", "contiguous", ()).count == 4


def test_default_has_every_resnet50_shape_in_both_dtypes_and_layouts() -> None:
    cases = select_cases(SUITES, ("float32", "bfloat16"), ("contiguous", "channels_last"))
    measured = [(case.shape, case.dtype, case.layout) for case in cases if case.suite == "resnet50"]
    assert len(measured) == len(set(measured)) == 12 * 2 * 2
    assert {shape[0] for shape, _, _ in measured} == {32}
    assert {shape[1:3] for shape, _, _ in measured} == {
        (64, 112),
        (64, 56),
        (256, 56),
        (128, 56),
        (128, 28),
        (512, 28),
        (256, 28),
        (256, 14),
        (1024, 14),
        (512, 14),
        (512, 7),
        (2048, 7),
    }


def test_a_two_dimensional_tensor_has_one_layout() -> None:
    cases = select_cases(["2d"], ["float32"], ["contiguous", "channels_last"])
    assert [case.layout for case in cases] == ["contiguous"] * len(SUITES["2d"].shapes)
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
    assert max(prod(case.shape) for case in cases) <= 2_000_000


def test_work_grows_with_bytes_and_operations() -> None:
    small = Case("x", (4, 8), "float32", "contiguous", ("forward",))
    assert case_work(small) < case_work(Case("x", (64, 512), "float32", "contiguous", ("forward",)))
    assert case_work(small) < case_work(Case("x", (4, 8), "float32", "contiguous", tuple(TENSOR_PASSES)))

"""python -m benchmarks --suite fused: what it measures, with what, and what a graph holds, on the smallest shapes."""

from __future__ import annotations

import weakref
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import HostRuntime
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure, providers, rows, suites, timing
from benchmarks.__main__ import main
from benchmarks.cuda import device, rotation
from benchmarks.cuda import measure as cuda
from benchmarks.cuda.operations import copy_rotation, make_sets
from benchmarks.memory import held
from benchmarks.operations import floor_call, make_tensors
from benchmarks.providers import ACTIVATIONS, eager, functions, provider_makers
from benchmarks.suites import (
    BN_ADD_RELU,
    BN_RELU,
    CUDA_SUITES,
    PLAIN,
    SUITES,
    TENSOR_PASSES,
    Case,
    Epilogue,
    Suite,
    case_work,
    default_seconds,
    default_suites,
    model_bytes,
    select_cases,
)

SHAPE = (2, 3, 4, 4)
LAYOUTS = ("contiguous", "channels_last")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = ((BN_RELU, (SHAPE,)), (BN_ADD_RELU, (SHAPE,)))
    dtypes = ("float32", "bfloat16")
    tiny = Suite(operations=tuple(TENSOR_PASSES), compiled=(SHAPE,), compiled_dtypes=dtypes, fused=fused, seconds=5)
    for chosen in (SUITES, CUDA_SUITES):
        monkeypatch.setitem(chosen, "tiny", tiny)
    # What the calls take does not matter here: few of them.
    monkeypatch.setattr(rotation, "MAX_GRAPH_CALLS", 4)
    monkeypatch.setattr(timing, "MIN_ROUND_S", 1e-5)
    monkeypatch.setattr(measure, "WARM_BYTES", 1)


@pytest.fixture
def _compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "compiled", providers.out_of_place)


def run(output: Path, *options: str) -> int:
    return main(["--suite", "tiny", "--rounds", "1", "--threads", "1", "--output", str(output), *options])


def test_the_suite_is_resnet50_a_small_tensor_and_other_activations() -> None:
    cases = select_cases(["fused"], ["float32", "bfloat16"], LAYOUTS)
    tensors = {(case.shape, case.epilogue) for case in cases}
    assert len(cases) == 4 * len(tensors) == 4 * 14
    relu = {shape[1:3] for shape, epilogue in tensors if epilogue == BN_RELU and shape[0] == 32}
    add_relu = {shape[1:3] for shape, epilogue in tensors if epilogue == BN_ADD_RELU and shape[0] == 32}
    assert relu == {(64, 112), (64, 56), (128, 28), (256, 14), (512, 7)}
    assert add_relu == {(256, 56), (512, 28), (1024, 14), (2048, 7)}
    assert {epilogue for shape, epilogue in tensors if shape == (8, 64, 14, 14)} == {BN_RELU, BN_ADD_RELU}
    assert {epilogue.act for _, epilogue in tensors} == set(ACTIVATIONS)
    assert all(case.operations == ("forward", "backward", "eval", "forward_backward") for case in cases)
    assert sum(suites.is_fused_layer(*tensor) for tensor in tensors) == 9


def test_torch_compile_is_measured_where_its_bars_are() -> None:
    for case in select_cases(["fused"], ["float32", "bfloat16"], LAYOUTS):
        large = suites.tensor_bytes(case.shape, case.dtype) > 32e6
        assert case.compiled or not large
    for name in ("fused", "fused-256"):
        for case in select_cases([name], ["bfloat16"], ["channels_last"], device="cuda"):
            assert case.compiled


def test_fused_is_measured_only_when_it_is_named_and_has_its_own_budget() -> None:
    assert default_suites("cpu") == ["resnet50", "large", "2d"]
    assert default_suites("cuda") == ["resnet50-256", "resnet50-32", "2d"]
    assert default_seconds("cpu", default_suites("cpu")) == default_seconds("cpu", ["2d"]) == 110
    assert default_seconds("cpu", ["fused"]) == SUITES["fused"].seconds
    assert default_seconds("cpu", ["2d", "fused", "tiny", "fused"]) == 110 + (SUITES["fused"].seconds or 0) + 5


@pytest.mark.parametrize(
    ("operation", "tensors", "bits"),
    [("forward", 3, 1), ("backward", 4, 1), ("eval", 3, 0), ("forward_backward", 7, 2)],
)
def test_a_residual_is_a_pass_each_way_and_a_bit_an_element(operation: str, tensors: int, bits: int) -> None:
    shape, numel = (2, 3, 5, 7), 210
    assert model_bytes(operation, shape, "float32", BN_ADD_RELU) == tensors * 4 * numel + bits * 27
    assert model_bytes(operation, shape, "float32", BN_RELU) == model_bytes(operation, shape, "float32")


@pytest.mark.parametrize("operation", TENSOR_PASSES)
def test_the_floors_move_the_bytes_of_the_model(operation: str) -> None:
    case = Case("tiny", (2, 8, 4, 4), "bfloat16", "channels_last", (), BN_ADD_RELU)
    moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
    tensors = make_tensors(case)
    results = floor_call(operation, tensors)()
    targets: Any = results if isinstance(results, tuple) else (results,)
    assert len({target.data_ptr() for target in targets}) >= min(len(targets), 2)
    assert all(bool(target.any()) for target in targets), "something was moved"
    # An addition, which is what a forward and an evaluation with a residual begin with, reads twice what it writes.
    written = sum(target.nbytes for target in targets)
    additions = 0 if operation == "backward" else tensors.input.nbytes
    assert 2 * written + additions == moved
    for target in copy_rotation(operation, case, "cpu", 1).run(1):
        assert isinstance(target, Tensor)
        assert 2 * target.nbytes == moved


def test_work_counts_compiling_where_it_is_done() -> None:
    case = Case("tiny", SHAPE, "float32", "contiguous", ("forward",), BN_RELU, compiled=True)
    assert case_work(case, True) - case_work(case, False) == suites.COMPILE_WORK_BYTES


def test_sets_have_residuals_of_their_own() -> None:
    sets = make_sets(Case("tiny", SHAPE, "bfloat16", "channels_last", (), BN_ADD_RELU), "cpu", 3)
    residuals = [tensors.residual[0] for tensors in sets]
    assert len({residual.data_ptr() for residual in residuals}) == 3
    assert all(residual.is_leaf and residual.requires_grad for residual in residuals)
    assert all(residual.is_contiguous(memory_format=torch.channels_last) for residual in residuals)


@pytest.mark.usefixtures("_compiled_as_it_is")
def test_run_leaves_rows_of_every_provider_and_what_their_graphs_hold(tmp_path: Path) -> None:
    assert run(tmp_path) == 0
    found = rows.load_rows(tmp_path / "results.json")
    keys = {(row.epilogue, row.dtype, row.layout, row.op, row.provider) for row in found}
    assert len(found) == len(keys) == 2 * 2 * 2 * len(TENSOR_PASSES) * 4
    assert {row.provider for row in found} == {"torch", "torch-compile", "bnext", "copy"}
    for row in found:
        assert row.bytes == model_bytes(row.op, row.shape, row.dtype, row.epilogue)
        assert (row.held_bytes is not None) == (row.op == "forward" and row.provider != "copy")


def test_without_compile_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "compiled", None)
    assert run(tmp_path, "--no-compile", "--dtype", "float32") == 0
    assert {row.provider for row in rows.load_rows(tmp_path / "results.json")} == {"torch", "bnext", "copy"}


def test_a_compiler_that_fails_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: Epilogue) -> Any:
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(providers, "compiled", missing)
    assert run(tmp_path, "--dtype", "float32", "--layout", "contiguous") == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    message = "note: tiny 2x3x4x4 add+relu float32 contiguous: torch-compile failed: RuntimeError: no C++ compiler"
    assert errors[1].endswith(message)
    assert {row.provider for row in rows.load_rows(tmp_path / "results.json")} == {"torch", "bnext", "copy"}


def test_bnext_wrong_is_an_error_and_not_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(providers, "fused", lambda epilogue: lambda *args: eager(epilogue)(*args) * 1.01)
    assert run(tmp_path, "--no-compile", "--dtype", "float32", "--layout", "contiguous") == 1
    assert not list(tmp_path.iterdir())
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("output of bnext is not float64's" in error for error in errors)


@pytest.mark.usefixtures("_compiled_as_it_is")
def test_a_gpu_measures_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(cuda, "CudaRuntime", HostRuntime)
    assert run(tmp_path, "--device", "cuda", "--dtype", "bfloat16", "--layout", "channels_last") == 0
    found = rows.load_rows(tmp_path / "results.json")
    names = {"torch", "torch-no-cudnn", "torch-compile", "bnext", "copy"}
    for epilogue in (BN_RELU, BN_ADD_RELU):
        chosen = [row for row in found if row.epilogue == epilogue]
        assert {(row.op, row.mode, row.provider) for row in chosen} == {
            (op, mode, name) for op in TENSOR_PASSES for mode in ("graph", "eager") for name in names
        }
        assert all(row.bytes == model_bytes(row.op, row.shape, row.dtype, epilogue) for row in chosen)
        assert all(row.held_bytes is not None for row in chosen if row.op == "forward" and row.provider != "copy")


class Operators(TorchDispatchMode):
    """The names of what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("epilogue", "operators"),
    [(BN_RELU, ["relu_"]), (BN_ADD_RELU, ["add_", "relu_"]), (Epilogue("silu"), ["silu"])],
    ids=str,
)
def test_torch_is_as_a_user_writes_it(epilogue: Epilogue, operators: list[str]) -> None:
    """In place, where that saves memory and not costs a copy; and all mean the same."""
    t = make_tensors(Case("tiny", SHAPE, "float32", "contiguous", (), epilogue))
    arguments = (t.input, None, None, t.weight, t.bias, *t.residual, True, 0.1, 1e-5)
    with Operators() as log:
        eager(epilogue)(*arguments)
    known = {"add", "add_", *ACTIVATIONS, *(f"{act}_" for act in ACTIVATIONS), "clone"}
    assert [name for name in log.called if name in known] == operators
    normalised = functional.batch_norm(t.input, None, None, t.weight, t.bias, True)
    expected = ACTIVATIONS[epilogue.act](sum(t.residual, normalised))
    for function in functions(epilogue).values():
        torch.testing.assert_close(function(*arguments), expected)
    assert eager(PLAIN) is functional.batch_norm


@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU, Epilogue("silu")], ids=str)
def test_torch_holds_the_argument_and_the_result_of_the_activation(epilogue: Epilogue) -> None:
    case = Case("tiny", (2, 64, 4, 4), "bfloat16", "channels_last", (), epilogue)
    tensors = make_tensors(case)
    found = held(eager(epilogue), tensors)
    size, channels = tensors.input.nbytes, tensors.weight.nbytes
    in_place = epilogue.act == "relu"
    assert found.held_result_bytes == (size if in_place else 0)
    assert found.held_bytes - (0 if in_place else size) == 2 * channels, "the statistics"
    assert size < found.held_arguments_bytes <= size + 4 * channels, "the input and parameters; the residual is not"


def test_a_storage_is_counted_once_and_only_while_the_graph_is_there() -> None:
    case = Case("tiny", (8, 4), "float32", "contiguous", ())
    tensors = make_tensors(case)

    def function(input: Tensor, *_: Any) -> Tensor:
        (input.exp() * 2.0).detach()  # its graph is gone with it
        doubled = input * 2.0  # which saves no tensor
        return (doubled * doubled[:, :1]) @ doubled[:4]

    found = held(function, tensors)
    size = tensors.input.nbytes
    assert (found.held_arguments_bytes, found.held_result_bytes, found.held_bytes) == (0, 0, 2 * size)


def test_what_is_required_is_made_before_what_may_fail() -> None:
    case = Case("tiny", SHAPE, "float32", "contiguous", (), BN_RELU, compiled=True)
    assert list(provider_makers(case, True)) == ["torch", "bnext", "torch-compile"]
    assert list(cuda.provider_makers(case, True)) == ["torch", "bnext", "torch-no-cudnn", "torch-compile"]
    assert list(provider_makers(case, False)) == ["torch", "bnext"]


def test_the_small_tensor_is_small() -> None:
    quick = select_cases(["fused"], ["float32"], ["contiguous"], quick=True)
    assert {(8, 64, 14, 14), (32, 512, 7, 7)} <= {case.shape for case in quick}
    assert max(prod(case.shape) for case in quick) <= suites.QUICK_MAX_ELEMENTS


class Probe:
    """Lives as long as the node that it is put on."""


def test_nothing_is_held_afterwards() -> None:
    """A node that saves its own result, as that of a ReLU does, was kept alive by the hooks."""
    tensors = make_tensors(Case("tiny", (64, 64), "float32", "contiguous", ()))
    probes: list[weakref.ref[Probe]] = []

    def function(input: Tensor, *_: Any) -> Tensor:
        output = functional.relu(input)
        output.grad_fn.metadata["probe"] = probe = Probe()
        probes.append(weakref.ref(probe))
        return output

    assert held(function, tensors).held_result_bytes == tensors.input.nbytes
    assert probes[0]() is None

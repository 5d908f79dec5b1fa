"""python -m benchmarks --device cuda: what it measures, checks, reports and refuses, with the host as the GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from host_runtime import HostRuntime
from torch import Tensor

from benchmarks import operations, providers, timing
from benchmarks.__main__ import main
from benchmarks.check import MismatchError
from benchmarks.cuda import device, rotation
from benchmarks.cuda import measure as cuda
from benchmarks.cuda.check import CudaChecker, some_channels, take
from benchmarks.cuda.operations import copy_rotation, make_sets
from benchmarks.cuda.providers import without_cudnn
from benchmarks.measure import Outcome
from benchmarks.operations import make_tensors
from benchmarks.providers import Provider, compiled
from benchmarks.rows import load_rows
from benchmarks.suites import CUDA_SUITES, SUITES, TENSOR_PASSES, Case, Suite, model_bytes, select_cases
from bnext import _C

SHAPES = ((2, 3, 4, 4), (4, 8))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CUDA_SUITES, "tiny", Suite(SHAPES, tuple(TENSOR_PASSES), compiled=SHAPES))
    # What the calls take does not matter here: few of them.
    monkeypatch.setattr(rotation, "MAX_GRAPH_CALLS", 4)
    monkeypatch.setattr(timing, "MIN_ROUND_S", 1e-5)


def tiny_cases(*dtypes: str) -> list[Case]:
    return select_cases(["tiny"], dtypes or ("float32",), ["contiguous"], device="cuda")


def run(cases: list[Case], runtime: HostRuntime, **options: Any) -> Outcome:
    outcome = Outcome()
    options = {"seconds": 1.0, "rounds": 2, "threads": 1, "with_compile": False, "runtime": runtime, **options}
    finished: list[int] = []
    cuda.measure(cases, outcome, lambda _, work: finished.append(work), **options)
    assert sum(finished) == sum(cuda.case_work(case, options["with_compile"]) for case in cases), "the progress bar"
    return outcome


def test_default_suites_are_resnet50_at_two_batches_and_2d() -> None:
    cases = select_cases(
        ["resnet50-256", "resnet50-32", "2d"], ["bfloat16"], ["contiguous", "channels_last"], device="cuda"
    )
    for batch in (256, 32):
        chosen = [case for case in cases if case.suite == f"resnet50-{batch}"]
        expected = {(batch, *shape[1:]) for shape in SUITES["resnet50"].shapes}
        assert len(chosen) == 24
        assert {case.shape for case in chosen} == expected
    assert all(len(case.shape) == 2 for case in cases if case.suite == "2d")
    compiled_shapes = {case.shape for case in cases if case.compiled}
    assert len(compiled_shapes) == 6
    assert {(256, 64, 112, 112), (256, 2048, 7, 7)} <= compiled_shapes


def test_every_provider_is_timed_in_graphs_and_eagerly() -> None:
    runtime = HostRuntime()
    outcome = run(tiny_cases("float32", "bfloat16"), runtime)
    assert not outcome.mismatches
    assert not outcome.notes
    keys = [(row.shape, row.dtype, row.op, row.mode, row.provider) for row in outcome.rows]
    assert len(keys) == len(set(keys)) == 2 * 2 * len(TENSOR_PASSES) * 2 * 4
    assert {key[3:] for key in keys} == {
        (mode, provider) for mode in ("graph", "eager") for provider in ("torch", "bnext", "torch-no-cudnn", "copy")
    }
    for row in outcome.rows:
        assert row.bytes == model_bytes(row.op, row.shape, row.dtype)
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_s / 1e9)
        assert row.buffer_sets == 3 * 500 // row.bytes + 1, "three times the imagined cache of 500 bytes"
        assert (row.device, row.device_name, row.note) == ("cuda", "Imagined GPU", "")
    assert "warm up" in runtime.log


def test_the_way_that_kernels_took_is_in_the_row() -> None:
    plans = {(row.provider, row.plan) for row in run(tiny_cases(), HostRuntime()).rows}
    assert plans == {
        ("torch", ""),
        ("torch-no-cudnn", ""),
        ("copy", ""),
        ("bnext", "cluster of 8, read once"),
    }


def test_plans_for_lesser_devices_are_timed_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    caps: list[dict[str, int]] = []
    monkeypatch.setattr(_C, "cap_cuda_device", lambda **cap: caps.append(cap))
    rows = run(tiny_cases(), HostRuntime(), with_plans=True).rows
    assert {row.provider for row in rows} - {"torch", "torch-no-cudnn", "copy", "bnext"} == {
        "bnext-clusters-of-8",
        "bnext-no-clusters",
        "bnext-half-memory",
    }
    # Each cap is lifted before anything else is called.
    assert caps[1::2] == [{}] * (len(caps) // 2)
    assert {tuple(cap) for cap in caps[::2]} == {("max_cluster",), ("shared_per_block",)}


def test_large_tensors_are_timed_in_graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EAGER_MAX_BYTES", 200)
    outcome = run(tiny_cases(), HostRuntime())
    assert {(row.shape, row.mode) for row in outcome.rows} == {(SHAPES[0], "graph"), (SHAPES[1], "graph"), *()} | {
        (SHAPES[1], "eager")
    }


def test_what_cannot_be_captured_is_timed_eagerly_and_says_so() -> None:
    outcome = run(tiny_cases(), HostRuntime(captures=False))
    graphs = [row for row in outcome.rows if row.mode == "graph"]
    assert graphs
    expected = "eager, not captured: RuntimeError: operation not permitted when stream is capturing"
    assert {row.note for row in graphs} == {expected}
    assert {row.note for row in outcome.rows if row.mode == "eager"} == {""}


def wrong(*args: Any) -> Tensor:
    return torch.nn.functional.batch_norm(*args) * 1.01


def raising(*args: Any) -> Tensor:
    raise ValueError("no kernel\nfor this")


@pytest.mark.parametrize(("function", "message"), [(wrong, "output of bnext is not"), (raising, "bnext failed")])
def test_bnext_wrong_or_failing_is_a_mismatch(function: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "bnext", function)
    outcome = run(tiny_cases(), HostRuntime())
    assert not outcome.rows
    assert len(outcome.mismatches) == 2
    assert all(message in mismatch and "\n" not in mismatch for mismatch in outcome.mismatches)


@pytest.mark.parametrize("name", ["torch", "torch-no-cudnn"])
def test_torch_further_from_float64_is_timed_with_a_note(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CudaChecker.check

    def check(self: CudaChecker, provider: Provider) -> None:
        if provider.name == name:
            raise MismatchError("inaccurate")
        original(self, provider)

    monkeypatch.setattr(CudaChecker, "check", check)
    outcome = run(tiny_cases(), HostRuntime())
    assert outcome.notes == ["inaccurate"] * 2
    assert not outcome.mismatches
    assert name in {row.provider for row in outcome.rows}


def test_bnext_failing_in_one_operation_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    original = cuda.provider_rotation

    def make(operation: str, provider: Provider, *args: Any) -> Any:
        if (operation, provider.name) == ("backward", "bnext"):
            raise MemoryError("out of memory")
        return original(operation, provider, *args)

    monkeypatch.setattr(cuda, "provider_rotation", make)
    outcome = run(tiny_cases()[:1], HostRuntime())
    assert {row.op for row in outcome.rows} == set(TENSOR_PASSES) - {"backward"}
    assert len(outcome.mismatches) == 2, "a mode each"


@pytest.mark.parametrize("function", [wrong, raising])
def test_torch_compile_wrong_or_failing_is_left_out_with_a_note(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "compiled", lambda _: function)
    outcome = run(tiny_cases("bfloat16"), HostRuntime(), with_compile=True)
    assert not outcome.mismatches
    assert len(outcome.notes) == 2
    assert all("torch-compile" in note for note in outcome.notes)
    assert {row.provider for row in outcome.rows} == {"torch", "bnext", "torch-no-cudnn", "copy"}


def test_a_compiler_that_is_missing_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "compiled", raising)
    outcome = run(tiny_cases("bfloat16"), HostRuntime(), with_compile=True)
    assert len(outcome.notes) == 2
    assert outcome.rows


def test_torch_compile_is_timed_where_asked_and_in_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "compiled", lambda _: torch.nn.functional.batch_norm)
    outcome = run(tiny_cases("bfloat16", "float32"), HostRuntime(), with_compile=True)
    assert {row.dtype for row in outcome.rows if row.provider == "torch-compile"} == {"bfloat16"}


def test_a_compiled_backward_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of which a tensor is saved that is neither argument nor result: its memory could be used again."""

    def function(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *_: object) -> Tensor:
        return input.sigmoid() * weight[:, None, None] + bias[:, None, None]

    monkeypatch.setattr(torch.nn.functional, "batch_norm", function)
    tensors = make_tensors(Case("tiny", (4, 3, 2, 2), "float32", "contiguous", ()))
    batch_norm = compiled(backend="aot_eager")
    expected = operations.provider_call("backward", function, tensors)()
    # The backward is compiled when it is first run, as if there were no other: so it is found in torch's cache, too.
    output = operations.forward(batch_norm, tensors, tensors.running_mean, tensors.running_var)
    torch.autograd.grad(output, tensors.leaves, tensors.grad_output)
    call = operations.provider_call("backward", batch_norm, tensors)
    for _ in range(2):
        torch.testing.assert_close(call(), expected)


def test_cudnn_is_off_only_inside() -> None:
    assert torch.backends.cudnn.enabled
    with without_cudnn():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled


def test_sets_have_their_own_data_and_layout() -> None:
    case = Case("tiny", (2, 3, 4, 4), "bfloat16", "channels_last", ())
    sets = make_sets(case, "cpu", 3)
    assert len({tensor.data_ptr() for tensors in sets for tensor in (tensors.input, tensors.grad_output)}) == 6
    for tensors in sets:
        assert tensors.input.is_contiguous(memory_format=torch.channels_last)
        assert tensors.input.is_leaf
        assert tensors.input.requires_grad
        assert not tensors.grad_output.requires_grad
        assert not torch.equal(tensors.input, tensors.grad_output)
    assert not torch.equal(sets[1].input, sets[2].input)


@pytest.mark.parametrize("operation", TENSOR_PASSES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 3)])
def test_the_floor_moves_the_bytes_of_the_model(operation: str, shape: tuple[int, ...]) -> None:
    case = Case("tiny", shape, "bfloat16", "channels_last", ())
    results = copy_rotation(operation, case, "cpu", 2).run(2)
    targets = [result for result in results if isinstance(result, Tensor)]
    assert len({target.data_ptr() for target in targets}) == 2
    for target in targets:
        assert 0 <= 2 * target.nbytes - model_bytes(operation, shape, "bfloat16") <= 2
        assert target.any()


def test_reference_channels_are_spread_and_bounded() -> None:
    assert some_channels(Case("x", (2, 64, 4, 4), "float32", "contiguous", ())) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert some_channels(Case("x", (2, 3, 4, 4), "float32", "contiguous", ())) == [0, 1, 2]
    assert some_channels(Case("x", (256, 1, 4, 4), "float32", "contiguous", ())) == [0]
    assert len(some_channels(Case("x", (2**23, 64), "float32", "contiguous", ()))) == 4


def test_channels_are_taken_from_data_and_parameters() -> None:
    data = torch.arange(24.0).reshape(2, 3, 2, 2)
    torch.testing.assert_close(take(data, [0, 2]), data[:, [0, 2]].double())
    torch.testing.assert_close(take(data[0, :, 0, 0], [1]), torch.tensor([4.0], dtype=torch.float64))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bnext_passes_the_check_against_float64(dtype: str, layout: str) -> None:
    case = Case("tiny", (8, 16, 12, 12), dtype, layout, ())
    CudaChecker(case, make_tensors(case)).check(Provider("bnext", providers.PROVIDERS["bnext"]))


def test_the_check_sees_what_torch_gets_wrong_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 two results that are each half a unit wrong agree with one another, and one of 1.5 units does."""
    case = Case("tiny", (8, 16, 12, 12), "bfloat16", "contiguous", ())

    def truncating(*args: Any) -> Tensor:
        output = torch.nn.functional.batch_norm(*args)
        return output + output.detach().abs() * 2.0**-7  # one unit in the last place, or two

    checker = CudaChecker(case, make_tensors(case))
    with pytest.raises(MismatchError, match="output of bnext is not float64's"):
        checker.check(Provider("bnext", truncating))


def test_without_cuda_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if device.missing() is None:
        pytest.skip("there is a GPU")
    assert main(["--device", "cuda", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m benchmarks: error: cannot measure on cuda: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("cuda_version", "gpu", "kernels", "message"),
    [
        (None, False, False, "was built without CUDA"),
        ("13.0", False, True, "no GPU is visible"),
        ("13.0", True, False, "bnext was built without its CUDA kernels"),
        ("13.0", True, True, None),
    ],
)
def test_what_is_missing_is_named(
    cuda_version: str | None, gpu: bool, kernels: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(_C, "cuda", kernels)
    missing = device.missing()
    assert (missing is None) == (message is None)
    assert (message or "") in (missing or "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda", "--suite", "large"], "'large' is not one of cuda's"),
        (["--suite", "resnet50-256"], "'resnet50-256' is not one of cpu's"),
    ],
)
def test_what_does_not_go_with_a_device_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_command_line_leaves_rows_table_bars_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(cuda, "CudaRuntime", HostRuntime)
    monkeypatch.setattr(providers, "compiled", raising)
    command = ["--device", "cuda", "--suite", "tiny", "--dtype", "bfloat16", "--rounds", "1", "--threads", "1"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert {row.mode for row in load_rows(tmp_path / "results.json")} == {"graph", "eager"}
    printed = capsys.readouterr()
    assert "pass the bar against torch" in printed.out
    assert "note: tiny 2x3x4x4 bfloat16 contiguous: torch-compile failed: ValueError: no kernel" in printed.err
    assert main([*command, "--no-compile", "--output", str(tmp_path)]) == 0
    assert "note" not in capsys.readouterr().err


def test_driver_is_what_nvidia_smi_says_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def smi(*args: Any, **kwargs: Any) -> Any:
        return subprocess.CompletedProcess(args, 0, stdout="580.65.06\n580.65.06\n")

    def none(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", smi)
    assert device.driver_version() == "580.65.06"
    monkeypatch.setattr(subprocess, "run", none)
    assert device.driver_version() == ""

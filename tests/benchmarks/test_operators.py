"""One call of a batch norm: each provider's expression, the memory of its graph, and the copy of the same bytes."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks import operators
from benchmarks.cuda.measure import copy_call, make_sets
from benchmarks.cuda.providers import without_cudnn
from benchmarks.operators import eager, floor_call, functions, held, make_tensors, out_of_place, provider_call
from benchmarks.suites import Case
from benchmarks.traffic import BN_ADD_RELU, BN_RELU, PLAIN, TENSOR_PASSES, Epilogue, model_bytes


def case_of(epilogue: Epilogue, shape: tuple[int, ...] = (2, 3, 4, 4), **changes: Any) -> Case:
    fields = {"suite": "tiny", "dtype": "float32", "layout": "contiguous", **changes}
    return Case(shape=shape, epilogue=epilogue, **fields)


def address(result: Any) -> int:
    return (result[0] if isinstance(result, tuple) else result).data_ptr()


@pytest.mark.parametrize("operation", TENSOR_PASSES)
@pytest.mark.parametrize("epilogue", [PLAIN, BN_RELU, BN_ADD_RELU], ids=str)
def test_calls_return_fresh_results_and_the_floor_does_not(operation: str, epilogue: Epilogue) -> None:
    tensors = make_tensors(case_of(epilogue, (4, 8)))
    for function in functions(epilogue).values():
        call = provider_call(operation, function, tensors)
        first, second = call(), call()
        assert address(first) != address(second)
    floor = floor_call(operation, tensors)
    assert address(floor()) == address(floor())


@pytest.mark.parametrize("operation", TENSOR_PASSES)
def test_the_floors_move_the_bytes_of_the_model(operation: str) -> None:
    case = case_of(BN_ADD_RELU, (2, 8, 4, 4), dtype="bfloat16", layout="channels_last")
    moved = model_bytes(operation, case.shape, case.dtype, case.epilogue)
    tensors = make_tensors(case)
    found = floor_call(operation, tensors)()
    targets: Any = found if isinstance(found, tuple) else (found,)
    assert all(bool(target.any()) for target in targets), "the outputs were written"
    # With a residual, forward and evaluation begin with an addition, which reads twice the bytes that it writes.
    additions = 0 if operation == "backward" else tensors.input.nbytes
    assert 2 * sum(target.nbytes for target in targets) + additions == moved
    for copied in (case, case_of(PLAIN, (3, 3), dtype="bfloat16")):
        copy: Any = copy_call(operation, copied, "cpu")()
        size = model_bytes(operation, copied.shape, copied.dtype, copied.epilogue)
        assert copy.any()
        assert 0 <= 2 * copy.nbytes - size <= 2


def test_sets_have_their_own_data_and_layout() -> None:
    sets = make_sets(case_of(BN_ADD_RELU, dtype="bfloat16", layout="channels_last"), "cpu", 3)
    data = [tensor for tensors in sets for tensor in (tensors.input, tensors.grad_output, *tensors.residual)]
    assert len(set(map(address, data))) == len(data) == 9
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in data)
    assert all(tensor.is_leaf and tensor.requires_grad == (i % 3 != 1) for i, tensor in enumerate(data))
    assert not any(torch.equal(a, b) for i, a in enumerate(data) for b in data[:i])


@pytest.mark.parametrize(
    ("epilogue", "called"),
    [(BN_RELU, ["relu_"]), (BN_ADD_RELU, ["add_", "relu_"]), (Epilogue("silu"), ["silu"])],
    ids=str,
)
def test_torch_is_written_as_users_write_it(epilogue: Epilogue, called: list[str]) -> None:
    """Operators are in place where that saves memory and costs no copy; all providers compute the same."""
    t = make_tensors(case_of(epilogue))
    arguments = (t.input, None, None, t.weight, t.bias, *t.residual, True, 0.1, 1e-5)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        eager(epilogue)(*arguments)
    names = [event.name.removeprefix("aten::") for event in profiled.events()]
    assert [name for name in names if name.rstrip("_") in ("clone", "add", *operators.ACTIVATIONS)] == called
    normalised = functional.batch_norm(t.input, None, None, t.weight, t.bias, True)
    expected = operators.ACTIVATIONS[epilogue.act](sum(t.residual, normalised))
    for function in (*functions(epilogue).values(), out_of_place(epilogue)):
        torch.testing.assert_close(function(*arguments), expected)
    assert eager(PLAIN) is functional.batch_norm


def test_a_compiled_backward_can_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function saves a tensor that is neither argument nor result, whose memory a compiler may reuse."""

    def function(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *_: object) -> Tensor:
        return input.sigmoid() * weight[:, None, None] + bias[:, None, None]

    monkeypatch.setattr(torch.nn.functional, "batch_norm", function)
    tensors = make_tensors(case_of(PLAIN))
    batch_norm = operators.compiled(backend="aot_eager")
    expected = provider_call("backward", function, tensors)()
    # A first backward without retain_graph puts code into torch's cache that may reuse the memory of saved tensors.
    output = operators.forward(batch_norm, tensors, tensors.running_mean, tensors.running_var)
    torch.autograd.grad(output, tensors.leaves, tensors.grad_output)
    call = provider_call("backward", batch_norm, tensors)
    for _ in range(2):
        torch.testing.assert_close(call(), expected)


@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU, Epilogue("silu")], ids=str)
def test_torch_holds_the_argument_and_the_result_of_the_activation(epilogue: Epilogue) -> None:
    tensors = make_tensors(case_of(epilogue, (2, 64, 4, 4), dtype="bfloat16", layout="channels_last"))
    found = held(eager(epilogue), tensors)
    size, channels = tensors.input.nbytes, tensors.weight.nbytes
    in_place = epilogue.act == "relu"
    assert found["held_result_bytes"] == (size if in_place else 0)
    assert found["held_bytes"] - (0 if in_place else size) == 2 * channels, "the statistics"
    assert size < found["held_arguments_bytes"] <= size + 4 * channels, "the input and parameters; the residual is not"


def test_a_storage_is_counted_once_and_only_while_the_graph_is_there() -> None:
    tensors = make_tensors(case_of(PLAIN, (8, 4)))

    def function(input: Tensor, *_: Any) -> Tensor:
        (input.exp() * 2.0).detach()  # its graph is gone with it
        doubled = input * 2.0  # which saves no tensor
        return (doubled * doubled[:, :1]) @ doubled[:4]

    found = held(function, tensors)
    assert list(found.values()) == [0, 0, 2 * tensors.input.nbytes]


class Probe:
    """Attached to a node of a graph, it lives as long as the node."""


def test_nothing_is_held_afterwards() -> None:
    """The hooks once kept nodes alive that save their own result, as a ReLU's does."""
    probes: list[weakref.ref[Probe]] = []

    def function(input: Tensor, *_: Any) -> Tensor:
        output = functional.relu(input)
        output.grad_fn.metadata["probe"] = probe = Probe()
        probes.append(weakref.ref(probe))
        return output

    assert held(function, make_tensors(case_of(PLAIN)))["held_result_bytes"] > 0
    assert probes[0]() is None


def test_cudnn_is_off_only_inside() -> None:
    with without_cudnn():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled
